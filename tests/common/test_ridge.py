"""Streaming sums against `torch.linalg.lstsq` on all tokens at once."""

import pytest
import torch

from lopt_hf.common.ridge import ChannelRidge, LinearRidge, SharedRidge

K, N, D = 3, 50, 4
FEATURES = torch.randn(K, N, D, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
TARGET = torch.randn(N, D, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def lstsq(a, b, ridge):
    """The ridge regression as ordinary least squares with extra rows."""
    penalty = (ridge * a.pow(2).sum(0).mean()).sqrt()
    rows = torch.cat([a, penalty * torch.eye(a.shape[1], dtype=a.dtype)])
    return torch.linalg.lstsq(rows, torch.cat([b, b.new_zeros(a.shape[1], *b.shape[1:])])).solution


def add_in_pieces(sums, features, target):
    for start in range(0, N, 16):
        sums.add(features[..., start : start + 16, :], target[start : start + 16])


@pytest.mark.parametrize("ridge", [0.0, 0.3])
def test_shared(ridge):
    sums = SharedRidge(K, ridge)
    add_in_pieces(sums, FEATURES, TARGET)
    expected = lstsq(FEATURES.flatten(1).T, TARGET.flatten()[:, None], ridge)[:, 0]
    torch.testing.assert_close(sums.solve(), expected)


@pytest.mark.parametrize("ridge", [0.0, 0.3])
def test_channel(ridge):
    sums = ChannelRidge(K, D, ridge)
    add_in_pieces(sums, FEATURES, TARGET)
    expected = [lstsq(FEATURES[:, :, d].T, TARGET[:, d : d + 1], ridge)[:, 0] for d in range(D)]
    torch.testing.assert_close(sums.solve(), torch.stack(expected, dim=1))


@pytest.mark.parametrize("ridge", [0.0, 0.3])
def test_linear_is_drawn_towards_its_prior(ridge):
    sums = LinearRidge(D, ridge)
    prior = torch.randn(D + 1, D, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    add_in_pieces(sums, FEATURES[0], TARGET)
    x = torch.cat([FEATURES[0], torch.ones(N, 1, dtype=torch.float64)], 1)
    torch.testing.assert_close(sums.solve(prior), prior + lstsq(x, TARGET - x @ prior, ridge))


def test_a_strong_penalty_gives_the_prior():
    sums = LinearRidge(D, 1e9)
    add_in_pieces(sums, FEATURES[0], TARGET)
    prior = torch.ones(D + 1, D, dtype=torch.float64)
    torch.testing.assert_close(sums.solve(prior), prior, rtol=1e-6, atol=1e-6)


def test_a_dead_feature_gets_no_coefficient():
    features = FEATURES.clone()
    features[1] = 0
    sums = SharedRidge(K, 0.0)
    add_in_pieces(sums, features, TARGET)
    assert sums.solve()[1] == 0 and sums.solve().isfinite().all()
