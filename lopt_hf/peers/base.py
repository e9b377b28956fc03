"""What the peers have in common: each is a callback of a stock trainer, and refuses runs that it does not suit."""

import weakref
from typing import Any, ClassVar, cast

import torch
from peft import PeftModel
from transformers import PreTrainedModel, TrainerCallback, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState
from transformers.utils import logging

from lopt_hf.local.arguments import LocalArguments

__all__ = ["Peer"]

logger = logging.get_logger(__name__)

# Which peer has hold of a model, in a run that has not come to its end
_UNFINISHED: "weakref.WeakKeyDictionary[PreTrainedModel, Peer]" = weakref.WeakKeyDictionary()


class Peer(TrainerCallback, ExportableState):
    """A way to train by the task loss alone, for any trainer of transformers or TRL, in one process.

    A peer holds no reference to the model itself, only to parts of it.

    Give it to the trainer when that is made: `SFTTrainer(model, args, callbacks=[LISA()])`. A planner, which has no
    trainer, calls `prepare`, `start` and `begin_step` itself.

    Raises:
        ValueError: When the trainer is made, if the run does not suit the method; when training begins, if the
            checkpoint to go on from was trained otherwise. The message names option, value and fix.
    """

    name: ClassVar[str]
    takes_adapters: ClassVar[bool] = False
    takes_processes: ClassVar[bool] = False

    _is_prepared = False

    # ---- What a peer does ----

    def settings(self) -> dict[str, Any]:
        """What a run that goes on from a checkpoint must share with the one that wrote it, as JSON."""
        return {}

    def check(self, args: TrainingArguments) -> None:
        """Checks the run's arguments.

        Raises:
            ValueError: If one does not work; the message names field, value and fix.
        """
        if isinstance(args, LocalArguments):
            raise ValueError(
                f"{self.name} trains end to end, and makes trainable what local learning has frozen; pass it to a "
                "trainer of TRL or transformers, or leave it out."
            )
        if not self.takes_processes and (args.world_size > 1 or args.fsdp or args.deepspeed):
            raise ValueError(
                f"{self.name} trains in one process without an engine, and this run has {args.world_size}: DDP, FSDP "
                "and DeepSpeed fix at the start which gradients they handle; launch one, without fsdp and deepspeed."
            )

    def prepare(self, model: PreTrainedModel) -> None:
        """Does what has to be done to the model once, before it is trained or a checkpoint is loaded."""

    def start(self, optimizer: torch.optim.Optimizer) -> None:
        """Begins training."""

    def begin_step(self, optimizer: torch.optim.Optimizer, step: int) -> None:
        """Begins an optimizer step, counted from 0."""

    def stop(self) -> None:
        """Ends training: the model is as trainable as it was after `prepare`."""

    # ---- The trainer's events ----

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps of it."""
        return {"args": self.settings(), "attributes": {}}

    def on_init_end(self, args: TrainingArguments, state: Any, control: Any, **kwargs: Any) -> None:
        self.check(args)
        self._prepare(kwargs["model"])

    def on_train_begin(self, args: TrainingArguments, state: Any, control: Any, **kwargs: Any) -> None:
        if not self._is_prepared:
            raise ValueError(
                f"{self.name} came to a trainer that was there already; pass it to its `callbacks`, and leave "
                "restore_callback_states_from_checkpoint unset, which would make another one of it."
            )
        if state.global_step > 0:
            self.check_state(state)
        self._end_unfinished(_base_model(kwargs["model"]))
        self.start(kwargs["optimizer"])
        _UNFINISHED[_base_model(kwargs["model"])] = self

    def on_step_begin(self, args: TrainingArguments, state: Any, control: Any, **kwargs: Any) -> None:
        self.begin_step(kwargs["optimizer"], state.global_step)

    def on_train_end(self, args: TrainingArguments, state: Any, control: Any, **kwargs: Any) -> None:
        self.stop()
        _UNFINISHED.pop(_base_model(kwargs["model"]), None)

    def _prepare(self, model: Any) -> None:
        if isinstance(model, PeftModel) and not self.takes_adapters:
            raise ValueError(f"{self.name} trains the model's own weights; leave out peft_config (use_peft).")
        self._end_unfinished(_base_model(model))
        self.prepare(_base_model(model))
        self._is_prepared = True

    def _end_unfinished(self, model: PreTrainedModel) -> None:
        """Ends the run before on this model, if it broke off: its hooks would step an optimizer that is no more."""
        unfinished = _UNFINISHED.pop(model, None)
        if unfinished is None:
            return
        unfinished.stop()
        if unfinished is not self:
            logger.warning(
                f"{self.name}: {unfinished.name} had not come to its end on this model; it is ended now, and trains "
                "nothing of it any more."
            )

    def check_state(self, state: TrainerState) -> None:
        """Checks the state that a checkpoint holds.

        Raises:
            ValueError: If its run was trained otherwise; the message names the setting, both values and the fix.
        """
        callbacks = cast(dict[str, Any], state.stateful_callbacks or {})  # by name, once they are in a state
        stored = callbacks.get(type(self).__name__)
        if stored is None:
            raise ValueError(f"resume_from_checkpoint: that run was not trained by {self.name}; start anew.")
        now = self.settings()
        for name, value in now.items():
            before = stored["args"].get(name)
            if before != value:
                raise ValueError(
                    f"resume_from_checkpoint: {self.name} began with {name}={before!r}, and now it is {value!r}; set "
                    "it as it was, or start anew."
                )


def _base_model(model: Any) -> PreTrainedModel:
    return cast(PreTrainedModel, model.get_base_model() if isinstance(model, PeftModel) else model)
