"""Recipes by name, from a checkout and from a wheel's layout, and names that are none."""

from pathlib import Path

import pytest

from lopt_hf.common import packaged

ROOT = Path(__file__).resolve().parents[2]
RECIPE = ROOT / "recipes/smollm2-135m/sft/lopt_k2.yaml"


def test_all_files_of_the_checkout_are_known():
    files = [path for folder in packaged.FOLDERS for path in (ROOT / folder).rglob("*.yaml")]
    assert sorted(packaged.list_configs().values()) == sorted(files)


@pytest.mark.parametrize(
    "name",
    [
        "smollm2-135m/sft/lopt_k2",
        "smollm2-135m/sft/lopt_k2.yaml",
        "recipes/smollm2-135m/sft/lopt_k2.yaml",
        Path("smollm2-135m/sft/lopt_k2"),
    ],
)
def test_a_recipe_is_found_by_its_name(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert packaged.find_config(name) == RECIPE


def test_a_path_that_is_there_wins(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    own = Path("smollm2-135m/sft/lopt_k2")
    own.parent.mkdir(parents=True)
    own.write_text("num_blocks: 3")
    assert packaged.find_config(str(own)) == own


@pytest.mark.parametrize(
    ("name", "nearest"),
    [("smollm2-135m/sft/lopt_k3", "smollm2-135m/sft/lopt_k"), ("lopt_k2", "/lopt_k2")],
)
def test_an_unknown_name_is_told_the_nearest(name, nearest):
    with pytest.raises(FileNotFoundError, match=f"nearest is '[^']*{nearest}"):
        packaged.find_config(name)


def test_no_name_is_suggested_where_none_is_near():
    with pytest.raises(FileNotFoundError, match="nor a recipe of that name; `lopt-hf recipes` lists all"):
        packaged.find_config("zzz.yaml")


def test_a_wheels_own_files_win_over_the_checkouts(tmp_path, monkeypatch):
    """In a wheel they lie in the package, as its build puts them there."""
    package = tmp_path / "lopt_hf"
    (package / "recipes/a/sft").mkdir(parents=True)
    (package / "recipes/a/sft/b.yaml").write_text("# One thing. And more.\n")
    monkeypatch.setattr(packaged, "files", lambda name: package)
    assert packaged.list_configs() == {"a/sft/b": package / "recipes/a/sft/b.yaml"}


def test_accelerate_configs_by_name_or_path(tmp_path):
    fsdp2 = ROOT / "recipes/accelerate_configs/fsdp2_8.yaml"
    assert packaged.find_accelerate_config("fsdp2_8") == fsdp2
    assert packaged.find_accelerate_config("recipes/accelerate_configs/fsdp2_8.yaml").samefile(fsdp2)
    (tmp_path / "own.yaml").touch()
    assert packaged.find_accelerate_config(str(tmp_path / "own.yaml")) == tmp_path / "own.yaml"
    with pytest.raises(
        ValueError, match="accelerate_config='fsdp2' is no file here, .* nearest is 'fsdp2_8'; use ddp_2"
    ):
        packaged.find_accelerate_config("fsdp2")


def test_every_file_says_in_its_first_comment_what_it_is_for():
    for name, path in packaged.list_configs().items():
        purpose = packaged.purpose_of(path)
        assert purpose.endswith((".", "?")) and 20 < len(purpose) < 250, name
