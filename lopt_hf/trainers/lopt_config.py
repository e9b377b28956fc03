"""Arguments of local learning, alone (`LocalLearningArguments`) and with TRL's SFT arguments (`LoPTConfig`)."""

import math
import os
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

import torch
from accelerate.utils import parse_flag_from_env
from transformers.training_args import OptimizerNames
from trl import SFTConfig

__all__ = ["LoPTConfig", "LocalLearningArguments"]

# The arguments are mixed in before a config class; a type checker is told that they are one.
if TYPE_CHECKING:
    from transformers import TrainingArguments as ArgumentsBase
else:
    ArgumentsBase = object


@dataclass
class LocalLearningArguments(ArgumentsBase):
    """Arguments that LoPT adds to a TRL trainer's config; mix it in before the config class.

    Sources: LoPT, arXiv 2605.04913 v3 ("paper"), and its released code, HumyuShi/LoPT commit d4cb99e ("code").

    Parameters:
        num_blocks: Blocks that the decoder layers are cut into. Paper, Sec. 3: 2; more blocks are the code's.
        split_at: First layer of every block but the first, instead of an even split.
        local_objective: What the early blocks learn from. `"reconstruction"`: to keep their input recoverable (paper,
            Sec. 3). `"readout"`: the next token, read through the model's final norm and LM head as they were at the
            start, at weight 1 for every block (ZeroLock's form, arXiv 2608.07974); the `reconstruction_*` arguments
            do not apply; for supervised fine-tuning only. An objective that is passed to the trainer takes the place
            of both.
        reconstruction_weight: lambda, the weight of the mean local loss over the early blocks. Paper, Sec. 3: 10.
        reconstruction_bottleneck: Divisor of the reconstruction head's inner width. Paper, Sec. 3: 4.
        reconstruction_mask: Which positions count in the local loss: `"attention"` leaves padding out (paper, App. L),
            `"none"` counts it too (code).
        early_learning_rate: Learning rate of early blocks, embeddings and heads. Default: `learning_rate` (paper);
            the code has the option as `lr_k1`.
        local_backward: `"eager"` runs each block's local backward in the forward, as soon as the block is done
            (paper, App. L), which frees its activations; `"joint"` adds the local losses to the task loss (code).
            `"auto"` picks eager where it works: one process or DDP.
        local_update_interval: Update the early blocks at every n-th optimizer step only; at the others they run
            without gradients, which saves the arithmetic too. Ours; paper and code update at every step.
        local_step: Let an early block take its optimizer step right after its local backward, and free its gradients
            before the next block runs (paper, App. L): the gradients of one block are in memory at a time, not those
            of all. The weights end the same, bit for bit, unless a block reads another's weights (RepL's operators
            that do, next to a boundary). No use with `gradient_accumulation_steps` above 1: gradients that accumulate
            have to stay. Under DDP the step waits for the average of the block's gradients, which otherwise overlaps
            the next blocks. Callbacks (`on_pre_optimizer_step`) come when the last block is about to step, and the
            early ones have; step hooks of the optimizer run once for each block. Off, as in the released code.
        clip_scope: `"block"` clips each block's gradient at `max_grad_norm` (paper, App. L), `"global"` all together
            (code).
        tied_embeddings: What to do where the LM head shares the input embedding: `"untie"` gives the head a copy
            (paper and code), `"freeze"` keeps them tied and frozen, so the checkpoint keeps its size and layout.
        train_early_blocks: `False` freezes early blocks and embeddings (paper's control experiment).
        log_drift: Log each block's relative weight drift from the start, `||W - W0|| / ||W0||` over its trainable
            parameters. Keeps a copy of them in host memory.

    Raises:
        ValueError: If a value is out of range; the message names field, value and fix.
    """

    num_blocks: int = field(
        default=2, metadata={"help": "Number of blocks the decoder layers are cut into (paper, Sec. 3: 2)."}
    )
    split_at: list[int] | None = field(
        default=None,
        metadata={"help": "Index of the first layer of every block but the first, instead of an even split."},
    )
    local_objective: str = field(
        default="reconstruction",
        metadata={
            "help": "What the early blocks learn from: 'reconstruction' of their input (paper, Sec. 3), or 'readout', "
            "the next token through the model's own norm and head, frozen as at the start (ZeroLock).",
            "choices": ["reconstruction", "readout"],
        },
    )
    reconstruction_weight: float = field(
        default=10.0, metadata={"help": "Weight (lambda) of the mean local loss (paper, Sec. 3: 10)."}
    )
    reconstruction_bottleneck: int = field(
        default=4, metadata={"help": "Divisor of the reconstruction head's inner width (paper, Sec. 3: 4)."}
    )
    reconstruction_mask: str = field(
        default="attention",
        metadata={
            "help": "Positions that count in the local loss: 'attention' leaves padding out (paper, App. L), 'none' "
            "counts it too (released code).",
            "choices": ["attention", "none"],
        },
    )
    early_learning_rate: float | None = field(
        default=None,
        metadata={"help": "Learning rate of early blocks, embeddings and heads. Default: `learning_rate` (paper)."},
    )
    local_backward: str = field(
        default="auto",
        metadata={
            "help": "'eager' runs a block's local backward as soon as the block is done and frees its activations "
            "(paper, App. L), 'joint' adds the local losses to the task loss (released code), 'auto' is eager where "
            "it works: one process or DDP.",
            "choices": ["auto", "eager", "joint"],
        },
    )
    local_update_interval: int = field(
        default=1,
        metadata={
            "help": "Update the early blocks at every n-th optimizer step only; at the others they run without "
            "gradients (ours; paper: 1)."
        },
    )
    local_step: bool = field(
        default=False,
        metadata={
            "help": "Step each early block right after its local backward and free its gradients before the next "
            "block runs (paper, App. L): the same weights with one block's gradients in memory at a time."
        },
    )
    clip_scope: str = field(
        default="block",
        metadata={
            "help": "Clip the gradient of each block at `max_grad_norm` (paper, App. L), or of all together: 'global' "
            "(released code).",
            "choices": ["block", "global"],
        },
    )
    tied_embeddings: str = field(
        default="untie",
        metadata={
            "help": "Where the LM head shares the input embedding: 'untie' gives the head a copy (paper and code), "
            "'freeze' keeps both tied and frozen.",
            "choices": ["untie", "freeze"],
        },
    )
    train_early_blocks: bool = field(
        default=True, metadata={"help": "Set to False to freeze early blocks and embeddings (paper's control)."}
    )
    log_drift: bool = field(
        default=False,
        metadata={"help": "Log each block's relative weight drift from the start; keeps a copy of the weights."},
    )

    def __post_init__(self) -> None:
        # First of all: transformers' own checks need the engine that they are for to be installed.
        self._check_ranges()
        self._check_choices()
        self._check_objective()
        self.pick_local_backward()
        self._check_engine()
        self._check_local_step()
        # transformers refuses bf16, the default of TRL's configs, on a machine without an accelerator unless told
        # that this is meant.
        if not torch.accelerator.is_available():
            self.use_cpu = True
        super().__post_init__()

    @property
    def sharding_engine(self) -> str | None:
        """`"FSDP"` or `"DeepSpeed"` if the run shards the model, as its arguments or `accelerate launch` say."""
        if self.fsdp or parse_flag_from_env("ACCELERATE_USE_FSDP"):
            return "FSDP"
        if self.deepspeed or parse_flag_from_env("ACCELERATE_USE_DEEPSPEED"):
            return "DeepSpeed"
        return None

    def pick_local_backward(self) -> Literal["eager", "joint"]:
        """Resolves `local_backward="auto"` to `"eager"` or `"joint"`.

        Raises:
            ValueError: If `"eager"` is asked for where the engine or the optimizer must see one backward per step.
        """
        engine = self.sharding_engine
        if engine is None and self.optim in ("lomo", "adalomo"):
            engine = f"optim={OptimizerNames(self.optim).value!r}"
        if self.local_backward == "eager" and engine is not None:
            raise ValueError(
                f"local_backward='eager' does not work under {engine}, which must see one backward per step; "
                "set local_backward to 'joint' or leave it at 'auto'."
            )
        if self.local_backward == "joint" or engine is not None:
            return "joint"
        return "eager"

    def _check_objective(self) -> None:
        if self.local_objective != "readout":
            return
        for name in ("reconstruction_weight", "reconstruction_bottleneck", "reconstruction_mask"):
            value, default = getattr(self, name), type(self).__dataclass_fields__[name].default
            if value != default:
                raise ValueError(
                    f"{name}={value!r} does nothing with local_objective='readout', whose weight is 1 and which "
                    "counts the tokens that have a label; leave it out, or set local_objective to 'reconstruction'."
                )
        if self.sharding_engine is not None:
            raise ValueError(
                f"local_objective='readout' does not work under {self.sharding_engine}, which shards the norm and "
                "head that it reads through; set it to 'reconstruction'."
            )

    def _check_engine(self) -> None:
        engine = self.sharding_engine
        if engine == "DeepSpeed" and self.clip_scope == "block":
            raise ValueError("clip_scope='block' does not work under DeepSpeed, which clips; set it to 'global'.")
        if engine is not None and self.log_drift:
            raise ValueError(
                f"log_drift=True does not work under {engine}, which shards the weights; set it to False."
            )

    def _check_local_step(self) -> None:
        if not self.local_step:
            return
        optim = f"optim={OptimizerNames(self.optim).value!r}"
        engine = self.sharding_engine
        launched_as = os.environ.get("ACCELERATE_MIXED_PRECISION")  # counts where neither fp16 nor bf16 is set
        is_fp16 = self.fp16 or (self.bf16 is False and launched_as == "fp16")
        conflicts = [
            (self.clip_scope == "global", "clip_scope='global', one norm of all blocks; set clip_scope to 'block'"),
            (self.local_backward == "joint", "local_backward='joint', one backward for all; set it to 'eager'"),
            (engine is not None, f"{engine}, which must see one backward per step; use one process or DDP"),
            (self.pick_local_backward() == "joint", f"{optim}, which must see one backward per step; choose another"),
            (self.optim.endswith("layerwise"), f"{optim}, which steps in the backward; choose another"),
            (not self.train_early_blocks, "train_early_blocks=False, which leaves it nothing to do; set it to True"),
            (self.enable_jit_checkpoint, "enable_jit_checkpoint=True, which may save in mid-step; set it to False"),
            (is_fp16, "fp16, where an overflow in one block skips the step of all; use bf16"),
        ]
        for exists, conflict in conflicts:
            if exists:
                raise ValueError(f"local_step=True does not work with {conflict}, or set local_step to False.")

    def _check_ranges(self) -> None:
        lowest = {
            "num_blocks": 2,
            "reconstruction_weight": 0.0,
            "reconstruction_bottleneck": 1,
            "local_update_interval": 1,
            "early_learning_rate": 0.0,
        }
        for name, bound in lowest.items():
            value = getattr(self, name)
            if value is None and name == "early_learning_rate":
                continue
            kind = int if isinstance(bound, int) else (int, float)
            if not isinstance(value, kind) or not math.isfinite(value):
                raise ValueError(f"{name}={value!r} must be a{'n integer' if kind is int else ' finite number'}.")
            if value < bound:
                raise ValueError(f"{name}={value} is too low; it must be at least {bound}.")
        if isinstance(self.split_at, int):  # `split_at: 7` in a YAML
            self.split_at = [self.split_at]
        if self.split_at is not None and not all(isinstance(index, int) for index in self.split_at):
            raise ValueError(f"split_at={self.split_at} must be a list of integers.")
        if self.split_at is not None and len(self.split_at) != self.num_blocks - 1:
            raise ValueError(
                f"split_at={self.split_at} makes {len(self.split_at) + 1} blocks but num_blocks={self.num_blocks}; "
                f"set num_blocks to {len(self.split_at) + 1} or give {self.num_blocks - 1} indices."
            )
        if self.split_at is not None and any(
            b <= a for a, b in zip([0, *self.split_at[:-1]], self.split_at, strict=True)
        ):
            raise ValueError(f"split_at={self.split_at} must be strictly increasing layer indices, from 1 on.")

    def _check_choices(self) -> None:
        for name in ("local_objective", "reconstruction_mask", "local_backward", "clip_scope", "tied_embeddings"):
            choices = type(self).__dataclass_fields__[name].metadata["choices"]
            if getattr(self, name) not in choices:
                raise ValueError(f"{name}={getattr(self, name)!r} is unknown; choose one of {', '.join(choices)}.")


@dataclass
class LoPTConfig(LocalLearningArguments, SFTConfig):
    """Configuration of [`LoPTTrainer`]: every argument of [`~trl.SFTConfig`] and those of local learning.

    On a machine without an accelerator `use_cpu` is set, so that the defaults run.
    """
