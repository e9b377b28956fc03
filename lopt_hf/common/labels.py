"""Labels of tokens, as transformers and TRL have them."""

__all__ = ["IGNORED_LABEL"]

IGNORED_LABEL = -100  # of a token that does not count in the loss: `ignore_index` of torch's cross-entropy
