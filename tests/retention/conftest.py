"""Tiny models on disk, and tasks to measure them with."""

import copy
import functools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from lm_eval.tasks import _index
from peft import LoraConfig, get_peft_model
from transformers import PreTrainedModel

from tests.retention.benchmark_tasks import rows_of, write_benchmark_tasks, write_rows
from tests.tiny import VOCABULARY, make_model, make_tokenizer


@dataclass(frozen=True)
class SavedModels:
    """Folders of a base with more embeddings than tokens, and of models made from it.

    Parameters:
        base: The base.
        tuned: Its weights, moved a little.
        adapter: A LoRA adapter, without a tokenizer of its own.
        merged: The base with the adapter merged into it.
    """

    base: str
    tuned: str
    adapter: str
    merged: str


def save(model: PreTrainedModel, folder: Path) -> str:
    model.save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return str(folder)


def moved(model: PreTrainedModel, size: float = 0.02) -> PreTrainedModel:
    """A copy of a model with noise on all weights."""
    model = copy.deepcopy(model)
    torch.manual_seed(1)
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(size * torch.randn_like(weight))
    return model


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> SavedModels:
    folder = tmp_path_factory.mktemp("models")
    model = make_model(vocab_size=len(VOCABULARY) + 8)
    base = save(model, folder / "base")
    tuned = save(moved(model), folder / "tuned")
    model.name_or_path = base
    torch.manual_seed(2)
    targets = ["q_proj", "down_proj"]
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=targets, init_lora_weights=False))
    adapted.save_pretrained(folder / "adapter")
    return SavedModels(base, tuned, str(folder / "adapter"), save(adapted.merge_and_unload(), folder / "merged"))


@pytest.fixture(scope="session")
def diverged(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The folder of a model so sure of the wrong characters that no float holds its perplexity."""
    model = make_model(vocab_size=len(VOCABULARY) + 8)
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(1e5)
    return save(model, tmp_path_factory.mktemp("diverged"))


@pytest.fixture(scope="session")
def task_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tasks; of `generated` the base has two thirds right by one filter, and the others by the other."""
    folder = write_benchmark_tasks(tmp_path_factory.mktemp("tasks"))
    model, tokenizer = make_model(vocab_size=len(VOCABULARY) + 8).eval(), make_tokenizer()
    rows = rows_of("generated")
    for number, row in enumerate(rows):
        inputs = tokenizer(str(row["question"]), return_tensors="pt")
        output = model.generate(**inputs, max_new_tokens=6, do_sample=False, pad_token_id=0)
        answer = tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        row["completion"] = answer[0] if number % 3 else answer[-1]
    write_rows(folder, "generated", rows)
    return folder


@pytest.fixture(autouse=True)
def no_environment_report(monkeypatch: pytest.MonkeyPatch) -> None:
    """lm-eval describes the machine after each evaluation, which takes it half a second."""
    monkeypatch.setattr("lm_eval.evaluator.add_env_info", lambda results: None)


@pytest.fixture(scope="session", autouse=True)
def own_tasks_of_lm_eval_are_read_once() -> Iterator[None]:
    """Reading its thousands of files takes five seconds each time that a name is not among those at hand."""
    folder, original = Path(_index.__file__).parent, _index.load_yaml
    cached = functools.cache(original)

    def load(path: Path, **options: Any) -> dict[str, Any]:
        return copy.deepcopy(cached(path, **options)) if path.is_relative_to(folder) else original(path, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_index, "load_yaml", load)
        yield
