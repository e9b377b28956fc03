"""Results of a comparison as tables and as JSON."""

import json
import math
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from lopt_hf.common.sample_scores import RatioScores
from lopt_hf.common.statistics import Interval, difference_interval
from lopt_hf.common.tables import markdown_table
from lopt_hf.repl.experiment import FULL, PLAIN, Row
from lopt_hf.repl.placement import runs_of

__all__ = ["compare_rows", "describe_removed", "to_json", "to_markdown"]


def compare_rows(rows: Sequence[Row], reference: Sequence[Row]) -> Interval:
    """Returns the difference in nats per token between a model and another one, on the same chunks and seeds.

    Args:
        rows: The model, one row for each seed.
        reference: The other model, likewise.
    """
    scores = [
        [RatioScores(row.losses, lambda ratio: ratio)] for pair in zip(rows, reference, strict=True) for row in pair
    ]
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


def describe_removed(layers: Sequence[int]) -> str:
    """Says in one line which layers went, such as "Removed: layers 3, 11 to 18 (counted from 0)"."""
    spans = [f"{first}" if end == first + 1 else f"{first} to {end - 1}" for first, end in runs_of(layers)]
    return f"Removed: layer{'s' if len(layers) > 1 else ''} {', '.join(spans)} (counted from 0)"


def to_markdown(rows: Sequence[Row]) -> str:
    """Returns the rows as tables: untrained, and trained where there was training (geometric means over seeds)."""
    tables = [_table(_by_name(rows, trained), _references(rows, trained), trained) for trained in (False, True)]
    removed = next((row.removed for row in rows if row.removed), [])
    parts = [f"{describe_removed(removed)}." if removed else "", *tables]
    return "\n\n".join(part for part in parts if part)


def _references(rows: Sequence[Row], trained: bool) -> dict[str, list[Row]]:
    """The rows of the full model and of plain removal; the full model as it was where it is not trained itself."""
    groups = _by_name(rows, trained)
    found = {name: groups[name] for name in (FULL, PLAIN) if name in groups}
    if groups and FULL not in found:
        num_seeds = len(next(iter(groups.values())))
        found = {name: members * num_seeds for name, members in _by_name(rows, False).items() if name == FULL} | found
    return found


def _table(groups: dict[str, list[Row]], references: dict[str, list[Row]], trained: bool) -> str:
    if not groups:
        return ""
    num_seeds = len(next(iter(groups.values())))
    seeds = f", {num_seeds} seed{'s' if num_seeds > 1 else ''}" if trained else ""
    what = f"after training{seeds}" if trained else "no training"
    rows = []
    for name, members in groups.items():
        cost = members[0].cost_ratio
        ratios = [
            "" if name == other or other not in references else _ratio(compare_rows(members, references[other]))
            for other in (FULL, PLAIN)
        ]
        count = f"{members[0].parameters / 1e6:.1f} M"
        kind = "stock" if members[0].is_stock else "RepL"
        rows.append([name, "" if cost is None else f"{cost:.3f}", count, kind, _perplexity(members), *ratios])
    headings = ["perplexity", "x full model [95 %]", "x plain removal [95 %]"]
    return markdown_table([what, "surrogate / removed", "parameters", "class", *headings], rows)


def to_json(rows: Sequence[Row], settings: dict[str, Any]) -> str:
    """Returns rows, settings and the differences from both references, in nats per token, as JSON text."""
    report = {
        "settings": settings,
        "rows": [asdict(row) for row in rows],
        "against_full_model": _differences(rows, FULL),
        "against_plain_removal": _differences(rows, PLAIN),
    }
    return json.dumps(report, indent=2, default=str)


def _differences(rows: Sequence[Row], reference: str) -> list[dict[str, Any]]:
    differences = []
    for trained in (False, True):
        others = _references(rows, trained).get(reference)
        for name, members in _by_name(rows, trained).items():
            if name != reference and others is not None:
                found = compare_rows(members, others)
                differences.append(
                    {"name": name, "trained": trained, "delta": found.delta, "low": found.low, "high": found.high}
                )
    return differences
