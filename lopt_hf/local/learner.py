"""Local learning of one model as an object: its blocks, their boundaries and heads, and what a step does with them.

A trainer, a stage of a pipeline and the planner run the same object, so that what is planned is what is trained.
"""

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, cast

import torch
from peft import PeftModel
from torch import nn
from transformers import PreTrainedModel

from lopt_hf.common.distributed import GradientReducer
from lopt_hf.local.block_steps import BlockSteps, groups_of_blocks, groups_of_parts
from lopt_hf.local.blocks import Block, split_layers
from lopt_hf.local.embeddings import separate_embeddings
from lopt_hf.local.heads import LocalHeads
from lopt_hf.local.learner_events import LearnerEvents
from lopt_hf.local.methods.base import Batches, Method
from lopt_hf.local.micro_batch import BoundaryEvents, MicroBatch
from lopt_hf.local.ownership import parameters_before_decoder, parameters_by_block
from lopt_hf.local.run_facts import RunFacts
from lopt_hf.local.schedule import ReachSchedule
from lopt_hf.local.stacks import find_stack
from lopt_hf.local.stepping import ClipGroup
from lopt_hf.local.vision import check_deepstack, prepare_vision

__all__ = ["LearnerEvents", "LocalLearner"]


class LocalLearner:
    """Local learning of a causal language model, which is changed in place: hooks, untied or frozen weights.

    An image classifier is cut in the same way, by a method that is made for it.

    A micro-batch is

    ```python
    with learner.micro_batch():
        with learner.forward(inputs, step=0):
            loss = learner.with_joint_loss(model(**inputs).loss)
        loss.backward()
        learner.after_backward()
    ```

    and a step ends with `learner.clip(max_norm)`, the optimizer's step and `learner.after_step()`.

    Attributes:
        base_model: The model that has the decoder: of a `PeftModel`, what it wraps.
        stack: Its decoder.
        blocks: The cut of its decoder layers.
        early_blocks: The early blocks that run in this process.
        heads: What the early blocks learn through; they are to be trained with the model.
        boundary: The boundaries between the blocks.
        schedule: Which blocks the task's gradient reaches at which step.

    Args:
        model: A `transformers` causal language model, PEFT-wrapped or not, or a stage's part of one.
        settings: The method's arguments.
        method: The method. Default: the one that the arguments are of.
        early_blocks: Indices of the early blocks that run in this process. Default: all but the last.
        events: What to ask of whoever runs the steps.
        run: What the method must know of the run.
        stage_starts: First blocks of the stages of a pipeline; no gradient passes from one stage to another.
        reaches_later: Whether the task's gradient comes to the early blocks that it reaches in a later step, by other
            ways than a micro-batch's backward, which then reaches the last block alone.
        seed: What the heads are drawn from.
        device: Where the norms of gradients go, and the heads of blocks that are not on their own device yet.
        router_coefficient: Weight of the load-balancing loss; 0 where the model has no routers.
        max_grad_norm: Where `step_block` clips a group's gradient; 0 does not clip.

    Raises:
        ValueError: If a setting is out of range or does not work in the run, if the model has no single decoder stack,
            if the cut does not fit it, or if the settings leave an early block nothing to train.
    """

    def __init__(
        self,
        model: nn.Module,
        settings: Any,
        method: Method | None = None,
        early_blocks: Sequence[int] | None = None,
        events: LearnerEvents | None = None,
        *,
        run: RunFacts | None = None,
        stage_starts: Sequence[int] = (),
        reaches_later: bool = False,
        seed: int = 0,
        device: torch.device | None = None,
        router_coefficient: float = 0.0,
        max_grad_norm: float = 1.0,
    ) -> None:
        self.model = model
        self.base_model = cast(PreTrainedModel, model.get_base_model() if isinstance(model, PeftModel) else model)
        self.settings = settings
        self.method: Method = method or settings.make_method()
        self.events = events or LearnerEvents()
        self.run = run or RunFacts()
        settings.check()
        settings.check_run(self.run)
        if settings.local_step and self.events.optimizer is None:
            raise ValueError(
                "local_step=True steps blocks within the micro-batch, but events has no optimizer; give "
                "`LearnerEvents(optimizer=...)`, or set local_step to False."
            )
        self.stage_starts = list(stage_starts)
        self._reaches_later = reaches_later
        self.seed = seed
        self.device = device or torch.device("cpu")
        self.router_coefficient = router_coefficient
        self.stack = find_stack(self.base_model)
        self.blocks = split_layers(len(self.stack.layers), settings.num_blocks, settings.split_at)
        here = range(len(self.blocks) - 1) if early_blocks is None else early_blocks
        self.early_blocks = [self.blocks[index] for index in here]
        self._owned: list[dict[str, nn.Parameter]] | None = None
        note = prepare_vision(self.base_model, self.stack, settings, isinstance(model, PeftModel))
        if note:
            self.say(note)
        check_deepstack(self.base_model, self.blocks, settings)
        self._prepare_model()
        if early_blocks is None:
            self._check_task_is_learned()
        objective = self.method.make_objective(self)
        self.heads = self.method.make_heads(self, objective)
        self._place_heads()
        self.boundary = self.method.make_boundary(self, objective, self.heads)
        self.schedule: ReachSchedule = settings.schedule
        if self.schedule.highest > 1 and settings.reach_recompute and not reaches_later:
            self.boundary.recompute_reached()
        self._check_vision_is_reached()
        self._make_fingerprint: Callable[[], dict[str, Any]] = partial(self.method.fingerprint, self, objective)
        if not self.early_blocks:  # nothing here learns from the objective, and a copy of an LM head is large
            fingerprint = self._make_fingerprint()
            self._make_fingerprint = fingerprint.copy
        self._micro_batch = MicroBatch()
        self._reducer: GradientReducer | None = None
        self._reduced: frozenset[int] = frozenset()  # the blocks whose gradients the reducer averages
        self._started: set[int] = set()  # those of them that it averages already, in the step under way
        self._synchronises = True
        self._position = 0  # of the micro-batch in its step
        self._steps = BlockSteps(self.groups, self.events, self.device, max_grad_norm)

    def _prepare_model(self) -> None:
        if self.method.separates_embeddings(self):
            separate_embeddings(self.base_model, self.settings.tied_embeddings)
        if self.settings.freezes_early_blocks:
            for parameter in self.early_parameters():
                parameter.requires_grad_(False)
        owned = self.owned()
        for block in self.learning_blocks:
            if not any(parameter.requires_grad for parameter in owned[block.index].values()):
                raise ValueError(self.settings.nothing_trainable(block))

    def _check_task_is_learned(self) -> None:
        """Raises if the task's gradient reaches nothing that is trained."""
        reach = max(self.settings.schedule.highest, self.settings.window)
        reached = [parameter for block in self.owned()[-reach:] for parameter in block.values()]
        if not any(parameter.requires_grad for parameter in reached):
            first = self.blocks[-reach].start
            raise ValueError(
                f"num_blocks={self.settings.num_blocks}: nothing that the task loss reaches (from layer {first} on) "
                "is trainable, so nothing would learn the task, as with prompt tuning or an adapter on the first "
                "layers only; make later layers trainable, or use an adapter in all of them."
            )

    def _place_heads(self) -> None:
        for block in self.learning_blocks:
            if str(block.index) in self.heads:
                self.place(self.heads[str(block.index)], block)

    def _check_vision_is_reached(self) -> None:
        """Raises if a vision tower that is to train has nothing to learn from."""
        if not self.settings.train_vision or self.boundary.learns_locally:
            return
        if self.schedule.highest < len(self.blocks):
            raise ValueError(
                "train_vision=True: no loss reaches the first block, which the vision tower belongs to; choose a "
                f"local objective, let task_reach reach all {len(self.blocks)} blocks at some steps, or set "
                "train_vision to False."
            )

    # ---- What a method may use of the events ----

    @property
    def calibration_batches(self) -> Batches | None:
        """Gives batches of training data before training; without it nothing is to be calibrated."""
        return self.events.calibration_batches

    def autocast(self) -> contextlib.AbstractContextManager[Any]:
        """Makes the context in which the model computes."""
        return self.events.autocast()

    def say(self, line: str) -> None:
        """Tells the user a line."""
        self.events.say(line)

    # ---- The model's parameters ----

    @property
    def learning_blocks(self) -> list[Block]:
        """The early blocks of this process, if they learn."""
        return [] if self.settings.freezes_early_blocks else self.early_blocks

    def stage_stop(self, block: Block) -> int:
        """The layer behind the last one of the stage that a block is of; without a pipeline that of the model."""
        later = (self.blocks[start].start for start in self.stage_starts if start > block.index)
        return min(later, default=self.blocks[-1].stop)

    def owned(self) -> list[dict[str, nn.Parameter]]:
        """For each block its parameters by their names in `model`."""
        return self._owned or parameters_by_block(self.model, self.stack, self.blocks)

    def keep_sharded(self) -> None:
        """Remembers the parameters, now that an engine has sharded the model.

        While a module is whole, in its forward, FSDP2 has put others in their place, to which nothing is stepped.
        """
        self._owned = parameters_by_block(self.model, self.stack, self.blocks)

    def vision_parameters(self) -> dict[str, nn.Parameter]:
        """Those of a vision tower and projector, adapters on them included, by their names in `base_model`."""
        return parameters_before_decoder(self.base_model, self.stack)

    def early_parameters(self) -> list[nn.Parameter]:
        """The parameters of all blocks but the last."""
        return [parameter for block in self.owned()[:-1] for parameter in block.values()]

    def parameters_to_learn(self) -> list[list[nn.Parameter]]:
        """For each block the parameters that its gradients are for: its own and its head's."""
        groups = [[p for n, p in block.items() if not LocalHeads.is_name_of_head(n)] for block in self.owned()]
        for index, head in self.heads.items():
            groups[int(index)].extend(head.parameters())
        return groups

    def groups(self) -> list[ClipGroup]:
        """What is clipped and stepped together; of a block's groups the one first that a backward completes first."""
        learning = self.parameters_to_learn()
        if self.settings.clip_scope == "part":
            return groups_of_parts(learning, [*self.stack.layers, self.heads])
        return groups_of_blocks(learning)

    def device_of(self, block: Block) -> torch.device:
        """Where a block ends: a model may be spread over devices, or not yet be on its own (FSDP)."""
        device = next(self.stack.layers[block.stop - 1].parameters()).device
        return self.device if device.type in ("cpu", "meta") else device

    def place(self, module: nn.Module, block: Block) -> None:
        """Moves a block's head to where the block ends, unless it is there."""
        device = self.device_of(block)
        if any(parameter.device != device for parameter in module.parameters()):
            module.to(device)

    def learning_rates(self, learning_rate: float) -> list[float]:
        """Returns the learning rate of each block, given that of the run."""
        early, settings = self.settings.early_learning_rate, self.settings
        if early is not None:
            return [early] * (len(self.blocks) - 1) + [learning_rate]
        rule, limit = settings.reach_rate, settings.reach_rate_limit
        factors = [self.schedule.rate_factor(index, rule, limit) for index in range(len(self.blocks))]
        return [learning_rate * factor for factor in factors]

    # ---- A micro-batch ----

    @contextlib.contextmanager
    def forward(
        self,
        inputs: Mapping[str, Any],
        step: int,
        scale: float = 1.0,
        synchronises: bool = True,
        accumulation_steps: int | None = None,
        total_steps: int | None = None,
    ) -> Iterator[None]:
        """Switches the boundaries on for the forwards of one micro-batch.

        Args:
            inputs: The micro-batch, for the local objective.
            step: The optimizer step, counted from 0.
            scale: Factor of the local losses whose backward runs in the forward, see `Method.local_scale`.
            synchronises: Whether it is the step's last micro-batch, whose gradients are averaged and stepped.
            accumulation_steps: Micro-batches of the step; with `reach_unit="microbatch"` they have to be known.
            total_steps: Optimizer steps of the run; with `reach_unit="run"` they have to be known.

        Raises:
            ValueError: If one is missing that the schedule of reach needs.
        """
        self.schedule.check_run_is_known(accumulation_steps, total_steps)
        self._synchronises = synchronises
        self.method.begin_micro_batch(self, step)
        self._micro_batch = MicroBatch(
            events=BoundaryEvents(
                run_backward=self._run_backward,
                on_block_done=self._finish_block,
                check_replay=self.events.check_replay,
                around_backward=self.events.around_backward,
                before_more=self._steps.holding_back,
            ),
            scale=scale,
            trains_early_blocks=self.method.trains_early_blocks(self, step),
            inputs=inputs,
            reach=1 if self._reaches_later else self.schedule.at(step, self._position, total_steps or 1),
            gradient_factors=self.schedule.gradient_factors(accumulation_steps or 1),
        )
        with self.boundary.training_forward(self._micro_batch):
            yield

    def with_joint_loss(self, loss: torch.Tensor, share: float = 1.0) -> torch.Tensor:
        """Returns the loss whose backward is left to run: the task's, and local losses that wait for it.

        Args:
            loss: The task loss of the last `forward`.
            share: Factor of the local losses, if the task loss has one already.

        Raises:
            RuntimeError: If the first task loss reaches a parameter of a block that it must not reach.
        """
        self.boundary.check_task_loss(loss, self._micro_batch.reach)
        joint_loss = self.boundary.joint_loss()
        return loss if joint_loss is None else loss + joint_loss * share

    def after_backward(self) -> None:
        """Ends a micro-batch after the backward of the loss that was left."""
        self.boundary.finish(self._micro_batch)

    @contextlib.contextmanager
    def micro_batch(self, synchronises: bool = True) -> Iterator[None]:
        """Makes the context of a micro-batch's forward and backward, after which nothing of it is left.

        With `local_step` and `clip_scope="part"` a group steps as soon as its gradients are complete, if others of its
        block's are still to be made: the LM head before the gradients of its block's layers are made, an early
        block's layers before those of the embeddings. Where gradients are averaged over processes they step together.

        Args:
            synchronises: As in `forward`.
        """
        # Where gradients are averaged they are complete after that, which is after the backward; and while FSDP2
        # averages those of a unit, a norm that the host waits for would hold back the next unit.
        is_alone = self._reducer is None and self.run.engine is None
        steps_early = self.settings.local_step and synchronises and is_alone
        try:
            with self._steps.stepping_early() if steps_early else contextlib.nullcontext():
                yield
        finally:
            self.boundary.abandon()
            self._micro_batch = MicroBatch()
            self._position = 0 if synchronises else self._position + 1

    def losses(self) -> dict[str, list[torch.Tensor]]:
        """The local losses of the last micro-batch by name, one for each forward."""
        return self.boundary.named_losses()

    def _run_backward(self, index: int, loss: torch.Tensor) -> None:
        if self.settings.local_step and self._synchronises:
            self._steps.check_first_backward(index)
        if index in self._started and self._reducer is not None:
            self._reducer.wait()  # before a further forward of this micro-batch adds to what is being averaged
        self.events.run_backward(loss)

    def _finish_block(self, index: int) -> None:
        """Averages, and with `local_step` steps, a block whose gradients are complete."""
        if not self._synchronises:
            return
        self._average(index)
        if self.settings.local_step:
            self.step_block(index)

    # ---- Averages over processes ----

    def reduce_by(self, reducer: GradientReducer, blocks: Iterable[int]) -> None:
        """Averages gradients over processes from now on.

        Args:
            reducer: What averages them.
            blocks: The blocks whose gradients it averages, those of early ones as soon as they are complete.
        """
        self._reducer, self._reduced = reducer, frozenset(blocks)

    def _average(self, index: int) -> None:
        if self._reducer is not None and index in self._reduced:
            sees = index == 0 and self.settings.train_vision
            self._reducer.start(self.parameters_to_learn()[index], may_differ=sees)
            self._started.add(index)

    def wait_for_averages(self) -> None:
        """Averages what is not being averaged yet, and waits for all of it; to be called before gradients are read."""
        if self._reducer is None:
            return
        for index in sorted(self._reduced - self._started):
            self._average(index)
        self._reducer.wait()
        self._started.clear()

    # ---- The step ----

    def clip(self, max_norm: float) -> torch.Tensor:
        """Clips each group's gradients, once `wait_for_averages` has ended; returns the norm of all of them before."""
        return self._steps.clip(max_norm)

    def step_block(self, index: int) -> None:
        """Averages, clips and applies what has not stepped yet of a block's gradients, and frees them."""
        with self.events.around_step():
            if self._reducer is not None:
                self._reducer.wait()
            self._steps.step(index)

    def after_step(self) -> None:
        """Does what follows every optimizer step."""
        self.method.after_step(self)

    def begin_step(self) -> None:
        """Counts micro-batches anew: an epoch of a stream may have ended in the middle of a step."""
        self._position = 0

    def begin_run(self) -> None:
        """Forgets the step that an exception ended."""
        self.heads.zero_grad()
        self._steps.forget()
        self._started.clear()
        self._position = 0

    # ---- What is saved ----

    def state(self) -> dict[str, torch.Tensor]:
        """The weights of local learning that the model does not have: a resumed run needs them."""
        return self.heads.own_state()

    def load_state(self, state: Mapping[str, torch.Tensor]) -> None:
        """Loads what `state` returned.

        Raises:
            ValueError: If a weight is missing.
        """
        self.heads.load_own_state(state)

    def fingerprint(self) -> dict[str, Any]:
        """The settings, as JSON, without whose equality a run cannot go on from a checkpoint."""
        return {
            **self._make_fingerprint(),
            "num_blocks": len(self.blocks),
            "split_at": [block.start for block in self.blocks[1:]],
            "has_early_learning_rate": self.settings.early_learning_rate is not None,
            **self._reach_fingerprint(),
            **({"train_vision": True} if self.settings.train_vision else {}),
        }

    def _reach_fingerprint(self) -> dict[str, Any]:
        """What of the schedule a run cannot change; nothing for the default, as in checkpoints of before it."""
        if self.schedule.highest == 1:
            return {}
        return {
            "task_reach": list(self.schedule.cycle),
            "reach_unit": self.schedule.unit,
            "reach_rate": self.settings.reach_rate,
            **({"reach_anneal": True} if self.settings.reach_anneal else {}),
        }
