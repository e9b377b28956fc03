"""A folded RepL model judged by tasks, by generation and by its size, beside the full model and plain removal.

Perplexity comes back where reasoning in generated text does not (arXiv 2602.01997), so a pruned model is asked
questions too. Every task's change has its paired interval, against the full model and against plain removal.
"""

import json
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from lopt_hf.bench.repl import time_generation
from lopt_hf.common.files import write_text
from lopt_hf.common.settings import check_choices, check_lowest, option
from lopt_hf.common.tables import markdown_table

__all__ = ["FOLDERS", "JudgeArguments", "Judged", "Weighed", "judge", "load_judge_tasks"]

FULL, PLAIN, FOLDED = "full model", "plain removal", "folded"
FOLDERS = {PLAIN: "plain", FOLDED: "folded"}  # below the output folder of `lopt-hf repl`
NO_SUITE = "none"


@dataclass
class JudgeArguments:
    """What the models are asked.

    Parameters:
        judge: Whether they are asked at all.
        judge_suite: A suite of `lopt-hf retention`, or `"none"`. `"offline"` has knowledge and language, and the
            perplexity of a second text, its own prose.
        judge_tasks: Further tasks, groups or tags of lm-eval; `gsm8k` is an exact match by generation.
        judge_include_path: Folders with tasks of one's own.
        judge_limit: First samples of each task; `None`: all.
        judge_batch_size: Requests per forward.
        judge_new_tokens: Tokens that each model generates in a timed turn.
        judge_rounds: Timed turns of each model.

    Raises:
        ValueError: If a value is out of range or has no effect; the message names field, value and fix.
    """

    judge: bool = option(False, "Also judge full model, plain removal and folded model by tasks, speed and size.")
    judge_suite: str = option("offline", "Suite of tasks they are asked.", ("offline", "paper", NO_SUITE))
    judge_tasks: list[str] = option([], "Further tasks of lm-eval, such as gsm8k: exact match by generation.")
    judge_include_path: list[str] = option([], "Folders with further lm-eval tasks.")
    judge_limit: int | None = option(None, "First samples of each task. Default: all.")
    judge_batch_size: int = option(8, "Requests per forward.")
    judge_new_tokens: int = option(64, "Tokens generated in each timed turn.")
    judge_rounds: int = option(7, "Timed turns of each model, in turns with the full one.")

    def __post_init__(self) -> None:
        check_choices(self)
        positive = ("judge_limit", "judge_batch_size", "judge_new_tokens", "judge_rounds")
        check_lowest(self, dict.fromkeys(positive, 1))
        if not self.judge:
            default = JudgeArguments(judge=True)
            for name, value in vars(self).items():
                if name != "judge" and value != getattr(default, name):
                    raise ValueError(f"{name}={value!r} has no effect without judge; add --judge, or leave it out.")
        elif self.judge_suite == NO_SUITE and not self.judge_tasks:
            raise ValueError("judge_suite='none' without judge_tasks asks nothing; name a suite or tasks.")


@dataclass(frozen=True)
class Weighed:
    """One model's speed and size.

    Attributes:
        name: What it is.
        seconds: Of each turn of generation; those of the full model are of its turns with the folded one.
        speedup: Median over the turns of the full model's time by this one's.
        weight_bytes: Of all parameters, shared ones once.
    """

    name: str
    seconds: list[float]
    speedup: float
    weight_bytes: int


@dataclass(frozen=True)
class Judged:
    """All that was found.

    Attributes:
        weighed: Speed and size of each model.
        against: A report of tasks against each of the full model and plain removal, as lm-eval's tables.
        new_tokens: Tokens in a timed turn.
        device: What they were generated on.
    """

    weighed: list[Weighed]
    against: dict[str, str]
    new_tokens: int
    device: str

    def to_markdown(self) -> str:
        """Returns everything as tables."""
        rows = [
            [
                each.name,
                f"{self.new_tokens / statistics.median(each.seconds):.1f}",
                f"{each.speedup:.2f}",
                f"{each.weight_bytes / 1e6:.1f}",
            ]
            for each in self.weighed
        ]
        table = markdown_table(["model", "tokens/s (median)", "x full model", "weights, MB"], rows)
        parts = [f"# Against {name}\n\n{text}" for name, text in self.against.items()]
        return "\n\n".join([table, f"Generated on: {self.device}", *parts])


def load_judge_tasks(settings: JudgeArguments) -> list[Any]:
    """Loads the tasks, before anything takes time.

    Raises:
        ValueError: If a name is unknown, or a task's data cannot be loaded.
        ImportError: If the reports' plots cannot be drawn.
    """
    from lopt_hf.retention.report.report import check_plots
    from lopt_hf.retention.suites import SUITES, SuiteTask, load_entries

    check_plots()
    suite = () if settings.judge_suite == NO_SUITE else SUITES[settings.judge_suite]
    named = [SuiteTask(name) for name in settings.judge_tasks]
    return load_entries([*suite, *named], [Path(folder) for folder in settings.judge_include_path])


def judge(settings: JudgeArguments, tasks: Sequence[Any], full: str, folder: Path, dtype: str) -> Judged:
    """Judges what `lopt-hf repl` has saved, writes `judge.md`, `judge.json` and the tasks' reports, and returns it.

    Args:
        settings: How.
        tasks: From `load_judge_tasks`.
        full: Folder or hub id of the full model.
        folder: Has the folders in `FOLDERS`.
        dtype: Of all weights: `"float32"`, `"bfloat16"` or `"float16"`.
    """
    from lopt_hf.retention.cost import describe_device

    weighed = _weigh(settings, full, folder, dtype)
    found = Judged(weighed, _ask(settings, tasks, full, folder, dtype), settings.judge_new_tokens, describe_device())
    write_text(folder / "judge.md", found.to_markdown() + "\n")
    models = [asdict(each) for each in found.weighed]
    text = json.dumps({"settings": asdict(settings), "device": found.device, "models": models}, indent=2)
    write_text(folder / "judge.json", text + "\n")
    return found


def _ask(settings: JudgeArguments, tasks: Sequence[Any], full: str, folder: Path, dtype: str) -> dict[str, str]:
    """Both reports; the second one's scores are known from the first."""
    from lopt_hf.retention.benchmark import Candidate, RetentionBenchmark
    from lopt_hf.retention.evaluation import EvaluationSettings
    from lopt_hf.retention.report.report import to_markdown, write_report
    from lopt_hf.retention.scores import ScoreCache

    how = EvaluationSettings(limit=settings.judge_limit, batch_size=settings.judge_batch_size, dtype=dtype)
    cache = ScoreCache(folder / "judge/scores")
    places = {name: str(folder / place) for name, place in FOLDERS.items()}
    written = {}
    for name, baseline, asked in ((FULL, full, (PLAIN, FOLDED)), (PLAIN, places[PLAIN], (FOLDED,))):
        candidates = [Candidate(each, each, (places[each],)) for each in asked]
        report = RetentionBenchmark(baseline, tasks, how, cache).compare(candidates, with_drift=False)
        if report is not None:  # on the first process
            write_report(report, folder / f"judge/against-{name.split()[0]}")
            written[name] = to_markdown(report)
    return written


def _weigh(settings: JudgeArguments, full: str, folder: Path, dtype: str) -> list[Weighed]:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from lopt_hf.common.evaluation import general_text

    # where the tasks are answered too
    device = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")

    def load(name: str) -> Any:
        model: Any = AutoModelForCausalLM.from_pretrained(name, dtype=getattr(torch, dtype))
        return model.to(device).eval()

    tokenizer, whole = AutoTokenizer.from_pretrained(full), load(full)
    text = tokenizer(general_text(), add_special_tokens=False, verbose=False)["input_ids"]
    prompts_BT = torch.tensor([text[:64]], device=device)
    weighed: list[Weighed] = []
    own: list[float] = []
    for name, place in FOLDERS.items():
        model = load(str(folder / place))
        own, times = time_generation((whole, model), prompts_BT, settings.judge_new_tokens, settings.judge_rounds)
        speedup = statistics.median(of_full / of_model for of_full, of_model in zip(own, times, strict=True))
        weighed.append(Weighed(name, times, speedup, _weight_bytes(model)))
    return [Weighed(FULL, own, 1.0, _weight_bytes(whole)), *weighed]


def _weight_bytes(model: Any) -> int:
    return sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
