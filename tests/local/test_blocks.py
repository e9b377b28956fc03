import pytest
from transformers import AutoModelForMaskedLM, AutoModelForSeq2SeqLM, BertConfig, T5Config
from transformers.models.opt.modeling_opt import OPTDecoder

from lopt_hf.local.blocks import split_layers
from lopt_hf.local.embeddings import untie_output_embeddings
from lopt_hf.local.ownership import parameters_by_block
from lopt_hf.local.stacks import find_decoder_stack
from tests.tiny import FAMILIES, make_model


def starts(blocks):
    return [block.start for block in blocks] + [blocks[-1].stop]


@pytest.mark.parametrize(
    ("num_layers", "num_blocks", "expected"),
    [
        (6, 2, [0, 3, 6]),
        (7, 2, [0, 3, 7]),  # paper, Sec. 3: s = N // 2
        (6, 4, [0, 2, 4, 5, 6]),  # the released code's ranges, as in its fixtures
        (30, 4, [0, 8, 16, 23, 30]),
        (4, 4, [0, 1, 2, 3, 4]),
    ],
)
def test_even_split(num_layers, num_blocks, expected):
    assert starts(split_layers(num_layers, num_blocks)) == expected


def test_explicit_split():
    assert starts(split_layers(10, 3, [2, 9])) == [0, 2, 9, 10]


@pytest.mark.parametrize(
    ("num_blocks", "split_at", "named"),
    [
        (1, None, "num_blocks=1"),
        (5, None, "num_blocks=5"),
        (2, [0], r"split_at=\[0\]"),
        (2, [4], r"split_at=\[4\]"),
        (3, [2, 2], r"split_at=\[2, 2\]"),
        (3, [3, 1], r"split_at=\[3, 1\]"),
        (2, [1, 2], r"split_at=\[1, 2\].*num_blocks to 3"),
    ],
)
def test_bad_split_names_the_field(num_blocks, split_at, named):
    with pytest.raises(ValueError, match=named):
        split_layers(4, num_blocks, split_at)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_parameter_has_one_block(family):
    model = make_model(family)
    stack = find_decoder_stack(model)
    owned = parameters_by_block(model, stack, split_layers(len(stack.layers), 3))
    names = [name for block in owned for name in block]
    assert sorted(names) == sorted(name for name, _ in model.named_parameters())
    embedding = model.get_input_embeddings().weight
    assert any(parameter is embedding for parameter in owned[0].values())


def test_opt_projections_are_on_their_own_sides_of_the_layers():
    model = make_model("opt")
    first, last = parameters_by_block(model, find_decoder_stack(model), split_layers(4, 2))
    assert "model.decoder.project_in.weight" in first
    assert "model.decoder.embed_positions.weight" in first
    assert "model.decoder.project_out.weight" in last


def test_what_feeds_the_first_layer_is_traced_and_not_named():
    """OPT's input projection under a name that nobody knows; and where it cannot be traced, the embeddings."""

    class Renamed(OPTDecoder):
        def __init__(self, config):
            super().__init__(config)
            self.a_name_of_its_own = self._modules.pop("project_in")

        @property
        def project_in(self):
            return self.a_name_of_its_own

    model = make_model("opt")
    model.model.decoder = Renamed(model.config)
    first, _ = parameters_by_block(model, find_decoder_stack(model), split_layers(4, 2))
    assert "model.decoder.a_name_of_its_own.weight" in first

    class Untraceable(OPTDecoder):
        def __init__(self, config, more):
            super().__init__(config)

    model.model.decoder = Untraceable(model.config, 1)
    first, _ = parameters_by_block(model, find_decoder_stack(model), split_layers(4, 2))
    assert "model.decoder.embed_positions.weight" in first and "model.decoder.project_in.weight" not in first


def test_untie_copies_the_head_once():
    model = make_model("gpt2")
    assert untie_output_embeddings(model)
    head, embedding = model.get_output_embeddings().weight, model.get_input_embeddings().weight
    assert head is not embedding and head.equal(embedding)
    assert model.config.tie_word_embeddings is False
    assert not untie_output_embeddings(model)


SMALL_BERT = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "vocab_size": 40,
}


def test_encoder_decoder_is_refused():
    model = AutoModelForSeq2SeqLM.from_config(T5Config(vocab_size=40, d_model=32, num_layers=2, d_ff=32, num_heads=2))
    with pytest.raises(ValueError, match="T5ForConditionalGeneration is an encoder-decoder"):
        find_decoder_stack(model)


def test_encoder_is_refused():
    with pytest.raises(ValueError, match="BertForMaskedLM has no language-modelling head"):
        find_decoder_stack(AutoModelForMaskedLM.from_config(BertConfig(**SMALL_BERT)))


def test_bidirectional_model_with_a_language_model_head_is_refused():
    from transformers import BertLMHeadModel

    with pytest.raises(ValueError, match="attends in both directions"):
        find_decoder_stack(BertLMHeadModel(BertConfig(**SMALL_BERT)))
