"""What the early stages of a pipeline learn from."""

__all__ = ["GRADIENTS", "default_gradient"]

GRADIENTS = ("local", "delayed", "local_and_delayed")


def default_gradient(local_objective: str | None, num_blocks: int, num_stages: int | None) -> str:
    """Returns which of `GRADIENTS` a pipeline takes where none is named.

    Args:
        local_objective: The local objective that is asked for, if one is.
        num_blocks: Blocks of the model.
        num_stages: Stages; late gradients cross the cuts between them only.
    """
    return "local" if local_objective not in (None, "none") or num_blocks != num_stages else "delayed"
