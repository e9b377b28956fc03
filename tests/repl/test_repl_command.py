"""`lopt-hf repl` and `lopt-hf bench repl` on a tiny model."""

import json
import shutil
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForCausalLM, trainer_optimizer

from lopt_hf import RepLModel
from lopt_hf.common.arithmetic import choose_arithmetic
from lopt_hf.repl import comparison
from lopt_hf.repl.config import OPERATORS, STOCK_OPERATORS
from lopt_hf.repl.report import describe_removed
from lopt_hf.scripts import bench, repl
from tests.machine import set_machine
from tests.repl.helpers import make_stock
from tests.tiny import make_tokenizer

TEXT = "Twelve layers are more than eight. " * 80


@pytest.fixture
def folder(tmp_path):
    make_stock().save_pretrained(tmp_path / "model")
    make_tokenizer().save_pretrained(tmp_path / "model")
    for name in ("calibration", "healing", "measured"):
        (tmp_path / f"{name}.txt").write_text(name + TEXT)
    return tmp_path


def arguments(folder, **options):
    values = {
        "model": folder / "model",
        "output_dir": folder / "out",
        "num_layers_to_replace": 2,
        "calibration_text": folder / "calibration.txt",
        "eval_text": folder / "measured.txt",
        "eval_chunks": 6,
        "eval_chunk_length": 16,
        "calibration_tokens": 512,
        "calibration_seq_length": 32,
        "report_to": "none",
        "disable_tqdm": True,
        **options,
    }
    given = {name: value for name, value in values.items() if value is not None}
    return [part for name, value in given.items() for part in (f"--{name}", *map(str, _list(value)))]


def _list(value):
    return value if isinstance(value, list) else [value]


HEALING = {
    "max_steps": 2,
    "max_length": 16,
    "per_device_train_batch_size": 2,
    "bf16": False,
    "seeds": [0, 1],
    "gradient_checkpointing": False,
}


def test_a_run_with_healing(folder, capsys):
    repl.main(arguments(folder, dataset_name=folder / "healing.txt", compare=["branches", "proj:paper"], **HEALING))
    report = json.loads((folder / "out/report.json").read_text())
    untrained = [row for row in report["rows"] if row["seed"] is None]
    names = ["full model", "plain removal", "linear, calibrate", "branches channel, calibrate", "proj, paper"]
    assert [row["name"] for row in untrained] == names
    healed = [(row["name"], row["seed"]) for row in report["rows"] if row["seed"] is not None]
    assert healed == [(name, seed) for seed in (0, 1) for name in ("plain removal", "linear, calibrate")]
    assert all(len(row["losses"]) == 6 and row["losses"][0][1] == 15 for row in report["rows"])
    assert len(report["against_plain_removal"]) == 5 and len(report["against_full_model"]) == 6
    for reference in ("plain removal", "full model"):
        for found in report[f"against_{reference.replace(' ', '_')}"]:
            rows = [row for row in report["rows"] if (row["seed"] is not None) == found["trained"]]
            others = untrained if reference == "full model" else rows  # which is not healed
            means = [
                [sum(loss for loss, _ in row["losses"]) / 90 for row in chosen if row["name"] == name]
                for chosen, name in ((rows, found["name"]), (others, reference))
            ]
            assert found["delta"] == pytest.approx(sum(means[0]) / len(means[0]) - sum(means[1]) / len(means[1]))
            assert found["low"] <= found["delta"] <= found["high"]
    table, progress = capsys.readouterr()
    assert "| no training |" in table and "| after training, 2 seeds |" in table
    written = (folder / "out/report.md").read_text()
    assert written in table
    assert written.startswith("Removed: layer") and written.splitlines()[0].rstrip(".") in progress
    unfolded = RepLModel.from_pretrained(folder / "out/unfolded")
    folded = AutoModelForCausalLM.from_pretrained(folder / "out/folded")
    counted = {row["name"]: row["parameters"] for row in untrained}
    assert sum(p.numel() for p in folded.parameters()) == counted["linear, calibrate"]
    assert sum(p.numel() for p in unfolded.parameters()) == counted["linear, calibrate"]
    assert (folder / "out/folded/modeling_repl.py").is_file()


@pytest.mark.parametrize(
    ("layers", "line"),
    [
        ([3], "Removed: layer 3 (counted from 0)"),
        ([3, 11, 12, 13], "Removed: layers 3, 11 to 13 (counted from 0)"),
    ],
)
def test_removed_layers_in_words(layers, line):
    assert describe_removed(layers) == line


def test_from_scratch_every_seed_starts_its_models_from_the_same_weights(folder, monkeypatch):
    started = []

    def train_nothing(model, seed, *args):
        started.append((seed, {name: weight.clone() for name, weight in model.state_dict().items()}))
        return model

    monkeypatch.setattr(comparison, "heal", train_nothing)
    scratch = {
        "scratch": '{"hidden_size": 16}',
        "placement": "every",
        "every": 2,
        "num_layers_to_replace": None,
        "init": "skip",
    }
    repl.main(arguments(folder, dataset_name=folder / "healing.txt", **{**HEALING, **scratch}))
    assert [seed for seed, _ in started] == [0, 0, 0, 1, 1, 1]
    embeddings = [next(w for name, w in weights.items() if "embed_tokens" in name) for _, weights in started]
    assert embeddings[0].shape[1] == 16
    assert all(torch.equal(embeddings[0], other) for other in embeddings[1:3])
    assert not torch.equal(embeddings[0], embeddings[3])
    report = json.loads((folder / "out/report.json").read_text())
    assert [row["name"] for row in report["rows"][:3]] == ["plain removal", "linear, skip", "full model"]
    assert [row["removed"] for row in report["rows"][:3]] == [[1, 3], [1, 3], []]


SCRATCH = {"scratch": "{}", "placement": "every", "every": 2, "num_layers_to_replace": None, "init": "skip"}


@pytest.mark.parametrize("options", [{}, SCRATCH, {"judge": True}], ids=["pretrained", "scratch", "judged"])
def test_revision_and_attention_of_every_model(folder, monkeypatch, options):
    """The model lies on the hub under the revision alone."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(folder))
    snapshot = folder / "models--org--model/snapshots" / ("a" * 40)
    shutil.copytree(folder / "model", snapshot)
    (snapshot.parents[1] / "refs").mkdir()
    (snapshot.parents[1] / "refs/v2").write_text(snapshot.name)
    seen, judged = set(), []

    def train_nothing(model, *others):
        seen.add(model.config._attn_implementation)
        return model

    def judge_nothing(settings, tasks, full, *others):
        judged.append(full)
        return SimpleNamespace(to_markdown=str)

    monkeypatch.setattr(comparison, "heal", train_nothing)
    monkeypatch.setattr(repl, "judge", judge_nothing)
    monkeypatch.setattr(repl, "load_judge_tasks", lambda settings: [])
    attention = None if "judge" in options else "eager"
    given = {"model": "org/model", "model_revision": "v2", "attn_implementation": attention, **options}
    repl.main(arguments(folder, dataset_name=folder / "healing.txt", **{**HEALING, "seeds": 0, **given}))
    assert seen == {attention or "sdpa"}
    assert judged == [str(snapshot)] * ("judge" in options)
    settings = json.loads((folder / "out/report.json").read_text())["settings"]
    assert (settings["model_revision"], settings["attn_implementation"]) == ("v2", attention)


def test_adapters(folder):
    lora = {"use_peft": True, "lora_r": 4, "lora_target_modules": "all-linear", "operator": "branches"}
    repl.main(arguments(folder, dataset_name=folder / "healing.txt", **{**HEALING, "seeds": [0]}, **lora))
    unfolded = RepLModel.from_pretrained(folder / "out/unfolded")
    assert all(operator.coefficients.any() for operator in unfolded.surrogates.values())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"use_peft": True}, "use_peft=True has no effect without healing; give dataset_name, or leave it out"),
        ({"seeds": [0, 1]}, r"seeds=\[0, 1\] has no effect without healing"),
        (
            {"coefficients": "scalar"},
            "coefficients='scalar' has no effect: it is of operator 'branches', not of 'linea",
        ),
        ({"ridge": 9.0, "init": "skip"}, "ridge=9.0 has no effect: it is of a fit, and with init='skip' nothing is"),
        (
            {"coefficients": "scalar", "branches": "value", "compare": ["scale", "proj"]},
            "coefficients='scalar' has no effect: it is of operator 'branches', not of 'linear'; leave it out",
        ),
        (
            {"branches": "value", "compare": "scale"},
            r"branches=\['value'\] has no effect: it is of operator 'branches'",
        ),
        ({"ridge": 9.0, "init": "skip", "compare": ["scale", "mlp:paper"]}, "ridge=9.0 has no effect: it is of a fit"),
    ],
)
def test_options_without_effect(options, message, folder):
    (folder / "model/model.safetensors").unlink()
    with pytest.raises(SystemExit, match=message):
        repl.main(arguments(folder, **options))


def test_options_of_a_recipe_that_others_take_the_place_of(folder, capsys):
    """Layers named beside a recipe's placement; and what only calibrated variants read."""
    named = {"num_layers_to_replace": None, "layers_to_replace": [2], "init": "skip", "placement": "every", "every": 2}
    repl.main(arguments(folder, **named))
    lines = capsys.readouterr().err.splitlines()
    assert "placement='every' has no effect: it chooses layers, which are named." in lines
    assert "every=2 has no effect: it chooses layers, which are named." in lines
    assert "calibration_tokens=512 has no effect: it cuts calibration data, which init='skip' does without." in lines
    assert json.loads((folder / "out/report.json").read_text())["rows"][1]["removed"] == [2]
    others = {"compare": ["linear:calibrate", "branches", "mlp:paper"], "coefficients": "scalar", "ridge": 9.0}
    repl.main(arguments(folder, **named, **others, trainable="coefficients", output_dir=folder / "other"))
    assert "calibration_tokens" not in capsys.readouterr().err


def test_both_models_are_healed_with_the_full_one_as_teacher(folder, capsys):
    span = {"num_layers_to_replace": None, "spans": "[[2, 4]]", "operator": "down_proj"}
    taught = {"teacher_logits_weight": 1.0, "teacher_hidden_weight": 0.1, "task_loss_weight": 0.0}
    healing = {**HEALING, "seeds": [0], "logging_steps": 1}
    repl.main(arguments(folder, dataset_name=folder / "healing.txt", **span, **healing, **taught))
    printed = capsys.readouterr().out
    assert printed.count("'teacher_divergence'") == printed.count("'teacher_distance'") == 4  # two steps of each
    assert type(AutoModelForCausalLM.from_pretrained(folder / "out/folded")).__name__ == "LlamaForCausalLM"


def test_every_operator_in_one_table_and_a_stock_model_saved(folder, capsys):
    span = {"num_layers_to_replace": None, "spans": "[[2, 4]]", "operator": "down_proj"}
    repl.main(arguments(folder, compare="all", **span))
    report = json.loads((folder / "out/report.json").read_text())
    assert all(row["removed"] == [2, 3] for row in report["rows"][1:])
    stock = {row["name"] for row in report["rows"] if row["is_stock"]}
    assert stock == {"full model", "plain removal", *(f"{name}, calibrate" for name in STOCK_OPERATORS)}
    measured = {row["name"].split(",")[0].split()[0] for row in report["rows"][2:]}
    assert measured == set(OPERATORS)
    table = capsys.readouterr().out
    assert "| down_proj, calibrate" in table and "| patch, calibrate" in table
    folded = AutoModelForCausalLM.from_pretrained(folder / "out/folded")
    assert type(folded).__name__ == "LlamaForCausalLM" and folded.config.num_hidden_layers == 4
    assert not (folder / "out/folded/modeling_repl.py").exists()


def test_operators_that_do_not_fit_are_left_out_of_all_and_refused_by_name(folder, capsys):
    make_stock("gemma2").save_pretrained(folder / "model")
    span = {"num_layers_to_replace": None, "spans": "[[2, 3]]", "operator": "scale"}
    repl.main(arguments(folder, compare="all", **span))
    captured = capsys.readouterr()
    assert "down_proj, calibrate is left out: operator='down_proj' folds a map" in captured.err
    assert "| scale, calibrate" in captured.out and "down_proj" not in captured.out
    with pytest.raises(SystemExit, match="operator='down_proj' folds a map"):
        repl.main(arguments(folder, compare="down_proj", **span, output_dir=folder / "other"))


def test_every_variant_is_measured_once(folder):
    span = {"num_layers_to_replace": None, "spans": "[[2, 4]]", "operator": "refit"}
    repl.main(arguments(folder, compare=["refit", "scale", "scale"], **span))
    names = [row["name"] for row in json.loads((folder / "out/report.json").read_text())["rows"]]
    assert names == ["full model", "plain removal", "refit, calibrate", "scale, calibrate"]


def test_what_matters_in_training_only_keeps_nothing_out_of_all(folder, capsys):
    settings = {"detach_sources": False, "coefficients": "head", "branches": "value"}
    named = ["all", "down_proj:skip", "mlp:paper"]
    repl.main(arguments(folder, operator="branches", compare=named, output_dir=folder / "all", **settings))
    names = [row["name"] for row in json.loads((folder / "all/report.json").read_text())["rows"]]
    assert {"down_proj, skip", "down_proj, calibrate", "linear, calibrate"} < set(names)
    assert len(names) == len(set(names)) == 2 + len(OPERATORS) + 1
    assert "left out" not in capsys.readouterr().err
    head = {"operator": "linear", "coefficients": "head", "compare": "all", "output_dir": folder / "head"}
    repl.main(arguments(folder, **head))
    assert "branches:calibrate is left out: coefficients='head' needs" in capsys.readouterr().err


def test_the_cost_is_that_of_all_surrogates_together(folder):
    repl.main(arguments(folder, num_layers_to_replace=None, spans="[[1, 2], [3, 5]]"))
    report = json.loads((folder / "out/report.json").read_text())
    costs = RepLModel.from_pretrained(folder / "out/unfolded").surrogate_costs
    assert report["rows"][2]["cost_ratio"] == pytest.approx(2 / 3 * costs[0].ratio)  # two surrogates, three layers


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"spans": "[[1, 3], [2, 4]]"}, "overlap"),
        ({"spans": "[[0, 2]]"}, "must lie within [1, 5]"),
        ({"spans": "14"}, "spans='14' must list pairs"),
        ({"spans": "[[1, 3]]", "calibration_tokens": 32}, "has 32 tokens, but operator='refit' fits a map of 48"),
    ],
)
def test_spans_that_cannot_be_end_in_one_line(options, message, folder, capsys):
    with pytest.raises(SystemExit) as ended:
        repl.main(arguments(folder, num_layers_to_replace=None, operator="refit", **options))
    assert ended.value.code == 2 and message in capsys.readouterr().err.splitlines()[-1]


def test_nothing_is_overwritten(folder):
    repl.main(arguments(folder))
    before = (folder / "out/report.json").read_text()
    with pytest.raises(SystemExit, match="holds another run's report.json; choose another output_dir"):
        repl.main(arguments(folder))
    assert (folder / "out/report.json").read_text() == before


@pytest.mark.parametrize("name", ["healing", "plain", "unfolded", "judge", "judge.md", "judge.json"])
def test_what_a_stopped_run_left_is_not_written_into(name, folder, capsys):
    (folder / "out" / name).mkdir(parents=True)
    with pytest.raises(SystemExit) as ended:
        repl.main(arguments(folder, model=folder / "nowhere"))
    assert ended.value.code == 2
    assert f"holds another run's {name}; choose another output_dir" in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize(
    ("data", "options", "message"),
    [
        (None, {}, "healing.jsonl"),
        ('{"instruction": "Hi", "outp', {}, "healing.jsonl, line 1: no valid JSON"),
        ('{"instruction": "Hi", "output": "a"}\n{"instruction": "Hi", "output": null}', {}, "row 2: 'output' is null"),
        ('{"question": "a"}', {}, "question"),
        ('{"prompt": "12345678", "completion": "9"}', {"max_length": 8}, "max_length=8 cuts off every answer"),
        ('{"instruction": "12345678", "output": "9"}', {"max_length": 8}, "max_length=8 cuts off every answer"),
        ("short", {"dataset_name": "healing.txt"}, "has 5 tokens, less than one row of max_length=1024"),
        ("x" * 2000, {"dataset_name": "healing.txt", "compare": ["lienar"]}, "operator='lienar' is unknown"),
        ("x" * 2000, {"dataset_name": "healing.txt", "optim": "lomo"}, "optim='lomo' cannot be used here"),
        ("x" * 2000, {"dataset_name": "healing.txt", "resume_from_checkpoint": "true"}, "heals several models, each"),
        ("x" * 2000, {"dataset_name": "healing.txt", "eval_strategy": "steps"}, "eval_strategy=steps has no data"),
        ("x" * 2000, {"dataset_name": "healing.txt", "seed": 7}, "seed=7 has no effect: the healing runs take theirs"),
        ("x" * 2000, {"dataset_name": "healing.txt", "push_to_hub": True}, "push_to_hub=True would upload none"),
        ("x" * 2000, {"dataset_name": "healing.txt", "load_in_8bit": True}, "load_in_8bit=True: layers of a"),
        ("x" * 2000, {"dataset_name": "healing.txt", "load_in_4bit": True}, "load_in_4bit=True: layers of a"),
    ],
)
def test_healing_that_cannot_work_ends_before_the_model_is_loaded(folder, monkeypatch, capsys, data, options, message):
    monkeypatch.setattr(trainer_optimizer, "is_lomo_available", lambda: False)
    name = folder / options.get("dataset_name", "healing.jsonl")
    if data is not None:
        name.write_text(data)
    for path in (folder / "model").glob("*.safetensors"):
        path.unlink()
    with pytest.raises(SystemExit) as ended:
        repl.main(arguments(folder, **{**options, "dataset_name": name}))
    line = capsys.readouterr().err.splitlines()[-1]
    assert ended.value.code == 2 and line.startswith("lopt-hf repl: ") and message in line


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"eval_text": "missing.txt"}, "eval_text='missing.txt' is no file here"),
        ({"eval_chunks": 1000}, "eval_chunks=1000 pieces .* lower eval_chunks to at most"),
        ({"num_layers_to_replace": 5}, "num_layers_to_replace=5 does not fit a model with 6 layers"),
        ({"compare": ["nothing"]}, "operator='nothing' is unknown"),
        ({"judge": True, "attn_implementation": "eager"}, "attn_implementation='eager' is not what judge runs"),
        ({"scratch": "{}", "dataset_name": "healing.txt"}, "init='calibrate' has nothing to imitate"),
        ({"scratch": "{}", "dataset_name": "healing.txt", "init": "skip"}, "placement='block_influence' says nothing"),
    ],
)
def test_bad_input(options, message, folder):
    with pytest.raises(SystemExit, match=message):
        repl.main(arguments(folder, **options))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"eval_chunk_length": 129}, "eval_chunk_length=129 is more than the 128 positions"),
        (
            {"calibration_seq_length": 129},
            "calibration_seq_length=129 is more .* model=.* has learned; set it to at most",
        ),
        ({"dataset_name": "healing.txt", "max_length": 129}, "max_length=129 is more than the 128 positions"),
    ],
)
def test_sequences_longer_than_the_positions_that_were_learned(options, message, folder):
    make_stock("gpt2").save_pretrained(folder / "model")
    (folder / "model/model.safetensors").unlink()
    with pytest.raises(SystemExit, match=message):
        repl.main(arguments(folder, **options))


@pytest.mark.parametrize("options", [{}, {"init": "skip"}, {"init": "skip", "placement": "span"}])
def test_hidden_states_that_are_not_finite_end_in_one_line(options, folder):
    model = make_stock()
    model.model.layers[1].mlp.down_proj.weight.data.fill_(float("inf"))
    model.save_pretrained(folder / "model")
    with pytest.raises(SystemExit, match="hidden states of the calibration data are not finite"):
        repl.main(arguments(folder, **options))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"scratch": "{}"}, "scratch without dataset_name leaves nothing to train on"),
        ({"scratch": "12 layers", "dataset_name": "healing.txt"}, "scratch='12 layers' is no JSON object"),
        ({"scratch": "{}", "dataset_name": "healing.txt", "compare": ["proj"]}, "leave it out where scratch is set"),
    ],
)
def test_bad_scratch(options, message, folder, capsys):
    with pytest.raises(SystemExit):
        repl.main(arguments(folder, **options))
    assert message in capsys.readouterr().err


def test_a_bad_value_ends_the_command_before_the_model_is_loaded(folder, capsys):
    with pytest.raises(SystemExit):
        repl.main(arguments(folder, operator="branches", branches=["vlaue"], model=folder / "nowhere"))
    assert "branches=['vlaue'] must name" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("given", "has_bfloat16", "expected"),
    [
        ({}, True, ("bf16", torch.float32)),
        ({}, False, ("no", torch.float32)),
        ({"dtype": "float32"}, True, ("no", torch.float32)),
        ({"dtype": "float32", "bf16": True}, True, ("bf16", torch.float32)),
        ({"dtype": "auto", "bf16": False}, True, ("no", torch.float32)),
        ({"dtype": "bfloat16"}, False, ("no", torch.bfloat16)),
    ],
)
def test_type_of_weights_and_arithmetic(folder, monkeypatch, capsys, given, has_bfloat16, expected):
    """The arithmetic of healing is the faster one, unless told; weights are rounded only where that is asked for."""
    set_machine(monkeypatch, has_bfloat16)
    seen = []

    def train_nothing(model, seed, dataset, args, *others):
        seen.append((args.mixed_precision, model.dtype))
        return model

    monkeypatch.setattr(comparison, "heal", train_nothing)
    healing = {name: value for name, value in HEALING.items() if name != "bf16"}
    repl.main(arguments(folder, dataset_name=folder / "healing.txt", **{**healing, "seeds": 0, **given}))
    assert set(seen) == {expected}
    precision, weights = expected
    computed = "bfloat16" if precision == "bf16" else str(weights).removeprefix("torch.")
    line = capsys.readouterr().out.splitlines()[0]
    assert line.startswith(f"Arithmetic: training in {computed} on cpu, ")
    assert json.loads((folder / "out/report.json").read_text())["settings"]["arithmetic"] == line


def test_bench(folder, capsys, tmp_path):
    options = ["--every", "2", "--tokens", "4", "--prompt-tokens", "8", "--rounds", "2", "--calibration-tokens", "512"]
    make_stock(num_hidden_layers=10).save_pretrained(folder / "deeper")
    make_tokenizer().save_pretrained(folder / "deeper")
    stock = ["--operator", "down_proj", "--calibration-layers", "3", "--calibration-tokens", "4096"]
    bench.main(["repl", "--model", str(folder / "deeper"), *options, *stock])
    table = capsys.readouterr().out
    assert "RepL, 4 of 10 layers, folded" in table and "Choosing and calibrating 3 layers" in table
    assert table.startswith(str(choose_arithmetic(device="cpu")))
    bench.main(
        ["repl", "--model", str(folder / "deeper"), *options, "--dtype", "bf16", "--output", str(tmp_path / "x")]
    )
    mlp = ["--operator", "mlp", "--calibration-layers", "3"]
    bench.main(["repl", "--model", str(folder / "deeper"), *options, *mlp])
    report = json.loads((tmp_path / "x").read_text())
    assert report["settings"]["dtype"] == report["result"]["dtype"] == "bfloat16"


def test_bench_input(capsys):
    with pytest.raises(SystemExit):
        bench.main(["repl", "--rounds", "0"])
    assert "rounds=0 is too small" in capsys.readouterr().err
