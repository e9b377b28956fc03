"""The gradient boundary: capture a block's input, run its local objective, detach its output.

Hooks on a stock decoder's layers; the model's own forward is never re-implemented. Shapes: B batch, T tokens, D hidden
channels.
"""

import contextlib
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

from lopt_hf.common.upstream.transformers import active_collector as _active_collector
from lopt_hf.local.blocks import Block, find_decoder_stack, parameters_by_block
from lopt_hf.local.objectives import LocalBatch, LocalObjective

__all__ = ["GradientBoundary", "make_heads"]

RunBackward = Callable[[int, torch.Tensor], None]


def make_heads(
    objective: LocalObjective,
    hidden_size: int,
    blocks: Sequence[Block],
    seed: int,
    only: Sequence[Block] | None = None,
) -> nn.ModuleDict:
    """Makes one head for each early block from a seed of their own.

    The random state is restored afterwards, so that data order and dropout are those of the run without heads.

    Args:
        objective: What makes a head.
        hidden_size: Width D of the hidden states.
        blocks: All blocks of the decoder; all but the last get a head.
        seed: Where the heads' random state starts.
        only: The early blocks that learn in this process; their heads are the same as if all were made.

    Returns:
        The heads by block index, as text.
    """
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        heads = {block.index: objective.make_head(hidden_size) for block in blocks[:-1]}
    kept = blocks[:-1] if only is None else only
    return nn.ModuleDict({str(block.index): heads[block.index] for block in kept})


class GradientBoundary:
    """Keeps the gradient of each block of a decoder inside that block.

    Between `with boundary.training_forward(...)` and its end, every gradient-enabled forward of the model
    1. captures each early block's input at its first layer,
    2. computes the block's local loss on its last layer's output,
    3. runs that loss's backward at once (`mode="eager"`), which frees the block's activations before the next block
       starts, or keeps it for `joint_loss()` (`mode="joint"`),
    4. hands the detached output to the next block.

    Outside of it, and wherever gradients are disabled (evaluation, generation, reference models), the hooks do
    nothing, so outputs are bit-identical to the stock model's.

    Mixture-of-experts models: the load-balancing loss of an early block's own routers joins its local loss, with the
    weight per layer that it has in end-to-end training; the task loss sees these routers' logits detached.

    Attributes:
        losses: Of the last micro-batch, the local losses of each early block.
        around_backward: Makes a context for each backward that runs within the forward, to time it for instance.

    Args:
        model: A `transformers` causal language model (of a `PeftModel`, its base model).
        blocks: The cut of its decoder layers, from `split_layers`.
        objective: The local objective of the early blocks.
        heads: The heads of the early blocks that run in this process, from `make_heads`.
        weight: Factor of the sum of the local losses over the early blocks. Their mean is weighted by LoPT's
            lambda: pass `lambda / (num_blocks - 1)`.
        mode: When the local backward runs; see above.
        router_coefficient: Weight of the load-balancing loss; 0 where the model has no routers.
        early_blocks: The early blocks that run in this process. Default: all but the last.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        blocks: Sequence[Block],
        objective: LocalObjective,
        heads: nn.ModuleDict,
        weight: float,
        mode: Literal["eager", "joint"],
        router_coefficient: float = 0.0,
        early_blocks: Sequence[Block] | None = None,
    ) -> None:
        self.model = model
        self.stack = find_decoder_stack(model)
        self.blocks = list(blocks)
        self.early_blocks = list(blocks[:-1]) if early_blocks is None else list(early_blocks)
        self.objective = objective
        self.heads = heads
        self.weight = weight
        self.mode = mode
        self.router_coefficient = router_coefficient
        self.losses: dict[int, list[torch.Tensor]] = {}
        self.around_backward: Callable[[], contextlib.AbstractContextManager[None]] = contextlib.nullcontext
        self._joint_losses: list[torch.Tensor] = []
        self._active = False
        self._update_early = True
        self._scale = 1.0
        self._inputs: Mapping[str, Any] = {}
        self._run_backward: RunBackward | None = None
        self._in_forward = False
        self._mask_BT: torch.Tensor | None = None
        self._input_BTD: torch.Tensor | None = None
        self._routers_seen = 0
        self._unchecked = set(range(len(self.blocks)))
        self._handles = self._install_hooks()

    def _install_hooks(self) -> list[torch.utils.hooks.RemovableHandle]:
        decoder, layers = self.stack.decoder, self.stack.layers
        handles = [
            decoder.register_forward_pre_hook(self._enter_decoder, with_kwargs=True),
            decoder.register_forward_hook(self._leave_decoder, always_call=True),
        ]
        for block in self.early_blocks:
            handles.append(layers[block.start].register_forward_pre_hook(self._enter_block, with_kwargs=True))
            handles.append(layers[block.stop - 1].register_forward_hook(_LeaveBlock(self, block.index)))
        return handles

    def remove(self) -> None:
        """Takes the hooks off the model, which is then a stock model again."""
        for handle in self._handles:
            handle.remove()

    @contextlib.contextmanager
    def training_forward(
        self,
        run_backward: RunBackward,
        scale: float = 1.0,
        update_early_blocks: bool = True,
        inputs: Mapping[str, Any] | None = None,
    ) -> Iterator[None]:
        """Switches the boundary on for the forwards of one micro-batch.

        Args:
            run_backward: Called with a block's index and its weighted loss to run the local backward (`"eager"` only).
            scale: Factor of the eager local losses, `1 / accumulation steps`.
            update_early_blocks: Without it the early blocks run without gradients: no local loss, no graph.
            inputs: The micro-batch, for the local objective.
        """
        self.losses = {block.index: [] for block in self.early_blocks}
        self._joint_losses = []
        self._scale, self._update_early, self._inputs = scale, update_early_blocks, inputs or {}
        self._run_backward = run_backward
        self._active = True
        try:
            yield
        finally:
            self._active = False
            # The hooks live as long as the model; they must not keep a trainer and its optimizer alive.
            self._run_backward, self._inputs = None, {}

    def joint_loss(self) -> torch.Tensor | None:
        """The weighted sum of the local losses of the last `training_forward`, to add to the task loss (`"joint"`)."""
        return torch.stack(self._joint_losses).sum() if self._joint_losses else None

    def check_task_loss(self, loss: torch.Tensor) -> None:
        """Raises `RuntimeError` if the first task loss reaches a parameter of an early block."""
        self._check_reach(len(self.blocks) - 1, loss)

    def finish(self, run_backward: RunBackward) -> None:
        """Ends a micro-batch after the task loss's backward. Here nothing is left to do; windows reach further."""

    def _enter_decoder(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        self._in_forward = self._active and torch.is_grad_enabled()
        if not self._in_forward:
            return
        mask = inspect.signature(module.forward).bind_partial(*args, **kwargs).arguments.get("attention_mask")
        self._mask_BT = mask if isinstance(mask, torch.Tensor) and mask.ndim == 2 else None
        self._routers_seen = 0
        if self.early_blocks and not self._update_early:
            # Ends at the last boundary; `_leave_decoder` also restores it should a layer raise before.
            torch.set_grad_enabled(False)

    def _leave_decoder(self, module: nn.Module, args: tuple, output: Any) -> None:
        if self._in_forward:
            torch.set_grad_enabled(True)
        self._in_forward = False
        self._mask_BT = self._input_BTD = None

    def _enter_block(self, layer: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict] | None:
        if not self._in_forward or not self._update_early:
            return None
        hidden_BTD = args[0] if args else kwargs["hidden_states"]
        self._input_BTD = hidden_BTD.detach()
        if hidden_BTD.requires_grad or not self.model.is_activation_checkpointing:
            return None
        # Reentrant checkpointing gives no gradient at all unless an input of the checkpointed layer requires one,
        # and frozen embeddings do not.
        hidden_BTD = self._input_BTD.requires_grad_()
        self._input_BTD = hidden_BTD.detach()
        return ((hidden_BTD, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": hidden_BTD})

    def _leave_block(self, index: int, output_BTD: torch.Tensor) -> torch.Tensor:
        """Runs the block's local objective and returns the tensor that the next block starts from."""
        if self._update_early:
            loss = self._local_loss(index, output_BTD)
            self._check_reach(index, loss)
            if self.mode == "eager":
                self._backward_now(index, loss * self._scale)
            else:
                self._joint_losses.append(loss)
        elif index == len(self.blocks) - 2:
            torch.set_grad_enabled(True)
        else:
            return output_BTD
        # Without `requires_grad_` reentrant checkpointing would silently freeze everything above the boundary.
        return output_BTD.detach().requires_grad_()

    def _local_loss(self, index: int, output_BTD: torch.Tensor) -> torch.Tensor:
        assert self._input_BTD is not None
        batch = LocalBatch(mask_BT=self._local_mask(output_BTD), inputs=self._inputs)
        loss = self.objective(self.heads[str(index)], output_BTD, self._input_BTD, batch)
        self.losses[index].append(loss.detach())
        balance = self._load_balancing_loss()
        return loss * self.weight if balance is None else loss * self.weight + balance

    def _local_mask(self, output_BTD: torch.Tensor) -> torch.Tensor | None:
        if self._mask_BT is None or self._mask_BT.shape != output_BTD.shape[:2]:
            return None
        return self._mask_BT.to(output_BTD.device)

    def _load_balancing_loss(self) -> torch.Tensor | None:
        """The load-balancing loss of the routers that ran since the last boundary, whose logits it detaches."""
        collected = _active_collector.get() or {}
        logits = collected.get("router_logits")
        if not logits or self.router_coefficient == 0.0:
            return None
        own = tuple(logits[self._routers_seen :])
        self._routers_seen = len(logits)
        logits[:] = [layer_logits.detach() for layer_logits in logits]
        config = self.model.config.get_text_config(decoder=True)
        share = self.router_coefficient * len(own) / len(self.stack.layers)
        loss = load_balancing_loss_func(own, config.num_experts, config.num_experts_per_tok, self._mask_BT)
        return share * torch.as_tensor(loss)

    def _backward_now(self, index: int, loss: torch.Tensor) -> None:
        with self._outside_the_forward(loss.device.type):
            assert self._run_backward is not None
            self._run_backward(index, loss)

    @contextlib.contextmanager
    def _outside_the_forward(self, device_type: str) -> Iterator[None]:
        """For a backward that runs within the model's forward: nothing of that forward's state applies to it."""
        # A checkpointed layer runs again in its backward; its outputs must not be collected a second time.
        token = _active_collector.set(None)
        try:
            with torch.autocast(device_type, enabled=False), self.around_backward():
                yield
        finally:
            _active_collector.reset(token)
        # Autocast keeps its low-precision copies of the block's weights until the forward ends.
        if torch.is_autocast_enabled(device_type):
            torch.clear_autocast_cache()

    def _check_reach(self, index: int, loss: torch.Tensor) -> None:
        """Raises if the first loss of a block reaches a parameter of another block. Costs nothing where it doesn't."""
        if index not in self._unchecked or not loss.requires_grad:
            return
        self._unchecked.discard(index)
        owned = parameters_by_block(self.model, self.stack, self.blocks)
        foreign = {
            name: parameter
            for other, parameters in enumerate(owned)
            for name, parameter in parameters.items()
            if other != index and parameter.requires_grad and "local_heads." not in name
        }
        if not foreign:
            return
        gradients = torch.autograd.grad(loss, list(foreign.values()), retain_graph=True, allow_unused=True)
        reached = [name for name, gradient in zip(foreign, gradients, strict=True) if gradient is not None]
        if reached:
            raise RuntimeError(
                f"The loss of block {index} reaches {reached[0]!r}, which belongs to another block. The blocks of "
                f"{type(self.model).__name__} share weights (inputs for every layer, as in Gemma 3n, for instance), "
                "and local learning cannot separate them; please report the architecture."
            )


class _LeaveBlock:
    """The forward hook on the last layer of one early block."""

    def __init__(self, boundary: GradientBoundary, index: int) -> None:
        self.boundary = boundary
        self.index = index

    def __call__(self, layer: nn.Module, args: tuple, output: Any) -> Any:
        if not self.boundary._in_forward:
            return None
        if isinstance(output, tuple):  # Falcon's layers also return their attention weights
            return (self.boundary._leave_block(self.index, output[0]), *output[1:])
        return self.boundary._leave_block(self.index, output)
