"""The heads of local learning in a run's checkpoints: where they are, how they get there, and how they come back."""

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from peft import PeftModel
from peft.utils import SAFETENSORS_WEIGHTS_NAME as ADAPTER_WEIGHTS_NAME
from transformers.utils import CONFIG_NAME, SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from lopt_hf.common.upstream.trainers import OPTIMIZER_NAME, SCHEDULER_NAME, TRAINER_STATE_NAME
from lopt_hf.local.heads import HEADS_NAME
from lopt_hf.local.learner import LocalLearner
from lopt_hf.trainers.checkpoint import (
    HEADS_FILE,
    check_files,
    complete_states,
    fsdp_files,
    fsdp_weights,
    load_heads,
    load_whole_state,
    save_heads,
    whole_state,
)

__all__ = ["SavedHeads"]


class SavedHeads:
    """What a trainer asks where its checkpoints' files depend on the engine.

    Without an engine the heads stand beside the model, and have a file of their own. An engine trains them as a part
    of the model: FSDP2's checkpoints have them in that file too, DeepSpeed's among the model's weights.

    Attributes:
        is_fsdp2: Whether FSDP2 shards model and heads.
        are_apart: Whether a checkpoint has the heads in a file of their own.

    Args:
        learner: Whose heads they are.
        accelerator: The run's processes and engine.
    """

    def __init__(self, learner: LocalLearner, accelerator: Accelerator) -> None:
        engine = learner.run.engine
        self.is_fsdp2 = engine is not None and engine.startswith("FSDP2")
        self.are_apart = self.is_fsdp2 or engine is None
        self._learner = learner
        self._accelerator = accelerator
        self._is_adapted = isinstance(learner.model, PeftModel)

    def check(self, checkpoint: str) -> None:
        """Checks that a checkpoint has all files that a run goes on from, whole; another engine's are its own.

        Raises:
            ValueError: If one is missing or damaged, or is of another model; the message names it.
        """
        if self.is_fsdp2:
            sharded = fsdp_files(self._accelerator.state.fsdp_plugin)
            check_files(checkpoint, [*sharded, SCHEDULER_NAME, TRAINER_STATE_NAME], {})
            if not self._are_within(checkpoint):
                check_files(checkpoint, [HEADS_FILE], {})
        elif self.are_apart:
            names = [OPTIMIZER_NAME, SCHEDULER_NAME, TRAINER_STATE_NAME, HEADS_FILE, *self._weight_files(checkpoint)]
            check_files(checkpoint, names, {n: tensor.shape for n, tensor in self._learner.model.state_dict().items()})

    def _weight_files(self, checkpoint: str) -> list[str]:
        if self._is_adapted:  # PEFT saves an adapter in a folder of its name
            model: Any = self._learner.model
            return [
                ADAPTER_WEIGHTS_NAME if name == "default" else f"{name}/{ADAPTER_WEIGHTS_NAME}"
                for name in model.peft_config
            ]
        index = Path(checkpoint) / SAFE_WEIGHTS_INDEX_NAME
        if not index.is_file():
            return [SAFE_WEIGHTS_NAME]
        return sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))

    def _are_within(self, checkpoint: str) -> bool:
        """Whether a checkpoint has the heads among the model's weights, where FSDP2 runs had them at first."""
        if not self.is_fsdp2 or self._is_adapted or (Path(checkpoint) / HEADS_FILE).is_file():
            return False
        heads = {f"{HEADS_NAME}.{name}" for name in self._learner.heads.state_dict()}
        return heads <= fsdp_weights(self._accelerator.state.fsdp_plugin, checkpoint)

    def save(self, folder: Path, writes: bool) -> None:
        """Saves the heads into a checkpoint's folder, and what a sharded one lacks.

        Args:
            folder: The folder.
            writes: Whether this process writes; all must call it, as the heads' parts come from all.
        """
        heads = whole_state(self._learner.heads) if self.is_fsdp2 else self._learner.state()
        if not writes:
            return
        if self.are_apart:
            save_heads(heads, folder)
        if self.is_fsdp2 and not self._is_adapted and not (folder / CONFIG_NAME).is_file():
            # A sharded checkpoint has none, and only this run's says whether its LM head has a weight of its own.
            self._learner.base_model.config.save_pretrained(folder)

    @contextlib.contextmanager
    def completed_optimizer(self, optimizer: Any, step: int) -> Iterator[str | None]:
        """Makes a context in which the optimizer is saved, with all that a sharded one's loading asks for.

        Args:
            optimizer: The optimizer, maybe in what accelerate has put around it.
            step: The optimizer step, for what to say.

        Yields:
            What to say afterwards, if it cannot be loaded again all the same.
        """
        if not self.is_fsdp2:
            yield None
            return
        inner = optimizer.optimizer if isinstance(optimizer, AcceleratedOptimizer) else optimizer
        # Of the state dict alone: the optimizer's state is saved by the names that the model gives the heads.
        with self._learner.heads.left_out(self._learner.base_model), complete_states(inner) as missing:
            warning = (
                f"The checkpoint of step {step} cannot be resumed from: {missing} weights have not been stepped yet, "
                f"and torch loads the state of {type(inner).__name__} under FSDP2 only if it has that of all. Resume "
                "from a later one, or set optim to adamw_torch, whose state is completed."
            )
            yield warning if missing else None

    def load(self, checkpoint: str) -> None:
        """Loads the heads of a checkpoint, unless they came with the model's weights."""
        if self._are_within(checkpoint):
            return
        if self.is_fsdp2:
            load_whole_state(self._learner.heads, load_heads(checkpoint))
        elif self.are_apart:
            self._learner.load_state(load_heads(checkpoint))

    def hidden_as_in(self, checkpoint: str) -> contextlib.AbstractContextManager[None]:
        """Makes a context in which the model has the weights that a checkpoint has of it."""
        is_apart = self.is_fsdp2 and not self._are_within(checkpoint)
        return self._learner.heads.hidden(self._learner.base_model) if is_apart else contextlib.nullcontext()
