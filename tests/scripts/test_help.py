"""Help begins with what users need, and `--help-all` leaves nothing out."""

import re

import pytest

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


def test_the_version(capsys):
    cli.main(["--version"])
    assert capsys.readouterr().out == f"lopt-hf {lopt_hf.__version__}\n"
