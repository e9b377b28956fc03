"""`refit_behind`: layers behind a span, fitted to what they put out before it went."""

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from lopt_hf import RepLConfig, get_repl_model
from lopt_hf.repl.calibration_data import make_batches
from lopt_hf.repl.modeling_repl import find_layers
from lopt_hf.repl.surgery import remove_layers
from tests.repl.helpers import batches, make_repl, make_stock

RIDGE = 0.1
DOWN = {"llama": "mlp.down_proj", "gpt2": "mlp.c_proj"}


def run(model, layer, module=None):
    """What a layer puts out over all data, and what a module in it is given, a row for each token."""
    outputs, inputs = [], []
    hooks = [layer.register_forward_hook(lambda m, a, o: outputs.append(o if torch.is_tensor(o) else o[0]))]
    if module is not None:
        hooks.append(module.register_forward_pre_hook(lambda m, a: inputs.append(a[0])))
    with torch.no_grad():
        for batch in batches():
            model(**batch)
    for hook in hooks:
        hook.remove()
    return [torch.cat([each.flatten(0, 1) for each in seen]).double() for seen in (outputs, inputs) if seen]


def ridge_by_rows(x_NK, y_ND, has_bias):
    """Ridge regression as plain least squares with one more row for each penalised coefficient."""
    x_NF = torch.cat([x_NK, torch.ones_like(x_NK[:, :1])], 1) if has_bias else x_NK
    penalty = (RIDGE * x_NF.square().sum(0).mean()).sqrt() * torch.eye(x_NF.shape[1], dtype=x_NF.dtype)
    return torch.linalg.lstsq(torch.cat([x_NF, penalty]), nn.functional.pad(y_ND, (0, 0, 0, len(penalty)))).solution


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_each_layer_is_fitted_behind_the_one_before_it(family):
    full, pruned = make_stock(family), make_stock(family)
    remove_layers(pruned, [2])
    for place in (1, 2, 3):  # the layer before the span, then two behind it
        layer = find_layers(pruned)[place]
        module = layer.get_submodule(DOWN[family])
        (target_ND,) = run(full, find_layers(full)[place + 1])
        output_ND, x_NK = run(pruned, layer, module)
        fitted_FD = ridge_by_rows(x_NK, target_ND - output_ND, module.bias is not None).float()
        if module.bias is not None:
            module.bias.data += fitted_FD[-1]
            fitted_FD = fitted_FD[:-1]
        module.weight.data += fitted_FD if isinstance(module, Conv1D) else fitted_FD.T
    model = make_repl(
        make_stock(family), operator="refit", layers_to_replace=[2], refit_behind=2, ridge=RIDGE
    ).merge_and_unload()
    assert type(model) is type(full)
    for name, expected in pruned.state_dict().items():
        torch.testing.assert_close(model.state_dict()[name], expected, rtol=1e-3, atol=1e-4, msg=name)


def test_it_ends_before_the_next_span_and_with_the_model():
    """Layer 3 holds the surrogate of layer 4's, so of the three layers asked for there are 2, and 5, the last."""
    plain = make_repl(operator="down_proj", layers_to_replace=[1, 4])
    model = make_repl(operator="down_proj", layers_to_replace=[1, 4], refit_behind=3)
    weights = dict(model.named_parameters())
    changed = {name for name, other in plain.named_parameters() if not torch.equal(other, weights[name])}
    kept = {f"model.layers.{place}.mlp.down_proj.weight" for place in (1, 3)}  # layers 2 and 5, renumbered
    assert kept <= changed and changed - kept == {"model.layers.2.surrogate.coefficients"}


def test_errors_behind_the_span_are_smaller():
    full = make_stock()
    (target,) = run(full, full.model.layers[5])
    errors = []
    for behind in (0, 2):
        model = make_repl(operator="refit", spans=[[2, 4]], layers_to_replace=None, refit_behind=behind)
        errors.append((run(model, model.model.layers[3])[0] - target).norm())
    assert errors[1] < 0.9 * errors[0]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"operator": "scale"}, "refit_behind=1 goes on from a calibrated operator in an MLP, but operator='scale'"),
        ({"operator": "refit", "init": "skip"}, "with init='skip' is none; set it to 0"),
        ({"operator": "refit", "refit_behind": -1}, "refit_behind=-1"),
    ],
)
def test_settings_that_cannot_work(settings, message):
    with pytest.raises(ValueError, match=message):
        RepLConfig(**{"spans": [[1, 2]], "refit_behind": 1, **settings})


def test_experts_cannot_be_refitted():
    model = make_stock("mixtral", num_local_experts=4, num_experts_per_tok=2)
    with pytest.raises(ValueError, match="refit_behind=1 fits one MLP's last projection, but in layer 0"):
        get_repl_model(model, RepLConfig(operator="down_proj", spans=[[1, 2]], refit_behind=1), batches())


def test_calibration_sequences_drawn_by_seed():
    rows = [{"input_ids": list(range(3 + 8 * row, 11 + 8 * row))} for row in range(8)]
    chosen = {"operator": "scale", "spans": [[1, 2]], "calibration_tokens": 24, "calibration_seq_length": 8}
    drawn = {}
    for seed in (None, 0, 1, 0):
        (batch,) = make_batches(rows, None, RepLConfig(**chosen, calibration_seed=seed))
        drawn.setdefault(seed, []).append(batch["input_ids"].tolist())
    assert drawn[None] == [[row["input_ids"] for row in rows[:3]]]
    assert drawn[0][0] == drawn[0][1] != drawn[1][0]
    assert all(row in [each["input_ids"] for each in rows] for row in drawn[0][0]) and len(drawn[0][0]) == 3


@pytest.mark.parametrize("seed", [None, 0])
def test_no_more_tokens_than_asked_for(seed):
    config = RepLConfig("scale", spans=[[1, 2]], calibration_tokens=4, calibration_seq_length=8, calibration_seed=seed)
    with pytest.raises(ValueError, match="gives .* calibration_tokens=4, less than one sequence"):
        make_batches([{"input_ids": list(range(64))}], None, config)


def test_a_seed_that_draws_nothing():
    with pytest.raises(ValueError, match="calibration_seed=3 draws sequences from text, but calibration_data are"):
        make_batches(batches(), None, RepLConfig("scale", spans=[[1, 2]], calibration_seed=3))
