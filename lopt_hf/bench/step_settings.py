"""What `lopt-hf bench step` measures: the settings, and the rows of the table that follow from them."""

from collections.abc import Callable
from dataclasses import dataclass, replace

from lopt_hf.bench.processes import MALLOC, MALLOC_HELP
from lopt_hf.common.arithmetic import DTYPE_HELP, read_dtype
from lopt_hf.common.compared_methods import PEERS, check_reach, reach_cycle, row_label
from lopt_hf.common.settings import check_choices, check_distinct, check_lowest, option

__all__ = ["BADAM_DEPTHS", "LORA_RANK", "METHODS", "StepBenchSettings", "StepRow", "make_rows"]

METHODS = ("e2e", "e2e_checkpointing", "lopt", "lopt_local_step", "freeze", "lora")
LORA_RANK = 16  # peft's documentation uses it throughout; LoRA, arXiv 2106.09685, Sec. 7.2: small ranks suffice
# Layers in the cycle of the BAdam row, spread over the depth: what they cost on average, all layers do
BADAM_DEPTHS = 4
_IN_PARTS = {"block": "", "part": ", in parts"}
_CYCLES = {"badam": BADAM_DEPTHS}  # steps after which a method's cost repeats, where that is not 1
_CHOICES = {
    "methods": (*METHODS, "reach", "reach_local_step", "mlaan", "repl", *PEERS),
    "tied_embeddings": ("untie", "freeze"),
    "clip_scope": ("block", "part"),  # those that local_step works with
    "malloc": tuple(MALLOC),
}
_SMALLEST = {"batch_size": 1, "seq_length": 2, "steps": 1, "warmup": 0, "seed": 0, "threads": 1}


@dataclass(frozen=True)
class StepBenchSettings:
    """What `run_step_bench` measures.

    Raises:
        ValueError: If a value is out of range; the message names field, value and fix.
    """

    model: str = option("HuggingFaceTB/SmolLM2-135M-Instruct", "Hub id or local folder of a causal LM.")
    methods: tuple[str, ...] = option(METHODS, f"Any of {', '.join(_CHOICES['methods'])}.")
    num_blocks: tuple[int, ...] = option(
        (2, 4), "Blocks of the lopt and mlaan rows, and segments; freeze and freeze_last take the first."
    )
    split_at: tuple[int, ...] | None = option(
        None, "First layers of all blocks but the first, for the one number of blocks."
    )
    tied_embeddings: str = option("untie", "untie or freeze a tied LM head, in the lopt, freeze and mlaan rows.")
    clip_scope: tuple[str, ...] = option(("block", "part"), "Any of block, part: what the lopt_local_step rows clip.")
    local_update_interval: tuple[int, ...] = option(
        (1, 4), "Intervals of the lopt rows; above 1 with the first --num-blocks only."
    )
    task_reach: tuple[int, ...] | None = option(
        None,
        "Cycle of the reach rows over steps, as [4,1,1,1], with as many blocks as it reaches. Default: for each "
        "--num-blocks all of them at every fourth step, which costs what it does in the first quarter of a run.",
    )
    batch_size: int = option(4, "Sequences per step.")
    seq_length: int = option(256, "Tokens per sequence; there is no padding.")
    steps: int = option(9, "Timed steps per method; an interval n runs whole cycles of n, at least two.")
    warmup: int = option(2, "Untimed steps after the memory measurement.")
    dtype: str = option("auto", f"{DTYPE_HELP} The weights are float32.")
    seed: int = option(0, "Seed of the data order and of new weights.")
    malloc: str = option("keep", MALLOC_HELP)
    threads: int | None = option(None, "CPU threads per method; torch's default if unset.")

    def __post_init__(self) -> None:
        object.__setattr__(self, "dtype", read_dtype(self.dtype))
        check_lowest(self, _SMALLEST)
        check_choices(self, _CHOICES)
        for name in ("methods", "num_blocks", "clip_scope", "local_update_interval"):
            check_distinct(name, getattr(self, name))
        if min(self.num_blocks) < 2:
            raise ValueError(f"num_blocks={self.num_blocks}: a decoder is cut into 2 blocks or more; drop the others.")
        check_reach(self.num_blocks, self.task_reach)
        if self.task_reach is not None and not {"reach", "reach_local_step"} & set(self.methods):
            raise ValueError(
                f"task_reach={self.task_reach} does nothing for methods={self.methods}; add reach or reach_local_step "
                "to them, or leave it out."
            )
        if self.split_at is not None and self.num_blocks != (len(self.split_at) + 1,):
            raise ValueError(
                f"split_at={self.split_at} cuts {len(self.split_at) + 1} blocks, but num_blocks={self.num_blocks}; "
                f"set num_blocks to {len(self.split_at) + 1} alone."
            )
        if min(self.local_update_interval) < 1:
            raise ValueError(f"local_update_interval={self.local_update_interval}: use 1 (every step) or more.")
        if 1 not in self.local_update_interval and len(self.num_blocks) > 1:
            raise ValueError(
                f"local_update_interval={self.local_update_interval} runs with num_blocks={self.num_blocks[0]} only; "
                f"add 1 to measure num_blocks={self.num_blocks[1:]} too, or drop them."
            )


@dataclass(frozen=True)
class StepRow:
    """One row of the table: a method with its block settings, and how many steps it runs."""

    name: str
    method: str
    num_blocks: int
    interval: int
    warmup: int
    timed_steps: int
    clip_scope: str = "block"
    task_reach: tuple[int, ...] = ()

    @property
    def total_steps(self) -> int:
        """Optimizer steps of the row: one cycle for the memory, the warm-up, the timed ones."""
        return self.interval + self.warmup + self.timed_steps


def make_rows(settings: StepBenchSettings) -> list[StepRow]:
    """Returns the rows of the table that settings ask for, in their order."""

    def row(name: str, method: str, num_blocks: int = settings.num_blocks[0], interval: int = 1) -> StepRow:
        cycles = settings.steps if interval == 1 else max(2, settings.steps // interval)
        return StepRow(name, method, num_blocks, interval, settings.warmup, cycles * interval)

    def label(method: str, num_blocks: int = settings.num_blocks[0]) -> str:
        return row_label(method, num_blocks, LORA_RANK, end_to_end="e2e")

    names = {"e2e": "e2e", "e2e_checkpointing": "e2e + checkpointing", "freeze": "freeze"}
    rows: list[StepRow] = []
    for method in settings.methods:
        if method == "lopt_local_step":
            rows += [
                replace(row(label(method, k) + _IN_PARTS[scope], method, k), clip_scope=scope)
                for k in settings.num_blocks
                for scope in settings.clip_scope
            ]
            continue
        if method in ("reach", "reach_local_step"):
            rows += _reach_rows(settings, method, row)
            continue
        if method in ("mlaan", "e2e_segments"):
            rows += [row(label(method, k), method, k) for k in settings.num_blocks]
            continue
        if method != "lopt":
            rows.append(row(names.get(method) or label(method), method, interval=_CYCLES.get(method, 1)))
            continue
        if 1 in settings.local_update_interval:
            rows += [row(label(method, blocks), method, blocks) for blocks in settings.num_blocks]
        longer = [interval for interval in settings.local_update_interval if interval > 1]
        rows += [row(f"{label(method)}, interval {n}", method, interval=n) for n in longer]
    return rows


def _reach_rows(settings: StepBenchSettings, method: str, row: Callable[..., StepRow]) -> list[StepRow]:
    rows = []
    for blocks in settings.num_blocks:
        cycle = reach_cycle(blocks, settings.task_reach)
        if max(cycle) != blocks:
            continue
        for scope in settings.clip_scope if method == "reach_local_step" else ("block",):
            name = row_label(method, blocks, task_reach=cycle) + _IN_PARTS[scope]
            reach = row(name, method, blocks, interval=len(cycle))
            rows.append(replace(reach, clip_scope=scope, task_reach=cycle))
    return rows
