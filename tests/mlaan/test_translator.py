"""The closed-form fit: against a least-squares solution written by others, and what it does for the local loss."""

import numpy as np
import torch

from lopt_hf.mlaan.translator import RELATIVE_RIDGE, Translator, TranslatorFit
from tests.mlaan.helpers import make_mlaan_trainer
from tests.tiny import make_model


def test_fit_is_the_ridge_regression(tmp_path):
    generator = torch.Generator().manual_seed(0)
    x_ND, y_ND = (torch.randn(60, 5, generator=generator) for _ in range(2))
    is_first_N = torch.arange(60) % 20 == 0
    x_ND[is_first_N] *= 100  # an attention sink
    fit = TranslatorFit(5, torch.device("cpu"))
    for rows in torch.arange(60).split(17):
        fit.add(x_ND[rows], y_ND[rows], is_first_N[rows])
    translator = Translator(5)
    fit.solve(translator)
    features = np.concatenate([x_ND, np.ones((60, 1))], axis=1).astype(np.float64)
    penalty = RELATIVE_RIDGE * np.square(features[~is_first_N.numpy()]).sum(0).mean()
    rows = np.concatenate([features, np.sqrt(penalty) * np.eye(6)])
    drawn_to = np.sqrt(penalty) * np.eye(6, 5)
    expected = np.linalg.lstsq(rows, np.concatenate([y_ND, drawn_to]), rcond=None)[0]
    found = torch.cat([translator.weight.T, translator.bias[None]]).detach()
    torch.testing.assert_close(found, torch.from_numpy(expected).float(), rtol=1e-4, atol=1e-5)


def test_a_translator_starts_as_the_identity():
    h_BTD = torch.randn(2, 3, 8)
    torch.testing.assert_close(Translator(8)(h_BTD), h_BTD)


def test_a_translator_before_each_gap_and_only_there(tmp_path):
    settings = {"num_blocks": 2, "window": 1, "split_at": [2]}
    trainer = make_mlaan_trainer(tmp_path, make_model(num_hidden_layers=8), leap_layers=[[2, 5, 6, 7]], **settings)
    assert set(trainer.local_heads["0"].translators) == {"5"}


def test_translators_lower_the_local_loss_at_the_start(tmp_path):
    """Layers that turn the hidden states by a fixed map: leaving them out ruins the loss, a translator replaces it."""
    losses = {}
    for translator in ("none", "calibrated"):
        settings = {"num_blocks": 2, "split_at": [1], "window": 1, "leap_layers": [1], "calibration_tokens": 1000}
        trainer = make_mlaan_trainer(tmp_path, make_model(seed=3), translator=translator, **settings)
        model = trainer.start_losses["model"]
        losses[translator] = abs(trainer.start_losses["block_0"] - model)
    assert losses["calibrated"] < losses["none"]


def test_calibrate_chooses_the_layers_with_the_lowest_loss(tmp_path):
    """Of two layers, one of them the last, all choices are tried."""
    settings = {"num_blocks": 2, "window": 1, "split_at": [2], "leap_layers": [2], "calibration_tokens": 1}
    model = make_model(num_hidden_layers=8, seed=1)
    chosen = make_mlaan_trainer(tmp_path, model, leap="calibrate", **settings).local_heads["0"].leaps
    trainer = make_mlaan_trainer(tmp_path, model, leap="last", **settings)
    calibration = trainer._make_calibration(trainer.model)
    calibration.fitted = calibration.measured
    losses = {}
    for first in range(2, 7):
        auxiliary = trainer._make_auxiliary(trainer.model, 2, [first, 7])
        calibration.fit([auxiliary])
        losses[first, 7] = calibration.losses({2: auxiliary})[1][2]
    assert chosen == min(losses, key=losses.get)


def test_calibration_leaves_the_random_state_and_the_models_mode(tmp_path):
    model = make_model().train()
    torch.manual_seed(5)
    expected = torch.rand(3)
    trainer = make_mlaan_trainer(tmp_path, model)
    torch.manual_seed(5)
    batches = list(trainer._calibration_batches())
    trainer._make_calibration(trainer.model).losses({})
    assert torch.equal(torch.rand(3), expected) and model.training and batches
