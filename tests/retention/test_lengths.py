"""More tokens than a model can read are refused where it looks positions up, and told where it computes them."""

from pathlib import Path

import pytest

from lopt_hf.retention.evaluation import EvaluationSettings, load_language_model
from lopt_hf.retention.lengths import check_max_length
from lopt_hf.retention.references import ModelReference
from tests.retention.conftest import save
from tests.tiny import make_model


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_more_than_a_model_can_read(tmp_path: Path, caplog: pytest.LogCaptureFixture, family: str) -> None:
    model = make_model(family)
    limit = model.config.max_position_embeddings
    reference = ModelReference.find(save(model, tmp_path / "model"))
    for length in (None, 1, limit):
        check_max_length(reference, length)
    assert not caplog.records
    if family == "gpt2":
        message = (
            f"max_length={limit + 1} is more than the {limit} positions of model '{tmp_path / 'model'}'; set it to"
        )
        with pytest.raises(ValueError, match=message):
            check_max_length(reference, limit + 1)
        with pytest.raises(ValueError, match=message):
            load_language_model(reference, EvaluationSettings(max_length=limit + 1))
    else:
        check_max_length(reference, limit + 1)
        load_language_model(reference, EvaluationSettings(max_length=limit + 1))
        (line,) = [record.getMessage() for record in caplog.records if "max_length" in record.getMessage()]
        assert line.startswith(f"max_length={limit + 1} is more than the {limit} positions that model ")
