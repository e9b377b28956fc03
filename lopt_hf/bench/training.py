"""What the benchmarks' processes share when they train: the batches, and silence."""

import logging
import warnings
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["silence", "token_rows"]


def silence() -> None:
    """Leaves stderr to the parent's progress bar."""
    import datasets
    import transformers

    warnings.simplefilter("ignore")
    logging.getLogger("lopt_hf").setLevel(logging.ERROR)  # advice on learning rates, which are not the point here
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    datasets.disable_progress_bars()


def token_rows(tokenizer: "PreTrainedTokenizerBase", count: int, seq_length: int, seed: int) -> list[list[int]]:
    """Cuts the documentation that every Python carries into `count` rows of `seq_length` tokens."""
    from pydoc_data.topics import topics
    from random import Random

    names = sorted(topics)
    Random(seed).shuffle(names)
    text = "\n\n".join(topics[name] for name in names)
    tokens = tokenizer(text, add_special_tokens=False)["input_ids"]
    repeats = -(-count * seq_length // len(tokens))
    return [(tokens * repeats)[start : start + seq_length] for start in range(0, count * seq_length, seq_length)]
