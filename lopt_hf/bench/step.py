"""What one training step costs, by method: activation bytes, time, resident memory.

Every method trains in a spawned process of its own, by a real trainer on the same batches. The parent lets one of them
at a time do one step, round robin, so that whatever else the machine does hits all methods alike, and each has a peak
resident memory of its own. torch and the trainers are imported in the processes that train only.
"""

import json
import multiprocessing
import os
import platform
import signal
import statistics
import traceback
import warnings
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass, field, fields
from difflib import get_close_matches
from importlib.metadata import version
from itertools import chain
from multiprocessing.connection import Connection
from pathlib import Path
from tempfile import TemporaryDirectory
from time import perf_counter
from types import TracebackType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase, TrainerCallback
    from trl import SFTTrainer

__all__ = ["BenchWorkerError", "StepBenchSettings", "StepResult", "run_step_bench", "to_json", "to_markdown"]

METHODS = ("e2e", "e2e_checkpointing", "lopt", "freeze", "lora")
DTYPES = ("bf16", "fp32")
LORA_RANK = 16  # peft's documentation uses it throughout; LoRA, arXiv 2106.09685, Sec. 7.2: small ranks suffice
GRACE_SECONDS = 5.0
_SMALLEST = {"batch_size": 1, "seq_length": 2, "steps": 1, "warmup": 0, "seed": 0, "threads": 1}


class BenchWorkerError(RuntimeError):
    """A method's process failed; the message names the method and the reason, `__cause__` has its traceback."""


@dataclass(frozen=True)
class StepBenchSettings:
    """What `run_step_bench` measures.

    Raises:
        ValueError: If a value is out of range; the message names field, value and fix.
    """

    model: str = field(
        default="HuggingFaceTB/SmolLM2-135M-Instruct", metadata={"help": "Hub id or local folder of a causal LM."}
    )
    methods: tuple[str, ...] = field(default=METHODS, metadata={"help": f"Any of {', '.join(METHODS)}."})
    num_blocks: tuple[int, ...] = field(
        default=(2, 4), metadata={"help": "Blocks of the lopt rows; freeze takes the first."}
    )
    local_update_interval: tuple[int, ...] = field(
        default=(1, 4), metadata={"help": "Intervals of the lopt rows; above 1 with the first --num-blocks only."}
    )
    batch_size: int = field(default=4, metadata={"help": "Sequences per step."})
    seq_length: int = field(default=256, metadata={"help": "Tokens per sequence; there is no padding."})
    steps: int = field(
        default=9, metadata={"help": "Timed steps per method; an interval n runs whole cycles of n, at least two."}
    )
    warmup: int = field(default=2, metadata={"help": "Untimed steps after the memory measurement."})
    dtype: str = field(default="bf16", metadata={"help": "bf16 (autocast over fp32 weights) or fp32."})
    seed: int = field(default=0, metadata={"help": "Seed of the data order and of new weights."})
    threads: int | None = field(default=None, metadata={"help": "CPU threads per method; torch's default if unset."})

    def __post_init__(self) -> None:
        for name, smallest in _SMALLEST.items():
            value = getattr(self, name)
            if value is not None and value < smallest:
                raise ValueError(f"{name}={value} is too small; set it to {smallest} or more.")
        for name, allowed, chosen in (("methods", METHODS, self.methods), ("dtype", DTYPES, (self.dtype,))):
            for value in chosen:
                if value not in allowed:
                    nearest = get_close_matches(value, allowed, n=1, cutoff=0.0)[0]
                    raise ValueError(f"{name}={value!r} is unknown, nearest is {nearest!r}; use {', '.join(allowed)}.")
        for name in ("methods", "num_blocks", "local_update_interval"):
            values = getattr(self, name)
            if not values or len(set(values)) < len(values):
                raise ValueError(f"{name}={values} must name at least one value, and each value once.")
        if min(self.num_blocks) < 2:
            raise ValueError(f"num_blocks={self.num_blocks}: a decoder is cut into 2 blocks or more; drop the others.")
        if min(self.local_update_interval) < 1:
            raise ValueError(f"local_update_interval={self.local_update_interval}: use 1 (every step) or more.")
        if 1 not in self.local_update_interval and len(self.num_blocks) > 1:
            raise ValueError(
                f"local_update_interval={self.local_update_interval} runs with num_blocks={self.num_blocks[0]} only; "
                f"add 1 to measure num_blocks={self.num_blocks[1:]} too, or drop them."
            )


@dataclass(frozen=True)
class StepResult:
    """What one method costs.

    A method whose steps differ (`local_update_interval` n) is measured over whole cycles of n steps: peaks are
    averaged over one cycle; the time is the mean over the cycle of the median at each of its n positions.

    Attributes:
        method: Name of the row.
        peak_saved_bytes: Peak bytes that autograd keeps for backward in a step, see `SavedBytes`.
        saved_bytes_ratio: The same relative to `e2e` in this run; `None` without `e2e`.
        step_seconds: Time per step (forward, backward, clipping, optimizer), without fetching the batch.
        step_seconds_ratio: The same relative to `e2e` in this run; `None` without `e2e`.
        step_seconds_iqr: Interquartile range of the step time in seconds, taken at each position of the cycle.
        peak_resident_bytes: Peak resident memory of the method's process, from start to end.
        peak_cuda_bytes: Peak of torch's CUDA allocator in that process; `None` without CUDA.
        final_loss: Task loss in nats per token at step `final_loss_step`, the last one that all methods reached.
        final_loss_step: That step, counted from 1.
        timed_seconds: Every timed step, in order.
        saved_bytes: Peak of every memory step, in order.
    """

    method: str
    peak_saved_bytes: float
    saved_bytes_ratio: float | None
    step_seconds: float
    step_seconds_ratio: float | None
    step_seconds_iqr: float
    peak_resident_bytes: int
    peak_cuda_bytes: int | None
    final_loss: float
    final_loss_step: int
    timed_seconds: list[float]
    saved_bytes: list[int]


# --- The parent ------------------------------------------------------------------------------------------------------


def run_step_bench(settings: StepBenchSettings, progress: bool = True) -> list[StepResult]:
    """Measures every method of `settings`, interleaved step by step.

    The methods' processes are alive together, each with its weights and optimizer state: 2 to 3 GB a row for
    SmolLM2-135M.

    Args:
        settings: What to measure.
        progress: Show a progress bar on stderr.

    Returns:
        One result for each row, in the order of `settings`.

    Raises:
        ValueError: If the model cannot be loaded or does not fit the settings.
        BenchWorkerError: If a method's process fails. All others are ended.
    """
    from tqdm.auto import tqdm

    from lopt_hf.pretrained import resolve_model

    checkpoint = resolve_model(settings.model)
    _check_model(settings, checkpoint)
    rows = _rows(settings)
    total = sum(row.total_steps for row in rows)
    with (
        tqdm(total=total, desc="loading", unit="step", disable=not progress) as bar,
        TemporaryDirectory(prefix="lopt_bench_", ignore_cleanup_errors=True) as folder,
        ExitStack() as stack,
    ):
        workers = [stack.enter_context(_Worker(row, settings, checkpoint, folder)) for row in rows]
        for worker in workers:
            worker.wait_until_ready()
        _measure(workers, settings, bar.set_description, bar.update)
        return _results(workers, [worker.finish() for worker in workers])


def _measure(
    workers: list["_Worker"], settings: StepBenchSettings, describe: Callable[[str], None], advance: Callable[[], Any]
) -> None:
    def step(worker: _Worker, task: str) -> float:
        describe(f"{task}: {worker.row.name}")
        cost = worker.step(task)
        advance()
        return cost

    for worker in workers:
        worker.saved_bytes = [int(step(worker, "memory")) for _ in range(worker.row.interval)]
    for _ in range(settings.warmup):
        for worker in workers:
            step(worker, "warm-up")
    for index in range(max(worker.row.timed_steps for worker in workers)):
        for worker in workers:
            if index < worker.row.timed_steps:
                worker.timed_seconds.append(step(worker, "time"))


def _check_model(settings: StepBenchSettings, checkpoint: str) -> None:
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(checkpoint).get_text_config(decoder=True)
    except OSError as error:
        raise ValueError(
            f"model={settings.model!r} is neither a local checkpoint nor a model on a hub that can be reached; "
            "pass the path of a folder that holds a config.json."
        ) from error
    layers = config.num_hidden_layers
    if {"lopt", "freeze"} & set(settings.methods) and max(settings.num_blocks) > layers:
        raise ValueError(f"num_blocks={settings.num_blocks}: the model has {layers} layers; use at most {layers}.")
    longest = getattr(config, "max_position_embeddings", None)
    if longest is not None and settings.seq_length > longest:
        raise ValueError(f"seq_length={settings.seq_length}: the model takes {longest} tokens; use at most {longest}.")


@dataclass(frozen=True)
class _Row:
    """One line of the table: a method with its block settings, and how many steps it runs."""

    name: str
    method: str
    num_blocks: int
    interval: int
    warmup: int
    timed_steps: int

    @property
    def total_steps(self) -> int:
        return self.interval + self.warmup + self.timed_steps


def _rows(settings: StepBenchSettings) -> list[_Row]:
    def row(name: str, method: str, num_blocks: int = settings.num_blocks[0], interval: int = 1) -> _Row:
        cycles = settings.steps if interval == 1 else max(2, settings.steps // interval)
        return _Row(name, method, num_blocks, interval, settings.warmup, cycles * interval)

    names = {"e2e": "e2e", "e2e_checkpointing": "e2e + checkpointing", "freeze": "freeze"}
    names["lora"] = f"LoRA r={LORA_RANK}"
    rows = []
    for method in settings.methods:
        if method != "lopt":
            rows.append(row(names[method], method))
            continue
        if 1 in settings.local_update_interval:
            rows += [row(f"LoPT K={blocks}", method, blocks) for blocks in settings.num_blocks]
        longer = [interval for interval in settings.local_update_interval if interval > 1]
        rows += [row(f"LoPT K={settings.num_blocks[0]}, interval {n}", method, interval=n) for n in longer]
    return rows


class _Worker:
    """The parent's end of one method's process, which ends with the `with` block."""

    def __init__(self, row: _Row, settings: StepBenchSettings, checkpoint: str, folder: str) -> None:
        self.row = row
        self.saved_bytes: list[int] = []
        self.timed_seconds: list[float] = []
        context = multiprocessing.get_context("spawn")  # a forked child would inherit the parent's threads and memory
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=_work, args=(theirs, row, settings, checkpoint, folder), daemon=True)
        self._process.start()
        theirs.close()  # so that the end of the process ends the pipe

    def wait_until_ready(self) -> None:
        self._receive("ready")

    def step(self, task: str) -> float:
        """Lets the process do one step; returns its peak bytes (`task="memory"`) or its seconds."""
        self._connection.send(task)
        return self._receive("ready")

    def finish(self) -> dict[str, Any]:
        """Lets the process leave the training loop; returns its summary."""
        self._connection.send("finish")
        return self._receive("finished")

    def __enter__(self) -> "_Worker":
        return self

    def __exit__(self, *error: object) -> None:
        self._connection.close()  # a process that waits for its turn ends by itself
        self._process.join(timeout=GRACE_SECONDS)
        self._process.terminate()
        self._process.join()

    def _receive(self, expected: str) -> Any:
        try:
            kind, content = self._connection.recv()
        except (EOFError, ConnectionResetError) as error:
            self._process.join()
            code = self._process.exitcode
            hint = "; it was killed, probably for lack of memory: measure fewer methods at once" if code == -9 else ""
            raise BenchWorkerError(f"{self.row.name}: its process ended with exit code {code}{hint}.") from error
        if kind == "failed":
            reason, trace = content
            raise BenchWorkerError(f"{self.row.name}: {reason}") from RuntimeError(f"in its process:\n{trace}")
        if kind != expected:
            raise BenchWorkerError(f"{self.row.name}: its process is {kind} before its time.")
        return content


def _results(workers: list[_Worker], summaries: list[dict[str, Any]]) -> list[StepResult]:
    common = min(worker.row.total_steps for worker in workers)
    saved = {worker.row.name: statistics.fmean(worker.saved_bytes) for worker in workers}
    seconds = {
        worker.row.name: _over_cycle(worker.timed_seconds, worker.row.interval, statistics.median)
        for worker in workers
    }
    return [
        StepResult(
            method=worker.row.name,
            peak_saved_bytes=saved[worker.row.name],
            saved_bytes_ratio=saved[worker.row.name] / saved["e2e"] if "e2e" in saved else None,
            step_seconds=seconds[worker.row.name],
            step_seconds_ratio=seconds[worker.row.name] / seconds["e2e"] if "e2e" in seconds else None,
            step_seconds_iqr=_over_cycle(worker.timed_seconds, worker.row.interval, _interquartile_range),
            peak_resident_bytes=summary["peak_resident_bytes"],
            peak_cuda_bytes=summary["peak_cuda_bytes"],
            final_loss=summary["losses"][common - 1],
            final_loss_step=common,
            timed_seconds=worker.timed_seconds,
            saved_bytes=worker.saved_bytes,
        )
        for worker, summary in zip(workers, summaries, strict=True)
    ]


def _over_cycle(values: Sequence[float], interval: int, statistic: Callable[[Sequence[float]], float]) -> float:
    """The statistic at each position of the interval's cycle, averaged over the cycle."""
    return statistics.fmean(statistic(values[position::interval]) for position in range(interval))


def _interquartile_range(values: Sequence[float]) -> float:
    if len(values) == 1:
        return 0.0
    quartiles = statistics.quantiles(values, n=4, method="inclusive")
    return quartiles[2] - quartiles[0]


# --- The report ------------------------------------------------------------------------------------------------------


def to_markdown(results: Sequence[StepResult]) -> str:
    """The results as a markdown table; MB is 10^6 bytes."""
    with_cuda = any(result.peak_cuda_bytes is not None for result in results)
    header = ["method", "saved for backward (MB)", "x e2e", "time per step (s)", "x e2e", "IQR (s)", "peak RSS (MB)"]
    header += ["peak CUDA (MB)"] if with_cuda else []
    header += [f"loss at step {results[0].final_loss_step}" if results else "loss"]
    lines = [header, ["---", *["---:"] * (len(header) - 1)]]
    for result in results:
        cells = [result.method, _mega(result.peak_saved_bytes), _ratio(result.saved_bytes_ratio)]
        cells += [f"{result.step_seconds:.3f}", _ratio(result.step_seconds_ratio), f"{result.step_seconds_iqr:.3f}"]
        cells += [_mega(result.peak_resident_bytes)]
        cells += [_mega(result.peak_cuda_bytes)] if with_cuda else []
        lines.append([*cells, f"{result.final_loss:.3f}"])
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def to_json(results: Sequence[StepResult], settings: StepBenchSettings) -> str:
    """The results with their settings, versions and machine, as JSON text."""
    packages = ("lopt_hf", "torch", "transformers", "trl", "peft", "accelerate")
    machine = {"platform": platform.platform(), "cpus": os.cpu_count(), "python": platform.python_version()}
    report = {
        "settings": {setting.name: getattr(settings, setting.name) for setting in fields(settings)},
        "versions": {package: _version(package) for package in packages},
        "machine": machine,
        "results": [asdict(result) for result in results],
    }
    return json.dumps(report, indent=2)


def _version(package: str) -> str | None:
    with suppress(ModuleNotFoundError):  # lopt_hf run from a checkout that is not installed
        return version(package)
    return None


def _mega(size: float | None) -> str:
    return "-" if size is None else f"{size / 1e6:,.0f}"


def _ratio(ratio: float | None) -> str:
    return "-" if ratio is None else f"{ratio:.2f}"


# --- A method's process ----------------------------------------------------------------------------------------------


def _work(connection: Connection, row: _Row, settings: StepBenchSettings, checkpoint: str, folder: str) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle: it ends its processes
    os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"  # TRL would report each trainer made here as a user's run
    with _FailuresTo(connection):
        connection.send(("finished", _train(connection, row, settings, checkpoint, f"{folder}/{row.name}")))


class _FailuresTo:
    """Sends the error that ends its block to the parent, which raises it."""

    def __init__(self, connection: Connection) -> None:
        self.connection = connection

    def __enter__(self) -> None:
        pass

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool:
        if error is not None:
            reason = "".join(traceback.format_exception_only(kind, error)).strip()
            with suppress(OSError):  # the parent has gone
                self.connection.send(("failed", (reason, "".join(traceback.format_exception(kind, error, trace)))))
        return True


def _train(
    connection: Connection, row: _Row, settings: StepBenchSettings, checkpoint: str, folder: str
) -> dict[str, Any]:
    import torch
    from transformers import PrinterCallback

    _silence()
    if settings.threads is not None:
        torch.set_num_threads(settings.threads)
    trainer = _make_trainer(row, settings, checkpoint, folder)
    trainer.remove_callback(PrinterCallback)
    losses: list[float] = []
    trainer.add_callback(_make_pacer(connection, losses))
    trainer.train()
    cuda_bytes = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else None
    return {"losses": losses, "peak_resident_bytes": _peak_resident_bytes(), "peak_cuda_bytes": cuda_bytes}


def _silence() -> None:
    """Leaves stderr to the parent's progress bar."""
    import datasets
    import transformers

    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    datasets.disable_progress_bars()


def _make_trainer(row: _Row, settings: StepBenchSettings, checkpoint: str, folder: str) -> "SFTTrainer":
    import torch
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import SFTConfig, SFTTrainer

    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    rows = _tokens(tokenizer, settings.batch_size * row.total_steps, settings.seq_length, settings.seed)
    shared: dict[str, Any] = {
        "model": AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32),
        "train_dataset": Dataset.from_dict({"input_ids": rows}),
        "processing_class": tokenizer,
    }
    arguments: dict[str, Any] = {
        "output_dir": folder,
        "max_steps": row.total_steps,
        "per_device_train_batch_size": settings.batch_size,
        "max_length": None,
        "train_sampling_strategy": "sequential",
        "lr_scheduler_type": "constant",  # methods run different numbers of steps; their losses stay comparable
        "bf16": settings.dtype == "bf16",
        "use_cpu": not torch.accelerator.is_available(),
        "gradient_checkpointing": row.method == "e2e_checkpointing",
        # what the non-reentrant form recomputes would stay unseen, see `SavedBytes`
        "gradient_checkpointing_kwargs": {"use_reentrant": True} if row.method == "e2e_checkpointing" else None,
        "seed": settings.seed,
        "logging_strategy": "no",
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
    }
    if row.method in ("lopt", "freeze"):
        from lopt_hf import LoPTConfig, LoPTTrainer

        arguments |= {"num_blocks": row.num_blocks, "local_update_interval": row.interval}
        return LoPTTrainer(args=LoPTConfig(**arguments, train_early_blocks=row.method == "lopt"), **shared)
    if row.method == "lora":
        shared["peft_config"] = LoraConfig(r=LORA_RANK, target_modules="all-linear", task_type="CAUSAL_LM")
    return SFTTrainer(args=SFTConfig(**arguments), **shared)


def _tokens(tokenizer: "PreTrainedTokenizerBase", count: int, seq_length: int, seed: int) -> list[list[int]]:
    """Cuts the documentation that every Python carries into `count` rows of `seq_length` tokens."""
    from pydoc_data.topics import topics
    from random import Random

    names = sorted(topics)
    Random(seed).shuffle(names)
    text = "\n\n".join(topics[name] for name in names)
    tokens = tokenizer(text, add_special_tokens=False)["input_ids"]
    repeats = -(-count * seq_length // len(tokens))
    return [(tokens * repeats)[start : start + seq_length] for start in range(0, count * seq_length, seq_length)]


def _make_pacer(connection: Connection, losses: list[float]) -> "TrainerCallback":
    """A callback that makes each step wait for the parent's word, and reports what the step before it cost."""
    import torch
    from transformers import TrainerCallback

    from lopt_hf.bench.saved_bytes import SavedBytes

    def now() -> float:
        if torch.accelerator.is_available():
            torch.accelerator.synchronize()
        return perf_counter()

    class Pacer(TrainerCallback):
        def __init__(self) -> None:
            self.saved: SavedBytes | None = None
            self.cost: float | None = None
            self.start = 0.0

        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            connection.send(("ready", self.cost))
            if connection.recv() == "memory":
                model = kwargs["model"]
                weights = [weight for group in kwargs["optimizer"].param_groups for weight in group["params"]]
                self.saved = SavedBytes(chain(model.parameters(), model.buffers(), weights))
                self.saved.__enter__()
            self.start = now()

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
            self.cost = now() - self.start
            if self.saved is not None:
                self.saved.__exit__(None, None, None)
                self.cost, self.saved = self.saved.peak, None
            control.should_log = True  # for the loss of this very step; the log is made outside the timed span
            return control

        def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if "loss" in kwargs["logs"]:
                losses.append(kwargs["logs"]["loss"])

        def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            connection.send(("ready", self.cost))
            connection.recv()  # tearing down costs time that others are still measuring

    return Pacer()


def _peak_resident_bytes() -> int:
    status = Path("/proc/self/status")
    if status.exists():
        # Not `ru_maxrss`: on Linux it starts from the resident memory of the process that spawned this one.
        for line in status.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    import resource

    unit = 1 if platform.system() == "Darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
