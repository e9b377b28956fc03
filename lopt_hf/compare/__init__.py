"""Grids of runs: methods, learning rates and seeds, trained and measured on the same data."""
