"""Running blocks again with a graph that ran without one: the activations of one block at a time.

A block that the task's gradient is to reach runs forward as in inference. When the blocks above it have handed their
cotangent back, it runs again from the same input, in the same random state, and gives its gradients.

Shapes: B batch, T tokens, D hidden channels.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from lopt_hf.common.random_state import RandomState
from lopt_hf.common.upstream.transformers import active_collector
from lopt_hf.local.blocks import Block
from lopt_hf.local.layer_calls import LayerCall, hidden_of, output_hidden
from lopt_hf.local.objectives import LocalBatch
from lopt_hf.local.run_state import autocast_of, changed_between, running_statistics_kept
from lopt_hf.local.stacks import DecoderStack
from lopt_hf.local.stem import StemRun

__all__ = ["BlockRun", "Replay", "Replays"]


@dataclass
class BlockRun:
    """A block's run without a graph, and what it takes to run it again.

    Attributes:
        input_BTD: What the block was given; of the first block with the graph of the embeddings, or `stem`.
        target_BTD: What a local objective is given as the block's input, detached.
        random_state: The random state before it.
        autocast: The arguments of the autocast context that it ran in.
        calls: How its layers were called.
        handed_on: The mappings that its layers were given, each with what it held before the block.
        output_BTD: What it returned: a leaf, from which the next block starts and whose gradient is the cotangent.
        router_logits: Its routers' logits, as leaves: the gradient of the model's load-balancing loss arrives there.
        batch: What a local objective may know of the micro-batch.
        stem: How what is before the first block ran, if it is to run again.
    """

    input_BTD: torch.Tensor
    target_BTD: torch.Tensor
    random_state: RandomState
    autocast: dict[str, Any]
    calls: list[LayerCall] = field(default_factory=list)
    handed_on: list[tuple[Mapping[Any, Any], dict[Any, Any]]] = field(default_factory=list)
    output_BTD: torch.Tensor | None = None
    router_logits: list[torch.Tensor] = field(default_factory=list)
    batch: LocalBatch = field(default_factory=LocalBatch)
    stem: StemRun | None = None

    def note_mappings(self, call: LayerCall) -> None:
        """Notes the mappings that a layer is given, to see later whether the block has put something into them."""
        known = {id(mapping) for mapping, _ in self.handed_on}
        given = [value for value in (*call.args, *call.kwargs.values()) if isinstance(value, Mapping)]
        self.handed_on += [(mapping, dict(mapping)) for mapping in given if id(mapping) not in known]

    def scale_router_gradients(self, factor: float) -> None:
        """Multiplies what the load-balancing loss has handed back to the routers' logits."""
        for logits in self.router_logits:
            if logits.grad is not None:
                logits.grad = logits.grad * factor

    @property
    def hands_on_more(self) -> bool:
        """Whether its layers have left more than hidden states for later ones, such as keys and values in Gemma 4."""
        return any(
            value is not before.get(name) for mapping, before in self.handed_on for name, value in mapping.items()
        )

    @property
    def is_behind_a_graph(self) -> bool:
        """Whether a gradient at the block's input has somewhere to go: to the embeddings, or a stem."""
        return self.input_BTD.grad_fn is not None or self.stem is not None


@dataclass(frozen=True)
class Replay:
    """A block's second run, with a graph.

    Attributes:
        input_BTD: Where its graph begins.
        output_BTD: Where it ends.
        router_logits: Its routers' logits.
    """

    input_BTD: torch.Tensor
    output_BTD: torch.Tensor
    router_logits: list[torch.Tensor]

    def _roots(self, cotangent_BTD: torch.Tensor, run: BlockRun) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """Where a backward starts, and with what: the output, and routers that the load-balancing loss has reached."""
        roots, gradients = [self.output_BTD], [cotangent_BTD]
        for logits, first_logits in zip(self.router_logits, run.router_logits, strict=True):
            if first_logits.grad is not None and logits.requires_grad:
                roots.append(logits)
                gradients.append(first_logits.grad)
        return roots, gradients

    def hand_back(self, cotangent_BTD: torch.Tensor, run: BlockRun) -> torch.Tensor:
        """Returns the cotangent at the input; the weights get no gradient yet."""
        roots, gradients = self._roots(cotangent_BTD, run)
        return torch.autograd.grad(roots, self.input_BTD, gradients, retain_graph=True)[0]

    def run_backward(self, cotangent_BTD: torch.Tensor, run: BlockRun) -> None:
        """Gives the weights, and the input if it asks for one, their gradients."""
        if self.output_BTD.requires_grad:
            torch.autograd.backward(*self._roots(cotangent_BTD, run))


def _more_than_hidden(problem: str) -> RuntimeError:
    return RuntimeError(
        f"{problem}, so that a part of the task's gradient would be lost when the block runs again; set "
        "reach_recompute to False, and please report the architecture."
    )


class Replays:
    """Writes down how blocks run, and runs them again.

    Args:
        stack: The decoder.
        blocks: The blocks that may be run again.
    """

    def __init__(self, stack: DecoderStack, blocks: Sequence[Block]) -> None:
        self._layers = {block.index: list(stack.layers[block.start : block.stop]) for block in blocks}
        self._running: BlockRun | None = None
        self._last_BTD: torch.Tensor | None = None  # what the layer before returned
        self.forwards: list[dict[int, BlockRun]] = []  # the runs of each of a micro-batch's forwards, by block
        self.handles: list[RemovableHandle] = []
        for index, layers in self._layers.items():
            for layer in layers:
                record = partial(self._record, index)
                self.handles.append(layer.register_forward_pre_hook(record, with_kwargs=True))
                self.handles.append(layer.register_forward_hook(self._leave_layer))

    def begin_forward(self) -> None:
        """Begins a forward of the decoder."""
        self.forwards.append({})

    def end_forward(self) -> None:
        """Ends a forward, also one in which an error was raised."""
        self._running = self._last_BTD = None

    def clear(self) -> None:
        """Forgets all runs."""
        self.forwards = []

    def enter(
        self, index: int, hidden_BTD: torch.Tensor, target_BTD: torch.Tensor, stem: StemRun | None = None
    ) -> None:
        """Begins to write down the run of a block.

        Args:
            index: The block's index.
            hidden_BTD: The hidden states that it starts from.
            target_BTD: What a local objective is given as its input.
            stem: How what is before it ran, if it is to run again.
        """
        before = self.forwards[-1].get(index - 1)
        if before is not None and before.output_BTD is not hidden_BTD:
            raise RuntimeError(changed_between(f"Between blocks {index - 1} and {index}"))
        device_type = hidden_BTD.device.type
        state = RandomState.now(hidden_BTD)
        self._running = BlockRun(hidden_BTD, target_BTD, state, autocast_of(device_type), stem=stem)
        self._last_BTD = hidden_BTD
        self.forwards[-1][index] = self._running

    def leave(self, output_BTD: torch.Tensor, router_logits: list[torch.Tensor], batch: LocalBatch) -> None:
        """Ends what `enter` began.

        Args:
            output_BTD: The leaf from which the next block starts.
            router_logits: The logits of the block's routers, as leaves.
            batch: What a local objective may know of the micro-batch.
        """
        assert self._running is not None
        run, self._running, self._last_BTD = self._running, None, None
        if run.hands_on_more:
            raise _more_than_hidden("A block leaves more than hidden states to later layers, which may share its keys")
        run.handed_on = []
        run.output_BTD, run.router_logits, run.batch = output_BTD, router_logits, batch

    def _record(self, index: int, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self._running is None:
            return
        if hidden_of(args, kwargs) is not self._last_BTD:
            raise RuntimeError(changed_between(f"Between two layers of block {index}"))
        call = LayerCall.of(args, kwargs)
        learned = [v for v in (*call.args, *call.kwargs.values()) if isinstance(v, torch.Tensor) and v.requires_grad]
        if learned:
            raise _more_than_hidden(f"A layer of block {index} is given more than hidden states")
        self._running.note_mappings(call)
        self._running.calls.append(call)

    def _leave_layer(self, layer: nn.Module, args: Any, output: Any) -> None:
        if self._running is not None:
            self._last_BTD = output_hidden(output)

    def run_again(self, index: int, run: BlockRun, learns_at_input: bool) -> Replay:
        """Runs a block again, with a graph.

        Args:
            index: The block's index.
            run: Its first run.
            learns_at_input: Whether the gradient at its input is asked for.
        """
        input_BTD = run.input_BTD.detach().requires_grad_(learns_at_input)
        collected: dict[str, Any] = {"router_logits": []} if run.router_logits else {}
        token = active_collector.set(collected)
        try:
            with run.random_state.restored(), torch.autocast(**run.autocast):
                hidden_BTD = input_BTD
                with running_statistics_kept(self._layers[index]):
                    for layer, call in zip(self._layers[index], run.calls, strict=True):
                        hidden_BTD = call(layer, hidden_BTD)
        finally:
            active_collector.reset(token)
        return Replay(input_BTD, hidden_BTD, collected.get("router_logits", []))
