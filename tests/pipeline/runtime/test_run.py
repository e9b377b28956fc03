"""Where a run cuts the model."""

import json
from types import SimpleNamespace

import pytest
import torch.distributed as dist
from datasets import Dataset
from trl import ModelConfig

from lopt_hf import PipelineConfig
from lopt_hf.pipeline.runtime.run import agreed_split, find_model, make_trainer
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


@pytest.mark.parametrize(("packing", "reports"), [(False, True), (True, True), (False, False)])
def test_one_process_tells_how_many_rows_are_left_out(tmp_path, monkeypatch, caplog, packing, reports):
    class Cutting:
        """In place of a trainer that leaves out what is too long."""

        def __init__(self, model, args, world, train_dataset):
            self.train_dataset = train_dataset.select([0, 2]).add_column("labels", [[1, 2]] * 2)

        @staticmethod
        def load_part(checkpoint, plan, args, **kwargs):
            return make_model()

    make_model().save_pretrained(tmp_path)
    monkeypatch.setattr("lopt_hf.pipeline.runtime.run.PipelineTrainer", Cutting)
    args = PipelineConfig(output_dir=str(tmp_path / "out"), bf16=False, max_length=64, packing=packing)
    world = SimpleNamespace(rank=1, stage=1, num_stages=2, reports=reports)
    model_args = ModelConfig(model_name_or_path=str(tmp_path))
    make_trainer(args, model_args, world, lambda: Dataset.from_dict({"text": ["a", "b", "c"]}))
    told = "max_length=64 cuts off the whole answer of 1 of 3 rows, which are left out" in caplog.text
    assert told == (reports and not packing)
