"""What makes a trainer that of one stage, by any method of local learning.

Each stage is a training run of its own, of a stock trainer on its part of the model: it builds the same batches from
the same seed, has its own optimizer, scheduler and clipping, and exchanges nothing with the others but hidden states,
which go forward; where `gradient` says so their cotangents come back, in time for a later step (`delayed.py`).

Shapes: B batch, T tokens, D hidden channels.
"""

import contextlib
import time
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import nn
from torch.utils.data import DataLoader
from transformers import PreTrainedModel, PrinterCallback
from transformers.trainer_utils import TrainOutput
from transformers.utils import logging

from lopt_hf.common.locks import run_lock
from lopt_hf.common.resuming import find_checkpoint
from lopt_hf.local.blocks import Block, split_layers
from lopt_hf.local.learner import LearnerEvents, LocalLearner
from lopt_hf.local.methods.base import Method
from lopt_hf.local.stacks import find_stack
from lopt_hf.local.stepping import delay_schedules
from lopt_hf.pipeline.runtime import stage_checkpoint
from lopt_hf.pipeline.runtime.channel import BatchId
from lopt_hf.pipeline.runtime.checkpoint import (
    Manifest,
    check_no_other_model,
    check_shared_folder,
    may_start_anew,
    remove_incomplete,
)
from lopt_hf.pipeline.runtime.delayed import DelayedGradients, send_back
from lopt_hf.pipeline.runtime.export import push_model, save_stage_model
from lopt_hf.pipeline.runtime.health import telling_of_bad_input
from lopt_hf.pipeline.runtime.launch import PipelineWorld, check_one_device, check_same
from lopt_hf.pipeline.runtime.links import StageLinks
from lopt_hf.pipeline.runtime.logs import (
    StageCallback,
    add_figures,
    add_final_figures,
    collect_start_losses,
    collect_timelines,
)
from lopt_hf.pipeline.runtime.optimizer_state import OptimizerStateCheck
from lopt_hf.pipeline.runtime.replicas import count_over_replicas, own_share, own_stream, share_gradients
from lopt_hf.pipeline.runtime.stage_forward import StageForward
from lopt_hf.pipeline.runtime.stage_plan import plan_stages
from lopt_hf.pipeline.runtime.timeline import Timeline
from lopt_hf.pipeline.runtime.weight_prediction import WeightPrediction
from lopt_hf.trainers.checkpoint import random_state_warning
from lopt_hf.trainers.checks import check_no_model_is_lost
from lopt_hf.trainers.mixin import LocalLearningMixin
from lopt_hf.trainers.model_card import describe_reach, is_users_readme

__all__ = ["StageMixin"]

logger = logging.get_logger(__name__)

LOCKED = "locked"  # in a run's store: its folder is its own


class StageMixin(LocalLearningMixin):
    """Makes a trainer that of one stage of a pipeline; put it before the trainer in the list of base classes.

    The model is one stage's part, its input comes from the previous stage and its output goes to the next one right
    after the forward. A run of K stages ends with the weights of the run in one process.

    Args:
        model: The stage's part of the model, or a whole one of which `_keep_stage` leaves the part.
        args: Training arguments, the same on every stage: `PipelineArguments` mixed in before a method's config.
        world: The processes of the run.
        method: The method. Default: the one that the arguments are of.
        **kwargs: The keyword arguments of the trainer.

    Raises:
        ValueError: If the arguments are of several accelerators.
    """

    args: Any
    lr_scheduler: Any
    model_revision: str | None = None  # of the hub's model that the run starts from, for its checkpoints
    _manifest: Manifest | None = None  # of the checkpoint that the run goes on from
    _random_state: Path | None = None  # likewise

    def __init__(
        self,
        model: PreTrainedModel | PeftModel,
        args: Any,
        *,
        world: PipelineWorld,
        method: Method | None = None,
        **kwargs: Any,
    ) -> None:
        check_one_device(args)
        self.world = world
        base_model: Any = model.get_base_model() if isinstance(model, PeftModel) else model
        num_layers = len(find_stack(base_model).layers)
        self.plans = plan_stages(split_layers(num_layers, args.num_blocks, args.split_at), world.num_stages)
        self.plan = self.plans[world.stage]
        self.timeline = Timeline(self.plan.index, args.timeline_steps)
        if not world.reports:
            args.disable_tqdm, args.report_to, args.push_to_hub = True, [], False
        super().__init__(model, args, method=method, **kwargs)
        # The parent would log 0 for the blocks of other stages, which tell of theirs themselves.
        self._own_drift, self._drift = self._drift, None
        collect_start_losses(self)
        if not world.reports:
            self.remove_callback(PrinterCallback)
        self._forward = StageForward(self.learner.base_model, self.stack, self.plan, self._send)
        self._links = StageLinks()
        self.delayed: DelayedGradients | None = None
        self._hidden_BTD: torch.Tensor | None = None
        self._batch = BatchId(0, 0, 0)
        self._loss_at = 0.0
        self.micro_batch = 0
        if args.sends_gradients_back:
            delay = self.plans[0].delay
            late = f"{delay} optimizer step{'s' * (delay > 1)} late"
            reach = describe_reach(self.learner.schedule)
            self.card_facts["trained by the task loss"] = f"{reach}, the first with a gradient {late}"
        self.add_callback(StageCallback(self))
        if args.save_strategy != "no":
            self.add_callback(OptimizerStateCheck())

    # ---- What this stage is ----

    def _make_learner(self, method: Method | None, **options: Any) -> LocalLearner:
        learner = super()._make_learner(
            method,
            early_blocks=[block.index for block in self.plan.blocks if block.index < self.args.num_blocks - 1],
            stage_starts=[plan.blocks[0].index for plan in self.plans],
            reaches_later=self.args.sends_gradients_back,
            **options,
        )
        self._keep_stage(learner)
        return learner

    def _keep_stage(self, learner: LocalLearner) -> None:
        """Takes out of a model that was loaded whole what the stage does not run."""

    def _learner_events(self, **others: Any) -> LearnerEvents:
        return super()._learner_events(
            # Looked up at each call: a benchmark puts a timeline of its own into its place.
            around_backward=lambda: self.timeline.span("backward"),
            around_step=lambda: self.timeline.span("optimizer"),
            **others,
        )

    # ---- One micro-batch ----

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Any:
        self._batch = BatchId.of(inputs, self.state.global_step, self.micro_batch)
        self.timeline.step = self.state.global_step
        self.timeline.micro_batch += 1
        if self._links.receiver is not None:
            self.timeline.note_depth(self._links.receiver.depth)
            with self.timeline.span("receive"):
                hidden_BTD = self._links.receiver.get(self._batch)
            # Reentrant checkpointing gives no gradient unless an input requires one.
            asks = self._hands_back or self.learner.base_model.is_activation_checkpointing
            self._hidden_BTD = hidden_BTD.requires_grad_(asks)
        with self.timeline.span("forward"):
            if not self.plan.is_last:
                return self._run_blocks(inputs, num_items_in_batch)
            self._forward.start_from(self._hidden_BTD)
            result: Any = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        self._loss_at = time.perf_counter()
        if num_items_in_batch is None or self.world.num_replicas == 1:
            return result
        # The gradients are averaged over the replicas, and the loss was divided by the tokens of all of them.
        scale = self.world.num_replicas
        return (result[0] * scale, result[1]) if return_outputs else result * scale

    def _run_blocks(self, inputs: dict[str, Any], num_items_in_batch: torch.Tensor | int | None) -> torch.Tensor:
        """Runs the blocks of an early stage; all that it learns from at once are their local losses."""
        arguments = {name: value for name, value in inputs.items() if name != "labels"}
        if self.aux_loss_enabled:
            arguments["output_router_logits"] = True
        if self.delayed is not None:
            balance = 0.0 if self.boundary.learns_locally else self._local_scale(inputs, num_items_in_batch)
            balance *= self.aux_loss_enabled
            self.delayed.begin(self._batch, arguments, self._hidden_BTD, balance, self._reach)
        if self.delayed is not None and not self.boundary.learns_locally:
            self.delayed.run_forward()
        else:
            with self._local_forward(inputs, num_items_in_batch), self.accelerator.autocast():
                self._forward(arguments, self._hidden_BTD)
        return torch.zeros((), device=self.args.device, requires_grad=True)

    def _send(self, hidden_BTD: torch.Tensor) -> None:
        if self._links.sender is None:
            return
        with self.timeline.span("send"):
            # Here and not where it arrives: the cause is to be named by the stage that made it.
            largest = torch.linalg.vector_norm(hidden_BTD.detach(), torch.inf)
            self._check_finite(f"the largest hidden state of stage {self.plan.index}", largest.item())
            self._links.sender.put(self._batch, hidden_BTD)

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        loss = super().training_step(*args, **kwargs)
        if self.plan.is_last:
            self.timeline.add("backward", self._loss_at, time.perf_counter())
            if self._hands_back:
                assert self._links.back_sender is not None
                assert self._hidden_BTD is not None and self._hidden_BTD.grad is not None
                cotangent_BTD = self._hidden_BTD.grad
                send_back(self._links.back_sender, self._batch, cotangent_BTD, self.timeline, self._check_finite)
        self._hidden_BTD = None
        if self.delayed is not None:
            self.delayed.run_backward(self.accelerator.sync_gradients)
        return loss

    # ---- The task's gradient of earlier steps ----

    @property
    def _reach(self) -> int:
        """Stages, counted from the last, to which the gradient of the step under way travels."""
        return self.learner.schedule.at(self.state.global_step, 0, max(1, self.state.max_steps))

    @property
    def _hands_back(self) -> bool:
        """Whether the stage before learns from the step under way, later."""
        return self._links.back_sender is not None and self._reach > self.plan.delay + 1

    def _say_reach(self, max_steps: int) -> None:
        always = self.learner.schedule.cycle == (len(self.plans),)
        if self.world.reports and not always:
            super()._say_reach(max_steps)

    @property
    def _completes_in_forward(self) -> bool:  # type: ignore[override]  # of the class where it is always so
        return self.delayed is None

    @property
    def gradient_settings(self) -> dict[str, Any]:
        """What a run with gradients on their way cannot change."""
        settings: dict[str, Any] = self.args.gradient_settings(len(self.plans))
        return settings

    def create_scheduler(self, num_training_steps: int, *args: Any, **kwargs: Any) -> Any:
        """Makes the scheduler; where the task's gradient is late, so are the rates, which are those of its step."""
        scheduler = super().create_scheduler(num_training_steps, *args, **kwargs)
        if not self.args.sends_gradients_back:
            return scheduler
        num_rising, makes_up_in = self.args.late_warmup(num_training_steps)
        if self.plan.delay > 0:
            delay_schedules(scheduler, self.plan.delay, num_rising, makes_up_in)
        if num_rising and self.world.reports:
            made_up = ", all higher by the root of what that takes from its sum" if makes_up_in else ""
            self._say(
                "Where gradients come d steps late, rates begin at 1 / (1 + d) of the schedule and rise to "
                f"the whole of it in {num_rising} steps{made_up}; late_warmup_steps=0 leaves them as they are."
            )
        return scheduler

    def _rates_ahead(self, num_steps: int) -> list[float]:
        """The learning rates of the optimizer's groups at the step that is so many steps ahead."""
        scheduler: Any = self.lr_scheduler
        step = scheduler.last_epoch + num_steps
        return [rate * factor(step) for rate, factor in zip(scheduler.base_lrs, scheduler.lr_lambdas, strict=True)]

    def drain(self) -> None:
        """Learns from the gradients that are still on their way at the end of a run, each in a step of its own."""
        if self.delayed is None:
            return
        scheduler = self.lr_scheduler.state_dict()
        self.model.zero_grad()
        self.local_heads.zero_grad()  # which have been in the step that has just ended
        for _ in self.delayed.drain():
            norm = self._clip_grad_norm(self.model) if self.args.max_grad_norm > 0 else None
            self._get_grad_norm(self.model, norm)
            self.optimizer.step()
            self.learner.after_step()
            self.lr_scheduler.step()
            self.model.zero_grad()
        # What is saved counts the run's own steps.
        self.lr_scheduler.load_state_dict(scheduler)
        for group, rate in zip(self.optimizer.param_groups, self.lr_scheduler.get_last_lr(), strict=True):
            group["lr"] = rate

    # ---- Replicas ----

    def _share_gradients(self) -> None:
        share_gradients(self)

    def _num_counted_processes(self) -> int:
        return self.world.num_replicas

    def _get_dataloader(
        self, dataset: Any, description: str, batch_size: int, *args: Any, **kwargs: Any
    ) -> DataLoader:
        own = own_stream(dataset, self.world, batch_size)
        loader = super()._get_dataloader(own, description, batch_size, *args, **kwargs)
        return own_share(loader, self.world, self.args.device)

    def _get_num_items_in_batch(self, batch_samples: list, device: torch.device) -> torch.Tensor | int | None:
        return count_over_replicas(super()._get_num_items_in_batch(batch_samples, device), self.world, device)

    # ---- The run ----

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> TrainOutput:
        output_dir = Path(str(self.args.output_dir))
        self.store = self.world.new_run_store()
        with contextlib.ExitStack() as held:
            with telling_of_bad_input(self.world.store):
                if self.world.reports:
                    held.enter_context(run_lock(str(output_dir)))
                    self.store.set(LOCKED, "")
                folder = self._begin_in(output_dir, resume_from_checkpoint)
            self._open_links()
            output = super().train(folder, *args, **kwargs)
        collect_timelines(self)
        return output

    def _begin_in(self, output_dir: Path, resume_from_checkpoint: str | bool | None) -> str | None:
        """Makes the run's folder ready; returns the stage's folder in the checkpoint to go on from."""
        if not isinstance(self.model, PeftModel):
            check_no_other_model(output_dir)
        folder = find_checkpoint(str(output_dir), resume_from_checkpoint)
        shared = self.store, self.world.monitor, self.world.mesh.size()
        check_same(*shared, "checkpoint", {"resume_from_checkpoint": folder})
        if folder is None and not may_start_anew(self.args):
            check_no_model_is_lost(str(output_dir), self.learner.base_model.config.name_or_path)
        if self.world.rank == 0:
            self.world.monitor.wait_for(self.store, LOCKED)  # or what another run is writing would be removed
            remove_incomplete(output_dir)
        check_shared_folder(*shared, output_dir)
        if folder is None:
            return None
        self._manifest = Manifest(folder)
        self._manifest.check_run(self.world.num_replicas, self.gradient_settings)
        own = self.learner.fingerprint()
        for name in ("num_blocks", "split_at"):  # before it is looked for whose part has the stage's blocks
            self._manifest.check(name, own[name])
        stage_checkpoint.check_parts(self, self._manifest)
        return str(self._manifest.folder_for(self.plan))

    def _close_links(self) -> None:
        self.drain()  # of a run that goes on from its last step, or whose data ended before it was to
        self._links.close()
        self._links, self.delayed = StageLinks(), None

    def _open_links(self) -> None:
        self._links = StageLinks.open(self.world, self.plan, self.args)
        if self._links.back_receiver is not None:
            self.delayed = DelayedGradients(
                self.learner.base_model,
                self._forward,
                self.boundary,
                delay=self.plan.delay,
                recompute=self.args.gradient_recompute,
                prediction=self._make_prediction(),
                receiver=self._links.back_receiver,
                sender=self._links.back_sender,
                autocast=self.accelerator.autocast,
                timeline=self.timeline,
                check_finite=self._check_finite,
            )

    def _make_prediction(self) -> WeightPrediction | None:
        if not self.args.weight_prediction:
            return None
        return WeightPrediction(lambda: self.optimizer, self._rates_ahead)

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        if kwargs["resume_from_checkpoint"] is not None:  # of which an epoch reads the random state alone
            kwargs["resume_from_checkpoint"] = str(self._random_state)
        super()._run_epoch(*args, **kwargs)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs and self.model.training:
            add_figures(self, logs)
        elif "train_runtime" in logs:
            self._close_links()  # first: a stage that goes on alone never comes to its end
            add_final_figures(self, logs)
        if self._own_drift is not None and self.model.training:
            drifts = self._own_drift.measure(self.learner.owned())
            for block in self.plan.blocks:
                self._metrics["train"][f"drift/block_{block.index}"].append(drifts[block.index])
        super().log(logs, start_time)

    # ---- Checkpoints and the saved model ----

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        stage_checkpoint.save_process(self)

    @property
    def _writes_output_dir(self) -> bool:
        return False  # for the parent, which would lock the folder later than `train` does

    def _check_files(self, checkpoint: str) -> None:
        """Leaves that to `check_parts`, whichever stages wrote the files."""

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        assert self._manifest is not None and self._resumed is not None
        folder = Path(resume_from_checkpoint)
        self._random_state = stage_checkpoint.replica_folder(folder, self.world.replica)
        warning = random_state_warning(str(self._random_state), self.args)
        if warning is not None:
            logger.warning(warning)
        with telling_of_bad_input(self.world.store):
            metrics = stage_checkpoint.load_stage_weights(self, self._manifest)
            self._resumed = stage_checkpoint.load_replica_state(self, folder, metrics)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is not None:
            assert self._manifest is not None
            with telling_of_bad_input(self.world.store):
                stage_checkpoint.load_stage_optimizer(self, self._manifest, checkpoint)
                if self.delayed is not None:
                    stage_checkpoint.load_in_flight(self, self._manifest)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Makes one stock checkpoint of all stages; every process must call it, and waits until it is complete.

        Args:
            output_dir: Where it goes. Default: `args.output_dir`.
            _internal_call: As in the parent.
        """
        target = Path(output_dir or self.args.output_dir)
        save_stage_model(self, target)
        if self.world.reports and not is_users_readme(Path(self.args.output_dir) / "README.md"):
            self.create_model_card(model_name=target.name)

    @property
    def all_blocks(self) -> list[Block]:
        """The blocks of all stages."""
        return [block for plan in self.plans for block in plan.blocks]

    def push_model(self) -> None:
        """Uploads the saved model to the hub, without the checkpoints; for the process that reports."""
        push_model(self)
