"""What the package promises about one training step of a 7B model on a GPU, beside what was measured."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lopt_hf.bench.gpu.parts import Outcome
from lopt_hf.bench.gpu.rows import BASELINE, STEP_ROWS

__all__ = ["Target", "find_targets", "plan_row", "ratio"]

# By row: the most that its activations, and its time, may be of end-to-end training's. Ours.
ACTIVATIONS = {"LoPT K=2": 0.55, "LoPT K=4": 0.32}
TIMES = {"LoPT K=2": 1.02, "LoPT K=4": 1.02, "K=4, reach 1,1,1,4": 0.75}
PLAN = 0.05  # a plan is to be within this share of the measured peak


@dataclass(frozen=True)
class Target:
    """A number that is to be small.

    Attributes:
        name: What it is.
        limit: The most that it may be.
        measured: What it is; `None` where it was not measured.
    """

    name: str
    limit: float
    measured: float | None

    @property
    def is_met(self) -> bool | None:
        """Whether the target is met; `None` if it was not measured."""
        return None if self.measured is None else self.measured <= self.limit


def find_targets(model: str, outcomes: Mapping[str, Outcome], plan: Outcome | None) -> list[Target]:
    """The targets of a model's steps."""
    baseline = outcomes.get(BASELINE)
    targets = [
        Target(f"{model}, {row}: {what}, relative to end-to-end", limit, ratio(outcomes.get(row), baseline, key))
        for limits, key, what in (
            (ACTIVATIONS, "saved_bytes", "activations saved for backward"),
            (TIMES, "step_seconds", "time of a step"),
        )
        for row, limit in limits.items()
    ]
    errors = {
        row.name: abs(planned["cost"]["peak_bytes"] / outcomes[row.name].values["peak_bytes"] - 1)
        for row in STEP_ROWS
        if (planned := plan_row(plan, row.plan)) and row.name in outcomes and outcomes[row.name].values
    }
    worst = max(errors, key=errors.__getitem__, default=None)
    where = f" (worst of {len(errors)}: {worst})" if worst else ""
    return [*targets, Target(f"{model}: error of the planned peak{where}", PLAN, errors[worst] if worst else None)]


def ratio(outcome: Outcome | None, baseline: Outcome | None, key: str) -> float | None:
    """A value relative to the baseline's; `None` where one of them was not measured."""
    if outcome is None or baseline is None or not outcome.values or not baseline.values:
        return None
    value, base = outcome.values[key], baseline.values[key]
    return value / base if value is not None and base else None


def plan_row(plan: Outcome | None, name: str | None) -> dict[str, Any] | None:
    """The row of a plan with that name, if there is one."""
    if plan is None or name is None or not plan.values:
        return None
    rows: list[dict[str, Any]] = plan.values["rows"]
    return next((row for row in rows if row["strategy"]["name"] == name), None)
