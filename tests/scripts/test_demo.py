"""`lopt-hf demo` on a tiny model, and how many steps it takes; nothing here depends on how fast the machine is."""

import json
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
from transformers import AutoModelForCausalLM

from lopt_hf.bench import step
from lopt_hf.scripts import demo, demo_report
from lopt_hf.scripts.demo_report import Training, plot_curves
from tests.forkserver import forked_instead_of_spawned
from tests.tiny import make_model, make_tokenizer


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    make_model().save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


def options(*given: str) -> object:
    return demo.make_parser().parse_args(given)


@pytest.mark.parametrize("losses", [[3.0, 1.0, 0.5], [0.5, 2.0, float("nan")]])
def test_curves_clip_nothing_and_their_legends_cover_nothing(losses, tmp_path, monkeypatch):
    figures = []
    monkeypatch.setattr(demo_report, "save_figure", lambda figure, path: figures.append(figure))
    rows = [{"step": i, "loss": loss, "local_loss/block_0": 9 * loss} for i, loss in enumerate(losses, 1)]
    ends = SimpleNamespace(before=SimpleNamespace(answer_loss=2.9), after=SimpleNamespace(answer_loss=0.4))
    plot_curves(rows, ends, tmp_path / "curves.png")
    pytest.importorskip("matplotlib.backends.backend_agg").FigureCanvasAgg(figures[0]).draw()
    for axes in figures[0].axes:
        highest = max(value for line in axes.lines for value in line.get_ydata() if value == value)
        assert axes.get_ylim() == (0, pytest.approx(1.1 * highest))
        assert axes.get_legend().get_window_extent().y1 < axes.bbox.y0
        assert all(tick == round(tick) for tick in axes.get_xticks())
    assert figures[0].axes[1].get_legend().get_texts()[0].get_text() == "block 0"


# --- How many steps ---


@pytest.mark.parametrize(
    ("given", "step_seconds", "seconds_left", "steps", "batch_size", "note"),
    [
        ([], 4.0, 300.0, 75, 8, "75 steps, as many as fit into 8 minutes, at 4.0 s per step of 8 problems."),
        ([], 0.01, 300.0, 240, 8, "240 steps, which is the most, at 0.0 s per step of 8 problems."),
        (["--steps", "3"], 216.0, 300.0, 3, 8, "3 steps, as asked for, at 216.0 s per step of 8 problems."),
        ([], 100.0, 300.0, 12, 2, "is time for 3, and fewer than 12 teach too little. Instead come 12 steps of 2"),
        ([], 100.0, -60.0, 12, 2, "there is time for 0, .*Whole steps need --minutes 29."),
        (["--minutes", "23.1"], 100.0, 1206.0, 12, 8, "12 steps, as many as fit into 23.1 minutes"),
    ],
)
def test_steps_that_fit(given, step_seconds, seconds_left, steps, batch_size, note):
    training = demo.plan_training(options(*given), step_seconds, seconds_left)
    assert (training.steps, training.batch_size) == (steps, batch_size)
    assert re.search(note, training.note), training.note


def test_minutes_that_are_asked_for_are_enough():
    """The budget that the note names has room for whole steps, what came before them included."""
    note = demo.plan_training(options(), 100.0, 300.0).note
    minutes = note.rpartition("--minutes ")[2].rstrip(".")
    later = demo.plan_training(options("--minutes", minutes), 100.0, 300.0 + 60 * (float(minutes) - 8))
    assert later.batch_size == 8 and later.steps >= demo.FEWEST_STEPS


def test_training_ends_when_its_time_is_up():
    class State:
        global_step = 0

    class Control:
        should_training_stop = False

    late, control = demo.StopInTime(-1.0), Control()
    for State.global_step in range(1, demo.FEWEST_STEPS):
        late.on_step_end(None, State, control)
    assert not control.should_training_stop  # fewer teach too little
    State.global_step = demo.FEWEST_STEPS
    demo.StopInTime(60.0).on_step_end(None, State, control)
    assert not control.should_training_stop
    late.on_step_end(None, State, control)
    assert control.should_training_stop
    planned = Training(40, 8, "40 steps.")
    assert demo.stopped_at(planned, 40) is planned
    assert demo.stopped_at(planned, 12) == Training(12, 8, "40 steps. The time was up after 12: steps took longer.")


# --- A whole run ---


@pytest.mark.parametrize(
    ("given", "method", "title"),
    [
        ([], "K=2, reach 2,1,1,1", "## Reach 2,1,1,1 over the run, 2 blocks"),
        (["--method", "lopt"], "LoPT K=2", "## LoPT, 2 blocks"),
        (["--task-reach", "1,2", "--reach-unit", "step"], "K=2, reach 1,2", "## Reach 1,2, 2 blocks"),
    ],
)
def test_a_run(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture, given: list[str], method: str, title: str
) -> None:
    output = tmp_path / "out"
    with forked_instead_of_spawned(step):
        demo.main(["--model", str(base), "--steps", "2", "--dtype", "fp32", "--output-dir", str(output), *given])
    shown = capsys.readouterr().out
    assert shown.startswith("Arithmetic: float32 on ") and (output / "report.md").read_text() in shown
    figures = json.loads((output / "report.json").read_text())
    assert figures["training"]["steps"] == 2
    assert figures["arithmetic"]["dtype"] == "float32" == figures["step"][0]["dtype"]
    assert [cost["method"] for cost in figures["step"]] == ["e2e", method]
    assert title in shown and ("early blocks: 1e-05" in shown) is ("lopt" in given)
    assert figures["before"]["answer_loss"] != figures["after"]["answer_loss"]
    assert 0 < figures["seconds"]
    AutoModelForCausalLM.from_pretrained(output / "model")
    assert (output / "curves.png").is_file()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--steps", "0"], "--steps 0 trains nothing"),
        (["--minutes", "0"], "--minutes 0 is no time; give more than 0"),
        (["--minutes", "nan"], "--minutes nan is no time"),
        (["--task-reach", "1,4"], "task_reach=(1, 4) reaches 4 blocks, which num_blocks=(2,) does not name"),
        (["--method", "lopt", "--task-reach", "1,2"], "--task-reach 1,2 is for --method reach, and --method is lopt"),
        (["--dtype", "int8"], "dtype='int8' is unknown; use auto, float32 or bfloat16"),
    ],
)
def test_bad_options(tmp_path: Path, capsys: pytest.CaptureFixture, given: list[str], message: str) -> None:
    with pytest.raises(SystemExit) as stopped:
        demo.main([*given, "--model", "none", "--output-dir", str(tmp_path / "out")])
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err.splitlines()[-1]
    assert not (tmp_path / "out").exists()
