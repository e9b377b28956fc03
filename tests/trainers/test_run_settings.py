"""Settings that the libraries look at late are refused early, and those that work are let through."""

from pathlib import Path
from typing import Any

import pytest
from transformers.integrations import integration_utils
from transformers.trainer_utils import SchedulerType

from lopt_hf import LoPTConfig
from lopt_hf.trainers import checks
from lopt_hf.trainers.checks import check_run_settings

# What schedulers cannot be made without
NEEDED: dict[SchedulerType, dict[str, Any]] = {
    SchedulerType.COSINE_WITH_MIN_LR: {"min_lr_rate": 0.1},
    SchedulerType.COSINE_WARMUP_WITH_MIN_LR: {"min_lr_rate": 0.1},
    SchedulerType.WARMUP_STABLE_DECAY: {"num_decay_steps": 10},
}


def check(tmp_path: Path, **values: Any) -> None:
    given = {"report_to": "none", "bf16": False, "eval_strategy": "steps", "eval_steps": 1, **values}
    check_run_settings(LoPTConfig(str(tmp_path), **given))


@pytest.mark.parametrize("max_steps", [-1, 4])
@pytest.mark.parametrize("name", SchedulerType)
def test_every_scheduler_is_let_through(tmp_path: Path, name: SchedulerType, max_steps: int) -> None:
    check(tmp_path, lr_scheduler_type=name, lr_scheduler_kwargs=NEEDED.get(name), warmup_steps=8, max_steps=max_steps)


@pytest.mark.parametrize(
    ("optim", "optim_args"),
    [
        ("sgd", "momentum=0.9, nesterov=True"),
        ("sgd", "nesterov=false"),
        ("sgd", "momentum=0"),  # the default, said aloud
        ("rmsprop", "alpha=0.99,centered=no"),
        ("adagrad", "eps=1e-10"),
        ("adamw_torch", None),
        ("adamw_torch", ""),
    ],
)
def test_arguments_that_an_optimizer_reads(tmp_path: Path, optim: str, optim_args: str | None) -> None:
    check(tmp_path, optim=optim, optim_args=optim_args)


@pytest.mark.parametrize(
    ("optim", "optim_args", "message"),
    [
        ("adamw_torch", "betas=0.9", "optim_args='betas=0.9': optim='adamw_torch' does not read 'betas'; leave"),
        ("sgd", "momentum=0.9,foo=1", "optim_args='momentum=0.9,foo=1': optim='sgd' does not read 'foo'"),
        ("sgd", "momentum=high", "optim_args='momentum=high' cannot be read by optim='sgd': could not convert"),
        ("sgd", "momentum", "optim_args='momentum': 'momentum' is no setting; write name=value"),
        ("sgd", "momentum=0.9=1", "'momentum=0.9=1' is no setting"),
        ("sgd", "momentum=0.9,", "'' is no setting"),
    ],
)
def test_arguments_that_it_does_not(tmp_path: Path, optim: str, optim_args: str, message: str) -> None:
    with pytest.raises(ValueError) as refused:
        check(tmp_path, optim=optim, optim_args=optim_args)
    assert message in str(refused.value)


def test_an_optimizer_whose_package_transformers_misses_as_a_value(tmp_path: Path) -> None:
    with pytest.raises((ImportError, ValueError), match="optim='adamw_torch_xla' cannot be used here: .*; or choose"):
        check(tmp_path, optim="adamw_torch_xla")


def test_a_tracker_that_is_not_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(integration_utils, "is_tensorboard_available", lambda: False)
    with pytest.raises(ValueError, match="report_to='tensorboard' cannot be used here: TensorBoardCallback requires"):
        check(tmp_path, report_to="tensorboard")
    monkeypatch.setitem(integration_utils.INTEGRATION_TO_CALLBACK, "tensorboard", object)
    check(tmp_path, report_to=["tensorboard"])
    with pytest.raises(ValueError, match="report_to='nothere' cannot be used here: nothere is not supported, only"):
        check(tmp_path, report_to=["tensorboard", "nothere"])


def test_liger_kernels_that_are_not_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checks, "is_liger_kernel_available", lambda: False)
    with pytest.raises(ImportError, match="use_liger_kernel=True needs liger-kernel 0.3 or newer, which is not here"):
        check(tmp_path, use_liger_kernel=True)
    monkeypatch.setattr(checks, "is_liger_kernel_available", lambda: True)
    check(tmp_path, use_liger_kernel=True)


@pytest.mark.parametrize("path", ["none.jinja", "none.j2", "{}/none", "./none", "~/none.txt", "../none.jinja"])
def test_a_chat_template_that_is_not_there(tmp_path: Path, path: str) -> None:
    path = path.format(tmp_path)
    with pytest.raises(ValueError) as refused:
        check(tmp_path, chat_template_path=path)
    assert str(refused.value) == f"chat_template_path={path!r}: there is no such file; check the path."


def test_chat_templates_that_are(tmp_path: Path) -> None:
    for name in ("a.jinja", "b.j2", "c.txt"):
        (tmp_path / name).write_text("{{ messages }}")
    for known in ("Qwen/Qwen3-0.6B", str(tmp_path), str(tmp_path / "a.jinja"), str(tmp_path / "b.j2"), None):
        check(tmp_path, chat_template_path=known)
    with pytest.raises(ValueError, match=r"c.txt' is not taken for a template; give a file whose name ends in .jinja"):
        check(tmp_path, chat_template_path=str(tmp_path / "c.txt"))
