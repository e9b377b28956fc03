"""The stages together compute what the stock model computes, bit for bit, and each holds its own weights only."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from lopt_hf.local.blocks import split_layers
from lopt_hf.local.stacks import find_decoder_stack
from lopt_hf.pipeline.runtime.stage import HiddenStateInput, load_stage, read_config
from lopt_hf.pipeline.runtime.stage_plan import plan_stages
from tests.tiny import FAMILIES, make_model

INPUT_IDS = torch.arange(3, 27).reshape(2, 12)
MASK = torch.ones_like(INPUT_IDS)
MASK[0, :3] = 0  # padded on the left: positions and masks differ between the rows


def save(folder, family, tied):
    make_model(family, tie_word_embeddings=tied).save_pretrained(folder)
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def load(folder, num_stages, **kwargs):
    plans = plan_stages(split_layers(4, num_stages), num_stages)
    return [(plan, load_stage(str(folder), plan, dtype=torch.float32, **kwargs).eval()) for plan in plans]


@torch.no_grad()
def run(stages, **inputs):
    hidden_BTD = logits_BTV = None
    for plan, model in stages:
        layers = find_decoder_stack(model).layers
        if not plan.is_first:
            HiddenStateInput(layers[plan.start]).hidden_BTD = hidden_BTD
        outputs = []
        layers[plan.stop - 1].register_forward_hook(lambda module, args, output, seen=outputs: seen.append(output))
        if plan.is_last:
            logits_BTV = model(**inputs, use_cache=False).logits
        else:
            model.get_decoder()(**inputs, use_cache=False)
        hidden_BTD = outputs[0][0] if isinstance(outputs[0], tuple) else outputs[0]
    return logits_BTV


@pytest.mark.parametrize("num_stages", [2, 4])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_equal_the_stock_models(tmp_path, family, tied, num_stages):
    stock = save(tmp_path, family, tied)
    stages = load(tmp_path, num_stages)
    with torch.no_grad():
        expected = stock(input_ids=INPUT_IDS, attention_mask=MASK, use_cache=False).logits
    assert torch.equal(run(stages, input_ids=INPUT_IDS, attention_mask=MASK), expected)
    names = [name for _, stage in stages for name, _ in stage.named_parameters()]
    assert len(names) == len(set(names)), "two stages hold the same weight"
    head = {"lm_head.weight", "embed_out.weight"} if tied else set()  # a tied head has a name of its own on its stage
    assert set(names) - head == {name for name, _ in stock.named_parameters()} - head


def test_packed_positions_reach_every_stage(tmp_path):
    stock = save(tmp_path, "llama", tied=False)
    positions = torch.cat([torch.arange(5), torch.arange(7)])[None]
    inputs = {"input_ids": INPUT_IDS[:1], "position_ids": positions}
    with torch.no_grad():
        expected = stock(**inputs, use_cache=False).logits
    assert torch.equal(run(load(tmp_path, 2), **inputs), expected)


@pytest.mark.parametrize("num_stages", [2, 4])
@pytest.mark.parametrize("tied", [False, True])
def test_a_readout_is_kept_frozen(tmp_path, tied, num_stages):
    save(tmp_path, "llama", tied)
    *others, last = [stage for _, stage in load(tmp_path, num_stages, keeps_readout=True)]
    for stage in others:
        assert torch.equal(stage.get_output_embeddings().weight, last.get_output_embeddings().weight)
        frozen = {name for name, parameter in stage.named_parameters() if not parameter.requires_grad}
        assert frozen == {"model.norm.weight", "lm_head.weight"}
    assert all(parameter.requires_grad for parameter in last.parameters())


def test_options_of_the_config_are_those_of_the_stock_model(tmp_path):
    """As `--model_init_kwargs` has them in one process."""
    save(tmp_path, "llama", tied=False)
    options = {"attention_dropout": 0.1, "use_cache": False, "attn_implementation": "eager", "revision": "main"}
    stock = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32, **options)
    for _, stage in load(tmp_path, 2, **options):
        assert stage.config.to_dict() == stock.config.to_dict()
        assert stage.config._attn_implementation == stock.config._attn_implementation
        assert find_decoder_stack(stage).decoder.config.attention_dropout == 0.1
    config, others = read_config(str(tmp_path), dtype="float32", low_cpu_mem_usage=True, **options)
    assert (config.attention_dropout, config.use_cache) == (0.1, False)
    assert others == {"dtype": "float32", "low_cpu_mem_usage": True, "revision": "main"}


def test_hidden_states_are_used_once(tmp_path):
    save(tmp_path, "llama", tied=False)
    plan, model = load(tmp_path, 2)[1]
    stage_input = HiddenStateInput(find_decoder_stack(model).layers[plan.start])
    stage_input.hidden_BTD = torch.zeros(2, 12, 32)
    model(input_ids=INPUT_IDS)
    with pytest.raises(RuntimeError, match="no hidden states"):
        model(input_ids=INPUT_IDS)


@pytest.mark.parametrize(
    ("num_layers", "num_blocks", "num_stages", "expected"),
    [(6, 4, 2, [[0], [1, 2, 3]]), (30, 4, 3, [[0], [1, 2], [3]]), (8, 8, 3, [[0, 1, 2], [3, 4], [5, 6, 7]])],
)
def test_blocks_are_spread_over_the_stages(num_layers, num_blocks, num_stages, expected):
    plans = plan_stages(split_layers(num_layers, num_blocks), num_stages)
    assert [[block.index for block in plan.blocks] for plan in plans] == expected


def test_more_stages_than_blocks():
    with pytest.raises(ValueError, match="num_stages=3 does not fit num_blocks=2"):
        plan_stages(split_layers(6, 2), 3)
