"""The closed-form fit: against a least-squares solution written by others, and what it does for the local loss."""

import numpy as np
import torch

from lopt_hf.local.methods.mlaan.calibration import _tokens
from lopt_hf.local.methods.mlaan.translator import RELATIVE_RIDGE, Translator, TranslatorFit
from tests.local.methods.mlaan.helpers import make_mlaan_trainer
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
    calibration = trainer.learner.method.setup.make_calibration()
    calibration.fitted = calibration.measured
    losses = {}
    for first in range(2, 7):
        auxiliary = trainer.learner.method.setup.make_auxiliary(2, [first, 7])
        calibration.fit([auxiliary])
        losses[first, 7] = calibration.losses({2: auxiliary})[1][2]
    assert chosen == min(losses, key=losses.get)


def test_padding_does_not_count_and_each_sequence_has_a_first_token():
    h_BTD = torch.zeros(2, 4, 1)
    mask_BT = torch.tensor([[0, 1, 1, 1], [1, 1, 1, 0]])
    kept_BT, is_first_BT = _tokens({"attention_mask": mask_BT}, h_BTD)
    assert kept_BT.int().tolist() == mask_BT.tolist()
    assert is_first_BT.int().tolist() == [[0, 1, 0, 0], [1, 0, 0, 0]]
    kept_BT, is_first_BT = _tokens({"position_ids": torch.tensor([[0, 1, 0, 1], [0, 1, 2, 0]])}, h_BTD)  # packed
    assert kept_BT.all() and is_first_BT.int().tolist() == [[1, 0, 1, 0], [1, 0, 0, 1]]


def test_the_start_is_measured_on_batches_that_nothing_was_fitted_to(tmp_path):
    trainer = make_mlaan_trainer(tmp_path)
    calibration = trainer.learner.method.setup.make_calibration()
    assert calibration.fitted and calibration.measured
    assert not any(fitted is measured for fitted in calibration.fitted for measured in calibration.measured)


def test_calibration_leaves_the_random_state_and_the_models_mode(tmp_path):
    model = make_model().train()
    torch.manual_seed(5)
    expected = torch.rand(3)
    trainer = make_mlaan_trainer(tmp_path, model)
    torch.manual_seed(5)
    batches = list(trainer._calibration_batches())
    trainer.learner.method.setup.make_calibration().losses({})
    assert torch.equal(torch.rand(3), expected) and model.training and batches
