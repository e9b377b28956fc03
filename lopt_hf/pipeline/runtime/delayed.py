"""The task's gradient on its way back through the stages, one optimizer step later at each.

A stage that is d stages before the last one runs, at optimizer step s, the forward of step s and the backward of step
s - d: the cotangents of its outputs of then have come from the next stage, which has computed them one optimizer step
ago. So nothing that a stage needs at a step is made in that step, and the delay is the same in every run.

Where a schedule of reach lets a step's gradient travel to some stages only, the others keep nothing of that step; when
its turn would come, a stage has no gradient, and the optimizer passes over it.

What is kept is bounded: the inputs of d + 1 steps, and on their way the cotangents of one.

The weights move d times before a step's gradient is theirs. A stage may run its forward with those that it expects to
have then (`weight_prediction.py`), so that the stages behind it learn from what it will hand on by that time.

Shapes: B batch, T tokens, D hidden channels.
"""

from collections import deque
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from accelerate.utils import send_to_device
from transformers import PreTrainedModel

from lopt_hf.common.random_state import RandomState
from lopt_hf.local.hooks import BlockBoundary
from lopt_hf.pipeline.runtime.channel import BatchId, ReceivingChannel, SendingChannel
from lopt_hf.pipeline.runtime.stage_forward import StageForward, StageRun
from lopt_hf.pipeline.runtime.timeline import Timeline
from lopt_hf.pipeline.runtime.weight_prediction import WeightPrediction
from lopt_hf.pipeline.runtime.weight_versions import WeightVersion, weights_put_back

__all__ = ["DelayedGradients", "send_back"]


@dataclass
class _Kept:
    """A micro-batch whose cotangent has not come yet.

    Attributes:
        batch: Which one it is.
        arguments: Of the decoder's forward.
        hidden_BTD: What the stage started from, a leaf; nothing on the first stage.
        random_state: Before the forward.
        balance: Factor of the routers' load-balancing loss; 0 leaves it out.
        hands_back: Whether the stage before learns from it too, and is sent the cotangent of the input.
        run: The forward, if its graph is kept.
        number: Of the timeline's count, see `Timeline`; of one that a checkpoint held, what that is before the run.
    """

    batch: BatchId
    arguments: dict[str, Any]
    hidden_BTD: torch.Tensor | None
    random_state: RandomState
    balance: float
    hands_back: bool
    run: StageRun | None = None
    number: int = -1

    @property
    def num_bytes(self) -> int:
        """Bytes of its tensors, without a graph's."""
        tensors = [self.hidden_BTD, self.random_state.cpu, *self.random_state.states, *self.arguments.values()]
        return sum(tensor.nbytes for tensor in tensors if isinstance(tensor, torch.Tensor))

    def state(self) -> dict[str, Any]:
        """What a checkpoint holds of it."""
        return {
            "batch": vars(self.batch),
            "arguments": self.arguments,
            "hidden_BTD": None if self.hidden_BTD is None else self.hidden_BTD.detach(),
            "random_state": vars(self.random_state),
            "balance": self.balance,
            "hands_back": self.hands_back,
        }

    @classmethod
    def load(cls, state: dict[str, Any], device: torch.device) -> "_Kept":
        """Makes it of what `state` returned, for a model on some device; random states stay on the CPU."""
        batch, random_state = BatchId(**state["batch"]), RandomState(**state["random_state"])
        moved = send_to_device({name: state[name] for name in ("arguments", "hidden_BTD")}, device)
        return cls(**{**state, **moved, "batch": batch, "random_state": random_state})


@dataclass
class _KeptStep:
    """The micro-batches of an optimizer step.

    Attributes:
        micro_batches: Those whose cotangents have not come, in order; none where none is to come.
        weights: The weights of the step, if graphs are kept.
    """

    micro_batches: deque[_Kept] = field(default_factory=deque)
    weights: WeightVersion | None = None


class DelayedGradients:
    """What a stage keeps until the task's gradient of an earlier step comes, and what it does then.

    Attributes:
        delay: Optimizer steps by which the stage's task gradient is late.

    Args:
        model: The stage's part of the model, PEFT-wrapped or not.
        forward: Runs it.
        boundary: Knows the load-balancing loss of the model's routers.
        delay: See above.
        recompute: Run the forward again, with the weights that the stage has then; otherwise keep its graph, and the
            weights of each step.
        prediction: Of the weights that are expected where a step's gradient comes, with which its forward is to run.
        receiver: Where the cotangents of the stage's outputs come from.
        sender: Where those of its inputs go; nothing on the first stage.
        autocast: Makes the context in which the model computes.
        timeline: Records what is done.
        check_finite: Raises if a figure, given with its name, is not finite.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        forward: StageForward,
        boundary: BlockBoundary,
        *,
        delay: int,
        recompute: bool,
        prediction: WeightPrediction | None,
        receiver: ReceivingChannel,
        sender: SendingChannel | None,
        autocast: Callable[[], AbstractContextManager[Any]],
        timeline: Timeline,
        check_finite: Callable[[str, float], None],
    ) -> None:
        self.delay = delay
        self._model = model
        self._forward = forward
        self._boundary = boundary
        self._recompute = recompute
        self._prediction = prediction
        self._receiver = receiver
        self._sender = sender
        self._autocast = autocast
        self._timeline = timeline
        self._check_finite = check_finite
        self._steps: deque[_KeptStep] = deque()  # from the oldest to the one that is under way
        self._begun: _Kept | None = None
        self._arrived: deque[torch.Tensor] = deque()  # cotangents that a checkpoint holds

    # ---- A micro-batch ----

    def begin(
        self,
        batch: BatchId,
        arguments: dict[str, Any],
        hidden_BTD: torch.Tensor | None,
        balance: float = 0.0,
        reach: int | None = None,
    ) -> None:
        """Begins with a micro-batch that is about to run forward, and keeps it if its step's gradient is to come.

        Args:
            batch: Which one it is.
            arguments: Of the decoder's forward.
            hidden_BTD: What the stage starts from, shape (B, T, D); nothing on the first stage.
            balance: Factor of the routers' load-balancing loss; 0 leaves it out.
            reach: Stages, counted from the last, to which the gradient of its step travels. Default: all.
        """
        comes = reach is None or reach > self.delay
        if batch.micro_batch == 0:
            self._begin_step(comes)
        leaf_BTD = None if hidden_BTD is None else hidden_BTD.detach().requires_grad_()
        state = RandomState.now(next(self._model.parameters()) if leaf_BTD is None else leaf_BTD)
        hands_back = self._sender is not None and (reach is None or reach > self.delay + 1)
        number = self._timeline.micro_batch
        self._begun = _Kept(batch, arguments, leaf_BTD, state, balance, hands_back, number=number)
        if comes:
            self._steps[-1].micro_batches.append(self._begun)

    def _begin_step(self, comes: bool) -> None:
        if self._prediction is not None:
            # When the steps that are kept will move the weights; the one that is about to begin comes behind them
            first = self.delay - len(self._steps)
            due = [first + index for index, step in enumerate(self._steps) if step.micro_batches]
            self._prediction.begin(due if comes else [])
        with self._expected_weights():
            keeps_weights = comes and not self._recompute
            self._steps.append(_KeptStep(weights=WeightVersion(self._model) if keeps_weights else None))

    def run_forward(self) -> None:
        """Runs the micro-batch that was begun last, where nothing else does."""
        assert self._begun is not None
        begun, self._begun = self._begun, None
        weights = self._steps[-1].weights
        with self._expected_weights():
            if weights is not None:
                begun.run = self._run_with_graph(begun, weights, again=False)
                return
            with torch.no_grad(), self._autocast():
                self._forward(begun.arguments, begun.hidden_BTD)

    def _expected_weights(self) -> AbstractContextManager[None]:
        return nullcontext() if self._prediction is None else self._prediction.in_place()

    def run_backward(self, ends_step: bool) -> None:
        """Learns from the next micro-batch of an earlier step, if its turn has come.

        Args:
            ends_step: Whether it is the step's last micro-batch; then all that is left of the earlier step follows,
                which may have had more.
        """
        self._begun = None
        if ends_step and self._prediction is not None:
            self._prediction.end()
        if len(self._steps) <= self.delay:
            return
        due = self._steps[0].micro_batches
        for _ in range(len(due) if ends_step else min(len(due), 1)):
            self._learn_from(due.popleft())
        if ends_step:
            self._steps.popleft()

    def drain(self) -> Iterator[None]:
        """Learns from what is left at the end of a run; yields where the gradients of a step are complete."""
        while self._steps:
            due = self._steps.popleft().micro_batches
            while due:
                self._learn_from(due.popleft())
            yield

    def _run_with_graph(self, kept: _Kept, weights: WeightVersion | None, again: bool) -> StageRun:
        with nullcontext() if weights is None else weights.kept_by_graphs(), self._autocast():
            return self._forward(kept.arguments, kept.hidden_BTD, again)

    def _run_again(self, kept: _Kept, weights: WeightVersion | None = None) -> StageRun:
        with kept.random_state.restored():
            return self._run_with_graph(kept, weights, again=True)

    def _learn_from(self, kept: _Kept) -> None:
        if not self._arrived:
            self._take(kept)
        cotangent_BTD = self._arrived.popleft()
        with self._timeline.span("backward", kept.batch.step, kept.number):
            run = kept.run or self._run_again(kept)
            roots, gradients = [run.output_BTD], [cotangent_BTD]
            if run.router_logits and kept.balance:
                mask_BT = kept.arguments.get("attention_mask")
                has_mask = isinstance(mask_BT, torch.Tensor) and mask_BT.ndim == 2
                loss = self._boundary.routers.loss_of(run.router_logits, mask_BT if has_mask else None)
                roots.append(loss)
                gradients.append(torch.full_like(loss, kept.balance))
            torch.autograd.backward(roots, gradients)
        if kept.hands_back:
            assert self._sender is not None and kept.hidden_BTD is not None and kept.hidden_BTD.grad is not None
            gradient_BTD = kept.hidden_BTD.grad
            send_back(self._sender, kept.batch, gradient_BTD, self._timeline, self._check_finite, kept.number)

    def _take(self, kept: _Kept) -> None:
        with self._timeline.span("receive", kept.batch.step, kept.number):
            self._arrived.append(self._receiver.get(kept.batch))

    @property
    def kept_bytes(self) -> int:
        """Bytes of what waits: inputs, with kept graphs the activations and the weights of each step, and within a
        step the weights that are expected."""
        kept = sum(micro_batch.num_bytes for step in self._steps for micro_batch in step.micro_batches)
        versions = [step.weights for step in self._steps if step.weights is not None]
        expected = 0 if self._prediction is None else self._prediction.num_bytes
        return kept + expected + sum(version.weight_bytes + version.saved_bytes for version in versions)

    # ---- A checkpoint, between two steps ----

    def state(self) -> dict[str, Any]:
        """Returns what a run needs to go on: what is kept, and the cotangents that come at the next step.

        It waits for these: the next stage, were it to go on from its own checkpoint, would not send them again.
        """
        if len(self._steps) == self.delay:
            for kept in list(self._steps[0].micro_batches)[len(self._arrived) :]:
                self._take(kept)
        return {
            "steps": [[kept.state() for kept in step.micro_batches] for step in self._steps],
            "weights": [None if step.weights is None else step.weights.weights for step in self._steps],
            "cotangents": list(self._arrived),
        }

    def load_state(self, state: dict[str, Any]) -> None:
        """Goes on from what `state` returned, on the CPU or where the model is.

        Graphs are made again, with the weights that they were made with.
        """
        device = self._model.device
        self._arrived = deque(send_to_device(state["cotangents"], device))
        self._steps.clear()
        with weights_put_back(self._model) as put:
            for micro_batches, weights in zip(state["steps"], state["weights"], strict=True):
                step = _KeptStep(deque(_Kept.load(kept, device) for kept in micro_batches))
                for kept in step.micro_batches:
                    if kept.hidden_BTD is not None:
                        kept.hidden_BTD.requires_grad_()
                if weights is not None:
                    put(weights)
                    step.weights = WeightVersion(self._model)
                    for kept in step.micro_batches:
                        kept.run = self._run_again(kept, step.weights)
                self._steps.append(step)


def send_back(
    sender: SendingChannel,
    batch: BatchId,
    cotangent_BTD: torch.Tensor,
    timeline: Timeline,
    check_finite: Callable[[str, float], None],
    number: int | None = None,
) -> None:
    """Sends the cotangent of a stage's input to the stage before.

    Args:
        sender: The channel.
        batch: The micro-batch.
        cotangent_BTD: Shape (B, T, D).
        timeline: Records how long that takes.
        check_finite: Raises if a figure, given with its name, is not finite.
        number: Of the micro-batch in the timeline's count. Default: of the one that is under way.
    """
    with timeline.span("send", batch.step, number):
        largest = torch.linalg.vector_norm(cotangent_BTD, torch.inf)
        check_finite("the largest gradient of the hidden states", largest.item())
        sender.put(batch, cotangent_BTD)
