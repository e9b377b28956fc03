"""100 kills (SIGKILL) at random times: the same command then ends with the bits of a run that nobody has killed.

Each command is killed and run again, several times in one folder, until it is let end; then its weights or its report
are compared with those of an uninterrupted run. After each kill, nothing that it started goes on, and nobody holds a
lock. `LOPT_HF_KILLS` is how many there are in all (100), `LOPT_HF_KILL_SEED` from what their times follow (0).
"""

import json
import os
import random
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
import yaml
from filelock import FileLock
from safetensors.torch import load_file

from tests import kill_worker
from tests.distributed import pipeline_processes
from tests.retention.small_tasks import write_tasks
from tests.tiny import make_dataset, make_model, make_pairs, make_tokenizer

pytestmark = pytest.mark.slow

KILLS = int(os.environ.get("LOPT_HF_KILLS", "100"))
SEED = int(os.environ.get("LOPT_HF_KILL_SEED", "0"))
SHARES = {"sft": 24, "mlaan": 20, "dpo": 20, "pipeline": 16, "compare": 8, "retention": 12}  # of a hundred
KILLS_IN_A_ROW = 4  # in one folder, before the run is let end
TIMEOUT = 600.0
START_TIMEOUT = 60.0  # of a pipeline's stages

Result = dict[str, Any]


@dataclass(frozen=True)
class Command:
    """How a command is run in a folder, and what it makes there."""

    arguments: Callable[[Path], list[str]]
    result: Callable[[Path], Result]


def training(command: str, inputs: Path, data: str, **settings: object) -> Command:
    def arguments(folder: Path) -> list[str]:
        values = {
            "model_name_or_path": inputs / "model",
            "dataset_name": inputs / data,
            "output_dir": folder / "out",
            "resume_from_checkpoint": "auto",
            **pipeline_processes.SETTINGS,
            "num_blocks": 2,
            "save_steps": 1,
            "use_cpu": True,
            "dtype": "float32",
            "disable_tqdm": True,
            **settings,
        }
        return [command, *(text for name, value in values.items() for text in (f"--{name}", str(value)))]

    return Command(arguments, lambda folder: weights(folder / "out"))


def weights(folder: Path) -> Result:
    files = sorted(folder.glob("*.safetensors"))
    assert files, f"no weights in {folder}"
    return {name: tensor for file in files for name, tensor in load_file(file).items()}


def retention(inputs: Path) -> Command:
    def arguments(folder: Path) -> list[str]:
        values = {
            "--baseline": inputs / "model",
            "--model": f"tuned={inputs / 'tuned'}",
            "--tasks": "tiny_sums,tiny_text",
            "--include-path": inputs / "tasks",
            "--output-dir": folder / "out",
            "--cache-dir": folder / "cache",
        }
        return ["retention", *(str(part) for pair in values.items() for part in pair)]

    return Command(arguments, lambda folder: report(folder / "out"))


def report(folder: Path) -> Result:
    content = json.loads((folder / "report.json").read_text())
    content.pop("settings")  # the folder's name is in them
    return content


def comparison(inputs: Path) -> Command:
    grid = {
        "model": str(inputs / "model"),
        "train_dataset": str(inputs / "questions.json"),
        "heldout_dataset": str(inputs / "questions.json"),
        "methods": {"end-to-end": {"method": "e2e"}, "LoPT": {"num_blocks": 2}},
        "learning_rates": [0.01],
        "seeds": [0],
        "num_train": 8,
        "num_heldout": 4,
        "training": {
            "max_length": 64,
            "per_device_train_batch_size": 4,
            "bf16": False,
            "use_cpu": True,
            "activation_checkpointing": False,
            "save_strategy": "no",
            "report_to": "none",
            "dtype": "float32",
        },
        "tasks": ["tiny_sums"],
        "include_path": str(inputs / "tasks"),
        "output_dir": "replaced",
    }
    (inputs / "grid.yaml").write_text(yaml.safe_dump(grid, sort_keys=False))

    def result(folder: Path) -> Result:
        runs = sorted((folder / "out" / "runs").iterdir())
        found = {f"{run.name}/{name}": value for run in runs for name, value in weights(run / "model").items()}
        return {**found, **report(folder / "out")}

    return Command(
        lambda folder: ["compare", "--config", str(inputs / "grid.yaml"), "--output-dir", str(folder / "out")], result
    )


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("inputs")
    pipeline_processes.write_inputs(folder)
    make_dataset().rename_columns({"prompt": "question", "completion": "answer"}).to_json(folder / "questions.json")
    make_pairs().to_json(folder / "pairs.json")
    make_model(seed=1).save_pretrained(folder / "tuned")
    make_tokenizer().save_pretrained(folder / "tuned")
    write_tasks(folder / "tasks")
    return folder


COMMANDS: dict[str, Callable[[Path], Command]] = {
    "sft": lambda inputs: training("sft", inputs, "data.json"),
    "mlaan": lambda inputs: training("mlaan", inputs, "data.json", window=1),
    "dpo": lambda inputs: training("dpo", inputs, "pairs.json"),
    "compare": comparison,
    "retention": retention,
}


def end_of(process: Any) -> int:
    process.join(TIMEOUT)
    return -999 if process.exitcode is None else process.exitcode


def descendants(pid: int) -> list[psutil.Process]:
    try:
        return psutil.Process(pid).children(recursive=True)
    except psutil.NoSuchProcess:
        return []


def assert_nothing_is_left(started: Sequence[psutil.Process], folder: Path) -> None:
    """No process of a killed command runs on, and no lock of its is held."""
    _, alive = psutil.wait_procs(started, timeout=60)
    assert not [process for process in alive if process.status() != psutil.STATUS_ZOMBIE], "an orphan runs on"
    for path in folder.rglob("*.lock"):
        lock = FileLock(path)
        lock.acquire(timeout=0)
        lock.release()


def assert_same(found: Any, expected: Any, place: str = "") -> None:
    if isinstance(expected, torch.Tensor):
        assert torch.equal(found, expected), place
    elif isinstance(expected, dict):
        assert found.keys() == expected.keys(), place
        for name in expected:
            assert_same(found[name], expected[name], f"{place}/{name}")
    else:
        assert found == expected, place


def tell(name: str, kills: int, runs: int, since: float) -> None:
    print(f"\n{name}: {kills} kills, {runs} runs to the end, {time.monotonic() - since:.0f} s", file=sys.__stderr__)


def share(name: str) -> int:
    return max(1, round(KILLS * SHARES[name] / 100))


@pytest.mark.parametrize("name", COMMANDS)
def test_a_killed_command_run_again_ends_with_the_same_bits(name: str, inputs: Path, tmp_path: Path) -> None:
    kill_worker.warm_up()
    command, began = COMMANDS[name](inputs), time.monotonic()
    times = random.Random(f"{SEED} {name}")
    (tmp_path / "whole").mkdir()
    whole = kill_worker.start(command.arguments(tmp_path / "whole"), tmp_path / "whole.log")
    assert end_of(whole) == 0, (tmp_path / "whole.log").read_text()[-3000:]
    duration, expected = time.monotonic() - began, command.result(tmp_path / "whole")

    left, folders = share(name), 0
    while left:
        folder, log = tmp_path / f"killed-{folders}", tmp_path / f"killed-{folders}.log"
        folder.mkdir()
        folders += 1
        for _ in range(min(KILLS_IN_A_ROW, left)):
            process, since = kill_worker.start(command.arguments(folder), log), time.monotonic()
            process.join(times.uniform(0.0, duration))
            if process.exitcode is not None:  # it was done before
                duration = min(duration, time.monotonic() - since)
                assert process.exitcode == 0, log.read_text()[-3000:]
                break
            started = descendants(process.pid)
            process.kill()
            process.join()
            left -= 1
            assert_nothing_is_left(started, folder)
        last = kill_worker.start(command.arguments(folder), log)
        assert end_of(last) == 0, log.read_text()[-3000:]
        assert_same(command.result(folder), expected)
    tell(name, share(name), folders, began)


def test_a_killed_pipeline_run_again_ends_with_the_same_bits(inputs: Path, tmp_path: Path) -> None:
    """One stage is killed, or all at once; the other stages have to end by themselves."""
    kill_worker.warm_up()
    began, ranks = time.monotonic(), 3
    times = random.Random(f"{SEED} pipeline")

    def launch(folder: Path) -> pipeline_processes.Processes:
        settings = {"save_steps": 1, "resume_from_checkpoint": "auto", "start_timeout": START_TIMEOUT}
        command = pipeline_processes.arguments(inputs, folder / "out", **settings)
        return pipeline_processes.Processes([command] * ranks, folder / "logs")

    processes = launch(tmp_path / "whole")
    assert processes.wait(TIMEOUT) == [0] * ranks, [processes.output(rank)[-2000:] for rank in range(ranks)]
    duration, expected = time.monotonic() - began, weights(tmp_path / "whole" / "out")

    left, folders = share("pipeline"), 0
    while left:
        folder = tmp_path / f"killed-{folders}"
        folders += 1
        for _ in range(min(KILLS_IN_A_ROW, left)):
            processes = launch(folder)
            time.sleep(times.uniform(0.0, duration))
            victims = range(ranks) if times.random() < 0.5 else [times.randrange(ranks)]
            killed = [processes.kill(rank) for rank in victims]
            codes = processes.wait(4 * START_TIMEOUT)  # who was killed as it started is waited for until then
            assert None not in codes, "an orphan runs on"
            assert_nothing_is_left([], folder)
            if not any(killed):
                break
            left -= 1
        processes = launch(folder)
        assert processes.wait(TIMEOUT) == [0] * ranks, [processes.output(rank)[-2000:] for rank in range(ranks)]
        assert_same(weights(folder / "out"), expected)
    tell("pipeline", share("pipeline"), folders, began)
