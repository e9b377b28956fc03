"""The pipeline benchmark on a tiny model; nothing here depends on how fast the machine is."""

import json

import pytest
import torch
import torch.distributed as dist
from transformers import AutoModelForCausalLM, AutoTokenizer

from lopt_hf.bench import processes
from lopt_hf.bench.pipeline.bench import run_pipeline_bench
from lopt_hf.bench.pipeline.language import make_rows
from lopt_hf.bench.pipeline.method_run import MethodRun, Record
from lopt_hf.bench.pipeline.parts import Cut, divide_stages
from lopt_hf.bench.pipeline.report import PipelineBenchReport, PipelineResult, to_markdown
from lopt_hf.bench.pipeline.schedules import ScheduledTraining
from lopt_hf.bench.pipeline.settings import DEFAULT_METHODS, METHODS, SCHEDULES, PipelineBenchSettings
from lopt_hf.bench.pipeline.worker import prepare
from lopt_hf.common.host_store import LOOPBACK, host_store
from lopt_hf.local.embeddings import untie_output_embeddings
from lopt_hf.pipeline.runtime.timeline import Timeline
from lopt_hf.pipeline.split.model_costs import ModelCosts
from lopt_hf.pipeline.split.stopwatch import PartCost
from lopt_hf.scripts.bench import main
from tests.forkserver import forked_instead_of_spawned
from tests.tiny import make_model, make_tokenizer


@pytest.fixture(scope="module")
def tiny_model(tmp_path_factory):
    """A folder with a Llama of 4 layers whose head is tied to its embeddings, as SmolLM2's."""
    folder = tmp_path_factory.mktemp("tiny")
    make_model(tie_word_embeddings=True).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


RUN_METHODS = (*DEFAULT_METHODS, "ppll_delayed", "ppll_delayed_graph", "zbv")  # of the others, the gradients below


@pytest.fixture(scope="module")
def report(tiny_model, tmp_path_factory):
    """A run through the command, as JSON."""
    output = tmp_path_factory.mktemp("report") / "report.json"
    size = ["--micro-batch-size", "1", "--seq-length", "16"]
    rounds = ["--rounds", "1", "--warmup", "2", "--steps", "2", "--dtype", "float32"]
    with forked_instead_of_spawned(processes):
        methods = ["--methods", ",".join(RUN_METHODS)]
        main(["pipeline", "--model", str(tiny_model), *methods, *size, *rounds, "--output", str(output)])
    return json.loads(output.read_text())


# --- A whole run ---


def test_every_method_has_its_row(report):
    assert list(report["results"]) == list(RUN_METHODS)
    assert report["dtype"] == report["settings"]["dtype"] == "float32"
    for result in report["results"].values():
        assert len(result["step_seconds"]) == 2
        assert result["tokens_per_second"] > 0
        assert min(result["peak_resident_bytes"]) > 0


def test_methods_that_compute_the_same_have_the_same_loss(report):
    """After an optimizer step or two; so batches, weights, clipping and optimizer are the same."""
    loss = {name: result["loss"] for name, result in report["results"].items()}
    assert loss["ppll"] == loss["lopt"]
    for schedule in ("gpipe", "1f1b", "zbv"):
        assert loss[schedule] == pytest.approx(loss["e2e"], rel=1e-6), schedule
    assert loss["lopt"] != pytest.approx(loss["e2e"], rel=1e-6)


def test_loss_on_whole_logits_is_that_of_the_fused_head(report, tiny_model):
    methods = ("e2e", "ppll_delayed_graph", "zbv")
    settings = PipelineBenchSettings(
        model=str(tiny_model),
        methods=methods,
        lm_head="logits",
        dtype="fp32",
        split_at=tuple(report["cut"]["split_at"]),
        micro_batch_size=1,
        seq_length=16,
        rounds=1,
        warmup=2,
        steps=2,
    )
    results = run_pipeline_bench(settings, progress=False).results
    for method in methods:
        fused = report["results"][method]
        assert results[method].loss == pytest.approx(fused["loss"], rel=1e-6), method
        assert sum(results[method].saved_bytes) > sum(fused["saved_bytes"]), method  # the logits and their softmax


def test_first_stage_keeps_as_many_micro_batches_as_its_schedule_says(report):
    """Of four: GPipe all, 1F1B as many as there are stages, PPLL one (and a queue)."""
    results = report["results"]
    gpipe, one_ahead = results["gpipe"]["saved_bytes"], results["1f1b"]["saved_bytes"]
    assert gpipe[0] == pytest.approx(2 * one_ahead[0], rel=0.1)
    assert gpipe[1] == pytest.approx(4 * one_ahead[1], rel=0.1)
    ppll = results["ppll"]
    assert ppll["saved_bytes"][0] - ppll["queued_bytes"][0] == pytest.approx(gpipe[0] / 4, rel=0.3)
    assert ppll["queued_bytes"] == [4 * 16 * 32 * 4, 0]
    delayed = results["ppll_delayed"]  # its gradients of a step wait, too
    (layers,) = report["cut"]["rerun_at"]
    assert delayed["saved_bytes"][0] - delayed["queued_bytes"][0] == pytest.approx(gpipe[0] / 4 * layers / 2, rel=0.3)
    assert delayed["queued_bytes"] == [(4 + 6) * 16 * 32 * 4, 0]
    kept = results["ppll_delayed_graph"]  # all of a step, and the weights that they saw
    model = make_model(tie_word_embeddings=True).model
    parts = (model.embed_tokens, model.layers[0], model.layers[1])
    weights = 4 * sum(weight.numel() for part in parts for weight in part.parameters())
    assert kept["saved_bytes"][0] - kept["queued_bytes"][0] == pytest.approx(gpipe[0] + weights, rel=0.1)
    assert kept["saved_bytes"][1] == pytest.approx(one_ahead[1], rel=0.01)  # the last stage has its gradient at once


def test_waiting_is_a_share_of_each_stage(report):
    for name, result in report["results"].items():
        assert len(result["waiting"]) == (0 if name in ("lopt", "e2e") else 2)
        assert all(0 <= share <= 1 for share in result["waiting"])


def test_cut_is_measured_and_told(report):
    assert report["cut"]["split_at"] == [2]  # each stage has the two layers that two stages on a rank need
    assert report["cut"]["parts_at"] == [1, 2, 3]
    assert report["cut"]["expected"].startswith("| stage |")
    assert report["environment"]["MALLOC_MMAP_MAX_"] == "0"


@pytest.mark.slow
def test_bf16_and_readout_on_three_stages(tiny_model):
    settings = PipelineBenchSettings(
        model=str(tiny_model),
        methods=("ppll", "ppll_delayed", "1f1b"),
        stages=3,
        microbatches=3,
        objective="readout",
        split="even",
        dtype="bf16",
        malloc="default",
        seq_length=16,
        rounds=1,
        warmup=3,
        steps=1,
    )
    report = run_pipeline_bench(settings, progress=False)
    assert report.cut.split_at == [2, 3]
    assert [len(result.waiting) for result in report.results.values()] == [3, 3, 3]
    model = make_model(tie_word_embeddings=True).model
    first = (model.embed_tokens, model.layers[0], model.layers[1])
    expected = [
        sum(4 * p.numel() for part in parts for p in part.parameters()) for parts in (first, [model.layers[2]])
    ]
    queued, messages = report.results["ppll_delayed"].queued_bytes, report.results["ppll"].queued_bytes
    # With the weights that are expected, and gradients besides
    assert [messages[i] + expected[i] < queued[i] < 6 * messages[i] + expected[i] for i in (0, 1)] == [True, True]
    assert queued[2] == 0


# --- Bad input ---


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"methods": ("ppll", "gpip")}, "methods='gpip' is unknown, nearest is 'gpipe'"),
        ({"methods": ()}, "methods=.* at least one"),
        ({"stages": 1}, "stages=1 is too small; set it to 2 or more"),
        ({"microbatches": 1}, "microbatches=1 with stages=2: 1f1b needs at least as many as stages in torch"),
        (
            {"microbatches": 3, "methods": ("dualpipev",)},
            "=3 with stages=2: dualpipev needs at least twice as many as",
        ),
        ({"microbatches": 5, "methods": ("zbv", "interleaved_zb")}, "interleaved_zb deals them out in 2 equal rounds"),
        ({"stages": 3, "methods": ("ppll_delayed",)}, "ppll_delayed has its first gradient in step 3; set it to 3"),
        ({"warmup": 0}, "warmup=0 is too small; set it to 1 or more"),
        ({"objective": "readot"}, "objective='readot' is unknown, nearest is 'readout'"),
        ({"split": "uneven"}, "split='uneven' is unknown, nearest is 'even'"),
        ({"dtype": "fp16"}, "dtype='fp16' is unknown"),
        ({"malloc": "on"}, "malloc='on' is unknown"),
        ({"split_at": (1, 2)}, r"split_at=\(1, 2\) must have stages - 1 = 1 layers"),
    ],
)
def test_bad_settings(values, message):
    with pytest.raises(ValueError, match=message):
        PipelineBenchSettings(**values)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"stages": 5, "microbatches": 5}, "stages=5: the model has 4 layers; use at most 4"),
        ({"stages": 3, "methods": ("zbv",)}, "stages=3: the model has 4 layers, and .* use at most 2"),
        ({"split_at": (3,), "methods": ("zbv",)}, "the stage with layer 3 alone cannot be two stages of a rank"),
        ({"seq_length": 129}, "seq_length=129: the model takes 128 tokens; use at most 128"),
        ({"split_at": (4,)}, "split_at"),
        ({"model": "no/such-model"}, "model='no/such-model' is neither a local checkpoint"),
    ],
)
def test_settings_that_do_not_fit_the_model(tiny_model, values, message):
    settings = PipelineBenchSettings(**({"model": str(tiny_model), "seq_length": 16} | values))
    with pytest.raises(ValueError, match=message):
        run_pipeline_bench(settings, progress=False)


def test_command_tells_bad_input_in_one_line(tmp_path, capsys):
    for arguments, message in (
        (["--stages", "1"], "error: stages=1 is too small"),
        (["--output", str(tmp_path / "no" / "report.json")], "error: output=.*folder does not exist"),
    ):
        with pytest.raises(SystemExit) as caught:
            main(["pipeline", *arguments])
        assert caught.value.code == 2
        assert capsys.readouterr().err.splitlines()[-1].split(": ", 1)[1].startswith(message.split(".*")[0])


# --- Parts ---


def test_waiting_counts_the_timed_steps_only():
    settings = PipelineBenchSettings(warmup=1, steps=2)
    timeline = Timeline(0, kept_steps=9)
    for step, seconds in enumerate([5.0, 1.0, 2.0, 7.0]):
        timeline.step = step
        timeline.add("receive", 100.0 + 10 * step, 100.0 + 10 * step + seconds)
        timeline.add("forward", 105.0 + 10 * step, 110.0 + 10 * step)
    record = Record(ends=[110.0, 120.0, 130.0, 140.0], cpu_ends=[1.0, 10.0, 19.5, 30.0])
    record.finish(MethodRun("ppll", settings, "", Cut([1], [1], [1]), "", 0), timeline)
    assert record.waiting == pytest.approx(3 / 20)
    assert record.cpu_seconds == pytest.approx(18.5 / 2)
    assert record.core_share == pytest.approx(18.5 / 17)


def test_pipeline_runs_on_until_no_timed_step_has_the_machine_to_itself():
    """Stage 0 may be 6 micro-batches ahead: 2 queued at each end, one on its way, one that it computes."""
    settings = PipelineBenchSettings(warmup=1, steps=2, microbatches=4)
    assert MethodRun("ppll", settings, "", Cut([1], [1], [1]), "", 0).total_steps == 3 + 2
    assert MethodRun("gpipe", settings, "", Cut([1], [1], [1]), "", 0).total_steps == 3


def make_result(method, **values):
    result = {
        "method": METHODS[method],
        "tokens_per_second": 100.0,
        "speedup": 1.0,
        "step_seconds": [10.0, 10.5],
        "step_seconds_iqr": 0.25,
        "tokens_per_second_quartiles": (97.0, 102.6),
        "waiting": [],
        "cpu_seconds": [10.0],
        "core_share": 0.98,
        "saved_bytes": [400_000_000, 90_000_000],
        "queued_bytes": [0],
        "peak_resident_bytes": [3_000_000_000],
        "loss": 2.5,
        "load": [0.1],
    }
    return PipelineResult(**(result | values))


def test_markdown():
    ppll = make_result("ppll", tokens_per_second=190.0, speedup=1.9, waiting=[0.01, 0.025], saved_bytes=[100_000_000])
    gpipe = make_result("gpipe", core_share=0.5)
    zbv = make_result("zbv", tokens_per_second=200.0)
    delayed = make_result("ppll_delayed", saved_bytes=[120_000_000])
    results = {"lopt": make_result("lopt"), "ppll": ppll, "gpipe": gpipe, "zbv": zbv, "ppll_delayed": delayed}
    lines = to_markdown(PipelineBenchReport("float32", Cut([18], [9, 18, 24], [15]), results)).splitlines()
    assert lines[2] == (
        "| one process, local learning | 100 | 97 to 103 | 1.00 | 10.25 | 0.25 | 10.00 | - | 400, 90 | 3,000 | 2.500 |"
    )
    assert lines[3] == "| PPLL | 190 | 97 to 103 | 1.90 | 10.25 | 0.25 | 10.00 | 1.0%, 2.5% | 100 | 3,000 | 2.500 |"
    assert lines[7:13] == [
        "",
        "| saved for backward on the first rank, as a share of | GPipe | ZB-V |",
        "| --- | ---: | ---: |",
        "| PPLL | 0.25 | 0.25 |",
        "| PPLL, delayed gradient | 0.30 | 0.30 |",
        "",
    ]
    assert lines[13:] == [
        "- x 1.90 tokens/s from the schedule: PPLL against the same learning in one process",
        "- x 1.90 tokens/s from both: PPLL against GPipe",
        "- x 0.95 tokens/s from both: PPLL against ZB-V",
        "- x 0.53 tokens/s from the gradient that comes late: what its forward costs that runs again",
        "- x 1.00 tokens/s from PPLL with a delayed gradient against GPipe",
        "- x 0.50 tokens/s from PPLL with a delayed gradient against ZB-V",
        "- stages begin at layer 18; of PPLL, delayed gradient, whose first ones run twice, at 15",
        "- busy machine: GPipe, end-to-end had only 50% of a core where it did not wait; measure again",
    ]


def test_stages_are_halved_by_their_layers_or_by_what_these_cost():
    assert divide_stages([4], 9, 1) == [4]
    assert divide_stages([4], 9, 2) == [2, 4, 6]
    layers = tuple(PartCost(seconds, seconds, 1) for seconds in (1.0, 1.0, 1.0, 3.0, 1.0, 1.0, 1.0, 1.0))
    costs = ModelCosts(PartCost(0.0, 0.0, 0), layers, PartCost(50.0, 50.0, 1), PartCost(2.0, 2.0, 1), 0.0)
    assert divide_stages([4], 8, 2, costs) == [3, 4, 7]  # the head is as slow as two layers, local objectives are out
    with pytest.raises(ValueError, match=r"split_at=\[1\]: the stage with layer 0 alone cannot be two stages"):
        divide_stages([1], 4, 2)


# --- Gradients ---


def gradients_of(on_step, rank, runs):
    """The gradients of a rank's parameters, as the schedule of each run adds them up for one step."""
    found = []
    for number, run in enumerate(runs):
        prepare(run.settings)
        store = dist.TCPStore(LOOPBACK, run.port, is_master=False)
        dist.init_process_group("gloo", store=dist.PrefixStore(str(number), store), rank=rank, world_size=2)
        training = ScheduledTraining(rank, run)
        for _ in range(2):  # the second time all that a schedule keeps from step to step is there
            training.optimizer.zero_grad()
            training.accumulate(0)
        named = [item for model in training.models for item in model.named_parameters()]
        found.append({name: parameter.grad.numpy() for name, parameter in named})
        dist.barrier()
        dist.destroy_process_group()
    return found


def test_gradients_are_those_of_the_stock_model_in_one_process(tiny_model):
    """Up to the order of fp32 sums; so no schedule mixes messages up, and backwards in two parts lose nothing."""
    size = {"model": str(tiny_model), "methods": SCHEDULES, "micro_batch_size": 2, "seq_length": 12}
    cases = [*((name, 6) for name in SCHEDULES), ("dualpipev", 4)]  # the fewest that it takes
    store = host_store()
    cut = Cut([2], [1, 2, 3], [2])
    runs = [
        MethodRun(name, PipelineBenchSettings(microbatches=number, **size), str(tiny_model), cut, "", store.port)
        for name, number in cases
    ]
    with forked_instead_of_spawned(processes):
        ranks = processes.run_together("schedules", gradients_of, [(0, runs), (1, runs)], {})
    for run, *own in zip(runs, *ranks, strict=True):
        case = run.method, run.settings.microbatches
        expected = stock_gradients(tiny_model, run)
        found = own[0] | own[1]
        assert found.keys() == expected.keys(), case
        for name, gradient in expected.items():
            error = (torch.from_numpy(found[name]) - gradient).norm() / gradient.norm()
            assert error < 2e-6, (*case, name)


def stock_gradients(folder, run):
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).train()
    untie_output_embeddings(model)
    tokens_BT = torch.tensor(make_rows(run, AutoTokenizer.from_pretrained(folder)))[: run.settings.batch_size]
    model(input_ids=tokens_BT, labels=tokens_BT).loss.backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}
