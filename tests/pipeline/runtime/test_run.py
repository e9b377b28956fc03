"""Where a run cuts the model."""

import json
from types import SimpleNamespace

import pytest
import torch.distributed as dist

from lopt_hf import PipelineConfig
from lopt_hf.pipeline.runtime.run import agreed_split


def measure():
    raise InterruptedError("measured")


def split_of(output_dir, num_stages):
    args = PipelineConfig(
        output_dir=str(output_dir), num_stages=num_stages, split="auto", resume_from_checkpoint="auto"
    )
    return agreed_split(args, SimpleNamespace(rank=0, store=dist.HashStore()), measure)


def test_a_run_that_goes_on_is_cut_as_its_checkpoint(tmp_path):
    """Measured anew the cut could come out otherwise, and the checkpoint would be refused."""
    with pytest.raises(InterruptedError):
        split_of(tmp_path, 2)
    (tmp_path / "checkpoint-2").mkdir()
    (tmp_path / "checkpoint-2/pipeline.json").write_text(json.dumps({"split_at": [3], "num_layers": 4}))
    assert split_of(tmp_path, 2) == [3]
    with pytest.raises(InterruptedError):  # of other blocks
        split_of(tmp_path, 3)
