"""A pipeline of processes ends with the weights of the same local learning in one process, bit for bit."""

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, set_seed

from lopt_hf import LoPTConfig, LoPTTrainer, MLAANConfig, MLAANTrainer
from lopt_hf.local.blocks import split_layers
from lopt_hf.local.learner import LocalLearner
from lopt_hf.pipeline.runtime.export import export_checkpoint
from lopt_hf.pipeline.runtime.launch import launch_command
from lopt_hf.pipeline.runtime.stage_plan import plan_stages
from tests.distributed.pipeline_processes import Processes
from tests.distributed.pipeline_worker import make_lora, run_rank
from tests.distributed.sockets import assert_on_loopback, watched
from tests.tiny import make_dataset, make_model, make_tokenizer
from tests.trainers.helpers import training_args

ROOT = Path(__file__).parents[2]
NUM_LAYERS = 6

MLAAN_4 = {"num_blocks": 4, "num_stages": 2, "method": "mlaan", "window": 2}

# For each world: the runs in it. All clip (`max_grad_norm`), and log between the ends of epochs.
RUNS: dict[int, dict[str, dict[str, Any]]] = {
    2: {
        "plain": {"num_blocks": 2},
        "accumulation, uneven": {"num_blocks": 2, "gradient_accumulation_steps": 3, "split_at": [1]},
        "two blocks on each stage": {"num_blocks": 4, "num_stages": 2},
        "readout": {"num_blocks": 2, "local_objective": "readout"},
        "readout, two blocks on each stage": {"num_blocks": 4, "num_stages": 2, "local_objective": "readout"},
        "readout, tied": {"num_blocks": 2, "local_objective": "readout", "tied": True},
        "readout, tied and frozen": {
            "num_blocks": 2,
            "local_objective": "readout",
            "tied": True,
            "tied_embeddings": "freeze",
        },
        "checkpointing": {"num_blocks": 2, "activation_checkpointing": True},
        "interval": {"num_blocks": 2, "local_update_interval": 2, "early_learning_rate": 1e-4},
        "frozen": {"num_blocks": 2, "train_early_blocks": False},
        "LoRA": {"num_blocks": 2, "lora": True},
        "DoRA and a trained head": {"num_blocks": 2, "lora": {"use_dora": True, "modules_to_save": ["lm_head"]}},
        "tied": {"num_blocks": 2, "family": "gemma2", "tied": True},
        "tied and frozen": {"num_blocks": 2, "tied_embeddings": "freeze", "tied": True},
        "learned positions": {"num_blocks": 2, "family": "gpt2"},
        "bf16": {"num_blocks": 2, "bf16": True},
        "local step, two blocks on each stage": {"num_blocks": 4, "num_stages": 2, "local_step": True},
        "MLAAN": {"num_blocks": 2, "method": "mlaan"},
        "MLAAN, two blocks on each stage": {**MLAAN_4, "gradient_accumulation_steps": 2, "max_steps": 4},
        "MLAAN, tied and frozen": {"num_blocks": 2, "method": "mlaan", "tied_embeddings": "freeze", "tied": True},
        "MLAAN, own readouts": {
            "num_blocks": 2,
            "method": "mlaan",
            "readout": "trainable",
            "activation_checkpointing": True,
        },
        "MLAAN, LoRA": {**MLAAN_4, "lora": True},
        "MLAAN, saves": {**MLAAN_4, "max_steps": 4, "save_strategy": "steps", "save_steps": 2, "lora": True},
        "MLAAN, resumed": {**MLAAN_4, "max_steps": 4, "lora": True, "resume": "MLAAN, saves/checkpoint-2"},
    },
    3: {
        "plain": {"num_blocks": 3},
        "accumulation, uneven": {"num_blocks": 3, "gradient_accumulation_steps": 3, "split_at": [1, 5]},
        "LoRA": {"num_blocks": 3, "gradient_accumulation_steps": 3, "lora": True},
    },
    4: {
        "plain": {"num_blocks": 4},
        "accumulation, uneven": {"num_blocks": 4, "gradient_accumulation_steps": 3, "split_at": [1, 2, 5]},
        "LoRA": {"num_blocks": 4, "lora": True},
        "saves": {"num_blocks": 4, "max_steps": 4, "save_strategy": "steps", "save_steps": 2},
        "LoRA, saves": {"num_blocks": 4, "max_steps": 4, "save_strategy": "steps", "save_steps": 4, "lora": True},
    },
}
LAUNCHED = 2  # the world that `accelerate launch` starts; of the others the imports would take longer than the runs
ONLY_IN_A_PIPELINE = ("num_stages", "data_parallel", "local_step", "streams")  # which change no bit


def save_start(folder: Path, family: str = "llama", tied: bool = False) -> str:
    path = folder / f"start-{family}{'-tied' * tied}"
    if not path.exists():
        layers = {"n_layer": NUM_LAYERS} if family == "gpt2" else {"num_hidden_layers": NUM_LAYERS}
        make_model(family, tie_word_embeddings=tied, **layers).save_pretrained(path)
        make_tokenizer().save_pretrained(path)
    return str(path)


def run_pipeline(
    folder: Path, num_stages: int, runs: dict[str, dict[str, Any]], data_parallel: int = 1, launched: bool = False
) -> None:
    """Runs the given runs in one world, of forked processes or launched ones; each ends in a folder of its name."""
    lines = []
    for name, settings in runs.items():
        settings = {"gradient": "local", "max_grad_norm": 0.5, **settings}
        start = save_start(folder, settings.pop("family", "llama"), settings.pop("tied", False))
        line = {"model": start, "output_dir": str(folder / name), "settings": settings}
        resume = settings.pop("resume", None)
        lines.append({**line, "lora": settings.pop("lora", False), "resume": resume and str(folder / resume)})
    plan = folder / "runs.jsonl"
    plan.write_text("\n".join(map(json.dumps, lines)))
    arguments = [str(num_stages), str(data_parallel), str(plan)]
    num_processes = num_stages * data_parallel
    if launched:
        launch(num_processes, arguments)
        return
    processes = Processes([arguments] * num_processes, folder / "logs", target=run_rank)
    codes = processes.wait(600)
    assert codes == [0] * num_processes, [processes.output(rank)[-3000:] for rank in range(num_processes)]


def launch(num_processes: int, arguments: list[str]) -> None:
    """As the command does it."""
    command = launch_command(num_processes, arguments)
    command[command.index("lopt_hf.scripts.pipeline")] = "tests.distributed.pipeline_worker"
    with watched(psutil.Process()) as found:
        result = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=600)
    assert result.returncode == 0, result.stderr[-6000:]
    assert_on_loopback(found, num_processes)  # the launcher's store, and gloo in the stages


class StagesInOneProcess(MLAANTrainer):
    """Windows end where a pipeline's stages do, and averages stand beside layers of their own stage only."""

    def __init__(self, model: Any, args: MLAANConfig, num_stages: int, **given: Any) -> None:
        num_layers = model.config.get_text_config(decoder=True).num_hidden_layers
        self.plans = plan_stages(split_layers(num_layers, args.num_blocks, args.split_at), num_stages)
        super().__init__(model, args, **given)

    def _make_learner(self, method: Any, **options: Any) -> LocalLearner:
        starts = [plan.blocks[0].index for plan in self.plans]
        return super()._make_learner(method, stage_starts=starts, **options)


def run_one_process(folder: Path, output_dir: Path, settings: dict[str, Any]) -> dict[str, torch.Tensor]:
    settings = {"max_grad_norm": 0.5, **settings}
    start = save_start(folder, settings.pop("family", "llama"), settings.pop("tied", False))
    lora = settings.pop("lora", False)
    peft_config = make_lora(lora) if lora else None
    num_stages, method = settings.get("num_stages", settings["num_blocks"]), settings.pop("method", "lopt")
    settings = {name: value for name, value in settings.items() if name not in ONLY_IN_A_PIPELINE}
    model = AutoModelForCausalLM.from_pretrained(start, dtype=torch.float32)
    given = {"train_dataset": make_dataset(), "processing_class": make_tokenizer(), "peft_config": peft_config}
    trainer: Any
    if method == "mlaan":
        args: Any = MLAANConfig(**training_args(output_dir, **{"window": 1, **settings}))
        set_seed(args.seed)
        trainer = StagesInOneProcess(model, args, num_stages=num_stages, **given)
    else:
        args = LoPTConfig(**training_args(output_dir, **settings))
        set_seed(args.seed)
        trainer = LoPTTrainer(model, args, **given)
    trainer.train()
    trainer.save_model()
    (output_dir / "log_history.json").write_text(json.dumps(trainer.state.log_history))
    return load_model(output_dir)


def load_model(folder: Path) -> dict[str, torch.Tensor]:
    adapter = folder / "adapter_model.safetensors"
    if adapter.exists():
        return load_file(adapter)
    model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True, dtype=torch.float32)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    return dict(model.state_dict())


def assert_equal(pipeline: dict[str, torch.Tensor], one: dict[str, torch.Tensor]) -> None:
    assert pipeline.keys() == one.keys()
    different = [name for name in one if not torch.equal(pipeline[name], one[name])]
    assert not different, different


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Runs each world once, when its first test asks for it."""
    folders: dict[int, Path] = {}

    def folder_of(num_stages: int) -> Path:
        if num_stages not in folders:
            folders[num_stages] = tmp_path_factory.mktemp(f"stages-{num_stages}")
            run_pipeline(folders[num_stages], num_stages, RUNS[num_stages], launched=num_stages == LAUNCHED)
        return folders[num_stages]

    return folder_of


@pytest.mark.parametrize(("num_stages", "name"), [(k, name) for k, runs in RUNS.items() for name in runs])
def test_weights_equal_those_of_one_process(finished, tmp_path, num_stages, name):
    folder = finished(num_stages)
    settings = {key: value for key, value in RUNS[num_stages][name].items() if key != "resume"}
    one = run_one_process(folder, tmp_path / "one", settings)
    start = save_start(
        folder, RUNS[num_stages][name].get("family", "llama"), RUNS[num_stages][name].get("tied", False)
    )
    if not RUNS[num_stages][name].get("lora"):
        before = AutoModelForCausalLM.from_pretrained(start, dtype=torch.float32).state_dict()
        assert any(not torch.equal(one[key], before[key]) for key in before), "nothing was trained"
    assert_equal(load_model(folder / name), one)


@pytest.mark.parametrize("num_stages", [2, 3])
def test_logs_equal_those_of_one_process(finished, tmp_path, num_stages):
    """Task loss, accuracy, rates, and the local losses of the other stages, in one record."""
    run_one_process(finished(num_stages), tmp_path / "one", RUNS[num_stages]["plain"])
    one = json.loads((tmp_path / "one/log_history.json").read_text())
    pipeline = json.loads((finished(num_stages) / "plain/log_history.json").read_text())
    assert len(one) == len(pipeline)
    for expected, record in zip(one[:-1], pipeline[:-1], strict=True):
        assert record["pipeline/stage_0/bubble_share"] >= 0
        assert {k: record[k] for k in expected if k != "grad_norm"} == {
            k: v for k, v in expected.items() if k != "grad_norm"
        }
        norms = [record["grad_norm"], *(record[f"pipeline/stage_{i}/grad_norm"] for i in range(num_stages - 1))]
        assert torch.tensor(norms).norm().item() == pytest.approx(expected["grad_norm"], rel=1e-6)


def test_a_run_goes_on_with_another_number_of_stages(finished, tmp_path):
    """Four blocks on four stages, killed after two of four steps; on two stages it ends where four would."""
    saved = finished(4) / "saves"
    settings = {**RUNS[4]["saves"], "num_stages": 2, "resume": str(saved / "checkpoint-2")}
    run_pipeline(tmp_path, 2, {"resumed": settings})
    assert_equal(load_model(tmp_path / "resumed"), load_model(saved))
    before, after = (json.loads((f / "log_history.json").read_text()) for f in (saved, tmp_path / "resumed"))
    keys = ("loss", "learning_rate", "local_loss/block_0", "local_loss/block_2", "num_tokens")
    assert [[r[k] for k in keys] for r in after[:-1]] == [[r[k] for k in keys] for r in before[:-1]]


@pytest.mark.parametrize(
    "own", [{"method": "mlaan"}, {"method": "lopt", "streams": True, "train_sampling_strategy": "sequential"}]
)
def test_replicas_equal_one_process_with_the_same_global_batch(tmp_path, own):
    settings = {
        **own,
        "num_blocks": 2,
        "data_parallel": 2,
        "per_device_train_batch_size": 2,
        "max_steps": 5,
    }
    run_pipeline(tmp_path, 2, {"replicas": settings}, data_parallel=2)
    one = run_one_process(tmp_path, tmp_path / "one", {**settings, "gradient_accumulation_steps": 2})
    two = load_model(tmp_path / "replicas")
    worst = max(((two[name] - weight).norm() / weight.norm()).item() for name, weight in one.items())
    assert worst <= 1e-6
    logs = [json.loads((tmp_path / name / "log_history.json").read_text()) for name in ("replicas", "one")]
    for record, expected in zip(logs[0][:-1], logs[1][:-1], strict=True):
        names = [name for name in expected if name.startswith("local_loss/") or name in ("loss", "num_tokens")]
        assert names
        for name in names:
            assert record[name] == pytest.approx(expected[name], rel=1e-5), name


@pytest.mark.parametrize(("num_stages", "name"), [(4, "saves"), (4, "LoRA, saves"), (2, "MLAAN, saves")])
def test_an_exported_checkpoint_is_the_saved_model(finished, tmp_path, num_stages, name):
    """The last checkpoint holds what the run ended with."""
    saved = finished(num_stages) / name
    export_checkpoint(saved / "checkpoint-4", tmp_path / "model")
    assert_equal(load_model(tmp_path / "model"), load_model(saved))
    with pytest.raises(ValueError, match="exists"):
        export_checkpoint(saved / "checkpoint-4", tmp_path / "model")


def test_an_exported_checkpoint_is_as_precise_as_the_run(finished, tmp_path, monkeypatch):
    """The start lies on the hub in bfloat16, under a revision."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    snapshot = tmp_path / "models--org--start/snapshots" / ("a" * 40)
    make_model(num_hidden_layers=NUM_LAYERS).to(torch.bfloat16).save_pretrained(snapshot)
    make_tokenizer().save_pretrained(snapshot)
    (snapshot.parents[1] / "refs").mkdir()
    (snapshot.parents[1] / "refs/v2").write_text(snapshot.name)
    saved, checkpoint = finished(4) / "saves", tmp_path / "checkpoint-4"
    shutil.copytree(saved / checkpoint.name, checkpoint)
    manifest = json.loads((checkpoint / "pipeline.json").read_text())
    assert manifest["dtype"] == "float32"
    manifest |= {"model": "org/start", "model_revision": "v2"}
    (checkpoint / "pipeline.json").write_text(json.dumps(manifest))
    export_checkpoint(checkpoint, tmp_path / "model")
    assert_equal(load_model(tmp_path / "model"), load_model(saved))
