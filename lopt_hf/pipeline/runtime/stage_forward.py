"""A stage's part of the model as a function: from the hidden states that it is given to those that it hands on.

Shapes: B batch, T tokens, D hidden channels.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from lopt_hf.local.hooks import cut
from lopt_hf.local.layer_calls import hidden_of, output_hidden, with_hidden
from lopt_hf.local.run_state import running_statistics_kept
from lopt_hf.local.stacks import DecoderStack, is_image_classifier
from lopt_hf.pipeline.runtime.stage import HiddenStateInput
from lopt_hf.pipeline.runtime.stage_plan import StagePlan

__all__ = ["StageForward", "StageRun"]


@dataclass(frozen=True)
class StageRun:
    """What a stage's part of the model has computed.

    Attributes:
        output_BTD: What its last layer returned.
        router_logits: Those of its routers, if they were asked for.
    """

    output_BTD: torch.Tensor
    router_logits: tuple[torch.Tensor, ...]


class StageForward:
    """Runs a stage's part of a model through the model's own forward.

    Args:
        model: The stage's part.
        stack: Its decoder.
        plan: The stage.
        send: Called with what the last layer returns, as soon as it does and before its other hooks; not where a
            micro-batch runs `again`, nor on the last stage.
    """

    def __init__(
        self, model: PreTrainedModel, stack: DecoderStack, plan: StagePlan, send: Callable[[torch.Tensor], None]
    ) -> None:
        self._model = model
        self._send = send
        self._options = {} if is_image_classifier(model) else {"use_cache": False}
        self._again = False
        self._output_BTD: torch.Tensor | None = None
        first = stack.layers[plan.start]
        self._input = None if plan.is_first else HiddenStateInput(first)
        if plan.is_first:
            first.register_forward_pre_hook(self._enter, with_kwargs=True)
        if not plan.is_last:
            # Before the boundary's own hook: the output leaves before its local backward starts.
            stack.layers[plan.stop - 1].register_forward_hook(self._leave, prepend=True)

    def start_from(self, hidden_BTD: torch.Tensor | None) -> None:
        """Sets what the next forward of the model starts from; nothing on the first stage.

        Args:
            hidden_BTD: Shape (B, T, D).
        """
        if self._input is not None:
            self._input.hidden_BTD = hidden_BTD

    def __call__(
        self, arguments: Mapping[str, Any], hidden_BTD: torch.Tensor | None = None, again: bool = False
    ) -> StageRun:
        """Runs the decoder; not for the last stage, whose forward has a loss.

        Args:
            arguments: Those of the decoder's forward, without labels.
            hidden_BTD: What a stage that is not the first starts from, shape (B, T, D).
            again: Whether its output has been sent before.
        """
        self.start_from(hidden_BTD)
        self._again = again
        try:
            with running_statistics_kept([self._model] if again else []):
                outputs: Any = self._model.base_model(**arguments, **self._options)
        finally:
            self._again = False
            output_BTD, self._output_BTD = self._output_BTD, None
        assert output_BTD is not None
        return StageRun(output_BTD, tuple(outputs.get("router_logits") or ()))

    def _enter(self, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        hidden_BTD = hidden_of(args, kwargs)
        if not self._again or hidden_BTD.requires_grad or not self._model.is_activation_checkpointing:
            return None
        # Reentrant checkpointing gives no gradient unless an input requires one, and frozen embeddings do not.
        return with_hidden(args, kwargs, cut(hidden_BTD))

    def _leave(self, layer: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        self._output_BTD = output_hidden(output)
        if not self._again:
            self._send(self._output_BTD)
