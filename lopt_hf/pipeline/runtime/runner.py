"""The trainer of one stage: what every stage does (`PipelineMixin`), and that of LoPT (`PipelineTrainer`).

Each stage is a training run of its own, of a stock trainer on its part of the model: it builds the same batches from
the same seed, has its own optimizer, scheduler and clipping, and exchanges nothing with the others but hidden states,
which go forward only.

Shapes: B batch, T tokens, D hidden channels.
"""

import time
import zlib
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from accelerate.data_loader import prepare_data_loader
from peft import PeftModel
from torch import nn
from torch.utils.data import DataLoader
from transformers import PreTrainedModel, PrinterCallback
from transformers.trainer_utils import TrainOutput
from transformers.utils import SAFE_WEIGHTS_NAME

from lopt_hf.common.distributed import GradientReducer, broadcast_parameters
from lopt_hf.common.resuming import find_checkpoint
from lopt_hf.local.blocks import Block, split_layers
from lopt_hf.local.objectives import LocalObjective, ReconstructionObjective
from lopt_hf.local.readout import ReadoutObjective
from lopt_hf.pipeline.runtime.channel import BatchId, ReceivingChannel, SendingChannel
from lopt_hf.pipeline.runtime.checkpoint import Manifest, check_shared_folder, remove_incomplete
from lopt_hf.pipeline.runtime.config import PipelineArguments, PipelineConfig
from lopt_hf.pipeline.runtime.launch import PipelineWorld, check_same
from lopt_hf.pipeline.runtime.stage import HiddenStateInput, StagePlan, load_stage, plan_stages
from lopt_hf.pipeline.runtime.stage_checkpoint import StageCheckpointMixin
from lopt_hf.pipeline.runtime.stage_logs import StageCallback, StageLogMixin
from lopt_hf.pipeline.runtime.timeline import Timeline
from lopt_hf.trainers.lopt_trainer import LoPTTrainer

__all__ = ["PipelineMixin", "PipelineTrainer"]


class PipelineMixin(StageCheckpointMixin, StageLogMixin):
    """Makes a trainer with blocks that of one stage of a pipeline; put it before the trainer in the list of bases.

    The config class must mix in `PipelineArguments` in the same way. The model is one stage's part, its input comes
    from the previous stage and its output goes to the next one right after the forward.

    Args:
        model: The stage's part of the model, PEFT-wrapped or not.
        args: Training arguments, the same on every stage.
        world: The processes of the run.
        **kwargs: The trainer's other arguments.
    """

    args: Any

    def __init__(
        self, model: PreTrainedModel | PeftModel, args: PipelineArguments, *, world: PipelineWorld, **kwargs: Any
    ) -> None:
        self.world = world
        part: Any = model
        base_model = part.get_base_model() if isinstance(model, PeftModel) else part
        num_layers = base_model.config.get_text_config(decoder=True).num_hidden_layers
        self.plans = plan_stages(split_layers(num_layers, args.num_blocks, args.split_at), world.num_stages)
        self.plan = self.plans[world.stage]
        if not world.reports:
            args.disable_tqdm, args.report_to, args.push_to_hub = True, [], False
        super().__init__(part, args, **kwargs)
        if not world.reports:
            self.remove_callback(PrinterCallback)
        self.timeline = Timeline(self.plan.index, args.timeline_steps)
        self.boundary.around_backward = partial(self.timeline.span, "backward")
        self._input = None if self.plan.is_first else HiddenStateInput(self.stack.layers[self.plan.start])
        self._reducer = GradientReducer(group=world.data_group)
        self._receiver: ReceivingChannel | None = None
        self._sender: SendingChannel | None = None
        self._batch = BatchId(0, 0, 0)
        self._loss_at = 0.0
        self.micro_batch = 0
        if not self.plan.is_last:
            # Before the boundary's own hook: the output leaves before its local backward starts.
            self.stack.layers[self.plan.stop - 1].register_forward_hook(self._send, prepend=True)
        self.add_callback(StageCallback(self))

    # ---- What this stage is ----

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

    # ---- One micro-batch ----

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Any:
        self._batch = BatchId(self.state.global_step, self.micro_batch, _checksum(inputs))
        self.timeline.step = self.state.global_step
        self.timeline.micro_batch += 1
        if self._input is not None and self._receiver is not None:
            self.timeline.note_depth(self._receiver.depth)
            with self.timeline.span("receive"):
                hidden_BTD = self._receiver.get(self._batch)
            # Reentrant checkpointing gives no gradient unless an input requires one.
            self._input.hidden_BTD = hidden_BTD.requires_grad_(self._base_model().is_activation_checkpointing)
        with self.timeline.span("forward"):
            if not self.plan.is_last:
                return self._run_blocks(inputs, num_items_in_batch)
            result: Any = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        self._loss_at = time.perf_counter()
        if num_items_in_batch is None or self.world.num_replicas == 1:
            return result
        # The gradients are averaged over the replicas, and the loss was divided by the tokens of all of them.
        scale = self.world.num_replicas
        return (result[0] * scale, result[1]) if return_outputs else result * scale

    def _run_blocks(self, inputs: dict[str, Any], num_items_in_batch: torch.Tensor | int | None) -> torch.Tensor:
        """Runs the stage's blocks, whose local losses are all that it learns from."""
        scale, update = self._local_scale(inputs, num_items_in_batch), self._updates_early_blocks()
        arguments = {name: value for name, value in inputs.items() if name != "labels"}
        if self.aux_loss_enabled:
            arguments["output_router_logits"] = True
        with self.boundary.training_forward(self._run_local_backward, scale, update, inputs):
            with self.accelerator.autocast():
                self._base_model().base_model(**arguments, use_cache=False)
        return torch.zeros((), device=self.args.device, requires_grad=True)

    def _send(self, layer: nn.Module, args: tuple, output: Any) -> None:
        if self._sender is None:
            return
        hidden_BTD = output[0] if isinstance(output, tuple) else output
        with self.timeline.span("send"):
            # Here and not where it arrives: the cause is to be named by the stage that made it.
            largest = torch.linalg.vector_norm(hidden_BTD.detach(), torch.inf)
            self._check_finite(f"the largest hidden state of stage {self.plan.index}", largest.item())
            self._sender.put(self._batch, hidden_BTD)

    def _step_early_block(self, index: int) -> None:
        with self.timeline.span("optimizer"):
            super()._step_early_block(index)

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        loss = super().training_step(*args, **kwargs)
        if self.plan.is_last:
            self.timeline.add("backward", self._loss_at, time.perf_counter())
        return loss

    # ---- Replicas ----

    def _reduces_early_gradients(self) -> bool:
        return self.world.num_replicas > 1

    def _clip(self, max_norm: float) -> Any:
        if self.plan.is_last and self.world.num_replicas > 1:
            self._reducer.start(self._learners()[-1])
        return super()._clip(max_norm)

    def _synchronise_start(self) -> None:
        trainable = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        source = self.world.rank_of(self.world.stage, 0)
        broadcast_parameters([*trainable, *self.local_heads.parameters()], source, self.world.data_group)

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
        output_dir = Path(str(self.args.output_dir))
        if not isinstance(self.model, PeftModel) and (output_dir / SAFE_WEIGHTS_NAME).exists():
            raise ValueError(
                f"output_dir={str(output_dir)!r} holds another run's model ({SAFE_WEIGHTS_NAME}), which would be "
                "loaded in place of this run's; choose another output_dir."
            )
        self.store = self.world.new_run_store()
        folder = find_checkpoint(str(output_dir), resume_from_checkpoint)
        shared = self.store, self.world.monitor, self.world.mesh.size()
        check_same(*shared, "checkpoint", {"resume_from_checkpoint": folder})
        if self.world.rank == 0:
            remove_incomplete(output_dir)
        check_shared_folder(*shared, output_dir)
        if folder is not None:
            self._manifest = Manifest(folder)
            self._manifest.check("data_parallel", self.world.num_replicas)
            folder = str(self._manifest.folder_for(self.plan))
        self._open_channels()
        output = super().train(folder, *args, **kwargs)
        for end in (self._receiver, self._sender):
            if end is not None:
                end.close()
        self._sender = self._receiver = None
        self._collect_timelines()
        return output

    def _open_channels(self) -> None:
        shared: dict[str, Any] = {
            "depth": self.args.channel_depth,
            "device": self.args.device,
            "monitor": self.world.monitor,
        }
        if self.world.previous is not None:
            peer = self.world.rank_of(self.plan.index - 1)
            self._receiver = ReceivingChannel(peer, self.world.previous, **shared)
        if self.world.next is not None:
            self._sender = SendingChannel(self.world.rank_of(self.plan.index + 1), self.world.next, **shared)


class PipelineTrainer(PipelineMixin, LoPTTrainer):
    """Trainer for one stage of PPLL, pipelined local learning (https://huggingface.co/papers/2411.12780).

    What differs from [`LoPTTrainer`]: the model is one stage's part, its input comes from the previous stage and its
    output goes to the next one right after the forward. A K-stage run ends with the weights of the one-process run.

    Args:
        model: The stage's part of the model, from `load_part`, PEFT-wrapped or not.
        args: Training arguments, the same on every stage.
        world: The processes of the run.
        **kwargs: The other arguments of `LoPTTrainer`.
    """

    _tag_names = ["trl", "sft", "ppll", "local-learning"]
    _name = "PPLL"

    args: PipelineConfig

    @staticmethod
    def load_part(checkpoint: str, plan: StagePlan, args: PipelineConfig, **kwargs: Any) -> PreTrainedModel:
        """Loads what a stage trains, and the frozen norm and LM head where its objective reads through them.

        Args:
            checkpoint: Hub id or local folder of the whole model's checkpoint.
            plan: The stage.
            args: Training arguments.
            **kwargs: For `from_pretrained`.
        """
        return load_stage(checkpoint, plan, keeps_readout=args.local_objective == "readout", **kwargs)

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


def _checksum(inputs: Mapping[str, Any]) -> int:
    """Of all tensors of a batch: two stages with the same one train on the same tokens, masks and labels."""
    checksum = 0
    for name in sorted(inputs):
        if isinstance(inputs[name], torch.Tensor):
            checksum = zlib.crc32(
                inputs[name].cpu().contiguous().numpy().tobytes(), zlib.crc32(name.encode(), checksum)
            )
    return checksum
