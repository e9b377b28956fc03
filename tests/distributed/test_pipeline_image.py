"""Image classifiers in a pipeline end with the weights of `LocalImageTrainer` in one process, bit for bit."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoImageProcessor, AutoModelForImageClassification, set_seed

from lopt_hf import LocalImageConfig, LocalImageTrainer
from lopt_hf.local.stacks import find_stack
from lopt_hf.pipeline.runtime.image.stage import check_stage_model
from tests.distributed.pipeline_image_worker import run_rank
from tests.distributed.pipeline_processes import Processes
from tests.image.helpers import make_images, make_model, options

SAVES = {"max_steps": 5, "save_strategy": "steps", "save_steps": 2}
# 24 images in micro-batches of four: three of them to a step, the second step of each epoch has three
ACCUMULATED = {"gradient_accumulation_steps": 4, "max_steps": 5}

# For each world: the runs in it, of six layers each.
RUNS: dict[int, dict[str, dict[str, Any]]] = {
    2: {
        "vit": {"family": "vit", "num_blocks": 2},
        "vit, accumulation": {"family": "vit", "num_blocks": 2, "split_at": [1], **ACCUMULATED},
        "vit, readout": {"family": "vit", "num_blocks": 2, "local_objective": "readout"},
        "vit, reconstruction": {"family": "vit", "num_blocks": 2, "local_objective": "reconstruction"},
        "vit, two blocks on each stage": {"family": "vit", "num_blocks": 4, "num_stages": 2, "local_step": True},
        "vit, bf16": {"family": "vit", "num_blocks": 2, "bf16": True},
        "vit, checkpointing": {"family": "vit", "num_blocks": 2, "activation_checkpointing": True},
        "deit": {"family": "deit", "num_blocks": 2},
        "dinov2": {"family": "dinov2", "num_blocks": 2},
        "resnet": {"family": "resnet", "num_blocks": 2},
        "resnet, accumulation": {"family": "resnet", "num_blocks": 2, "split_at": [2], **ACCUMULATED},
        "resnet, two blocks on each stage": {"family": "resnet", "num_blocks": 4, "num_stages": 2},
        "resnet, frozen": {"family": "resnet", "num_blocks": 2, "train_early_blocks": False},
        "resnet, saves": {"family": "resnet", "num_blocks": 2, **SAVES},
        "resnet, resumed": {"family": "resnet", "num_blocks": 2, **SAVES, "resume": "resnet, saves/checkpoint-2"},
    },
    3: {
        "vit": {"family": "vit", "num_blocks": 3},
        "vit, readout": {"family": "vit", "num_blocks": 3, "local_objective": "readout", **ACCUMULATED},
        "resnet": {"family": "resnet", "num_blocks": 3, "split_at": [1, 4], **ACCUMULATED},
    },
}
ONLY_IN_A_PIPELINE = ("num_stages", "resume", "family")


def run_pipeline(folder: Path, num_stages: int, runs: dict[str, dict[str, Any]], data_parallel: int = 1) -> None:
    """Runs the given runs in one world; each ends in a folder of its name."""
    lines = []
    for name, settings in runs.items():
        own = {key: value for key, value in settings.items() if key not in ("family", "resume")}
        resume = settings.get("resume") and str(folder / settings["resume"])
        lines.append(
            {
                **{"output_dir": str(folder / name), "family": settings["family"], "resume": resume},
                "settings": {"gradient": "local", **own},
            }
        )
    plan = folder / "runs.jsonl"
    plan.write_text("\n".join(map(json.dumps, lines)))
    number = num_stages * data_parallel
    arguments = [str(num_stages), str(data_parallel), str(plan)]
    processes = Processes([arguments] * number, folder / "logs", target=run_rank)
    codes = processes.wait(300)
    assert codes == [0] * number, [processes.output(rank)[-3000:] for rank in range(number)]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Runs each world once, when its first test asks for it."""
    folders: dict[int, Path] = {}

    def folder_of(num_stages: int) -> Path:
        if num_stages not in folders:
            folders[num_stages] = tmp_path_factory.mktemp(f"stages-{num_stages}")
            run_pipeline(folders[num_stages], num_stages, RUNS[num_stages])
        return folders[num_stages]

    return folder_of


def load_model(folder: Path) -> dict[str, torch.Tensor]:
    state: dict[str, torch.Tensor] = AutoModelForImageClassification.from_pretrained(folder).state_dict()
    return state


def run_one_process(output_dir: Path, settings: dict[str, Any]) -> LocalImageTrainer:
    own = {name: value for name, value in settings.items() if name not in ONLY_IN_A_PIPELINE}
    set_seed(42)
    trainer = LocalImageTrainer(
        make_model(settings["family"]), LocalImageConfig(**options(output_dir, **own)), train_dataset=make_images(24)
    )
    trainer.train()
    trainer.save_model()
    return trainer


def assert_equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys() and one
    different = [name for name in one if not torch.equal(one[name], other[name])]
    assert not different, different


@pytest.mark.parametrize(("num_stages", "name"), [(k, name) for k, runs in RUNS.items() for name in runs])
def test_weights_and_losses_equal_those_of_one_process(finished, tmp_path, num_stages, name):
    folder, settings = finished(num_stages) / name, RUNS[num_stages][name]
    one = run_one_process(tmp_path / "one", settings)
    assert_equal(load_model(folder), load_model(tmp_path / "one"))
    start = make_model(settings["family"]).state_dict()
    moved = [key for key, value in load_model(folder).items() if not torch.equal(value, start[key])]
    assert len(moved) > len(start) / 3
    logged = json.loads((folder / "log_history.json").read_text())
    expected = [log for log in one.state.log_history if "loss" in log]
    losses = [log for log in logged if "loss" in log]
    for log, other in zip(losses, expected, strict=True):
        for key in (key for key in other if key == "loss" or key.startswith("local_loss/")):
            assert log[key] == other[key], key


def test_two_replicas_end_where_one_process_with_their_batches_does(tmp_path):
    shared = {"family": "vit", "num_blocks": 2, "optim": "sgd", "learning_rate": 0.1, "augmentation": "none"}
    settings = {**shared, "per_device_train_batch_size": 2, "data_parallel": 2}
    run_pipeline(tmp_path, 2, {"replicas": settings}, data_parallel=2)
    run_one_process(tmp_path / "one", {**shared, "per_device_train_batch_size": 4})
    one, two = load_model(tmp_path / "one"), load_model(tmp_path / "replicas")
    start = make_model("vit").state_dict()
    assert all(not torch.equal(value, start[name]) for name, value in two.items())
    for name, value in one.items():
        torch.testing.assert_close(two[name], value, rtol=1e-4, atol=1e-6, msg=name)


def test_each_process_keeps_its_own_layers(finished):
    folder = finished(3) / "resnet"
    own = [set(json.loads((folder / f"parameters-{rank}.json").read_text())) for rank in range(3)]
    whole = {name for name, _ in make_model("resnet").named_parameters()}
    assert own[0] | own[1] | own[2] == whole and sum(map(len, own)) == len(whole)
    assert all("embedder" in name or "stages.0.layers.0" in name for name in own[0])
    assert any("classifier" in name for name in own[2])


def test_the_model_comes_with_its_image_processor(finished):
    processor = AutoImageProcessor.from_pretrained(finished(2) / "vit")
    assert processor.size == {"height": 16, "width": 16}


def test_what_passes_more_between_layers_is_refused():
    model = make_model("swin")
    with pytest.raises(ValueError, match="SwinForImageClassification: its layers are called with more than hidden"):
        check_stage_model(model, find_stack(model))
