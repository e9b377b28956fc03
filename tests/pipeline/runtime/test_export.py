"""An export is there as a whole, or not at all."""

import shutil
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM

from lopt_hf.pipeline.runtime import export
from tests.tiny import make_tokenizer

FIXTURE = Path(__file__).parents[2] / "fixtures/resume_before_local_learner"
CHECKPOINT = FIXTURE / "pipeline/checkpoint-3"


@pytest.mark.parametrize("fails_in", ["AutoTokenizer.from_pretrained", "assemble_model"])
def test_one_that_fails_leaves_nothing_that_is_in_the_way_of_the_next(tmp_path, monkeypatch, fails_in):
    shutil.copytree(FIXTURE / "start/model", tmp_path / "start")
    make_tokenizer().save_pretrained(tmp_path / "start")
    loaded = []
    load_stage = export.load_stage
    monkeypatch.setattr(
        export, "load_stage", lambda *args, **kwargs: loaded.append(args) or load_stage(*args, **kwargs)
    )

    def fail(*args, **kwargs):
        raise OSError("no room")

    with monkeypatch.context() as broken:
        owner, _, name = f"lopt_hf.pipeline.runtime.export.{fails_in}".rpartition(".")
        broken.setattr(f"{owner}.{name}", fail)
        with pytest.raises(OSError, match="no room"):
            export.export_checkpoint(CHECKPOINT, tmp_path / "to/model", str(tmp_path / "start"))
    assert not list((tmp_path / "to").iterdir())
    assert bool(loaded) == (fails_in == "assemble_model"), "the tokenizer comes before the work"
    export.export_checkpoint(CHECKPOINT, tmp_path / "to/model", str(tmp_path / "start"))
    AutoModelForCausalLM.from_pretrained(tmp_path / "to/model")
    assert [path.name for path in (tmp_path / "to").iterdir()] == ["model"]
    assert not list((tmp_path / "to/model").glob("incomplete-*"))
