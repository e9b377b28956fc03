"""What a check consists of: parts, each a process with a time limit of its own, and the cases in them."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

__all__ = ["Case", "Outcome", "Part"]


@dataclass(frozen=True)
class Case:
    """One measurement: a row of the table.

    Attributes:
        name: Of the row; no other of its part has it.
        run: Does it, given a folder that all cases of a check share; returns what the JSON file is to hold. A module's
            function or an object of a module's class, since it is sent to a process.
        needs: Modules without which it is skipped; `"cuda"` stands for such a device.
    """

    name: str
    run: Callable[[Path], dict[str, Any]]
    needs: tuple[str, ...] = ()


@dataclass(frozen=True)
class Part:
    """Cases that run one after another in one process.

    Attributes:
        name: Its heading.
        kind: Which table its results are shown in, see `report`.
        cases: The most important first: a time limit loses the last.
        limit: Seconds after which it is ended, from the end of its imports on; these may take as long.
        environment: Variables that its process has from its start on.
        in_background: Whether it runs beside the parts that follow. It is not to use the GPU.
        threads: CPU threads; torch's default if unset.
    """

    name: str
    kind: str
    cases: tuple[Case, ...]
    limit: float
    environment: Mapping[str, str] = field(default_factory=dict)
    in_background: bool = False
    threads: int | None = None


@dataclass(frozen=True)
class Outcome:
    """What became of a case.

    Attributes:
        part: Name of its part.
        case: Its name.
        status: `"done"`, `"skipped"` (the machine lacks what it needs), `"failed"`, or `"not reached"` in time.
        seconds: How long it took.
        values: What it returned.
        reason: Why it was not done.
        trace: Where it failed, for the log.
    """

    part: str
    case: str
    status: str
    seconds: float = 0.0
    values: Mapping[str, Any] = field(default_factory=dict)
    reason: str = ""
    trace: str = ""
