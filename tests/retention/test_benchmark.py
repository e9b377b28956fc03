"""The base comes first, everybody answers the same samples, and what was found is written whole."""

import errno
import json
import os
import platform
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from lm_eval.models.huggingface import HFLM
from transformers import AutoModelForCausalLM

from lopt_hf.retention import benchmark as benchmark_module
from lopt_hf.retention import evaluation
from lopt_hf.retention.benchmark import Candidate, RetentionBenchmark, describe_machine, write_flips
from lopt_hf.retention.evaluation import EvaluationSettings, evaluate_model, load_language_model
from lopt_hf.retention.heldout import HELDOUT_TASK
from lopt_hf.retention.layer_drift import layer_drift
from lopt_hf.retention.references import ModelReference
from lopt_hf.retention.results import RetentionReport
from lopt_hf.retention.scores import ScoreCache, TaskScores
from lopt_hf.retention.suites import SuiteTask, TaskEntry, load_entries
from tests.machine import set_machine
from tests.retention.conftest import SavedModels, save
from tests.tiny import make_model, make_tokenizer

HELDOUT = [
    {
        "prompt": [{"role": "user", "content": f"What is {i}?"}],
        "completion": [{"role": "assistant", "content": f"{i}."}],
    }
    for i in range(5)
]


@pytest.fixture
def entries(task_folder: Path) -> list[TaskEntry]:
    return load_entries([SuiteTask("sums"), SuiteTask("texts"), SuiteTask("generated")], [task_folder])


def make_benchmark(models: SavedModels, entries: list[TaskEntry], cache: Path, **options: Any) -> RetentionBenchmark:
    settings = options.pop("settings", EvaluationSettings(limit=4, samples={"sums": [1, 5, 7]}))
    return RetentionBenchmark(models.base, entries, settings, ScoreCache(cache), **options)


def candidates_of(models: SavedModels) -> list[Candidate]:
    return [Candidate("tuned", "full", (models.tuned,)), Candidate("adapter", "LoRA", (models.adapter,))]


def compare(benchmark: RetentionBenchmark, candidates: list[Candidate]) -> RetentionReport:
    report = benchmark.compare(candidates)
    assert report is not None
    return report


def test_the_base_is_measured_first_and_all_on_the_same_samples(
    models: SavedModels, entries: list[TaskEntry], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Base and models are asked the same questions of every task, held-out answers included; each model once."""
    measured: list[tuple[str, dict[str, Any]]] = []

    def recording(reference: ModelReference, *arguments: Any) -> dict[str, TaskScores]:
        scores = evaluate_model(reference, *arguments)
        measured.append(
            (
                reference.name,
                {name: [(s["doc_id"], s["doc_hash"]) for s in task.samples] for name, task in scores.items()},
            )
        )
        return scores

    monkeypatch.setattr(benchmark_module, "evaluate_model", recording)
    benchmark = make_benchmark(models, entries, tmp_path, heldout=HELDOUT)
    report = compare(benchmark, candidates_of(models))
    benchmark.scores(models.tuned)
    assert [name for name, _ in measured] == [models.base, models.tuned, models.adapter]
    of_base = measured[0][1]
    assert {name: [number for number, _ in samples] for name, samples in of_base.items()} == {
        HELDOUT_TASK: [0, 1, 2, 3, 4],
        "sums": [1, 5, 7],
        "texts": [0, 1, 2, 3],
        "generated": [0, 1, 2, 3],
    }
    assert all(samples == of_base for _, samples in measured)
    assert [result.label for result in report.models] == ["tuned", "adapter"]
    assert [result.group for result in report.models] == ["full", "LoRA"]
    assert report.baseline == models.base


def test_the_base_against_itself(models: SavedModels, entries: list[TaskEntry], tmp_path: Path) -> None:
    """Nothing changed, nothing moved, and nothing is claimed."""
    benchmark = make_benchmark(models, entries, tmp_path, heldout=HELDOUT)
    (result,) = compare(benchmark, [Candidate("itself", "itself", (models.base,))]).models
    assert result.gain is not None
    for delta in (*result.deltas, result.gain):
        assert delta.delta == 0
        assert delta.value == delta.baseline
        assert delta.verdict in ("cannot tell", f"no change larger than {delta.margin:.3g}")
    assert set(result.drift.values()) == {0.0}


def test_several_seeds_are_their_mean(models: SavedModels, entries: list[TaskEntry], tmp_path: Path) -> None:
    benchmark = make_benchmark(models, entries, tmp_path)
    both = Candidate("both", "both", (models.tuned, models.merged))
    (result,) = compare(benchmark, [both]).models
    assert [seed.label for seed in result.seeds] == list(both.models)
    for number, delta in enumerate(result.deltas):
        seeds = [seed.deltas[number] for seed in result.seeds]
        assert delta.delta == pytest.approx(sum(seed.delta for seed in seeds) / 2)
    single = [compare(benchmark, [Candidate(model, model, (model,))]).models[0] for model in both.models]
    assert [seed.deltas for seed in result.seeds] == [of_one.deltas for of_one in single]
    for part, value in result.drift.items():
        assert value == pytest.approx(sum(of_one.drift[part] for of_one in single) / 2)


def test_drift_is_computed_once(
    models: SavedModels, entries: list[TaskEntry], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is kept beside the scores; an adapter and the merged model each have their own."""
    first = compare(make_benchmark(models, entries, tmp_path), candidates_of(models))
    base, tuned = ModelReference.find(models.base), ModelReference.find(models.tuned)
    assert first.models[0].drift == layer_drift(base, tuned)
    assert first.models[0].drift != first.models[1].drift
    monkeypatch.setattr(benchmark_module, "layer_drift", None)
    assert compare(make_benchmark(models, entries, tmp_path), candidates_of(models)) == first
    monkeypatch.undo()
    without = make_benchmark(models, entries, tmp_path).compare(candidates_of(models), with_drift=False)
    assert without is not None and not without.models[0].drift


def test_a_full_disk_leaves_no_half_written_drift(
    models: SavedModels, entries: list[TaskEntry], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    benchmark = make_benchmark(models, entries, tmp_path)
    original = os.replace

    def replace(source: Any, target: Any) -> None:
        if Path(target).name.startswith("drift"):
            raise OSError(errno.ENOSPC, "No space left on device")
        original(source, target)

    with monkeypatch.context() as patch, pytest.raises(OSError, match="No space left"):
        patch.setattr(os, "replace", replace)
        benchmark.compare(candidates_of(models))
    assert {path.suffix for path in tmp_path.iterdir() if path.is_file()} == {".json"}
    assert compare(benchmark, candidates_of(models)).models[0].drift


def test_an_adapter_of_another_base_is_warned_of_once(
    models: SavedModels, entries: list[TaskEntry], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Not one whose base is a copy of the baseline, or the baseline under another path."""
    shutil.copytree(models.base, tmp_path / "copy")
    for baseline in (models.base, f"{models.base}/../base", str(tmp_path / "copy")):
        RetentionBenchmark(baseline, entries, EvaluationSettings(), ScoreCache(tmp_path)).reference(models.adapter)
    assert not caplog.records
    benchmark = RetentionBenchmark(models.tuned, entries, EvaluationSettings(), ScoreCache(tmp_path))
    for _ in range(2):
        benchmark.reference(models.adapter)
    (record,) = caplog.records
    assert f"an adapter of {models.base}, which is not the baseline {models.tuned}" in record.getMessage()


@pytest.mark.parametrize(("dtype", "expected"), [("auto", "float32"), ("bfloat16", "bfloat16")])
def test_all_are_measured_in_the_baselines_dtype(
    models: SavedModels,
    entries: list[TaskEntry],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    dtype: str,
    expected: str,
) -> None:
    """A checkpoint saved in bf16 against a baseline saved in fp32."""
    rounded = AutoModelForCausalLM.from_pretrained(models.tuned, dtype=torch.bfloat16)
    folder = save(rounded, tmp_path / "rounded")
    types: list[torch.dtype] = []

    def recording(*arguments: Any) -> HFLM:
        language_model = load_language_model(*arguments)
        types.append(language_model.model.dtype)
        return language_model

    monkeypatch.setattr(evaluation, "load_language_model", recording)
    benchmark = make_benchmark(models, entries, tmp_path / "cache", settings=EvaluationSettings(limit=2, dtype=dtype))
    report = compare(benchmark, [Candidate("rounded", "rounded", (folder,))])
    assert types == [getattr(torch, expected)] * 2
    assert report.settings["dtype"] == expected


@pytest.mark.parametrize(("has_bfloat16", "expected"), [(True, "bfloat16"), (False, "float32")])
def test_baseline_saved_in_bfloat16_is_measured_in_the_faster_type(
    models: SavedModels,
    entries: list[TaskEntry],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    has_bfloat16: bool,
    expected: str,
) -> None:
    """Which costs no accuracy: float32 holds every number of bfloat16."""
    base = save(AutoModelForCausalLM.from_pretrained(models.base, dtype=torch.bfloat16), tmp_path / "base")
    set_machine(monkeypatch, has_bfloat16)
    benchmark = RetentionBenchmark(base, entries, EvaluationSettings(limit=2), ScoreCache(tmp_path / "cache"))
    assert (benchmark.settings.dtype, benchmark.arithmetic.dtype) == (expected, expected)
    report = compare(benchmark, [Candidate("tuned", "full", (models.tuned,))])
    assert report.settings["dtype"] == expected


def test_scores_in_another_type_are_left_aside_with_one_line(
    models: SavedModels, entries: list[TaskEntry], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    values = []
    for dtype in ("bfloat16", "float32"):
        settings = EvaluationSettings(limit=2, dtype=dtype)
        benchmark = make_benchmark(models, entries, tmp_path / "cache", settings=settings)
        values.append(compare(benchmark, candidates_of(models)).models[0].deltas)
    assert values[0] != values[1]
    (message,) = [record.getMessage() for record in caplog.records if "left aside" in record.getMessage()]
    assert "has scores in bfloat16, which are left aside: these are in float32" in message


@pytest.mark.parametrize(
    "damage",
    ['{"scores": {"task', "[]", "{}", '{"scores": {"task": "texts", "of_later": 1}}', '{"scores": []}'],
    ids=["cut off", "a list", "empty", "other fields", "no fields"],
)
def test_a_damaged_file_is_named_and_measured_again(
    models: SavedModels, entries: list[TaskEntry], tmp_path: Path, caplog: pytest.LogCaptureFixture, damage: str
) -> None:
    """Of scores and of drift; and once, however often the scores of a model are looked for."""
    before = compare(make_benchmark(models, entries, tmp_path / "cache"), candidates_of(models))
    of_drift = sorted((tmp_path / "cache").glob("drift-*.json"))[0]
    damaged = [*sorted((tmp_path / "cache").glob("texts-*.json"))[:1], *([of_drift] if damage[-1] != "}" else [])]
    for path in damaged:
        path.write_text(damage)
    after = compare(make_benchmark(models, entries, tmp_path / "cache"), candidates_of(models))
    assert after.models == before.models
    told = [message for record in caplog.records if "is damaged" in (message := record.getMessage())]
    assert [str(path) in message for path, message in zip(damaged, told, strict=True)] == [True] * len(damaged)
    assert all("what it holds is measured again" in message for message in told)
    assert all(json.loads(path.read_text()) for path in damaged)


def test_tasks_that_take_no_examples_are_named(
    models: SavedModels, task_folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = shutil.copytree(task_folder, tmp_path / "tasks")
    for name in ("sums", "texts"):
        with (folder / f"{name}.yaml").open("a") as file:
            file.write("num_fewshot: 0\n")
    entries = load_entries([SuiteTask(name) for name in ("sums", "words", "texts")], [folder])
    for number in (None, 0):
        make_benchmark(models, entries, tmp_path, settings=EvaluationSettings(num_fewshot=number))
    assert not caplog.records
    make_benchmark(models, entries, tmp_path, settings=EvaluationSettings(num_fewshot=5))
    (record,) = caplog.records
    assert record.getMessage() == (
        "num_fewshot=5 is not for sums, texts: by their own configuration they are asked without examples."
    )


def test_whole_texts_take_no_examples(
    models: SavedModels, task_folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Which have no prompt, whatever their task says: the number is neither told nor a reason to measure again."""
    entries = load_entries([SuiteTask("texts")], [task_folder])
    files = []
    for number in (None, 3):
        benchmark = make_benchmark(models, entries, tmp_path, settings=EvaluationSettings(limit=2, num_fewshot=number))
        files.append(benchmark.score_files(models.base))
        assert benchmark.scores(models.base)["texts"].num_fewshot == 0
    assert files[0] == files[1] and len(list(tmp_path.glob("texts-*.json"))) == 1
    (record,) = (record for record in caplog.records if "num_fewshot" in record.getMessage())
    assert record.getMessage().startswith("num_fewshot=3 is not for texts:")


def test_padded_embeddings_leave_the_drift_out(
    models: SavedModels, entries: list[TaskEntry], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Of that model alone; what was measured is reported."""
    padded = AutoModelForCausalLM.from_pretrained(models.tuned)
    padded.resize_token_embeddings(padded.config.vocab_size + 8)
    folder = save(padded, tmp_path / "padded")
    benchmark = make_benchmark(models, entries, tmp_path / "cache")
    report = compare(benchmark, [Candidate("padded", "padded", (folder,)), *candidates_of(models)])
    assert [bool(result.drift) for result in report.models] == [False, True, True]
    assert len(report.models[0].deltas) == len(report.models[1].deltas)
    (message,) = [record.getMessage() for record in caplog.records if "drift" in record.getMessage()]
    assert message.startswith("padded: its drift is left out: weights of the baseline's embeddings")


def test_flips_are_written_whole(tmp_path: Path) -> None:
    """As JSON lines; a row that cannot be made leaves the earlier file as it was."""
    path = tmp_path / "flips.jsonl"
    assert write_flips(iter([{"doc_id": 1}, {"doc_id": 2}]), path) == 2

    def failing() -> Iterable[dict[str, int]]:
        yield {"doc_id": 3}
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(OSError, match="No space left"):
        write_flips(iter(failing()), path)
    assert [json.loads(line) for line in path.read_text().splitlines()] == [{"doc_id": 1}, {"doc_id": 2}]
    assert list(tmp_path.iterdir()) == [path]


def test_another_vocabulary(models: SavedModels, entries: list[TaskEntry], tmp_path: Path) -> None:
    """Is found before anything is measured."""
    tokenizer = make_tokenizer()
    tokenizer.add_tokens(["new"])
    folder = save(make_model(vocab_size=len(tokenizer)), tmp_path / "other")
    tokenizer.save_pretrained(folder)
    benchmark = make_benchmark(models, entries, tmp_path / "cache")
    message = f"model '{folder}' has a vocabulary of {len(tokenizer)} tokens of which 1 are not the baseline's"
    with pytest.raises(ValueError, match=message):
        benchmark.compare([*candidates_of(models), Candidate("other", "other", (folder,))])
    assert not (tmp_path / "cache").exists()


def test_samples_of_a_task_that_is_not_measured(models: SavedModels, entries: list[TaskEntry], tmp_path: Path) -> None:
    """A misspelt name would otherwise measure everything."""
    with pytest.raises(ValueError, match="samples are given for 'smus', which is not measured; tasks are sums, texts"):
        make_benchmark(models, entries, tmp_path, settings=EvaluationSettings(samples={"smus": 5}))


@pytest.mark.parametrize(
    ("labels", "message"), [([], "at least one"), (["a", "a"], r"models \['a', 'a'\] .* each named once")]
)
def test_labels(
    models: SavedModels, entries: list[TaskEntry], tmp_path: Path, labels: list[str], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        make_benchmark(models, entries, tmp_path).compare([Candidate(name, name, (models.tuned,)) for name in labels])


@pytest.mark.parametrize("confidence", [0, 1, 95])
def test_confidence(models: SavedModels, entries: list[TaskEntry], tmp_path: Path, confidence: float) -> None:
    with pytest.raises(ValueError, match=f"confidence={confidence} is not between 0 and 1; 0.95 is usual"):
        make_benchmark(models, entries, tmp_path, confidence=confidence)


def _build_for_gpus_without_one(check_available: bool = False) -> torch.device | None:
    """What `torch.accelerator.current_accelerator` says on a machine without a GPU, of a torch that could use one."""
    return None if check_available else torch.device("cuda")


def test_a_build_for_gpus_computes_on_the_cpu_of_a_machine_without_one(
    models: SavedModels, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.accelerator, "current_accelerator", _build_for_gpus_without_one)
    model = load_language_model(ModelReference.find(models.base), EvaluationSettings())
    assert model.device.type == model.model.device.type == "cpu"


def test_the_machine_is_described(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fully enough to tell why bf16 is fast on one CPU and slow on another."""
    with monkeypatch.context() as patch:
        patch.setattr(torch.accelerator, "current_accelerator", _build_for_gpus_without_one)
        patch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
        patch.setattr(torch, "get_num_threads", lambda: 6)
        assert describe_machine()["device"] == f"CPU, {platform.machine()} with AVX512, 6 threads"
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available: torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H100")
    assert describe_machine()["device"] == "NVIDIA H100"
