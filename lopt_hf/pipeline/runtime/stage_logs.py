"""One log of all stages: what each tells of itself, at the same step, in the record of the one that reports."""

import json
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from transformers import TrainerCallback

from lopt_hf.pipeline.events import Event, chrome_trace, plot_timeline
from lopt_hf.pipeline.runtime.launch import PipelineWorld
from lopt_hf.pipeline.runtime.stage import StagePlan
from lopt_hf.pipeline.runtime.timeline import Timeline

__all__ = ["StageCallback", "StageLogMixin"]

# The mixins stand before a trainer in the list of base classes; a type checker is told that they are one.
if TYPE_CHECKING:
    from lopt_hf.trainers.lopt_mixin import LoPTMixin as TrainerBase
else:
    TrainerBase = object


class StageLogMixin(TrainerBase):
    """Puts every stage's figures into the last stage's logs.

    They go through the rendezvous store, not the channels. The last stage waits for them: when it logs a step, the
    others are done with it or nearly so.
    """

    args: Any
    model: Any
    world: PipelineWorld
    store: dist.Store
    plan: StagePlan
    plans: list[StagePlan]
    timeline: Timeline
    micro_batch: int

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs and self.model.training:
            if self.world.num_replicas > 1:
                self._average_over_replicas(logs)
            logs.update(self._figures())
            if self.world.reports:
                self._add_other_stages(logs)
        super().log(logs, start_time)

    def _figures(self) -> dict[str, float]:
        return {f"pipeline/stage_{self.plan.index}/{name}": v for name, v in self.timeline.summary().items()}

    def share_logs(self, logs: Mapping[str, Any]) -> None:
        """Hands this stage's figures, at the step of the log, to the process that reports."""
        shared = {n: v for n, v in logs.items() if self._is_of_own_block(n) or n.startswith("pipeline/")}
        if "grad_norm" in logs:
            shared[f"pipeline/stage_{self.plan.index}/grad_norm"] = logs["grad_norm"]
        self.store.set(self._log_key(self.plan.index), json.dumps(shared))

    def _is_of_own_block(self, name: str) -> bool:
        """Whether a logged figure is of one of this stage's blocks, such as `local_loss/block_0`."""
        kind, _, rest = name.partition("/")
        own = [f"block_{block.index}" for block in self.plan.blocks]
        return kind in ("local_loss", "drift") and rest.partition("/")[0] in own

    def _add_other_stages(self, logs: dict[str, float]) -> None:
        for stage in range(self.plan.index):
            key = self._log_key(stage)
            self.world.monitor.wait_for(self.store, key)
            logs.update(json.loads(self.store.get(key)))
            self.store.delete_key(key)

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
        self.store.set(f"timeline/{self.plan.index}", json.dumps([vars(event) for event in self.timeline.events]))
        if not self.world.reports:
            return
        keys = [f"timeline/{plan.index}" for plan in self.plans]
        for key in keys:
            self.world.monitor.wait_for(self.store, key)
        texts = [self.store.get(key) for key in keys]
        events = [Event(**event) for text in texts for event in json.loads(text)]
        origin = min(event.start for event in events)
        events = [replace(event, start=event.start - origin, end=event.end - origin) for event in events]
        output_dir = Path(self.args.output_dir)
        output_dir.mkdir(parents=True, exist_ok=True)
        title = f"{len(self.plans)} stages, first {self.args.timeline_steps} steps"
        (output_dir / "timeline.json").write_text(chrome_trace({title: events}), encoding="utf-8")
        plot_timeline({title: events}).savefig(output_dir / "timeline.png", dpi=150)


class StageCallback(TrainerCallback):
    """Counts micro-batches, times the optimizer's step, and hands on the logs."""

    def __init__(self, trainer: StageLogMixin) -> None:
        self.trainer = trainer
        self.started = 0.0

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        self.trainer.micro_batch = 0

    def on_substep_end(self, *args: Any, **kwargs: Any) -> None:
        self.trainer.micro_batch += 1

    def on_pre_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        self.started = time.perf_counter()

    def on_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        self.trainer.timeline.add("optimizer", self.started, time.perf_counter())

    def on_log(
        self, args: Any, state: Any, control: Any, logs: Mapping[str, Any] | None = None, **kwargs: Any
    ) -> None:
        if logs is not None and "loss" in logs and not self.trainer.plan.is_last and self.trainer.world.replica == 0:
            self.trainer.share_logs(logs)
