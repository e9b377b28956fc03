"""The step benchmark on a tiny model; nothing here depends on how fast the machine is."""

import json
import os
import shutil
import signal
import statistics

import pytest
from tokenizers import Tokenizer, models
from tokenizers.pre_tokenizers import ByteLevel
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from lopt_hf.bench import step
from lopt_hf.bench.step import (
    BenchWorkerError,
    StepBenchSettings,
    StepResult,
    _over_cycle,
    _Worker,
    run_step_bench,
    to_json,
    to_markdown,
)
from lopt_hf.bench.step_settings import make_rows
from lopt_hf.common.arithmetic import choose_arithmetic
from lopt_hf.common.compared_methods import PEERS
from lopt_hf.common.tables import interquartile_range
from lopt_hf.scripts.bench import main
from tests.forkserver import forked_instead_of_spawned


@pytest.fixture(scope="module")
def tiny_model(tmp_path_factory):
    """A folder with a Llama of 4 layers and a tokenizer of single bytes."""
    folder = tmp_path_factory.mktemp("tiny")
    vocabulary = {token: index for index, token in enumerate([*sorted(ByteLevel.alphabet()), "<eos>"])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = ByteLevel(add_prefix_space=False)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<eos>").save_pretrained(folder)
    config = LlamaConfig(
        vocab_size=len(vocabulary),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def peers(tiny_model):
    settings = StepBenchSettings(
        model=str(tiny_model),
        methods=("e2e", "e2e_checkpointing", *PEERS),
        num_blocks=(2,),
        batch_size=2,
        seq_length=32,
        steps=2,
        warmup=0,
        dtype="float32",
        threads=1,
    )
    with forked_instead_of_spawned(step):
        return {result.method: result for result in run_step_bench(settings, progress=False)}


@pytest.fixture(scope="module")
def run(tiny_model):
    settings = StepBenchSettings(
        model=str(tiny_model),
        num_blocks=(2,),
        local_update_interval=(1, 2),
        batch_size=2,
        seq_length=32,
        steps=3,
        warmup=0,
        threads=1,
    )
    with forked_instead_of_spawned(step):
        return settings, {result.method: result for result in run_step_bench(settings, progress=False)}


def make_result(**values):
    result = {
        "method": "e2e",
        "dtype": "bfloat16",
        "peak_saved_bytes": 962e6,
        "saved_bytes_ratio": 1.0,
        "peak_gradient_bytes": 538e6,
        "gradient_bytes_ratio": 1.0,
        "optimizer_bytes": 1_076_000_000,
        "optimizer_bytes_ratio": 1.0,
        "step_seconds": 4.25,
        "step_seconds_ratio": 1.0,
        "step_seconds_iqr": 0.125,
        "baseline_step_seconds": 4.25,
        "peak_resident_bytes": 3_000_000_000,
        "peak_cuda_bytes": None,
        "final_loss": 2.5,
        "final_loss_step": 12,
        "timed_seconds": [4.25],
        "saved_bytes": [962_000_000],
        "gradient_bytes": [538_000_000],
        "state_bytes": [1_076_000_000],
    }
    return StepResult(**(result | values))


# --- A whole run ---


def test_every_method_has_its_row_in_order(run):
    _, results = run
    lopt = ["LoPT K=2", "LoPT K=2, interval 2", "LoPT K=2, local step", "LoPT K=2, local step, in parts"]
    assert list(results) == ["e2e", "e2e + checkpointing", *lopt, "freeze", "LoRA r=16"]


def test_saved_bytes_order_the_methods(run):
    _, results = run
    ratio = {name: result.saved_bytes_ratio for name, result in results.items()}
    assert ratio["e2e"] == 1.0
    assert ratio["e2e + checkpointing"] < 0.6
    assert ratio["LoPT K=2"] < 0.7
    assert ratio["freeze"] < 0.7


def test_gradient_bytes(run):
    """All parameters' at once, or those of the larger block; the tiny model's head is not tied, blocks are alike."""
    _, results = run
    ratio = {name: result.gradient_bytes_ratio for name, result in results.items()}
    assert ratio["e2e"] == ratio["e2e + checkpointing"] == 1.0
    assert 1.0 < ratio["LoPT K=2"] < 1.05  # and the reconstruction head
    assert 0.5 < ratio["LoPT K=2, local step"] < 0.55
    assert ratio["LoPT K=2, local step, in parts"] < ratio["LoPT K=2, local step"]
    assert 0.45 < ratio["freeze"] < 0.55
    assert results["LoPT K=2, local step"].final_loss == results["LoPT K=2"].final_loss


def test_optimizer_bytes(run):
    """AdamW's two moments of what is trained, and a counter for each parameter."""
    _, results = run
    assert results["e2e"].optimizer_bytes_ratio == 1.0
    assert 2 < results["e2e"].optimizer_bytes / results["e2e"].peak_gradient_bytes < 2.01
    assert 0.45 < results["freeze"].optimizer_bytes_ratio < 0.55


def test_interval_is_averaged_over_whole_cycles(run):
    _, results = run
    interval = results["LoPT K=2, interval 2"]
    assert len(interval.saved_bytes) == 2
    assert len(interval.timed_seconds) == 4
    assert interval.peak_saved_bytes == statistics.fmean(interval.saved_bytes)


def test_each_ratio_is_to_the_end_to_end_steps_taken_in_turns_with_it(run):
    _, results = run
    end_to_end, *others = results.values()
    assert len(end_to_end.timed_seconds) == sum(len(result.timed_seconds) for result in others)
    for result in others:
        assert result.step_seconds_ratio == pytest.approx(result.step_seconds / result.baseline_step_seconds)


def test_methods_see_the_same_batches(run):
    """Checkpointing changes no number: same losses, so same batches, same initial weights, same updates."""
    _, results = run
    assert results["e2e"].final_loss_step == 4
    assert results["e2e + checkpointing"].final_loss == pytest.approx(results["e2e"].final_loss, rel=1e-4)
    for result in results.values():
        assert result.final_loss == pytest.approx(results["e2e"].final_loss, rel=0.05)
        assert result.peak_resident_bytes > 0


def test_report_of_a_run(run):
    settings, results = run
    report = json.loads(to_json(list(results.values()), settings))
    assert report["settings"]["seq_length"] == 32
    assert report["results"][0]["method"] == "e2e"
    assert {result["dtype"] for result in report["results"]} == {choose_arithmetic().dtype}
    assert len(to_markdown(list(results.values())).splitlines()) == 2 + len(results)


# --- Reach ---


def test_reach(tiny_model):
    settings = StepBenchSettings(
        model=str(tiny_model),
        methods=("e2e", "reach", "reach_local_step"),
        num_blocks=(4,),
        clip_scope=("part",),
        batch_size=2,
        task_reach=(1, 1, 1, 4),
        seq_length=32,
        steps=2,
        warmup=0,
        dtype="float32",
        threads=1,
    )
    with forked_instead_of_spawned(step):
        _, reach, stepping = run_step_bench(settings, progress=False)
    assert [reach.method, stepping.method] == [f"K=4, reach 1,1,1,4{step}" for step in ("", ", local step, in parts")]
    assert reach.saved_bytes_ratio < 0.45
    one, *ones, all_blocks = reach.gradient_bytes
    assert ones == [one, one] and one < 0.4 * all_blocks
    assert len(reach.timed_seconds) == 8
    assert reach.optimizer_bytes_ratio == 1  # that of all blocks, though the first steps train one
    assert stepping.gradient_bytes_ratio < reach.gradient_bytes_ratio
    assert stepping.final_loss == pytest.approx(reach.final_loss, rel=1e-3)  # clips otherwise


# --- The peers ---


def test_peers_have_their_rows(peers):
    names = ["e2e, K=2 segments", "e2e, step in backward", "freeze last 1 of 2 blocks", "LISA", "BAdam"]
    assert list(peers) == ["e2e", "e2e + checkpointing", *names]


def test_peers_bytes(peers):
    """Of the tiny model's four layers and its embeddings, head and norm, which are not much."""
    saved, gradients, state = (
        {name: getattr(result, f"{kind}_bytes_ratio") for name, result in peers.items()}
        for kind in ("saved", "gradient", "optimizer")
    )
    assert 0.4 < saved["e2e, K=2 segments"] < 0.6
    assert gradients["e2e, K=2 segments"] == state["e2e, K=2 segments"] == 1
    assert saved["e2e, step in backward"] == state["e2e, step in backward"] == 1
    assert gradients["e2e, step in backward"] < 0.2
    assert 0.4 < gradients["freeze last 1 of 2 blocks"] < 0.6
    assert gradients["freeze last 1 of 2 blocks"] == pytest.approx(state["freeze last 1 of 2 blocks"], rel=0.01)
    assert 0.5 < gradients["LISA"] < 0.7  # two of the layers, and the rest
    assert gradients["LISA"] == pytest.approx(state["LISA"], rel=0.01)
    assert 0.1 < gradients["BAdam"] < 0.25  # one of the layers
    assert gradients["BAdam"] == pytest.approx(state["BAdam"], rel=0.01)
    assert saved["BAdam"] < saved["LISA"] < 1


def test_badam_row_goes_over_the_depth(peers):
    """The lower the layer, the longer its backward; the mean over the depth is that of the two in the middle."""
    lowest, low, high, highest = peers["BAdam"].saved_bytes
    assert lowest > low > high > highest
    assert lowest + highest == pytest.approx(low + high, rel=0.01)
    assert len(peers["BAdam"].timed_seconds) == 8


def test_segments_change_no_number(peers):
    assert peers["e2e, K=2 segments"].final_loss == peers["e2e"].final_loss


# --- Failures ---


def test_error_in_a_process_is_raised_in_the_parent(tiny_model, tmp_path):
    """The config is there, so the parent sees nothing wrong; the weights are not."""
    shutil.copy(tiny_model / "config.json", tmp_path)
    for tokenizer_file in tiny_model.glob("tokenizer*"):
        shutil.copy(tokenizer_file, tmp_path)
    settings = StepBenchSettings(model=str(tmp_path), methods=("e2e",), seq_length=32, threads=1)
    with pytest.raises(BenchWorkerError, match="^e2e: OSError: .*model.safetensors") as caught:
        run_step_bench(settings, progress=False)
    assert "_make_trainer" in str(caught.value.__cause__)


def test_killed_process_is_reported(tmp_path):
    settings = StepBenchSettings(methods=("e2e",))
    with _Worker(make_rows(settings)[0], settings, "unused", str(tmp_path)) as worker:
        os.kill(worker._process.pid, signal.SIGKILL)
        with pytest.raises(BenchWorkerError, match="e2e: its process ended with exit code -9; .*memory"):
            worker.wait_until_ready()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"num_blocks": (2, 5)}, r"num_blocks=\(2, 5\): the model has 4 layers; use at most 4"),
        ({"split_at": (9,)}, r"split_at=\[9\] "),
        ({"seq_length": 65}, "seq_length=65: the model takes 64 tokens; use at most 64"),
        ({"model": "no/such-model"}, "model='no/such-model' is neither a local checkpoint"),
    ],
)
def test_settings_that_do_not_fit_the_model(tiny_model, values, message):
    settings = StepBenchSettings(**({"model": str(tiny_model), "num_blocks": (2,), "seq_length": 32} | values))
    with pytest.raises(ValueError, match=message):
        run_step_bench(settings, progress=False)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"methods": ("e2e", "loptt")}, "methods='loptt' is unknown, nearest is 'lopt'"),
        ({"methods": ("e2e", "e2e")}, "methods=.* each value once"),
        ({"methods": ()}, "methods=.* at least one"),
        ({"dtype": "fp16"}, "dtype='fp16' is unknown; use auto, float32 or bfloat16"),
        ({"num_blocks": (1, 2)}, "num_blocks=.*2 blocks or more"),
        ({"local_update_interval": (0, 1)}, "local_update_interval=.*1 .*or more"),
        ({"split_at": (2, 3)}, r"split_at=\(2, 3\) cuts 3 blocks, but num_blocks=\(2, 4\); set num_blocks to 3 alone"),
        ({"tied_embeddings": "tie"}, "tied_embeddings='tie' is unknown"),
        ({"local_update_interval": (4,)}, r"add 1 to measure num_blocks=\(4,\)"),
        ({"task_reach": (1, 1, 1, 3)}, r"task_reach=\(1, 1, 1, 3\) reaches 3 blocks, .*; add 3 to num_blocks"),
        (
            {"task_reach": (1, 1, 2)},
            r"task_reach=\(1, 1, 2\) does nothing for methods=.*; add reach or reach_local_step",
        ),
        ({"task_reach": (1, 0)}, r"task_reach=\(1, 0\): a reach is 1 .the last block. or more"),
        ({"seq_length": 1}, "seq_length=1 is too small; set it to 2 or more"),
        ({"batch_size": 0}, "batch_size=0 is too small; set it to 1 or more"),
        ({"steps": 0}, "steps=0 is too small; set it to 1 or more"),
        ({"warmup": -1}, "warmup=-1 is too small; set it to 0 or more"),
        ({"threads": 0}, "threads=0 is too small; set it to 1 or more"),
    ],
)
def test_bad_settings(values, message):
    with pytest.raises(ValueError, match=message):
        StepBenchSettings(**values)


# --- Parts ---


def test_rows_of_the_defaults():
    rows = {row.name: row for row in make_rows(StepBenchSettings())}
    lopt = ["LoPT K=2", "LoPT K=4", "LoPT K=2, interval 4"]
    lopt += [f"LoPT K={blocks}, local step{parts}" for blocks in (2, 4) for parts in ("", ", in parts")]
    assert list(rows) == ["e2e", "e2e + checkpointing", *lopt, "freeze", "LoRA r=16"]
    assert rows["e2e"].timed_steps == 9
    assert rows["LoPT K=2, interval 4"].timed_steps == 8
    assert rows["LoPT K=2, interval 4"].total_steps == 4 + 2 + 8


@pytest.mark.parametrize(("old", "name"), [("bf16", "bfloat16"), ("fp32", "float32")])
def test_old_spelling_of_a_type(old, name):
    assert StepBenchSettings(dtype=old).dtype == name


def test_reach_rows():
    rows = make_rows(StepBenchSettings(methods=("reach", "reach_local_step")))
    names = [f"K={blocks}, reach {blocks},1,1,1" for blocks in (2, 4)]
    assert [row.name for row in rows] == [
        *names,
        *(f"{name}, local step{parts}" for name in names for parts in ("", ", in parts")),
    ]
    assert [row.total_steps for row in rows[:2]] == [4 + 2 + 8] * 2
    (row,) = make_rows(StepBenchSettings(methods=("reach",), task_reach=(1, 4)))
    assert (row.name, row.num_blocks, row.task_reach, row.interval) == ("K=4, reach 1,4", 4, (1, 4), 2)


def test_time_over_a_cycle():
    """Two kinds of step: the median of each kind, then their mean; an outlier in one cycle is left out."""
    seconds = [3.0, 1.0, 3.0, 1.0, 30.0, 1.0]
    assert _over_cycle(seconds, 2, statistics.median) == 2.0
    assert _over_cycle([1.0, 5.0, 2.0], 1, statistics.median) == 2.0
    assert _over_cycle([1.0, 2.0, 3.0, 4.0, 5.0], 1, interquartile_range) == 2.0
    assert _over_cycle([3.0, 1.0], 2, interquartile_range) == 0.0


def test_markdown():
    results = [make_result(), make_result(method="LoPT K=2", saved_bytes_ratio=0.5, step_seconds_ratio=None)]
    lines = to_markdown(results).splitlines()
    assert lines[0].endswith("| peak RSS (MB) | loss at step 12 |")
    assert lines[2] == "| e2e | 962 | 1.00 | 538 | 1.00 | 1,076 | 1.00 | 4.250 | 1.00 | 0.125 | 3,000 | 2.500 |"
    assert lines[3] == "| LoPT K=2 | 962 | 0.50 | 538 | 1.00 | 1,076 | 1.00 | 4.250 | - | 0.125 | 3,000 | 2.500 |"
    assert "| peak CUDA (MB) |" in to_markdown([make_result(peak_cuda_bytes=10**9)])


def test_command_rejects_bad_input_in_one_line(capsys, tmp_path):
    for arguments, message in (
        (["--methods", "e2e,loptt"], "methods='loptt'"),
        (["--num-blocks", "2,x"], "'2,x' is not a comma-separated list of integers"),
        (["--output", str(tmp_path / "none" / "step.json")], "its folder does not exist"),
    ):
        with pytest.raises(SystemExit) as caught:
            main(["step", *arguments])
        assert caught.value.code == 2
        assert message in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize(
    "arguments",
    [["--task_reach", "[1,1,1,4]", "--num_blocks=2,4"], ["--task-reach=1,1,1,4", "--num-blocks", "2,4"]],
)
def test_options_are_spelled_as_the_trainers_too(arguments, monkeypatch):
    seen = []
    monkeypatch.setattr("lopt_hf.scripts.bench.run_step_bench", lambda settings: seen.append(settings) or [])
    main(["step", "--methods", "reach", "--dtype", "float32", *arguments])
    assert (seen[0].task_reach, seen[0].num_blocks) == ((1, 1, 1, 4), (2, 4))


def test_help_has_an_example(capsys):
    with pytest.raises(SystemExit):
        main(["step", "--help"])
    assert "lopt-hf bench step --methods e2e,lopt --num-blocks 2,4" in capsys.readouterr().out
