"""What the README's figures come from: one command for each table in ``results/``."""
