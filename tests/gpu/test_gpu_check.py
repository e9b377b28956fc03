"""The GPU check's parts that compare, on a real GPU: `pytest -m gpu`."""

import pytest
import torch

from lopt_hf.bench.gpu.check import run_gpu_check
from lopt_hf.bench.gpu.settings import GpuCheckSettings
from lopt_hf.scripts.bench import _load_config, _measure_device, _Plan

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("part", ["equality", "sharded", "generation", "options"])
def test_part(part, tmp_path):
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    settings = GpuCheckSettings(models=("Qwen/Qwen2.5-0.5B",), parts=(part,))
    results = run_gpu_check(settings, tmp_path, _load_config, _measure_device, _Plan)
    assert results.problems == []
    assert any(outcome.status == "done" for outcome in results.outcomes)
