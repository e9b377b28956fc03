"""What the commands print, whatever the terminal's encoding; and how they end on bad input."""

import io
import os
import sys

import pytest

from lopt_hf import cli
from lopt_hf.scripts import bench, compare, demo, pipeline_export, pipeline_simulate, plan, retention

SUBCOMMANDS = [["bench", name] for name in ("step", "pipeline", "repl", "gpu")]
SUBCOMMANDS += [["pipeline", name] for name in ("simulate", "export")]


@pytest.mark.parametrize("command", [[], *([name] for name in cli.COMMANDS), *SUBCOMMANDS], ids=" ".join)
def test_help_under_an_ascii_locale(monkeypatch, command):
    output = io.TextIOWrapper(io.BytesIO(), encoding="ascii", errors="strict")
    monkeypatch.setattr(sys, "stdout", output)
    with pytest.raises(SystemExit) as ended:
        cli.main([*command, "--help"])
        raise SystemExit(0)  # the list of commands returns
    output.flush()
    assert ended.value.code == 0 and output.buffer.getvalue()


BAD_INPUT = {
    "no command": ([], "no command given; choose one of demo, plan"),
    "unknown command": (["trian"], "unknown command 'trian'; choose one of"),
    "sft": (["sft", "--max_steps", "many"], "invalid int value: 'many'"),
    "sft without a model": (["sft", "--output_dir", "{}/out"], "model_name_or_path is missing"),
    "mlaan": (["mlaan", "--window", "0"], "window=0"),
    "mlaan, method": (["mlaan", "--method", "lopt"], "invalid choice: 'lopt'"),
    "dpo": (["dpo", "--output_dir", "{}/out", "--model_name_or_path", "{}/no"], "dataset_name is missing"),
    "grpo": (["grpo", "--output_dir", "{}/out", "--model_name_or_path", "{}/no"], "reward_funcs is missing"),
    "peers": (["peers", "--method", "lisaa", "--output_dir", "{}"], "lisaa"),
    "pipeline": (["pipeline", "--num_stages", "2", "--output_dir", "{}/out"], "dataset_name is missing"),
    "pipeline export": (["pipeline", "export", "--checkpoint", "{}/no", "--output-dir", "{}/out"], "{}/no"),
    "pipeline simulate": (["pipeline", "simulate", "--stages", "0"], "stages=0"),
    "repl": (["repl", "--num_layers_to_replace", "1", "--output_dir", "{}/out"], "model_name_or_path is missing"),
    "repl, model": (["repl", "--num_layers_to_replace", "1", "--model", "{}/no", "--output_dir", "{}/out"], "{}/no"),
    "retention": (["retention", "--baseline", "{}/no", "--model", "{}/no"], "{}/no"),
    "compare": (["compare", "--config", "{}/no.yaml"], "{}/no.yaml"),
    "curves": (["curves", "--run", "a={}", "--metric", "loss", "--output", "a.png"], "there is no trainer_state.json"),
    "curves, part": (["curves", "--run", "a={}", "--metric", "loss", "--output", "a.png", "--part", "0"], "--part=0"),
    "plan": (["plan", "--model", "{}/no", "--device-memory", "1GiB"], "{}/no"),
    "bench": (["bench", "step", "--model", "{}/no"], "{}/no"),
    "bench, value": (["bench", "step", "--steps", "many"], "invalid int value: 'many'"),
    "demo": (["demo", "--steps", "0"], "--steps 0 trains nothing"),
    "demo, model": (["demo", "--model", "{}/no", "--output-dir", "{}/out"], "{}/no"),
}


WITH_UNDERSCORES = {
    bench: ["step", "--model", "a_b", "--num_blocks", "2", "--batch_size=4"],
    compare: ["--config", "a_b.yaml", "--data_dir", "c_d", "--output_dir", "e_f"],
    demo: ["--output_dir", "a_b", "--learning_rate", "1"],
    pipeline_export: ["--checkpoint", "a_b", "--output_dir=c_d"],
    pipeline_simulate: ["--forward_ms", "1", "--virtual_stages", "2"],
    plan: ["--model", "a_b", "--device_memory", "1GiB"],
    retention: ["--baseline", "a_b", "--num_heldout", "8", "--no_drift", "--output_dir", "c_d"],
}


@pytest.mark.parametrize("command", WITH_UNDERSCORES, ids=lambda command: command.__name__.rpartition(".")[2])
def test_options_are_taken_with_underscores_too(command):
    parser, given = command.make_parser(), WITH_UNDERSCORES[command]
    names = [text.partition("=")[0] for text in given if text.startswith("--")]
    dashed = [text.replace("_", "-") if text in names else text for text in given]
    assert parser.parse_args(given) == parser.parse_args(dashed)


@pytest.mark.parametrize("name", BAD_INPUT)
def test_bad_input_ends_with_one_line_and_status_2(tmp_path, monkeypatch, capfd, name):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("RANK", raising=False)
    arguments, message = BAD_INPUT[name]
    with pytest.raises(SystemExit) as ended:
        cli.main([part.replace("{}", str(tmp_path)) for part in arguments])
    *before, line = capfd.readouterr().err.splitlines()
    assert ended.value.code == 2
    assert line.startswith("lopt-hf") and message.replace("{}", str(tmp_path)) in line
    assert not [text for text in before if text.startswith(("usage:", "Traceback"))]
    assert os.listdir(tmp_path) in ([], ["out"])
