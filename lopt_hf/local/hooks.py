"""The hooks that a boundary has on a stock decoder, whatever its losses are.

The model's own forward is never re-implemented. Shapes: B batch, T tokens, D hidden channels.
"""

import contextlib
import inspect
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any, Literal

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from lopt_hf.common.upstream.transformers import active_collector
from lopt_hf.local.blocks import Block
from lopt_hf.local.layer_calls import hidden_of, output_hidden, with_hidden, with_output_hidden
from lopt_hf.local.micro_batch import MicroBatch
from lopt_hf.local.objectives import LocalBatch, LocalObjective, NoObjective
from lopt_hf.local.reach_check import ReachCheck
from lopt_hf.local.replay import BlockRun, Replay, Replays
from lopt_hf.local.routers import RouterLogits, with_gradient_times
from lopt_hf.local.run_state import relative_difference
from lopt_hf.local.stacks import find_stack
from lopt_hf.local.stem import Stem, find_stem

__all__ = ["BlockBoundary", "Way", "cut"]


# How an early block runs in a forward: without a graph; with one of its own, for its local loss; without one, to run
# again when the task's gradient arrives; with the graph of all blocks that the task's gradient reaches.
Way = Literal["blind", "local", "again", "joined"]


class BlockBoundary(ABC):
    """Hooks on a decoder that turn the end of every early block into a boundary.

    Between `with boundary.training_forward(...)` and its end, every gradient-enabled forward of the model calls
    `leave_block` with each early block's output, and goes on from what it returns. Outside of it, and wherever
    gradients are disabled (evaluation, generation, reference models), the hooks do nothing, so outputs are
    bit-identical to the stock model's.

    An early block that the task's gradient is to reach (`MicroBatch.reach`) runs without a graph, and again with one
    in `finish`, where the blocks behind it have handed their gradient back; or it keeps its graph.

    Attributes:
        mode: Whether local backwards run in the forward (`"eager"`), or wait for the task's (`"joint"`).
        routers: The routers' load-balancing loss.
        check_reach: Raises if a block's loss reaches a parameter of another block.

    Args:
        model: A `transformers` causal language model (of a `PeftModel`, its base model).
        blocks: The cut of its decoder layers, from `split_layers`.
        objective: The local objective of the early blocks.
        heads: The heads of the early blocks that run in this process, by block index as text.
        router_coefficient: Weight of the load-balancing loss; 0 where the model has no routers.
        early_blocks: The early blocks that run in this process. Default: all but the last.
    """

    mode: Literal["eager", "joint"] = "eager"

    def __init__(
        self,
        model: PreTrainedModel,
        blocks: Sequence[Block],
        objective: LocalObjective,
        heads: nn.ModuleDict,
        router_coefficient: float = 0.0,
        early_blocks: Sequence[Block] | None = None,
    ) -> None:
        self.model = model
        self.stack = find_stack(model)
        self.blocks = list(blocks)
        self.early_blocks = list(blocks[:-1]) if early_blocks is None else list(early_blocks)
        self.objective = objective
        self.heads = heads
        self.routers = RouterLogits(model, len(self.stack.layers), router_coefficient)
        self.check_reach = ReachCheck(model, self.stack, self.blocks)
        self.micro_batch = MicroBatch()
        self._active = False
        self._in_forward = False
        self._mask_BT: torch.Tensor | None = None
        self._given_mask_BT: torch.Tensor | None = None  # to the model around the decoder
        self._left: set[int] = set()  # the blocks that have run in this forward
        self._unchecked_replays = set(range(len(self.blocks)))
        self._replays: Replays | None = None
        self._stem: Stem | None = None
        self._handles = self._install_hooks()

    def _install_hooks(self) -> list[RemovableHandle]:
        decoder, layers = self.stack.decoder, self.stack.layers
        handles = [
            decoder.register_forward_pre_hook(self._enter_decoder, with_kwargs=True),
            decoder.register_forward_hook(self._leave_decoder, always_call=True),
        ]
        around = {self.model, self.model.base_model} - {decoder}
        handles += [module.register_forward_pre_hook(self._note_mask, with_kwargs=True) for module in around]
        for block in self.early_blocks:
            enter = partial(self._enter_block, block.index)
            handles.append(layers[block.start].register_forward_pre_hook(enter, with_kwargs=True))
            leave = partial(self._leave_block, block.index)
            handles.append(layers[block.stop - 1].register_forward_hook(leave))
        return handles

    @property
    def learns_locally(self) -> bool:
        """Whether early blocks have an objective beside the task's."""
        return not isinstance(self.objective, NoObjective)

    @property
    def in_forward(self) -> bool:
        """Whether a forward that learns locally is under way."""
        return self._in_forward

    def recompute_reached(self) -> None:
        """Lets early blocks that the task's gradient reaches run again, from now on, and keep no graph until then.

        An image classifier's stem does so too.
        """
        self._replays = Replays(self.stack, self.early_blocks)
        self._handles += self._replays.handles
        modules = find_stem(self.model, self.stack)
        if modules:
            self._stem = Stem(modules)
            self._handles += self._stem.handles

    def remove(self) -> None:
        """Takes the hooks off the model, which is then a stock model again."""
        for handle in self._handles:
            handle.remove()

    # ---- One micro-batch ----

    @contextlib.contextmanager
    def training_forward(self, micro_batch: MicroBatch) -> Iterator[None]:
        """Switches the boundary on for the forwards of one micro-batch.

        Args:
            micro_batch: What they are given, and what to call back.
        """
        self.micro_batch = micro_batch
        self.check_reach.look_again(micro_batch.inputs)
        self.begin()
        self._active = True
        records = torch.is_grad_enabled()
        try:
            yield
        finally:
            self._active = False
            torch.set_grad_enabled(records)  # which `_leave_decoder` does not after Ctrl-C
            # The hooks live as long as the model; they must not keep a trainer and its optimizer alive.
            self.micro_batch = MicroBatch()
            self._given_mask_BT = None

    def begin(self) -> None:
        """Prepares for a micro-batch."""

    @abstractmethod
    def named_losses(self) -> dict[str, list[torch.Tensor]]:
        """Returns the last micro-batch's local losses by name, such as `block_0`; one for each forward."""

    def joint_loss(self) -> torch.Tensor | None:
        """Returns what of the last micro-batch's local losses is to be added to the task loss, if anything."""
        return None

    def check_task_loss(self, loss: torch.Tensor, reach: int = 1) -> None:
        """Raises `RuntimeError` if the first task loss reaches a parameter of a block that it must not reach.

        Args:
            loss: The task loss.
            reach: The micro-batch's reach.
        """
        last = len(self.blocks) - 1
        self.check_reach(last, loss, last if self._replays is not None else len(self.blocks) - reach)

    def finish(self, micro_batch: MicroBatch) -> None:
        """Ends a micro-batch; to be called after the task loss's backward.

        Args:
            micro_batch: The one that `training_forward` was given.
        """
        last = len(self.blocks) - 1
        if micro_batch.reach == 1:
            return
        micro_batch.events.on_block_done(last)
        forwards = self._replays.forwards if self._replays is not None else []
        for index in range(last - 1, last - micro_batch.reach, -1):
            for number, runs in enumerate(forwards, start=1):
                more_come = number < len(forwards)
                with micro_batch.events.before_more() if more_come else contextlib.nullcontext():
                    self._learn_again(index, runs.pop(index), micro_batch)
            micro_batch.events.on_block_done(index)
        self.abandon()

    def abandon(self) -> None:
        """Frees what a micro-batch that did not come to its end has left."""
        if self._replays is not None:
            self._replays.clear()

    # ---- What a boundary does: the subclasses ----

    def enter_decoder(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """Begins a forward of the decoder with these arguments."""

    def leave_decoder(self) -> None:
        """Ends a forward of the decoder, also one in which an error was raised."""

    def local_target(self, hidden_BTD: torch.Tensor) -> torch.Tensor:
        """Returns what a local objective is given as the input of the block that starts from these hidden states."""
        return hidden_BTD.detach()

    def enter_block(self, hidden_BTD: torch.Tensor) -> torch.Tensor:
        """Returns the hidden states that an early block starts from, given those that reach it."""
        return hidden_BTD

    @abstractmethod
    def leave_block(self, index: int, output_BTD: torch.Tensor) -> torch.Tensor:
        """Returns the hidden states that the next block starts from, given an early block's output."""

    def local_loss_again(self, index: int, output_BTD: torch.Tensor, run: BlockRun) -> torch.Tensor | None:
        """Returns the weighted local loss, if any, of a block that has run again.

        Args:
            index: The block's index.
            output_BTD: The block's output, cut off its graph.
            run: The block's first run.
        """
        return None

    # ---- The hooks ----

    @property
    def _first_reached(self) -> int:
        return len(self.blocks) - self.micro_batch.reach

    def way(self, index: int) -> Way:
        """Returns how an early block is to run in the micro-batch."""
        if index >= self._first_reached:
            return "joined" if self._replays is None else "again"
        return "local" if self.micro_batch.trains_early_blocks else "blind"

    def _note_mask(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self._active:
            self._given_mask_BT = kwargs.get("attention_mask")

    def _enter_decoder(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._in_forward = self._active and torch.is_grad_enabled()
        if not self._in_forward:
            return
        self.enter_decoder(args, kwargs)
        mask = inspect.signature(module.forward).bind_partial(*args, **kwargs).arguments.get("attention_mask")
        if isinstance(mask, Mapping):  # Gemma 3 makes the layers' masks before it calls its decoder
            mask = self._given_mask_BT
        self._mask_BT = mask if isinstance(mask, torch.Tensor) and mask.ndim == 2 else None
        self.routers.begin_forward()
        self._left.clear()
        if self._replays is not None:
            self._replays.begin_forward()
        first_way = self.way(self.early_blocks[0].index) if self.early_blocks else "local"
        given = (*args, *kwargs.values())
        stem_runs_again = first_way == "again" and self._stem is not None and self._stem.enter(given)
        if first_way == "blind" or stem_runs_again:
            # Ends where a block learns; `_leave_decoder` also restores it should a layer raise before.
            torch.set_grad_enabled(False)

    def _leave_decoder(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if self._in_forward:
            torch.set_grad_enabled(True)
        self._in_forward = False
        self._mask_BT = None
        if self._replays is not None:
            self._replays.end_forward()
        if self._stem is not None:
            self._stem.forget()
        self.leave_decoder()

    def _enter_block(self, index: int, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if not self._in_forward or self.way(index) == "blind":
            return None
        hidden_BTD = hidden_of(args, kwargs)
        if self.way(index) == "again":
            assert self._replays is not None
            stem_run = self._stem.leave(hidden_BTD) if index == 0 and self._stem is not None else None
            self._replays.enter(index, hidden_BTD, self.local_target(hidden_BTD), stem_run)
            torch.set_grad_enabled(False)
            return None
        torch.set_grad_enabled(True)
        entered_BTD = self.enter_block(hidden_BTD)
        return None if entered_BTD is hidden_BTD else with_hidden(args, kwargs, entered_BTD)

    def _leave_block(self, index: int, layer: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        if not self._in_forward:
            return None
        self._check_runs_once(index)
        way, output_BTD = self.way(index), output_hidden(output)
        if way == "blind":
            self.routers.leave_to_task()
            if index + 1 < self._first_reached:
                return None
            next_BTD = cut(output_BTD)
        elif way == "local":
            next_BTD = self.leave_block(index, output_BTD)
        elif way == "joined":
            next_BTD = self._pass_through(index, output_BTD)
        else:
            next_BTD = self._leave_for_later(output_BTD)
        if index == len(self.blocks) - 2:
            torch.set_grad_enabled(True)
        return with_output_hidden(output, next_BTD)

    def _check_runs_once(self, index: int) -> None:
        """Raises if a block runs again in the same forward: its boundary would not be the one place where it ends."""
        if index in self._left:
            raise RuntimeError(
                f"The last layer of block {index} runs more than once in a forward of {type(self.model).__name__}, "
                "whose layers run in loops; local learning cannot cut there. Choose split_at so that no boundary lies "
                "in a loop, or another model."
            )
        self._left.add(index)

    def _pass_through(self, index: int, output_BTD: torch.Tensor) -> torch.Tensor:
        """Ends a block that the task's gradient reaches through its graph; returns what the next block starts from."""
        self.routers.leave_to_task(self.micro_batch.factor(index))
        return with_gradient_times(self.micro_batch.factor_across(index), output_BTD)

    def _leave_for_later(self, output_BTD: torch.Tensor) -> torch.Tensor:
        """Ends the first run of a block that will run again; returns the leaf that the next block starts from."""
        assert self._replays is not None
        next_BTD = cut(output_BTD)
        self._replays.leave(next_BTD, self.routers.leave_leaves_to_task(), self.local_batch(output_BTD))
        return next_BTD

    def _learn_again(self, index: int, run: BlockRun, micro_batch: MicroBatch) -> None:
        """Runs a block again and hands its cotangent back through it, to the block before or to the embeddings."""
        assert self._replays is not None and run.output_BTD is not None
        cotangent_BTD = run.output_BTD.grad
        if cotangent_BTD is None:  # this forward has no part in the loss
            return
        factor = micro_batch.factor_across(index)
        if factor != 1.0:
            cotangent_BTD = cotangent_BTD * factor
        run.scale_router_gradients(micro_batch.factor(index))
        is_first = index == len(self.blocks) - micro_batch.reach
        # Reentrant checkpointing gives no gradient unless an input requires one.
        learns_at_input = not is_first or run.is_behind_a_graph or self.model.is_activation_checkpointing
        replay = self._replays.run_again(index, run, learns_at_input)
        self._check_replay(index, run, replay, micro_batch)
        own_BTD = cut(replay.output_BTD)
        loss = None
        if micro_batch.trains_early_blocks:
            with torch.autocast(**run.autocast):
                loss = self.local_loss_again(index, own_BTD, run)
        device_type = cotangent_BTD.device.type
        with self.outside_the_forward(device_type):
            handed_back_BTD = None
            if loss is not None:
                if not is_first:  # the local gradient stays in the block, and the embeddings are part of the first
                    handed_back_BTD = replay.hand_back(cotangent_BTD, run)
                micro_batch.events.run_backward(index, loss * micro_batch.scale)
                assert own_BTD.grad is not None
                cotangent_BTD = cotangent_BTD + own_BTD.grad
            replay.run_backward(cotangent_BTD, run)
            if not is_first:  # the input is the leaf that the block before has returned
                run.input_BTD.grad = replay.input_BTD.grad if handed_back_BTD is None else handed_back_BTD
            elif run.input_BTD.grad_fn is not None:
                torch.autograd.backward(run.input_BTD, replay.input_BTD.grad)
        if run.stem is not None and replay.input_BTD.grad is not None:
            assert self._stem is not None
            check, around = partial(micro_batch.events.check_replay, 0), partial(self.outside_the_forward, device_type)
            self._stem.learn(run.stem, replay.input_BTD.grad, around, check)

    def _check_replay(self, index: int, run: BlockRun, replay: Replay, micro_batch: MicroBatch) -> None:
        self.check_reach(index, replay.output_BTD)
        if index in self._unchecked_replays:
            self._unchecked_replays.discard(index)
            assert run.output_BTD is not None
            micro_batch.events.check_replay(index, relative_difference(run.output_BTD, replay.output_BTD))

    # ---- For the subclasses ----

    def local_batch(self, hidden_BTD: torch.Tensor) -> LocalBatch:
        """Makes what a local objective may know of the micro-batch, on the device of these hidden states."""
        mask_BT = self._mask_BT
        if mask_BT is not None:
            mask_BT = mask_BT.to(hidden_BTD.device) if mask_BT.shape == hidden_BTD.shape[:2] else None
        return LocalBatch(mask_BT, self.micro_batch.inputs)

    @contextlib.contextmanager
    def outside_the_forward(self, device_type: str) -> Iterator[None]:
        """Makes a context for a backward within the model's forward: nothing of the forward's state applies to it."""
        # A checkpointed layer runs again in its backward; its outputs must not be collected a second time.
        token = active_collector.set(None)
        try:
            with torch.autocast(device_type, enabled=False), self.micro_batch.events.around_backward():
                yield
        finally:
            active_collector.reset(token)
        # Autocast keeps its low-precision copies of the block's weights until the forward ends.
        if torch.is_autocast_enabled(device_type):
            torch.clear_autocast_cache()


def cut(hidden_BTD: torch.Tensor) -> torch.Tensor:
    """Returns hidden states through which no gradient passes, and that take one themselves.

    Without `requires_grad_` reentrant checkpointing would silently freeze everything above the boundary.
    """
    return hidden_BTD.detach().requires_grad_()
