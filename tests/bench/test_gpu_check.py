"""The GPU check on a CPU, with tiny sizes; nothing here depends on how fast the machine is."""

import json
import math
import os
import signal
import time
from dataclasses import asdict
from importlib.metadata import version

import pytest
import torch
from transformers import AutoConfig

from lopt_hf.bench.gpu import runner
from lopt_hf.bench.gpu.check import run_gpu_check
from lopt_hf.bench.gpu.checklist import TINY_CONFIG, make_parts, make_sizes
from lopt_hf.bench.gpu.parts import Case, Outcome, Part
from lopt_hf.bench.gpu.report import Results, to_markdown
from lopt_hf.bench.gpu.rows import STEP_ROWS, UPDATE_ROWS
from lopt_hf.bench.gpu.runner import run_parts
from lopt_hf.bench.gpu.settings import GpuCheckSettings
from lopt_hf.bench.gpu.sharded import Sharded, read_runs, write_runs
from lopt_hf.bench.gpu.targets import find_targets
from lopt_hf.bench.gpu.updates import Comparison, compare, save_updates
from lopt_hf.planner.device import DeviceSpeed
from lopt_hf.scripts.bench import _load_config, _measure_device, _Plan, main
from tests.forkserver import forked_instead_of_spawned


@pytest.fixture(scope="module")
def check(tmp_path_factory):
    """The whole check, as `lopt-hf bench gpu --device cpu` runs it."""
    folder = tmp_path_factory.mktemp("check")
    with forked_instead_of_spawned(runner):
        results = run_gpu_check(
            GpuCheckSettings(device="cpu", limit=3600), folder, _load_config, _measure_device, _Plan
        )
    return results, folder


# --- A whole run ---


def test_runs_to_its_end_and_says_that_no_gpu_was_measured(check):
    results, folder = check
    assert results.problems == []
    assert len(results.outcomes) == sum(len(part.cases) for part in results.parts)
    skipped = {outcome.reason for outcome in results.outcomes if outcome.status == "skipped"}
    assert skipped and all("a CUDA device" in reason for reason in skipped)
    table = (folder / "gpu_check.md").read_text()
    assert "**No GPU was measured.**" in table
    assert "## Targets" not in table
    content = json.loads((folder / "gpu_check.json").read_text())
    assert content["device"]["type"] == "cpu"
    assert content["versions"]["torch"] == version("torch")


def test_saved_bytes_are_those_of_the_plan(check):
    results, _ = check
    steps, plan = results.of("tiny"), results.of("Plan tiny")["plan"]
    planned = {row["strategy"]["name"]: row["cost"]["saved_bytes"] for row in plan.values["rows"]}
    for name in ("end-to-end", "LoPT K=2", "end-to-end + checkpointing"):
        assert steps[name].values["saved_bytes"] == pytest.approx(planned[name], rel=0.01)


def test_every_comparison_is_made_and_equal(check):
    outcomes = check[0].of("Equality")
    compared = [row for row in UPDATE_ROWS if row.tolerance is not None and not row.needs]
    assert len(compared) >= 8
    for row in compared:
        assert outcomes[row.name].values["is_equal"], row.name


def test_local_step_and_joint_differ_in_what_they_keep(check):
    """Otherwise the rows would compare one and the same thing."""
    steps = check[0].of("tiny")
    saved = {name: outcome.values["saved_bytes"] for name, outcome in steps.items()}
    gradients = {name: outcome.values["gradient_bytes"] for name, outcome in steps.items()}
    assert saved["LoPT K=2, joint (released code)"] > saved["end-to-end"] > 1.5 * saved["LoPT K=2"]
    assert gradients["LoPT K=2"] > 1.5 * gradients["LoPT K=2, local step"]


# --- Processes ---


def _return(folder):
    return {"pid": os.getpid()}


def _raise(folder):
    raise KeyError("the reason")


def _die(folder):
    os.kill(os.getpid(), signal.SIGKILL)


def _never_end(folder):
    child = os.fork()
    if child == 0:
        time.sleep(600)
    (folder / "child").write_text(str(child))
    time.sleep(600)


def _is_alive(process):
    try:
        with open(f"/proc/{process}/stat") as file:
            return file.read().split()[2] not in "ZX"
    except FileNotFoundError:
        return False


def _wait_for_child(folder):
    """Tells whether the child of `_never_end` is still there; what has been killed may take a moment to end."""
    child = int((folder / "child").read_text())
    patience = time.monotonic() + 30
    while _is_alive(child) and time.monotonic() < patience:
        time.sleep(0.05)
    return {"alive": _is_alive(child)}


def outcomes_of(parts, tmp_path, limit=600.0):
    outcomes = []
    with forked_instead_of_spawned(runner):
        run_parts(parts, limit, tmp_path / "log", outcomes.append)
    return {(outcome.part, outcome.case): outcome for outcome in outcomes}


def test_a_failure_loses_one_case(tmp_path):
    cases = (
        Case("raises", _raise),
        Case("dies", _die),
        Case("returns", _return),
        Case("needs", _return, ("nothing",)),
    )
    outcomes = outcomes_of([Part("a", "steps", cases, 600)], tmp_path)
    assert [outcome.status for outcome in outcomes.values()] == ["failed", "failed", "done", "skipped"]
    assert outcomes["a", "raises"].reason == "KeyError: 'the reason'"
    assert "in _raise" in outcomes["a", "raises"].trace
    assert "exit code -9" in outcomes["a", "dies"].reason
    assert outcomes["a", "needs"].reason == "needs nothing"
    assert "in _raise" in (tmp_path / "log").read_text()


def test_a_limit_loses_what_has_not_run_and_ends_what_was_started(tmp_path):
    slow = Part("slow", "steps", (Case("returns", _return), Case("never ends", _never_end), Case("last", _return)), 10)
    outcomes = outcomes_of([slow, Part("next", "steps", (Case("child", _wait_for_child),), 600)], tmp_path)
    assert outcomes["slow", "returns"].status == "done"
    assert outcomes["slow", "never ends"].status == "not reached"
    assert "ended at its limit" in outcomes["slow", "never ends"].reason
    assert outcomes["slow", "last"].reason == "no time was left"
    assert outcomes["next", "child"].values["alive"] is False


def test_parts_in_the_background_run_beside_others(tmp_path):
    parts = [Part(name, "steps", (Case("x", _return),), 600, in_background=name == "b") for name in "abc"]
    outcomes = outcomes_of(parts, tmp_path)
    assert len({outcome.values["pid"] for outcome in outcomes.values()}) == 3


def test_no_time_at_all(tmp_path):
    outcomes = outcomes_of([Part("a", "steps", (Case("x", _return), Case("y", _return)), 600)], tmp_path, limit=0.0)
    assert [outcome.status for outcome in outcomes.values()] == ["not reached", "not reached"]


# --- Parts of it ---


def test_comparison_sees_a_difference(tmp_path):
    start = {"model.layers.0.w": torch.ones(4), "model.layers.1.w": torch.ones(4), "norm": torch.ones(2)}
    save_updates(tmp_path / "a.pt", start, [2.0, 1.0])
    other = start | {"model.layers.1.w": torch.tensor([1.0, 1.0, 1.0, 1.2])}
    values = compare(tmp_path, Comparison("a", 0.05), other, [2.0, 1.0])
    assert values["difference"] == pytest.approx(0.1)
    assert (values["largest_in"], values["is_equal"]) == ("layer 1", False)
    assert compare(tmp_path, Comparison("a", 0.11), other, [2.0, 1.0])["is_equal"]
    assert not compare(tmp_path, Comparison("a", 0.11), other, [2.0, 1.2])["is_equal"]
    assert compare(tmp_path, Comparison("a", 0.11, of_losses=False), other, [2.0, 1.2])["is_equal"]
    for name, place in zip(start, ("layer 0", "layer 1", "norm"), strict=True):  # wherever it is among the others
        broken = compare(tmp_path, Comparison("a", 0.11), start | {name: start[name] * math.nan}, [2.0, 1.0])
        assert (broken["largest_in"], broken["is_equal"]) == (place, False)
    for losses in ([math.nan, 1.0], [2.0, math.nan]):
        assert not compare(tmp_path, Comparison("a", 0.11), start, losses)["is_equal"]


@pytest.mark.parametrize(
    ("name", "updates", "message"),
    [
        ("b", {"norm": torch.ones(2)}, "no run 'b' to compare with"),
        ("a", {"norm": torch.zeros(2)}, "weights of norm have not moved"),
        ("a", {"head": torch.ones(2)}, r"different layers: \['head', 'norm'\]"),
    ],
)
def test_comparison_that_tells_nothing(tmp_path, name, updates, message):
    save_updates(tmp_path / "a.pt", {"norm": torch.ones(2)}, [1.0])
    with pytest.raises(ValueError, match=message):
        compare(tmp_path, Comparison(name, 0.1), updates, [1.0])


def step(name, **values):
    defaults = {"saved_bytes": 100, "activation_bytes": 100, "step_seconds": 1.0, "peak_bytes": 1000}
    others = {"reserved_bytes": 1100, "tokens_per_second": 10.0}
    return Outcome("model", name, "done", 1.0, {**defaults, **others, **values})


def plan(**peaks):
    rows = [
        {"strategy": {"name": name}, "cost": {"peak_bytes": peak}, "step_seconds": None, "relative_time": 1.0}
        for name, peak in peaks.items()
    ]
    return Outcome("Plan model", "plan", "done", 1.0, {"rows": rows})


def test_targets():
    outcomes = {
        outcome.case: outcome
        for outcome in (
            step("end-to-end"),
            step("LoPT K=2", saved_bytes=51, step_seconds=1.03),
            step("LoPT K=4, local step", peak_bytes=1250),
            step("K=4, reach 1,1,1,4", step_seconds=0.7),
        )
    }
    planned = plan(**{"end-to-end": 1020, "LoPT K=2": 990, "LoPT K=4, local step": 1000})
    k2, k4, time_k2, time_k4, time_reach, error = find_targets("model", outcomes, planned)
    assert (k2.measured, k2.is_met) == (0.51, True)
    assert (k4.measured, k4.is_met) == (None, None)
    assert (time_k2.measured, time_k2.is_met) == (1.03, False)
    assert time_k4.is_met is None
    assert (time_reach.measured, time_reach.is_met) == (0.7, True)
    assert error.measured == pytest.approx(0.2)
    assert "worst of 3: LoPT K=4, local step" in error.name
    assert find_targets("model", {}, None)[-1].measured is None


def test_table_of_a_gpu():
    settings = GpuCheckSettings()
    device = {"type": "cuda", "name": "NVIDIA X", "memory": 80 * 2**30, "cuda": "13.0"}
    parts = [Part("Device", "device", (), 1.0), Part("model", "steps", (), 1.0), Part("Plan model", "plan", (), 1.0)]
    outcomes = [step("end-to-end"), step("LoPT K=2", saved_bytes=51), plan(**{"end-to-end": 1020})]
    outcomes.append(Outcome("model", "LoPT K=4", "failed", 1.0, reason="OutOfMemoryError: 3 GiB"))
    speed = DeviceSpeed("cuda", "NVIDIA X", 4e13, 1e12, "float32")
    outcomes.append(Outcome("Device", "calibration", "done", 1.0, asdict(speed)))
    table = to_markdown(Results(settings, device, parts, outcomes, 100.0))
    assert "NVIDIA X, 80.00 GiB, CUDA 13.0" in table
    assert "No GPU" not in table
    assert "in float32: 40 TFLOP/s in a matrix product, 1000 GB/s in an element-wise operation." in table
    assert (
        "| model, LoPT K=2: activations saved for backward, relative to end-to-end | <= 0.55 | 0.510 | yes |" in table
    )
    assert "failed: OutOfMemoryError: 3 GiB" in table
    assert "- model: LoPT K=4: failed" in table


def test_parts_of_a_gpu_have_full_sizes():
    settings = GpuCheckSettings(models=("big", "small"), parts=("steps", "equality"))
    sizes = make_sizes(settings, "cuda", {"big": TINY_CONFIG, "small": TINY_CONFIG})
    parts = make_parts(settings, sizes, _measure_device, dict.fromkeys(("big", "small"), _return))
    assert [part.name for part in parts] == ["Device", "Plan big", "Plan small", "big", "Equality", "small"]
    training = parts[3].cases[0].run
    assert (training.workload.batch_size, training.workload.seq_length, training.device) == (4, 1024, "cuda")
    assert sum(part.limit for part in parts if not part.in_background) <= settings.limit


def test_rows_are_known_to_the_plan():
    """A row whose name the planner does not have would silently lose its prediction."""
    from lopt_hf.planner.strategies import make_strategies

    config = AutoConfig.for_model(**TINY_CONFIG)
    known = {
        row.name for row in make_strategies(("e2e", "lopt", "lopt_local_step", "freeze", "lora"), (2, 4, 8), config)[0]
    }
    assert {row.plan for row in STEP_ROWS if row.plan} <= known
    assert len({row.name for row in STEP_ROWS}) == len(STEP_ROWS)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"parts": ("step",)}, "parts='step' is unknown, nearest is 'steps'"),
        ({"device": "gpu"}, "device='gpu' is unknown"),
        ({"models": ()}, r"models=\(\) must name at least one value"),
        ({"parts": ("steps", "steps")}, "each value once"),
        ({"limit": 0}, "limit=0 is too small"),
    ],
)
def test_bad_settings(values, message):
    with pytest.raises(ValueError, match=message):
        GpuCheckSettings(**values)


def test_command_needs_a_folder(capsys):
    with pytest.raises(SystemExit) as caught:
        main(["gpu", "--parts", "generation"])
    assert caught.value.code == 2
    assert "--output-dir" in capsys.readouterr().err


def test_sharded_runs_are_handed_over_whole(tmp_path):
    parts = make_parts(
        GpuCheckSettings(device="cpu"), make_sizes(GpuCheckSettings(device="cpu"), "cpu", {}), None, {"tiny": None}
    )
    runs = next(case.run.runs for part in parts for case in part.cases if isinstance(case.run, Sharded))
    assert any(run.comparison for run in runs)
    write_runs(runs, tmp_path)
    assert read_runs(tmp_path) == list(runs)
