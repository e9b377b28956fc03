"""Which rows the check has, as data: another method or option is one line more."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

__all__ = ["BASELINE", "OPTION_ROWS", "STEP_ROWS", "UPDATE_ROWS", "MethodRow", "OptionRow", "UpdateRow"]

BASELINE = "end-to-end"
_REACH = {"local_objective": "none"}
_REENTRANT = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}}


@dataclass(frozen=True)
class MethodRow:
    """A way to train whose steps are measured.

    Attributes:
        name: Of the row.
        options: Arguments of the trainer: `LoPTTrainer`, or `SFTTrainer` where there is no `num_blocks`.
        plan: The row of the plan that predicts it; `None` if the planner does not know it.
        lora: Whether adapters are trained.
        cycle: Number of steps after which they are alike again.
    """

    name: str
    options: Mapping[str, Any] = field(default_factory=dict)
    plan: str | None = None
    lora: bool = False
    cycle: int = 1


# The first ones have targets. The second end-to-end row shows how much of a difference in time is the machine's.
STEP_ROWS = (
    MethodRow(BASELINE, plan="end-to-end"),
    MethodRow("LoPT K=2", {"num_blocks": 2}, "LoPT K=2"),
    MethodRow("LoPT K=4", {"num_blocks": 4}, "LoPT K=4"),
    MethodRow("K=4, reach 1,1,1,4", {**_REACH, "num_blocks": 4, "task_reach": [1, 1, 1, 4]}, cycle=4),
    MethodRow("end-to-end, again", plan="end-to-end"),
    MethodRow("LoPT K=8", {"num_blocks": 8}, "LoPT K=8"),
    MethodRow("LoPT K=4, local step", {"num_blocks": 4, "local_step": True}, "LoPT K=4, local step"),
    MethodRow("LoPT K=4, local step, in parts", {"num_blocks": 4, "local_step": True, "clip_scope": "part"}),
    MethodRow("end-to-end + checkpointing", _REENTRANT, "end-to-end + checkpointing"),
    MethodRow("LoRA r=16", plan="LoRA r=16", lora=True),
    MethodRow("freeze 1 of 2 blocks", {"num_blocks": 2, "train_early_blocks": False}, "freeze 1 of 2 blocks"),
    MethodRow("LoPT K=2, local step", {"num_blocks": 2, "local_step": True}, "LoPT K=2, local step"),
    MethodRow("LoPT K=8, local step", {"num_blocks": 8, "local_step": True}, "LoPT K=8, local step"),
    MethodRow("LoPT K=4 + checkpointing", {"num_blocks": 4, **_REENTRANT}, "LoPT K=4 + checkpointing"),
    MethodRow("K=2, reach 1,1,1,2", {**_REACH, "num_blocks": 2, "task_reach": [1, 1, 1, 2]}, cycle=4),
    MethodRow("LoPT K=2, joint (released code)", {"num_blocks": 2, "local_backward": "joint"}),
)


@dataclass(frozen=True)
class UpdateRow:
    """A run whose changes to the weights are compared with those of another.

    Attributes:
        name: Of the row.
        weights: Type of the weights.
        precision: `"bf16"` or `"fp16"` (autocast), or `"no"`.
        tolerance: Largest difference that counts as equal; the row of its kind that has none is what the others are
            compared with.
        options: Arguments of `LoPTTrainer` besides those that all rows have.
        on_cpu: Whether it runs on the CPU: the reference of another device.
        needs: See `Case`.
    """

    name: str
    weights: str
    precision: str
    tolerance: float | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    on_cpu: bool = False
    needs: tuple[str, ...] = ()

    @property
    def kind(self) -> str:
        """Rows of one kind are compared: those of the same types and optimizer."""
        return f"{self.weights}, {self.precision}, {self.options.get('optim', 'sgd')}"

    @property
    def is_joint(self) -> bool:
        """Whether there is one backward for all losses."""
        return self.options.get("local_backward") == "joint"


_ADAM = {"optim": "adamw_torch_fused", "learning_rate": 1e-3}
_LOCAL_STEP = {"local_step": True}
_JOINT = {"local_backward": "joint"}
# Relative differences, ours: another order of additions differs by some rounding, which a step of AdamW makes larger
# where a gradient is near zero. What is wrong differs by far more than any of them.
_FP32, _ADAM_FP32, _OTHER_DEVICE, _HALF = 1e-5, 1e-3, 1e-3, 1e-2
UPDATE_ROWS = (
    UpdateRow("fp32: eager", "float32", "no"),
    UpdateRow("fp32: eager, again", "float32", "no", _FP32),
    UpdateRow("fp32: joint", "float32", "no", _FP32, _JOINT),
    UpdateRow("fp32: local step", "float32", "no", _FP32, _LOCAL_STEP),
    UpdateRow("fp32: eager, checkpointing", "float32", "no", _FP32, _REENTRANT),
    UpdateRow("fp32: eager, non-reentrant checkpointing", "float32", "no", _FP32, {"gradient_checkpointing": True}),
    UpdateRow("fp32, AdamW: eager", "float32", "no", None, _ADAM),
    UpdateRow("fp32, AdamW: local step", "float32", "no", _ADAM_FP32, _ADAM | _LOCAL_STEP),
    UpdateRow("bf16 autocast: eager", "float32", "bf16"),
    UpdateRow("bf16 autocast: joint", "float32", "bf16", _HALF, _JOINT),
    UpdateRow("bf16 autocast: local step", "float32", "bf16", _HALF, _LOCAL_STEP),
    UpdateRow("bf16 weights: eager", "bfloat16", "bf16"),
    UpdateRow("bf16 weights: joint", "bfloat16", "bf16", _HALF, _JOINT),
    UpdateRow("bf16 weights: local step", "bfloat16", "bf16", _HALF, _LOCAL_STEP),
    UpdateRow("fp16 autocast: eager", "float32", "fp16", needs=("cuda",)),
    UpdateRow("fp16 autocast: joint", "float32", "fp16", _HALF, _JOINT, needs=("cuda",)),
    UpdateRow("fp32: eager on the CPU", "float32", "no", _OTHER_DEVICE, on_cpu=True, needs=("cuda",)),
)


@dataclass(frozen=True)
class OptionRow:
    """An option of the trainers or of the model, compared with the run without it.

    Attributes:
        name: Of the option.
        options: Arguments of the trainer.
        attention: `attn_implementation` of the model.
        needs: See `Case`.
        precision: `"no"` where the option allows: there a difference shows.
        apart: Seconds for a part of its own, for what changes the process for good or takes long.
    """

    name: str
    options: Mapping[str, Any] = field(default_factory=dict)
    attention: str = "sdpa"
    needs: tuple[str, ...] = ()
    precision: str = "no"
    apart: float | None = None

    @property
    def tolerance(self) -> float:
        """Other kernels for the same sums differ by some rounding, in fp32 or in bf16."""
        return 1e-3 if self.precision == "no" else 5e-2


OPTION_ROWS = (
    OptionRow("activation offloading", {"activation_offloading": True}, needs=("cuda",)),
    OptionRow("flex attention", attention="flex_attention", needs=("cuda",)),
    OptionRow("flash attention 2", attention="flash_attention_2", needs=("cuda", "flash_attn"), precision="bf16"),
    OptionRow("Liger kernels", {"use_liger_kernel": True}, needs=("cuda", "liger_kernel"), apart=45),
    OptionRow("torch_compile", {"torch_compile": True}, needs=("cuda",), apart=120),
)
