"""A plan: what every strategy needs on a device, whether it fits, and which one that fits is the cheapest."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, fields

import torch
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING, PretrainedConfig

from lopt_hf.common.compared_methods import check_reach
from lopt_hf.common.quantization import check_trainable, is_quantized
from lopt_hf.common.settings import check_choices, check_lowest, option
from lopt_hf.planner.device import DeviceSpeed
from lopt_hf.planner.dimensions import load_config
from lopt_hf.planner.optimizers import DEFAULT_OPTIMIZER, OPTIMIZERS
from lopt_hf.planner.simulation import simulate
from lopt_hf.planner.step import StepCost, Workload
from lopt_hf.planner.strategies import DEFAULT_STRATEGIES, END_TO_END, STRATEGIES, Strategy, make_strategies
from lopt_hf.planner.units import read_bytes

__all__ = ["Plan", "PlanRow", "PlanSettings", "make_plan"]

DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}
_CHOICES = {
    "dtype": tuple(DTYPES),
    "optim": tuple(OPTIMIZERS),
    "reach_unit": ("run", "step"),
    "strategies": STRATEGIES,
    "tied_embeddings": ("untie", "freeze"),
}
_SMALLEST = {"batch_size": 1, "seq_length": 2, "accumulation_steps": 1, "lora_r": 1, "num_gpus": 1}
# ours: beyond any training; with larger numbers torch cannot count a tensor's elements
_LARGEST = {"batch_size": 2**20, "seq_length": 2**24, "accumulation_steps": 2**20, "lora_r": 2**20, "num_gpus": 2**20}


@dataclass(frozen=True)
class PlanSettings:
    """What is planned.

    Raises:
        ValueError: If a value is out of range; the message names field, value and fix.
    """

    model: str = field(metadata={"help": "Hub id or local folder; only its configuration is read."})
    device_memory: int | str = field(metadata={"help": "Memory of one device, as 80GiB or 80GB."})
    batch_size: int = option(4, "Sequences of a micro-batch on a device (paper: 4).")
    seq_length: int = option(1024, "Tokens of a sequence, none of them padding.")
    accumulation_steps: int = option(1, "Micro-batches of an optimizer step (paper: 1).")
    dtype: str = option(
        "bfloat16", "Of the weights: bfloat16 (paper's code) or float32, whose arithmetic is autocast to bf16."
    )
    optim: str = option(DEFAULT_OPTIMIZER, f"One of {', '.join(OPTIMIZERS)}.")
    lora_r: int = option(16, "Rank of the adapters of the LoRA rows (TRL: 16).")
    num_gpus: int = option(1, "Devices: data-parallel by DDP, or stages of a pipeline.")
    num_blocks: tuple[int, ...] = option((2, 4, 8), "Blocks of the LoPT and MLAAN rows, and segments.")
    task_reach: tuple[int, ...] | None = option(
        None,
        "Blocks, counted from the last, that the reach rows' task loss trains, as [4,1,1,1]; the rows have as many "
        "blocks as it reaches. Default: for each --num-blocks all of them in a quarter of the steps.",
    )
    reach_unit: str = option(
        "run", "What task_reach runs over, for a recipe: the run, once, or optimizer steps; what it costs is the same."
    )
    strategies: tuple[str, ...] = option(
        DEFAULT_STRATEGIES, f"Any of {', '.join(STRATEGIES)}; joint is LoPT with the released code's one backward."
    )
    tied_embeddings: str = option("untie", "Where LM head and embedding share a weight: untie (paper) or freeze.")
    # ours: not measured, no GPU has run this
    headroom: float = option(0.1, "Share of the device to keep free for its context, workspaces and fragmentation.")

    def __post_init__(self) -> None:
        if isinstance(self.device_memory, str):
            object.__setattr__(self, "device_memory", read_bytes("device_memory", self.device_memory))
        check_lowest(self, _SMALLEST)
        _check_highest(self)
        if not 0 <= self.headroom < 1:
            raise ValueError(f"headroom={self.headroom} must be a share of the device, from 0 to below 1.")
        if not self.num_blocks or min(self.num_blocks) < 2 or len(set(self.num_blocks)) < len(self.num_blocks):
            raise ValueError(f"num_blocks={self.num_blocks} must name numbers of 2 or more, and each once.")
        check_choices(self, _CHOICES)
        check_reach(self.num_blocks, self.task_reach)
        self._check_used()

    def _check_used(self) -> None:
        """Refuses what no row would read."""
        reach = tuple(name for name in STRATEGIES if name.startswith("reach"))
        readers_of = {"task_reach": reach, "reach_unit": reach, "lora_r": ("lora",)}
        defaults = {each.name: each.default for each in fields(self)}
        for setting, readers in readers_of.items():
            value = getattr(self, setting)
            if value != defaults[setting] and not set(readers) & set(self.strategies):
                raise ValueError(
                    f"{setting}={value!r} is for the rows {', '.join(readers)}, which strategies={self.strategies} "
                    "leaves out; name one of them, or leave it out."
                )

    @property
    def device_bytes(self) -> int:
        """Bytes of a device."""
        return int(self.device_memory)

    @property
    def usable_memory(self) -> int:
        """Bytes of a device that a step may take."""
        return int(self.device_bytes * (1 - self.headroom))

    @property
    def workload(self) -> Workload:
        """The step to simulate."""
        return Workload(
            batch_size=self.batch_size,
            seq_length=self.seq_length,
            dtype=DTYPES[self.dtype],
            optim=self.optim,
            lora_r=self.lora_r,
            num_gpus=self.num_gpus,
            accumulation_steps=self.accumulation_steps,
            tied_embeddings=self.tied_embeddings,
        )


@dataclass(frozen=True)
class PlanRow:
    """What one strategy needs.

    Attributes:
        strategy: The strategy.
        cost: Of the device that needs most memory.
        fits: Whether that is within the usable memory.
        flops_per_token: Floating-point operations on all devices of one copy of the model, per token.
        step_seconds: Predicted time of a step: of the slowest device, communication not counted. `None` where no
            device's speed is known.
        relative_time: Time per token relative to end-to-end training on as many devices: by `step_seconds`, else by
            FLOPs. `None` if end-to-end training is not in the plan.
    """

    strategy: Strategy
    cost: StepCost
    fits: bool
    flops_per_token: float
    step_seconds: float | None
    relative_time: float | None


@dataclass(frozen=True)
class Plan:
    """The rows for one model and one workload.

    Attributes:
        settings: What was planned.
        rows: One for each strategy, in order.
        speed: The device whose speed predicts the times, if one is known.
        left_out: Why rows are not there, one sentence each.
        is_quantized: Whether the model's weights are; they are counted as if they were not.
    """

    settings: PlanSettings
    rows: tuple[PlanRow, ...]
    speed: DeviceSpeed | None = None
    left_out: tuple[str, ...] = ()
    is_quantized: bool = False

    @property
    def cheapest(self) -> PlanRow | None:
        """The row that fits and takes the least time per token, and of those the least memory.

        Rows that train every weight of the unchanged model go before those that freeze a part, train adapters or
        replace layers, which do something else; between them come rows that freeze nothing but tied embeddings.
        """
        fitting = [row for row in self.rows if row.fits]
        of_layers = [row for row in fitting if row.strategy.trains_layers]
        candidates = [row for row in of_layers if row.strategy.trains_all] or of_layers or fitting
        return min(candidates, key=lambda row: (_time_of(row), row.cost.peak_bytes), default=None)

    @property
    def smallest(self) -> PlanRow:
        """The row that needs the least memory."""
        return min(self.rows, key=lambda row: row.cost.peak_bytes)


def _time_of(row: PlanRow) -> float:
    return row.flops_per_token if row.relative_time is None else row.relative_time


def make_plan(
    settings: PlanSettings,
    config: PretrainedConfig | None = None,
    speed: DeviceSpeed | None = None,
    progress: Callable[[Sequence[Strategy]], Iterable[Strategy]] = iter,
) -> Plan:
    """Simulates every strategy on a model.

    Args:
        settings: What to plan.
        config: The model's configuration. Default: that of `settings.model`, see `dimensions.load_config`.
        speed: A device's speed, see `device.measure_speed`. Without one, times are predicted by FLOPs alone.
        progress: Goes through the strategies as they are simulated, and may show where it is.

    Raises:
        ValueError: If the model is unknown or no decoder-only language model, or none of the strategies suits it.

    Example:

    ```python
    plan = make_plan(PlanSettings(model="Qwen/Qwen2.5-7B-Instruct", device_memory="80GiB"))
    print(to_markdown(plan))
    ```
    """
    config = load_config(settings.model) if config is None else config
    _check_model(config, settings)
    strategies, left_out = make_strategies(
        settings.strategies,
        settings.num_blocks,
        config,
        settings.num_gpus,
        settings.lora_r,
        settings.accumulation_steps,
        settings.task_reach,
        settings.tied_embeddings,
    )
    strategies, refused = _trainable(strategies, config, settings.model)
    left_out = [*left_out, *refused]
    if not strategies:
        raise ValueError(
            f"strategies={settings.strategies}: none of them is possible with this model, "
            f"num_blocks={settings.num_blocks} and num_gpus={settings.num_gpus}; name others. {' '.join(left_out)}"
        )
    measured = []
    for strategy in progress(strategies):
        on_gpu = speed is None or speed.device != "cpu"
        measured.append((strategy, simulate(config, strategy, settings.workload, on_gpu)))
    baseline = next((costs[0] for strategy, costs in measured if strategy.name == END_TO_END), None)
    rows = [_make_row(strategy, costs, baseline, settings, speed) for strategy, costs in measured]
    return Plan(settings, tuple(rows), speed, tuple(left_out), is_quantized(config))


def _trainable(
    strategies: Sequence[Strategy], config: PretrainedConfig, model: str
) -> tuple[list[Strategy], list[str]]:
    """The strategies that the trainers would take, by their own check; and why not the others, in one sentence."""
    taken: list[Strategy] = []
    names: list[str] = []
    problem = ""
    for strategy in strategies:
        try:
            check_trainable(repr(model), is_quantized(config), has_adapter=strategy.method == "lora")
            taken.append(strategy)
        except ValueError as error:
            names.append(strategy.name)
            problem = str(error)
    return taken, [f"{', '.join(names)}: {problem}"] if names else []


def _make_row(
    strategy: Strategy,
    costs: list[StepCost],
    baseline: StepCost | None,
    settings: PlanSettings,
    speed: DeviceSpeed | None,
) -> PlanRow:
    def seconds(cost: StepCost) -> float:
        return float(cost.flops) if speed is None else speed.seconds(cost.flops, cost.moved_bytes)

    fullest = max(costs, key=lambda cost: cost.peak_bytes)
    slowest = max(seconds(cost) for cost in costs)
    devices = settings.num_gpus if strategy.num_stages > 1 else 1  # of one copy of the model, idle ones included
    return PlanRow(
        strategy=strategy,
        cost=fullest,
        fits=fullest.peak_bytes <= settings.usable_memory,
        flops_per_token=sum(cost.flops for cost in costs) / settings.workload.tokens,
        step_seconds=None if speed is None else slowest,
        relative_time=None if baseline is None else slowest * devices / seconds(baseline),
    )


def _check_highest(settings: PlanSettings) -> None:
    for name, bound in _LARGEST.items():
        if getattr(settings, name) > bound:
            raise ValueError(f"{name}={getattr(settings, name)} is too large; set it to {bound} or less.")


def _check_model(config: PretrainedConfig, settings: PlanSettings) -> None:
    known = {*MODEL_FOR_CAUSAL_LM_MAPPING, *MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING}
    if type(config) not in known or config.is_encoder_decoder:
        raise ValueError(
            f"model={settings.model!r} ({type(config).__name__}) is no decoder-only language model of transformers, "
            "and the planner runs no remote code; name another model."
        )
    text_config = config.get_text_config(decoder=True)
    if settings.dtype == "float32" and any("experts" in key for key in text_config.to_dict()):
        raise ValueError(
            f"dtype='float32': of the experts of {config.model_type} torch knows the shapes in bf16 only; set dtype "
            "to bfloat16."
        )
    longest = getattr(text_config, "max_position_embeddings", None)  # which GPT-2 calls n_positions
    if longest is not None and settings.seq_length > longest:
        raise ValueError(f"seq_length={settings.seq_length}: the model takes {longest} tokens; use at most {longest}.")
