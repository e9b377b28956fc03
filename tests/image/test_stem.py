"""A ResNet's stem, run again a module at a time: the same weights as with its graph kept, and less that is kept."""

import pytest
import torch
from torch import nn

from lopt_hf import LocalImageConfig, LocalImageTrainer
from lopt_hf.local import hooks
from lopt_hf.local.learner import LocalLearner
from lopt_hf.local.run_facts import RunFacts
from lopt_hf.local.stacks import find_stack
from lopt_hf.local.stem import find_stem
from lopt_hf.meters.saved_bytes import SavedBytes
from tests.image.helpers import FAMILIES, make_images, make_model, options
from tests.tiny import make_model as make_language_model

REACH = {"num_blocks": 3, "task_reach": 3, "local_objective": "none"}


def names_of_stem(model):
    names = {module: name for name, module in model.base_model.named_modules()}
    return [names[module] for module in find_stem(model, find_stack(model))]


def test_a_resnets_stem_is_found():
    within = [f"embedder.embedder.{name}" for name in ("convolution", "normalization", "activation")]
    assert names_of_stem(make_model("resnet")) == [*within, "embedder.pooler"]


@pytest.mark.parametrize("family", sorted(set(FAMILIES) - {"resnet"}))
def test_what_is_no_chain_of_modules_keeps_its_graph(family):
    assert names_of_stem(make_model(family)) == []


def test_a_language_model_has_no_stem():
    assert names_of_stem(make_language_model("llama")) == []


def with_dropout(model):
    model.base_model.embedder.embedder.activation = nn.Dropout(0.5)


def freeze_convolution(model):
    model.base_model.embedder.embedder.convolution.requires_grad_(False)


def freeze_norm(model):
    model.base_model.embedder.embedder.normalization.requires_grad_(False)


def trained(folder, change, settings):
    model = make_model("resnet")
    if change is not None:
        change(model)
    start = {name: value.clone() for name, value in model.state_dict().items()}
    trainer = LocalImageTrainer(
        model, LocalImageConfig(**options(folder, **REACH | settings)), train_dataset=make_images()
    )
    with SavedBytes(model) as saved:
        trainer.train()
    return start, model.state_dict(), saved.peak


@pytest.mark.parametrize(
    "change, settings",
    [
        pytest.param(None, {}, id="plain"),
        pytest.param(with_dropout, {}, id="dropout"),
        pytest.param(freeze_convolution, {}, id="frozen convolution"),
        pytest.param(freeze_norm, {}, id="frozen norm"),
        pytest.param(None, {"bf16": True}, id="bf16"),
        pytest.param(None, {"gradient_accumulation_steps": 2}, id="accumulation"),
        pytest.param(None, {"task_reach": [1, 3]}, id="cycle"),
        pytest.param(None, {"task_reach": [1, 3], "local_objective": "classifier"}, id="local loss"),
        pytest.param(
            None,
            {"task_reach": [1, 3], "reach_unit": "microbatch", "gradient_accumulation_steps": 2},
            id="micro-batches",
        ),
        pytest.param(None, {"local_step": True, "clip_scope": "part"}, id="local steps"),
    ],
)
def test_running_again_changes_nothing(change, settings, tmp_path, monkeypatch):
    """Bit for bit, running statistics and dropout masks too."""
    start, ours, _ = trained(tmp_path / "ours", change, settings)
    monkeypatch.setattr(hooks, "find_stem", lambda model, stack: [])
    _, kept, _ = trained(tmp_path / "kept", change, settings)
    for name, tensor in ours.items():
        assert torch.equal(tensor, kept[name]), name
    moved = {name for name in start if not torch.equal(start[name], ours[name])}
    assert any("embedder" in name for name in moved)


@pytest.mark.parametrize("settings", [{}, {"task_reach": [1, 3]}])
def test_running_again_keeps_less(settings, tmp_path, monkeypatch):
    """Of a model whose stem has the largest feature maps, as ResNets have."""
    _, _, ours = trained(tmp_path / "ours", None, settings)
    monkeypatch.setattr(hooks, "find_stem", lambda model, stack: [])
    _, _, kept = trained(tmp_path / "kept", None, settings)
    assert ours < 0.8 * kept


def test_a_frozen_stem_runs_once(tmp_path):
    model = make_model("resnet")
    model.base_model.embedder.requires_grad_(False)
    trainer = LocalImageTrainer(model, LocalImageConfig(**options(tmp_path, **REACH)), train_dataset=make_images())
    runs = []
    model.base_model.embedder.pooler.register_forward_hook(lambda *call: runs.append(call))
    trainer.train()
    assert len(runs) == 3  # one in each step


def scale_output(model):
    model.base_model.embedder.register_forward_hook(lambda module, args, output: output * 2)


class Scaled(type(make_model("resnet").base_model)):
    """A ResNet that learns by how much its images are to be scaled."""

    def forward(self, pixel_values, *args, **kwargs):
        return super().forward(pixel_values * self.scale, *args, **kwargs)


def scale_within(model):
    model.base_model.__class__ = Scaled
    model.base_model.scale = nn.Parameter(torch.ones(()))


def scale_around(model):
    model.scale = nn.Parameter(torch.ones(()))
    model.base_model.register_forward_pre_hook(
        lambda module, args, kwargs: (
            (args, kwargs | {"pixel_values": kwargs["pixel_values"] * model.scale})
            if args == ()
            else ((args[0] * model.scale, *args[1:]), kwargs)
        ),
        with_kwargs=True,
    )


def of_ones_own(model):
    stem = model.base_model.embedder
    stem.embedder = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU())


def in_place(model):
    model.base_model.embedder.embedder.activation = nn.ReLU(inplace=True)


def normalised_by_its_spectrum(model):
    nn.utils.parametrizations.spectral_norm(model.base_model.embedder.embedder.convolution)


@pytest.mark.parametrize(
    "change", [scale_output, scale_within, scale_around, of_ones_own, in_place, normalised_by_its_spectrum]
)
def test_a_stem_that_was_changed_trains_as_with_its_graph(change, tmp_path):
    """With what is learned before it, too."""
    start, ours, _ = trained(tmp_path / "ours", change, {})
    _, kept, _ = trained(tmp_path / "kept", change, {"reach_recompute": False})
    for name, tensor in ours.items():
        assert torch.equal(tensor, kept[name]), name
    learned = [name for name in start if "scale" in name or "embedder" in name and "running" not in name]
    moved = [name for name in learned if not torch.equal(start[name], ours[name])]
    assert {"scale" in name for name in moved} == {"scale" in name for name in learned}


def test_what_is_changed_later_is_an_error_and_no_wrong_gradient(tmp_path):
    model = make_model("resnet")
    trainer = LocalImageTrainer(model, LocalImageConfig(**options(tmp_path, **REACH)), train_dataset=make_images())
    scale_output(model)
    with pytest.raises(RuntimeError, match=r"Before its layers the decoder changes .* reach_recompute"):
        trainer.train()


def test_images_that_are_written_into_are_an_error_and_no_wrong_gradient(tmp_path):
    learner = LocalLearner(make_model("resnet"), LocalImageConfig(**options(tmp_path, **REACH)))
    batch = {"pixel_values": torch.rand(4, 3, 16, 16), "labels": torch.arange(4)}
    with pytest.raises(RuntimeError, match="images of this micro-batch have been written into"), learner.micro_batch():
        with learner.forward(batch, step=0):
            loss = learner.model(**batch).loss
        loss.backward()
        batch["pixel_values"].zero_()
        learner.after_backward()


def test_a_stem_that_gives_something_else_again_is_an_error(tmp_path):
    model = make_model("resnet")
    norm, runs = model.base_model.embedder.embedder.normalization, []

    def drift(module, args, output):
        runs.append(output)
        return output * len(runs)

    trainer = LocalImageTrainer(model, LocalImageConfig(**options(tmp_path, **REACH)), train_dataset=make_images())
    norm.register_forward_hook(drift, prepend=True)
    with pytest.raises(RuntimeError, match=r"Block 0 computes something else when it runs again .* reach_recompute"):
        trainer.train()


def test_a_sharded_root_is_not_run_by_parts(tmp_path):
    """Its weights are whole in the model's own forward only."""
    model = make_model("resnet")
    with pytest.raises(ValueError, match="Local learning of image classifiers does not work under FSDP2"):
        LocalLearner(model, LocalImageConfig(**options(tmp_path, **REACH)), run=RunFacts(engine="FSDP2"))
    assert not model.base_model.embedder.pooler._forward_hooks
