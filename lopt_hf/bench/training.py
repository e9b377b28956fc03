"""Helpers of the benchmarks' processes: the model's layers, their batches, and silence."""

import logging
import warnings
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["SHARED_ARGUMENTS", "num_layers", "silence", "token_rows"]


# Training arguments of every method: the same batches in the same order, and nothing besides the steps
SHARED_ARGUMENTS = {
    "train_sampling_strategy": "sequential",
    "lr_scheduler_type": "constant",  # methods run different numbers of steps; their losses stay comparable
    "logging_strategy": "no",
    "save_strategy": "no",
    "report_to": "none",
    "disable_tqdm": True,
}


def num_layers(model: str, checkpoint: str, seq_length: int) -> int:
    """The number of a model's decoder layers, from its configuration alone.

    Args:
        model: What the user called it.
        checkpoint: Where it is.
        seq_length: Tokens that it is to take.

    Raises:
        ValueError: If there is no such model, or if it does not take as many tokens.
    """
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(checkpoint).get_text_config(decoder=True)
    except OSError as error:
        raise ValueError(
            f"model={model!r} is neither a local checkpoint nor a model on a hub that can be reached; pass the path "
            "of a folder that holds a config.json."
        ) from error
    longest = getattr(config, "max_position_embeddings", None)  # which GPT-2 calls n_positions
    if longest is not None and seq_length > longest:
        raise ValueError(f"seq_length={seq_length}: the model takes {longest} tokens; use at most {longest}.")
    return int(config.num_hidden_layers)


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
