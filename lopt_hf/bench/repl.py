"""What a folded RepL model saves where it is used: generation speed beside the full model; and its calibration time.

The two models generate in turns in one process, so that whatever else the machine does hits both alike.
"""

import json
import statistics
from dataclasses import asdict, dataclass
from time import perf_counter
from typing import TYPE_CHECKING, Any

from lopt_hf.common.arithmetic import DTYPE_HELP, choose_arithmetic, read_dtype
from lopt_hf.common.settings import check_choices, check_lowest, option
from lopt_hf.common.tables import describe_run, interquartile_range, markdown_table
from lopt_hf.repl.config import OPERATORS, STOCK_OPERATORS, RepLConfig, init_of

if TYPE_CHECKING:
    import torch

__all__ = ["RepLBenchSettings", "RepLResult", "run_repl_bench", "time_generation", "to_json", "to_markdown"]

_SMALLEST = {
    "every": 2,
    "calibration_layers": 1,
    "tokens": 1,
    "prompt_tokens": 1,
    "batch_size": 1,
    "rounds": 1,
    "calibration_tokens": 512,
    "threads": 1,
}


@dataclass(frozen=True)
class RepLBenchSettings:
    """What `run_repl_bench` measures.

    Raises:
        ValueError: If a value is out of range; the message names field, value and fix.
    """

    model: str = option("HuggingFaceTB/SmolLM2-135M-Instruct", "Hub id or local folder of a causal LM.")
    every: int = option(4, "Replace every n-th layer (RepL paper: 4).")
    prompt_tokens: int = option(64, "Tokens of the prompt.")
    tokens: int = option(64, "Tokens that are generated after it.")
    batch_size: int = option(1, "Prompts at a time.")
    rounds: int = option(7, "Timed turns of each model, after one untimed.")
    operator: str = option("linear", "What stands in the replaced layers' places.", OPERATORS)
    calibration_layers: int = option(4, "Layers to choose and calibrate: as one span if the operator folds to stock.")
    calibration_tokens: int = option(8192, "Tokens to choose and calibrate them on.")
    dtype: str = option("auto", f"{DTYPE_HELP} The weights are of that type too.")
    threads: int | None = option(None, "CPU threads; torch's default if unset.")

    def __post_init__(self) -> None:
        object.__setattr__(self, "dtype", read_dtype(self.dtype))
        check_choices(self)
        check_lowest(self, _SMALLEST)


@dataclass(frozen=True)
class RepLResult:
    """What was measured.

    Attributes:
        dtype: Type of weights and arithmetic, `"float32"` or `"bfloat16"`.
        full_seconds: Seconds of each turn of the full model.
        folded_seconds: Seconds of each turn of the folded one.
        new_tokens: Tokens generated in a turn.
        calibration_seconds: Time to choose and calibrate layers.
        calibrated: How many layers that were.
        replaced: How many layers the folded model has replaced, and of how many.
    """

    dtype: str
    full_seconds: list[float]
    folded_seconds: list[float]
    new_tokens: int
    calibration_seconds: float
    calibrated: int
    replaced: tuple[int, int]

    @property
    def speedup(self) -> float:
        """Median over turns of the full model's time by the folded one's."""
        pairs = zip(self.full_seconds, self.folded_seconds, strict=True)
        return statistics.median(full / folded for full, folded in pairs)


def run_repl_bench(settings: RepLBenchSettings) -> RepLResult:
    """Measures generation and calibration.

    Raises:
        ValueError: If the model does not fit the settings.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from lopt_hf.common.evaluation import general_text
    from lopt_hf.data.pretrained import resolve_model
    from lopt_hf.repl.experiment import make_variant

    if settings.threads is not None:
        torch.set_num_threads(settings.threads)
    arithmetic = choose_arithmetic(settings.dtype, "cpu")
    name = resolve_model(settings.model)
    tokenizer = AutoTokenizer.from_pretrained(name)
    prompts = _make_prompts(settings, tokenizer)
    model = AutoModelForCausalLM.from_pretrained(name, dtype=arithmetic.torch_dtype).eval()
    config = RepLConfig(
        operator=settings.operator,
        placement="span" if settings.operator in STOCK_OPERATORS else "block_influence",
        num_layers_to_replace=settings.calibration_layers,
        init=init_of(settings.operator),
        calibration_tokens=settings.calibration_tokens,
    )
    _, seconds = make_variant(model, config, [general_text()], tokenizer)
    # What the surrogates start from changes no arithmetic.
    init = "paper" if settings.operator == "mlp" else "skip"
    uncalibrated = RepLConfig(settings.operator, placement="every", every=settings.every, init=init)
    folded = make_variant(model, uncalibrated, None, tokenizer)[0].merge_and_unload()
    times = time_generation((model, folded), prompts, settings.tokens, settings.rounds)
    counts = (model.config.num_hidden_layers - folded.config.num_hidden_layers, model.config.num_hidden_layers)
    return RepLResult(
        arithmetic.dtype, *times, settings.tokens * settings.batch_size, seconds, settings.calibration_layers, counts
    )


def _make_prompts(settings: RepLBenchSettings, tokenizer: Any) -> "torch.Tensor":
    """Cuts the prose that every Python carries into prompts.

    Raises:
        ValueError: If it is too short for them.
    """
    import torch

    from lopt_hf.common.evaluation import general_text

    text = tokenizer(general_text(), add_special_tokens=False, verbose=False)["input_ids"]
    shape = (settings.batch_size, settings.prompt_tokens)
    count = shape[0] * shape[1]
    if count > len(text):
        raise ValueError(
            f"batch_size={shape[0]} prompts of prompt_tokens={shape[1]} are {count} tokens, and the text has "
            f"{len(text)}; lower one of them."
        )
    return torch.tensor(text[:count]).view(shape)


def time_generation(
    models: tuple[Any, Any], prompts_BT: "torch.Tensor", tokens: int, rounds: int
) -> tuple[list[float], list[float]]:
    """Lets two models generate in turns, after one untimed turn of each.

    Args:
        models: Causal language models.
        prompts_BT: What they go on from.
        tokens: Tokens to generate, no fewer.
        rounds: Timed turns.

    Returns:
        Seconds of each turn, of either model.
    """
    times: tuple[list[float], list[float]] = ([], [])
    for turn in range(rounds + 1):
        for index in (0, 1) if turn % 2 else (1, 0):  # neither always goes first
            cost = _generate(models[index], prompts_BT, tokens)
            if turn:
                times[index].append(cost)
    return times


def _generate(model: Any, prompts_BT: "torch.Tensor", tokens: int) -> float:
    import torch

    start = perf_counter()
    model.generate(prompts_BT, max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False)
    if prompts_BT.device.type != "cpu":
        torch.accelerator.synchronize()
    return perf_counter() - start


def to_markdown(result: RepLResult) -> str:
    """Returns the result as a table."""
    rows = []
    names = ("full model", "RepL, {} of {} layers, folded".format(*result.replaced))
    ratios = (1.0, result.speedup)
    for name, seconds, ratio in zip(names, (result.full_seconds, result.folded_seconds), ratios, strict=True):
        speed, spread = result.new_tokens / statistics.median(seconds), interquartile_range(seconds)
        rows.append([name, f"{speed:.1f}", f"{spread:.3f}", f"{ratio:.2f}"])
    table = markdown_table(["model", "tokens/s (median)", "seconds per turn, IQR", "x full model"], rows)
    return "\n".join(
        [table, "", f"Choosing and calibrating {result.calibrated} layers: {result.calibration_seconds:.0f} s"]
    )


def to_json(result: RepLResult, settings: RepLBenchSettings) -> str:
    """The result with its settings, versions and machine, as JSON text."""
    return json.dumps({**describe_run(settings), "result": {**asdict(result), "speedup": result.speedup}}, indent=2)
