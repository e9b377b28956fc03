"""What the stages of `lopt-hf pipeline` would fail by, or overwrite, is one line before any is started."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch.distributed as dist
from peft import LoraConfig, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM

from lopt_hf.pipeline.runtime.health import failure_status, report_failure
from lopt_hf.scripts import pipeline
from lopt_hf.scripts.launching import LAUNCHED
from tests.scripts.test_bad_data import run
from tests.scripts.test_training import arguments
from tests.tiny import make_model, make_tokenizer


class LaunchedError(Exception):
    """In place of a launch."""


@pytest.fixture(autouse=True)
def no_launch(monkeypatch: pytest.MonkeyPatch) -> None:
    def launch(*args: Any) -> int:
        raise LaunchedError

    monkeypatch.setattr(pipeline, "launch_stages", launch)


def save_model(folder: Path, adapter: bool) -> None:
    model: Any = make_model()
    if adapter:
        model = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"]))
    model.save_pretrained(folder, max_shard_size="20KB")  # in several files, as a pipeline does
    assert adapter or not (folder / "model.safetensors").exists()


@pytest.mark.parametrize("trains_adapter", [False, True], ids=["whole", "adapter"])
@pytest.mark.parametrize(
    ("adapter", "name"), [(False, "config.json"), (True, "adapter_config.json")], ids=["model", "adapter"]
)
def test_a_finished_model_is_not_overwritten(
    tmp_path: Path, adapter: bool, name: str, trains_adapter: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    save_model(tmp_path / "out", adapter)
    values = {"num_stages": 2, "use_peft": trains_adapter}
    line = run("pipeline", arguments(tmp_path, "sft", **values), capsys)
    assert f"holds a model ({name}) that would be overwritten; choose another output_dir" in line
    with pytest.raises(LaunchedError):  # a job that begins again
        pipeline.main(arguments(tmp_path, "sft", **values, resume_from_checkpoint="auto"))


def test_the_model_that_a_run_starts_from_is_not_overwritten(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_model(tmp_path / "start", adapter=False)
    start = str(tmp_path / "start")
    line = run(
        "pipeline", arguments(tmp_path, "sft", num_stages=2, model_name_or_path=start, output_dir=start), capsys
    )
    assert "is the model that the run starts from; choose another output_dir" in line


def test_nor_one_of_images(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_model(tmp_path / "out", adapter=False)
    given = ["--task", "image", "--train_file", "no.parquet", "--output_dir", str(tmp_path / "out")]
    line = run("pipeline", [*given, "--bf16", "false", "--use_cpu", "true"], capsys)
    assert "holds a model (config.json) that would be overwritten" in line


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"chat_template_path": "{}/base"}, "chat_template_path='{}/base' would add tokens to embeddings and LM head"),
        (
            {"use_peft": True, "lora_target_modules": ["q_proj", "lm_head"]},
            "target_modules names the LM head, whose weight TRL's loss reads past an adapter",
        ),
        (
            {"use_peft": True, "lora_target_modules": ["embed_tokens", "embed"]},
            "target_modules=['embed', 'embed_tokens'] adapts nothing on the stage of layers 2 to 3",
        ),
        ({"use_peft": True, "lora_target_modules": ["no_proj"]}, "no_proj"),
        ({"dataset_streaming": True, "max_steps": -1}, "cannot be counted; set max_steps"),
        (
            {"lr_scheduler_type": "warmup_stable_decay"},
            "lr_scheduler_type='warmup_stable_decay' cannot be made with lr_scheduler_kwargs={}: ",
        ),
        ({"lr_scheduler_type": "cosine_with_min_lr"}, "lr_scheduler_type='cosine_with_min_lr' cannot be made with"),
        ({"save_strategy": "best"}, "save_strategy='best' does not work in a pipeline"),
        ({"padding_free": True}, "padding_free=True does not keep to max_length=64"),
        ({"fsdp": "full_shard"}, "fsdp='full_shard' does not work in a pipeline"),
        ({"late_warmup_steps": float("inf")}, "late_warmup_steps=inf must be"),
    ],
)
def test_what_the_stages_would_find(
    tmp_path: Path, values: dict[str, Any], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    values = {name: value.format(tmp_path) if isinstance(value, str) else value for name, value in values.items()}
    line = run("pipeline", arguments(tmp_path, "sft", **{"num_stages": 2, **values}), capsys)
    assert message.replace("{}/", f"{tmp_path}/") in line


def test_a_model_that_cannot_be_cut(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = arguments(tmp_path, "sft", num_stages=2, model_name_or_path=str(tmp_path / "rwkv"))
    sizes = {"hidden_size": 32, "num_hidden_layers": 4, "vocab_size": 64}
    AutoModelForCausalLM.from_config(AutoConfig.for_model("rwkv", **sizes)).save_pretrained(tmp_path / "rwkv")
    make_tokenizer().save_pretrained(tmp_path / "rwkv")
    assert "model=RwkvForCausalLM cannot be cut into stages" in run("pipeline", given, capsys)


@pytest.mark.parametrize(
    "values",
    [
        {},
        {"use_peft": True, "lora_target_modules": ["q_proj", "embed_tokens"]},
        {"lr_scheduler_type": "warmup_stable_decay", "lr_scheduler_kwargs": {"num_decay_steps": 1}},
        {"chat_template_path": "{}/template.jinja"},
        {"dataset_streaming": True, "dataset_name": "{}/rows.jsonl", "max_steps": 2},
    ],
)
def test_what_they_can_do_is_launched(tmp_path: Path, values: dict[str, Any]) -> None:
    (tmp_path / "template.jinja").write_text("{{ messages }}")
    (tmp_path / "rows.jsonl").write_text('{"prompt": "1 + 1 =", "completion": " 2"}\n')
    values = {name: value.format(tmp_path) if isinstance(value, str) else value for name, value in values.items()}
    with pytest.raises(LaunchedError):
        pipeline.main(arguments(tmp_path, "sft", **{"num_stages": 2, **values}))


def test_others_are_told_of_an_error_that_nobody_expected(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its type and place are in this process's own output, as Python prints them."""
    store = dist.HashStore()

    def parse(arguments: Any) -> None:
        raise KeyError("input_ids")

    monkeypatch.setenv("RANK", "1")
    monkeypatch.setattr(pipeline, "end_with_parent", lambda: None)
    monkeypatch.setattr(pipeline.Rendezvous, "from_environment", lambda: SimpleNamespace(store=store, rank=1))
    monkeypatch.setattr(pipeline, "_parse", parse)
    with pytest.raises(KeyError, match="input_ids"):
        pipeline.main([])
    assert report_failure(store, "a later one") == "rank 1 failed: 'input_ids' (KeyError)"


IGNORED = [
    ({"lora_r": 4}, "lora_r=4 does nothing without use_peft"),
    ({"optim_args": "bogus=1"}, "optim_args"),
    ({"devices": "0,7"}, "devices='0,7' does nothing where `accelerate launch` is given its own settings"),
]


def stage_of(monkeypatch: pytest.MonkeyPatch, given: list[str]) -> dist.HashStore:
    """Runs what a stage does before it is one; returns the store that all share."""
    store = dist.HashStore()
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setattr(pipeline, "end_with_parent", lambda: None)
    monkeypatch.setattr(pipeline.Rendezvous, "from_environment", lambda: SimpleNamespace(store=store, rank=1))
    monkeypatch.setattr(pipeline, "run_stage", lambda *args: None)
    with pytest.raises(SystemExit) as ended:
        pipeline.main(given)
    assert ended.value.code == 2
    return store


@pytest.mark.parametrize(("values", "message"), IGNORED)
def test_a_stage_that_somebody_else_launches_refuses_what_would_do_nothing(
    tmp_path: Path, values: dict[str, Any], message: str, monkeypatch: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    """And all processes end as after bad input."""
    store = stage_of(monkeypatch, arguments(tmp_path, "sft", num_stages=2, **values))
    assert message in capsys.readouterr().err
    assert failure_status(store) == 2


@pytest.mark.parametrize(("values", "message"), IGNORED)
def test_so_does_the_command_before_it_launches_by_a_configuration(
    tmp_path: Path, values: dict[str, Any], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    given = arguments(tmp_path, "sft", num_stages=2, **values)
    assert message in run("pipeline", [*given, "--accelerate_config", "ddp_2"], capsys)


def test_a_stage_of_the_command_is_not_checked_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is given the command's own options, of which `devices` are the launcher's by now."""
    ran = []
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv(LAUNCHED, "--devices 0,7")
    monkeypatch.setattr(pipeline, "end_with_parent", lambda: None)
    monkeypatch.setattr(pipeline.Rendezvous, "from_environment", lambda: SimpleNamespace(rank=1))
    monkeypatch.setattr(pipeline, "run_stage", lambda *args: ran.append(args))
    pipeline.main(arguments(tmp_path, "sft", num_stages=2, devices="0,7"))
    assert len(ran) == 1
