"""A plan as a table, as JSON and as a picture."""

import json
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from lopt_hf.common.figures import OKABE_ITO, new_figure
from lopt_hf.common.tables import describe_run, markdown_table, ratio_text
from lopt_hf.planner.memory import CATEGORIES
from lopt_hf.planner.plan import Plan, PlanRow
from lopt_hf.planner.strategies import END_TO_END
from lopt_hf.planner.units import SizeUnit, size_text, suitable_unit

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["plot_plan", "to_json", "to_markdown"]

# One for each category
COLORS = ("#999999", *(OKABE_ITO[name] for name in ("orange", "blue", "green", "vermilion", "purple")))
UNTIED = (
    "Embedding and LM head are one weight: cut into blocks they become two, unless `--tied-embeddings freeze` keeps "
    "them as they are."
)
GIGA = 1e9
QUANTISED = "The checkpoint is quantised; its weights are counted as if they were not: what is needed is less."


def to_markdown(plan: Plan) -> str:
    """The table, per device in the unit that suits its sizes, and the sentences that a reader needs with it."""
    unit = _unit(plan)
    header = ["strategy", *CATEGORIES, "**peak**", "saved for backward", "fits", "GFLOP/token", "time x e2e"]
    table = markdown_table(header, [_cells(plan, row, unit) for row in plan.rows], (0, header.index("fits")))
    return "\n".join([table, "", *_notes(plan, unit)])


def _unit(plan: Plan) -> SizeUnit:
    return suitable_unit(max((row.cost.peak_bytes for row in plan.rows), default=plan.settings.device_bytes))


def _cells(plan: Plan, row: PlanRow, unit: SizeUnit) -> list[str]:
    name = f"**{row.strategy.name}** (cheapest)" if row is plan.cheapest else row.strategy.name
    return [
        name,
        *(unit.count(row.cost.peak[category]) for category in CATEGORIES),
        f"**{unit.count(row.cost.peak_bytes)}**",
        "-" if row.cost.saved_bytes is None else unit.count(row.cost.saved_bytes),
        "yes" if row.fits else "no",
        f"{row.flops_per_token / GIGA:,.2f}",
        ratio_text(row.relative_time),
    ]


def _notes(plan: Plan, unit: SizeUnit) -> list[str]:
    settings = plan.settings
    notes = [
        f"{settings.model}: batch {settings.batch_size} x {settings.seq_length} tokens, {settings.dtype} weights, "
        f"{settings.optim}, {_devices(plan)}, {unit.name} on the fullest device at the moment of the peak.",
        *([QUANTISED] if plan.is_quantized else []),
        *([UNTIED] if any(row.strategy.unties_embeddings for row in plan.rows) else []),
        _verdict(plan),
        _time_note(plan),
    ]
    return notes + [f"Left out: {reason}" for reason in plan.left_out]


def _devices(plan: Plan) -> str:
    devices = plan.settings.num_gpus
    return "1 device" if devices == 1 else f"{devices} devices (DDP, or stages of a pipeline)"


def _verdict(plan: Plan) -> str:
    settings, chosen = plan.settings, plan.cheapest
    size = f"{size_text(settings.device_bytes)} with {settings.headroom:.0%} kept free"
    if chosen is None:
        smallest = plan.smallest
        needed = smallest.cost.peak_bytes / (1 - settings.headroom)
        return (
            f"Nothing fits in {size}. The least is {smallest.strategy.name!r} with {size_text(needed)} (the share "
            "kept free included): take a larger device, more devices, a smaller batch or shorter sequences."
        )
    verdict = f"Cheapest that fits in {size}: {chosen.strategy.name} ({_trained(chosen)})."
    others = [row.strategy.name for row in plan.rows if row.fits and row is not chosen]
    if END_TO_END in others:
        verdict += " End-to-end training fits too, and learns most from the same rows."
    return verdict


def _trained(row: PlanRow) -> str:
    if row.strategy.trains_all:
        return "every weight is trained"
    if row.strategy.trains_layers:
        return "every weight but the tied embeddings is trained"
    return "nothing that trains every weight fits"


def _time_note(plan: Plan) -> str:
    if plan.speed is None:
        return "Time: by FLOPs per token alone; `--calibrate FILE` measures a device."
    seconds = next((row.step_seconds for row in plan.rows if row.step_seconds is not None), None)
    first = "" if seconds is None else f" A step of {plan.rows[0].strategy.name!r}: {seconds:.2f} s."
    measured = ", ".join(filter(None, (plan.speed.device, plan.speed.dtype)))
    return f"Time: at the speed of {plan.speed.name} ({measured}), communication not counted.{first}"


def to_json(plan: Plan) -> str:
    """The plan with its settings and versions, as JSON text; sizes in bytes."""
    cheapest = plan.cheapest
    return json.dumps(
        {
            **describe_run(plan.settings),
            "speed": None if plan.speed is None else asdict(plan.speed),
            "usable_memory": plan.settings.usable_memory,
            "cheapest": None if cheapest is None else cheapest.strategy.name,
            "rows": [_row_values(row) for row in plan.rows],
            "left_out": plan.left_out,
        },
        indent=2,
    )


def _row_values(row: PlanRow) -> dict[str, Any]:
    return {
        "strategy": asdict(row.strategy),
        "cost": {**asdict(row.cost), "peak_bytes": row.cost.peak_bytes},
        "fits": row.fits,
        "flops_per_token": row.flops_per_token,
        "step_seconds": row.step_seconds,
        "relative_time": row.relative_time,
    }


def plot_plan(plan: Plan) -> "Figure":
    """Plots a stacked bar for each strategy, and the device's memory as a line.

    Raises:
        ImportError: If matplotlib is missing.
    """
    figure = new_figure(9.0, 1.6 + 0.3 * len(plan.rows))
    axes = figure.subplots()
    settings = plan.settings
    unit = suitable_unit(settings.device_bytes)
    marks = {id(plan.cheapest): " (cheapest)"}
    names = [row.strategy.name + marks.get(id(row), "") for row in plan.rows]
    starts = [0.0] * len(plan.rows)
    for category, color in zip(CATEGORIES, COLORS, strict=True):
        widths = [row.cost.peak[category] / unit.size for row in plan.rows]
        if any(widths):
            axes.barh(names, widths, left=starts, color=color, label=category)
        starts = [start + width for start, width in zip(starts, widths, strict=True)]
    axes.axvline(settings.device_bytes / unit.size, color="black", linewidth=1.2, label="device")
    axes.axvline(
        settings.usable_memory / unit.size, color="black", linewidth=1.0, linestyle=":", label="without headroom"
    )
    axes.margins(y=0.01)
    axes.invert_yaxis()
    axes.set_xlabel(f"{unit.name} at the peak, {settings.model}, batch {settings.batch_size} x {settings.seq_length}")
    figure.legend(loc="outside lower center", ncols=4, frameon=False)
    return figure
