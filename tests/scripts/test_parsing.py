"""Options from a command line and from a YAML; what is wrong with them is told in one line."""

import json
import os
from dataclasses import dataclass, field

import pytest

from lopt_hf import cli
from lopt_hf.scripts import pipeline
from lopt_hf.scripts.parsing import chosen, chosen_method, make_trl_parser, parse_or_exit
from tests.common.test_yaml_files import BOMB


@dataclass
class Options:
    num_blocks: int = field(default=2, metadata={"help": "How many blocks."})
    rate: float = field(default=1.0, metadata={"help": "How fast."})
    name: str | None = field(default=None, metadata={"help": "Of what."})
    cuts: list[int] | None = field(default=None, metadata={"help": "Where."})
    names: list[str] | None = field(default=None, metadata={"help": "Of others."})
    saves: bool = field(default=True, metadata={"help": "Whether to keep it."})


def parse(*arguments):
    (options,) = parse_or_exit(make_trl_parser("sft", "What it does:\n\n    as an example", Options), arguments)
    return options.num_blocks


@pytest.mark.parametrize(
    "given", [["--cuts", "4", "8"], ["--cuts", "4,8"], ["--cuts=4,8"], ["--cuts", "[4, 8]"], ["--cuts=[4,8]"]]
)
def test_a_list_of_numbers_may_be_one_word(given):
    (options,) = parse_or_exit(make_trl_parser("sft", None, Options), [*given, "--names", "a,b", "c"])
    assert (options.cuts, options.names) == ([4, 8], ["a,b", "c"])  # a comma may be part of a name
    (options,) = parse_or_exit(make_trl_parser("sft", None, Options), ["--names", '["a", "b"]', "--name", "[x]"])
    assert (options.names, options.name) == (["a", "b"], "[x]")


@dataclass
class Batches:
    batches: dict | str | None = field(default=None, metadata={"help": "How to share them out."})
    num_blocks: int = field(default=2, metadata={"help": "How many blocks."})

    def __post_init__(self):
        if self.batches is not None:
            Options(**(json.loads(self.batches) if isinstance(self.batches, str) else self.batches))
        if self.num_blocks == 0:
            raise TypeError("a fault of ours")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"nums": 1}', "batches={\"nums\": 1}: there is no setting 'nums' in it; remove it or correct its name."),
        ("{nums}", "batches={nums} is no JSON: Expecting property name enclosed in double quotes"),
    ],
)
def test_a_dictionary_is_wrong(tmp_path, capsys, text, message):
    parser = make_trl_parser("sft", None, Batches)
    with pytest.raises(SystemExit) as ended:
        parse_or_exit(parser, ["--batches", text])
    error = capsys.readouterr().err
    assert ended.value.code == 2 and error.count("\n") == 1
    assert error.startswith(f"lopt-hf sft: error: {message}")
    with pytest.raises(TypeError, match="a fault of ours"):
        parse_or_exit(parser, ["--num_blocks", "0"])


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
        (["--num_bl", "3"], "unknown option on the command line: 'num_bl' (did you mean 'num_blocks'?)"),
        (["num_blocks=3"], "unknown option on the command line: 'num_blocks=3'"),
        (["--config", "nowhere.yaml"], "there is no file 'nowhere.yaml'"),
        (["--config"], "--config needs the path of a YAML file"),
        (["--config", "a.yaml", "--config=b.yaml"], "--config is given 2 times (a.yaml, b.yaml); give one"),
    ],
)
def test_errors_are_one_line(capsys, arguments, message):
    with pytest.raises(SystemExit):
        parse(*arguments)
    error = capsys.readouterr().err
    assert message in error and error.startswith("lopt-hf sft: error: ") and error.count("\n") == 1


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "num_blocks: 2\nrate: 1\nnum_blocks: 3\n",
            "line 3, column 1 is not valid YAML: the key 'num_blocks' is there tw",
        ),
        (
            "num_blokcs: 2\nx: 1",
            "unknown key in the YAML file: 'num_blokcs' (did you mean 'num_blocks'?), 'x'; remove",
        ),
        ("num_blocks: [2]", "num_blocks=[2] must be a whole number."),
        ("num_blocks: 2.5", "num_blocks=2.5 must be a whole number."),
        ("num_blocks: null", "num_blocks=null must be a whole number."),
        ("name: no", "name=False must be text or null; write it in quotes."),
        ("name: 1e5", "name=100000.0 must be text or null; write it in quotes."),
        ("names: a", "names='a' must be a list of texts or null."),
        ("saves: 2", "saves=2 must be true or false."),
        ("env: [A]", "env=['A'] must be `name: value` pairs."),
        ("- num_blocks", "does not hold `name: value` pairs"),
        (BOMB, "it has more than 10,000 values with its aliases written out"),
        ("num_blocks: [", "is not valid YAML: "),
    ],
)
def test_errors_in_the_file_are_one_line(tmp_path, capsys, text, message):
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    with pytest.raises(SystemExit) as ended:
        parse("--config", str(path))
    error = capsys.readouterr().err
    assert message in error and error.startswith("lopt-hf sft: error: ") and error.count("\n") == 1
    assert ended.value.code == 2
    assert chosen_method(["--config", str(path)]) == "lopt"


def test_a_folder_is_no_config(tmp_path, capsys):
    with pytest.raises(SystemExit):
        parse("--config", str(tmp_path))
    assert capsys.readouterr().err == (
        f"lopt-hf sft: error: config={tmp_path} is a folder; give the path of a YAML file in it.\n"
    )


def test_the_files_values_are_what_the_command_lines_would_be(tmp_path, monkeypatch):
    path = tmp_path / "recipe.yaml"
    path.write_text("num_blocks: '3'\nrate: 1e-5\nnames: [a, b]\nsaves: no\nenv: {LOPT_TEST: 1}\n")
    monkeypatch.setenv("LOPT_TEST", "0")
    (options,) = parse_or_exit(make_trl_parser("sft", None, Options), ["--config", str(path)])
    assert options == Options(num_blocks=3, rate=1e-5, names=["a", "b"], saves=False)
    assert os.environ["LOPT_TEST"] == "1"


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


@pytest.mark.parametrize("command", ["sft", "dpo", "grpo", "pipeline", "image"])
def test_a_method_that_is_no_text_is_one_line(command, tmp_path, capsys):
    path = tmp_path / "recipe.yaml"
    path.write_text("method: [mlaan]\nnum_blocks: 3\noutput_dir: out")
    with pytest.raises(SystemExit) as ended:
        cli.main([command, "--config", str(path)])
    error = capsys.readouterr().err
    assert ended.value.code == 2 and error.count("\n") == 1
    assert error.startswith(f"lopt-hf {command}: error: method=['mlaan'] must be text")
    assert chosen("num_blocks", ["--config", str(path)], "2") == 3


def test_a_methods_options_are_not_anothers(capsys):
    with pytest.raises(SystemExit):
        pipeline.main(["--method", "mlaan", "--reconstruction_weight", "1"])
    assert "unknown option on the command line: 'reconstruction_weight'" in capsys.readouterr().err


def test_a_shortened_method_does_not_train_another(capsys):
    """The options are made by the method that is written out."""
    with pytest.raises(SystemExit) as ended:
        pipeline.main(["--meth", "mlaan", "--output_dir", "out"])
    assert ended.value.code == 2
    assert "unknown option on the command line: 'meth' (did you mean 'method'?)" in capsys.readouterr().err


def test_a_shortened_task_does_not_measure_another(capsys):
    with pytest.raises(SystemExit):
        cli.main(["bench", "pipeline", "--tas", "image", "--stages", "0"])
    assert capsys.readouterr().err.endswith("error: unrecognized arguments: --tas image\n")
