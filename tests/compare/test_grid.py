"""The settings of a comparison: what runs they make, and what is wrong with bad ones."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from lopt_hf.compare.grid import Grid, GridRun, load_grid
from lopt_hf.compare.grid_data import prepare_data

SETTINGS: dict[str, Any] = {
    "model": "base",
    "train_dataset": "train.jsonl",
    "heldout_dataset": "test.jsonl",
    "methods": {
        "end-to-end": {"method": "e2e", "learning_rates": [1.0e-5, 1.0e-4]},
        "LoPT, slow": {"num_blocks": 2, "early_learning_rate_ratio": 0.1},
    },
    "learning_rates": [1.0e-4],
    "training": {"max_length": 64, "bf16": False},
    "tasks": ["piqa"],
    "output_dir": "out",
    "seeds": [0, 1],
}


def write(folder: Path, **changes: Any) -> Path:
    settings = {name: value for name, value in {**SETTINGS, **changes}.items() if value is not ...}
    path = folder / "grid.yaml"
    path.write_text(yaml.safe_dump(settings), encoding="utf-8")
    return path


def test_every_method_rate_and_seed_is_one_run() -> None:
    """A method's own rates replace the grid's; the early rate is a share of the run's; seeds are whole passes."""
    runs = Grid(**SETTINGS).runs()
    assert [run.name for run in runs] == [
        f"{name}_seed{seed}"
        for seed in (0, 1)
        for name in ("end-to-end_lr1e-05", "end-to-end_lr0.0001", "lopt-slow_lr0.0001")
    ]
    assert runs[2].arguments == {
        "max_length": 64,
        "bf16": False,
        "num_blocks": 2,
        "learning_rate": 1e-4,
        "early_learning_rate": 1e-5,
        "seed": 0,
    }


@pytest.mark.parametrize(
    ("method", "command", "left"),
    [
        ("e2e", "sft", {"method": "e2e"}),
        ("mlaan", "mlaan", {}),
        ("lisa", "peers", {"method": "lisa"}),
    ],
)
def test_each_method_has_its_command(method: str, command: str, left: dict[str, Any]) -> None:
    run = GridRun("a method", 1e-4, 0, 8, {"method": method, "max_length": 64})
    assert (run.command, run.command_arguments) == (command, {**left, "max_length": 64})


def test_overrides_replace_the_files_settings(tmp_path: Path) -> None:
    grid = load_grid(write(tmp_path), output_dir=str(tmp_path / "elsewhere"), workers=None)
    assert (grid.output_path, grid.workers) == (tmp_path / "elsewhere", 1)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"taks": ["piqa"]}, "unknown setting 'taks' .did you mean 'tasks'"),
        ({"model": ...}, "model missing"),
        ({"methods": {}}, "methods={} is empty"),
        ({"seeds": []}, r"seeds=\[\] is empty"),
        ({"num_heldout": 0}, "num_heldout=0"),
        ({"training": {"bf16": False}}, "training.max_length is missing"),
        ({"training": {"max_length": 8, "model_revision": "v2"}}, "model_revision would train from one revision"),
        ({"methods": {"a": {"model_revision": "v2"}}}, "model_revision would train from one revision"),
        ({"methods": {"a b": {}, "a-b": {}}}, "same folder name 'a-b_lr0.0001_seed0'"),
        ({"contrasts": [["end-to-end", "LoRA"]]}, "must be two of the methods"),
        ({"dtype": "int8"}, "dtype='int8' is unknown; use auto, float32 or bfloat16"),
        ({"dtype": "bf16"}, "dtype='bfloat16' and bf16=False both say in which type to train; leave one of them out"),
    ],
)
def test_bad_settings(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_grid(write(tmp_path, **changes))


@pytest.mark.parametrize(
    ("name", "value", "fix"),
    [
        ("learning_rate", 1e-5, "learning_rates of the method or of the grid"),
        ("seed", 7, "seeds of the grid"),
        ("output_dir", "x", "output_dir of the grid"),
        ("dataset_name", "other", "train_dataset of the grid"),
        ("dataset_max_samples", 3, "num_train of the method or of the grid"),
        ("model_name_or_path", "other", "model of the grid"),
    ],
)
def test_what_the_grid_sets_is_no_argument_of_a_run(tmp_path: Path, name: str, value: Any, fix: str) -> None:
    for changes in ({"training": {"max_length": 8, name: value}}, {"methods": {"a": {}, "b": {name: value}}}):
        place = "training" if "training" in changes else "methods.b"
        with pytest.raises(ValueError, match=f"{place}.{name}={value!r} is set by the grid itself; set {fix} instead"):
            load_grid(write(tmp_path, **changes))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("methods: [a]", "methods=\\['a'\\] must be `name: value` pairs"),
        ("methods: {a: null}", "methods.a=null must be `name: value` pairs"),
        ("methods: {1: {}}", "methods: the key 1 must be text; write it in quotes"),
        ("methods: {a: {learning_rates: 1e-5}}", "methods.a.learning_rates=1e-05 must be a list of numbers"),
        (
            "methods: {a: {early_learning_rate_ratio: half}}",
            "methods.a.early_learning_rate_ratio='half' must be a number",
        ),
        (
            "methods: {a: {early_learning_rate_ratio: 0.1, early_learning_rate: 1.0e-6}}",
            "methods.a.early_learning_rate=1e-06 is replaced by early_learning_rate_ratio=0.1; leave one",
        ),
        ("methods: {a: {num_train: 0}}", "methods.a.num_train=0 is too small; set it to 1 or more"),
        ("methods: {a: {num_train: '8'}}", "methods.a.num_train='8' must be a whole number"),
        ("methods: {a: {learning_rates: [0]}}", "methods.a.learning_rates: 0 is no learning rate"),
        ("workers: two", "workers='two' must be a whole number; write it without quotes"),
        ("seeds: 3", "seeds=3 must be a list of whole numbers"),
        ("seeds: [0, 0]", "seeds=\\[0, 0\\] must name .* each value once"),
        ("training: null", "training=null must be `name: value` pairs"),
        ("training: {max_length: long}", "training.max_length='long' must be a whole number"),
        ("num_train: '8'", "num_train='8' must be a whole number"),
        ("learning_rates: [.nan]", "learning_rates: nan is no learning rate; set it above 0"),
        ("learning_rates: [1e-5, 0.00001]", "learning_rates=.* each value once"),
        ("learning_rates: [fast]", "learning_rates\\[0\\]='fast' must be a number"),
        ("tasks: piqa", "tasks='piqa' must be a list of texts"),
        ("samples: {piqa: many}", "samples.piqa='many' must be a whole number or a list of whole numbers"),
        ("output_dir: 2024", "output_dir=2024 must be text; write it in quotes"),
    ],
)
def test_values_of_another_type_are_named_by_their_key(tmp_path: Path, text: str, message: str) -> None:
    path = write(tmp_path, **{text.partition(":")[0]: ...})
    path.write_text(f"{path.read_text()}{text}\n")
    with pytest.raises(ValueError, match=message) as error:
        load_grid(path)
    assert str(error.value).startswith(f"config={path}: ") and "\n" not in str(error.value)


def test_rates_as_everybody_writes_them(tmp_path: Path) -> None:
    path = write(tmp_path, learning_rates=..., methods=...)
    path.write_text(
        f"{path.read_text()}learning_rates: [1e-5, 2E-4]\nmethods: {{a: {{learning_rates: [3e-5]}}, b: {{}}}}\n"
    )
    assert [run.name for run in load_grid(path).runs()[:3]] == [
        f"{name}_seed0" for name in ("a_lr3e-05", "b_lr1e-05", "b_lr0.0002")
    ]


def test_missing_and_broken_files(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="there is no such file"):
        load_grid(tmp_path / "none.yaml")
    broken = tmp_path / "broken.yaml"
    broken.write_text("methods: [", encoding="utf-8")
    with pytest.raises(ValueError, match="is not valid YAML"):
        load_grid(broken)
    broken.write_text("- a list", encoding="utf-8")
    with pytest.raises(ValueError, match="does not hold `name: value` pairs"):
        load_grid(broken)


def test_a_mirror_takes_the_place_of_the_hubs_settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the folder, as an option or in the environment; only what is a path is looked for in it."""
    monkeypatch.delenv("LOPT_HF_DATA_DIR", raising=False)
    mirror = {"train_dataset": "data/a.jsonl", "include_path": "tasks", "tasks": ["mine"], "heldout_split": "train"}
    path = write(tmp_path, mirror=mirror, heldout_split="test")
    hub = load_grid(path)
    assert (hub.train_dataset, hub.include_path, hub.tasks) == ("train.jsonl", None, ["piqa"])
    monkeypatch.setenv("LOPT_HF_DATA_DIR", str(tmp_path))
    for grid in (load_grid(path), load_grid(path, data_dir=tmp_path)):
        assert grid.train_dataset == str(tmp_path / "data/a.jsonl") and grid.include_path == str(tmp_path / "tasks")
        assert (grid.tasks, grid.heldout_dataset, grid.heldout_split) == (["mine"], "test.jsonl", "train")
    assert (
        load_grid(write(tmp_path)).train_dataset == "train.jsonl"
    )  # one without a mirror has no use for the variable


@pytest.mark.parametrize(
    ("changes", "folder", "message"),
    [
        ({}, ".", "data_dir='.': config=.* has no mirror, so leave it out, or add one."),
        ({"mirror": {}}, "nowhere", "data_dir='nowhere' is no folder"),
        ({"mirror": {"taks": []}}, ".", "unknown setting 'taks'"),
        ({"mirror": ["a"]}, ".", r"mirror=\['a'\] must be"),
    ],
)
def test_a_bad_mirror(tmp_path: Path, changes: dict[str, Any], folder: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_grid(write(tmp_path, **changes), data_dir=Path(folder))


def test_data_whose_answers_are_no_messages(tmp_path: Path) -> None:
    """Their loss could not be told apart from the prompt's by the chat template."""
    rows = [{"prompt": "What is 1 + 1? ", "completion": "2"}] * 4
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    data = str(tmp_path / "rows.jsonl")
    grid = Grid(**{**SETTINGS, "train_dataset": data, "heldout_dataset": data, "output_dir": str(tmp_path / "out")})
    with pytest.raises(ValueError, match="train_dataset=.*needs prompts and completions as messages.*give it those"):
        prepare_data(grid)


def test_what_has_stages_is_trained_in_a_pipeline() -> None:
    methods = {
        "local": {"num_stages": 2, "gradient": "local"},
        "reconstruction": {"num_stages": 2, "local_objective": "reconstruction"},
        "windows": {"num_stages": 2, "method": "mlaan"},
        "late": {"num_stages": 2},
        "one process": {"num_blocks": 2},
    }
    runs = {run.method: run for run in Grid(**{**SETTINGS, "methods": methods, "seeds": [0]}).runs()}
    assert {name: run.command for name, run in runs.items()} == {
        **dict.fromkeys(("local", "reconstruction", "windows", "late"), "pipeline"),
        "one process": "sft",
    }
    assert {name: run.family for name, run in runs.items()} == {
        **dict.fromkeys(("local", "reconstruction", "windows"), "local losses"),
        "late": "reach",
        "one process": "local losses",
    }
    assert runs["late"].command_line.startswith("lopt-hf pipeline ")


@pytest.mark.parametrize(
    ("options", "training", "message"),
    [
        (
            {"method": "e2e", "num_stages": 2},
            {},
            "methods.m: method='e2e' with num_stages=2, but a pipeline trains by",
        ),
        ({"method": "lisa"}, {"num_stages": 2}, "methods.m: method='lisa' with num_stages=2, but a pipeline trains"),
        ({"num_stages": "two"}, {}, "methods.m.num_stages='two'"),
        ({"num_blocks": 2, "gradient": "delayed"}, {}, "methods.m: gradient='delayed' is an argument of lopt-hf pip"),
    ],
)
def test_what_a_pipeline_cannot_train_is_said_at_once(
    options: dict[str, Any], training: dict[str, Any], message: str
) -> None:
    settings = {**SETTINGS, "methods": {"m": options}, "training": {**SETTINGS["training"], **training}}
    with pytest.raises(ValueError, match=re.escape(message)):
        Grid(**settings)
