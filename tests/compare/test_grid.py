"""The settings of a comparison: what runs they make, and what is wrong with bad ones."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from lopt_hf.compare.grid import Grid, GridRun, load_grid

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
    run = GridRun("a method", 1e-4, 0, {"method": method, "max_length": 64})
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
        ({"training": {"max_length": 8, "output_dir": "x"}}, "training.output_dir is set by the grid"),
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
