"""Similarity of hidden states, against the definition by kernels and on models whose change is known."""

import copy
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.stats import ortho_group

from lopt_hf.retention.references import ModelReference
from lopt_hf.retention.representations import LayerSimilarity, hidden_states, linear_cka, with_similarity
from lopt_hf.retention.results import ModelResult, RetentionReport
from tests.tiny import make_model, make_tokenizer

RNG = np.random.default_rng(0)
X = RNG.normal(size=(60, 8))
Y = np.column_stack([X[:, :3], RNG.normal(size=(60, 4))])


def hsic_cka(x: np.ndarray, y: np.ndarray) -> float:
    """By the normalised HSIC of centred Gram matrices, tokens against tokens (Kornblith et al., Eqs. 2 and 3)."""
    centering = np.eye(len(x)) - 1 / len(x)
    grams = [centering @ (h @ h.T) @ centering for h in (x, y)]
    hsic = [[np.trace(one @ other) for one in grams] for other in grams]
    return hsic[0][1] / np.sqrt(hsic[0][0] * hsic[1][1])


def cka(x: np.ndarray, y: np.ndarray) -> float:
    return linear_cka(torch.tensor(x), torch.tensor(y))


@pytest.mark.parametrize("y", [Y, Y + 5, X**2, RNG.normal(size=(60, 100))], ids=["part", "shifted", "other", "wide"])
def test_it_is_the_alignment_of_centred_kernels(y: np.ndarray) -> None:
    assert cka(X, y) == pytest.approx(hsic_cka(X, y), abs=1e-12)


def test_rotation_scale_and_shift_change_nothing() -> None:
    assert cka(X, 3 * X @ ortho_group.rvs(8, random_state=0) - 2) == pytest.approx(1, abs=1e-12)
    assert cka(X, X.copy()) == 1.0
    assert cka(X, Y) < 0.9
    assert np.isnan(cka(X, np.ones((60, 2))))


def test_layers_before_a_change_are_alike_and_those_after_are_not() -> None:
    """The states are the model's own, without the first token."""
    model = make_model().eval()
    ids_BT = torch.arange(3, 33).view(5, 6) % 30
    before = hidden_states(model, ids_BT)
    expected = model(input_ids=ids_BT, output_hidden_states=True).hidden_states
    assert list(before) == ["embeddings", "0", "1", "2", "3"]
    for h_ND, h_BTD in zip(list(before.values())[:4], expected, strict=False):  # the last one is behind a norm
        torch.testing.assert_close(h_ND, h_BTD[:, 1:].flatten(0, 1))
    changed = copy.deepcopy(model)
    with torch.no_grad():
        changed.model.layers[1].mlp.down_proj.weight.add_(0.3)
    found = {name: linear_cka(before[name], h_ND) for name, h_ND in hidden_states(changed, ids_BT).items()}
    assert found["embeddings"] == found["0"] == 1.0
    assert all(found[name] < 0.999 for name in ("1", "2", "3"))


def test_a_report_has_the_mean_over_seeds(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Measured once; a model of another depth is left out with the reason."""
    tokenizer = make_tokenizer()
    for name, model in {
        "base": make_model(),
        "same": make_model(),
        "other": make_model(seed=1),
        "short": make_model(num_hidden_layers=2),
    }.items():
        model.save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
    base, same, other, short = (ModelReference.find(str(tmp_path / n)) for n in ("base", "same", "other", "short"))
    report = RetentionReport("base", tuple(ModelResult(label, label, ()) for label in ("both", "short")), {})
    measure = LayerSimilarity(base, "float32", tmp_path / "scores")
    found = with_similarity(report, {"both": [same, other], "short": [short]}, measure)
    apart = measure(other)
    assert measure(same) == dict.fromkeys(apart, 1.0)
    assert found.models[0].similarity == {name: (1 + value) / 2 for name, value in apart.items()}
    assert 0 <= min(apart.values()) and max(apart.values()) < 0.99
    assert found.models[1].similarity == {} and "the baseline has 4 layers and the model 2" in caplog.text
    assert len(list((tmp_path / "scores").glob("similarity-*.json"))) == 2
    for path in (tmp_path / "scores").glob("similarity-*.json"):
        path.write_text(path.read_text()[:9])
    assert measure(other) == apart and "is damaged (" in caplog.text
    assert json.loads(found.to_json())["models"][0]["similarity"]["0"] == found.models[0].similarity["0"]
