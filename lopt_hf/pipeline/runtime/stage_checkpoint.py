"""What one stage contributes to a checkpoint and to the saved model, and how it goes on from a checkpoint."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from huggingface_hub import upload_folder
from peft import PeftModel
from torch import nn
from transformers.trainer_callback import ExportableState
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, rotate_checkpoints

from lopt_hf.pipeline.runtime.checkpoint import (
    INCOMPLETE,
    Manifest,
    assemble_model,
    load_weights,
    publish_when_complete,
    save_weights,
)
from lopt_hf.pipeline.runtime.launch import PipelineWorld
from lopt_hf.pipeline.runtime.optimizer_state import load_optimizer_state, save_optimizer_state
from lopt_hf.pipeline.runtime.stage import StagePlan
from lopt_hf.trainers.checkpoint import HEADS_FILE, STATE_FILE

__all__ = ["StageCheckpointMixin"]

# The mixins stand before a trainer in the list of base classes; a type checker is told that they are one.
if TYPE_CHECKING:
    from lopt_hf.trainers.lopt_mixin import LoPTMixin as TrainerBase
else:
    TrainerBase = object

SCHEDULER_FILE = "scheduler.pt"
TRAINER_STATE_FILE = "trainer_state.json"


class StageCheckpointMixin(TrainerBase):
    """Writes and reads a stage's part of a checkpoint, by names that do not depend on how blocks are spread."""

    args: Any
    model: Any
    optimizer: Any
    lr_scheduler: Any
    world: PipelineWorld
    store: dist.Store
    plan: StagePlan
    plans: list[StagePlan]
    _is_of_own_block: Callable[[str], bool]
    _manifest: Manifest | None = None  # of the checkpoint that the run goes on from

    def _state_to_save(self) -> dict[str, torch.Tensor]:
        """What training changes: trainable weights and the buffers that a checkpoint holds."""
        state = self.model.state_dict(keep_vars=True)
        return {n: t for n, t in state.items() if not isinstance(t, nn.Parameter) or t.requires_grad}

    def _stepped_parameters(self) -> dict[str, torch.Tensor]:
        heads = {f"local_heads.{name}": parameter for name, parameter in self.local_heads.named_parameters()}
        return {**{n: p for n, p in self.model.named_parameters() if p.requires_grad}, **heads}

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        if self.world.replica != 0:
            return
        name = f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        output_dir = Path(self.args.output_dir)
        staged, final = output_dir / f"{INCOMPLETE}{name}" / name, output_dir / name
        folder = staged / self.plan.name
        shutil.rmtree(folder, ignore_errors=True)  # of a run that was killed while it wrote
        folder.mkdir(parents=True)
        self.store_flos()
        save_weights({n: t.detach() for n, t in self._state_to_save().items()}, folder)
        save_optimizer_state(self.optimizer, self._stepped_parameters(), folder)
        torch.save(self.lr_scheduler.state_dict(), folder / SCHEDULER_FILE)
        self._save_rng_state(str(folder))
        for callback in [*self.callback_handler.callbacks, self.control]:
            if isinstance(callback, ExportableState):
                states: Any = self.state.stateful_callbacks
                states[type(callback).__name__] = callback.state()
        self.state.save_to_json(str(folder / TRAINER_STATE_FILE))
        self._save_local_state(folder, final)
        if isinstance(self.model, PeftModel):
            self.model.peft_config[self.model.active_adapter].save_pretrained(str(folder))
        details = {
            "step": self.state.global_step,
            "model": self._base_model().config._name_or_path,
            "data_parallel": self.world.num_replicas,
            **self._block_settings(),
        }
        if publish_when_complete(self.store, staged, final, self.plans, details):
            rotate_checkpoints(str(output_dir), save_total_limit=self.args.save_total_limit, use_mtime=True)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        assert self._manifest is not None and self._resumed is not None
        folders = self._manifest.stage_folders
        load_weights(self._state_to_save(), folders)
        load_weights(self._heads_state(), folders, HEADS_FILE)
        metrics: dict[str, list[float]] = {}
        for folder in folders:
            saved = json.loads((folder / STATE_FILE).read_text(encoding="utf-8"))["metrics_since_log"]
            is_task = self.plan.is_last and folder == folders[-1]
            metrics |= {
                name: values
                for name, values in saved.items()
                if self._is_of_own_block(name) or (is_task and not name.startswith("local_loss/"))
            }
        self._resumed["metrics_since_log"] = metrics

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None:
            return
        assert self._manifest is not None
        load_optimizer_state(self.optimizer, self._stepped_parameters(), self._manifest.stage_folders)
        state = torch.load(Path(checkpoint) / SCHEDULER_FILE, weights_only=True)
        groups = self.optimizer.param_groups
        if len(state.get("base_lrs", groups)) != len(groups):  # other stages, other parameter groups
            state |= {"base_lrs": self.lr_scheduler.base_lrs, "_last_lr": [group["lr"] for group in groups]}
            state["lr_lambdas"] = [None] * len(groups)
        self.lr_scheduler.load_state_dict(state)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Makes one stock checkpoint of all stages; every process must call it, and waits until it is complete.

        Args:
            output_dir: Where it goes. Default: `args.output_dir`.
            _internal_call: As in the parent.
        """
        target = Path(output_dir or self.args.output_dir)
        staged = target / f"{INCOMPLETE}model"
        store = self.world.new_run_store()
        if self.world.replica == 0:
            folder = staged / self.plan.name
            shutil.rmtree(folder, ignore_errors=True)
            self._save(str(folder), self._exported_state())
            if store.add("written", 1) == len(self.plans):
                assemble_model([staged / plan.name for plan in self.plans], target)
                if self.processing_class is not None:
                    self.processing_class.save_pretrained(target)
                shutil.rmtree(staged)
                store.set("complete", "")
        self.world.monitor.wait_for(store, "complete")
        if self.world.reports:
            self.create_model_card(model_name=target.name)

    def _exported_state(self) -> dict[str, torch.Tensor] | None:
        """What goes into the model: a head that is tied to the embeddings is saved with them, on another stage."""
        if isinstance(self.model, PeftModel):
            return None
        others = {} if self.plan.is_last else self._owned()[-1]  # the frozen readout
        state = {name: tensor for name, tensor in self.model.state_dict().items() if name not in others}
        if self.plan.is_last and self._base_model().config.get_text_config(decoder=True).tie_word_embeddings:
            head = self._base_model().get_output_embeddings()
            own = {id(parameter) for parameter in head.parameters()}
            state = {n: t for n, t in self.model.state_dict(keep_vars=True).items() if id(t) not in own}
        return state

    def push_model(self) -> None:
        """Uploads the saved model to the hub, without the checkpoints; by the process that reports."""
        upload_folder(
            repo_id=str(self.hub_model_id),
            folder_path=str(self.args.output_dir),
            token=self.args.hub_token,
            commit_message="End of training",
            ignore_patterns=[f"{PREFIX_CHECKPOINT_DIR}-*", f"{INCOMPLETE}*"],
        )
