"""Measurements of the cost of training: memory and time per step."""
