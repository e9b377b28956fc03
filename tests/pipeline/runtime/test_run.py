"""Where a run cuts the model."""

import json
from types import SimpleNamespace

import pytest
import torch.distributed as dist
from trl import ModelConfig

from lopt_hf import PipelineConfig
from lopt_hf.pipeline.runtime.run import agreed_split, find_model
from tests.tiny import make_model


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


def test_options_of_the_config_count_before_the_launch(tmp_path):
    """Whoever trains fewer layers than the model has cuts those."""
    make_model().save_pretrained(tmp_path)
    args = PipelineConfig(output_dir=str(tmp_path / "out"), model_init_kwargs={"num_hidden_layers": 3})
    assert find_model(args, ModelConfig(model_name_or_path=str(tmp_path))) == (str(tmp_path), 3)
