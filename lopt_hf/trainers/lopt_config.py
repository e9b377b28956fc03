"""Arguments of local learning, alone (`LocalLearningArguments`) and with TRL's SFT arguments (`LoPTConfig`)."""

import os
from dataclasses import dataclass, field
from typing import ClassVar, Literal

from transformers.training_args import OptimizerNames
from trl import SFTConfig

from lopt_hf.trainers.block_arguments import BlockLearningArguments

__all__ = ["LoPTConfig", "LocalLearningArguments"]


@dataclass
class LocalLearningArguments(BlockLearningArguments):
    """Arguments that LoPT adds to a TRL trainer's config; mix it in before the config class.

    Those of `BlockLearningArguments` are among them.

    Sources: LoPT, arXiv 2605.04913 v3 ("paper"), and its released code, HumyuShi/LoPT commit d4cb99e ("code").

    Parameters:
        local_objective: What the early blocks learn from. `"reconstruction"`: to keep their input recoverable (paper,
            Sec. 3). `"readout"`: the next token, read through the model's final norm and LM head as they were at the
            start, at weight 1 for every block (ZeroLock's form, arXiv 2608.07974); the `reconstruction_*` arguments
            do not apply; for supervised fine-tuning only. An objective that is passed to the trainer takes the place
            of both.
        reconstruction_weight: lambda, the weight of the mean local loss over the early blocks. Paper, Sec. 3: 10.
        reconstruction_bottleneck: Divisor of the reconstruction head's inner width. Paper, Sec. 3: 4.
        reconstruction_mask: Which positions count in the local loss: `"attention"` leaves padding out (paper, App. L),
            `"none"` counts it too (code).
        local_backward: `"eager"` runs each block's local backward in the forward, as soon as the block is done
            (paper, App. L), which frees its activations; `"joint"` adds the local losses to the task loss (code).
            `"auto"` picks eager where it works: one process or DDP.
        local_update_interval: Update the early blocks at every n-th optimizer step only; at the others they run
            without gradients, which saves the arithmetic too. Ours; paper and code update at every step.
        local_step: Let an early block take its optimizer step right after its local backward, and free its gradients
            before the next block runs (paper, App. L): the gradients of one block are in memory at a time, not those
            of all; with `clip_scope="part"` less still. The weights end the same, bit for bit, unless a block reads
            another's weights (RepL's operators that do, next to a boundary). No use with `gradient_accumulation_steps`
            above 1: gradients that accumulate have to stay. Under DDP the step waits for the average of the block's
            gradients, which otherwise overlaps the next blocks. Callbacks (`on_pre_optimizer_step`) come when the last
            block is about to step, and the early ones have; step hooks of the optimizer run once for each block. Off,
            as in the released code.
        train_early_blocks: `False` freezes early blocks and embeddings (paper's control experiment).

    Raises:
        ValueError: If a value is out of range; the message names field, value and fix.
    """

    _lowest: ClassVar[dict[str, float]] = BlockLearningArguments._lowest | {
        "reconstruction_weight": 0.0,
        "reconstruction_bottleneck": 1,
        "local_update_interval": 1,
    }
    _chosen: ClassVar[tuple[str, ...]] = (
        "local_objective",
        "reconstruction_mask",
        "local_backward",
        *BlockLearningArguments._chosen,
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
    train_early_blocks: bool = field(
        default=True, metadata={"help": "Set to False to freeze early blocks and embeddings (paper's control)."}
    )

    def _check_engine(self) -> None:
        self._check_objective()
        self.pick_local_backward()
        super()._check_engine()
        self._check_local_step()

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


@dataclass
class LoPTConfig(LocalLearningArguments, SFTConfig):
    """Configuration of [`LoPTTrainer`]: every argument of [`~trl.SFTConfig`] and those of local learning.

    On a machine without an accelerator `use_cpu` is set, so that the defaults run.
    """
