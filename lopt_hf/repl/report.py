"""Results of a comparison as tables and as JSON."""

import json
import math
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from lopt_hf.common.sample_scores import RatioScores
from lopt_hf.common.statistics import Interval, difference_interval
from lopt_hf.common.tables import markdown_table
from lopt_hf.repl.experiment import PLAIN, Row

__all__ = ["against_plain", "to_json", "to_markdown"]


def against_plain(rows: Sequence[Row], plain: Sequence[Row]) -> Interval:
    """Returns the difference in nats per token between a model and plain removal, on the same chunks and seeds.

    Args:
        rows: The model, one row for each seed.
        plain: Plain removal, likewise.
    """
    scores = [[RatioScores(row.losses, lambda ratio: ratio)] for pair in zip(rows, plain, strict=True) for row in pair]
    coefficients = [[0.0] * len(scores) for _ in rows]
    for seed, of_seed in enumerate(coefficients):
        of_seed[2 * seed : 2 * seed + 2] = [1.0, -1.0]
    return difference_interval(scores, coefficients)


def _by_name(rows: Sequence[Row], trained: bool) -> dict[str, list[Row]]:
    chosen = [row for row in rows if (row.seed is not None) == trained]
    return {name: [row for row in chosen if row.name == name] for name in dict.fromkeys(row.name for row in chosen)}


def _perplexity(rows: Sequence[Row]) -> str:
    return _number(math.exp(sum(row.mean_loss for row in rows) / len(rows)))


def _number(value: float) -> str:
    return f"{value:.2f}" if value < 1e4 else f"{value:.1e}"


def _ratio(interval: Interval) -> str:
    middle, low, high = (math.exp(value) for value in (interval.delta, interval.low, interval.high))
    return f"{_number(middle)} [{_number(low)}, {_number(high)}]"


def to_markdown(rows: Sequence[Row]) -> str:
    """Returns the rows as tables: untrained, and trained where there was training (geometric means over seeds)."""
    tables = [_table(_by_name(rows, trained), trained) for trained in (False, True)]
    return "\n\n".join(table for table in tables if table)


def _table(groups: dict[str, list[Row]], trained: bool) -> str:
    if not groups:
        return ""
    num_seeds = len(next(iter(groups.values())))
    seeds = f", {num_seeds} seed{'s' if num_seeds > 1 else ''}" if trained else ""
    what = f"after training{seeds}" if trained else "no training"
    rows = []
    for name, members in groups.items():
        cost = members[0].cost_ratio
        ratio = "" if name == PLAIN or PLAIN not in groups else _ratio(against_plain(members, groups[PLAIN]))
        count = f"{members[0].parameters / 1e6:.1f} M"
        kind = "stock" if members[0].is_stock else "RepL"
        rows.append([name, "" if cost is None else f"{cost:.3f}", count, kind, _perplexity(members), ratio])
    return markdown_table(
        [what, "surrogate / removed", "parameters", "class", "perplexity", "x plain removal [95 %]"], rows
    )


def to_json(rows: Sequence[Row], settings: dict[str, Any]) -> str:
    """Returns rows, settings and the differences from plain removal, in nats per token, as JSON text."""
    differences = []
    for trained in (False, True):
        groups = _by_name(rows, trained)
        for name, members in groups.items():
            if name != PLAIN and PLAIN in groups:
                found = against_plain(members, groups[PLAIN])
                differences.append(
                    {"name": name, "trained": trained, "delta": found.delta, "low": found.low, "high": found.high}
                )
    report = {"settings": settings, "rows": [asdict(row) for row in rows], "against_plain_removal": differences}
    return json.dumps(report, indent=2, default=str)
