"""`lopt-hf pipeline --task image` as a user calls it."""

import json
import re

import pytest
import torch
from transformers import AutoImageProcessor, AutoModelForImageClassification

from lopt_hf.pipeline.runtime.image.config import ImagePipelineConfig
from lopt_hf.scripts import image, pipeline
from lopt_hf.scripts.image_models import make_image_model
from tests.distributed.pipeline_processes import Processes
from tests.image.helpers import make_images
from tests.image.test_images import as_bytes, data_of

RANKS = 2


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("images")
    for name, number in (("train", 8), ("test", 4)):
        make_images(number, size=32).to_parquet(folder / f"{name}.parquet")
    return folder


def arguments(files, folder, *options):
    return [
        *("--train_file", str(files / "train.parquet"), "--output_dir", str(folder), "--use_cpu", "true"),
        *(
            "--max_steps",
            "2",
            "--per_device_train_batch_size",
            "4",
            "--report_to",
            "none",
            "--bf16",
            "false",
            *options,
        ),
    ]


def launch(logs, command):
    """The processes of a command, forked; returns what they printed."""
    processes = Processes([["--task", "image", *command]] * RANKS, logs)
    codes = processes.wait(120)
    outputs = [processes.output(rank) for rank in range(RANKS)]
    assert codes == [0] * RANKS, "\n".join(output[-2000:] for output in outputs)
    return outputs


@pytest.mark.parametrize("architecture", ["vit", "resnet20"])
def test_a_run_measures_accuracy_and_leaves_the_model_of_one_process(files, architecture, tmp_path):
    options = ["--eval_file", str(files / "test.parquet"), "--architecture", architecture, "--image_size", "32"]
    options += [
        "--method",
        "local",
        "--num_blocks",
        "2",
        "--save_strategy",
        "steps",
        "--save_steps",
        "1",
        "--logging_steps",
        "1",
        "--disable_tqdm",
        "true",
    ]
    outputs = launch(tmp_path / "logs", arguments(files, tmp_path / "two", *options))
    assert "stage 1: block 1" in outputs[0] and "with the classifier" in outputs[0]
    assert " of 4 images)" in outputs[-1] and " of 4 images)" not in outputs[0]
    logs = json.loads((tmp_path / "two" / "trainer_state.json").read_text())["log_history"]
    assert any("local_loss/block_0" in log for log in logs)
    (measured,) = [log for log in logs if "eval_accuracy" in log]
    assert measured is logs[-1] and (measured["step"], measured["epoch"]) == (2, 1.0)
    printed = next(line for line in outputs[-1].splitlines() if "eval_accuracy" in line)
    assert re.search(r"'epoch': '?1", printed), printed
    image.main(arguments(files, tmp_path / "one", *options))
    models = [AutoModelForImageClassification.from_pretrained(tmp_path / name) for name in ("one", "two")]
    for (name, one), two in zip(models[0].state_dict().items(), models[1].state_dict().values(), strict=True):
        assert torch.equal(one, two), name
    assert AutoImageProcessor.from_pretrained(tmp_path / "two").size == {"height": 32, "width": 32}
    checkpoint, exported = tmp_path / "two" / "checkpoint-2", tmp_path / "exported"
    pipeline.main(["export", "--checkpoint", str(checkpoint), "--output-dir", str(exported)])
    state = AutoModelForImageClassification.from_pretrained(exported).state_dict()
    assert all(torch.equal(state[name], value) for name, value in models[1].state_dict().items())
    assert AutoImageProcessor.from_pretrained(exported).size == {"height": 32, "width": 32}


@pytest.mark.parametrize(
    "options, message",
    [
        (["--method", "mlaan"], "method='mlaan' does not work here: its windows and moving averages"),
        (["--method", "e2e"], "method='e2e' does not work here"),
        (["--method", "repl"], "method='repl' does not work here"),
        (["--method", "lopt"], "invalid choice: 'lopt'"),
        (["--operator", "proj"], "unknown option on the command line: 'operator'"),
        (["--max_length", "64"], "unknown option on the command line: 'max_length'"),
        (["--num_stages", "9"], "num_blocks=9 does not fit a model with 8"),
        (
            ["--eval_strategy", "steps"],
            "eval_strategy='steps' is not supported in a pipeline",
        ),
        (["--method", "local", "--task_reach", "2"], "task_reach=[2] does not work with gradient='local'"),
        (
            ["--gradient", "delayed", "--task_reach", "[1,3]"],
            "task_reach=[1, 3]: 3 is not a number of blocks from 1 to num_blocks=2",
        ),
        (["--tied_embeddings", "freeze"], "tied_embeddings='freeze' does nothing for an image classifier"),
        (
            ["--gradient", "local", "--local_objective", "none"],
            "local_objective='none' leaves the early stages nothing to learn from",
        ),
        (["--method", "readout", "--architecture", "resnet20"], "local_objective='readout' does not work with model="),
        (
            ["--method", "readout", "--gradient", "delayed"],
            "method='readout' does nothing with gradient='delayed'",
        ),
        (["--method", "local", "--gradient", "delayed"], "method='local' does nothing with gradient='delayed'"),
        (
            ["--method", "readout", "--local-objective", "classifier"],
            "local_objective='classifier' is not that of method='readout', 'readout'; leave one of them out.",
        ),
        (["--local_objective=reconstruction"], "local_objective='reconstruction' is not that of method='local'"),
        (
            ["--gradient", "delayed", "--local_objective", "classifier"],
            "local_objective='classifier' does nothing with gradient='delayed'",
        ),
        (
            ["--gradient", "delayed", "--local_objective", "reconstruction"],
            "local_objective='reconstruction' does nothing with gradient='delayed'",
        ),
        (["--label_column", "class"], "label_column='class' is none of the data's columns"),
        (["--model_name_or_path", "/nowhere"], "model_name_or_path='/nowhere' cannot be loaded"),
        (["--eval_file", "nowhere.parquet"], "nowhere.parquet"),
        (["--resume_from_checkpoint", "/nowhere"], "there is no checkpoint at '/nowhere'"),
        (["--dataset_streaming", "true"], "dataset_streaming=True does not work with images"),
        (["--task", "images"], "invalid choice: 'images'"),
    ],
)
def test_bad_input_is_one_line(files, options, message, tmp_path, capsys):
    with pytest.raises(SystemExit) as raised:
        pipeline.main(["--task", "image", *arguments(files, tmp_path, *options)])
    said = str(raised.value) + capsys.readouterr().err
    assert raised.value.code == 2 or "lopt-hf pipeline: " in str(raised.value)
    assert message in said and "Traceback" not in said


@pytest.mark.parametrize("objective", ["reconstruction", "readout"])
def test_an_objective_is_not_dropped_for_the_tasks_late_gradient(objective, tmp_path):
    with pytest.raises(ValueError, match=f"local_objective='{objective}' does nothing with gradient='delayed'"):
        ImagePipelineConfig(str(tmp_path), gradient="delayed", local_objective=objective)


def test_the_recipe_of_a_vit_takes_a_checkpoint_or_another_architecture_in_its_place():
    for option, size in ((["--model_name_or_path", "checkpoint"], None), (["--architecture", "resnet20"], 64)):
        command = ["--config", "cifar10/pipeline/ppll_vit_2", *option]
        *_, model_args = pipeline.make_parser(task="image").parse_args_and_config(command)
        if size is not None:
            _, processor = make_image_model(model_args, ["a", "b"])
            assert processor.size == {"height": size, "width": size}


def test_a_broken_image_is_named_before_the_processes_start(files, tmp_path, capsys):
    cells = [as_bytes(row["image"]) for row in make_images(4, size=32)]
    data_of([*cells[:3], cells[3][:80]], [0, 1, 2, 3]).to_parquet(tmp_path / "train.parquet")
    with pytest.raises(SystemExit) as raised:
        pipeline.main(["--task", "image", *arguments(tmp_path, tmp_path / "out")])
    where = f"train_file={tmp_path / 'train.parquet'}, row 4: 'image' cannot be read"
    assert where in str(raised.value) + capsys.readouterr().err


def test_help_has_the_options_of_images_and_none_that_do_nothing(capsys):
    with pytest.raises(SystemExit) as ended:
        pipeline.main(["--task", "image", "--help"])
    text = capsys.readouterr().out
    assert not ended.value.code
    assert all(f"--{name} " in text for name in ("train_file", "eval_file", "architecture", "split", "augmentation"))
    idle = ("operator", "replace_every", "reach_recompute", "tied_embeddings", "train_vision", "max_length", "packing")
    assert not any(f"--{name} " in text for name in idle)
