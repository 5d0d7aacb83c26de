"""Inputs that are wrong, damaged or hostile, as tables; ``make faults`` runs and counts them all."""
