"""What an experiment found, as a table and as JSON."""

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any, Protocol

from lopt_hf.repl.experiment import PLAIN, Row

__all__ = ["Difference", "to_json", "to_markdown"]


class Difference(Protocol):
    """A difference in nats per token with its interval."""

    @property
    def delta(self) -> float: ...
    @property
    def low(self) -> float: ...
    @property
    def high(self) -> float: ...


Compare = Callable[[Sequence[Row], Sequence[Row]], Difference]


def _by_name(rows: Sequence[Row], trained: bool) -> dict[str, list[Row]]:
    chosen = [row for row in rows if (row.seed is not None) == trained]
    return {name: [row for row in chosen if row.name == name] for name in dict.fromkeys(row.name for row in chosen)}


def _perplexity(rows: Sequence[Row]) -> str:
    return _number(math.exp(sum(row.mean_loss for row in rows) / len(rows)))


def _number(value: float) -> str:
    return f"{value:.2f}" if value < 1e4 else f"{value:.1e}"


def _ratio(interval: Difference) -> str:
    middle, low, high = (math.exp(value) for value in (interval.delta, interval.low, interval.high))
    return f"{_number(middle)} [{_number(low)}, {_number(high)}]"


def to_markdown(rows: Sequence[Row], compare: Compare) -> str:
    """The rows as tables: untrained, and trained where there was training (geometric means over seeds).

    Args:
        rows: All rows.
        compare: Gives the difference between a model and plain removal from the rows of each, one for each seed.
    """
    tables = [_table(_by_name(rows, trained), trained, compare) for trained in (False, True)]
    return "\n\n".join(table for table in tables if table)


def _table(groups: dict[str, list[Row]], trained: bool, compare: Compare) -> str:
    if not groups:
        return ""
    num_seeds = len(next(iter(groups.values())))
    seeds = f", {num_seeds} seed{'s' if num_seeds > 1 else ''}" if trained else ""
    what = f"after training{seeds}" if trained else "no training"
    lines = [[what, "surrogate / layer", "parameters", "perplexity", "x plain removal [95 %]"]]
    lines += [["---", "---:", "---:", "---:", "---:"]]
    for name, members in groups.items():
        cost = members[0].cost_ratio
        ratio = "" if name == PLAIN or PLAIN not in groups else _ratio(compare(members, groups[PLAIN]))
        count = f"{members[0].parameters / 1e6:.1f} M"
        lines.append([name, "" if cost is None else f"{cost:.3f}", count, _perplexity(members), ratio])
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def to_json(rows: Sequence[Row], compare: Compare, settings: dict[str, Any]) -> str:
    """The rows with the settings, and the differences from plain removal with their intervals in nats per token."""
    differences = []
    for trained in (False, True):
        groups = _by_name(rows, trained)
        for name, members in groups.items():
            if name != PLAIN and PLAIN in groups:
                found = compare(members, groups[PLAIN])
                differences.append(
                    {"name": name, "trained": trained, "delta": found.delta, "low": found.low, "high": found.high}
                )
    report = {"settings": settings, "rows": [asdict(row) for row in rows], "against_plain_removal": differences}
    return json.dumps(report, indent=2, default=str)
