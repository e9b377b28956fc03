"""The trainer of one stage.

Each stage is a training run of its own, of a stock trainer on its part of the model: it builds the same batches from the
same seed, has its own optimizer, scheduler and clipping, and exchanges nothing with the others but hidden states, which
go forward only.

Shapes: B batch, T tokens, D hidden channels.
"""

import json
import shutil
import time
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from accelerate.data_loader import prepare_data_loader
from peft import PeftModel
from torch import nn
from torch.utils.data import DataLoader
from transformers import PreTrainedModel, PrinterCallback, TrainerCallback
from transformers.trainer_callback import ExportableState
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, TrainOutput, rotate_checkpoints
from transformers.utils import SAFE_WEIGHTS_NAME

from lopt_hf.blocks import Block, split_layers
from lopt_hf.distributed import GradientReducer, broadcast_parameters
from lopt_hf.objectives import LocalObjective, ReconstructionObjective
from lopt_hf.pipeline.channel import BatchId, ReceivingChannel, SendingChannel
from lopt_hf.pipeline.checkpoint import (
    Manifest,
    assemble_model,
    find_checkpoint,
    load_weights,
    publish_when_complete,
    save_weights,
)
from lopt_hf.pipeline.config import PipelineConfig
from lopt_hf.pipeline.launch import PipelineWorld
from lopt_hf.pipeline.optimizer_state import load_optimizer_state, save_optimizer_state
from lopt_hf.pipeline.stage import HiddenStateInput, plan_stages
from lopt_hf.pipeline.timeline import Span, Timeline, draw_timeline, write_chrome_trace
from lopt_hf.readout import ReadoutObjective
from lopt_hf.trainers.checkpoint import HEADS_FILE, STATE_FILE
from lopt_hf.trainers.lopt_trainer import LoPTTrainer

__all__ = ["PipelineTrainer"]

SCHEDULER_FILE = "scheduler.pt"
TRAINER_STATE_FILE = "trainer_state.json"


class PipelineTrainer(LoPTTrainer):
    """Trainer for one stage of PPLL, pipeline parallelism with local learning (https://huggingface.co/papers/2411.12780).

    What differs from [`LoPTTrainer`]: the model is one stage's part, its input comes from the previous stage and its
    output goes to the next one right after the forward. A K-stage run ends with the weights of the one-process run.

    Args:
        model: The stage's part of the model, from `load_stage`, PEFT-wrapped or not.
        args: Training arguments, the same on every stage.
        world: The processes of the run.
        **kwargs: The other arguments of `LoPTTrainer`.
    """

    _tag_names = ["trl", "sft", "ppll", "local-learning"]
    _name = "PPLL"

    args: PipelineConfig

    def __init__(
        self, model: PreTrainedModel | PeftModel, args: PipelineConfig, *, world: PipelineWorld, **kwargs: Any
    ) -> None:
        self.world = world
        base_model: Any = model.get_base_model() if isinstance(model, PeftModel) else model
        num_layers = base_model.config.get_text_config(decoder=True).num_hidden_layers
        self.plans = plan_stages(split_layers(num_layers, args.num_blocks, args.split_at), world.num_stages)
        self.plan = self.plans[world.stage]
        if not self._reports:
            args.disable_tqdm, args.report_to = True, []
        super().__init__(model, args, **kwargs)
        if not self._reports:
            self.remove_callback(PrinterCallback)
        self.timeline = Timeline(args.timeline_steps)
        self._input = None if self.plan.is_first else HiddenStateInput(self.stack.layers[self.plan.start])
        self._reducer = GradientReducer(group=world.data_group)
        self._receiver: ReceivingChannel | None = None
        self._sender: SendingChannel | None = None
        self._manifest: Manifest | None = None
        self._batch = BatchId(0, 0, 0)
        self.micro_batch = 0
        if not self.plan.is_last:
            # Before the boundary's own hook: the output leaves before its local backward starts.
            self.stack.layers[self.plan.stop - 1].register_forward_hook(self._send, prepend=True)
        self.add_callback(_StageCallback(self))

    # ---- What this stage is ----

    @property
    def _reports(self) -> bool:
        """Whether this process tells the user how the run goes: the one with the task loss."""
        return self.world.stage == self.world.num_stages - 1 and self.world.replica == 0

    def _early_blocks_here(self) -> list[Block]:
        return [block for block in self.plan.blocks if block in self.blocks[:-1]]

    def _separate_embeddings(self, base_model: PreTrainedModel) -> None:
        config = base_model.config
        if not config.get_text_config(decoder=True).tie_word_embeddings:
            return
        if self.args.tied_embeddings == "untie":  # they are apart already, on two stages
            config.get_text_config(decoder=True).tie_word_embeddings = False
            config.tie_word_embeddings = False
            return
        for module in (base_model.get_input_embeddings(), base_model.get_output_embeddings()):
            module.requires_grad_(False)

    def _make_objective(self, base_model: PreTrainedModel) -> LocalObjective:
        if self.args.local_objective != "readout":
            return super()._make_objective(base_model)
        # Only the last stage trains norm and head; the others hold them frozen, and need no copy.
        objective = ReadoutObjective.from_model(base_model, copy=self.plan.is_last)
        self._readout_fingerprint = objective.fingerprint
        # Without an early block here nothing learns from it, and a copy of the head is large.
        return objective if self.early_blocks else ReconstructionObjective()

    def _block_settings(self) -> dict[str, Any]:
        settings = super()._block_settings()
        if self.args.local_objective == "readout":
            settings |= {"local_objective": ReadoutObjective.__name__, "readout": self._readout_fingerprint}
        return settings

    # ---- One micro-batch ----

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Any:
        self._batch = BatchId(self.state.global_step, self.micro_batch, _checksum(inputs))
        self.timeline.step, self.timeline.micro_batch = self.state.global_step, self.micro_batch
        if self._input is not None and self._receiver is not None:
            self.timeline.note_depth(self._receiver.depth)
            with self.timeline.span("receive"):
                hidden_BTD = self._receiver.get(self._batch)
            # Reentrant checkpointing gives no gradient unless an input requires one.
            self._input.hidden_BTD = hidden_BTD.requires_grad_(self._base_model().is_activation_checkpointing)
        with self.timeline.span("forward"):
            if not self.plan.is_last:
                return self._run_block(inputs)
            result: Any = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        if num_items_in_batch is None or self.world.num_replicas == 1:
            return result
        # The gradients are averaged over the replicas, and the loss was divided by the tokens of all of them.
        scale = self.world.num_replicas
        return (result[0] * scale, result[1]) if return_outputs else result * scale

    def _run_block(self, inputs: dict[str, Any]) -> torch.Tensor:
        """Runs the stage's blocks, whose local losses are all that it learns from."""
        steps = self.current_gradient_accumulation_steps
        update = self.args.train_early_blocks and self.state.global_step % self.args.local_update_interval == 0
        arguments = {name: value for name, value in inputs.items() if name != "labels"}
        if self.aux_loss_enabled:
            arguments["output_router_logits"] = True
        with self.boundary.training_forward(self._run_local_backward, 1 / steps, update, inputs):
            with self.accelerator.autocast():
                self._base_model().base_model(**arguments, use_cache=False)
        return torch.zeros((), device=self.args.device, requires_grad=True)

    def _send(self, layer: nn.Module, args: tuple, output: Any) -> None:
        if self._sender is not None:
            with self.timeline.span("send"):
                self._sender.put(self._batch, output[0] if isinstance(output, tuple) else output)

    def _run_local_backward(self, index: int, loss: torch.Tensor) -> None:
        with self.timeline.span("backward"):
            super()._run_local_backward(index, loss)

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        with self.timeline.span("backward"):  # what is left of the step without receiving, forward and sending
            return super().training_step(*args, **kwargs)

    # ---- Replicas ----

    def _reduces_early_gradients(self) -> bool:
        return self.world.num_replicas > 1

    def _clip(self, max_norm: float) -> Any:
        if self.plan.is_last and self.world.num_replicas > 1:
            self._reducer.start(self._clip_groups()[-1])
        return super()._clip(max_norm)

    def _prepare_for_training(self, *args: Any, **kwargs: Any) -> tuple[nn.Module, Any]:
        prepared = super()._prepare_for_training(*args, **kwargs)
        if self.world.num_replicas > 1:
            trainable = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
            source = self.world.rank_of(self.world.stage, 0)
            broadcast_parameters([*trainable, *self.local_heads.parameters()], source, self.world.data_group)
        return prepared

    def _get_dataloader(self, *args: Any, **kwargs: Any) -> DataLoader:
        loader: Any = super()._get_dataloader(*args, **kwargs)
        if self.world.num_replicas == 1:
            return loader
        return prepare_data_loader(
            loader, self.args.device, self.world.num_replicas, self.world.replica, put_on_device=True
        )

    def _get_num_items_in_batch(self, batch_samples: list, device: torch.device) -> torch.Tensor | int | None:
        num_items = super()._get_num_items_in_batch(batch_samples, device)
        if self.world.num_replicas > 1 and isinstance(num_items, torch.Tensor):
            num_items = num_items.to(device)
            dist.all_reduce(num_items, group=self.world.data_group)
        return num_items

    # ---- The run ----

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> TrainOutput:
        output_dir = Path(self.args.output_dir)
        if not isinstance(self.model, PeftModel) and (output_dir / SAFE_WEIGHTS_NAME).exists():
            raise ValueError(
                f"output_dir={str(output_dir)!r} holds another run's model ({SAFE_WEIGHTS_NAME}), which would be loaded "
                "in place of this run's; choose another output_dir."
            )
        folder = find_checkpoint(self.args.output_dir, resume_from_checkpoint)
        self._agree_on("resume_from_checkpoint", folder)
        if folder is not None:
            self._manifest = Manifest(folder)
            self._manifest.check("data_parallel", self.world.num_replicas)
            folder = str(self._manifest.folder_for(self.plan))
        self._open_channels()
        output = super().train(folder, *args, **kwargs)
        if self._sender is not None:
            self._sender.close()
        self._sender = self._receiver = None
        self._collect_timelines()
        return output

    def _agree_on(self, name: str, value: Any) -> None:
        """Raises if another process has another value: the stages would train on different data."""
        key = f"agree/{name}"
        if self.world.rank == 0:
            self.world.store.set(key, json.dumps(value))
        first = json.loads(self.world.store.get(key))
        if value != first:
            raise ValueError(f"{name} is {value!r} here but {first!r} on rank 0; give all processes the same.")

    def _open_channels(self) -> None:
        shared = {"depth": self.args.channel_depth, "device": self.args.device, "monitor": self.world.monitor}
        if self.world.previous is not None:
            peer = self.world.rank_of(self.plan.index - 1)
            self._receiver = ReceivingChannel(peer, self.world.previous, **shared)
        if self.world.next is not None:
            self._sender = SendingChannel(self.world.rank_of(self.plan.index + 1), self.world.next, **shared)

    # ---- Logs ----

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs and self.model.training:
            if self.world.num_replicas > 1:
                self._average_over_replicas(logs)
            logs.update(self._figures())
            if self._reports:
                self._add_other_stages(logs)
        super().log(logs, start_time)

    def _figures(self) -> dict[str, float]:
        return {f"pipeline/stage_{self.plan.index}/{name}": v for name, v in self.timeline.summary().items()}

    def share_logs(self, logs: Mapping[str, Any]) -> None:
        """Hands this stage's figures, at the step of the log, to the process that reports."""
        own = {f"{kind}/block_{block.index}" for kind in ("local_loss", "drift") for block in self.plan.blocks}
        shared = {name: value for name, value in logs.items() if name in own or name.startswith("pipeline/")}
        if "grad_norm" in logs:
            shared[f"pipeline/stage_{self.plan.index}/grad_norm"] = logs["grad_norm"]
        self.world.store.set(self._log_key(self.plan.index), json.dumps(shared))

    def _add_other_stages(self, logs: dict[str, float]) -> None:
        for stage in range(self.plan.index):
            key = self._log_key(stage)
            self.world.store.wait([key])
            logs.update(json.loads(self.world.store.get(key)))
            self.world.store.delete_key(key)

    def _log_key(self, stage: int) -> str:
        return f"log/{self.state.global_step}/{stage}"

    def _average_over_replicas(self, logs: dict[str, float]) -> None:
        metrics = self._metrics["train"]
        names = sorted(metrics)
        means = [sum(metrics[name]) / len(metrics[name]) for name in names]
        values = torch.tensor([logs["loss"], *means], dtype=torch.float64)
        dist.all_reduce(values, group=self.world.data_group)
        totals = dict(zip(names, values[1:].tolist(), strict=True))
        logs["loss"] = values[0].item() / self.world.num_replicas
        for name, total in totals.items():
            metrics[name] = [total if name == "num_tokens" else total / self.world.num_replicas]

    def _collect_timelines(self) -> None:
        if self.args.timeline_steps == 0 or self.world.replica != 0:
            return
        self.world.store.set(f"timeline/{self.plan.index}", json.dumps([vars(s) for s in self.timeline.spans]))
        if not self._reports:
            return
        keys = [f"timeline/{plan.index}" for plan in self.plans]
        self.world.store.wait(keys)
        texts = [self.world.store.get(key) for key in keys]
        timelines = [(f"stage {i}", [Span(**span) for span in json.loads(text)]) for i, text in enumerate(texts)]
        output_dir = Path(self.args.output_dir)
        output_dir.mkdir(parents=True, exist_ok=True)
        write_chrome_trace(output_dir / "timeline.json", timelines)
        draw_timeline(output_dir / "timeline.png", timelines)

    # ---- Checkpoints ----

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
        staged, final = output_dir / f"incomplete-{name}" / name, output_dir / name
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
                self.state.stateful_callbacks[type(callback).__name__] = callback.state()
        self.state.save_to_json(str(folder / TRAINER_STATE_FILE))
        self._save_local_state(folder, final)
        details = {"step": self.state.global_step, "data_parallel": self.world.num_replicas, **self._block_settings()}
        if publish_when_complete(self.world.store, staged, final, self.plans, details):
            rotate_checkpoints(str(output_dir), save_total_limit=self.args.save_total_limit, use_mtime=True)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        assert self._manifest is not None and self._resumed is not None
        folders = self._manifest.stage_folders
        load_weights(self._state_to_save(), folders)
        load_weights(self.local_heads.state_dict(keep_vars=True), folders, HEADS_FILE)
        own = {f"local_loss/block_{block.index}" for block in self.plan.blocks}
        metrics: dict[str, list[float]] = {}
        for folder in folders:
            saved = json.loads((folder / STATE_FILE).read_text(encoding="utf-8"))["metrics_since_log"]
            is_task = self.plan.is_last and folder == folders[-1]
            metrics |= {n: v for n, v in saved.items() if n in own or (is_task and not n.startswith("local_loss/"))}
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
        staged = target / "incomplete-model"
        written = f"model/{target}"
        if self.world.replica == 0:
            folder = staged / self.plan.name
            shutil.rmtree(folder, ignore_errors=True)
            self._save(str(folder), self._exported_state())
            if self.world.store.add(f"{written}/stages", 1) == len(self.plans):
                assemble_model([staged / plan.name for plan in self.plans], target)
                if self.processing_class is not None:
                    self.processing_class.save_pretrained(target)
                shutil.rmtree(staged)
                self.world.store.set(f"{written}/complete", "")
        self.world.store.wait([f"{written}/complete"])
        if self._reports:
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


class _StageCallback(TrainerCallback):
    """Counts micro-batches, times the optimizer's step, and hands on the logs."""

    def __init__(self, trainer: PipelineTrainer) -> None:
        self.trainer = trainer
        self.started = 0.0

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        self.trainer.micro_batch = 0

    def on_substep_end(self, *args: Any, **kwargs: Any) -> None:
        self.trainer.micro_batch += 1

    def on_pre_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        self.started = time.perf_counter()

    def on_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        self.trainer.timeline.add("step", self.started, time.perf_counter())

    def on_log(
        self, args: Any, state: Any, control: Any, logs: Mapping[str, Any] | None = None, **kwargs: Any
    ) -> None:
        if logs is not None and "loss" in logs and not self.trainer.plan.is_last and self.trainer.world.replica == 0:
            self.trainer.share_logs(logs)


def _checksum(inputs: Mapping[str, Any]) -> int:
    """Of all tensors of a batch: two stages with the same one train on the same tokens, masks and labels."""
    checksum = 0
    for name in sorted(inputs):
        if isinstance(inputs[name], torch.Tensor):
            checksum = zlib.crc32(
                inputs[name].cpu().contiguous().numpy().tobytes(), zlib.crc32(name.encode(), checksum)
            )
    return checksum
