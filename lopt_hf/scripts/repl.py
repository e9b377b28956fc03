"""Replace layers of a pretrained causal LM by surrogates (RepL), heal it, and report what that costs and keeps.

```bash
lopt-hf repl --model HuggingFaceTB/SmolLM2-135M-Instruct --config recipes/smollm2-135m/repl/bi4.yaml
```

The report has plain removal of the same layers and the full model beside it, on the same text. Saved are the model as
it can be trained on (`unfolded`) and folded for use (`folded`), in `output_dir`.
"""

import copy
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from datasets import Dataset
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, set_seed
from trl import ModelConfig, SFTConfig, SFTTrainer, TrlParser, get_peft_config

from lopt_hf.common.evaluation import general_text
from lopt_hf.common.settings import check_distinct, check_lowest
from lopt_hf.common.statistics import Interval, RatioScores, difference_interval
from lopt_hf.data.formats import load_sft_dataset, to_trl_format
from lopt_hf.data.pretrained import resolve_model
from lopt_hf.repl.config import RepLConfig
from lopt_hf.repl.experiment import FULL, PLAIN, Row, cut_chunks, make_plain, make_row, make_variant, parse_variant
from lopt_hf.repl.export import save_with_code
from lopt_hf.repl.report import to_json, to_markdown
from lopt_hf.repl.trainer import RepLTrainer
from lopt_hf.scripts.parsing import make_trl_parser, parse_or_exit

__all__ = ["RepLScriptArguments", "against_plain", "main", "make_parser"]

REPORT = "report.json"


@dataclass
class RepLScriptArguments:
    """Which text to calibrate on, to heal with and to measure on.

    Parameters:
        dataset_name: Healing data: a `.txt` file, or what `lopt-hf sft` takes. Without it there is no healing.
        calibration_text: A `.txt` file; default: the first half of the prose that every Python carries.
        eval_text: A `.txt` file to measure perplexity on; default: the other half.
        eval_chunks: Pieces of it that are measured.
        eval_chunk_length: Tokens of each piece.
        compare: Further operators to measure untrained, as `operator` or `operator:init`.
        seeds: Seeds of the healing runs.
        scratch: Changes to the model's config. With it nothing is pretrained: for every seed the full model, plain
            removal and RepL are trained from the same random weights (the paper's language experiment).
    """

    dataset_name: str | None = field(default=None, metadata={"help": "Healing data: .txt, .jsonl, hub id."})
    calibration_text: str | None = field(default=None, metadata={"help": "A .txt file to calibrate on."})
    eval_text: str | None = field(default=None, metadata={"help": "A .txt file to measure perplexity on."})
    eval_chunks: int = field(default=32, metadata={"help": "Pieces of the text that are measured."})
    eval_chunk_length: int = field(default=256, metadata={"help": "Tokens of each piece."})
    compare: list[str] = field(
        default_factory=list, metadata={"help": "Further operators beside it, as 'operator' or 'operator:init'."}
    )
    seeds: list[int] = field(default_factory=lambda: [0], metadata={"help": "Seeds of the healing runs."})
    scratch: dict[str, Any] | str | None = field(
        default=None,
        metadata={"help": "Start from random weights; JSON with changes to the model's config, '{}' for none."},
    )

    def __post_init__(self) -> None:
        check_lowest(self, {"eval_chunks": 2, "eval_chunk_length": 2})
        check_distinct("seeds", self.seeds)
        if isinstance(self.scratch, str):
            self.scratch = _json_object("scratch", self.scratch)
        if self.scratch is not None and self.dataset_name is None:
            raise ValueError(
                "scratch without dataset_name leaves nothing to train on; give a .txt file or a data set."
            )
        if self.scratch is not None and self.compare:
            raise ValueError(f"compare={self.compare} measures untrained models; leave it out where scratch is set.")


def _json_object(option: str, text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except json.JSONDecodeError:
        value = None
    if not isinstance(value, dict):
        raise ValueError(f"{option}={text!r} is no JSON object; write it like '{{\"num_hidden_layers\": 12}}'.")
    return value


def check_scratch(config: RepLConfig) -> None:
    """Raises if the surgery wants to learn something from random weights.

    Raises:
        ValueError: If it does; the message names the field.
    """
    if config.init == "calibrate":
        raise ValueError("init='calibrate' has nothing to imitate in random weights; use 'paper' or 'skip'.")
    if config.placement == "block_influence" and config.layers_to_replace is None:
        raise ValueError("placement='block_influence' says nothing of random weights; use 'every' or name the layers.")


@dataclass
class HealingConfig(SFTConfig):
    """`SFTConfig` without activation checkpointing, and with `use_cpu` set on a machine without an accelerator."""

    activation_checkpointing: bool | None = field(  # ours: fewer layers keep fewer activations
        default=False, metadata={"help": "Recompute activations in the backward instead of keeping them."}
    )

    def __post_init__(self) -> None:
        # transformers refuses bf16, the default of TRL's configs, on such a machine unless told that this is meant.
        if not torch.accelerator.is_available():
            self.use_cpu = True
        super().__post_init__()


def make_parser() -> TrlParser:
    """The parser of this command: script, surgery, training and model arguments, and `--config file.yaml`."""
    parser = make_trl_parser("repl", __doc__, RepLScriptArguments, RepLConfig, HealingConfig, ModelConfig)
    parser.add_argument("--model", dest="model_name_or_path", help="Short for --model_name_or_path.")
    return parser


def read_text(name: str, option: str) -> str:
    """Reads a text file.

    Raises:
        ValueError: If there is none.
    """
    path = Path(name).expanduser()
    if not path.is_file():
        raise ValueError(f"{option}={name!r} is no file here; give the path of a text file.")
    return path.read_text(encoding="utf-8")


def texts(script_args: RepLScriptArguments) -> tuple[str, str]:
    """The text to calibrate on and the text to measure on; halves of the same where none is given."""
    prose = general_text()
    given = (script_args.calibration_text, script_args.eval_text)
    halves = (prose[: len(prose) // 2], prose[len(prose) // 2 :])
    names = ("calibration_text", "eval_text")
    calibration, evaluation = (
        half if name is None else read_text(name, option)
        for name, half, option in zip(given, halves, names, strict=True)
    )
    return calibration, evaluation


def against_plain(rows: Sequence[Row], plain: Sequence[Row]) -> Interval:
    """The difference in nats per token between a model and plain removal, over the same pieces of text and seeds."""
    scores = [[RatioScores(row.losses, lambda ratio: ratio)] for pair in zip(rows, plain, strict=True) for row in pair]
    coefficients = [[0.0] * len(scores) for _ in rows]
    for seed, of_seed in enumerate(coefficients):
        of_seed[2 * seed : 2 * seed + 2] = [1.0, -1.0]
    return difference_interval(scores, coefficients)


def healing_data(name: str, tokenizer: Any, length: int) -> Dataset:
    """The healing data; a text file is cut into rows of `length` tokens."""
    if not name.endswith(".txt"):
        return to_trl_format(load_sft_dataset(name))  # type: ignore[return-value]
    token_ids = tokenizer(read_text(name, "dataset_name"), add_special_tokens=False, verbose=False)["input_ids"]
    rows = [token_ids[start : start + length] for start in range(0, len(token_ids) - length + 1, length)]
    return Dataset.from_dict({"input_ids": rows})


def heal(model: Any, seed: int, dataset: Dataset, args: HealingConfig, model_args: ModelConfig, tokenizer: Any) -> Any:
    """Fine-tunes a model, RepL or plain, and returns it without adapters."""
    is_repl = "repl" in model.config.to_dict()
    run_args = replace(args, seed=seed, output_dir=f"{args.output_dir}/healing")
    set_seed(seed)
    peft_config: Any = get_peft_config(model_args)
    if peft_config is not None and is_repl:
        peft_config.modules_to_save = ["surrogate"]
    kind: Any = RepLTrainer if is_repl else SFTTrainer
    trainer = kind(model, args=run_args, train_dataset=dataset, processing_class=tokenizer, peft_config=peft_config)
    trainer.train()
    trained = trainer.model
    return trained.merge_and_unload() if peft_config is not None else trained


@dataclass
class Experiment:
    """One run of the command."""

    script_args: RepLScriptArguments
    config: RepLConfig
    args: HealingConfig
    model_args: ModelConfig

    def __post_init__(self) -> None:
        self.name = resolve_model(str(self.model_args.model_name_or_path))
        self.tokenizer: Any = AutoTokenizer.from_pretrained(self.name)
        if self.script_args.scratch is not None:
            check_scratch(self.config)
        self.calibration, evaluation = texts(self.script_args)
        length, count = self.script_args.eval_chunk_length, self.script_args.eval_chunks
        self.chunks_BT = cut_chunks(self.tokenizer, evaluation, length, count)
        self.rows: list[Row] = []

    def measure(self, name: str, model: Any, **facts: Any) -> None:
        """Adds a row."""
        row = make_row(name, model, self.chunks_BT, **facts)
        self.rows.append(row)
        seed = "" if row.seed is None else f" (seed {row.seed})"
        print(f"{name}{seed}: {row.mean_loss:.4f} nats/token", file=sys.stderr)

    def run(self) -> None:
        """Measures everything and saves model and report."""
        self.save(self.from_pretrained() if self.script_args.scratch is None else self.from_scratch())

    def from_pretrained(self) -> Any:
        """Measures the models and, where there is data to heal with, heals them; returns the first RepL model."""
        model = AutoModelForCausalLM.from_pretrained(self.name, dtype=self.model_args.dtype or torch.float32)
        self.measure(FULL, model)
        repl, seconds = make_variant(model, self.config, [self.calibration], self.tokenizer)
        removed = repl.config.repl["removed"]
        self.measure(PLAIN, make_plain(model, removed), removed=removed)
        self.measure(_name(self.config), repl, seconds=seconds, removed=removed)
        for text in self.script_args.compare:
            other = parse_variant(text, replace(self.config, num_layers_to_replace=None, layers_to_replace=removed))
            variant, seconds = make_variant(model, other, [self.calibration], self.tokenizer)
            self.measure(_name(other), variant, seconds=seconds, removed=removed)
        if self.script_args.dataset_name is None:
            return repl
        trained = []
        for seed in self.script_args.seeds:
            self.train(PLAIN, make_plain(model, removed), seed, removed)
            trained.append(self.train(_name(self.config), copy.deepcopy(repl), seed, removed))
        return trained[0]

    def from_scratch(self) -> Any:
        """Trains the three models of every seed; returns the first RepL model."""
        changes: Any = self.script_args.scratch
        model_config = AutoConfig.from_pretrained(self.name, **changes)
        trained = []
        for seed in self.script_args.seeds:
            set_seed(seed)
            model = AutoModelForCausalLM.from_config(model_config, dtype=self.model_args.dtype or torch.float32)
            repl, _ = make_variant(model, self.config, None, self.tokenizer)
            removed = repl.config.repl["removed"]
            self.train(PLAIN, make_plain(model, removed), seed, removed)
            trained.append(self.train(_name(self.config), repl, seed, removed))
            self.train(FULL, model, seed, [])
        return trained[0]

    def train(self, name: str, model: Any, seed: int, removed: list[int]) -> Any:
        """Trains a model, adds its row and returns it."""
        start = perf_counter()
        trained = heal(model, seed, self.dataset, self.args, self.model_args, self.tokenizer)
        self.measure(name, trained, seed=seed, seconds=perf_counter() - start, removed=removed)
        return trained

    @cached_property
    def dataset(self) -> Dataset:
        """What the models are trained on."""
        return healing_data(str(self.script_args.dataset_name), self.tokenizer, self.args.max_length or 512)

    def save(self, repl: Any) -> None:
        """Writes `unfolded`, `folded`, the report as JSON and its table as Markdown."""
        folder = Path(str(self.args.output_dir))
        folder.mkdir(parents=True, exist_ok=True)
        repl.save_pretrained(folder / "unfolded")
        save_with_code(repl.merge_and_unload(), folder / "folded")
        for name in ("unfolded", "folded"):
            self.tokenizer.save_pretrained(folder / name)
        settings = {"script": asdict(self.script_args), "repl": self.config.to_dict(), "sft": self.args.to_dict()}
        settings["model"] = str(self.model_args.model_name_or_path)
        (folder / "report.md").write_text(to_markdown(self.rows, against_plain) + "\n", encoding="utf-8")
        (folder / REPORT).write_text(to_json(self.rows, against_plain, settings) + "\n", encoding="utf-8")


def _name(config: RepLConfig) -> str:
    detail = f" {config.coefficients}" if config.operator == "branches" else ""
    return f"{config.operator}{detail}, {config.init}"


def check_output_dir(output_dir: str) -> None:
    """Raises if a run would overwrite what another has written.

    Raises:
        ValueError: If there is something.
    """
    for name in (REPORT, "report.md", "unfolded", "folded"):
        if (Path(output_dir) / name).exists():
            raise ValueError(f"output_dir={output_dir!r} holds another run's {name}; choose another output_dir.")


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the command.

    Args:
        argv: Arguments without the program's name; default: those of the process.
    """
    script_args, config, args, model_args = parse_or_exit(make_parser(), argv)
    try:
        if model_args.model_name_or_path is None:
            raise ValueError("model_name_or_path is missing; give --model with a hub id or a local folder.")
        check_output_dir(args.output_dir)
        experiment = Experiment(script_args, config, args, model_args)
        experiment.run()
    except (ValueError, FileNotFoundError) as error:
        sys.exit(f"lopt-hf repl: {error}")
    print(to_markdown(experiment.rows, against_plain))
    print(f"\nModel and report saved to {args.output_dir}")


if __name__ == "__main__":
    main()
