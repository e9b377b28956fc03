"""`lopt-hf sft` on data with images."""

import json

import pytest
import torch
from transformers import AutoModelForImageTextToText

from lopt_hf import cli
from tests.tiny import make_model, make_tokenizer
from tests.tiny_vision import make_processor, make_vision_dataset, make_vision_model

OPTIONS = "--per_device_train_batch_size 4 --max_steps 1 --use_cpu --bf16 false --report_to none --learning_rate 1e-3"


def arguments(folder, model, processor):
    model.save_pretrained(folder / "model")
    processor.save_pretrained(folder / "model")
    rows = make_vision_dataset([1, 0, 2, 1])
    rows = rows.map(
        lambda row: {"messages": row["prompt"] + row["completion"]}, remove_columns=["prompt", "completion"]
    )
    rows.to_parquet(folder / "rows.parquet")
    given = {"model_name_or_path": "model", "dataset_name": "rows.parquet", "output_dir": "out"}
    return [*OPTIONS.split(), *(word for name, value in given.items() for word in (f"--{name}", str(folder / value)))]


def test_images_of_a_file_are_trained_on(tmp_path):
    cli.main(
        ["sft", *arguments(tmp_path, make_vision_model("llava"), make_processor("llava")), "--train_vision", "true"]
    )
    trained = AutoModelForImageTextToText.from_pretrained(tmp_path / "out")
    projector = "model.multi_modal_projector.linear_1.weight"
    before = make_vision_model("llava").get_parameter(projector)
    assert not torch.equal(trained.get_parameter(projector), before)  # it was given an image
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["architectures"] == ["LlavaForConditionalGeneration"]


def test_images_for_a_model_of_text_end_the_command_in_one_line(tmp_path):
    with pytest.raises(SystemExit) as end:
        cli.main(["sft", *arguments(tmp_path, make_model(), make_tokenizer())])
    assert "'image' or 'images'" in str(end.value) and "\n" not in str(end.value)
