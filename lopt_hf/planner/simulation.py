"""Training steps of a real model class on fake tensors: nothing is allocated, everything is counted.

The model is built from its configuration, gets adapters, surrogates, heads and the gradient boundary by the package's
own code, and does what the trainers do in a step. The second step is what counts: the optimizer has its state by then.
Where the steps of a cycle differ, the second cycle is.

What is assumed: no token is padding, every token has a label, and attention runs in torch's scaled-dot-product kernel
of the flash kind, which keeps queries, keys, values, output and one number for each token and head. A
vision-language model gets sequences of text; its vision tower is there, and frozen.
"""

import contextlib
import copy
import warnings
from typing import Any

import torch
from torch import nn
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AttentionInterface,
    AttentionMaskInterface,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from lopt_hf.common.upstream.torch import DataDependentOutputException, DynamicOutputShapeException, FakeTensorMode
from lopt_hf.local.blocks import split_layers
from lopt_hf.local.ownership import parameters_before_decoder
from lopt_hf.local.stacks import find_decoder_stack
from lopt_hf.pipeline.runtime.stage_plan import StagePlan, plan_stages
from lopt_hf.planner.setups import make_setup
from lopt_hf.planner.step import Step, StepCost, Workload
from lopt_hf.planner.strategies import Strategy
from lopt_hf.planner.task_loss import loss_as_on_gpu, metered_loss

__all__ = ["simulate"]

UNPADDED = "lopt_hf_unpadded_sdpa"


def simulate(config: PretrainedConfig, strategy: Strategy, workload: Workload, on_gpu: bool = True) -> list[StepCost]:
    """Simulates two steps (or two cycles) of a strategy and returns what the second one costs.

    Not while a trainer runs in the same process: parts of TRL's loss are replaced until it is done.

    Args:
        config: Configuration of a causal language model; it is not changed.
        strategy: What to simulate.
        workload: On how much data, with which optimizer.
        on_gpu: Let the loss need what it needs on a GPU; `False`: what it needs on a CPU.

    Returns:
        The cost of each stage of a pipeline; one cost without a pipeline.

    Raises:
        ValueError: If the model is no decoder-only language model, or if its shapes depend on values.
    """
    costs: dict[Any, StepCost] = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about a run, and there is none
        stages = _stages(config, strategy, workload)
        for kind, stage in stages:
            if kind not in costs:
                try:
                    costs[kind] = _simulate_stage(config, strategy, workload, on_gpu, stage)
                except (DataDependentOutputException, DynamicOutputShapeException) as error:
                    raise ValueError(
                        f"model_type={config.model_type!r} cannot be simulated without weights: what it computes "
                        f"depends on values ({error}); measure it with `lopt-hf bench step`."
                    ) from error
    return [costs[kind] for kind, _ in stages]


def _stages(config: PretrainedConfig, strategy: Strategy, workload: Workload) -> list[tuple[Any, StagePlan | None]]:
    """The stages with what they cost by: between the first and the last they differ in their layers only."""
    if strategy.num_stages == 1:
        return [(None, None)]
    kinds = _kinds_of_layers(config, workload.dtype)
    plans = plan_stages(split_layers(len(kinds), strategy.num_blocks), strategy.num_stages)
    layers = [tuple(tuple(kinds[block.start : block.stop]) for block in plan.blocks) for plan in plans]
    return [((plan.is_first, plan.is_last, own), plan) for plan, own in zip(plans, layers, strict=True)]


def _kinds_of_layers(config: PretrainedConfig, dtype: torch.dtype) -> list[Any]:
    """What the cost of each decoder layer follows from: its weights, and what the configuration lists for it."""
    with torch.device("meta"):
        layers = find_decoder_stack(_make_model(config, dtype)).layers
    values = config.get_text_config(decoder=True).to_dict().values()
    # Types of attention, layers without positions ...: what else has as many items does no harm.
    listed = [value for value in values if isinstance(value, list) and len(value) == len(layers)]
    weights = [tuple(sorted((name, p.shape) for name, p in layer.named_parameters())) for layer in layers]
    return [(own, *(repr(value[index]) for value in listed)) for index, own in enumerate(weights)]


def _simulate_stage(
    config: PretrainedConfig, strategy: Strategy, workload: Workload, on_gpu: bool, stage: StagePlan | None
) -> StepCost:
    with torch.device("meta"):
        model = _make_model(config, workload.dtype)
        setup = make_setup(model, strategy, workload.lora_r, workload.tied_embeddings, stage)
    with FakeTensorMode():
        _give_fake_memory(setup.model)
        step = Step(setup, workload, stage)
        loss_costs = loss_as_on_gpu(step.meter) if on_gpu else contextlib.nullcontext()
        with loss_costs, metered_loss(step.meter), step.meter:
            return step.measure()


def _make_model(config: PretrainedConfig, dtype: torch.dtype) -> PreTrainedModel:
    auto_class = AutoModelForCausalLM if type(config) in MODEL_FOR_CAUSAL_LM_MAPPING else AutoModelForImageTextToText
    model: PreTrainedModel = auto_class.from_config(copy.deepcopy(config), dtype=dtype)
    for parameter in parameters_before_decoder(model, find_decoder_stack(model)).values():
        parameter.requires_grad_(False)  # what sees: sequences are text only, and by default it is frozen
    if model.config._attn_implementation == "sdpa" and model._supports_attention_backend:
        model.set_attn_implementation(UNPADDED)
    return model


def _give_fake_memory(*modules: nn.Module) -> None:
    """Puts a fake tensor in place of every parameter and buffer on the meta device; shared ones stay shared.

    Not `to_empty`: within a fake mode `nn.Module` swaps the contents of tensors, and these have weak references.
    """
    fake: dict[torch.Tensor, torch.Tensor] = {}

    def fake_of(tensor: torch.Tensor) -> torch.Tensor:
        if tensor not in fake:
            empty = torch.empty(tensor.shape, dtype=tensor.dtype)
            is_parameter = isinstance(tensor, nn.Parameter)
            fake[tensor] = nn.Parameter(empty, requires_grad=tensor.requires_grad) if is_parameter else empty
        return fake[tensor]

    for module in (part for whole in modules for part in whole.modules()):
        parameters = module.named_parameters(recurse=False, remove_duplicate=False)
        buffers = module.named_buffers(recurse=False, remove_duplicate=False)
        for name, tensor in [*parameters, *buffers]:
            setattr(module, name, fake_of(tensor))


def _unpadded_mask(*args: Any, attention_mask: torch.Tensor | None = None, **kwargs: Any) -> torch.Tensor | None:
    """The mask that a batch without padding gets; whether there is padding cannot be read off a fake tensor."""
    return sdpa_mask(*args, **kwargs)


AttentionInterface.register(UNPADDED, sdpa_attention_forward)
AttentionMaskInterface.register(UNPADDED, _unpadded_mask)
