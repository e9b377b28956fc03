"""The whole check: runs it, and keeps its JSON file and its table up to date as results come."""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from time import monotonic
from typing import Any

from lopt_hf.bench.gpu.checklist import make_parts, make_sizes
from lopt_hf.bench.gpu.parts import Outcome
from lopt_hf.bench.gpu.report import Results, to_json, to_markdown
from lopt_hf.bench.gpu.runner import run_parts
from lopt_hf.bench.gpu.settings import GpuCheckSettings
from lopt_hf.bench.gpu.workload import TrainingWorkload
from lopt_hf.bench.processes import one_gpu
from lopt_hf.common.files import write_text
from lopt_hf.common.settings import check_folder

__all__ = ["run_gpu_check"]

JSON_FILE, TABLE_FILE, LOG_FILE = "gpu_check.json", "gpu_check.md", "gpu_check.log"
_ASK = """
import json, torch
found = None
if torch.cuda.is_available():
    gpu = torch.cuda.get_device_properties(0)
    found = {"type": "cuda", "name": gpu.name, "memory": gpu.total_memory, "cuda": torch.version.cuda}
    found["capability"] = f"{gpu.major}.{gpu.minor}"
print(json.dumps(found))
"""
Config = Mapping[str, Any]
Run = Callable[[Path], dict[str, Any]]


def run_gpu_check(
    settings: GpuCheckSettings,
    folder: Path,
    load_config: Callable[[str], Config],
    measure_device: Run,
    predict: Callable[[str, TrainingWorkload, int], Run],
) -> Results:
    """Runs a check and writes `gpu_check.json`, `gpu_check.md` and what the processes printed to a folder.

    Args:
        settings: What to measure.
        folder: Where the files go; those of an earlier check are replaced.
        load_config: Finds a model's configuration by its name.
        measure_device: Measures the device's speed, as a case's `run`.
        predict: Makes a case's `run` that plans a model, given its name, what is trained, and the device's bytes.

    Returns:
        Everything that was measured.

    Raises:
        ValueError: If a model is unknown, or `folder` is a file.
    """
    check_folder("output_dir", folder)
    device = _device(settings)
    known = {name: load_config(name) for name in settings.models} if device["type"] == "cuda" else {}
    sizes = make_sizes(settings, device["type"], known)
    predictions = {name: predict(name, sizes.workload(name), device["memory"]) for name in sizes.models}
    parts = make_parts(settings, sizes, measure_device, predictions)
    results = Results(settings, device, parts)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / LOG_FILE).write_bytes(b"")
    start = monotonic()

    def report(outcome: Outcome) -> None:
        results.outcomes.append(outcome)
        results.seconds = monotonic() - start
        _write(folder, results)
        text = f"{outcome.part}: {outcome.case}: {outcome.status}, {outcome.seconds:.1f} s {outcome.reason}"
        print(text.rstrip(), file=sys.stderr, flush=True)

    run_parts(parts, settings.limit, folder / LOG_FILE, report)
    return results


def _device(settings: GpuCheckSettings) -> dict[str, Any]:
    """What is measured. A process of its own asks: whoever does may hold some of the GPU's memory from then on."""
    cpu = {"type": "cpu", "name": "CPU", "memory": 2**30}
    if settings.device == "cpu":
        return cpu
    asked = subprocess.run(
        [sys.executable, "-c", _ASK], env={**os.environ, **one_gpu()}, capture_output=True, text=True, check=True
    )
    found: dict[str, Any] | None = json.loads(asked.stdout)
    return cpu if found is None else found


def _write(folder: Path, results: Results) -> None:
    for name, text in ((JSON_FILE, to_json(results)), (TABLE_FILE, to_markdown(results))):
        write_text(folder / name, text + "\n")
