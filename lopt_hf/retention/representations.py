"""Similarity of each layer's hidden states before and after training, on general text: what changed inside.

How far weights moved (`layer_drift`) tells nothing of what that did to what the layers compute. Shapes: B batch,
T tokens, N tokens of all texts, D hidden channels.
"""

import hashlib
import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from tqdm.auto import tqdm
from transformers import AutoConfig, PreTrainedModel

from lopt_hf.common.files import write_text
from lopt_hf.data.texts import prose
from lopt_hf.local.layer_calls import hidden_of, output_hidden
from lopt_hf.local.stacks import find_decoder_stack
from lopt_hf.retention.records import read_measured
from lopt_hf.retention.references import ModelReference, load_tokenizer
from lopt_hf.retention.results import RetentionReport
from lopt_hf.retention.weights import load_merged

__all__ = ["LayerSimilarity", "hidden_states", "linear_cka", "with_similarity"]

logger = logging.getLogger(__name__)

# Ours: several times as many tokens as a small model has channels; with fewer, CKA is nearer to 1 than it should be
NUM_TEXTS, TEXT_LENGTH, BATCH = 8, 256, 4
EMBEDDINGS = "embeddings"


def linear_cka(x_ND: torch.Tensor, y_ND: torch.Tensor) -> float:
    """Returns the linear centred kernel alignment of two representations of the same tokens.

    It is 1 where one is the other but for a rotation, a scale and a shift, and 0 where nothing of the one can be told
    from the other (https://huggingface.co/papers/1905.00414, Sec. 3, in the form with features).

    Args:
        x_ND: One representation.
        y_ND: The other; its channels may be of another number.

    Returns:
        From 0 to 1, exactly 1 for equal ones; `nan` where one is constant.
    """
    if torch.equal(x_ND, y_ND):
        return 1.0
    x_ND, y_ND = (h_ND.double() - h_ND.double().mean(0) for h_ND in (x_ND, y_ND))
    norm = torch.linalg.matrix_norm
    shared = norm(y_ND.T @ x_ND) ** 2 / (norm(x_ND.T @ x_ND) * norm(y_ND.T @ y_ND))
    return min(shared.item(), 1.0)


@torch.no_grad()
def hidden_states(model: PreTrainedModel, ids_BT: torch.Tensor) -> dict[str, torch.Tensor]:
    """Returns what comes into the first layer and out of each, by `embeddings` and the layers' numbers.

    The first token of each text is left out: models keep sums there that are larger than all else by orders of
    magnitude and say nothing of the text, and CKA would be about them alone.

    Args:
        model: A causal language model in evaluation mode.
        ids_BT: Token ids of the texts.
    """
    found: dict[str, list[torch.Tensor]] = {}
    with _recorded(model, found):
        for batch_BT in ids_BT.split(BATCH):
            model(input_ids=batch_BT.to(model.device), use_cache=False)
    return {name: torch.cat(parts).flatten(0, 1) for name, parts in found.items()}


@contextmanager
def _recorded(model: PreTrainedModel, found: dict[str, list[torch.Tensor]]) -> Iterator[None]:
    """Puts hidden states of every forward into `found`."""
    layers = find_decoder_stack(model).layers

    def keep(name: str, h_BTD: torch.Tensor) -> None:
        found.setdefault(name, []).append(h_BTD[:, 1:].float().cpu())

    def enter(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        keep(EMBEDDINGS, hidden_of(args, kwargs))

    def leave(name: str, layer: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        keep(name, output_hidden(output))

    handles = [layers[0].register_forward_pre_hook(enter, with_kwargs=True)]
    handles += [layer.register_forward_hook(partial(leave, str(number))) for number, layer in enumerate(layers)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


class LayerSimilarity:
    """Measures models against one baseline; what is measured is kept beside the scores.

    Args:
        baseline: The baseline.
        dtype: In which type all models compute.
        folder: Where it is kept.
    """

    def __init__(self, baseline: ModelReference, dtype: str, folder: Path) -> None:
        self.baseline, self.dtype, self.folder = baseline, dtype, folder
        self._ids_BT: torch.Tensor | None = None
        self._before: dict[str, torch.Tensor] | None = None

    def __call__(self, model: ModelReference) -> dict[str, float]:
        """Returns the linear CKA of each layer's hidden states with the baseline's, by `embeddings` and number.

        Raises:
            ValueError: If the models have different layers.
        """
        ids_BT = self._text_ids()
        how = (ids_BT.tolist(), self.dtype, model.fingerprint(), self.baseline.fingerprint())
        path = self.folder / f"similarity-{hashlib.sha256(json.dumps(how).encode()).hexdigest()[:20]}.json"
        similarity = read_measured(path)
        if similarity is None:
            similarity = self._measure(model, ids_BT)
            write_text(path, json.dumps(similarity))
        return similarity

    def prepare(self) -> None:
        """Takes the baseline's hidden states, which the first model that is measured would wait for otherwise."""
        self._baseline_states(self._text_ids())

    def _measure(self, model: ModelReference, ids_BT: torch.Tensor) -> dict[str, float]:
        before = self._baseline_states(ids_BT)
        after = self._states(model, ids_BT)
        if after.keys() != before.keys():
            raise ValueError(
                f"the baseline has {len(before) - 1} layers and the model {len(after) - 1}, so there is no "
                "similarity to tell; give models of one architecture."
            )
        return {name: linear_cka(before[name], h_ND) for name, h_ND in after.items()}

    def _baseline_states(self, ids_BT: torch.Tensor) -> dict[str, torch.Tensor]:
        if self._before is None:
            self._before = self._states(self.baseline, ids_BT)
        return self._before

    def _states(self, reference: ModelReference, ids_BT: torch.Tensor) -> dict[str, torch.Tensor]:
        device = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
        model = load_merged(reference, getattr(torch, self.dtype))
        model.to(device)  # type: ignore[arg-type]  # transformers' own `to` is typed for types of numbers
        return hidden_states(model.eval(), ids_BT)

    def _text_ids(self) -> torch.Tensor:
        if self._ids_BT is None:
            self._ids_BT = self._texts()
        return self._ids_BT

    def _texts(self) -> torch.Tensor:
        """Token ids of prose that every Python carries, as many whole texts as there are."""
        tokenizer = load_tokenizer(self.baseline)
        ids = tokenizer(prose("second"), add_special_tokens=False, verbose=False)["input_ids"]
        config = AutoConfig.from_pretrained(self.baseline.base, revision=self.baseline.revision)
        longest = getattr(config.get_text_config(decoder=True), "max_position_embeddings", TEXT_LENGTH)
        length = min(TEXT_LENGTH, longest)
        count = min(NUM_TEXTS * TEXT_LENGTH, len(ids)) // length
        return torch.tensor(ids[: count * length]).view(count, length)


def with_similarity(
    report: RetentionReport, models: Mapping[str, Sequence[ModelReference]], measure: LayerSimilarity
) -> RetentionReport:
    """Returns a report with the similarity of each model's layers to the baseline's, the mean over its seeds.

    Args:
        report: The report.
        models: What is behind each of its labels.
        measure: Measures one model.
    """
    found: dict[str, dict[str, float]] = {}
    for label, references in tqdm(models.items(), desc="hidden states", unit="model"):
        try:
            of_seeds = [measure(reference) for reference in references]
        except ValueError as error:
            logger.warning("%s: the similarity of its layers is left out: %s", label, error)
            continue
        found[label] = {name: sum(each[name] for each in of_seeds) / len(of_seeds) for name in of_seeds[0]}
    results = (replace(result, similarity=found.get(result.label, {})) for result in report.models)
    return replace(report, models=tuple(results))
