"""Times of a simulated pipeline's stages, from the command line or from a file of measured ones."""

import json
import math
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lopt_hf.common.settings import suggest
from lopt_hf.pipeline.simulator.schedule_workload import StageTimes

__all__ = ["TimesSource", "read_times"]

DEFAULT_STAGES = 4
MOST_STAGES = 10_000  # ours: far beyond any pipeline, and still simulated in minutes
LISTS = ("forward", "backward", "local", "optimizer")
NUMBERS = ("message_bytes", "tokens_per_microbatch")


@dataclass(frozen=True)
class TimesSource:
    """Times of a pipeline whose number of stages may still be open.

    Attributes:
        forward, backward, local, optimizer: As in `StageTimes`; a single value is for all stages, except that the last
            one has no local objective.
        message_bytes: Size of a micro-batch's hidden states.
        tokens_per_microbatch: Tokens of a micro-batch.
        whole_model: The times are those of the whole model and shared out evenly. The local objective is not: each
            stage but the last has one, however many there are.
    """

    forward: tuple[float, ...]
    backward: tuple[float, ...]
    local: tuple[float, ...] = (0.0,)
    optimizer: tuple[float, ...] = (0.0,)
    message_bytes: float = 0.0
    tokens_per_microbatch: int | None = None
    whole_model: bool = False

    @property
    def num_stages(self) -> int | None:
        """The number of stages that the times are for; `None` if they suit any number."""
        longest = max(len(getattr(self, name)) for name in LISTS)
        return None if self.whole_model or longest == 1 else longest

    @property
    def default_stages(self) -> int:
        """Number of stages to simulate where none is given."""
        return self.num_stages or DEFAULT_STAGES

    def of(self, stages: int) -> StageTimes:
        """Returns the times for a number of stages.

        Raises:
            ValueError: If the times are those of another number of stages, or if there are none or too many of these.
        """
        if stages < 1:
            raise ValueError(f"stages={stages}: must be at least 1.")
        if stages > MOST_STAGES:
            raise ValueError(f"stages={stages}: must be at most {MOST_STAGES:,}.")
        if self.whole_model:
            mean_local = statistics.fmean(self.local if len(self.local) == 1 else self.local[:-1])
            forward, backward, optimizer = (
                sum(values) / stages for values in (self.forward, self.backward, self.optimizer)
            )
            return StageTimes.equal(stages, forward, backward, mean_local, optimizer)
        if self.num_stages not in (None, stages):
            raise ValueError(
                f"stages={stages}: the times are those of {self.num_stages} stages; give one time for all stages, or "
                "share them out evenly with --whole-model."
            )
        local = self.local * (stages - 1) + (0.0,) if len(self.local) == 1 else self.local
        return StageTimes(*(_each(values, stages) for values in (self.forward, self.backward, local, self.optimizer)))


def _each(values: tuple[float, ...], stages: int) -> tuple[float, ...]:
    return values * stages if len(values) == 1 else values


def read_times(path: Path, whole_model: bool = False) -> TimesSource:
    """Reads a file of measured times.

    Args:
        path: JSON: an object with lists `forward` and `backward`, and, if wanted, `local` and `optimizer`: seconds for
            one micro-batch, one number for each stage; and numbers `message_bytes` and `tokens_per_microbatch`.
        whole_model: See `TimesSource`.

    Raises:
        ValueError: If there is no such file, or something is wrong in it.
    """
    try:
        content = json.loads(path.read_text())
    except OSError as error:
        raise ValueError(f"times={path}: {error.strerror}; name a JSON file of measured times.") from error
    except ValueError as error:
        raise ValueError(f"times={path}: not JSON: {error}.") from error
    if not isinstance(content, dict):
        raise ValueError(f'times={path}: must be an object such as {{"forward": [0.1], "backward": [0.2]}}.')
    _check_keys(path, content)
    for name, value in content.items():
        if name in LISTS and not (isinstance(value, list) and value):
            raise ValueError(f"times={path}: {name}={value!r} must be a list of seconds, one for each stage.")
        for number in value if name in LISTS else [value]:
            if isinstance(number, bool) or not isinstance(number, int | float) or not 0 <= number < math.inf:
                raise ValueError(f"times={path}: {name} has {number!r}, which is no finite number of at least 0.")
    lists: dict[str, Any] = {name: tuple(map(float, content.pop(name))) for name in LISTS if name in content}
    if len({len(values) for values in lists.values()}) > 1:
        lengths = ", ".join(f"{name} {len(values)}" for name, values in lists.items())
        raise ValueError(f"times={path}: the lists have {lengths} numbers; give one for each stage in all of them.")
    return TimesSource(**lists, **content, whole_model=whole_model)


def _check_keys(path: Path, content: dict[str, object]) -> None:
    for key in content.keys() - {*LISTS, *NUMBERS}:
        raise ValueError(f"times={path}: unknown key {key!r}; {suggest(key, (*LISTS, *NUMBERS))}")
    for key in ("forward", "backward"):
        if key not in content:
            raise ValueError(f"times={path}: {key!r} is missing: a list with the seconds of each stage.")
