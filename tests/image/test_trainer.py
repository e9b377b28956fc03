"""Local learning of image classifiers beside the stock trainer and beside gradients by hand."""

import copy
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn import functional as F
from transformers import (
    AutoModelForImageClassification,
    BeitConfig,
    Data2VecVisionConfig,
    TrainingArguments,
    ViTImageProcessor,
)

from lopt_hf import LocalImageConfig, LocalImageTrainer, MLAANImageConfig
from lopt_hf.local.methods.image.calls import ImageCalls
from lopt_hf.local.stacks import find_stack
from lopt_hf.meters.saved_bytes import SavedBytes
from lopt_hf.trainers.checkpoint import check_same_model, load_weights
from lopt_hf.trainers.image import ImageTrainer, ImageTrainingArguments, smallest_batch
from tests.image.helpers import FAMILIES, LAYERS, TOKENS, make_images, make_model, options

CLASSIFIERS = ("classifier", "readout", "reconstruction")


def stock_run(family, folder, frozen_layers=0):
    model = make_model(family)
    if frozen_layers:
        model.requires_grad_(False)
        tail = [module for name, module in model.base_model.named_children() if name == "layernorm"]
        for module in [*find_stack(model).layers[frozen_layers:], *tail, model.classifier]:
            module.requires_grad_(True)
    ImageTrainer(model, ImageTrainingArguments(**options(folder)), train_dataset=make_images()).train()
    return model


def local_run(family, folder, config_class=LocalImageConfig, **settings):
    trainer = LocalImageTrainer(
        make_model(family), config_class(**options(folder, **settings)), train_dataset=make_images()
    )
    trainer.train()
    return trainer


def assert_equal_states(one, other):
    for (name, tensor), expected in zip(one.state_dict().items(), other.state_dict().values(), strict=True):
        assert torch.equal(tensor, expected), name


@pytest.mark.parametrize("family", FAMILIES)
def test_layers_are_found(family):
    layers = find_stack(make_model(family)).layers
    assert len(layers) == LAYERS


@pytest.mark.parametrize("recompute", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_reach_of_all_blocks_is_the_stock_trainer(family, recompute, tmp_path):
    """Bit for bit, the running statistics of batch norms too, which a second run of a block must not move again."""
    settings = {"task_reach": 3, "local_objective": "none", "clip_scope": "global", "reach_recompute": recompute}
    if family == "swin" and recompute:  # a gradient between two blocks is kept in another order of memory: rounding
        settings |= {"optim": "sgd", "max_steps": 1}
        whole = local_run(family, tmp_path / "whole", num_blocks=3, **settings | {"reach_recompute": False}).model
        model = local_run(family, tmp_path / "local", num_blocks=3, **settings).model
        for one, other in zip(model.parameters(), whole.parameters(), strict=True):
            torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-8)
        return
    trainer = local_run(family, tmp_path / "local", num_blocks=3, **settings)
    assert_equal_states(trainer.model, stock_run(family, tmp_path / "stock"))


@pytest.mark.parametrize("settings", [{}, {"local_objective": "readout"}])
def test_a_task_loss_of_the_users_own(settings, tmp_path):
    """The trainer then takes the labels out of the batch, which the early blocks learn from too."""

    def loss(outputs, labels, num_items_in_batch=None):
        return F.cross_entropy(outputs.logits, labels, reduction="sum") / num_items_in_batch

    args = LocalImageConfig(**options(tmp_path, **settings))
    ours = LocalImageTrainer(make_model("vit"), args, train_dataset=make_images(), compute_loss_func=loss)
    ours.train()
    assert_equal_states(ours.model, local_run("vit", tmp_path / "stock", **settings).model)


@pytest.mark.parametrize("trainer_class", [ImageTrainer, LocalImageTrainer])
def test_plain_training_arguments_leave_the_images_where_they_are(trainer_class, tmp_path):
    trainer = trainer_class(make_model("vit"), TrainingArguments(**options(tmp_path)), train_dataset=make_images())
    trainer.train()
    assert trainer.args.augmentation == "crop-flip"
    with pytest.raises(ValueError, match="remove_unused_columns=True would remove the images"):
        args = LocalImageConfig(**options(tmp_path, remove_unused_columns=True))
        trainer_class(make_model("vit"), args, train_dataset=make_images())


def test_one_process_with_several_gpus_is_refused(tmp_path):
    args = LocalImageConfig(**options(tmp_path))
    args._n_gpu = 2
    with pytest.raises(ValueError, match="One process sees 2 GPUs.*accelerate launch"):
        LocalImageTrainer(make_model("vit"), args, train_dataset=make_images())


@pytest.mark.parametrize("family", ["vit", "dinov2", "resnet"])
def test_reach_of_one_block_is_freezing(family, tmp_path):
    trainer = local_run(family, tmp_path / "local", num_blocks=2, local_objective="none")
    stock = stock_run(family, tmp_path / "stock", frozen_layers=3)
    assert_equal_states(trainer.model, stock)
    start = make_model(family)
    assert any(not torch.equal(a, b) for a, b in zip(stock.parameters(), start.parameters(), strict=True))


def cross_entropy(logits, labels):
    return F.cross_entropy(logits.float(), labels)


def micro_batch_gradients(trainer, batch):
    """Of one micro-batch, without a step: model's and heads' gradients by name."""
    learner = trainer.learner
    with learner.micro_batch():
        with learner.forward(batch, step=0):
            loss = learner.with_joint_loss(learner.base_model(**batch).loss)
        loss.backward()
        learner.after_backward()
    named = [*learner.base_model.named_parameters(), *learner.heads.named_parameters("heads")]
    return {name: p.grad for name, p in named if p.grad is not None}


def make_batch(trainer):
    torch.manual_seed(1)
    size = 16
    return {"pixel_values": torch.randn(3, 3, size, size), "labels": torch.tensor([0, 1, 3])}


def run_layers(layers, h):
    for layer in layers:
        h = run_layer(layer, h)
    return h


def run_layer(layer, h):
    """Swin's layers and patch mergings are told height and width of the grid that the tokens are on, of squares."""
    if not type(layer).__name__.startswith("Swin"):
        return layer(h)
    output = layer(h, (int(h.shape[1] ** 0.5), int(h.shape[1] ** 0.5)))
    return output[0] if isinstance(output, tuple) else output


@pytest.mark.parametrize("family", ["vit", "resnet"])
def test_local_gradients_are_those_by_hand(family, tmp_path):
    """Each block's are of its own classifier's loss on its own output, the last one's of the model's loss."""
    args = LocalImageConfig(**options(tmp_path, num_blocks=3))
    trainer = LocalImageTrainer(make_model(family), args, train_dataset=make_images())
    model, heads = copy.deepcopy(make_model(family)), copy.deepcopy(trainer.local_heads)
    batch = make_batch(trainer)
    got = micro_batch_gradients(trainer, batch)

    base, layers = model.base_model, find_stack(model).layers
    h = base.embeddings(batch["pixel_values"]) if family == "vit" else base.embedder(batch["pixel_values"])
    for index in range(2):
        h = run_layers(layers[2 * index : 2 * index + 2], h)
        cross_entropy(heads[str(index)](h), batch["labels"]).backward()
        h = h.detach()
    h = run_layers(layers[4:], h)
    pooled = base.layernorm(h)[:, 0] if family == "vit" else base.pooler(h)
    cross_entropy(model.classifier(pooled), batch["labels"]).backward()
    expected = {n: p.grad for n, p in [*model.named_parameters(), *heads.named_parameters("heads")]}
    assert got.keys() == {name for name, gradient in expected.items() if gradient is not None}
    for name, gradient in got.items():
        torch.testing.assert_close(gradient, expected[name], msg=name)


@pytest.mark.parametrize("leaps", [None, [0, 0]])
@pytest.mark.parametrize("family", ["vit", "resnet", "swin", "swinv2"])
def test_mlaan_gradients_are_those_by_hand(family, leaps, tmp_path):
    """Three blocks, windows of two: as the released code computes them, with detached inputs of each window.

    Without leaps too the two losses have a classifier each.
    """
    settings = {"num_blocks": 3, "auxiliary_checkpointing": False, "combine": "sum", "leap_layers": leaps}
    args = MLAANImageConfig(**options(tmp_path, **settings))
    trainer = LocalImageTrainer(make_model(family), args, train_dataset=make_images())
    model, heads = make_model(family), copy.deepcopy(trainer.local_heads)
    batch = make_batch(trainer)
    got = micro_batch_gradients(trainer, batch)

    base, layers = model.base_model, find_stack(model).layers
    blocks = [layers[:2], layers[2:4], layers[4:]]

    def embed():
        h = base.embedder(batch["pixel_values"]) if family == "resnet" else base.embeddings(batch["pixel_values"])
        return h[0] if family.startswith("swin") else h

    def leap(head, h):
        for index, name in enumerate(head.copies):
            own = run_layer(head.copies[name], h)
            h = own + run_layer(head.averages[name], h) if index == 0 else own
        return head.readout(h)

    def pool(h):
        if family.startswith("swin"):
            return base.layernorm(h).mean(dim=1)
        return base.layernorm(h)[:, 0] if family == "vit" else base.pooler(h)

    if (
        family.startswith("swin") and leaps is None
    ):  # layer 2, the patch merging, has to be leapt over from the first block
        assert {index: list(head.copies) for index, head in heads.items()} == {"0": ["2", "5"], "1": ["5"]}

    h0 = run_layers(blocks[0], embed())
    losses = 0.001 * cross_entropy(heads["0"].independent(h0), batch["labels"])
    losses = losses + 0.999 * cross_entropy(leap(heads["0"], h0), batch["labels"])
    losses = losses + 0.001 * cross_entropy(
        heads["1"].independent(run_layers(blocks[1], h0.detach())), batch["labels"]
    )
    losses = losses + 0.999 * cross_entropy(leap(heads["1"], run_layers(blocks[1], h0)), batch["labels"])
    h1 = run_layers(blocks[1], h0.detach())
    cut = h1.detach().requires_grad_()
    h2 = run_layers(blocks[2], cut)
    cross_entropy(model.classifier(pool(h2)), batch["labels"]).backward()
    losses = losses + (h1 * cut.grad * 0.999).sum()  # the last window reaches block 1, and not block 0
    losses.backward()
    expected = {n: p.grad for n, p in [*model.named_parameters(), *heads.named_parameters("heads")]}
    assert got.keys() == {name for name, gradient in expected.items() if gradient is not None}
    for name, gradient in got.items():
        torch.testing.assert_close(gradient, expected[name], msg=name)


@pytest.mark.parametrize(
    "config, arguments, bias, message",
    [
        (Data2VecVisionConfig, LocalImageConfig, "", "what follows its layers does not run by itself"),
        (BeitConfig, MLAANImageConfig, "shared_", "whose layers are told more than hidden states"),
    ],
)
def test_models_that_are_built_in_another_way_are_refused_in_one_line(config, arguments, bias, message, tmp_path):
    """By methods that would run a part of them alone; the task loss reaches their blocks as ever."""
    model = AutoModelForImageClassification.from_config(
        config(**TOKENS, num_hidden_layers=LAYERS, intermediate_size=32, **{f"use_{bias}relative_position_bias": True})
    )
    with pytest.raises(ValueError, match=message):
        LocalImageTrainer(model, arguments(**options(tmp_path)), train_dataset=make_images())
    # A bias that layers share has a gradient besides the hidden states', which a second run of a block would lose
    reach = {"local_objective": "none", "task_reach": 2, "reach_recompute": not bias}
    LocalImageTrainer(model, LocalImageConfig(**options(tmp_path, **reach)), train_dataset=make_images()).train()


def test_leaps_of_layers_that_are_told_the_size_of_the_image(tmp_path):
    """BEiT's, for which it is not the config's; the copies learn, and the averages move."""
    config = BeitConfig(**TOKENS, num_hidden_layers=LAYERS, intermediate_size=32, use_relative_position_bias=True)
    model = AutoModelForImageClassification.from_config(config).train()
    trainer = LocalImageTrainer(
        model, MLAANImageConfig(**options(tmp_path, num_blocks=3)), train_dataset=make_images()
    )
    start = copy.deepcopy(trainer.local_heads).state_dict()
    trainer.train()
    moved = {name for name, value in trainer.local_heads.state_dict().items() if not torch.equal(value, start[name])}
    for part in ("0.copies.5.", "1.copies.5.", "0.averages.", "0.readout.", "0.independent."):
        assert any(name.startswith(part) for name in moved), part
    args = LocalImageConfig(**options(tmp_path, local_objective="none", task_reach=2))
    LocalImageTrainer(model, args, train_dataset=make_images()).train()


def test_images_of_another_size_are_called_for_as_they_are(tmp_path):
    """Swin takes any: a copy is told the grid of the images at hand, not that of the config's size."""
    model = make_model("swin")
    calls = ImageCalls(model, find_stack(model))
    assert not calls.is_plain and calls.depends_on_size
    for side in (16, 32):
        made = calls.of((torch.zeros(2, 3, side, side),), {})
        grids = [next(value for value in call.args if isinstance(value, tuple)) for call in made.values()]
        assert [tuple(grid) for grid in grids] == [(side // 2,) * 2] * 3 + [(side // 4,) * 2] * 3
    assert model.training and ImageCalls(make_model("resnet"), find_stack(make_model("resnet"))).is_plain


RUNS = {
    **{objective: (LocalImageConfig, {"local_objective": objective, "num_blocks": 3}) for objective in CLASSIFIERS},
    "reach": (LocalImageConfig, {"local_objective": "none", "num_blocks": 3, "task_reach": [1, 3]}),
    "mlaan": (MLAANImageConfig, {"num_blocks": 3}),
}


@pytest.mark.parametrize(
    "family, run",
    [
        *[("vit", "mlaan"), ("vit", "readout"), ("resnet", "mlaan"), ("resnet", "classifier"), ("swin", "reach")],
        ("swin", "mlaan"),
    ],
)
def test_a_resumed_run_is_the_whole_run_and_its_checkpoint_stock(family, run, tmp_path):
    config_class, settings = RUNS[run]
    settings = {**settings, "save_strategy": "steps", "save_steps": 2, "max_steps": 5}  # an epoch has four
    whole = local_run(family, tmp_path / "whole", config_class, **settings)
    shutil.rmtree(tmp_path / "whole" / "checkpoint-4")
    again = LocalImageTrainer(
        make_model(family), config_class(**options(tmp_path / "whole", **settings)), train_dataset=make_images()
    )
    again.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    assert_equal_states(again.model, whole.model)
    losses = [[log["loss"] for log in t.state.log_history if "loss" in log] for t in (whole, again)]
    assert losses[0] == losses[1]

    again.save_model(tmp_path / "saved")
    loaded, information = AutoModelForImageClassification.from_pretrained(tmp_path / "saved", output_loading_info=True)
    assert not information["missing_keys"] and not information["unexpected_keys"]
    assert_equal_states(loaded, again.model)
    again.create_model_card()
    assert "of layers 0–1, 2–3, 4–5" in (tmp_path / "whole" / "README.md").read_text()


@pytest.mark.parametrize("trainer_class", [ImageTrainer, LocalImageTrainer])
def test_a_checkpoint_of_a_model_that_is_built_otherwise_is_refused(trainer_class, tmp_path):
    """Also where all weights have the shapes of this run's."""
    config_class = ImageTrainingArguments if trainer_class is ImageTrainer else LocalImageConfig
    args = config_class(**options(tmp_path, save_strategy="steps", save_steps=2))
    trainer_class(make_model("vit"), args, train_dataset=make_images()).train()
    other = trainer_class(make_model("vit", hidden_act="relu"), args, train_dataset=make_images())
    with pytest.raises(ValueError, match="hidden_act is 'gelu' there and 'relu' in this run; resume with the same"):
        other.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert other.state.global_step == 0


def test_a_checkpoint_without_a_config_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"has no config\.json, which says what model it is of"):
        check_same_model(make_model("vit"), str(tmp_path))


def test_weights_that_the_model_lacks_or_has_besides_are_not_passed_over(tmp_path):
    model = make_model("vit")
    model.save_pretrained(tmp_path)
    for changes in ({"num_hidden_layers": LAYERS - 1}, {"intermediate_size": 16}):
        with pytest.raises(ValueError, match="is of another model: .* of its weights are not those of this ViTFor"):
            load_weights(make_model("vit", **changes), str(tmp_path))
    file = tmp_path / "model.safetensors"
    weights = load_file(file)
    save_file({**weights, "surrogate.scale": torch.ones(1)}, file, {"format": "pt"})
    with pytest.raises(ValueError, match=r"1 of its weights are not those of this ViT.*, such as surrogate\.scale;"):
        load_weights(model, str(tmp_path))
    save_file({name: value for name, value in weights.items() if name != "classifier.bias"}, file, {"format": "pt"})
    with pytest.raises(ValueError, match=r"lacks 1 weights of ViT.*, such as classifier\.bias;"):
        load_weights(model, str(tmp_path))


@pytest.mark.parametrize(
    "changes, smallest",
    [
        ({}, 1),
        ({"per_device_train_batch_size": 3}, 3),
        ({"per_device_train_batch_size": 1}, 1),
        ({"dataloader_drop_last": True}, 4),
        ({"max_steps": 2}, 4),
        ({"max_steps": 2, "gradient_accumulation_steps": 2}, 1),
        ({"max_steps": -1}, 1),
    ],
)
def test_one_value_of_a_channel_is_refused(changes, smallest, tmp_path):
    """Nine images of 8 x 8 pixels, which this ResNet makes one of."""
    args = ImageTrainingArguments(**options(tmp_path, **changes))
    assert smallest_batch(args, 9) == smallest

    def make(size=8, family="resnet"):
        processor = ViTImageProcessor(size={"height": size, "width": size})
        images = make_images(9, size=size)
        return ImageTrainer(make_model(family, image_size=size), args, images, processing_class=processor)

    make(size=32)
    make(family="vit")
    if smallest > 1:
        make().train()
        return
    with pytest.raises(ValueError, match=r"per_device_train_batch_size=., of .* a batch norm of ResNetForImageCl"):
        make()


@pytest.mark.parametrize("run", RUNS)
def test_every_parameter_moves(run, tmp_path):
    config_class, settings = RUNS[run]
    model = local_run("vit", tmp_path, config_class, **settings).model
    start = dict(make_model("vit").named_parameters())
    assert [name for name, p in model.named_parameters() if torch.equal(p, start[name])] == []


@pytest.mark.parametrize("family", ["vit", "resnet", "swinv2"])
def test_micro_batches_add_up(family, tmp_path):
    """Two micro-batches of two images weigh as one of four; without batch norm, which sees the micro-batch."""
    models = []
    for size in (4, 2):
        changes = {"per_device_train_batch_size": size, "gradient_accumulation_steps": 4 // size, "max_steps": 1}
        changes["max_grad_norm"] = 1e9  # clipping would hide a factor
        trainer = LocalImageTrainer(
            make_model(family),
            LocalImageConfig(**options(tmp_path, num_blocks=2, augmentation="none", optim="sgd", **changes)),
            train_dataset=make_images(),
        )
        if family == "resnet":  # batch norms stay in evaluation
            trainer.model.train = lambda mode=True, model=trainer.model: model
            for module in [*trainer.model.modules(), *trainer.local_heads.modules()]:
                if isinstance(module, torch.nn.BatchNorm2d):
                    module.eval()
        trainer.train()
        models.append(trainer.model)
    for (name, one), two in zip(models[0].named_parameters(), models[1].parameters(), strict=True):
        torch.testing.assert_close(one, two, msg=name)


def saved_bytes(trainer):
    batch = {name: value.repeat(4, *[1] * (value.ndim - 1)) for name, value in make_batch(trainer).items()}
    with SavedBytes(trainer.model) as saved:
        micro_batch_gradients(trainer, batch)
    return saved.peak


@pytest.mark.parametrize("family", ["vit", "resnet"])
def test_a_block_at_a_time_is_in_memory(family, tmp_path):
    """Of twelve layers in four blocks: reach with recomputation and plain local learning keep one block's at once."""
    deep = {"num_hidden_layers": 12} if family == "vit" else {"depths": [6, 6], "hidden_sizes": [16, 16]}
    # The maps of a ResNet's first stage are four times as large: cut where blocks keep about as much as each other
    cuts = {} if family == "vit" else {"split_at": [2, 4, 6]}

    def make(config_class=LocalImageConfig, **settings):
        args = config_class(**options(tmp_path, num_blocks=4, **cuts, **settings))
        return LocalImageTrainer(make_model(family, **deep), args, train_dataset=make_images())

    whole = saved_bytes(make(local_objective="none", task_reach=4, reach_recompute=False))
    largest = 0.4 if family == "vit" else 0.5  # a block is a third of these feature maps
    assert saved_bytes(make(local_objective="none", task_reach=4)) < largest * whole
    assert saved_bytes(make()) < largest * whole
    assert saved_bytes(make(MLAANImageConfig)) < 0.9 * whole
