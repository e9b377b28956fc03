"""`lopt-hf pipeline simulate`: what it prints and writes, and what it says of bad input."""

import json
from pathlib import Path

import psutil
import pytest

from lopt_hf.pipeline.simulator.schedule import SCHEDULES
from lopt_hf.scripts.pipeline_simulate import main, make_parser
from tests.distributed.sockets import assert_on_loopback, watched

MEASURED = {
    "forward": [0.1, 0.12, 0.2],
    "backward": [0.2, 0.25, 0.3],
    "local": [0.02, 0.02, 0],
    "optimizer": [0.05, 0.05, 0.1],
    "message_bytes": 1_000_000,
    "tokens_per_microbatch": 512,
}


def simulate(*options: object) -> None:
    main([str(option) for option in options])


def rows(text: str) -> list[list[str]]:
    """Cells of the first table, without header and rule."""
    lines = [line for line in text.split("\n\n")[0].splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


@pytest.fixture
def measured(tmp_path) -> Path:
    path = tmp_path / "measured.json"
    path.write_text(json.dumps(MEASURED))
    return path


def test_the_line_of_the_readme(capsys):
    simulate("--stages", 16, "--schedule", "ppll,gpipe,1f1b,interleaved", "--microbatches", "8,32")
    table = rows(capsys.readouterr().out)
    assert [row[0] for row in table] == ["ppll", "gpipe", "1f1b", "interleaved"] * 2
    assert table[0][1:] == ["16", "8", "240", "33.33", "16.00", "0.0%", "0.0%", "0.0%", "1", "150"]
    assert table[6][1:] == ["16", "32", "1,410", "22.7", "10.89", "31.9%", "31.9%", "31.9%", "16", "150"]


def test_help_names_every_schedule_and_the_keys_of_the_file():
    text = make_parser().format_help()
    for word in ("ppll", "gpipe", "1f1b", "interleaved", "zero-bubble", *SCHEDULES, *MEASURED, "examples:"):
        assert word in text
    options = " ".join(text.partition("\noptions:")[2].split())
    for option, default in {"virtual-stages N": 2, "channel-depth N": 2, "weight-share X": 0.5}.items():
        assert options.partition(f"--{option}")[2].partition(" --")[0].endswith(f" Default: {default}")


def test_measured_times(measured, capsys):
    simulate("--times", measured, "--schedule", "ppll", "--microbatches", 4)
    out = capsys.readouterr().out
    step = 4 * (0.2 + 0.3) + 0.1
    assert "tokens/s" in out
    assert rows(out)[0][1:5] == ["3", "4", f"{step * 1e3:,.0f}", f"{4 * 512 / step:.4g}"]


def test_the_whole_model_is_shared_out(measured, capsys):
    simulate("--times", measured, "--whole-model", "--stages", "1,7", "--schedule", "ppll", "--microbatches", 4)
    one, seven = rows(capsys.readouterr().out)
    total = 4 * (0.42 + 0.75) + 0.2
    assert one[3] == f"{total * 1e3:,.0f}"
    assert float(seven[3]) == pytest.approx((total / 7 + 4 * 0.02) * 1e3, rel=1e-3)  # a local objective on each stage


def test_options_reach_the_simulation(tmp_path):
    output = tmp_path / "out.json"
    options = ["--forward-ms", "1,2", "--backward-ms", "3,4", "--local-ms", 5, "--optimizer-ms", 6]
    options += ["--message-mb", 2, "--link-gbps", 8, "--latency-us", 7, "--channel-depth", 3, "--virtual-stages", 4]
    options += ["--weight-share", 0.25, "--keeps-graph"]
    simulate(*options, "--microbatches", 4, "--schedule", "interleaved_zb,ppll,ppll_delayed", "--output", output)
    row, *_ = json.loads(output.read_text())
    workload = row["workload"]
    assert workload["times"] == {
        "forward": [0.001, 0.002],
        "backward": [0.003, 0.004],
        "local": [0.005, 0.0],
        "optimizer": [0.006, 0.006],
    }
    assert workload["message_bytes"] == 2e6 and workload["bandwidth"] == 1e9 and workload["latency"] == 7e-6
    assert workload["weight_share"] == 0.25 and workload["keeps_graph"]
    assert workload["channel_depth"] == 3 and workload["virtual_stages"] == 4 and workload["cores"] is None
    assert len(row["bubble"]) == len(row["peak_in_flight"]) == 2
    assert row["microbatches_per_second"] == pytest.approx(4 / row["step_seconds"])


def test_fewer_cores_than_stages(capsys):
    simulate("--stages", 4, "--microbatches", 8, "--schedule", "ppll", "--cores", 2)
    assert rows(capsys.readouterr().out)[0][5] == "2.00"


def test_sizes_that_do_not_fit_a_schedule_are_left_out_and_named(capsys):
    simulate("--stages", "3,4", "--microbatches", 7, "--schedule", "gpipe,interleaved")
    out = capsys.readouterr().out
    assert [row[:2] for row in rows(out)] == [["gpipe", "3"], ["gpipe", "4"], ["interleaved", "4"]]
    assert "left out: microbatches=7 with stages=3: interleaved" in out


def test_chrome_trace(tmp_path):
    """Trace Event Format: complete events in microseconds, processes and threads named."""
    path = tmp_path / "timeline.json"
    simulate("--stages", 2, "--microbatches", 3, "--schedule", "ppll,1f1b", "--timeline", path)
    events = json.loads(path.read_text())["traceEvents"]
    assert [e["args"]["name"] for e in events if e["name"] == "process_name"] == ["ppll", "1f1b"]
    complete = [e for e in events if e["ph"] == "X"]
    assert len(complete) == 2 * 2 * 2 * 2 * 3  # schedules, steps, stages, forward and backward, micro-batches
    assert complete[0].items() >= {"name": "forward 0", "cat": "forward", "pid": 0, "tid": 0, "ts": 0.0}.items()
    assert complete[0]["dur"] == pytest.approx(10_000)


def test_pictures(tmp_path):
    from matplotlib.image import imread

    plot, timeline = tmp_path / "scaling.png", tmp_path / "timeline.png"
    sizes = ["--stages", "2,4", "--microbatches", 4, "--schedule", "ppll,gpipe"]
    simulate(*sizes, "--plot", plot, "--timeline", timeline)
    for path in (plot, timeline):
        pixels = imread(path)
        assert pixels.shape[0] > 300 and len({tuple(pixel) for pixel in pixels.reshape(-1, pixels.shape[2])[::97]}) > 3


def test_sleeping_stages_run(capsys):
    """That they run; how well they agree is a matter of time and in the slow tests."""
    with watched(psutil.Process()) as found:
        simulate("--stages", 2, "--microbatches", 2, "--forward-ms", 1, "--validate")
    assert_on_loopback(found, 1)
    table = capsys.readouterr().out.split("\n\n")[-1]
    schedules = [line.split()[1] for line in table.splitlines()[2:]]
    assert schedules == ["ppll", "gpipe", "1f1b", "interleaved", "zero-bubble"]
    assert "measured - simulated" in table


@pytest.mark.parametrize(
    "options, message",
    [
        (["--stages", "a"], "argument --stages: 'a' is not a number or several with commas, as 8,32"),
        (["--stages", "0"], "stages=0: must be at least 1."),
        (["--microbatches", "0"], "microbatches=0: must be at least 1."),
        (
            ["--schedule", "ppl"],
            "schedule='ppl': choose among ppll, gpipe, 1f1b, interleaved, zero-bubble, interleaved_zb, zbv, "
            "dualpipev, ppll_delayed.",
        ),
        (["--forward-ms", "1,2", "--stages", "3"], "stages=3: the times are those of 2 stages; give one time for all"),
        (
            ["--forward-ms", "1,2", "--backward-ms", "1,2,3"],
            "backward=[0.001, 0.002, 0.003] has 3 values but forward has 2;",
        ),
        (["--forward-ms", "-1"], "times are finite and not negative."),
        (["--link-gbps", "0"], "link_gbps=0.0 must be more than 0; leave it out for no limit."),
        (["--times", "none.json"], "times=none.json: No such file or directory; name a JSON file of measured times."),
        (["--times", "x.json", "--local-ms", "1"], "times and local_ms: times come from the file or by hand"),
        (["--keeps-graph"], "keeps_graph=True is for ppll_delayed alone; name it in --schedule, or leave it out."),
        (["--local-ms", "1", "--schedule", "gpipe"], "local_ms=[1.0] is for ppll alone; name it in --schedule, or"),
        (
            ["--virtual-stages", "8", "--schedule", "1f1b"],
            "virtual_stages=8 is for interleaved, interleaved_zb alone; name one of them in --schedule, or leave it",
        ),
        (["--channel-depth", "9", "--schedule", "1f1b"], "channel_depth=9 is for ppll, ppll_delayed alone; name one"),
        (
            ["--weight-share", "0", "--schedule", "1f1b,ppll"],
            "weight_share=0.0 is for zero-bubble, interleaved_zb, zbv, dualpipev alone; name one of them",
        ),
        (["--link-gbps", "0.001"], "link_gbps=0.001 has no effect on messages of no size; set --message-mb, or leave"),
        (["--plot", "x.png"], "plot: a plot of scaling needs several numbers of stages, such as --stages 2,4,8,16."),
        (["--stages", "2,4", "--plot", "x.svg"], "plot=x.svg: name a .png file."),
        (["--timeline", "x.html"], "timeline=x.html: name a .png file for a drawing or .json for a Chrome trace."),
        (["--timeline", "x.png", "--stages", "2,4"], "timeline: 20 pipelines of up to 4 stages; name schedules"),
        (["--output", "nowhere/x.json"], "output=nowhere/x.json: its folder does not exist; create it"),
        (["--stages", "3", "--microbatches", "10", "--schedule", "interleaved"], "microbatches=10 with stages=3:"),
        (
            ["--validate", "--stages", "1", "--schedule", "ppll"],
            "stages=1: each is a process here; validate with 2 to 16.",
        ),
        (
            ["--validate", "--stages", "2", "--microbatches", "3,5", "--schedule", "zero-bubble"],
            "microbatches=5 with stages=2: zero-bubble deals them out in 2 equal rounds; use a multiple of 2, or "
            "leave zero-bubble out.",
        ),
        (
            ["--stages", "10000", "--microbatches", "100000", "--schedule", "ppll,gpipe"],
            "stages=10000 with microbatches=100000, channel_depth=2 and virtual_stages=2: 5,000,000,000 forwards in",
        ),
        (["--stages", "100000", "--microbatches", "100000"], "stages=100000: must be at most 10,000."),
        (["--virtual-stages", "1000000000"], "at most 5,000,000 are simulated; lower one of these, or name fewer"),
        (["--channel-depth", "1000000000"], "microbatches=32, channel_depth=1000000000 and"),
        (["--stages", ",".join(["1000"] * 600)], "forwards in all, and at most 5,000,000 are simulated"),
        (["--validate", "--cores", "2"], "cores=2.0: sleeping stages take no core; leave it out to validate."),
        (["--validate", "--microbatches", "2", "--schedule", "1f1b"], "1f1b needs at least as many as stages in"),
    ],
)
def test_bad_input_is_one_clear_line(options, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as exit:
        simulate(*options)
    assert exit.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("lopt-hf pipeline simulate: error: ") and error.count("\n") == 1
    assert message in error
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "change, message",
    [
        ({"forward": None}, "forward=None must be a list of seconds, one for each stage."),
        ({"forward": [0.1, "x", 0.1]}, "forward has 'x', which is no finite number of at least 0."),
        ({"backward": [0.1, 0.1]}, "the lists have forward 3, backward 2, local 3, optimizer 3 numbers; give one"),
        ({"fowrard": [0.1]}, "unknown key 'fowrard'; did you mean 'forward'?"),
        ({"message_bytes": -1}, "message_bytes has -1, which is no finite number of at least 0."),
    ],
)
def test_bad_files_of_times(measured, capsys, change, message):
    measured.write_text(json.dumps({**MEASURED, **change}))
    with pytest.raises(SystemExit):
        simulate("--times", measured)
    error = capsys.readouterr().err
    assert message in error and str(measured) in error and error.count("\n") == 1


@pytest.mark.parametrize("text, message", [("{", "not JSON"), ("[]", "must be an object"), ("{}", "is missing")])
def test_files_that_are_no_times(measured, capsys, text, message):
    measured.write_text(text)
    with pytest.raises(SystemExit):
        simulate("--times", measured)
    assert message in capsys.readouterr().err
