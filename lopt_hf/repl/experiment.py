"""A RepL model beside the model it was made from and beside plain removal of the same layers.

Shapes: B batch, T tokens, V vocabulary.
"""

import copy
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from time import perf_counter
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lopt_hf.repl.config import OPERATORS, STOCK_OPERATORS, RepLConfig, init_of
from lopt_hf.repl.mapping import get_repl_model
from lopt_hf.repl.model import RepLModel
from lopt_hf.repl.surgery import remove_layers

__all__ = [
    "FULL",
    "PLAIN",
    "ChunkLosses",
    "Row",
    "all_variants",
    "chunk_losses",
    "cut_chunks",
    "make_plain",
    "make_row",
    "make_variant",
    "parse_variant",
]

FULL, PLAIN = "full model", "plain removal"
ChunkLosses = list[tuple[float, int]]


@dataclass
class Row:
    """One model and how well it predicts text.

    Attributes:
        name: What it is.
        losses: For each chunk of text its summed loss in nats and its number of predicted tokens.
        parameters: Of the whole model, folded.
        seed: Of its healing; `None` without.
        cost_ratio: The surrogates' multiply-adds per token relative to the removed layers', of all together; `None`
            without surrogates.
        seconds: What choosing layers and calibrating took, or healing.
        removed: The layers taken out, from 0.
        is_stock: Whether it is, folded, of its family's own class.
    """

    name: str
    losses: ChunkLosses
    parameters: int
    seed: int | None = None
    cost_ratio: float | None = None
    seconds: float | None = None
    removed: list[int] = field(default_factory=list)
    is_stock: bool = True

    @property
    def mean_loss(self) -> float:
        """Nats per token."""
        return sum(loss for loss, _ in self.losses) / sum(count for _, count in self.losses)


def cut_chunks(tokenizer: PreTrainedTokenizerBase, text: str, length: int, count: int) -> torch.Tensor:
    """`count` pieces of a text of `length` tokens, spread evenly over it, (count, T).

    Raises:
        ValueError: If the text is too short.
    """
    token_ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    pieces = torch.tensor(token_ids[: len(token_ids) // length * length]).view(-1, length)
    if len(pieces) < count:
        raise ValueError(
            f"eval_chunks={count} pieces of eval_chunk_length={length} tokens need a longer text: it has "
            f"{len(token_ids)} tokens; lower eval_chunks to at most {len(pieces)}."
        )
    return pieces[torch.linspace(0, len(pieces) - 1, count).round().long()]


@torch.no_grad()
def chunk_losses(model: nn.Module, chunks_BT: torch.Tensor, batch_size: int = 4) -> ChunkLosses:
    """The next-token loss of each chunk: its sum in nats, and over how many tokens."""
    model.eval()
    device = next(model.parameters()).device
    losses: ChunkLosses = []
    for batch_BT in chunks_BT.to(device).split(batch_size):
        logits_BTV = model(input_ids=batch_BT, use_cache=False).logits[:, :-1].float()
        loss_BT = nn.functional.cross_entropy(logits_BTV.transpose(1, 2), batch_BT[:, 1:], reduction="none")
        losses += [(row.sum().item(), row.numel()) for row in loss_BT]
    return losses


def parse_variant(text: str, config: RepLConfig) -> RepLConfig:
    """`operator[:init[:refit_behind]]`, with everything else as in a config but what matters in training only.

    Raises:
        ValueError: If one of them is unknown.
    """
    parts = text.split(":")
    operator, init, behind = [*parts, "", ""][:3]
    if len(parts) > 3 or not (behind == "" or behind.isdecimal()):
        raise ValueError(f"compare={text!r} is no operator[:init[:refit_behind]]; write it like 'refit:calibrate:4'.")
    settings: dict[str, Any] = {"operator": operator, "init": init or config.init, "refit_behind": int(behind or 0)}
    return replace(config, **settings, detach_sources=True, trainable="all")


def all_variants(config: RepLConfig) -> list[str]:
    """Every other operator than a config's, with the best start that it has, as `parse_variant` reads them."""
    return [f"{name}:{init_of(name)}" for name in OPERATORS if name != config.operator]


def make_plain(model: PreTrainedModel, removed: Sequence[int]) -> PreTrainedModel:
    """A copy of a model without some layers, a stock model still."""
    plain = copy.deepcopy(model)
    remove_layers(plain, removed)
    return plain


def make_variant(
    model: PreTrainedModel, config: RepLConfig, calibration_data: Any, tokenizer: PreTrainedTokenizerBase
) -> tuple[Any, float]:
    """A copy of a model with layers replaced, and the seconds that choosing and calibrating took.

    Options of other variants, which have no effect on this one, are left out.
    """
    start = perf_counter()
    variant = get_repl_model(copy.deepcopy(model), config.without_idle(), calibration_data, tokenizer)
    return variant, perf_counter() - start


def make_row(name: str, model: Any, chunks_BT: torch.Tensor, **facts: Any) -> Row:
    """Measures a model."""
    costs = model.surrogate_costs if isinstance(model, RepLModel) else []
    parameters = model.num_parameters() + sum(cost.parameters - cost.coefficients for cost in costs)
    removed = sum(cost.removed_multiply_adds for cost in costs)
    ratio = sum(cost.multiply_adds for cost in costs) / removed if costs else None
    losses = chunk_losses(model, chunks_BT)
    is_stock = not isinstance(model, RepLModel) or model.config.repl["config"]["operator"] in STOCK_OPERATORS
    return Row(name, losses, parameters, cost_ratio=ratio, is_stock=is_stock, **facts)
