"""Settings of the methods that both `lopt-hf bench step` and `lopt-hf plan` compare."""

__all__ = ["REPL_EVERY", "mlaan_window"]

REPL_EVERY = 4  # RepL, arXiv 2605.19533: every 4th layer


def mlaan_window(num_blocks: int) -> int:
    """Returns the blocks of a window: MLAAN's two (its code), or one where two would be the whole model."""
    return min(2, num_blocks - 1)
