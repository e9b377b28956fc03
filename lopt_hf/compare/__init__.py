"""Comparison of training runs: grids over methods, learning rates and seeds, and curves of what runs logged."""
