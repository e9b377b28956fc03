"""What a method of local learning must know of the run that it is used in."""

from dataclasses import dataclass

__all__ = ["LOMO", "NEXT_TOKEN_MISFITS", "RunFacts", "steps_in_backward"]

# Why early blocks cannot learn the next token of what a trainer for preferences or policies runs forward.
NEXT_TOKEN_MISFITS = {
    "DPO": "early blocks would learn the rejected answers as they learn the chosen ones",
    "GRPO": "early blocks would learn to repeat every completion, whatever its reward",
}

# The optimizers, by their names in transformers, that update the model in its backward
LOMO = ("lomo", "adalomo")


def steps_in_backward(optim: str) -> bool:
    """Whether an optimizer of this name steps in the backward, which takes no rates of parameter groups."""
    return optim in LOMO or optim.endswith("layerwise")


@dataclass(frozen=True)
class RunFacts:
    """What a method of local learning must know of the run that it is used in; the default is a bare loop.

    Attributes:
        task: `"SFT"`, `"DPO"` or `"GRPO"`.
        engine: `"FSDP2"`, `"FSDP1"` or `"DeepSpeed"` if the run shards the model; what of its set-up matters follows
            the name, as in `"FSDP2 with NO_WRAP"`.
        optim: The optimizer's name, of `TrainingArguments.optim`.
        is_fp16: Whether gradients are scaled for fp16.
        reentrant_checkpointing: Whether activations are checkpointed in the reentrant form.
        may_save_in_mid_step: Whether a checkpoint may be written when a signal comes.
        accumulation_steps: Micro-batches of an optimizer step.
        is_compiled: Whether the model is compiled by `torch.compile`.
        uses_liger: Whether Liger's kernels stand in for parts of the model.
        offloads_activations: Whether what is kept for the backward waits in the host's memory.
    """

    task: str = "SFT"
    engine: str | None = None
    optim: str = "adamw_torch_fused"
    is_fp16: bool = False
    reentrant_checkpointing: bool = False
    may_save_in_mid_step: bool = False
    accumulation_steps: int = 1
    is_compiled: bool = False
    uses_liger: bool = False
    offloads_activations: bool = False

    @property
    def wants_one_backward(self) -> str | None:
        """What must see one backward per step, if anything: the engine, or the optimizer."""
        if self.engine not in (None, "FSDP2"):
            return self.engine
        return f"optim={self.optim!r}" if self.optim in LOMO else None

    @property
    def needs_one_traversal(self) -> str | None:
        """What takes a graph's second backward for its first, or has nothing left for it, and why."""
        if self.uses_liger:  # its SwiGLU writes gradients over what it kept, which autograd does not notice
            return "use_liger_kernel=True, whose kernels write over what they keep"
        return "activation_offloading=True, which keeps nothing after it" if self.offloads_activations else None
