"""Curves are what the runs logged."""

import json
import re

import pytest

from lopt_hf.compare.curves import mean_curve, plot_curves, read_curve, smoothed, to_markdown
from lopt_hf.scripts.curves import main


def write_run(folder, rewards, metric="reward"):
    folder.mkdir(parents=True)
    rows = [{"step": step, metric: reward} for step, reward in enumerate(rewards, 1)]
    (folder / "trainer_state.json").write_text(json.dumps({"log_history": [*rows, {"step": 9, "train_loss": 0.1}]}))
    return str(folder)


def test_a_plot_and_the_means(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    runs = [write_run(tmp_path / name, rewards) for name, rewards in (("a", [0, 1, 2, 3]), ("b", [1, 1, 1, 3]))]
    output = tmp_path / "reward.png"
    arguments = [f"--run=LoPT={runs[0]}", f"--run=LoPT={runs[1]}", f"--run=end-to-end={runs[1]}"]
    main([*arguments, "--metric", "reward", "--output", str(output), "--part", "2", "--smooth", "2"])
    drawn = output.read_bytes()
    assert drawn.startswith(b"\x89PNG")
    printed = capsys.readouterr().out
    assert "| LoPT | 0.750 | 2.250 | +1.500 | +2.000, +1.000 |" in printed
    assert "| end-to-end | 1.000 | 2.000 | +1.000 | +1.000 |" in printed
    with pytest.raises(SystemExit):
        main([*arguments, "--metric", "reward", "--output", str(output)])
    assert "exists and is not overwritten" in capsys.readouterr().err and output.read_bytes() == drawn


def test_runs_without_a_step_in_common_keep_their_name(tmp_path, caplog):
    """There is no mean of them, and the plot and a warning say so."""
    pytest.importorskip("matplotlib")
    figure = plot_curves({"LoPT": [{1: 1.0, 3: 2.0}, {2: 1.0, 4: 2.0}], "e2e": [{1: 0.0, 2: 1.0}] * 2}, "reward", 1)
    (axes,) = figure.axes
    legend = axes.get_legend()
    assert [text.get_text() for text in legend.get_texts()] == ["LoPT (2 runs without a mean)", "e2e (mean of 2)"]
    colors = [line.get_color() for line in axes.get_lines()]
    assert [handle.get_color() for handle in legend.get_lines()] == ["C0", "C1"] and set(colors) == {"C0", "C1"}
    (record,) = caplog.records
    assert record.getMessage() == "label 'LoPT': its runs logged reward at no step in common, so they have no mean."


def test_curves(tmp_path):
    assert read_curve(write_run(tmp_path / "a", [1.0, None, 0.5]), "reward") == {1: 1.0, 3: 0.5}
    assert smoothed({1: 1.0, 2: 3.0, 3: 5.0}, 2) == {1: 1.0, 2: 2.0, 3: 4.0}
    assert mean_curve([{1: 1.0, 2: 3.0}, {2: 5.0, 3: 7.0}]) == {2: 4.0}


def test_the_log_of_a_run_that_has_not_ended(tmp_path):
    write_run(tmp_path / "out/checkpoint-5", [1.0, 2.0])
    assert read_curve(str(tmp_path / "out"), "reward") == {1: 1.0, 2: 2.0}


def test_the_log_of_a_pipeline_that_has_not_ended(tmp_path):
    for stage, losses in ((2, [0.0]), (10, [5.0, 4.0])):  # the last stage, by number, logs for all
        write_run(tmp_path / f"out/checkpoint-5/stage-{stage}", losses, "loss")
    assert read_curve(str(tmp_path / "out"), "loss") == {1: 5.0, 2: 4.0}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--run", "no-label", "--metric", "reward"], "--run no-label must be LABEL=OUTPUT_DIR"),
        (["--run", "=nowhere", "--metric", "reward"], "--run =nowhere must be LABEL=OUTPUT_DIR"),
        (["--run", "a=nowhere", "--metric", "reward"], "--run nowhere: there is no trainer_state.json"),
        (["--run", "a={run}", "--metric", "accuracy"], "--metric accuracy: .* choose from reward, train_loss"),
    ],
)
def test_bad_input_is_one_line(tmp_path, capsys, arguments, message):
    run = write_run(tmp_path / "run", [1.0])
    with pytest.raises(SystemExit) as ended:
        main([argument.format(run=run) for argument in arguments] + ["--output", str(tmp_path / "plot.png")])
    assert ended.value.code == 2 and re.search(message, capsys.readouterr().err)


@pytest.mark.parametrize(
    ("losses", "row"),
    [
        ([6.0, 5.0, 4.0, 3.0, 2.0], "| run | 5.500 | 2.500 | -3.000 | -3.000 |"),
        ([6.0, 5.0], "| run | 6.000 | 5.000 | -1.000 | -1.000 |"),
        ([6.0], "| run | 6.000 |  |  |  |"),
    ],
)
def test_the_first_and_the_last_part_share_no_value(losses, row):
    table = to_markdown({"run": [dict(enumerate(losses))]}, "loss", 10)
    part = max(1, len(losses) // 2)
    assert table.splitlines()[0].startswith(f"| loss | first {part} | last {part} |")
    assert table.splitlines()[-1] == row
