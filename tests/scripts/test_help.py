"""Help begins with what users need, and `--help-all` leaves nothing out."""

import re

import pytest
from trl import SFTConfig

import lopt_hf
from lopt_hf import cli
from lopt_hf.scripts import curves, dpo, grpo, mlaan, peers, pipeline, repl, sft
from lopt_hf.scripts.help import COMMON

LONG = {"sft": sft, "dpo": dpo, "grpo": grpo, "mlaan": mlaan, "peers": peers, "pipeline": pipeline, "repl": repl}
OWN = {
    **{command: {"num_blocks", "early_learning_rate", "clip_scope"} for command in LONG},
    "peers": {"num_blocks", "lisa_period"},
    "repl": {"operator", "layers_to_replace"},
}


CORRECTED = ("output_dir", "bf16", "activation_checkpointing", "resume_from_checkpoint")


def shown(command: str, flag: str, capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit) as ended:
        cli.main([command, flag])
    assert not ended.value.code
    return capsys.readouterr().out


def options(text: str) -> list[str]:
    return re.findall(r"^  (?:-h, )?--([\w-]+)", text, re.MULTILINE)


@pytest.mark.parametrize("command", LONG)
def test_common_options_come_first_and_all_on_request(command, capsys):
    short, whole = (shown(command, flag, capsys) for flag in ("--help", "--help-all"))
    parser = LONG[command].make_parser()
    names = [action.dest for action in parser._actions if action.dest not in ("help", "==SUPPRESS==")]
    first = options(short)
    assert len(short.splitlines()) < 300 < len(whole.splitlines())
    assert {"output_dir", "learning_rate", "max_steps", *OWN[command]} <= set(first)
    assert first[:2] == ["help", "help-all"] and first.index("learning_rate") < first.index(max(OWN[command]))
    every = [name for name in options(whole) if name not in ("help", "help-all", "model")]
    assert (
        sorted(every) == sorted(set(names))
        and every[: len(first) - 3]
        == [name for name in first if name not in ("help", "help-all", "model")][: len(first) - 3]
    )
    assert f"shows {len(set(names) - set(first))} more options" in short


def test_every_common_option_is_one(capsys):
    known = {action.dest for module in LONG.values() for action in module.make_parser()._actions}
    assert set(COMMON) <= known


@pytest.mark.parametrize("command", [*LONG, "curves"])
def test_a_terminal_shows_no_code_fences(command, capsys):
    text = shown(command, "--help", capsys)
    assert "```" not in text and f"\n  lopt-hf {command} " in text
    assert "```" in curves.__doc__  # what the documentation is made of has them


@pytest.mark.parametrize("command", [*LONG, "image"])
def test_the_libraries_texts_are_corrected(command, capsys):
    """What an option left out means is what the command does then."""
    text = " ".join(shown(command, "--help-all", capsys).split())
    of = {name: re.split(rf" --{name} (?=\[?[A-Z])", text)[1].partition(" --")[0] for name in CORRECTED}
    assert "Default: trainer_output." in of["output_dir"] and SFTConfig(use_cpu=True).output_dir == "trainer_output"
    assert "defaults to `True`" not in of["bf16"] and ("the faster of bf16 and fp32" in of["bf16"]) == (
        command != "image"
    )
    checkpoints = "True" if command not in ("image", "repl") else "False"
    assert f"efault: {checkpoints}" in of["activation_checkpointing"]
    if command != "repl":  # where it is refused
        assert "true: the last one" in of["resume_from_checkpoint"] and "auto: " in of["resume_from_checkpoint"]
        assert "Not directly used" not in of["resume_from_checkpoint"]


def test_the_version(capsys):
    cli.main(["--version"])
    assert capsys.readouterr().out == f"lopt-hf {lopt_hf.__version__}\n"
