"""Local learning in a trainer of transformers or TRL: the overrides, each of which calls `self.learner`."""

import contextlib
import dataclasses
import math
import weakref
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import nn
from transformers import PreTrainedModel
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, TrainOutput, get_last_checkpoint, rotate_checkpoints
from transformers.utils import logging

from lopt_hf.common.callbacks import bind_callbacks
from lopt_hf.common.distributed import GradientReducer, broadcast_parameters
from lopt_hf.common.locks import run_lock
from lopt_hf.common.trainer_base import TrainerBase
from lopt_hf.common.upstream.torch import ignored_by_ddp
from lopt_hf.common.upstream.trainers import TRAINER_STATE_NAME
from lopt_hf.data.prepared import check_prepared
from lopt_hf.data.sampling import spread_batches
from lopt_hf.local.blocks import Block
from lopt_hf.local.heads import LocalHeads
from lopt_hf.local.hooks import BlockBoundary
from lopt_hf.local.learner import LearnerEvents, LocalLearner
from lopt_hf.local.methods.base import Method
from lopt_hf.local.run_facts import RunFacts
from lopt_hf.local.stacks import DecoderStack
from lopt_hf.meters.drift import WeightDrift
from lopt_hf.trainers.checkpoint import StagedCheckpoint, load_weights, passed_over_weights, random_state_warning
from lopt_hf.trainers.checks import (
    check_finite,
    check_fsdp,
    check_heads_step,
    check_neftune,
    check_output_dir,
    check_own_optimizer,
)
from lopt_hf.trainers.engines import engine_of, fallback_warning, root_kept_whole, shard_heads_apart
from lopt_hf.trainers.learner_callback import LearnerCallback
from lopt_hf.trainers.model_card import complete_card, describe_run, is_users_readme, read_retention
from lopt_hf.trainers.parameter_groups import add_missing_parameters, end_with_reach, set_learning_rates
from lopt_hf.trainers.reach_lines import reach_lines
from lopt_hf.trainers.resume_state import ResumeState
from lopt_hf.trainers.saved_heads import SavedHeads

__all__ = ["LocalLearningMixin"]

logger = logging.get_logger(__name__)


class LocalLearningMixin(TrainerBase):
    """Adds local learning to a TRL trainer; put it before the trainer in the list of base classes.

    The config class must mix in `LocalTrainingArguments` and a method's arguments in the same way. What is added: the
    boundaries on the model, the heads in the optimizer, clipping per block, the all-reduce of the early blocks'
    gradients under DDP, `local_loss/block_i` and `drift/block_i` in the logs, and exact resuming.

    Attributes:
        learner: What learns locally; everything that is not a trainer's own is there.
        start_losses: The local losses before training by name, where the method measures them.
        card_facts: What else the model card tells, by its name; the commands add data and command line.

    Args:
        method: The method. Default: the one that the arguments are of.
        *trainer_args: Positional arguments of the TRL trainer.
        **trainer_kwargs: Keyword arguments of the TRL trainer.

    Raises:
        ValueError: If the model has no single decoder stack, or if an option does not work under the engine (FSDP,
            DeepSpeed) that the run is launched with.
    """

    args: Any
    model: Any
    optimizer: Any
    aux_loss_enabled: bool  # TRL's
    router_aux_loss_coef: float  # TRL's
    _metrics: dict[str, Any]  # TRL's
    _total_train_tokens: int  # TRL's
    _name: str  # TRL's, of the method
    _paper: dict[str, str]  # TRL's, of the method

    _staging: Path | None = None  # while a checkpoint is being written
    _completes_optimizer = False  # whether `create_optimizer` of this class has been asked
    _completes_in_forward = True  # whether early blocks have all their gradients when their local backward is done
    _weights_from = ""  # the checkpoint whose weights are being loaded
    _resumed: ResumeState | None = None  # from `train(resume_from_checkpoint=...)` to the first epoch

    def __init__(self, *trainer_args: Any, method: Method | None = None, **trainer_kwargs: Any) -> None:
        super().__init__(*trainer_args, **trainer_kwargs)
        self._place_model()
        check_prepared(self.train_dataset, self.args)
        bind_callbacks(self.callback_handler.callbacks, self)
        check_fsdp(self)
        self._run_facts = self._facts_of_the_run()
        self._reducer = GradientReducer()
        self._heads_in_model = self._run_facts.engine is not None
        check_own_optimizer(self.args, self.optimizer, self.lr_scheduler)  # before the model is changed
        self.learner = self._make_learner(method)
        self._saved_heads = SavedHeads(self.learner, self.accelerator)
        self.start_losses = dict(self.learner.method.start_losses())
        weakref.finalize(self, self.learner.boundary.remove)
        if self._heads_in_model:  # the engine shards, steps and saves what is in the model
            self.learner.heads.attach(self.learner.base_model)
        self._check_run()
        self._warn()
        self.add_callback(LearnerCallback(self))
        self._drift = WeightDrift(self.learner.owned()) if self.args.log_drift else None
        self._owns_output_dir = False
        self.card_facts: dict[str, str] = {}

    def _place_model(self) -> None:
        """Moves the model to its device where the parent leaves that to `train`; what is made of it goes along."""
        waits = self.args.bf16_full_eval or self.args.fp16_full_eval
        if waits and engine_of(self.accelerator) is None and not self.is_model_parallel:
            self._move_model_to_device(self.model, self.args.device)

    def _facts_of_the_run(self) -> RunFacts:
        """What the method must know of the run, with the engine that accelerate has taken."""
        asked: RunFacts = self.args.run_facts
        facts = dataclasses.replace(asked, engine=engine_of(self.accelerator))
        warning = fallback_warning(self.accelerator, asked.engine)
        if warning is not None:
            self._say(warning)
        if facts != asked:
            self.args.check_run(facts)
        return facts

    def _make_learner(self, method: Method | None, **options: Any) -> LocalLearner:
        return LocalLearner(
            self.accelerator.unwrap_model(self.model),
            self.args,
            method,
            events=self._learner_events(),
            run=self._run_facts,
            seed=self.args.seed,
            device=self.args.device,
            router_coefficient=self.router_aux_loss_coef if self.aux_loss_enabled else 0.0,
            max_grad_norm=self.args.max_grad_norm,
            **options,
        )

    def _learner_events(self, **others: Any) -> LearnerEvents:
        return LearnerEvents(
            run_backward=self.accelerator.backward,
            check_finite=self._check_finite,
            optimizer=lambda: self.optimizer,
            autocast=self.accelerator.autocast,
            calibration_batches=self._calibration_batches,
            say=self._say,
            **{"around_backward": self._around_backward, **others},
        )

    def _around_backward(self) -> contextlib.AbstractContextManager[None]:
        is_sharded = self._run_facts.engine == "FSDP2"
        return root_kept_whole(self.model) if is_sharded and self.boundary.in_forward else contextlib.nullcontext()

    # ---- The learner's parts, by the names that they have always had ----

    @property
    def stack(self) -> DecoderStack:
        """The model's decoder."""
        return self.learner.stack

    @property
    def blocks(self) -> list[Block]:
        """The cut of its layers."""
        return self.learner.blocks

    @property
    def early_blocks(self) -> list[Block]:
        """The early blocks that run in this process."""
        return self.learner.early_blocks

    @property
    def boundary(self) -> BlockBoundary:
        """The boundaries between the blocks."""
        return self.learner.boundary

    @property
    def local_heads(self) -> LocalHeads:
        """What the early blocks learn through, by block index as text."""
        return self.learner.heads

    # ---- Before training ----

    def add_callback(self, callback: Any) -> None:
        """As the parent's; a callback that logs through its trainer is told which it is."""
        super().add_callback(callback)
        bind_callbacks(self.callback_handler.callbacks, self)

    def _say(self, line: str) -> None:
        if self.accelerator.is_main_process:
            logger.warning(line)  # what nobody asked for, but must know; the level is what is shown by default

    def _check_run(self) -> None:
        """Raises if the run does not go with the optimizer that it has, or with the model."""
        check_heads_step(self._run_facts.optim, self.local_heads)
        check_neftune(self.args, self.learner)

    def _warn(self) -> None:
        """Says what a user must know before training."""
        args = self.args
        for warning in self.learner.method.warnings(self.learner):
            logger.warning(warning)
        if self.optimizer is None and not isinstance(self.model, PeftModel):
            advice = self.learner.method.rate_advice(self.learner, args.learning_rate)
            if advice is not None:
                logger.warning(advice)
        if args.gradient_checkpointing:
            self._say(
                "activation_checkpointing=True (TRL's default) leaves few activations for the blocks to free, and "
                "runs every layer's forward once more; set it to False where memory is to be saved by blocks."
            )
        if args.local_step and args.gradient_accumulation_steps > 1:
            logger.warning(
                f"local_step=True saves no memory with gradient_accumulation_steps="
                f"{args.gradient_accumulation_steps}: the gradients of all blocks are kept until the last of its "
                "micro-batches. Raise per_device_train_batch_size instead, if it fits."
            )

    def _calibration_batches(self) -> Iterator[dict[str, Any]]:
        """Batches of training rows spread over the data set; neither their order nor the random state is touched."""
        collate = self._get_collator_with_removed_columns(self.data_collator)
        with torch.random.fork_rng(devices=[]):
            for rows in spread_batches(self.train_dataset, self.args.per_device_train_batch_size):
                yield self._prepare_inputs(collate(rows))

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """Makes the optimizer, heads included, with `early_learning_rate` for the early blocks."""
        is_new = self.optimizer is None
        self._completes_optimizer = True
        heads, target = self.learner.heads, self.model if model is None else model
        with contextlib.nullcontext() if self._heads_in_model else heads.attached(target):
            optimizer = super().create_optimizer(model)
        add_missing_parameters(optimizer, self.learner)
        if is_new:
            set_learning_rates(optimizer, self.learner, self.args)
        return optimizer

    def _wrap_model(self, model: nn.Module, training: bool = True, *args: Any, **kwargs: Any) -> nn.Module:
        # What the parent does next: by now the optimizer is made, perhaps by a subclass that did not ask this one.
        if training and self.optimizer is not None and not self._completes_optimizer:
            check_own_optimizer(self.args, self.optimizer, None)
            add_missing_parameters(self.optimizer, self.learner)
        wrapped: nn.Module = super()._wrap_model(model, training, *args, **kwargs)
        return wrapped

    def create_scheduler(self, num_training_steps: int, *args: Any, **kwargs: Any) -> Any:
        """Makes the scheduler; with `reach_anneal` a block's part of it ends with the last step that reaches it."""
        scheduler = super().create_scheduler(num_training_steps, *args, **kwargs)
        if self.args.reach_anneal:
            end_with_reach(scheduler, self.learner, num_training_steps)
        return scheduler

    def _prepare_for_training(self, max_steps: int, *args: Any, **kwargs: Any) -> tuple[nn.Module, Any]:
        self.learner.begin_run()  # here, since `auto_find_batch_size` comes again
        # The early blocks' gradients are ready inside the forward, or do not follow from the forward's output; DDP's
        # reducer would wait for them, or see them twice. `GradientReducer` averages them instead.
        if self._run_facts.engine == "FSDP2" and (self.boundary.mode == "eager" or self.learner.schedule.highest > 1):
            shard_heads_apart(self.accelerator, self.model, self.learner.heads)
        with ignored_by_ddp(self.model, [name for block in self.learner.owned()[:-1] for name in block]):
            prepared = super()._prepare_for_training(max_steps, *args, **kwargs)
        if self._saved_heads.is_fsdp2:
            self.learner.keep_sharded()
        self._share_gradients()
        if self.learner.schedule.highest > 1:
            self._say_reach(max_steps)
        return prepared

    def _say_reach(self, max_steps: int) -> None:
        """Tells what comes of a schedule of reach in this run."""
        group = self.optimizer.param_groups[0]  # the last block's; the early blocks' rates follow from it
        rate = group.get("initial_lr", group["lr"])  # noted by a scheduler, unless it follows the loss
        for line in reach_lines(self.learner, self.args, rate, max_steps, self.accelerator.num_processes):
            self._say(line)

    def _share_gradients(self) -> None:
        """Gives all ranks the same start of what DDP does not broadcast, and averages what it does not see."""
        if self.accelerator.num_processes > 1 and not self._heads_in_model:
            broadcast_parameters([*self.learner.early_parameters(), *self.learner.heads.parameters()])
            self.learner.reduce_by(self._reducer, range(len(self.blocks) - 1))

    # ---- The step ----

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Runs a micro-batch with the local backward of each block, and logs the local losses.

        Returns:
            The task loss, which is what stock trainers log, also where local losses had a part in the backward.
        """
        with self.learner.micro_batch(self.accelerator.sync_gradients):
            loss = super().training_step(*args, **kwargs)
            self._check_finite("loss", loss.item())
            joint_loss = self.boundary.joint_loss()
            if joint_loss is not None:
                loss = loss - joint_loss.detach() / self.current_gradient_accumulation_steps
            self.learner.after_backward()  # in which blocks may run again, whose local losses come then
            self._log_losses(self.learner.losses())
        return loss

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Any:
        """Computes the task loss, and the local losses while the model trains."""
        if not self.model.training:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        with self._local_forward(inputs, num_items_in_batch):
            result: Any = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        share = 1 / self.current_gradient_accumulation_steps if self._is_scaled(num_items_in_batch) else 1.0
        loss = self.learner.with_joint_loss(result[0] if return_outputs else result, share)
        return (loss, result[1]) if return_outputs else loss

    @contextlib.contextmanager
    def _local_forward(self, inputs: dict[str, Any], num_items: torch.Tensor | int | None) -> Iterator[None]:
        """Lets the forwards of a micro-batch learn locally."""
        with self.learner.forward(
            dict(inputs),  # a `compute_loss_func` makes the parent take the labels out
            step=self.state.global_step,
            scale=self._local_scale(inputs, num_items),
            synchronises=self.accelerator.sync_gradients and self._completes_in_forward,
            accumulation_steps=self.current_gradient_accumulation_steps,
            total_steps=max(1, self.state.max_steps),
        ):
            yield

    def _local_scale(self, inputs: Mapping[str, Any], num_items: torch.Tensor | int | None) -> float:
        """The factor of the local losses of a micro-batch, as the optimizer expects gradients."""
        steps = self.current_gradient_accumulation_steps
        return self.learner.method.local_scale(inputs, num_items, steps, self._num_counted_processes())

    def _num_counted_processes(self) -> int:
        """Over how many processes the tokens of a step are counted, and their gradients averaged."""
        return self.accelerator.num_processes if self.args.average_tokens_across_devices else 1

    def _is_scaled(self, num_items_in_batch: torch.Tensor | int | None) -> bool:
        """Whether the task loss is already divided by the accumulation steps; `Trainer` divides one that is not."""
        if self.loss_is_scaled_for_ga is not None:  # DPO: no; GRPO: yes
            return self.loss_is_scaled_for_ga
        return (
            self.model_accepts_loss_kwargs and num_items_in_batch is not None
        ) or self.compute_loss_func is not None

    def _clip_grad_norm(self, model: nn.Module) -> torch.Tensor | float:
        return self._clip(self.args.max_grad_norm)

    def _get_grad_norm(self, model: nn.Module, grad_norm: torch.Tensor | float | None = None) -> Any:
        norm = self._clip(math.inf) if grad_norm is None else grad_norm
        # A gradient scaler skips the step by itself.
        if norm is not None and self.accelerator.scaler is None:
            self._check_finite("grad_norm", float(norm))
        return norm

    def _clip(self, max_norm: float) -> Any:
        """Clips the gradients as `clip_scope` says; returns the norm of all of them before."""
        self.learner.wait_for_averages()
        if self.args.clip_scope == "global":
            heads = [] if self._heads_in_model else self.learner.heads.parameters()
            return self.accelerator.clip_grad_norm_([*self.model.parameters(), *heads], max_norm)
        self.accelerator.unscale_gradients()
        return self.learner.clip(max_norm)

    def _check_finite(self, name: str, figure: torch.Tensor | float) -> None:
        check_finite(name, float(figure), self.state.global_step + 1, self.args)

    # ---- The run ----

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> TrainOutput:
        """Trains, from a checkpoint if one is given.

        Raises:
            ValueError: If the checkpoint is of another method or other block settings, or if a new run's `output_dir`
                holds another run's checkpoints or is used by another run at this moment.
        """
        if not self._owns_output_dir:
            check_output_dir(self.args.output_dir, resume_from_checkpoint)
        self._owns_output_dir = True
        output_dir = self.args.output_dir
        checkpoint = get_last_checkpoint(output_dir) if resume_from_checkpoint is True else resume_from_checkpoint
        self._resumed = self.check_checkpoint(checkpoint) if checkpoint else None
        with run_lock(output_dir) if self._writes_output_dir else contextlib.nullcontext():
            return super().train(resume_from_checkpoint, *args, **kwargs)

    @property
    def _writes_output_dir(self) -> bool:
        """Whether it is this process that stands for the run in its folder."""
        return self.accelerator.is_main_process

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds each block's drift to the logs where `log_drift` is set."""
        if self._drift is not None and self.model.training:
            for index, drift in enumerate(self._drift.measure(self.learner.owned())):
                self._metrics["train"][f"drift/block_{index}"].append(drift)
        super().log(logs, start_time)

    def _log_losses(self, losses: Mapping[str, list[torch.Tensor]]) -> None:
        """Logs the mean of each list over all ranks as `local_loss/<name>`."""
        if not losses:
            return
        means = torch.stack([torch.stack(values).mean().to(self.args.device) for values in losses.values()])
        for name, value in zip(losses, self.accelerator.reduce(means, reduction="mean").tolist(), strict=True):
            self._check_finite(f"local_loss/{name}", value)
            self._metrics["train"][f"local_loss/{name}"].append(value)

    # ---- Checkpoints ----

    def check_checkpoint(self, checkpoint: str) -> ResumeState:
        """Reads what this trainer needs to go on from a checkpoint.

        Raises:
            ValueError: If another kind of trainer wrote it, or one with other block settings, or if a file of it is
                missing or damaged.
        """
        state = ResumeState.read(checkpoint, self._name, self.learner.fingerprint())
        if self._saved_heads.are_apart:  # another engine has files of its own
            self._check_files(checkpoint)
        return state

    def _check_files(self, checkpoint: str) -> None:
        self._saved_heads.check(checkpoint)
        warning = random_state_warning(checkpoint, self.args)
        if warning is not None:
            logger.warning(warning)

    @property
    def all_blocks(self) -> list[Block]:
        """The blocks of the whole model, of which `blocks` may be a part."""
        return self.blocks

    def create_model_card(  # type: ignore[override]  # as TRL's
        self, model_name: str | None = None, dataset_name: str | None = None, tags: str | list[str] | None = None
    ) -> None:
        """Writes TRL's model card, with blocks, reach, `card_facts`, and what a `RetentionCallback` has measured."""
        path = Path(str(self.args.output_dir)) / "README.md"
        if self._staging is not None and is_users_readme(path):  # a checkpoint brings a card that nobody has asked for
            return
        with self._named_as_trained():
            super().create_model_card(model_name or Path(str(self.args.output_dir)).name, dataset_name, tags)
        if self.is_world_process_zero():
            complete_card(path, describe_run(self, dataset_name), read_retention(self.state.log_history))

    @property
    def trained_by(self) -> str:
        """What the model card calls the method; a paper's name is for what the paper describes."""
        names_a_paper = getattr(type(self), "_paper", None)
        own_name = self.learner.method.own_name(self.args) if names_a_paper else None
        return own_name or self._name

    @contextlib.contextmanager
    def _named_as_trained(self) -> Iterator[None]:
        """Lets TRL's card name the method as `trained_by` does, and its paper only with it."""
        if self.trained_by == self._name:
            yield
            return
        self._name, self._paper = self.trained_by, {}
        try:
            yield
        finally:
            del self._name, self._paper  # those of the class again, by which checkpoints know each other

    def _get_output_dir(self, trial: Any) -> str:
        return str(self._staging) if self._staging is not None else super()._get_output_dir(trial)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        run_dir = self._get_output_dir(trial)
        staged = StagedCheckpoint(run_dir, self.state.global_step, self.accelerator)
        with staged.writing():
            self._staging = staged.folder.parent
            try:
                super()._save_checkpoint(model, trial)
            finally:
                self._staging = None
            self._save_local_state(staged.folder, staged.final)
        if self.args.push_to_hub:
            self._push_from_checkpoint(str(staged.final))
        if self.args.should_save:
            rotate_checkpoints(
                output_dir=run_dir,
                save_total_limit=self.args.save_total_limit,
                best_model_checkpoint=self.state.best_model_checkpoint,
                use_mtime=True,
            )

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        # The parent pushes in the background while it saves: wait until the folder has its final name.
        if self._staging is None:
            super()._push_from_checkpoint(checkpoint_folder)

    def _save_local_state(self, staged: Path, final: Path) -> None:
        loss_since_log = self.accelerator.gather(self._tr_loss.reshape(1)).tolist()
        best = final.with_name(f"{PREFIX_CHECKPOINT_DIR}-{self.state.best_global_step}")
        has_best = best == final or best.is_dir()  # the parent has looked for it where this checkpoint is written
        if has_best:
            self.state.best_model_checkpoint = str(best)  # on every rank: each loads the best model at the end
        self._saved_heads.save(staged, self.args.should_save)
        if not self.args.should_save:
            return
        ResumeState.of(self, loss_since_log).write(staged)
        if has_best:
            self.state.save_to_json(str(staged / TRAINER_STATE_NAME))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        self._weights_from = resume_from_checkpoint
        with self._saved_heads.hidden_as_in(resume_from_checkpoint):
            super()._load_from_checkpoint(resume_from_checkpoint, model)
        self._saved_heads.load(resume_from_checkpoint)

    def _load_best_model(self) -> None:
        self._weights_from = str(self.state.best_model_checkpoint)
        with self._saved_heads.hidden_as_in(self._weights_from):
            super()._load_best_model()

    def _issue_warnings_after_load(self, load_result: Any) -> None:
        model = self.model
        if self._run_facts.engine is not None or not isinstance(model, PreTrainedModel):
            super()._issue_warnings_after_load(load_result)
        elif passed_over_weights(model, load_result):
            load_weights(model, self._weights_from)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        with self._saved_heads.completed_optimizer(self.optimizer, self.state.global_step) as warning:
            super()._save_optimizer_and_scheduler(output_dir)
        if warning is not None:
            self._say(warning)

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        if self._resumed is not None:
            self._resumed.restore(self)
            self._resumed = None
        if self.state.global_step >= self.state.max_steps:  # the parent would train a step before it looks
            self.control.should_training_stop = True
            return
        super()._run_epoch(*args, **kwargs)

    def _save(self, output_dir: str | None = None, state_dict: Mapping[str, Any] | None = None) -> None:
        if state_dict is not None:
            state_dict = {name: value for name, value in state_dict.items() if not LocalHeads.is_name_of_head(name)}
        super()._save(output_dir, state_dict)
