"""What an evaluation costs: tokens before it begins, and minutes as soon as the first batch is done."""

import platform
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from lm_eval.api.instance import Instance
from lm_eval.api.model import CacheHook
from lm_eval.models.huggingface import HFLM
from tqdm.auto import tqdm

from lopt_hf.retention.lengths import check_answers, count_tokens, tell_cut_prompts, written_tokens

__all__ = ["Workload", "describe_device", "duration", "told_cost"]

LONG = 90  # of seconds or minutes; from there on the next unit is more readable


@dataclass(frozen=True)
class Workload:
    """What requests of one kind ask of a model.

    Parameters:
        requests: How many.
        read: Tokens of all texts that it reads.
        written: Tokens that it writes at most; 0 for likelihoods.
    """

    requests: int
    read: int
    written: int

    @classmethod
    def of(cls, requests: Sequence[Instance], lengths: Sequence[int], language_model: HFLM) -> "Workload":
        """Adds up the tokens of requests, which are lm-eval's and of one kind, and of what may be written."""
        written = sum(written_tokens(request, language_model) for request in requests)
        return cls(len(requests), sum(lengths), written)

    def __str__(self) -> str:
        writing = f" and at most {self.written:,} to write" if self.written else ""
        return f"{self.requests:,} requests with {self.read:,} tokens to read{writing}"


@contextmanager
def told_cost(language_model: HFLM, requests: Sequence[Instance]) -> Iterator[None]:
    """Says what requests cost while they are answered: their tokens at once, and the time after the first batch.

    The time is measured from the first forward to the second one, and for answers that are written to the first one
    that is done. A batch of likelihoods stands for its share of the tokens to read, one of answers for its rows.

    Args:
        language_model: The model, wrapped for lm-eval.
        requests: Of one kind, and all that is asked in one go.

    Raises:
        ValueError: If an answer whose likelihood is asked does not fit into the model.
    """
    if not requests:
        yield
        return
    lengths = count_tokens(requests, language_model)
    check_answers(requests, lengths, language_model)  # on every process, as each has requests of its own
    if language_model.rank != 0:
        yield
        return
    workload = Workload.of(requests, lengths, language_model)
    _say(str(workload))
    tell_cut_prompts(requests, lengths, language_model)
    hook = language_model.cache_hook
    first = _FirstBatch(hook, workload)
    # Not the model, whose forward an adapter's model calls past its hooks
    handle = language_model.model.get_input_embeddings().register_forward_pre_hook(first.forward)
    language_model.set_cache_hook(first)
    try:
        yield
    finally:
        handle.remove()
        language_model.set_cache_hook(hook)


class _FirstBatch(CacheHook):
    """Keeps answers as the hook in whose place it stands, and measures the first batch.

    Args:
        hook: The one in whose place it stands.
        workload: All that is asked.
    """

    def __init__(self, hook: CacheHook, workload: Workload) -> None:
        self.dbdict = hook.dbdict
        self._workload = workload
        self._started: float | None = None
        self._is_measured = False
        self._share = 1.0

    def forward(self, module: torch.nn.Module, args: tuple[Any, ...]) -> None:
        """Is called before each forward of the model with its tokens."""
        if self._started is not None:
            if not self._workload.written:
                self._end()
            return
        (ids, *_), work = args, self._workload
        self._share = len(ids) / work.requests if work.written else ids.numel() / max(work.read, 1)
        self._started = time.perf_counter()

    def add_partial(self, attr: str, req: Any, res: Any) -> None:
        """Keeps an answer."""
        self._end()
        super().add_partial(attr, req, res)

    def _end(self) -> None:
        if self._is_measured or self._started is None:
            return
        self._is_measured = True
        if self._share < 1:  # one batch is all
            seconds = (time.perf_counter() - self._started) / self._share
            _say(f"About {duration(seconds)} on this device ({describe_device()}), by the first batch")


def duration(seconds: float) -> str:
    """Returns a time in seconds, minutes or hours."""
    if seconds < LONG:
        return f"{seconds:.0f} seconds"
    minutes = seconds / 60
    return f"{minutes:.0f} minutes" if minutes < LONG else f"{minutes / 60:.1f} hours"


def describe_device() -> str:
    """Returns the name of the accelerator, or what the CPU can do and how many threads of it are used."""
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    if accelerator is None:
        instructions = torch.backends.cpu.get_cpu_capability()
        return f"CPU, {platform.machine()} with {instructions}, {torch.get_num_threads()} threads"
    if accelerator.type in ("cuda", "xpu"):  # others have no names
        return torch.get_device_module(accelerator).get_device_name()
    return str(accelerator)


def _say(text: str) -> None:
    """Prints a line between the progress bars."""
    tqdm.write(text, file=sys.stderr)
