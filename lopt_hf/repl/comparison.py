"""RepL beside the full model and plain removal of the same layers, before and after training, on the same text."""

import copy
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from datasets import Dataset
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, set_seed
from transformers.utils import CONFIG_NAME, cached_file
from trl import ModelConfig

from lopt_hf.common.arithmetic import arithmetic_of
from lopt_hf.common.files import write_text
from lopt_hf.data.prepared import check_answers_fit
from lopt_hf.data.pretrained import resolve_model
from lopt_hf.data.texts import is_text, prose, read_text
from lopt_hf.repl.calibration_data import learned_positions
from lopt_hf.repl.comparison_arguments import (
    ALL,
    PLAIN_FOLDER,
    REPORT,
    ComparisonArguments,
    check_no_healing,
    check_scratch,
)
from lopt_hf.repl.config import CHOOSING, CUTTING, RepLConfig
from lopt_hf.repl.experiment import (
    FULL,
    PLAIN,
    Row,
    all_variants,
    cut_chunks,
    make_plain,
    make_row,
    make_variant,
    parse_variant,
)
from lopt_hf.repl.export import save_with_code
from lopt_hf.repl.placement import runs_of
from lopt_hf.repl.report import describe_removed, to_json, to_markdown
from lopt_hf.repl.trainer import HealingConfig, heal, healing_data

__all__ = ["Comparison"]


def read_texts(script_args: ComparisonArguments) -> tuple[str, str]:
    """Reads the texts to calibrate and to evaluate on; where none is given, halves of Python's documentation."""
    calibration, evaluation = script_args.calibration_text, script_args.eval_text
    folder = script_args.data_dir
    return (
        prose("first") if calibration is None else read_text(calibration, "calibration_text", folder, "first"),
        prose("second") if evaluation is None else read_text(evaluation, "eval_text", folder, "second"),
    )


@dataclass
class Comparison:
    """A comparison: its models are evaluated one after the other, and their results collected in `rows`."""

    script_args: ComparisonArguments
    config: RepLConfig
    args: HealingConfig
    model_args: ModelConfig
    saves_plain: bool = False  # plain removal too, in `plain`

    def __post_init__(self) -> None:
        is_open = self.model_args.dtype in ("auto", None)
        self.dtype = "float32" if is_open else str(self.model_args.dtype)
        if self.dtype == "float32" and not is_open and self.args.leaves_dtype_open:
            self.args = replace(self.args, bf16=False)
        self.name = resolve_model(str(self.model_args.model_name_or_path))
        self.revision = self.model_args.model_revision
        self.tokenizer: Any = AutoTokenizer.from_pretrained(self.name, revision=self.revision)
        if self.script_args.scratch is not None:
            check_scratch(self.config)
        self._check_idle([parse_variant(text, self.config) for text in self._named()])
        self._check_teacher()
        self._check_positions()
        self.calibration, evaluation = read_texts(self.script_args)
        length, count = self.script_args.eval_chunk_length, self.script_args.eval_chunks
        self.chunks_BT = cut_chunks(self.tokenizer, evaluation, length, count)
        self.dataset = self._load_dataset()
        self.rows: list[Row] = []

    @property
    def full_model(self) -> str:
        """The full model as judging finds it, which knows of no revision: an id, or the folder of the revision."""
        if self.revision == "main":
            return self.name
        file: Any = cached_file(self.name, CONFIG_NAME, revision=self.revision)
        return str(Path(file).parent)

    @property
    def _kwargs(self) -> dict[str, Any]:
        """How every model is made."""
        return {"dtype": getattr(torch, self.dtype), "attn_implementation": self.model_args.attn_implementation}

    def _check_idle(self, named: list[RepLConfig]) -> None:
        """Checks that what is set has an effect, on this model or on one that it is compared with.

        What a recipe may set and an option beside it replaces is named, and no reason to end.

        Args:
            named: The variants that `compare` names.

        Raises:
            ValueError: If something has none.
        """
        has_all = ALL in self.script_args.compare  # of which some operator reads whatever does not choose layers
        for name, why in self.config.idle.items():
            if any(name not in other.idle for other in named) or (has_all and name not in CHOOSING):
                continue
            text = f"{name}={getattr(self.config, name)!r} has no effect: it {why}"
            if name not in (*CHOOSING, *CUTTING):
                raise ValueError(f"{text}; leave it out.")
            print(f"{text}.", file=sys.stderr)
        if self.script_args.dataset_name is None:
            check_no_healing(self.script_args, self.model_args)

    def _check_teacher(self) -> None:
        """Checks that a full model is there to learn from, and data to learn it on.

        Raises:
            ValueError: If not.
        """
        if not self.args.has_teacher:
            return
        values = {name: getattr(self.args, name) for name in ("teacher_logits_weight", "teacher_hidden_weight")}
        given = " and ".join(f"{name}={value}" for name, value in values.items() if value > 0)
        if self.script_args.scratch is not None:
            raise ValueError(f"{given} cannot be used with scratch, where it is untrained; leave one out.")
        if self.script_args.dataset_name is None:
            raise ValueError(f"{given} cannot be used without healing; give dataset_name, or leave it out.")

    def _check_positions(self) -> None:
        """Checks that the model knows all positions of the sequences that texts are cut into.

        Raises:
            ValueError: If they are longer than its table of positions.
        """
        changes: Any = self.script_args.scratch or {}
        most = learned_positions(AutoConfig.from_pretrained(self.name, revision=self.revision, **changes))
        lengths: dict[str, int | None] = {"eval_chunk_length": self.script_args.eval_chunk_length}
        if self.config.needs_calibration_data:
            lengths["calibration_seq_length"] = self.config.calibration_seq_length
        if is_text(self.script_args.dataset_name or ""):
            lengths["max_length"] = self.args.max_length
        for name, length in lengths.items():
            if length is not None and length > most:
                raise ValueError(
                    f"{name}={length} is more than the {most} positions that model={self.name} has learned; set it to "
                    f"at most {most}."
                )

    def _named(self) -> list[str]:
        return [text for text in self.script_args.compare if text != ALL]

    def _variants(self, config: RepLConfig) -> Iterator[RepLConfig]:
        """What is measured beside a config, each once: what `compare` names, then what `all` adds and fits."""
        seen = {_name(config)}
        others = all_variants(config) if ALL in self.script_args.compare else []
        for text in [*self._named(), *others]:
            try:
                variant = parse_variant(text, config)
            except ValueError as error:
                print(f"{text} is left out: {error}", file=sys.stderr)
                continue
            if _name(variant) not in seen:
                seen.add(_name(variant))
                yield variant

    def _load_dataset(self) -> Dataset | None:
        """The data that the models are trained on, checked before one is loaded."""
        name, data_dir = self.script_args.dataset_name, self.script_args.data_dir
        if name is None:
            return None
        dataset = healing_data(name, self.tokenizer, self.args.max_length or 512, data_dir)
        check_answers_fit(dataset, self.tokenizer, self.args, f"data set {name}")
        return dataset

    def describe_arithmetic(self) -> str:
        """Says in which types models are trained and evaluated, and why, in one line."""
        arithmetic = arithmetic_of(str(self.args.mixed_precision), self.dtype, self.args.device.type)
        training = "" if self.script_args.dataset_name is None else f"training in {arithmetic.description}; "
        return f"Arithmetic: {training}perplexity in {self.dtype}, as the weights."

    def measure(self, name: str, model: Any, **facts: Any) -> None:
        """Evaluates a model and adds its row."""
        row = make_row(name, model, self.chunks_BT, **facts)
        self.rows.append(row)
        seed = "" if row.seed is None else f" (seed {row.seed})"
        print(f"{name}{seed}: {row.mean_loss:.4f} nats/token", file=sys.stderr)

    def run(self) -> None:
        """Trains and evaluates all models, and saves the RepL model and the report."""
        self.save(self.from_pretrained() if self.script_args.scratch is None else self.from_scratch())

    def from_pretrained(self) -> Any:
        """Evaluates the models and, where there are data to heal with, heals them; returns the first RepL model."""
        model = AutoModelForCausalLM.from_pretrained(self.name, revision=self.revision, **self._kwargs)
        self.measure(FULL, model)
        repl, seconds = make_variant(model, self.config, [self.calibration], self.tokenizer)
        removed = repl.config.repl["removed"]
        print(describe_removed(removed), file=sys.stderr)
        plain = make_plain(model, removed)
        self.measure(PLAIN, plain, removed=removed)
        if self.script_args.dataset_name is None:
            self._save_plain(plain)
        del plain
        self.measure(_name(self.config), repl, seconds=seconds, removed=removed)
        spans = [list(span) for span in runs_of(removed)]
        same_layers = replace(
            self.config, num_layers_to_replace=None, layers_to_replace=None, spans=spans, span_criterion="error"
        )
        named = {_name(parse_variant(text, same_layers)) for text in self._named()}
        for other in self._variants(same_layers):
            try:
                variant, seconds = make_variant(model, other, [self.calibration], self.tokenizer)
            except ValueError as error:
                if _name(other) in named:
                    raise
                print(f"{_name(other)} is left out: {error}", file=sys.stderr)
                continue
            self.measure(_name(other), variant, seconds=seconds, removed=removed)
            del variant
        if self.script_args.dataset_name is None:
            return repl
        trained: list[Any] = []
        for seed in self.script_args.seeds:
            plain = self.train(PLAIN, make_plain(model, removed), seed, removed, model)
            if not trained:
                self._save_plain(plain)
            del plain
            trained.append(self.train(_name(self.config), copy.deepcopy(repl), seed, removed, model))
        return trained[0]

    def from_scratch(self) -> Any:
        """Trains the three models of every seed; returns the first RepL model."""
        changes: Any = self.script_args.scratch
        model_config = AutoConfig.from_pretrained(self.name, revision=self.revision, **changes)
        trained: list[Any] = []
        for seed in self.script_args.seeds:
            set_seed(seed)
            model = AutoModelForCausalLM.from_config(model_config, **self._kwargs)
            repl, _ = make_variant(model, self.config, None, self.tokenizer)
            removed = repl.config.repl["removed"]
            self.train(PLAIN, make_plain(model, removed), seed, removed)
            trained.append(self.train(_name(self.config), repl, seed, removed))
            self.train(FULL, model, seed, [])
        return trained[0]

    def train(self, name: str, model: Any, seed: int, removed: list[int], teacher: Any = None) -> Any:
        """Trains a model, with the full one as teacher where the arguments say so, adds its row and returns it."""
        assert self.dataset is not None
        start = perf_counter()
        start_from = (self.dataset, self.args, self.model_args, self.tokenizer)
        trained = heal(model, seed, *start_from, teacher, removed)
        self.measure(name, trained, seed=seed, seconds=perf_counter() - start, removed=removed)
        return trained

    def _save_plain(self, plain: Any) -> None:
        if self.saves_plain:
            folder = Path(str(self.args.output_dir)) / PLAIN_FOLDER
            plain.save_pretrained(folder)
            self.tokenizer.save_pretrained(folder)

    def save(self, repl: Any) -> None:
        """Writes `unfolded`, `folded`, the report as JSON and its table as Markdown."""
        folder = Path(str(self.args.output_dir))
        folder.mkdir(parents=True, exist_ok=True)
        repl.save_pretrained(folder / "unfolded")
        self.tokenizer.save_pretrained(folder / "unfolded")
        save_with_code(repl.merge_and_unload(), folder / "folded", self.tokenizer)
        settings = {"script": asdict(self.script_args), "repl": self.config.to_dict(), "sft": self.args.to_dict()}
        settings["model"] = str(self.model_args.model_name_or_path)
        settings |= {"model_revision": self.revision, "attn_implementation": self.model_args.attn_implementation}
        settings["arithmetic"] = self.describe_arithmetic()
        write_text(folder / "report.md", to_markdown(self.rows) + "\n")
        write_text(folder / REPORT, to_json(self.rows, settings) + "\n")


def _name(config: RepLConfig) -> str:
    detail = f" {config.coefficients}" if config.operator == "branches" else ""
    behind = f", {config.refit_behind} behind" if config.refit_behind else ""
    return f"{config.operator}{detail}, {config.init}{behind}"
