"""Measurements of what training costs: activation memory and time per step."""
