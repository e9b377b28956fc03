"""TRL trainers with a gradient boundary."""
