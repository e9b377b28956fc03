"""`lopt-hf recipes`: the list, one of them, and copies that overwrite nothing."""

from pathlib import Path

import pytest

from lopt_hf import cli
from lopt_hf.common.packaged import list_configs
from lopt_hf.scripts import sft

ROOT = Path(__file__).resolve().parents[2]
NAME = "smollm2-135m/sft/lopt_k2"
RECIPE = ROOT / f"recipes/{NAME}.yaml"


def test_the_list_has_each_with_its_command_and_purpose(capsys):
    cli.main(["recipes"])
    listed = capsys.readouterr().out
    for name in list_configs():
        assert f"  {name.removeprefix('accelerate_configs/')} " in listed
    assert "lopt-hf sft --config NAME\n" in listed and "lopt-hf compare --config NAME\n" in listed
    assert "LoPT with two blocks: SmolLM2-135M-Instruct on generated arithmetic word problems.\n" in listed


def test_a_folder_is_listed_and_a_recipe_printed(capsys):
    cli.main(["recipes", "qwen3-4b/"])
    assert capsys.readouterr().out.count("qwen3-4b/") == 5
    cli.main(["recipes", NAME])
    assert capsys.readouterr().out == RECIPE.read_text()


def test_a_copy_can_be_run_and_is_not_overwritten(tmp_path, capsys):
    cli.main(["recipes", NAME, "--copy", str(tmp_path)])
    copy = tmp_path / f"{NAME}.yaml"
    assert capsys.readouterr().out == f"lopt-hf sft --config {copy}\n"
    assert copy.read_text() == RECIPE.read_text()
    copy.write_text("mine")
    with pytest.raises(SystemExit) as ended:
        cli.main(["recipes", "--copy", str(tmp_path)])
    error = capsys.readouterr().err
    assert ended.value.code == 2 and error.count("\n") == 1 and "exists and is not overwritten" in error
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == [copy] and copy.read_text() == "mine"


@pytest.mark.parametrize(("folder", "where"), [("qa.csv", ""), ("qa.csv/new", ": {}/qa.csv")])
def test_a_file_is_no_folder_to_copy_into(folder, where, tmp_path, capsys):
    (tmp_path / "qa.csv").write_text("mine")
    with pytest.raises(SystemExit) as ended:
        cli.main(["recipes", NAME, "--copy", str(tmp_path / folder)])
    error = capsys.readouterr().err
    assert ended.value.code == 2 and error.count("\n") == 1
    assert f"copy='{tmp_path / folder}'{where.format(tmp_path)} is a file; name a folder." in error


def test_all_are_copied(tmp_path):
    cli.main(["recipes", "--copy", str(tmp_path / "new")])
    assert len(list((tmp_path / "new").rglob("*.yaml"))) == len(list_configs())


@pytest.mark.parametrize("command", [["recipes", "smollm2/sft/lopt_k2"], ["sft", "--config", "smollm2/sft/lopt_k2"]])
def test_an_unknown_name_is_one_line(command, capsys):
    with pytest.raises(SystemExit) as ended:
        cli.main(command)
    error = capsys.readouterr().err
    assert ended.value.code == 2 and error.count("\n") == 1 and "nearest is 'smollm2-135m/sft/lopt_k" in error


def test_a_command_takes_a_recipe_by_its_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    _, args, _ = sft.make_parser().parse_args_and_config(["--config", NAME, "--num_blocks", "3"])
    assert (args.num_blocks, args.output_dir) == (3, "out/smollm2-135m-lopt_k2")
