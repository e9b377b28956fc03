"""`lopt-hf image` as a user calls it."""

import json
import re
import shutil

import pytest
import torch
from datasets import ClassLabel
from transformers import AutoImageProcessor, AutoModelForImageClassification, ViTImageProcessor

from lopt_hf import RepLModel
from lopt_hf.data.images import class_names
from lopt_hf.scripts import image
from lopt_hf.scripts.image_models import make_image_model
from lopt_hf.scripts.settings import UsageExit
from lopt_hf.trainers.image import ImageTrainer
from tests.image.helpers import make_images, make_model
from tests.image.test_images import as_bytes, data_of


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("images")
    for name, number in (("train", 8), ("test", 4)):
        make_images(number, size=32).to_parquet(folder / f"{name}.parquet")
    return folder


def run(files, folder, *options):
    image.main(
        [
            *("--train_file", str(files / "train.parquet"), "--output_dir", str(folder), "--use_cpu", "true"),
            *("--max_steps", "2", "--per_device_train_batch_size", "4", "--report_to", "none", *options),
        ]
    )


@pytest.mark.parametrize(
    "options",
    [
        ["--method", "e2e"],
        ["--method", "freeze", "--architecture", "resnet20"],
        ["--method", "reach", "--task_reach", "[1,4]", "--num_blocks", "4"],
        ["--method", "local", "--architecture", "resnet20", "--image_size", "32", "--num_blocks", "4"],
        ["--method", "readout"],
        ["--method", "repl", "--operator", "removal"],
        ["--method", "mlaan", "--architecture", "resnet20", "--image_size", "32"],
    ],
    ids=lambda options: options[1],
)
def test_a_run_measures_accuracy_and_leaves_a_stock_model(files, options, tmp_path, capsys):
    run(files, tmp_path, "--eval_file", str(files / "test.parquet"), *options)
    assert " of 4 images)" in capsys.readouterr().out
    model = AutoModelForImageClassification.from_pretrained(tmp_path)
    assert model.config.num_labels == 4 and AutoImageProcessor.from_pretrained(tmp_path) is not None
    logs = json.loads((tmp_path / "trainer_state.json").read_text())["log_history"]
    assert any("eval_accuracy" in log for log in logs)


@pytest.mark.parametrize("method", ["e2e", "local"])
def test_the_card_of_a_pushed_model(method, files, tmp_path, monkeypatch):
    def push(self, commit_message=None, blocking=True, token=None, revision=None, **facts):
        self.create_model_card(**facts)  # as the parent, before it uploads

    monkeypatch.setattr(ImageTrainer, "push_to_hub", push)
    monkeypatch.setattr(ImageTrainer, "init_hf_repo", lambda self, *_: setattr(self, "hub_model_id", "me/images"))
    monkeypatch.setattr(ImageTrainer, "_push_from_checkpoint", lambda self, folder: None)
    run(files, tmp_path, "--method", method, "--push_to_hub", "true")
    assert "image-classification" in (tmp_path / "README.md").read_text()


def test_other_classes_in_the_images_to_evaluate_on_are_refused(files, tmp_path, capsys):
    other = make_images(4, size=32)
    names = other.features["label"].names
    other = other.cast_column("label", ClassLabel(names=[names[0], "another", *names[2:]]))
    other.to_parquet(tmp_path / "test.parquet")
    with pytest.raises(UsageExit):
        run(files, tmp_path / "out", "--eval_file", str(tmp_path / "test.parquet"))
    assert "label 1 is 'another' here and " in capsys.readouterr().err


def test_a_checkpoint_gets_a_classifier_for_other_classes(files, tmp_path, caplog):
    run(files, tmp_path / "one", "--method", "e2e")
    run(files, tmp_path / "two", "--method", "mlaan", "--model_name_or_path", str(tmp_path / "one"))
    three = data_of([as_bytes(row["image"]) for row in make_images(6, size=32)], [0, 1, 2, 0, 1, 2])
    three.to_parquet(tmp_path / "train.parquet")
    caplog.clear()
    run(tmp_path, tmp_path / "three", "--method", "local", "--model_name_or_path", str(tmp_path / "one"))
    assert any("has 4 classes, and the data 3" in message for message in caplog.messages)
    assert AutoModelForImageClassification.from_pretrained(tmp_path / "three").config.num_labels == 3


def test_other_classes_than_the_checkpoints_are_told_and_not_learned_through(tmp_path, caplog):
    """Its weights are trained in fp32, whatever type they were saved in."""
    model, cells = make_model("vit").to(torch.bfloat16), [as_bytes(row["image"]) for row in make_images(4)]
    model.config.id2label = {0: "cat", 1: "dog", 2: "owl", 3: "elk"}
    model.save_pretrained(tmp_path / "named")
    ViTImageProcessor(size={"height": 16, "width": 16}).save_pretrained(tmp_path / "named")
    arguments = image.ImageModelArguments(model_name_or_path=str(tmp_path / "named"))
    made, _ = make_image_model(arguments, ["cat", "dog", "owl", "elk"], keeps_classifier=True)
    assert made.dtype == torch.float32 and caplog.messages == []
    named = data_of(cells, [0, 1, 2, 3]).cast_column("label", ClassLabel(names=["cat", "owl", "dog", "elk"]))
    named.to_parquet(tmp_path / "train.parquet")
    message = "has other classes than the data (label 1 is 'dog' there and 'owl' in the data)"
    run(tmp_path, tmp_path / "local", "--method", "local", "--model_name_or_path", str(tmp_path / "named"))
    assert any(message in line and "takes their names" in line for line in caplog.messages)
    for options in (["--method", "readout"], ["--method", "mlaan", "--readout", "frozen"]):
        with pytest.raises(UsageExit, match=re.escape(message)):
            run(tmp_path, tmp_path / "readout", *options, "--model_name_or_path", str(tmp_path / "named"))


@pytest.mark.parametrize("is_without", [False, True])
def test_a_new_classifier_is_not_learned_through_as_it_is(is_without, files, tmp_path, capsys, caplog):
    """A checkpoint has other classes by number, or none; where the classifier trains, one line tells."""
    model = make_model("vit", num_labels=2 if is_without else 3)
    (model.vit if is_without else model).save_pretrained(tmp_path / "model")
    ViTImageProcessor(size={"height": 16, "width": 16}).save_pretrained(tmp_path / "model")
    message = "has no classifier" if is_without else "has 3 classes, and the data 4"
    given = ["--model_name_or_path", str(tmp_path / "model")]
    for options in (["--method", "readout"], ["--method", "mlaan", "--readout", "frozen"]):
        with pytest.raises(UsageExit):
            run(files, tmp_path / "out", *options, *given)
        assert f"{message}, and a classifier from random weights would stay as it is" in capsys.readouterr().err
    run(files, tmp_path / "out", "--method", "local", *given)
    assert any(f"{message}: the classifier starts from random weights" in line for line in caplog.messages)


def test_one_file_as_data_set_has_nothing_to_measure_on(files, tmp_path, capsys):
    arguments = ["--dataset_name", str(files / "train.parquet"), "--output_dir", str(tmp_path), "--use_cpu", "true"]
    image.main([*arguments, "--max_steps", "1", "--per_device_train_batch_size", "4", "--report_to", "none"])
    assert "Accuracy" not in capsys.readouterr().out and (tmp_path / "model.safetensors").is_file()


def test_a_checkpoint_keeps_the_names_of_its_classes_where_the_data_have_none(tmp_path):
    """Numbers as labels, as many as the checkpoint has classes; names in the data do win."""
    images = make_images(4, size=16)
    model, names = make_model("vit"), {0: "cat", 1: "dog", 2: "owl", 3: "elk"}
    model.config.id2label, model.config.label2id = names, {name: number for number, name in names.items()}
    model.save_pretrained(tmp_path / "named")
    ViTImageProcessor(size={"height": 16, "width": 16}).save_pretrained(tmp_path / "named")
    cells = [as_bytes(row["image"]) for row in images]
    numbered = data_of(cells, [0, 1, 2, 3])
    arguments = image.ImageModelArguments(model_name_or_path=str(tmp_path / "named"))
    for data, expected in (
        (numbered, names),
        (numbered.cast_column("label", ClassLabel(names=["0", "1", "2", "3"])), names),
        (numbered.cast_column("label", ClassLabel(names=list("abcd"))), dict(enumerate("abcd"))),
    ):
        made, _ = make_image_model(arguments, class_names(data, "label"))
        assert made.config.id2label == expected and made.config.label2id == {n: i for i, n in expected.items()}
        assert torch.equal(made.classifier.weight, model.classifier.weight)


def test_replaced_layers_train_resume_and_fold(files, tmp_path):
    options = ["--method", "repl", "--save_strategy", "steps", "--save_steps", "1", "--replace_every", "3"]
    run(files, tmp_path, *options)
    model = RepLModel.from_pretrained(tmp_path)
    assert model.config.repl["removed"] == [2, 5] and model.config.num_hidden_layers == 6
    shutil.rmtree(tmp_path / "checkpoint-2")
    run(files, tmp_path, *options, "--resume_from_checkpoint", "true")
    again = RepLModel.from_pretrained(tmp_path)
    for (name, one), other in zip(model.state_dict().items(), again.state_dict().values(), strict=True):
        assert torch.equal(one, other), name
    stock_run = tmp_path / "removal"
    run(files, stock_run, "--method", "repl", "--operator", "removal", "--replace_every", "3")
    removed = AutoModelForImageClassification.from_pretrained(stock_run)
    assert removed.config.num_hidden_layers == 6 and not isinstance(removed, RepLModel)
    # The surrogates add coefficients only
    assert 0 < model.num_parameters() - removed.num_parameters() < 100


def test_replaced_blocks_of_a_resnet_train_resume_and_fold(files, tmp_path):
    options = ["--method", "repl", "--architecture", "resnet20", "--image_size", "32"]
    saving = ["--save_strategy", "steps", "--save_steps", "1"]
    run(files, tmp_path, "--eval_file", str(files / "test.parquet"), *options, *saving)
    model = RepLModel.from_pretrained(tmp_path)
    assert model.config.repl["removed"] == [1, 4, 7] and model.config.depths == [2, 2, 2]
    start = torch.full((2, 16), 0.5)
    assert not torch.equal(model.surrogates[1].coefficients, start)
    assert torch.allclose(model.surrogates[1].coefficients, start, atol=0.1)
    shutil.rmtree(tmp_path / "checkpoint-2")
    run(files, tmp_path, *options, *saving, "--resume_from_checkpoint", "true")
    again = RepLModel.from_pretrained(tmp_path)
    for (name, one), other in zip(model.state_dict().items(), again.state_dict().values(), strict=True):
        assert torch.equal(one, other), name
    run(files, tmp_path / "removal", *options, "--operator", "removal")
    removed = AutoModelForImageClassification.from_pretrained(tmp_path / "removal")
    assert removed.config.depths == [2, 2, 2] and not isinstance(removed, RepLModel)
    assert model.num_parameters() - removed.num_parameters() == 2 * (16 + 32 + 64)


@pytest.mark.parametrize(
    "options, message",
    [
        (
            ["--method", "repl", "--architecture", "resnet20", "--operator", "proj"],
            "operator='proj' is made of a transformer's layers, which model=ResNetForImageClassification does",
        ),
        (["--method", "repl", "--operator", "conv"], "operator='conv' is made of residual blocks of convolutions"),
        (
            ["--method", "repl", "--architecture", "resnet20", "--replace_every", "4"],
            "replace_every=4 chooses none of the blocks of stages of 3, 3, 3, whose first and last are kept; use at",
        ),
        (["--method", "repl", "--replace_every", "9"], "replace_every=9 chooses none of 8 layers"),
        (["--method", "local", "--operator", "proj"], "operator='proj' does nothing with method='local'"),
        (["--method", "freeze", "--task_reach", "2"], "task_reach=[2] trains early blocks"),
        (["--model_revision", "v2"], "model_revision='v2' does nothing without model_name_or_path"),
        (
            ["--model_name_or_path", "model", "--architecture", "resnet20"],
            "architecture='resnet20' does nothing with model_name_or_path='model'",
        ),
        (["--method", "reach"], "task_reach=[1] is freezing the early blocks"),
        (
            ["--method", "readout", "--local_objective", "none"],
            "local_objective='none' is not that of method='readout'",
        ),
        (
            ["--method", "readout", "--local_objective", "classifier"],
            "local_objective='classifier' is not that of method='readout', 'readout'; leave one of them out",
        ),
        (["--local_objective", "none"], "local_objective='none' is not that of method='local'"),
        (["--label_column", "class"], "label_column='class' is none of the data's columns"),
        (["--num_blocks", "9"], "num_blocks=9 does not fit a model with 8"),
        (["--model_name_or_path", "/nowhere"], "model_name_or_path='/nowhere' cannot be loaded"),
        (["--eval_file", "nowhere.parquet"], "nowhere.parquet"),
        (
            ["--method", "e2e", "--per_device_train_batch_size", "0"],
            "per_device_train_batch_size=0 must be at least 1",
        ),
        (
            ["--method", "e2e", "--train_sampling_strategy", "group_by_length"],
            "train_sampling_strategy='group_by_length' goes by the rows' numbers of tokens",
        ),
        (["--train_sampling_strategy", "batch_rebalance"], "set it to 'random' or 'sequential'"),
        (["--method", "e2e", "--optim", "galore_adamw"], "optim='galore_adamw' cannot be used here"),
        (
            ["--architecture", "resnet20", "--image_size", "16", "--per_device_train_batch_size", "1"],
            "per_device_train_batch_size=1, of one image: a batch norm of ResNetForImageClassification would",
        ),
        *[
            (
                ["--method", method, "--architecture", "resnet20", f"--{name}", "true"],
                f"activation_checkpointing=True (gradient_checkpointing is its older name) is nothing that {model}For",
            )
            for method, name, model in (
                ("e2e", "gradient_checkpointing", "ResNet"),
                ("local", "activation_checkpointing", "ResNet"),
                ("repl", "activation_checkpointing", "RepLResNet"),
            )
        ],
    ],
)
def test_bad_input_is_one_line(files, options, message, tmp_path, capsys):
    with pytest.raises(SystemExit) as raised:
        run(files, tmp_path, *options)
    assert raised.value.code == 2 or isinstance(raised.value, UsageExit)
    assert message in str(raised.value) + capsys.readouterr().err


def test_the_best_model_is_chosen_by_what_is_measured(files, tmp_path, capsys):
    options = ["--method", "e2e", "--eval_file", str(files / "test.parquet"), "--eval_strategy", "steps"]
    options += ["--eval_steps", "1", "--save_steps", "1", "--load_best_model_at_end", "true"]
    for given, message in (
        (
            ["--metric_for_best_model", "f1"],
            "metric_for_best_model='f1' is not measured of a model; use loss, accuracy.",
        ),
        (["--prediction_loss_only", "true"], "prediction_loss_only=True leaves nothing to measure accuracy by;"),
    ):
        with pytest.raises(UsageExit):
            run(files, tmp_path / "refused", *options, *given)
        assert message in capsys.readouterr().err and not (tmp_path / "refused" / "checkpoint-1").exists()
    run(files, tmp_path / "accuracy", *options, "--metric_for_best_model", "eval_accuracy")


REPL = ["--method", "repl", "--operator"]


@pytest.mark.parametrize(
    "first, then, message",
    [
        ([*REPL, "head"], [*REPL, "head+mlp"], "repl.config.operator is 'head' there and 'head+mlp' in this run;"),
        (
            [*REPL, "removal"],
            [*REPL, "removal", "--replace_every", "5"],
            "replace_every is 4 there and 5 in this run;",
        ),
        (
            [*REPL, "linear", "--save_only_model", "true"],
            [*REPL, "removal"],
            "architecture is 'RepLViTForImageClassification' there and 'ViTForImageClassification' in this run;",
        ),
        ([*REPL, "removal"], ["--method", "e2e"], "num_hidden_layers is 7 there and 8 in this run;"),
        (["--method", "e2e"], ["--method", "e2e", "--image_size", "16"], "image_size is 32 there and 16 in this run;"),
        (
            ["--method", "local"],
            ["--method", "e2e"],
            "is a checkpoint of local learning, and this run is not;",
        ),
    ],
    ids=["operator", "removed layers", "surrogates", "layers", "images", "method"],
)
def test_a_checkpoint_of_another_model_is_refused(files, first, then, message, tmp_path, capsys):
    run(files, tmp_path, *first, "--save_steps", "1", "--save_strategy", "steps", "--max_steps", "1")
    with pytest.raises(UsageExit):
        run(files, tmp_path, *then, "--resume_from_checkpoint", "true")
    errors = [line for line in capsys.readouterr().err.splitlines() if "resume_from_checkpoint=" in line]
    assert len(errors) == 1 and message in errors[0]


def test_a_checkpoint_of_other_classes_is_refused(files, tmp_path, capsys):
    run(files, tmp_path / "out", "--method", "e2e", "--save_steps", "1", "--save_strategy", "steps")
    three = data_of([as_bytes(row["image"]) for row in make_images(6, size=32)], [0, 1, 2, 0, 1, 2])
    three.to_parquet(tmp_path / "train.parquet")
    with pytest.raises(UsageExit):
        run(tmp_path, tmp_path / "out", "--method", "e2e", "--resume_from_checkpoint", "true")
    assert "is of another model: num_labels is 4 there and 3 in this run;" in capsys.readouterr().err


def test_of_drawn_rows_the_files_classes_and_row_numbers_count(tmp_path, capsys):
    cells = [as_bytes(row["image"]) for row in make_images(12, size=32)]
    data_of(cells, [9, *range(9), 0, 1]).to_parquet(tmp_path / "train.parquet")
    run(tmp_path, tmp_path / "out", "--method", "e2e", "--dataset_max_samples", "2")
    assert AutoModelForImageClassification.from_pretrained(tmp_path / "out").config.num_labels == 10
    capsys.readouterr()
    for broken in (3, 7):
        rows = [b"no image" if number == broken else cell for number, cell in enumerate(cells, start=1)]
        data_of(rows, [0, 1, 2, 3] * 3).to_parquet(tmp_path / "train.parquet")
        with pytest.raises(SystemExit) as raised:
            run(tmp_path, tmp_path / "other", "--dataset_max_samples", "12")
        assert f"row {broken}: 'image' cannot be read" in str(raised.value) + capsys.readouterr().err


def test_a_broken_image_and_a_label_out_of_range_are_named_before_training(files, tmp_path, capsys):
    cells = [as_bytes(row["image"]) for row in make_images(4, size=32)]
    data_of([*cells[:3], cells[3][:80]], [0, 1, 2, 3]).to_parquet(tmp_path / "train.parquet")
    with pytest.raises(SystemExit) as raised:
        run(tmp_path, tmp_path / "out")
    where = f"train_file={tmp_path / 'train.parquet'}, row 4: 'image' cannot be read"
    assert where in str(raised.value) + capsys.readouterr().err
    data_of(cells, [0, 1, 4, 3]).to_parquet(tmp_path / "test.parquet")
    with pytest.raises(SystemExit) as raised:
        run(files, tmp_path / "out", "--eval_file", str(tmp_path / "test.parquet"))
    named = f"eval_file={tmp_path / 'test.parquet'}, row"
    assert f"{named} 3: 'label' is 4" in str(raised.value) + capsys.readouterr().err
    data_of([*cells[:1], cells[1][:80]], [0, 1]).to_parquet(tmp_path / "test.parquet")
    with pytest.raises(SystemExit) as raised:
        run(files, tmp_path / "out", "--eval_file", str(tmp_path / "test.parquet"))
    output = capsys.readouterr().err
    assert f"{named} 2: 'image' cannot be read" in str(raised.value) + output
    assert "checking images: 100%" in output and "8/8" in output  # of those to train on
