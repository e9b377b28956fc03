"""Where a run cuts the model."""

import json
from types import SimpleNamespace

import pytest
import torch.distributed as dist
from trl import ModelConfig

from lopt_hf import PipelineConfig
from lopt_hf.pipeline.runtime import run


def split_of(output_dir, num_stages):
    args = PipelineConfig(
        output_dir=str(output_dir), num_stages=num_stages, split="auto", resume_from_checkpoint="auto"
    )
    return run._measured_split("model", args, ModelConfig(), SimpleNamespace(rank=0, store=dist.HashStore()))


def test_a_run_that_goes_on_is_cut_as_its_checkpoint(tmp_path, monkeypatch):
    """Measured anew the cut could come out otherwise, and the checkpoint would be refused."""

    def measure(*args, **kwargs):
        raise InterruptedError("measured")

    monkeypatch.setattr(run, "measure_costs", measure)
    with pytest.raises(InterruptedError):
        split_of(tmp_path, 2)
    (tmp_path / "checkpoint-2").mkdir()
    (tmp_path / "checkpoint-2/pipeline.json").write_text(json.dumps({"split_at": [3], "num_layers": 4}))
    assert split_of(tmp_path, 2) == [3]
    with pytest.raises(InterruptedError):  # of other blocks
        split_of(tmp_path, 3)
