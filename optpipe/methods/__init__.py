"""Pruning methods, a file each: a name in a recipe is a file's name."""
