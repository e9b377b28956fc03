"""What the steps of a training run cost: time, the allocator's peaks, and the bytes that autograd keeps."""

import statistics
from contextlib import ExitStack
from time import perf_counter
from typing import Any

import torch
from transformers import TrainerCallback

from lopt_hf.bench.gpu.workload import TrainingWorkload
from lopt_hf.common.tables import interquartile_range
from lopt_hf.meters.gradient_bytes import GradientBytes
from lopt_hf.meters.optimizer_bytes import stepped_weights
from lopt_hf.meters.saved_bytes import SavedBytes

__all__ = ["StepCosts"]


class StepCosts(TrainerCallback):
    """Lets `warmup` steps pass, looks at one cycle of steps with meters, and times the rest.

    A step is forward, backward, clipping and the optimizer, without fetching the batch; the device is waited for on
    both sides. Peaks of the allocator are those of the timed steps, which no meter disturbs.

    Args:
        device: Where the model is, `"cuda"` or `"cpu"`. Only CUDA's allocator keeps account.
        workload: How many steps of how many tokens.
        cycle: Number of steps after which they are alike again. Peaks are the largest of the cycle, times its mean.
        metered: Whether to look with meters; without, the cycle passes.

    Attributes:
        losses: The logged loss of each step.
    """

    def __init__(self, device: str, workload: TrainingWorkload, cycle: int, metered: bool) -> None:
        self.losses: list[float] = []
        self._on_cuda = device == "cuda"
        self._warmup, self._cycle, self._tokens = workload.warmup, cycle, workload.tokens
        self._metered = metered
        self._start = 0.0
        self._seconds: list[float] = []
        self._meters: tuple[SavedBytes, GradientBytes] | None = None
        self._metering = ExitStack()
        self._saved = self._gradients = self._before_forward = 0
        self._at_rest = self._peak = self._reserved = self._forward_peak = 0
        self._handle: Any = None

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._warmup <= state.global_step < self._warmup + self._cycle:
            if self._metered:
                self._start_meters(kwargs["model"], kwargs["optimizer"])
        elif state.global_step == self._warmup + self._cycle and self._on_cuda:
            self._at_rest = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
        self._start = self._now()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        seconds = self._now() - self._start
        if self._meters is not None:
            self._stop_meters()
        elif state.global_step > self._warmup + self._cycle:
            self._seconds.append(seconds)
        control.should_log = True  # the log is made outside of the timed span
        return control

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if "loss" in kwargs["logs"]:
            self.losses.append(kwargs["logs"]["loss"])

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._on_cuda:
            self._peak, self._reserved = torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()

    def values(self) -> dict[str, Any]:
        """What was measured; sizes in bytes, `None` where the device keeps no account of them.

        `activation_bytes` is the allocator's word for what `saved_bytes` counts: the most that the forward, with the
        local backwards in it, takes beyond weights and optimizer, less the gradients that it has made.
        """
        seconds = self._step_seconds()
        on_cuda = self._on_cuda
        return {
            "losses": self.losses,
            "saved_bytes": self._saved if self._metered else None,
            "gradient_bytes": self._gradients if self._metered else None,
            "activation_bytes": self._forward_peak if on_cuda and self._metered else None,
            "at_rest_bytes": self._at_rest if on_cuda else None,
            "peak_bytes": self._peak if on_cuda else None,
            "reserved_bytes": self._reserved if on_cuda else None,
            "alloc_retries": torch.cuda.memory_stats()["num_alloc_retries"] if on_cuda else None,
            "step_seconds": seconds,
            "step_seconds_iqr": statistics.fmean(interquartile_range(times) for times in self._by_position()),
            "timed_seconds": self._seconds,
            "tokens_per_second": self._tokens / seconds,
        }

    def _by_position(self) -> list[list[float]]:
        return [self._seconds[position :: self._cycle] for position in range(self._cycle)]

    def _step_seconds(self) -> float:
        return statistics.fmean(statistics.median(times) for times in self._by_position())

    def _now(self) -> float:
        if self._on_cuda:
            torch.cuda.synchronize()
        return perf_counter()

    def _start_meters(self, model: Any, optimizer: Any) -> None:
        saved = self._metering.enter_context(SavedBytes.of_training(model, optimizer))
        self._meters = saved, self._metering.enter_context(GradientBytes(stepped_weights(optimizer)))
        if self._on_cuda:
            torch.cuda.reset_peak_memory_stats()
            self._before_forward = torch.cuda.memory_allocated()
            self._handle = model.register_forward_hook(self._weigh_forward)

    def _weigh_forward(self, *args: Any) -> None:
        assert self._meters is not None
        grown = torch.cuda.max_memory_allocated() - self._before_forward - self._meters[1].current
        self._forward_peak = max(self._forward_peak, grown)

    def _stop_meters(self) -> None:
        assert self._meters is not None
        self._metering.close()
        saved, gradients = self._meters
        self._saved, self._gradients = max(self._saved, saved.peak), max(self._gradients, gradients.peak)
        self._meters = None
        if self._handle is not None:
            self._handle.remove()
            self._handle = None
