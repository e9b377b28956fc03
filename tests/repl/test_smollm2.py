"""A real pretrained model: calibrated surrogates beside plain removal of the same layers."""

import copy

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from lopt_hf import RepLConfig, get_repl_model
from lopt_hf.data.pretrained import SMOLLM2_ID, resolve_model
from lopt_hf.repl.experiment import chunk_losses, cut_chunks, make_plain


@pytest.mark.slow
@pytest.mark.parametrize(("removed", "most"), [([14, 17, 25], 0.9), ([7, 15, 23], 0.8)])
def test_calibrated_surrogates_beat_plain_removal(removed, most, shared):
    name = resolve_model(SMOLLM2_ID)
    tokenizer = AutoTokenizer.from_pretrained(name)
    model = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32).eval()
    chunks = cut_chunks(tokenizer, (shared / "data/wikitext2_test.txt").read_text(), 256, 16)

    def perplexity(measured):
        losses = chunk_losses(measured, chunks)
        return torch.tensor(sum(loss for loss, _ in losses) / sum(count for _, count in losses)).exp().item()

    plain = perplexity(make_plain(model, removed))
    texts = [(shared / "data/wikitext2_valid.txt").read_text()]
    repl = get_repl_model(copy.deepcopy(model), RepLConfig(layers_to_replace=removed), texts, tokenizer)
    assert all(cost.ratio <= 0.35 for cost in repl.surrogate_costs)
    calibrated = perplexity(repl)
    assert perplexity(model) < calibrated <= most * plain
    assert perplexity(repl.merge_and_unload()) == pytest.approx(calibrated, rel=1e-5)
