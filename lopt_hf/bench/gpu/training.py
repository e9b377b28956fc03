"""A short training run by a real trainer, on a model with random weights, and what it cost.

Nothing is fetched: the model is made from its configuration, the rows are random tokens of one length.
"""

import random
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lopt_hf.bench.gpu.updates import Comparison, compare, save_updates
from lopt_hf.bench.gpu.workload import TrainingWorkload
from lopt_hf.bench.step_settings import LORA_RANK
from lopt_hf.bench.training import SHARED_ARGUMENTS

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedModel, PreTrainedTokenizerFast
    from trl import SFTTrainer

__all__ = ["Training", "import_trainers", "make_model", "make_tokenizer"]

_RESERVED = 3  # ids of the tokenizer's own tokens


@dataclass(frozen=True)
class Training:
    """One run, ready to be called as a case's `run`.

    Attributes:
        workload: What it trains.
        options: Arguments of `LoPTConfig`; of `SFTConfig` where there is no `num_blocks` among them.
        weights: Type of the weights.
        precision: `"bf16"` or `"fp16"` (autocast), or `"no"`.
        attention: `attn_implementation` of the model.
        lora: Whether adapters are trained.
        on_cpu: Runs on the CPU whatever the workload's device is.
        cycle: Number of steps after which they are alike again: the length of a schedule.
        saved_as: Keeps how the weights changed under this name, to compare with.
        comparison: What to compare with.
        metered: Whether the meters look at a cycle of steps; they cannot look into sharded weights.
        sharded: Whether an engine is to shard the weights.
    """

    workload: TrainingWorkload
    options: Mapping[str, Any] = field(default_factory=dict)
    weights: str = "bfloat16"
    precision: str = "bf16"
    attention: str = "sdpa"
    lora: bool = False
    on_cpu: bool = False
    cycle: int = 1
    saved_as: str | None = None
    comparison: Comparison | None = None
    metered: bool = True
    sharded: bool = False

    @property
    def total_steps(self) -> int:
        """Optimizer steps of a run: warm-up, a cycle for the memory, and the timed cycles."""
        return self.workload.warmup + self.cycle * (1 + self.workload.steps)

    @property
    def device(self) -> str:
        """Type of the device that the run is on."""
        return "cpu" if self.on_cpu else self.workload.device

    def __call__(self, folder: Path) -> dict[str, Any]:
        """Trains and returns what it cost, and how it compares."""
        import torch

        from lopt_hf.bench.gpu.costs import StepCosts

        torch.use_deterministic_algorithms(self.workload.deterministic, warn_only=True)
        trainer = self._make_trainer(folder)
        costs = StepCosts(self.device, self.workload, self.cycle, self.metered)
        trainer.add_callback(costs)
        keeps_updates = bool(self.saved_as or self.comparison)
        start = _weights(trainer) if keeps_updates else {}
        trainer.train()
        self._check_engine(trainer)
        values = costs.values()
        if keeps_updates:
            updates = {name: weight - start[name] for name, weight in _weights(trainer).items()}
            if self.saved_as:
                save_updates(folder / f"{self.saved_as}.pt", updates, costs.losses)
            if self.comparison:
                values |= compare(folder, self.comparison, updates, costs.losses)
        return values

    def _check_engine(self, trainer: "SFTTrainer") -> None:
        from torch.distributed.tensor import DTensor

        weights = trainer.accelerator.unwrap_model(trainer.model).parameters()
        if self.sharded and not any(isinstance(weight, DTensor) for weight in weights):
            raise RuntimeError("no weight is sharded: accelerate took another engine than it was launched with")

    def _make_trainer(self, folder: Path) -> "SFTTrainer":
        from peft import LoraConfig
        from transformers import PrinterCallback
        from trl import SFTConfig, SFTTrainer

        from lopt_hf import LoPTConfig, LoPTTrainer

        is_local = "num_blocks" in self.options
        config, trainer_class = (LoPTConfig, LoPTTrainer) if is_local else (SFTConfig, SFTTrainer)
        workload = self.workload
        place = "cpu" if workload.is_made_on_cpu else self.device
        trainer = trainer_class(
            model=make_model(workload.config, self.weights, place, workload.seed, self.attention),
            args=config(**self._arguments(folder)),
            train_dataset=self._rows(),
            processing_class=make_tokenizer(),
            peft_config=LoraConfig(r=LORA_RANK, target_modules="all-linear", task_type="CAUSAL_LM")
            if self.lora
            else None,
        )
        trainer.remove_callback(PrinterCallback)
        return trainer

    def _arguments(self, folder: Path) -> dict[str, Any]:
        return {
            "output_dir": str(folder / "trainer"),
            "max_steps": self.total_steps,
            "per_device_train_batch_size": self.workload.batch_size,
            "max_length": None,
            "optim": self.workload.optim,
            "learning_rate": self.workload.learning_rate,
            "bf16": self.precision == "bf16",
            "fp16": self.precision == "fp16",
            "tf32": False,  # fp32 is what others are compared with; torch_compile would turn it on
            "use_cpu": self.device == "cpu",
            "gradient_checkpointing": False,
            "seed": self.workload.seed,
            **SHARED_ARGUMENTS,
            **self.options,
        }

    def _rows(self) -> "Dataset":
        from datasets import Dataset

        numbers = random.Random(self.workload.seed)
        ids = range(_RESERVED, self.workload.config["vocab_size"])
        count = self.workload.batch_size * self.total_steps
        return Dataset.from_dict(
            {"input_ids": [numbers.choices(ids, k=self.workload.seq_length) for _ in range(count)]}
        )


def import_trainers() -> None:
    """Imports what takes long, so that it takes none of the part's time."""
    import lopt_hf.bench.gpu.costs
    import lopt_hf.trainers.sft  # noqa: F401


def make_model(
    config: Mapping[str, Any], weights: str, device: str, seed: int, attention: str = "sdpa"
) -> "PreTrainedModel":
    """A model with random weights, made where it is to be: a large one is made on a GPU within seconds."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    values = dict(config)
    torch.manual_seed(seed)
    with torch.device(device):
        made = AutoConfig.for_model(values.pop("model_type"), **values)
        return AutoModelForCausalLM.from_config(made, dtype=getattr(torch, weights), attn_implementation=attention)


def make_tokenizer() -> "PreTrainedTokenizerFast":
    """A tokenizer that knows how to pad and to end, which is all that a trainer asks of it here."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    known = {"<pad>": 0, "<eos>": 1, "<unk>": 2}
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(known, unk_token="<unk>")),
        pad_token="<pad>",
        eos_token="<eos>",
        unk_token="<unk>",
    )


def _weights(trainer: "SFTTrainer") -> dict[str, Any]:
    """Copies of the trained model's weights in host memory, in fp32 and whole even where they are sharded."""
    import torch
    from torch.distributed.tensor import DTensor

    from lopt_hf.local.heads import LocalHeads

    model = trainer.accelerator.unwrap_model(trainer.model)
    whole = {}
    for name, parameter in model.named_parameters():
        if not LocalHeads.is_name_of_head(name) and parameter.requires_grad:
            weight = parameter.detach()
            weight = weight.full_tensor() if isinstance(weight, DTensor) else weight
            whole[name] = weight.to("cpu", dtype=torch.float32, copy=True)
    return whole
