"""Where models are found: full checkpoints and adapters, in folders and in the hub's cache."""

import json
import shutil
from pathlib import Path

import pytest

from lopt_hf.retention.references import ModelReference, load_tokenizer
from tests.retention.conftest import SavedModels
from tests.tiny import make_tokenizer


def put_into_hub_cache(cache: Path, name: str, folder: str, commit: str) -> Path:
    """As the hub's own client leaves `org/name` there; returns the folder of its files."""
    snapshot = cache / f"models--org--{name}" / "snapshots" / commit
    shutil.copytree(folder, snapshot)
    refs = snapshot.parents[1] / "refs"
    refs.mkdir()
    (refs / "main").write_text(commit)
    return snapshot


@pytest.mark.parametrize("has_own", [False, True])
def test_the_tokenizer_of_an_adapter_on_the_hub(
    models: SavedModels, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, has_own: bool
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    snapshot = put_into_hub_cache(tmp_path, "adapter", models.adapter, "b" * 40)
    tokenizer = make_tokenizer()
    of_base = tokenizer.chat_template
    if has_own:
        tokenizer.chat_template = "own"
        tokenizer.save_pretrained(snapshot)
    loaded = load_tokenizer(ModelReference.find("org/adapter"))
    assert loaded.chat_template == ("own" if has_own else of_base)


def test_models_on_the_hub_are_told_apart_by_their_commit(
    models: SavedModels, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A full model and an adapter, which has no config.json; taken from a hub cache made here."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    for name, folder, commit in (("base", models.base, "a" * 40), ("adapter", models.adapter, "b" * 40)):
        put_into_hub_cache(tmp_path, name, folder, commit)
    config = json.loads((Path(models.adapter) / "adapter_config.json").read_text())
    path = tmp_path / "models--org--adapter" / "snapshots" / ("b" * 40) / "adapter_config.json"
    path.write_text(json.dumps({**config, "base_model_name_or_path": "org/base"}))
    reference = ModelReference.find("org/adapter")
    assert (reference.base, reference.adapter) == ("org/base", "org/adapter")
    assert reference.fingerprint() == f"org/base@{'a' * 40}+org/adapter@{'b' * 40}"


def test_each_model_has_its_own_revision(models: SavedModels, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A base, an adapter, and the base that the adapter names, all from a hub cache with two revisions of each."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    for name, folder in (("base", models.base), ("adapter", models.adapter)):
        snapshot = put_into_hub_cache(tmp_path, name, folder, "a" * 40)
        shutil.copytree(folder, snapshot.with_name("b" * 40))
        (snapshot.parents[1] / "refs" / "v2").write_text("b" * 40)
    config = json.loads((Path(models.adapter) / "adapter_config.json").read_text())
    names = {"base_model_name_or_path": "org/base", "revision": "v2"}
    path = tmp_path / "models--org--adapter" / "snapshots" / ("a" * 40) / "adapter_config.json"
    path.write_text(json.dumps({**config, **names}))
    path = path.parents[1] / ("b" * 40) / "adapter_config.json"
    path.write_text(json.dumps({**config, **names, "revision": None}))
    found = {
        name: ModelReference.find(name).fingerprint()
        for name in ("org/base", "org/base@v2", "org/adapter", "org/adapter@v2")
    }
    a, b = "a" * 40, "b" * 40
    assert found == {
        "org/base": f"org/base@{a}",
        "org/base@v2": f"org/base@{b}",
        "org/adapter": f"org/base@{b}+org/adapter@{a}",
        "org/adapter@v2": f"org/base@{a}+org/adapter@{b}",
    }
    assert load_tokenizer(ModelReference.find("org/adapter@v2")).get_vocab() == make_tokenizer().get_vocab()
    with pytest.raises(ValueError, match="'org/base' .* not to be had from the hub|no config.json"):
        ModelReference.find("org/base@v3")


def test_a_path_may_hold_the_sign_of_revisions(models: SavedModels, tmp_path: Path) -> None:
    folder = shutil.copytree(models.base, tmp_path / "run@2")
    reference = ModelReference.find(str(folder))
    assert (reference.base, reference.revision) == (str(folder), None)


def test_an_adapters_tokenizer_is_its_own_where_it_has_one(models: SavedModels, tmp_path: Path) -> None:
    folder = shutil.copytree(models.adapter, tmp_path / "adapter")
    assert load_tokenizer(ModelReference.find(str(folder))).chat_template == make_tokenizer().chat_template
    tokenizer = make_tokenizer()
    tokenizer.chat_template = "own"
    tokenizer.save_pretrained(folder)
    assert load_tokenizer(ModelReference.find(str(folder))).chat_template == "own"


@pytest.mark.parametrize(
    ("base", "message"),
    [
        (None, "is an adapter that names no base model; give the base with --adapter-base."),
        ("/moved/base", "is an adapter that was trained on '/moved/base', which is not there"),
    ],
)
def test_an_adapter_whose_base_is_missing(models: SavedModels, tmp_path: Path, base: str | None, message: str) -> None:
    """It is named, and can be given."""
    adapter = tmp_path / "adapter"
    shutil.copytree(models.adapter, adapter)
    path = adapter / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "base_model_name_or_path": base}))
    with pytest.raises(ValueError) as error:
        ModelReference.find(str(adapter))
    assert str(error.value).startswith(f"model {str(adapter)!r} {message}") and "--adapter-base" in str(error.value)
    with pytest.raises(ValueError, match="adapter_base='/nowhere' is no model here or on the hub"):
        ModelReference.find(str(adapter), "/nowhere")
    found = ModelReference.find(str(adapter), models.base)
    assert (found.base, found.adapter) == (models.base, str(adapter))
    assert load_tokenizer(found).get_vocab() == make_tokenizer().get_vocab()
