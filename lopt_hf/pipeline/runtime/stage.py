"""One stage of the pipeline: a stock model of which this process holds a part.

The model's own forward runs on every stage, so that masks, rotary embeddings, learned positions and sliding windows
are the model's. Layers of other stages let their input through, and the first layer of the stage starts from the
hidden states that were received. Weights that are not the stage's are never read.

Shapes: B batch, T tokens, D hidden channels.
"""

from typing import Any

import torch
from torch import nn
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig, PretrainedConfig, PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from lopt_hf.local.blocks import Block
from lopt_hf.local.layer_calls import stop_at, with_hidden
from lopt_hf.local.ownership import feeds_first_layer, parameters_by_block
from lopt_hf.local.routers import count_routers
from lopt_hf.local.stacks import DecoderStack, find_decoder_stack
from lopt_hf.pipeline.runtime.cutting import check_layer_inputs, cutting
from lopt_hf.pipeline.runtime.stage_plan import StagePlan

__all__ = [
    "Absent",
    "AbsentEmbedding",
    "HiddenStateInput",
    "PassThrough",
    "drop_other_stages",
    "keep_stage",
    "load_stage",
    "match_layer_outputs",
    "model_class",
    "read_config",
    "save_on_every_rank",
    "separate_stage_embeddings",
]


# What `from_pretrained` is told of where config and weights are, and of the weights alone
_OF_FILES = {"cache_dir", "force_download", "local_files_only", "proxies", "revision", "subfolder", "token"}
_OF_FILES |= {"trust_remote_code"}
_OF_WEIGHTS = {"dtype", "torch_dtype", "quantization_config"}


class HiddenStateInput:
    """Puts received hidden states in place of what reaches the stage's first layer.

    A stock model's layers before the stage only let through what its absent embeddings stand for, so nothing is lost.
    """

    def __init__(self, layer: nn.Module) -> None:
        self.hidden_BTD: torch.Tensor | None = None
        layer.register_forward_pre_hook(self._replace, with_kwargs=True, prepend=True)  # before the boundary

    def _replace(self, layer: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        if self.hidden_BTD is None:
            raise RuntimeError("This stage has no hidden states to start from; set `hidden_BTD` before each forward.")
        # Each is used once: a stale one would be silently trained on.
        hidden_BTD, self.hidden_BTD = self.hidden_BTD, None
        return with_hidden(args, kwargs, hidden_BTD)


def read_config(name_or_path: str, **from_pretrained_kwargs: Any) -> tuple[PretrainedConfig, dict[str, Any]]:
    """Reads a model's config as `AutoModelForCausalLM.from_pretrained` would: some of its arguments change options.

    Args:
        name_or_path: Hub id or local folder of the model.
        **from_pretrained_kwargs: For `from_pretrained`: `revision`, `attention_dropout` ...

    Returns:
        The config, and the arguments that are left for the model.

    Raises:
        OSError: If there is no such model here or on the hub.
    """
    given = {name: value for name, value in from_pretrained_kwargs.items() if name not in _OF_WEIGHTS}
    config, others = AutoConfig.from_pretrained(name_or_path, return_unused_kwargs=True, **given)
    again = {n: value for n, value in from_pretrained_kwargs.items() if n in _OF_FILES | _OF_WEIGHTS}
    return config, {**others, **again}


def load_stage(
    name_or_path: str, plan: StagePlan, keeps_readout: bool = False, **from_pretrained_kwargs: Any
) -> PreTrainedModel:
    """Loads the part of a causal language model that one stage runs.

    `from_pretrained` of `transformers` loads it, so that sharded checkpoints, renamed weights and data types are as
    everywhere; a weight of another stage is neither read nor allocated.

    Args:
        name_or_path: Hub id or local folder of the whole model's checkpoint.
        plan: The stage.
        keeps_readout: Also load the final norm and the LM head where the stage is not the last, frozen.
        **from_pretrained_kwargs: For `from_pretrained`: `dtype`, `revision`, `attn_implementation`, options of the
            config; or the whole `config`.

    Returns:
        A model of the stock class. Its parameters have their usual names; those of other stages are not there.

    Raises:
        ValueError: If the model is no decoder-only language model, cannot be cut into stages, or has parameters that
            belong to no stage.
    """
    config = from_pretrained_kwargs.pop("config", None)
    if config is None:
        config, from_pretrained_kwargs = read_config(name_or_path, **from_pretrained_kwargs)
    stock_class = model_class(name_or_path, config)
    check_layer_inputs(stock_class, config)
    keeps_head = plan.is_last or keeps_readout
    tied = _is_tied(config)

    def make_partial(self: PreTrainedModel, config: PretrainedConfig, *args: Any, **kwargs: Any) -> None:
        stock_class.__init__(self, config, *args, **kwargs)
        # A tied head is found in the checkpoint under the embeddings' name only.
        keeps_embeddings = plan.is_first or (tied and keeps_head)
        drop_other_stages(self, plan, keeps_embeddings, keeps_head)
        if not (keeps_embeddings and keeps_head):
            self.all_tied_weights_keys = {}

    partial_class: Any = type(
        stock_class.__name__,
        (stock_class,),
        {
            "__init__": make_partial,
            "__module__": stock_class.__module__,
            "_keys_to_ignore_on_load_unexpected": [r"."],  # the other stages' weights
        },
    )
    model: PreTrainedModel = partial_class.from_pretrained(name_or_path, config=config, **from_pretrained_kwargs)
    model.__class__ = stock_class
    save_on_every_rank(model)
    if tied and keeps_head and not plan.is_first:
        embeddings: Any = model.get_input_embeddings()
        model.set_input_embeddings(AbsentEmbedding(embeddings, find_decoder_stack(model).hidden_size))
        model.all_tied_weights_keys = {}
    if keeps_readout and not plan.is_last:
        _freeze_readout(model, plan)
    match_layer_outputs(model, plan)
    return model


def separate_stage_embeddings(model: PreTrainedModel, tied_embeddings: str) -> None:
    """Separates an input embedding and an LM head that share a weight, which are on two stages.

    Args:
        model: A stage's part, or the whole model.
        tied_embeddings: `"untie"` lets each learn by itself, `"freeze"` freezes both.
    """
    text_config = model.config.get_text_config(decoder=True)
    if not text_config.tie_word_embeddings:
        return
    if tied_embeddings == "untie":  # two stages have a weight each already
        text_config.tie_word_embeddings = model.config.tie_word_embeddings = False
        return
    for module in (model.get_input_embeddings(), model.get_output_embeddings()):
        module.requires_grad_(False)


def keep_stage(model: PreTrainedModel, plan: StagePlan) -> None:
    """Takes everything out of a whole model that one stage does not run.

    Args:
        model: A causal language model. A head that shares the embeddings' weight goes on with it on its own stage.
        plan: The stage.

    Raises:
        ValueError: If the model cannot be cut into stages, or has parameters that belong to no stage.
    """
    check_layer_inputs(type(model), model.config)
    drop_other_stages(model, plan, keeps_embeddings=plan.is_first, keeps_head=plan.is_last)
    model.all_tied_weights_keys = {}
    save_on_every_rank(model)
    match_layer_outputs(model, plan)


def save_on_every_rank(model: PreTrainedModel) -> None:
    """`save_pretrained` would write on global rank 0 only, but every stage has its own part to write."""
    model.should_save_on_this_rank = bool  # type: ignore[method-assign, assignment]


def _freeze_readout(model: PreTrainedModel, plan: StagePlan) -> None:
    head: Any = model.get_output_embeddings()
    embeddings: Any = model.get_input_embeddings()
    if plan.is_first and head.weight is embeddings.weight:  # the embeddings go on learning
        head.weight = nn.Parameter(head.weight.detach().clone())
        model.all_tied_weights_keys = {}
    # Numbered anew: where blocks of other stages come before, their own numbers would reach beyond these two.
    parts = [Block(index=0, start=plan.start, stop=plan.stop), Block(1, plan.num_layers, plan.num_layers)]
    for parameter in parameters_by_block(model, find_decoder_stack(model), parts)[-1].values():
        parameter.requires_grad_(False)


def _is_tied(config: PretrainedConfig) -> bool:
    return bool(getattr(config.get_text_config(decoder=True), "tie_word_embeddings", False))


def model_class(name_or_path: str, config: PretrainedConfig) -> type[PreTrainedModel]:
    """Finds the stock class of a causal language model.

    Args:
        name_or_path: What it is called in the message.
        config: Its config.

    Raises:
        ValueError: If `transformers` has none.
    """
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise ValueError(
            f"model={name_or_path!r} ({type(config).__name__}) is no causal language model of transformers; the "
            "pipeline needs one, and runs no remote code."
        )
    stock_class: Any = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    return stock_class[0] if isinstance(stock_class, tuple | list) else stock_class


# ---- What stands where another stage's module was ----


class PassThrough(GradientCheckpointingLayer):
    """A layer of another stage.

    Args:
        num_absent_routers: The routers of that layer.
    """

    returns_tuple = False

    def __init__(self, num_absent_routers: int = 0) -> None:
        super().__init__()
        self.num_absent_routers = num_absent_routers

    def __call__(self, *args: Any, **kwargs: Any) -> Any:  # nothing to checkpoint
        return nn.Module.__call__(self, *args, **kwargs)

    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        return (hidden_states, None) if self.returns_tuple else hidden_states


class AbsentEmbedding(nn.Module):
    """Stands for an embedding of another stage: zeros in the shape of the hidden states, without memory.

    Not in the embedding's own width: where that differs (OPT), the projection behind it is absent too.
    """

    def __init__(self, embedding: nn.Embedding, hidden_size: int) -> None:
        super().__init__()
        self.hidden_size = hidden_size
        self.num_embeddings = embedding.num_embeddings
        self.dtype = embedding.weight.dtype

    def forward(self, indices_BT: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        zero = torch.zeros((), dtype=self.dtype, device=indices_BT.device)
        return zero.expand(*indices_BT.shape, self.hidden_size)


class Absent(nn.Module):
    """Stands for a module of another stage that maps hidden states to hidden states."""

    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        return hidden_states


def drop_other_stages(model: PreTrainedModel, plan: StagePlan, keeps_embeddings: bool, keeps_head: bool) -> None:
    """Puts stand-ins in place of what other stages hold.

    Args:
        model: The whole model.
        plan: The stage.
        keeps_embeddings: Whether the stage has the input embeddings.
        keeps_head: Whether it has what runs after the layers.

    Raises:
        ValueError: If the model cannot be cut into stages, or has parameters that belong to no stage.
    """
    stack = find_decoder_stack(model)
    with cutting(type(model).__name__):
        _put_stand_ins(model, stack, plan, keeps_embeddings, keeps_head)
        _check_only_own(model, stack, plan, keeps_head)


def _put_stand_ins(
    model: PreTrainedModel, stack: DecoderStack, plan: StagePlan, keeps_embeddings: bool, keeps_head: bool
) -> None:
    for index in range(len(stack.layers)):
        if not plan.start <= index < plan.stop:
            stack.layers[index] = PassThrough(count_routers(model, stack.layers[index]))
    for name, module in list(stack.decoder.named_children()):
        if module is stack.layers or not any(True for _ in module.parameters()):
            continue
        if stack.layers in set(module.modules()):
            raise LookupError(f"its layers are inside {name!r} of what it calls its decoder")
        is_before = feeds_first_layer(stack, name)
        keeps = (
            (plan.is_first or (keeps_embeddings and module is model.get_input_embeddings()))
            if is_before
            else keeps_head
        )
        if not keeps:
            absent = AbsentEmbedding(module, stack.hidden_size) if isinstance(module, nn.Embedding) else Absent()
            setattr(stack.decoder, name, absent)
    if not keeps_head:
        model.set_output_embeddings(Absent())


def _check_only_own(model: PreTrainedModel, stack: DecoderStack, plan: StagePlan, keeps_head: bool) -> None:
    """Raises if the model has parameters of which it is not known to which stage they belong."""
    known = {id(parameter) for parameter in stack.decoder.parameters()}
    if keeps_head:
        known |= {id(parameter) for parameter in model.get_output_embeddings().parameters()}
    for name, parameter in model.named_parameters():
        if id(parameter) not in known:
            raise ValueError(
                f"model={type(model).__name__} has {name!r} outside its decoder and LM head, and no stage of a "
                "pipeline would hold it; train this model in one process with `lopt-hf sft`."
            )


# ---- Layers that return a tuple ----


@torch.no_grad()
def match_layer_outputs(model: PreTrainedModel, plan: StagePlan) -> None:
    """Lets the stand-ins return what the model's own layers do: hidden states, or a tuple that starts with them.

    Falcon's layers, for instance, also return their attention weights. One token runs through one real layer, with
    the arguments that the model itself passes to it.

    Args:
        model: The stage's part of the model.
        plan: The stage.

    Raises:
        ValueError: If the model's code does not run on a part of it.
    """
    stack = find_decoder_stack(model)
    with cutting(type(model).__name__):
        returns_tuple = isinstance(_output_of_own_layer(stack, plan), tuple | list)
    for layer in stack.layers:
        if isinstance(layer, PassThrough):
            layer.returns_tuple = returns_tuple


def _output_of_own_layer(stack: DecoderStack, plan: StagePlan) -> Any:
    own = stack.layers[plan.start]
    weight = next(own.parameters())
    tokens_BT = torch.zeros(1, 2, dtype=torch.long, device=weight.device)
    with stop_at(stack.layers[0]) as reached:
        stack.decoder(input_ids=tokens_BT, attention_mask=torch.ones_like(tokens_BT), use_cache=False)
    hidden_BTD = torch.zeros(1, 2, stack.hidden_size, device=weight.device, dtype=weight.dtype)
    args, kwargs = with_hidden(*reached[0], hidden_BTD)
    return own(*args, **kwargs)
