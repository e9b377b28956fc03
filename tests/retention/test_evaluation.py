"""Scores are lm-eval's own, of exactly the samples asked for, and nothing is measured twice."""

import errno
import gc
import json
import math
import os
import shutil
import sqlite3
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import lm_eval
import pytest
import torch
from filelock import FileLock
from lm_eval.api.model import CacheHook
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from safetensors.torch import load_file, save_file
from sqlitedict import SqliteDict

from lopt_hf.common.sample_scores import MeanScores, RatioScores, ResampledScores
from lopt_hf.retention import evaluation
from lopt_hf.retention.evaluation import EvaluationSettings, evaluate_model
from lopt_hf.retention.references import ModelReference
from lopt_hf.retention.scores import ScoreCache, TaskScores, metric_scores
from lopt_hf.retention.suites import SuiteTask, load_entries
from tests.retention.benchmark_tasks import NUM_ROWS, TASKS, rows_of, write_benchmark_tasks, write_rows
from tests.retention.conftest import SavedModels

SETTINGS = EvaluationSettings()
SCORES = {
    "acc,none": MeanScores,
    "acc_norm,none": MeanScores,
    "acc_bytes,none": ResampledScores,
    "brier_score,none": ResampledScores,
    "word_perplexity,none": RatioScores,
    "byte_perplexity,none": RatioScores,
    "bits_per_byte,none": RatioScores,
    "perplexity,none": RatioScores,
    "exact_match,strict-match": MeanScores,
    "exact_match,flexible-extract": MeanScores,
}


def by_lm_eval(model: str, folder: Path, tasks: Sequence[str], **arguments: Any) -> dict[str, Any]:
    """What lm-eval itself finds; a number of samples where `samples` or `limit` say so."""
    results = lm_eval.simple_evaluate(
        model="hf",
        model_args={"pretrained": model},
        tasks=list(tasks),
        batch_size=8,
        device="cpu",
        bootstrap_iters=0,
        task_manager=TaskManager(include_path=str(folder), include_defaults=False),
        **arguments,
    )
    assert results is not None
    return results["results"]


def by_us(
    model: str,
    folder: Path,
    cache: Path,
    tasks: Sequence[str] = TASKS,
    settings: EvaluationSettings = SETTINGS,
) -> dict[str, TaskScores]:
    entries = load_entries([SuiteTask(name) for name in tasks], [folder])
    return evaluate_model(ModelReference.find(model), entries, settings, ScoreCache(cache))


def only_metrics(values: dict[str, Any]) -> dict[str, float]:
    return {name: value for name, value in values.items() if "," in name and "stderr" not in name}


def answers(scores: dict[str, TaskScores]) -> dict[str, Any]:
    """All entries of all metrics."""
    return {name: task.metrics for name, task in scores.items()}


def assert_same_answers(first: dict[str, TaskScores], second: dict[str, TaskScores], tolerance: float = 1e-5) -> None:
    assert first.keys() == second.keys()
    for name in first:
        assert first[name].metrics.keys() == second[name].metrics.keys()
        for metric, values in first[name].metrics.items():
            for one, other in zip(values, second[name].metrics[metric], strict=True):
                torch.testing.assert_close(flat(one), flat(other), rtol=tolerance, atol=tolerance)


def flat(value: Any) -> list[float]:
    return [item for part in value for item in flat(part)] if isinstance(value, list) else [float(value)]


@pytest.fixture
def evaluated(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the tasks that lm-eval is asked to run, in order."""
    names: list[str] = []
    original = lm_eval.evaluate

    def recording(language_model: Any, loaded: Any, **arguments: Any) -> Any:
        names.extend(loaded["tasks"])
        return original(language_model, loaded, **arguments)

    monkeypatch.setattr(lm_eval, "evaluate", recording)
    return names


@pytest.fixture
def no_model_is_loaded(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Makes loading a model an error, once it is called."""

    def forbidden(*_: Any) -> None:
        raise AssertionError("a model was loaded although everything was known")

    return lambda: monkeypatch.setattr(evaluation, "load_language_model", forbidden)


@pytest.mark.parametrize("limit", [None, 4])
def test_values_are_lm_evals(models: SavedModels, task_folder: Path, tmp_path: Path, limit: int | None) -> None:
    """Of every kind of task; and each metric follows from the per-sample entries, also from those in the cache."""
    expected = by_lm_eval(models.base, task_folder, TASKS, limit=limit)
    settings = EvaluationSettings(limit=limit)
    measured = by_us(models.base, task_folder, tmp_path, settings=settings)
    from_cache = by_us(models.base, task_folder, tmp_path, settings=settings)
    assert measured == from_cache
    tasks = {e.name: e.tasks[0] for e in load_entries([SuiteTask(name) for name in TASKS], [task_folder])}
    seen = set()
    for name in TASKS:
        assert measured[name].values == pytest.approx(only_metrics(expected[name]), rel=1e-6)
        assert len(measured[name]) == (limit or NUM_ROWS[name])
        for metric, entries in from_cache[name].metrics.items():
            scores = metric_scores(entries, tasks[name], metric.partition(",")[0])
            assert isinstance(scores, SCORES[metric]), metric
            assert len(scores) == len(measured[name])
            assert scores.total == pytest.approx(expected[name][metric], rel=1e-6), metric
            seen.add(metric)
    assert seen == SCORES.keys()
    assert len({value for name in TASKS for value in measured[name].values.values()}) > 6  # no row of zeros


def test_sums_of_a_bf16_model_are_not_rounded_to_bf16(models: SavedModels, task_folder: Path, tmp_path: Path) -> None:
    """What lm-eval's own default does, which hides small changes of perplexity."""
    entries = load_entries([SuiteTask("texts")], [task_folder])
    settings = EvaluationSettings(dtype="bfloat16")
    scores = evaluate_model(ModelReference.find(models.base), entries, settings, ScoreCache(tmp_path))
    sums = torch.tensor([item[0] for item in scores["texts"].metrics["word_perplexity,none"]])
    assert (sums.bfloat16().float() != sums).any()


def test_a_perplexity_that_no_float_holds_is_infinite(diverged: str, task_folder: Path, tmp_path: Path) -> None:
    """It ends lm-eval's own evaluation; all other metrics are what lm-eval finds."""
    for name in ("texts", "endings"):
        with pytest.raises(OverflowError):
            by_lm_eval(diverged, task_folder, [name])
    entries = load_entries([SuiteTask(name) for name in TASKS], [task_folder])
    reference, cache = ModelReference.find(diverged), ScoreCache(tmp_path)
    scores = evaluate_model(reference, entries, SETTINGS, cache)
    assert not any("aggregation" in vars(task) for entry in entries for task in entry.tasks)
    assert scores["texts"].values["word_perplexity,none"] == math.inf
    assert scores["endings"].values["perplexity,none"] == math.inf
    assert math.isfinite(scores["texts"].values["bits_per_byte,none"])
    expected = by_lm_eval(diverged, task_folder, ["sums"])["sums"]
    assert scores["sums"].values == pytest.approx(only_metrics(expected), rel=1e-6)
    assert evaluate_model(reference, entries, SETTINGS, cache) == scores  # also from a file


def test_two_filters_keep_their_own_responses(models: SavedModels, task_folder: Path, tmp_path: Path) -> None:
    scores = by_us(models.base, task_folder, tmp_path, ["generated"])["generated"]
    strict, flexible = (scores.metrics[f"exact_match,{name}"] for name in ("strict-match", "flexible-extract"))
    assert strict != flexible
    for number, sample in enumerate(scores.samples):
        right = [sample["responses"][name] == [sample["target"]] for name in ("strict-match", "flexible-extract")]
        assert right == [strict[number], flexible[number]]


def test_directions(models: SavedModels, task_folder: Path, tmp_path: Path) -> None:
    scores = by_us(models.base, task_folder, tmp_path)
    lower = {metric for task in scores.values() for metric, better in task.higher_is_better.items() if not better}
    assert lower == {
        "brier_score,none",
        "word_perplexity,none",
        "byte_perplexity,none",
        "bits_per_byte,none",
        "perplexity,none",
    }


@pytest.mark.parametrize("wanted", [[7, 2, 10], [3, 3, 0, 3], 5])
def test_exactly_the_samples_asked_for(
    models: SavedModels, task_folder: Path, tmp_path: Path, wanted: int | list[int]
) -> None:
    """In the task's order and once each, also if the list is neither sorted nor without duplicates."""
    numbers = list(range(wanted)) if isinstance(wanted, int) else sorted(set(wanted))
    settings = EvaluationSettings(samples={"sums": wanted}, limit=2)
    scores = by_us(models.base, task_folder, tmp_path, ["sums", "words"], settings)
    assert [sample["doc_id"] for sample in scores["sums"].samples] == numbers
    rows = rows_of("sums")
    assert [sample["doc"] for sample in scores["sums"].samples] == [rows[number] for number in numbers]
    assert [sample["doc_id"] for sample in scores["words"].samples] == [0, 1]
    expected = by_lm_eval(models.base, task_folder, ["sums"], samples={"sums": numbers})["sums"]
    assert scores["sums"].values == pytest.approx(only_metrics(expected), rel=1e-6)


def test_more_samples_than_there_are(models: SavedModels, task_folder: Path, tmp_path: Path) -> None:
    """A number beyond the end is an error, before a model is loaded; a limit beyond it means all."""
    with pytest.raises(ValueError, match="samples of 'sums' name number 12, but it has 12, counted from 0"):
        by_us(models.base, task_folder, tmp_path, ["sums"], EvaluationSettings(samples={"sums": [0, 12]}))
    assert not list(tmp_path.iterdir())
    everything = by_us(models.base, task_folder, tmp_path, ["sums"], EvaluationSettings(limit=99))
    assert everything == by_us(models.base, task_folder, tmp_path, ["sums"])


def test_what_does_not_fit_is_found_before_anything_is_asked(
    models: SavedModels, task_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Answers that leave no room for a prompt, also of a later task; and those that are too long themselves."""
    monkeypatch.setattr(HFLM, "_model_call", lambda *_: pytest.fail("a request was made"))
    entries = load_entries([SuiteTask("words"), SuiteTask("generated", 1)], [task_folder])
    reference, cache = ModelReference.find(models.base), ScoreCache(tmp_path)
    with pytest.raises(ValueError, match="'generated' writes up to 6 tokens .* in max_length=6; raise max_length"):
        evaluate_model(reference, entries, EvaluationSettings(max_length=6), cache)
    message = r"task 'sums': sample 10 has an answer of 10 tokens, more than max_length=8; raise max_length"
    with pytest.raises(ValueError, match=message):
        by_us(models.base, task_folder, tmp_path, ["sums"], EvaluationSettings(max_length=8))


def test_data_of_nltk_that_are_missing_are_named(models: SavedModels, tmp_path: Path) -> None:
    """Where a task's scoring looks for them; another failed look-up in a task's code keeps its trace."""
    tasks = write_benchmark_tasks(tmp_path / "tasks")
    errors = {"nltk": "LookupError(\"'p' not found. >>> nltk.download('p')\")", "own": "KeyError()"}
    for name, error in errors.items():
        (tasks / f"{name}_scores.py").write_text(f"def process_results(doc, results):\n    raise {error}\n")
        text = (tasks / "words.yaml").read_text().replace("task: words", f"task: {name}")
        (tasks / f"{name}.yaml").write_text(f"{text}process_results: !function {name}_scores.process_results\n")
    with pytest.raises(ValueError, match="scoring needs NLTK's p, which .* `python -m nltk.downloader p`"):
        by_us(models.base, tasks, tmp_path / "cache", ["nltk"])
    with pytest.raises(KeyError):
        by_us(models.base, tasks, tmp_path / "cache", ["own"])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"limit": 0}, "limit=0 .* 1 or more"),
        ({"batch_size": -1}, "batch_size=-1 .* 1 or more"),
        ({"max_length": 0}, "max_length=0 .* 1 or more"),
        ({"num_fewshot": -1}, "num_fewshot=-1 is negative"),
        ({"dtype": "float8"}, "dtype='float8' is unknown; use auto"),
        ({"samples": {"sums": 0}}, "samples of 'sums' are 0"),
        ({"samples": {"sums": []}}, r"samples of 'sums' are \[\]"),
        ({"samples": {"sums": [-1]}}, r"samples of 'sums' are \[-1\]"),
    ],
)
def test_settings_are_checked(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        EvaluationSettings(**settings)


def test_a_second_run_loads_no_model(
    models: SavedModels, task_folder: Path, tmp_path: Path, no_model_is_loaded: Callable[[], None]
) -> None:
    first = by_us(models.base, task_folder, tmp_path)
    no_model_is_loaded()
    assert by_us(models.base, task_folder, tmp_path) == first


def test_what_training_leaves_beside_a_checkpoint_does_not_matter(
    models: SavedModels, task_folder: Path, tmp_path: Path, no_model_is_loaded: Callable[[], None]
) -> None:
    by_us(models.base, task_folder, tmp_path / "cache", ["words"])
    copy = shutil.copytree(models.base, tmp_path / "copy")
    for name in ("optimizer.pt", "trainer_state.json", "README.md", "training_args.bin"):
        (copy / name).write_bytes(b"training")
    save_file({"head": torch.ones(2)}, copy / "local_heads.safetensors")
    no_model_is_loaded()
    by_us(str(copy), task_folder, tmp_path / "cache", ["words"])


def change_weight(model: Path, tasks: Path) -> None:
    weights = load_file(model / "model.safetensors")
    weights["model.norm.weight"][0] += 1e-3
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})


def change_generation(model: Path, tasks: Path) -> None:
    path = model / "generation_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "repetition_penalty": 1.5}))


def change_document(model: Path, tasks: Path) -> None:
    rows = rows_of("sums")
    rows[3]["question"] = "another"
    write_rows(tasks, "sums", rows)


def change_version(model: Path, tasks: Path) -> None:
    replace_text(tasks / "sums.yaml", "version: 1.0", "version: 2.0")


def change_prompt(model: Path, tasks: Path) -> None:
    replace_text(tasks / "sums.yaml", '"{{question}}"', '"Q: {{question}}"')


def change_aggregation(model: Path, tasks: Path) -> None:
    replace_text(tasks / "aggregations.py", "** 2", "** 3")


def change_number_of_examples(model: Path, tasks: Path) -> None:
    replace_text(tasks / "sums.yaml", "test_split", "num_fewshot: 1\ntest_split")


def replace_text(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


@pytest.mark.parametrize(
    "change",
    [
        change_weight,
        change_generation,
        change_document,
        change_version,
        change_prompt,
        change_aggregation,
        change_number_of_examples,
    ],
)
def test_a_change_is_measured_anew(
    models: SavedModels, tmp_path: Path, evaluated: list[str], change: Callable[[Path, Path], None]
) -> None:
    model = shutil.copytree(models.base, tmp_path / "model")
    tasks = write_benchmark_tasks(tmp_path / "tasks")
    for _ in range(2):
        by_us(str(model), tasks, tmp_path / "cache", ["sums"])
    assert evaluated == ["sums"]
    change(model, tasks)
    by_us(str(model), tasks, tmp_path / "cache", ["sums"])
    assert evaluated == ["sums"] * 2


def test_other_settings_are_measured_anew(
    models: SavedModels, task_folder: Path, tmp_path: Path, evaluated: list[str]
) -> None:
    """Each setting has scores of its own, and going back to one finds them."""
    entries = load_entries([SuiteTask("sums")], [task_folder])
    all_settings = [
        SETTINGS,
        replace(SETTINGS, num_fewshot=2),
        replace(SETTINGS, dtype="bfloat16"),
        replace(SETTINGS, limit=3),
        replace(SETTINGS, apply_chat_template=True),
        replace(SETTINGS, max_length=32),
    ]
    reference, cache = ModelReference.find(models.base), ScoreCache(tmp_path)
    first = [evaluate_model(reference, entries, settings, cache)["sums"] for settings in all_settings]
    assert evaluated == ["sums"] * len(all_settings)
    assert len({json.dumps(scores.metrics) for scores in first}) == len(all_settings)
    assert [scores.num_fewshot for scores in first[:3]] == [0, 2, 0]
    assert [evaluate_model(reference, entries, settings, cache)["sums"] for settings in all_settings] == first
    assert evaluated == ["sums"] * len(all_settings)


def test_examples_count_only_where_they_are_shown(models: SavedModels, tmp_path: Path, evaluated: list[str]) -> None:
    """Other examples in the file that few-shot prompts draw from: 2-shot is measured anew, 0-shot is not."""
    tasks = write_benchmark_tasks(tmp_path / "tasks")
    for times, example in ((2, "so 5"), (3, "so 6")):
        text = (tasks / "examples.jsonl").read_text()
        (tasks / "examples.jsonl").write_text(text.replace("so 5", example))
        for num_fewshot in (0, 2):
            settings = EvaluationSettings(num_fewshot=num_fewshot)
            by_us(models.base, tasks, tmp_path / "cache", ["words"], settings)
        assert evaluated == ["words"] * times


def test_an_unchanged_function_of_a_task_is_recognised(
    models: SavedModels, tmp_path: Path, no_model_is_loaded: Callable[[], None]
) -> None:
    """Loaded anew it has another address, which of a `functools.partial` is all that Python tells."""
    tasks = write_benchmark_tasks(tmp_path / "tasks")
    with (tasks / "aggregations.py").open("a") as file:
        file.write("\nfrom functools import partial\n\ndef first(n, rows):\n    return rows.select(range(n))\n")
        file.write("\nfirst_four = partial(first, 4)\n")
    replace_text(tasks / "sums.yaml", "test_split", "process_docs: !function aggregations.first_four\ntest_split")
    first = load_entries([SuiteTask("sums")], [tasks])
    os.utime(tasks / "aggregations.py", (1, 1))  # lm-eval loads it again
    second = load_entries([SuiteTask("sums")], [tasks])
    one, other = (entries[0].tasks[0].dump_config()["process_docs"] for entries in (first, second))
    assert one != other and "0x" in one
    reference, cache = ModelReference.find(models.base), ScoreCache(tmp_path / "cache")
    scores = evaluate_model(reference, first, SETTINGS, cache)
    assert len(scores["sums"]) == 4
    no_model_is_loaded()
    assert evaluate_model(reference, second, SETTINGS, cache) == scores


def test_only_an_added_task_is_measured(
    models: SavedModels, task_folder: Path, tmp_path: Path, evaluated: list[str]
) -> None:
    first = by_us(models.base, task_folder, tmp_path, ["sums", "texts"])
    second = by_us(models.base, task_folder, tmp_path, ["words", "sums", "texts"])
    assert evaluated == ["sums", "texts", "words"]
    assert list(second) == ["words", "sums", "texts"]
    assert {name: second[name] for name in first} == first


def test_a_tasks_number_of_examples_is_the_suites(models: SavedModels, task_folder: Path, tmp_path: Path) -> None:
    """Each entry's own number, unless the settings give one for all; and tasks are left as they were."""
    wanted = [SuiteTask("sums", 3), SuiteTask("words"), SuiteTask("endings", 1)]
    entries = load_entries(wanted, [task_folder])
    reference, cache = ModelReference.find(models.base), ScoreCache(tmp_path)
    for settings, expected in [(SETTINGS, [3, 0, 1]), (EvaluationSettings(num_fewshot=2), [2, 2, 2])]:
        scores = evaluate_model(reference, entries, settings, cache)
        assert [scores[task.name].num_fewshot for task in wanted] == expected
    assert [entry.tasks[0].get_config("num_fewshot") for entry in entries] == [None] * 3
    expected_scores = by_lm_eval(models.base, task_folder, ["sums"], num_fewshot=3)["sums"]
    scores = evaluate_model(reference, entries, SETTINGS, cache)
    assert scores["sums"].values == pytest.approx(only_metrics(expected_scores), rel=1e-6)


@pytest.mark.parametrize(("method", "calls"), [("_model_call", 3), ("_model_generate", 1)])
def test_a_killed_run_goes_on_in_the_middle_of_a_task(
    models: SavedModels,
    task_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    method: str,
    calls: int,
) -> None:
    """Killed at a forward, it later asks only what has no answer yet, and ends where an unbroken run does."""
    names, settings = ["sums", "words", "generated"], EvaluationSettings(batch_size=4)
    expected = by_us(models.base, task_folder, tmp_path / "unbroken", names, settings)
    kept: list[str] = []
    add_partial, original = CacheHook.add_partial, getattr(HFLM, method)

    def counting(hook: CacheHook, kind: str, request: Any, answer: Any) -> None:
        kept.append(kind)
        add_partial(hook, kind, request, answer)

    def killed(*arguments: Any, **options: Any) -> Any:
        nonlocal calls
        calls -= 1
        if calls < 0:
            raise KeyboardInterrupt
        return original(*arguments, **options)

    monkeypatch.setattr(CacheHook, "add_partial", counting)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(HFLM, method, killed)
        by_us(models.base, task_folder, tmp_path / "cache", names, settings)
    gc.collect()  # closes the file of answers, as the end of a process does
    before = len(kept)
    all_requests = 3 * (NUM_ROWS["sums"] + NUM_ROWS["words"]) + NUM_ROWS["generated"]
    assert 0 < before < all_requests
    assert_same_answers(by_us(models.base, task_folder, tmp_path / "cache", names, settings), expected)
    assert len(kept) == all_requests
    assert not list((tmp_path / "cache" / "unfinished").glob("*.db"))


class Attack:
    """Leaves a file behind when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return Path.touch, (self.mark,)


def test_nothing_in_the_cache_is_unpickled(
    models: SavedModels, task_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not even of a file of answers into which somebody has written."""
    names = ["sums", "words", "generated"]
    expected = by_us(models.base, task_folder, tmp_path / "alone", names)
    cache = tmp_path / "cache"
    with monkeypatch.context() as patch, pytest.raises(OSError, match="No space left"):
        patch.setattr(ScoreCache, "put", lambda *_: raise_full())
        by_us(models.base, task_folder, cache, names)
    gc.collect()
    (answers_file,) = (cache / "unfinished").glob("*.db")
    keys = [key for (key,) in sqlite3.connect(answers_file).execute("SELECT key FROM unnamed")]
    assert len(keys) > NUM_ROWS["sums"]
    planted = SqliteDict(str(answers_file), autocommit=True)
    for key in keys:
        planted[key] = Attack(tmp_path / "mark")
    planted.close()
    with pytest.raises(OSError, match=f"delete it; its answers will be asked again.*{answers_file}"):
        by_us(models.base, task_folder, cache, names)
    gc.collect()
    answers_file.unlink()
    assert_same_answers(by_us(models.base, task_folder, cache, names), expected)
    assert not (tmp_path / "mark").exists()


def test_two_commands_at_one_model_take_turns(
    models: SavedModels, task_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, evaluated: list[str]
) -> None:
    """The second waits for the first's scores, takes those it needs, and finds its own file of answers as it was."""
    first_is_at_it, first_may_end = threading.Event(), threading.Event()
    put = ScoreCache.put

    def held(cache: ScoreCache, identity: Any, scores: TaskScores) -> None:
        first_is_at_it.set()
        assert first_may_end.wait(60)
        put(cache, identity, scores)

    monkeypatch.setattr(ScoreCache, "put", held)
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(by_us, models.base, task_folder, tmp_path, ["sums"])
        assert first_is_at_it.wait(60)
        second = pool.submit(by_us, models.base, task_folder, tmp_path, ["sums", "words"])
        with pytest.raises(TimeoutError):
            second.result(timeout=1)
        assert evaluated == ["sums"]
        first_may_end.set()
        assert second.result(60)["sums"] == first.result(60)["sums"]
    assert evaluated == ["sums", "words"]


def test_what_is_known_is_not_waited_for(models: SavedModels, task_folder: Path, tmp_path: Path) -> None:
    scores = by_us(models.base, task_folder, tmp_path, ["sums"])
    (lock,) = (tmp_path / "unfinished").glob("*.lock")
    with ThreadPoolExecutor(1) as pool, FileLock(lock):
        assert pool.submit(by_us, models.base, task_folder, tmp_path, ["sums"]).result(60) == scores


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")  # of sqlitedict's own thread
def test_a_damaged_file_of_answers_is_named(
    models: SavedModels, task_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch, pytest.raises(OSError, match="No space left"):
        patch.setattr(ScoreCache, "put", lambda *_: raise_full())
        by_us(models.base, task_folder, tmp_path, ["sums"])
    gc.collect()
    (answers_file,) = (tmp_path / "unfinished").glob("*.db")
    answers_file.write_bytes(b"no database " * 200)
    with pytest.raises(OSError, match=f"not a database; if the file is damaged, delete it.*{answers_file}"):
        by_us(models.base, task_folder, tmp_path, ["sums"])
    answers_file.unlink()
    assert len(by_us(models.base, task_folder, tmp_path, ["sums"])["sums"]) == NUM_ROWS["sums"]


def raise_full() -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("place", ["replace", "write"])
def test_a_full_disk_keeps_what_was_written(
    models: SavedModels,
    task_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    evaluated: list[str],
    place: str,
) -> None:
    """The scores of the first task are in the cache, nothing half written is; then it goes on with the second."""
    full = OSError(errno.ENOSPC, "No space left on device")
    originals = {"replace": os.replace, "write": Path.write_text}

    def replace_once(source: Any, target: Any) -> None:
        if Path(target).name.startswith("words"):
            raise full
        originals["replace"](source, target)

    def write_half(path: Path, text: str, **options: Any) -> None:
        originals["write"](path, text[: len(text) // 2] if path.name.startswith("words") else text, **options)
        if path.name.startswith("words"):
            raise full

    with monkeypatch.context() as patch, pytest.raises(OSError, match="No space left"):
        patch.setattr(os, "replace", replace_once) if place == "replace" else patch.setattr(
            Path, "write_text", write_half
        )
        by_us(models.base, task_folder, tmp_path, ["sums", "words"])
    assert [path.name.partition("-")[0] for path in tmp_path.iterdir() if path.is_file()] == ["sums"]
    answered: list[int] = []
    monkeypatch.setattr(HFLM, "_model_call", lambda *_: answered.append(1))
    scores = by_us(models.base, task_folder, tmp_path, ["sums", "words"])
    assert evaluated == ["sums", "words", "words"]
    assert not answered  # single answers were kept
    monkeypatch.undo()
    assert_same_answers(scores, by_us(models.base, task_folder, tmp_path / "other", ["sums", "words"]))


def test_an_adapter_scores_as_the_merged_model(models: SavedModels, task_folder: Path, tmp_path: Path) -> None:
    """Also where the base has more embeddings than the tokenizer has tokens."""
    reference = ModelReference.find(models.adapter)
    assert (reference.base, reference.adapter) == (models.base, models.adapter)
    adapter, merged, base = (
        by_us(model, task_folder, tmp_path) for model in (models.adapter, models.merged, models.base)
    )
    assert_same_answers(adapter, merged, tolerance=1e-4)
    assert answers(adapter)["texts"] != answers(base)["texts"]


def test_nothing_is_printed_where_there_is_no_repository(
    models: SavedModels, task_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: Any
) -> None:
    """git would say "fatal: not a git repository", once for each evaluation."""
    monkeypatch.chdir(tmp_path)
    assert by_us(models.base, task_folder, tmp_path / "cache", TASKS[:1])
    assert "git" not in capfd.readouterr().err
