"""What a recipe will need: memory, arithmetic and time of a training step, simulated without weights or a GPU."""
