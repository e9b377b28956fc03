"""The model card: what it tells besides TRL's, and that it is what is pushed."""

from types import SimpleNamespace

import pytest
import transformers.trainer
from huggingface_hub import ModelCard

from lopt_hf import LocalSFTTrainer, RetentionCallback, __version__
from lopt_hf.scripts.card_facts import describe_data, public_command
from lopt_hf.scripts.launching import LAUNCHED
from lopt_hf.trainers.model_card import is_users_readme, read_retention
from tests.retention.small_tasks import write_tasks
from tests.trainers.helpers import make_trainer

HISTORY = [
    {"retention/piqa/acc": 0.5, "step": 0},
    {"loss": 1.0, "step": 1},
    {"retention/piqa/acc": 0.4, "retention/piqa/acc_delta": -0.1, "retention/piqa/acc_low": -0.2,
     "retention/piqa/acc_high": 0.0, "retention/mean_delta": -0.1, "retention/mean_low": -0.2,
     "retention/mean_high": 0.0, "step": 2},
]  # fmt: skip


class Recorder:
    """A hub that takes everything and keeps what it was given."""

    def __init__(self):
        self.card = None

    def create_repo(self, name, **_):
        return SimpleNamespace(repo_id=f"someone/{name}")

    def upload_folder(self, repo_id, folder_path, **_):
        self.card = (repo_id, ModelCard.load(f"{folder_path}/README.md"))


def test_the_card_tells_blocks_reach_and_what_the_command_knows(tmp_path):
    trainer = make_trainer(tmp_path, num_blocks=2, task_reach=[1, 1, 2])
    trainer.card_facts = {"data": "`a|b`", "command": "`lopt-hf sft`"}
    trainer.create_model_card("tiny")
    card = ModelCard.load(tmp_path / "README.md")
    for line in (
        f"| method | LoPT, of lopt_hf {__version__} |",
        "| blocks | 2, of layers 0–1, 2–3 |",
        "| trained by the task loss | the last 1, 1, 2 of 2 blocks, over steps |",
        "| data | `a\\|b` |",
        "| command | `lopt-hf sft` |",
    ):
        assert line.replace("---", "") in card.text
    assert card.text.index("### Local learning") < card.text.index("### Framework versions")
    assert card.text.count("### Framework versions") == 1
    assert card.data.eval_results is None and "lopt" in card.data.tags


@pytest.mark.parametrize(
    ("settings", "name"),
    [
        ({"local_objective": "none", "task_reach": [1, 2]}, "a reach schedule"),
        ({"local_objective": "none"}, "frozen early blocks"),
        ({"train_early_blocks": False}, "frozen early blocks"),
    ],
)
def test_a_run_that_is_not_the_papers_does_not_name_it(tmp_path, settings, name):
    trainer = make_trainer(tmp_path, **settings)
    trainer.create_model_card("tiny")
    text = ModelCard.load(tmp_path / "README.md").text
    assert f"| method | {name}, of lopt_hf {__version__} |" in text and f"trained with {name}" in text
    assert "Rethinking" not in text and "2605.04913" not in text
    trainer = make_trainer(tmp_path / "2")
    trainer.create_model_card("tiny")
    assert "Rethinking" in ModelCard.load(tmp_path / "2" / "README.md").text


def test_a_trainer_that_names_no_paper_keeps_its_name(tmp_path):
    """Such as a stage of a pipeline, whose early blocks have no objective where gradients come late."""
    trainer = make_trainer(tmp_path, trainer_class=LocalSFTTrainer, local_objective="none", task_reach=2)
    trainer.create_model_card("tiny")
    assert f"| method | Local SFT, of lopt_hf {__version__} |" in ModelCard.load(tmp_path / "README.md").text


def test_what_was_kept_is_in_the_metadata_as_the_hub_has_it(tmp_path):
    trainer = make_trainer(tmp_path)
    trainer.state.log_history = HISTORY
    trainer.create_model_card("tiny")
    card = ModelCard.load(tmp_path / "README.md")
    (result,) = card.data.eval_results
    assert (result.dataset_type, result.metric_type, result.metric_value) == ("piqa", "acc", 0.4)
    assert result.metric_name == "acc, -0.1 [-0.2, +0] from the base"
    assert card.data.to_dict()["model-index"][0]["name"] == "tiny"
    assert "| piqa | acc | 0.5 | 0.4 | -0.1 [-0.2, +0] |" in card.text
    trainer.create_model_card("tiny")  # as at every checkpoint
    assert ModelCard.load(tmp_path / "README.md").content == card.content


def test_nothing_was_kept_where_nothing_was_measured_after_training():
    assert read_retention([]) == [] and read_retention(HISTORY[:2]) == []


def test_a_run_pushes_its_card_with_what_the_callback_measured(tmp_path, monkeypatch):
    """The whole way, from the callback's logs to the hub."""
    hub = Recorder()
    monkeypatch.setattr(transformers.trainer, "hf_api", lambda: hub)
    trainer = make_trainer(tmp_path, max_steps=1)
    trainer.add_callback(RetentionCallback(tasks=["tiny_sums"], include_path=write_tasks(tmp_path / "tasks"), limit=4))
    trainer.train()
    trainer.push_to_hub(dataset_name="someone/data")
    name, card = hub.card
    assert name == trainer.hub_model_id
    assert {(result.dataset_type, result.metric_type) for result in card.data.eval_results} >= {("tiny_sums", "acc")}
    assert "| data | someone/data |" in card.text and card.data.datasets == "someone/data"


@pytest.mark.parametrize(
    ("given", "told"),
    [
        (
            ["--config", "/home/me/a b.yaml", "--hub_token", "hf_1", "--seed=1", "--hub_token=hf_2"],
            "lopt-hf sft --config 'a b.yaml' --hub_token ... --seed=1 --hub_token=...",
        ),
        (["--dataset_name=/home/me/rows.jsonl", "--output_dir", "out/x"],
         "lopt-hf sft --dataset_name=rows.jsonl --output_dir out/x"),
        (["--model_init_kwargs", '{"token": "s3", "a": {"api_key": "k", "cache_dir": "/home/me/x", "n": [1]}}'],
         'lopt-hf sft --model_init_kwargs '
         """'{"token": "...", "a": {"api_key": "...", "cache_dir": "x", "n": [1]}}'"""),
        (["--push_to_hub-token=hf_1", "--eos_token", "<|im_end|>", "--dataset_name", "https://x:hf_abc@y/rows"],
         "lopt-hf sft --push_to_hub-token=... --eos_token '<|im_end|>' --dataset_name https://x:...@y/rows"),
    ],
)  # fmt: skip
def test_the_command_is_told_without_secrets_and_folders(given, told, monkeypatch):
    assert public_command("sft", given) == told
    monkeypatch.setenv(LAUNCHED, "--accelerate_config ddp_2 --seed 1")
    assert public_command("sft", given) == "lopt-hf sft --accelerate_config ddp_2 --seed 1"


def test_data_are_told_by_where_they_come_from(tmp_path):
    given = {"dataset_config": "main", "dataset_train_split": "train", "dataset_max_samples": 1000}
    hub = SimpleNamespace(dataset_name="openai/gsm8k", is_generated=False, **given)
    assert describe_data(hub) == (
        "[openai/gsm8k](https://huggingface.co/datasets/openai/gsm8k), configuration `main`, split `train`; 1,000 rows"
    )
    local = SimpleNamespace(dataset_name=str(tmp_path), is_generated=False, **given)
    assert describe_data(local) == f"a local file or folder, `{tmp_path.name}`; 1,000 rows"
    generated = SimpleNamespace(dataset_name="arithmetic", is_generated=True, **given)
    assert describe_data(generated).startswith("`arithmetic`, which lopt_hf generates")


def test_a_readme_of_the_users_own_is_kept_and_an_earlier_card_is_not(tmp_path):
    readme = tmp_path / "README.md"
    readme.write_text("My own notes")
    make_trainer(tmp_path, max_steps=1, save_strategy="steps", save_steps=1).train()
    assert readme.read_text() == "My own notes" and is_users_readme(readme)
    readme.unlink()
    make_trainer(tmp_path, max_steps=2, save_strategy="steps", save_steps=1).train(resume_from_checkpoint=True)
    assert not is_users_readme(readme)
    readme.write_text(readme.read_text().replace("LoPT", "a former run"))
    make_trainer(tmp_path, max_steps=3, save_strategy="steps", save_steps=1).train(resume_from_checkpoint=True)
    assert "a former run" not in readme.read_text()
