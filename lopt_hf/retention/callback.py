"""Retention while a model trains: measured before the first step, on the way, and at the end."""

import copy
import json
import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from lm_eval.models.huggingface import HFLM
from transformers import PreTrainedModel, PreTrainedTokenizerBase, Trainer, TrainerState, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from lopt_hf.common.arithmetic import arithmetic_of
from lopt_hf.common.callbacks import TrainerBound
from lopt_hf.common.files import write_text
from lopt_hf.common.random_state import RandomState
from lopt_hf.common.settings import check_at_least
from lopt_hf.common.upstream.lm_eval import set_process
from lopt_hf.retention.clusters import AUTO, with_clusters
from lopt_hf.retention.deltas import MARGIN, ModelScores, check_confidence, entry_deltas, mean_delta
from lopt_hf.retention.evaluation import EvaluationSettings, evaluate_tasks
from lopt_hf.retention.identity import SOFTMAX_DTYPE, task_identity
from lopt_hf.retention.records import read_record
from lopt_hf.retention.results import Delta
from lopt_hf.retention.scores import TaskScores
from lopt_hf.retention.suites import SUITES, SuiteTask, load_entries

__all__ = ["RetentionCallback"]

BASELINE_FILE = "retention_baseline.json"
MIXED_PRECISION = {"bf16": "bfloat16", "fp16": "float16"}  # accelerate's names, and torch's


class RetentionCallback(TrainerBound):
    """Measures what a model keeps while it is fine-tuned, and logs it through the Trainer.

    The untouched model is measured before the first step; then the same samples every `every_steps` steps and at the
    end. Logged are `retention/<task>/<metric>`, its change `..._delta` with the interval's ends `..._low` and
    `..._high`, and `retention/mean_delta` with its ends. The model computes as it trains, in bfloat16 or float32.
    Training is not disturbed: with or without this callback it gives the same weights.

    ```python
    trainer.add_callback(RetentionCallback(tasks=["arc_easy", "piqa"], every_steps=200, limit=100))  # LoPT's trainers
    trainer.add_callback(RetentionCallback(tasks=["arc_easy"], limit=100, trainer=trainer))          # any Trainer
    ```

    Args:
        tasks: lm-eval tasks, groups or tags. Default: the suite `offline`, which needs no network.
        every_steps: Measure every so many optimizer steps, besides the beginning and the end.
        limit: First samples of each task.
        include_path: Folder with further lm-eval tasks.
        batch_size: Requests per forward on each device.
        num_fewshot: Examples in each prompt; default: each task's own number.
        confidence: Level of the intervals.
        trainer: The trainer to log through, for trainers other than LoPT's.

    Raises:
        ValueError: If a task is unknown or a number out of range.
    """

    def __init__(
        self,
        tasks: Sequence[str] | None = None,
        every_steps: int | None = None,
        limit: int | None = 100,
        include_path: str | Path | None = None,
        batch_size: int = 8,
        num_fewshot: int | None = None,
        confidence: float = 0.95,
        trainer: Trainer | None = None,
    ) -> None:
        check_at_least("every_steps", every_steps, 1)
        check_confidence(confidence)
        if isinstance(tasks, str):
            raise ValueError(f"tasks={tasks!r} is one string; pass a list such as {tasks.split(',')}.")
        wanted = SUITES["offline"] if tasks is None else [SuiteTask(name) for name in tasks]
        self.entries = load_entries(wanted, [] if include_path is None else [Path(include_path)])
        self.settings = EvaluationSettings(limit=limit, batch_size=batch_size, num_fewshot=num_fewshot)
        self._dtype = "auto"
        self.every_steps = every_steps
        self.confidence = confidence
        self._baseline: ModelScores = {}
        self._measured_at = -1
        if trainer is not None:
            self.bind(trainer)

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: Any, **kwargs: Any) -> None:
        """Measures the untouched model; a resumed run reads what its beginning measured.

        Raises:
            ValueError: If a resumed run's beginning was not measured, or with other settings, tasks or documents.
        """
        path = Path(str(args.output_dir)) / BASELINE_FILE
        trainer = self.trainer
        weights = str(kwargs["model"].dtype).removeprefix("torch.")
        accelerator = trainer.accelerator
        self._dtype = arithmetic_of(accelerator.mixed_precision, weights, accelerator.device.type).dtype
        self._measured_at = state.global_step
        if state.global_step > 0:
            self._baseline = self._read_baseline(path)
            return
        self._baseline = self._measure(args, trainer, kwargs)
        if PartialState().is_main_process:
            scores = {name: asdict(scores) for name, scores in self._baseline.items()}
            measured = {"settings": self._comparable_settings(), "asked": self._asked(), "scores": scores}
            write_text(path, json.dumps(measured))
        self._log(trainer, self._baseline)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: Any, **kwargs: Any) -> None:
        """Measures every `every_steps` steps."""
        if self.every_steps is not None and state.global_step % self.every_steps == 0:
            self._measure_and_log(args, state, kwargs)

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: Any, **kwargs: Any) -> None:
        """Measures the model that training ends with, which may be the best of an earlier step."""
        last = f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"
        best = state.best_model_checkpoint if args.load_best_model_at_end else None
        if self._measured_at != state.global_step or (best is not None and Path(best).name != last):
            self._measure_and_log(args, state, kwargs)

    def _measure_and_log(self, args: TrainingArguments, state: TrainerState, given: dict[str, Any]) -> None:
        trainer = self.trainer
        scores = self._measure(args, trainer, given)
        self._measured_at = state.global_step
        self._log(trainer, scores)

    def _measure(self, args: TrainingArguments, trainer: Trainer, given: dict[str, Any]) -> ModelScores:
        model, tokenizer = given["model"], given["processing_class"]
        with _undisturbed(model, trainer.accelerator.device):
            language_model = _wrap(model, tokenizer, trainer, self.settings.batch_size)
            tasks = [task for entry in self.entries for task in entry.tasks]
            scores = evaluate_tasks(language_model, tasks, self.settings.num_fewshot, self.settings)
            return with_clusters(scores, tasks, AUTO)

    def _log(self, trainer: Trainer, scores: ModelScores) -> None:
        logs: dict[str, float] = {}
        if PartialState().is_main_process:
            how = self.confidence, MARGIN
            found = [entry_deltas(entry, self._baseline, [scores], *how) for entry in self.entries]
            for delta in (delta for entry in found for delta, _ in entry):
                name = f"retention/{delta.task}/{delta.metric}"
                logs[name] = delta.value
                if scores is not self._baseline:
                    logs.update(_change(name, delta))
            mean = mean_delta([entry[0] for entry in found], *how)
            if mean is not None and scores is not self._baseline:
                logs.update(_change("retention/mean", mean))
        log_is_due = trainer.control.should_log
        # The base class's: TRL's would put half-averaged training metrics beside them
        Trainer.log(trainer, logs)
        trainer.control.should_log = log_is_due  # logging takes it for done

    def _comparable_settings(self) -> dict[str, int | str | None]:
        """What must be the same before and after; not the batch size, which a resumed run may have to lower."""
        settings = self.settings
        return {"limit": settings.limit, "num_fewshot": settings.num_fewshot, "dtype": self._dtype}

    def _asked(self) -> dict[str, dict[str, Any]]:
        """What is asked by task, documents as a hash; as JSON gives it back."""
        number = self.settings.num_fewshot
        tasks = [task for entry in self.entries for task in entry.tasks]
        return json.loads(json.dumps({t.task_name: task_identity(t, number, self.settings) for t in tasks}))

    def _read_baseline(self, path: Path) -> ModelScores:
        if not path.is_file():
            raise ValueError(
                f"there is no {path}, so what the model could do before training is unknown; add the callback from "
                "the start of training, or compare afterwards with `lopt-hf retention`."
            )
        stored = read_record(path, "resume without the callback, and compare afterwards with `lopt-hf retention`")
        for name, value in self._comparable_settings().items():
            if value != stored["settings"][name]:
                raise ValueError(
                    f"{name}={value}, but {path} was measured with {name}={stored['settings'][name]}; resume with the "
                    "settings of the beginning."
                )
        asked = self._asked()
        missing = [name for name in asked if name not in stored["asked"]]
        if missing:
            raise ValueError(f"{path} has no scores of {', '.join(missing)}; resume with the tasks of the beginning.")
        for name, now in asked.items():
            before = stored["asked"][name]
            changed = [part for part, value in now.items() if value != before.get(part)]
            if changed:
                raise ValueError(
                    f"task {name!r} is not the one that {path} was measured with: {', '.join(changed)} changed; "
                    "resume with the tasks and data of the beginning."
                )
        return {name: TaskScores(**scores) for name, scores in stored["scores"].items()}


def _change(name: str, delta: Delta) -> dict[str, float]:
    return {f"{name}_delta": delta.delta, f"{name}_low": delta.low, f"{name}_high": delta.high}


def _wrap(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, trainer: Trainer, batch_size: int) -> HFLM:
    language_model = HFLM(
        pretrained=model,
        tokenizer=copy.deepcopy(tokenizer),
        batch_size=batch_size,
        softmax_dtype=SOFTMAX_DTYPE,
        mixed_precision_dtype=MIXED_PRECISION.get(trainer.accelerator.mixed_precision),
    )
    state = PartialState()
    if state.num_processes > 1:  # lm-eval takes a model in memory for the only one
        language_model.accelerator = trainer.accelerator
        set_process(language_model, state.process_index, state.num_processes)
    return language_model


@contextmanager
def _undisturbed(model: PreTrainedModel, device: torch.device) -> Iterator[None]:
    """Leaves random states, and which modules are in training mode, as they were."""
    training = {module: module.training for module in model.modules()}
    python_state, numpy_state = random.getstate(), np.random.get_state()
    try:
        with RandomState.of([device]).restored():
            yield
    finally:
        random.setstate(python_state)
        np.random.set_state(numpy_state)
        for module, was_training in training.items():
            module.training = was_training
