"""`conv`: residual blocks of a ResNet replaced by convolutions made from their neighbours.

B images, C channels, H height, W width, kernels (O, I, 3, 3).
"""

import copy

import pytest
import torch
from torch.nn import functional as F
from transformers import AutoModelForImageClassification, ResNetConfig, ResNetForImageClassification

from lopt_hf import RepLConfig, RepLModel, get_repl_model
from lopt_hf.repl.surgery import remove_layers
from tests.repl.helpers import logits, make_stock, make_vit

# Three stages of 3, 4 and 3 blocks: 0-2, 3-6, 7-9; the stem makes as many channels as the first stage
SIZES = {"embedding_size": 4, "hidden_sizes": [4, 6, 8], "depths": [3, 4, 3], "num_labels": 5}
CONV = {"operator": "conv", "init": "paper"}
IMAGES = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def make_resnet(**changes):
    """A ResNet whose batch norms are not the trivial ones."""
    torch.manual_seed(0)
    model = ResNetForImageClassification(ResNetConfig(**{"layer_type": "basic", **SIZES, **changes})).eval()
    generator = torch.Generator().manual_seed(1)
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            for tensor in (module.weight.data, module.bias.data, module.running_mean, module.running_var):
                tensor.copy_(torch.rand(tensor.shape, generator=generator) + 0.5)
    return model


def make_repl(model=None, **settings):
    """With coefficients that differ for each channel."""
    made = get_repl_model(model or make_resnet(), RepLConfig(**{**CONV, "layers_to_replace": [1, 4, 8], **settings}))
    generator = torch.Generator().manual_seed(2)
    for operator in made.surrogates.values():
        operator.coefficients.data.copy_(torch.randn(operator.coefficients.shape, generator=generator))
    return made


def blocks_of(model):
    return [block for stage in model.resnet.encoder.stages for block in stage.layers]


def last_kernel(block):
    return block.layer[-1].convolution.weight


def by_hand(stock, coefficients, read=lambda kernel: kernel.detach()):
    """The stock model's logits, its own blocks but for those replaced: channel by channel, as the formula has it."""
    blocks, x_BCHW = blocks_of(stock), stock.resnet.embedder(IMAGES)
    for number, block in enumerate(blocks):
        if number not in coefficients:
            x_BCHW = block(x_BCHW)
            continue
        before, behind = read(last_kernel(blocks[number - 1])), read(last_kernel(blocks[number + 1]))
        alpha, beta = coefficients[number]
        channels = [
            alpha[o] * before[o] / before[o].square().sum().sqrt()
            + beta[o] * behind[o] / behind[o].square().sum() ** 0.5
            for o in range(len(before))
        ]
        x_BCHW = (x_BCHW + F.conv2d(x_BCHW, torch.stack(channels), padding=1)).clamp_min(0)
    return stock.classifier(stock.resnet.pooler(x_BCHW))


def test_it_is_the_formula_and_so_are_its_gradients():
    """Neighbours are constants to a surrogate (paper, Eq 30); all other gradients pass through it."""
    stock, model = make_resnet(), make_repl()
    assert sorted(model.surrogates) == [1, 4, 8] and model.config.depths == [2, 3, 2]
    given = {number: operator.coefficients.detach().clone() for number, operator in model.surrogates.items()}
    coefficients = {number: value.requires_grad_() for number, value in given.items()}
    expected_BL = by_hand(stock, coefficients)
    made_BL = model(IMAGES).logits
    torch.testing.assert_close(made_BL, expected_BL, rtol=1e-5, atol=1e-5)
    for logits_BL in (made_BL, expected_BL):
        F.cross_entropy(logits_BL, torch.tensor([0, 1, 2, 3])).backward()
    for number, operator in model.surrogates.items():
        torch.testing.assert_close(operator.coefficients.grad, coefficients[number].grad, rtol=1e-4, atol=1e-6)
    kept = [block for number, block in enumerate(blocks_of(stock)) if number not in coefficients]
    for one, other in zip(blocks_of(model), kept, strict=True):
        torch.testing.assert_close(last_kernel(one).grad, last_kernel(other).grad, rtol=1e-4, atol=1e-6)


def test_gradients_reach_the_neighbours_if_asked_to():
    stock, model = make_resnet(), make_repl(detach_sources=False)
    coefficients = {number: operator.coefficients.detach() for number, operator in model.surrogates.items()}
    model(IMAGES).logits.sum().backward()
    by_hand(stock, coefficients, read=lambda kernel: kernel).sum().backward()
    expected = last_kernel(blocks_of(stock)[0]).grad
    torch.testing.assert_close(last_kernel(blocks_of(model)[0]).grad, expected, rtol=1e-4, atol=1e-4)


def test_the_start_is_half_of_each_neighbour_and_skip_is_plain_removal():
    stock = make_resnet()
    half = get_repl_model(copy.deepcopy(stock), RepLConfig(**CONV, layers_to_replace=[1, 4, 8]))
    halves = {number: torch.full((2, channels), 0.5) for number, channels in ((1, 4), (4, 6), (8, 8))}
    torch.testing.assert_close(logits(half, pixel_values=IMAGES), by_hand(stock, halves), rtol=1e-5, atol=1e-5)
    skip = get_repl_model(copy.deepcopy(stock), RepLConfig("conv", layers_to_replace=[1, 4, 8], init="skip"))
    remove_layers(stock, [1, 4, 8])
    assert type(stock) is ResNetForImageClassification and stock.config.depths == [2, 3, 2]
    torch.testing.assert_close(logits(skip, pixel_values=IMAGES), logits(stock, pixel_values=IMAGES))


def test_saved_loaded_and_folded_models_are_the_same(tmp_path):
    model = make_repl()
    expected_BL = logits(model, pixel_values=IMAGES)
    model.save_pretrained(tmp_path / "unfolded")
    loaded = RepLModel.from_pretrained(tmp_path / "unfolded").eval()
    assert isinstance(loaded, ResNetForImageClassification)
    assert torch.equal(logits(loaded, pixel_values=IMAGES), expected_BL)
    folded = loaded.merge_and_unload()
    torch.testing.assert_close(logits(folded, pixel_values=IMAGES), expected_BL, rtol=1e-5, atol=1e-5)
    folded.save_pretrained(tmp_path / "folded")
    again, info = AutoModelForImageClassification.from_pretrained(tmp_path / "folded", output_loading_info=True)
    assert not any(info.values()), info
    assert torch.equal(logits(again.eval(), pixel_values=IMAGES), logits(folded, pixel_values=IMAGES))


def test_a_span_of_blocks_and_every_kth_of_each_stage():
    model = make_repl(layers_to_replace=None, spans=[[4, 6]])
    assert model.config.depths == [3, 2, 3] and list(model.surrogates) == [4]
    every = get_repl_model(make_resnet(), RepLConfig(**CONV, placement="every", every=2))
    assert every.config.repl["removed"] == [1, 4, 8]
    every = get_repl_model(make_resnet(), RepLConfig(**CONV, placement="every", every=3))
    assert every.config.repl["removed"] == [5], "only the stage of four has a third block that is not its last"


def test_what_a_surrogate_costs():
    """One convolution of the block's two; its batch norms go too."""
    (cost,) = make_repl(layers_to_replace=[4]).surrogate_costs
    kernel = 6 * 6 * 9
    assert (cost.parameters, cost.coefficients, cost.multiply_adds) == (kernel, 12, kernel)
    assert (cost.removed_parameters, cost.removed_multiply_adds) == (2 * kernel + 4 * 6, 2 * kernel)


def test_only_the_coefficients_train_if_asked_to():
    model = make_repl(trainable="coefficients")
    assert model.get_nb_trainable_parameters()[0] == 2 * (4 + 6 + 8)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"layers_to_replace": [3]},
            r"layers_to_replace=\[3\]: block 3 is the first of its stage and changes the shape",
        ),
        (
            {"layers_to_replace": [6]},
            r"block 6 is the last of its stage, .*; choose blocks inside a stage: 1, 4, 5, 8\.",
        ),
        ({"layers_to_replace": [0]}, r"layers_to_replace=\[0\] must name layers from 1 to 8"),
        ({"spans": [[5, 7]]}, r"spans=\[\[5, 7\]\]: block 6 is the last of its stage"),
        ({"spans": [[2, 5]]}, r"\[2, 5\] crosses a change of layer type, from stage 0 to stage 1 at layer 3"),
        (
            {"placement": "every", "every": 4},
            "every=4 chooses none of the blocks of stages of 3, 4, 3,.*use at most 3",
        ),
    ],
)
def test_blocks_that_are_not_replaced(settings, message):
    with pytest.raises(ValueError, match=message):
        get_repl_model(make_resnet(), RepLConfig(**CONV, **settings))


def test_models_and_settings_that_do_not_fit():
    for stages, message in (([2, 2, 2], "a stage needs three or more"), ([1, 1, 1], "a stage needs three or more")):
        with pytest.raises(ValueError, match=message):
            get_repl_model(make_resnet(depths=stages), RepLConfig(**CONV, placement="every", every=2))
    bottleneck = make_resnet(layer_type="bottleneck")
    with pytest.raises(ValueError, match="layer_type='bottleneck' takes 1 channels and makes 4; use a ResNet with"):
        get_repl_model(bottleneck, RepLConfig(**CONV, layers_to_replace=[1]))
    with pytest.raises(ValueError, match="operator='linear' is made of a transformer's layers, .* set operator to"):
        get_repl_model(make_resnet(), RepLConfig(layers_to_replace=[1]))
    for model in (make_vit(), make_stock()):
        with pytest.raises(ValueError, match="operator='conv' is made of residual blocks of convolutions"):
            get_repl_model(model, RepLConfig(**CONV, layers_to_replace=[1]))
    for settings, message in (
        ({"layers_to_replace": [1]}, "init='calibrate' fits hidden states of tokens.* set init to 'paper' or 'skip'"),
        ({"init": "paper", "num_layers_to_replace": 1}, "placement='block_influence' measures .* set placement to"),
    ):
        with pytest.raises(ValueError, match=message):
            RepLConfig("conv", **settings)
