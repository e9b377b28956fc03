"""Every operator against its formula, written out with the weights of two layers."""

import pytest
import torch
from torch.nn.functional import gelu, layer_norm, linear, silu

from lopt_hf import RepLConfig
from lopt_hf.repl.modeling_repl import find_layers
from lopt_hf.repl.neighbours import Neighbour
from lopt_hf.repl.operator_base import cost_of, layer_cost
from lopt_hf.repl.operators import Branches, make_operator
from tests.repl.helpers import FAMILIES, make_stock

D, H = 32, 4
X = torch.randn(2, 5, D, generator=torch.Generator().manual_seed(0))


def beside(model, family, **kwargs):
    layers = find_layers(model)
    return tuple(Neighbour(layers[i], model.config, family, **kwargs) for i in (1, 3)), layers[1], layers[3]


def config(operator, **settings):
    return RepLConfig(operator=operator, layers_to_replace=[2], init="paper", **settings)


def make(operator, neighbours, **settings):
    made = make_operator(config(operator, **settings), *neighbours)
    torch.manual_seed(0)
    for parameter in made.parameters():
        torch.nn.init.normal_(parameter)
    return made


def unit_rows(weight):
    return weight / weight.norm(dim=1, keepdim=True)


def test_proj_without_biases():
    neighbours, a, b = beside(make_stock(), "llama")
    operator = make("proj", neighbours)
    alpha, beta = operator.coefficients.flatten()
    expected = X + X @ (alpha * a.self_attn.o_proj.weight + beta * b.self_attn.o_proj.weight).T
    torch.testing.assert_close(operator(X, *neighbours), expected)


def test_proj_with_biases_and_transposed_weights():
    neighbours, a, b = beside(make_stock("gpt2"), "gpt2")
    operator = make("proj", neighbours)
    alpha, beta = operator.coefficients.flatten()
    weight = alpha * a.attn.c_proj.weight + beta * b.attn.c_proj.weight
    expected = X + X @ weight + alpha * a.attn.c_proj.bias + beta * b.attn.c_proj.bias
    torch.testing.assert_close(operator(X, *neighbours), expected)


def head_branch(x, a_norm, weights, coefficients, bias=0.0):
    columns = [c.repeat_interleave(D // H) for c in coefficients]
    weight = sum(unit_rows(w) * c for w, c in zip(weights, columns, strict=True))
    return D**-0.5 * a_norm(x) @ weight.T + bias


def test_head():
    neighbours, a, b = beside(make_stock(), "llama")
    operator = make("head", neighbours)
    weights = [layer.self_attn.o_proj.weight for layer in (a, b)]
    expected = X + head_branch(X, a.input_layernorm, weights, operator.coefficients)
    torch.testing.assert_close(operator(X, *neighbours), expected)


def test_head_with_layer_norm_and_bias():
    neighbours, a, b = beside(make_stock("opt"), "opt")
    operator = make("head", neighbours)
    weights = [layer.self_attn.out_proj.weight for layer in (a, b)]
    bias = (a.self_attn.out_proj.bias + b.self_attn.out_proj.bias) / 2
    expected = X + head_branch(X, a.self_attn_layer_norm, weights, operator.coefficients, bias)
    torch.testing.assert_close(operator(X, *neighbours), expected)


def mean_mlp(x, a, b):
    gate, up, down = (
        (getattr(a.mlp, n).weight + getattr(b.mlp, n).weight) / 2 for n in ("gate_proj", "up_proj", "down_proj")
    )
    x = a.post_attention_layernorm(x)
    return linear(silu(linear(x, gate)) * linear(x, up), down)


def test_gated_mlp():
    neighbours, a, b = beside(make_stock(), "llama")
    torch.testing.assert_close(make("mlp", neighbours)(X, *neighbours), X + mean_mlp(X, a, b))


def test_plain_mlp_with_biases():
    neighbours, a, b = beside(make_stock("gpt_neox"), "gpt_neox")
    mean = {n: (p + dict(b.mlp.named_parameters())[n]) / 2 for n, p in a.mlp.named_parameters()}
    norm = a.post_attention_layernorm
    x = layer_norm(X, (D,), norm.weight, norm.bias, norm.eps)
    inner = gelu(linear(x, mean["dense_h_to_4h.weight"], mean["dense_h_to_4h.bias"]))
    expected = X + linear(inner, mean["dense_4h_to_h.weight"], mean["dense_4h_to_h.bias"])
    torch.testing.assert_close(make("mlp", neighbours)(X, *neighbours), expected)


def test_gemma2_mlp_has_its_norms():
    """Gemma 2 scales its norms by 1 + weight, and has one after the MLP."""
    neighbours, a, _ = beside(make_stock("gemma2"), "gemma2")
    same = (neighbours[0], neighbours[0])
    expected = X + a.post_feedforward_layernorm(a.mlp(a.pre_feedforward_layernorm(X)))
    torch.testing.assert_close(make("mlp", same)(X, *same), expected)


def test_head_mlp_is_sequential():
    neighbours, a, b = beside(make_stock(), "llama")
    operator = make("head+mlp", neighbours)
    weights = [layer.self_attn.o_proj.weight for layer in (a, b)]
    middle = X + head_branch(X, a.input_layernorm, weights, operator.coefficients)
    torch.testing.assert_close(operator(X, *neighbours), middle + mean_mlp(middle, a, b))


@pytest.mark.parametrize("family", FAMILIES)
def test_value_path_is_the_attention_of_a_lone_token(family):
    """A token that can attend to itself only gets its own value, whatever the queries, keys and positions."""
    model = make_stock(family)
    layers, seen = find_layers(model), {}
    layer = layers[1]
    attention = layer.get_submodule(
        "attn" if family == "gpt2" else "attention" if family == "gpt_neox" else "self_attn"
    )
    layer.register_forward_pre_hook(lambda m, a, k: seen.update(h=a[0] if a else k["hidden_states"]), with_kwargs=True)
    attention.register_forward_hook(lambda m, a, o: seen.update(out=o[0]))
    with torch.no_grad():
        model(torch.tensor([[5]]))
        neighbour = Neighbour(layer, model.config, family)
        operator = Branches(neighbour, neighbour, ["value"], "scalar")
        operator.coefficients.data = torch.tensor([[1.0], [0.0]])
        added = operator(seen["h"], neighbour, neighbour) - seen["h"]
    torch.testing.assert_close(added, seen["out"], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("granularity", ["channel", "scalar"])
def test_branches(granularity):
    neighbours, a, b = beside(make_stock(), "llama")
    names = ["identity", "value", "output", "mlp"]
    operator = make("branches", neighbours, branches=names, coefficients=granularity)

    def value(layer):
        heads = layer.self_attn.v_proj(layer.input_layernorm(X)).unflatten(-1, (2, 8)).repeat_interleave(2, dim=-2)
        return layer.self_attn.o_proj(heads.flatten(-2))

    outputs = [X, value(a), value(b)]
    outputs += [layer.self_attn.o_proj(layer.input_layernorm(X)) for layer in (a, b)] + [mean_mlp(X, a, b)]
    expected = X + sum(c * output for c, output in zip(operator.coefficients, outputs, strict=True))
    torch.testing.assert_close(operator(X, *neighbours), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("proj", {}),
        ("head", {}),
        ("branches", {"branches": ["identity", "value", "mlp"]}),
        ("branches", {"branches": ["value"], "coefficients": "head"}),
        ("branches", {"branches": ["output"], "coefficients": "head"}),
    ],
)
def test_branch_outputs_add_up_to_the_operator(family, name, settings):
    """What the calibration regresses on is what the operator computes."""
    overrides = {"head_dim": 8} if family == "qwen3" else {}
    neighbours, _, _ = beside(make_stock(family, **overrides), family)
    operator = make(name, neighbours, **settings)
    x = X.flatten(0, 1)
    with torch.no_grad():
        outputs = operator.branch_outputs(x, *neighbours)
        c = operator.coefficients if operator.per_channel else operator.coefficients.reshape(-1, 1)
        expected = x + (outputs * c[:, None]).sum(0) + operator.offset(x, *neighbours)
        torch.testing.assert_close(operator(x, *neighbours), expected, rtol=1e-4, atol=1e-4)


def test_sources_are_constants_unless_asked_for():
    for detach in (True, False):
        model = make_stock()
        neighbours, a, b = beside(model, "llama", detach=detach)
        operator = make("branches", neighbours)
        operator(X, *neighbours).sum().backward()
        assert operator.coefficients.grad is not None
        assert all((layer.self_attn.v_proj.weight.grad is None) == detach for layer in (a, b))


def test_costs():
    model = make_stock(hidden_size=64, intermediate_size=160)
    neighbours, a, _ = beside(model, "llama")
    d, inner, heads = 64, 160, 32
    layer = 2 * d * d + 2 * d * heads + 3 * d * inner
    assert layer_cost(a) == (layer + 2 * d, layer)
    linear_cost = cost_of(2, make("linear", neighbours), layer_cost(a))
    assert (linear_cost.parameters, linear_cost.multiply_adds) == (d * d + d, d * d)
    assert linear_cost.coefficients == d * d + d
    branches = cost_of(2, make("branches", neighbours), layer_cost(a))
    assert (branches.parameters, branches.multiply_adds, branches.coefficients) == (d * d + d, d * d, 3 * d)
    both = cost_of(2, make("head+mlp", neighbours), layer_cost(a))
    assert both.multiply_adds == d * d + 3 * d * inner
    assert linear_cost.ratio <= 0.35 and branches.ratio <= 0.35


def test_neighbours_of_other_shapes_are_refused():
    model = make_stock()
    other = make_stock(intermediate_size=64)
    neighbours = (
        Neighbour(find_layers(model)[1], model.config, "llama"),
        Neighbour(find_layers(other)[3], other.config, "llama"),
    )
    with pytest.raises(ValueError, match=r"differ in shape \(mlp\.gate_proj\.weight\)"):
        make_operator(config("linear"), *neighbours)
