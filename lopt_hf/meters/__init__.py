"""What a training step keeps and moves: bytes saved for backward, bytes of gradients, drift of weights."""
