"""Options from a command line and from a YAML; what is wrong with them is told in one line."""

from dataclasses import dataclass, field

import pytest

from lopt_hf.scripts import pipeline
from lopt_hf.scripts.parsing import chosen_method, make_trl_parser, parse_or_exit


@dataclass
class Options:
    num_blocks: int = field(default=2, metadata={"help": "How many blocks."})


def parse(*arguments):
    (options,) = parse_or_exit(make_trl_parser("sft", "What it does:\n\n    as an example", Options), arguments)
    return options.num_blocks


@pytest.mark.parametrize("form", [["--config", "{}"], ["--config={}"]])
def test_the_command_line_wins_over_the_file(tmp_path, form):
    (tmp_path / "a=b.yaml").write_text("num_blocks: 3")
    config = [part.format(tmp_path / "a=b.yaml") for part in form]
    assert (parse(), parse(*config), parse(*config, "--num_blocks", "4")) == (2, 3, 4)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--num_blcks", "3"], "unknown option on the command line: 'num_blcks' (did you mean 'num_blocks'?)"),
        (["--num-blcks=3"], "unknown option on the command line: 'num-blcks' (did you mean 'num_blocks'?)"),
        (["--config", "nowhere.yaml"], "there is no file 'nowhere.yaml'"),
        (["--config"], "--config needs the path of a YAML file"),
    ],
)
def test_errors_are_one_line(capsys, arguments, message):
    with pytest.raises(SystemExit):
        parse(*arguments)
    error = capsys.readouterr().err
    assert message in error and error.startswith("lopt-hf sft: error: ") and error.count("\n") == 1


def test_help_begins_with_what_the_command_does(capsys):
    with pytest.raises(SystemExit):
        parse("--help")
    text = capsys.readouterr().out
    assert text.startswith(
        "usage: lopt-hf sft [--config recipe.yaml] [options]\n\nWhat it does:\n\n    as an example\n"
    )
    assert "How many blocks. (default: 2)" in text


def test_the_pipelines_method_decides_which_options_there_are(tmp_path):
    config = tmp_path / "recipe.yaml"
    config.write_text("method: mlaan\nwindow: 1\noutput_dir: out")
    for arguments in (["--config", str(config)], ["--method=mlaan", "--window", "1", "--output_dir", "out"]):
        parser = pipeline.make_parser(chosen_method(arguments))
        _, args, _, launch = parser.parse_args_and_config(arguments)
        assert (args.window, args.num_stages, launch.method) == (1, 2, "mlaan")
    for arguments in ([], ["--method", "lopt", "--config", str(config)], ["--config", "nowhere.yaml"], ["--method"]):
        assert chosen_method(arguments) == "lopt"


def test_a_methods_options_are_not_anothers(capsys):
    with pytest.raises(SystemExit):
        pipeline.main(["--method", "mlaan", "--reconstruction_weight", "1"])
    assert "unknown option on the command line: 'reconstruction_weight'" in capsys.readouterr().err
