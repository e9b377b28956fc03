"""A small grid whose runs are trained in this process; makes lm-eval quick, as in `tests/retention`."""

import json
import subprocess
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml

from lopt_hf.compare import grid_training
from lopt_hf.scripts import peers, sft
from tests.retention.conftest import no_environment_report, own_tasks_of_lm_eval_are_read_once
from tests.retention.small_tasks import write_tasks
from tests.tiny import make_model, make_tokenizer

__all__ = ["no_environment_report", "own_tasks_of_lm_eval_are_read_once"]

COMMANDS = {"lopt_hf.scripts.sft": sft.main, "lopt_hf.scripts.peers": peers.main}


@pytest.fixture
def config(tmp_path: Path) -> Path:
    """Two methods, two seeds, of a tiny model on sums; one rate."""
    make_model().save_pretrained(tmp_path / "base")
    make_tokenizer().save_pretrained(tmp_path / "base")
    rows = [
        {"question": f"What is {i} + {5 * i % 9}?", "answer": f"{i + 5 * i % 9}." + " ok" * (i % 20)}
        for i in range(40)
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    settings = {
        "model": str(tmp_path / "base"),
        "train_dataset": str(tmp_path / "rows.jsonl"),
        "heldout_dataset": str(tmp_path / "rows.jsonl"),
        "methods": {"end-to-end": {"method": "e2e"}, "LoPT": {"num_blocks": 2}},
        "learning_rates": [0.01],
        "seeds": [0, 1],
        "num_train": 8,
        "num_heldout": 6,
        "training": {
            "max_length": 50,
            "per_device_train_batch_size": 4,
            "bf16": False,
            "use_cpu": True,
            "activation_checkpointing": False,
            "save_strategy": "no",
            "report_to": "none",
            "dtype": "float32",
        },
        "tasks": ["tiny_sums", "tiny_text"],
        "include_path": str(write_tasks(tmp_path / "tasks")),
        "contrasts": [["LoPT", "end-to-end"]],
        "output_dir": str(tmp_path / "out"),
    }
    path = tmp_path / "grid.yaml"
    path.write_text(yaml.safe_dump(settings, sort_keys=False), encoding="utf-8")
    return path


@pytest.fixture
def trained_here(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Runs the training commands in this process, which saves the start of a new one; returns what was trained."""
    trained: list[str] = []

    def run(command: list[str], **_: Any) -> subprocess.CompletedProcess:
        trained.append(Path(command[-1]).parent.name)
        try:
            COMMANDS[command[2]](command[3:])
        except SystemExit as error:
            print(error)
            return subprocess.CompletedProcess(command, 1)
        return subprocess.CompletedProcess(command, 0)

    in_process = SimpleNamespace(run=run, DEVNULL=subprocess.DEVNULL, STDOUT=subprocess.STDOUT)
    monkeypatch.setattr(grid_training, "subprocess", in_process)
    return trained
