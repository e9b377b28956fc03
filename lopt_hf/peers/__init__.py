"""Ways to train end to end for less that stand beside local learning in the benches: LISA, BAdam, and controls."""
