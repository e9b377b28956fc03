"""The stages of a language model built without memory before any is launched: what cannot work is one line."""

import copy
from collections.abc import Sequence
from typing import Any

import torch
from peft import PeftConfig, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from transformers import PretrainedConfig, PreTrainedModel

from lopt_hf.local.layer_calls import with_hidden
from lopt_hf.local.stacks import DecoderStack, find_decoder_stack
from lopt_hf.pipeline.runtime.adapters import adapt_stage, check_start
from lopt_hf.pipeline.runtime.cutting import check_layer_inputs, cutting, on_meta, run_decoder, runs, skeleton_of
from lopt_hf.pipeline.runtime.stage import drop_other_stages, match_layer_outputs, model_class
from lopt_hf.pipeline.runtime.stage_plan import StagePlan

__all__ = ["check_cut"]


def check_cut(name: str, config: PretrainedConfig, plans: Sequence[StagePlan], peft_config: PeftConfig | None) -> None:
    """Checks that a model can be cut into stages, and that each has something to train.

    Args:
        name: What the model is called in messages.
        config: Its config; no weights are read.
        plans: All stages.
        peft_config: The adapter, if one is trained.

    Raises:
        ValueError: With the reason.
    """
    stock_class = model_class(name, config)
    check_layer_inputs(stock_class, config)
    with torch.no_grad(), on_meta():
        whole = skeleton_of(stock_class, config)
        # Not all do: which experts are called depends on values
        runs_without_values = runs(lambda: run_decoder(find_decoder_stack(whole)))
        if peft_config is not None:
            check_start(peft_config)
            peft_config = copy.deepcopy(peft_config)  # in which PEFT notes what "all-linear" and the like mean
            get_peft_model(whole, peft_config)
            _check_head(whole)
        for plan in plans:
            stage = skeleton_of(stock_class, config)
            drop_other_stages(stage, plan, keeps_embeddings=plan.is_first, keeps_head=plan.is_last)
            with cutting(type(stage).__name__):
                stage.initialize_weights()  # as `from_pretrained` does, of what no checkpoint has
            if runs_without_values:
                _check_forward(stage, plan)
            if peft_config is not None:
                adapt_stage(stage, whole, peft_config)


def _check_head(whole: PreTrainedModel) -> None:
    if isinstance(whole.get_output_embeddings(), BaseTunerLayer):
        raise ValueError(
            "target_modules names the LM head, whose weight TRL's loss reads past an adapter; leave it out, or name "
            "it in lora_modules_to_save to train all of it."
        )


def _check_forward(stage: PreTrainedModel, plan: StagePlan) -> None:
    stack = find_decoder_stack(stage)
    match_layer_outputs(stage, plan)
    with (
        cutting(type(stage).__name__),
        stack.layers[plan.start].register_forward_pre_hook(_given_hidden(stack, stage.dtype), with_kwargs=True),
    ):
        run_decoder(stack)


def _given_hidden(stack: DecoderStack, dtype: torch.dtype) -> Any:
    """A hook by which a layer starts from hidden states as another stage sends them."""

    def replace(layer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return with_hidden(args, kwargs, torch.zeros(1, 2, stack.hidden_size, dtype=dtype))

    return replace
