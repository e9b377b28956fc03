"""Replay: general text among the rows that a method trains on, against forgetting."""

import re
from pathlib import Path

from datasets import Dataset, IterableDataset, concatenate_datasets

from lopt_hf.common.files import atomic_file
from lopt_hf.compare.grid import Grid, GridRun
from lopt_hf.data.formats import to_trl_format
from lopt_hf.data.loading import load_sft_dataset
from lopt_hf.data.texts import is_text, prose, read_text

__all__ = ["general_rows", "write_mixture"]

# Tasks over the prose that is the default: what is trained on is not to be measured
OF_PROSE = ("offline", "offline_prose")
INSTRUCTION = "Continue this text."
# Words of a passage that are given and that are to be written; ours: within the 160 tokens of the grids here
GIVEN_WORDS, WRITTEN_WORDS = 20, 60


def general_rows(grid: Grid) -> Dataset | IterableDataset:
    """Returns the rows of general text: `replay_dataset` in TRL's layout, or passages of a text to be continued.

    Raises:
        ValueError: If the text is also measured, or cannot be used.
        FileNotFoundError: If it is not there, or no hub answers.
    """
    name = grid.replay_dataset
    if name is None:
        measured = [task for task in grid.tasks if task in OF_PROSE]
        if measured:
            raise ValueError(
                f"replay_dataset is not set, so it is the prose that every Python carries, on which {measured[0]} "
                "measures; name other text."
            )
        return _passages(prose("first"))
    if is_text(name):
        return _passages(read_text(name, "replay_dataset", fallback=None))  # else it would pass for the hub's text
    return to_trl_format(load_sft_dataset(name, None, grid.replay_split), skips_empty=True)


def write_mixture(run: GridRun, data: Path, target: Path) -> None:
    """Writes what a run with a `replay_share` trains on: the rows that others with its seed draw, and general text.

    Args:
        run: The run.
        data: Folder of `train.jsonl` and `replay.jsonl`.
        target: The file.
    """
    counts = {"train": run.num_train, "replay": run.num_replayed}
    drawn = [_draw(data / f"{name}.jsonl", count, run.seed) for name, count in counts.items()]
    with atomic_file(target) as partial:
        concatenate_datasets(drawn).to_json(partial)


def _draw(path: Path, count: int, seed: int) -> Dataset:
    rows = load_sft_dataset(str(path))
    assert isinstance(rows, Dataset)
    return rows.shuffle(seed=seed).take(count)  # as `dataset_max_samples` draws them


def _passages(text: str) -> Dataset:
    """Conversations in which the beginning of a passage is given, and how it goes on is the answer."""
    length = GIVEN_WORDS + WRITTEN_WORDS
    blocks = [block.split() for block in dict.fromkeys(re.split(r"\n\s*\n", text))]
    passages = [block[at : at + length] for block in blocks for at in range(0, len(block) - length + 1, length)]
    if not passages:
        raise ValueError(f"replay_dataset: no paragraph has the {length} words of a passage; name longer text.")
    prompts = [f"{INSTRUCTION}\n\n{' '.join(words[:GIVEN_WORDS])}" for words in passages]
    answers = [" ".join(words[GIVEN_WORDS:]) for words in passages]
    return Dataset.from_dict(
        {
            "prompt": [[{"role": "user", "content": prompt}] for prompt in prompts],
            "completion": [[{"role": "assistant", "content": answer}] for answer in answers],
        }
    )
