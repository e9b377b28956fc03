"""Which layers go."""

from itertools import combinations

import pytest
import torch

from lopt_hf.repl.calibration import block_influence
from lopt_hf.repl.placement import (
    candidate_spans,
    check_layers,
    check_spans,
    every_kth,
    least_influence,
    least_influence_spans,
)
from tests.repl.helpers import batches, make_stock


def test_every_kth_counts_from_one_and_keeps_the_last():
    assert every_kth(30, 8) == [7, 15, 23]
    assert every_kth(30, 4) == [3, 7, 11, 15, 19, 23, 27]
    assert every_kth(12, 4) == [3, 7]
    with pytest.raises(ValueError, match="every=6 chooses none of 6 layers"):
        every_kth(6, 6)


def test_least_influence_is_the_best_of_all_choices():
    influence = torch.rand(9, generator=torch.Generator().manual_seed(0)).tolist()
    for count in range(1, 5):
        apart = [c for c in combinations(range(1, 8), count) if all(b - a > 1 for a, b in zip(c, c[1:], strict=False))]
        best = min(apart, key=lambda chosen: sum(influence[layer] for layer in chosen))
        assert tuple(least_influence(influence, count)) == best
    with pytest.raises(ValueError, match="num_layers_to_replace=5 .* from 1 to 4"):
        least_influence(influence, 5)


@pytest.mark.parametrize("layers", [[0], [5], [-1], [6], []])
def test_first_last_and_missing_layers_are_refused(layers):
    with pytest.raises(ValueError, match="must name layers from 1 to 4"):
        check_layers(layers, 6)


@pytest.mark.parametrize("layers", [[2, 3], [3, 2], [2, 2]])
def test_adjacent_layers_are_refused(layers):
    with pytest.raises(ValueError, match="not apart"):
        check_layers(layers, 6)


def test_block_influence_of_hidden_states():
    model, data = make_stock(), batches(2)
    states = []
    handles = [layer.register_forward_hook(lambda m, a, o: states.append((a[0], o))) for layer in model.model.layers]
    with torch.no_grad():
        for batch in data:
            model(**batch)
    for handle in handles:
        handle.remove()
    influence = torch.stack([1 - torch.cosine_similarity(a, b, dim=-1).mean() for a, b in states])
    torch.testing.assert_close(torch.tensor(block_influence(model, data)), influence.view(2, 6).mean(0))


def test_padding_has_no_influence():
    model = make_stock()
    ids = torch.randint(3, 80, (2, 8))
    mask = torch.ones_like(ids)
    mask[:, 5:] = 0
    padded = block_influence(model, [{"input_ids": ids, "attention_mask": mask}])
    assert padded == pytest.approx(block_influence(model, [{"input_ids": ids[:, :5]}]), rel=1e-4)


def test_how_many_layers_of_two_types_fit_is_up_to_the_data():
    kinds = ["full", "full", "sliding", "full", "full"]  # the middle one taken first leaves out both beside it
    assert least_influence_spans([0, 1, 2, 1, 0], 2, kinds) == [(1, 2), (3, 4)]
    with pytest.raises(ValueError, match="from 1 to 1. How many fit depends on the order of their influence"):
        least_influence_spans([0, 2, 1, 2, 0], 2, kinds)


def test_none_of_a_count_below_one_but_as_many_as_fit():
    with pytest.raises(ValueError, match="num_layers_to_replace=0 does not fit .* choose a number from 1 to 4"):
        least_influence_spans([0.0] * 6, 0, [""] * 6)


@pytest.mark.parametrize("count", [1, 2])
def test_models_that_are_too_small_are_told_so(count):
    message = f"num_hidden_layers={count}: the first and the last layer are kept, .* use a model with 3 or more"
    kinds, influence = [""] * count, [0.0] * count
    choices = [
        lambda: every_kth(count, 2),
        lambda: least_influence(influence, 1),
        lambda: least_influence_spans(influence, 1, kinds),
        lambda: candidate_spans(1, kinds),
        lambda: check_layers([1], count),
        lambda: check_spans([[1, 2]], kinds),
    ]
    for choose in choices:
        with pytest.raises(ValueError, match=message):
            choose()
