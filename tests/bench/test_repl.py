"""`lopt-hf bench repl` refuses what it cannot measure before it works for it."""

from pathlib import Path
from typing import Any

import pytest

from lopt_hf.bench.repl import RepLBenchSettings, run_repl_bench
from tests.tiny import make_model, make_tokenizer


@pytest.mark.parametrize("threads", [0, -1])
def test_no_threads(threads: int) -> None:
    with pytest.raises(ValueError, match=f"threads={threads} is too small; set it to 1 or more"):
        RepLBenchSettings(threads=threads)


def test_more_prompts_than_there_is_text_for(tmp_path: Path, monkeypatch: Any) -> None:
    make_model().save_pretrained(tmp_path)
    make_tokenizer().save_pretrained(tmp_path)
    monkeypatch.setattr("lopt_hf.repl.experiment.make_variant", lambda *args: pytest.fail("it has calibrated"))
    settings = RepLBenchSettings(model=str(tmp_path), batch_size=50000, prompt_tokens=100, dtype="float32")
    message = (
        "batch_size=50000 prompts of prompt_tokens=100 are 5000000 tokens, and the text has .*; lower one of them"
    )
    with pytest.raises(ValueError, match=message):
        run_repl_bench(settings)
