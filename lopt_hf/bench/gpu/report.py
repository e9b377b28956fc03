"""What a check has measured, as JSON and as markdown tables; targets beside what they are measured by."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from lopt_hf.bench.gpu.parts import Outcome, Part
from lopt_hf.bench.gpu.rows import BASELINE, STEP_ROWS
from lopt_hf.bench.gpu.settings import GpuCheckSettings
from lopt_hf.bench.gpu.targets import Target, find_targets, plan_row, ratio
from lopt_hf.common.tables import describe_run, markdown_table, ratio_text

__all__ = ["Results", "to_json", "to_markdown"]

GIB = 2**30
NO_GPU = (
    "**No GPU was measured.** This ran on a CPU with tiny sizes, as a test of the check itself; its figures say "
    "nothing about a GPU, and no target applies."
)


@dataclass
class Results:
    """A check under way or over.

    Attributes:
        settings: What was asked for.
        device: What it ran on.
        parts: What was to be done.
        outcomes: What has become of the cases, in the order in which that was known.
        seconds: How long it has taken.
    """

    settings: GpuCheckSettings
    device: Mapping[str, Any]
    parts: Sequence[Part]
    outcomes: list[Outcome] = field(default_factory=list)
    seconds: float = 0.0

    def of(self, part: str) -> dict[str, Outcome]:
        """What has become of a part's cases."""
        return {outcome.case: outcome for outcome in self.outcomes if outcome.part == part}

    @property
    def on_gpu(self) -> bool:
        """Whether a GPU was measured."""
        return bool(self.device["type"] == "cuda")

    @property
    def problems(self) -> list[str]:
        """What is not as it should be: cases that failed or were not reached, and comparisons that differ."""
        found = [
            f"{o.part}: {o.case}: {o.status}: {o.reason}" for o in self.outcomes if o.status not in ("done", "skipped")
        ]
        for o in self.outcomes:
            if o.values.get("is_equal") is False:
                found.append(f"{o.part}: {o.case}: differs by {_difference(o)}, more than {o.values['tolerance']:g}")
        return found

    @property
    def targets(self) -> list[Target]:
        """What the first model's steps are to be, beside what they are."""
        models = [part.name for part in self.parts if part.kind == "steps"]
        if not self.on_gpu or not models:
            return []
        plan = next(iter(self.of(f"Plan {models[0]}").values()), None)
        return find_targets(models[0], self.of(models[0]), plan)


def to_json(results: Results) -> str:
    """Everything, with versions and machine; sizes in bytes, times in seconds."""
    content = {
        **describe_run(results.settings),
        "device": results.device,
        "seconds": results.seconds,
        "problems": results.problems,
        "targets": [asdict(target) for target in results.targets],
        "outcomes": [asdict(outcome) for outcome in results.outcomes],
    }
    return json.dumps(content, indent=1)


def to_markdown(results: Results) -> str:
    """The tables, with what they mean."""
    return "\n".join(_sections(results))


def _sections(results: Results) -> Iterator[str]:
    settings, device = results.settings, results.device
    versions = describe_run(settings)["versions"]
    yield "# GPU check\n"
    if not results.on_gpu:
        yield f"{NO_GPU}\n"
    memory = f", {_gib(device['memory'])} GiB, CUDA {device['cuda']}" if results.on_gpu else ""
    packages = ", ".join(f"{name} {version}" for name, version in versions.items() if version)
    yield f"{device['name']}{memory}; {packages}; {results.seconds:.0f} s.\n"
    if results.problems:
        yield "\n".join(["Problems:\n", *(f"- {problem}" for problem in results.problems), ""])
    if results.targets:
        yield _targets(results.targets)
    for part in results.parts:
        outcomes = list(results.of(part.name).values())
        if outcomes and part.kind in _TABLES:
            yield f"## {part.name}\n"
            yield _TABLES[part.kind](results, part, outcomes) + "\n"


def _targets(targets: Sequence[Target]) -> str:
    rows = []
    for target in targets:
        measured = "-" if target.measured is None else f"{target.measured:.3f}"
        met = {None: "not measured", True: "yes", False: "**no**"}[target.is_met]
        rows.append([target.name, f"<= {target.limit:g}", measured, met])
    table = markdown_table(["target", "asked for", "measured", "met"], rows, text_columns=(0, 3))
    return f"## Targets\n\n{table}\n"


def _device_table(results: Results, part: Part, outcomes: list[Outcome]) -> str:
    values = outcomes[0].values
    if not values:
        return _row_of_words(outcomes[0])
    return (
        f"`lopt-hf plan --calibrate`, in {values['dtype']}: {values['flops_per_second'] / 1e12:.4g} TFLOP/s in a "
        f"matrix product, {values['bytes_per_second'] / 1e9:.4g} GB/s in an element-wise operation."
    )


def _steps_table(results: Results, part: Part, outcomes: list[Outcome]) -> str:
    settings = results.settings
    header = ["method", "peak (GiB)", "plan (GiB)", "plan / peak", "reserved (GiB)"]
    header += ["saved for backward (GiB)", "x e2e", "forward's growth (GiB)", "x e2e"]
    header += ["s/step", "x e2e", "plan (s)", "plan x e2e", "tokens/s"]
    rows = []
    plan = next(iter(results.of(f"Plan {part.name}").values()), None)
    by_name = {outcome.case: outcome for outcome in outcomes}
    baseline = by_name.get(BASELINE)
    names = {row.name: row.plan for row in STEP_ROWS}
    for outcome in outcomes:
        values, planned = outcome.values, plan_row(plan, names[outcome.case])
        expected = planned["cost"]["peak_bytes"] if planned else None
        if not values:
            needs = f"{_row_of_words(outcome)}{f' (plan: {_gib(expected)} GiB)' if expected else ''}"
            rows.append([outcome.case, needs, *[""] * (len(header) - 2)])
            continue
        peak = values["peak_bytes"]
        rows.append(
            [
                outcome.case,
                _gib(peak),
                _gib(expected),
                f"{expected / peak:.3f}" if expected and peak else "-",
                _gib(values["reserved_bytes"]),
                _gib(values["saved_bytes"]),
                ratio_text(ratio(outcome, baseline, "saved_bytes")),
                _gib(values["activation_bytes"]),
                ratio_text(ratio(outcome, baseline, "activation_bytes")),
                f"{values['step_seconds']:.4f}",
                _thousandths(ratio(outcome, baseline, "step_seconds")),
                f"{planned['step_seconds']:.4f}" if planned and planned["step_seconds"] else "-",
                ratio_text(planned["relative_time"]) if planned else "-",
                f"{values['tokens_per_second']:,.0f}",
            ]
        )
    size = f"batch {settings.batch_size} x {settings.seq_length}" if results.on_gpu else "tiny"
    note = (
        f"{part.name}: random bf16 weights, bf16 autocast, {settings.optim} (states of the weights' type), {size}. "
        "Peak and reserved are those of CUDA's allocator, with expandable segments, over the timed steps; saved for "
        "backward is what the package's meter counts; the forward's growth is what it takes beyond weights and "
        "optimizer, less gradients, by the allocator. Time: median of synchronised steps."
    )
    return f"{markdown_table(header, rows)}\n\n{note}"


def _updates_table(results: Results, part: Part, outcomes: list[Outcome]) -> str:
    header = ["run", "compared with", "difference", "of the losses", "tolerance", "equal"]
    header += ["s/step", "peak (GiB)", "tokens/s"]
    rows = []
    for outcome in outcomes:
        values = outcome.values
        if not values:
            rows.append([outcome.case, _row_of_words(outcome), *[""] * (len(header) - 2)])
            continue
        compared = ["-"] * 5
        if "is_equal" in values:
            equal = "yes" if values["is_equal"] else f"**no** ({values['largest_in']})"
            keys = ("difference", "loss_difference", "tolerance")
            numbers = [f"{values[key]:.1e}" if key in values else "-" for key in keys]
            compared = [values["compared_with"], *numbers, equal]
        costs = [f"{values['step_seconds']:.4f}", _gib(values["peak_bytes"]), f"{values['tokens_per_second']:,.0f}"]
        rows.append([outcome.case, *compared, *costs])
    note = "Difference: of the changes that two runs made to the weights, relative, where it is largest."
    return f"{markdown_table(header, rows, text_columns=(0, 1, 5))}\n\n{note}"


def _generation_table(results: Results, part: Part, outcomes: list[Outcome]) -> str:
    values = outcomes[0].values
    if not values:
        return _row_of_words(outcomes[0])
    folded = f"RepL, {values['replaced']} of {values['layers']} layers replaced, folded"
    rows = [
        ["full model", f"{values['full_tokens_per_second']:.1f}", "1.00"],
        [folded, f"{values['folded_tokens_per_second']:.1f}", f"{values['speedup']:.2f}"],
    ]
    return markdown_table(["model", "tokens/s", "x full model"], rows)


_TABLES = {
    "device": _device_table,
    "steps": _steps_table,
    "updates": _updates_table,
    "generation": _generation_table,
}


def _row_of_words(outcome: Outcome) -> str:
    return f"{outcome.status}: {outcome.reason}".replace("|", "\\|")


def _difference(outcome: Outcome) -> str:
    values = outcome.values
    of_losses = f" (losses {values['loss_difference']:.1e})" if "loss_difference" in values else ""
    return f"{values['difference']:.1e}{of_losses}"


def _thousandths(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def _gib(size: float | None) -> str:
    if size is None:
        return "-"
    return f"{size / GIB:.2f}" if size >= 0.01 * GIB else f"{size / GIB:.1e}"
