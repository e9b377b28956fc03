"""Whether a model can be cut into stages, which its configuration alone tells: it is built without memory.

A stage has the model's own code, and stand-ins for what other stages hold. That works where what goes from layer to
layer is the hidden states alone, and where the model's code asks nothing else of layers that are not there.

Shapes: B batch, T tokens, D hidden channels.
"""

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from transformers import PretrainedConfig, PreTrainedModel

from lopt_hf.common.upstream.torch import tree_iter, without_modes
from lopt_hf.local.layer_calls import hidden_of, stop_at
from lopt_hf.local.ownership import leaves_behind
from lopt_hf.local.stacks import DecoderStack, find_decoder_stack

__all__ = ["check_layer_inputs", "cutting", "on_meta", "run_decoder", "runs", "skeleton_of"]

# How a model's code may fail on stand-ins that are not what it expects
CUT_ERRORS: tuple[type[Exception], ...] = (ArithmeticError, AssertionError, AttributeError, LookupError)
CUT_ERRORS += (NotImplementedError, RuntimeError, TypeError)

_REFUSED = "cannot be cut into stages"
_INSTEAD = "train it in one process with `lopt-hf sft`"


@contextmanager
def cutting(model: str) -> Iterator[None]:
    """Turns what a model's code raises on a stage into one line for the user.

    Args:
        model: The model's class.

    Raises:
        ValueError: If anything in the block fails as `CUT_ERRORS` say.
    """
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except CUT_ERRORS as error:
        reason = str(error).strip().partition("\n")[0].rstrip(".")
        raise ValueError(f"model={model} {_REFUSED} ({type(error).__name__}: {reason}); {_INSTEAD}.") from error


class _Yes(TorchFunctionMode):
    """Answers what a forward asks of the values of a mask that is all ones, and that has none on the meta device."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return True if func in (torch.Tensor.__bool__, torch.Tensor.item) else func(*args, **(kwargs or {}))


@contextmanager
def on_meta() -> Iterator[None]:
    """Makes a context in which models are built and run without memory; nobody who counts operations sees it."""
    with without_modes(), torch.random.fork_rng(devices=[]), torch.device("meta"), _Yes():
        yield


def skeleton_of(model_class: Any, config: PretrainedConfig) -> PreTrainedModel:
    """Builds a whole model on the meta device, to be called in `on_meta`."""
    own = copy.deepcopy(config)
    own._attn_implementation = "eager"  # whose mask does not depend on what a mask holds
    own._experts_implementation = "batched_mm"  # whose calls do not depend on the router's values
    skeleton: Any = model_class(own)
    return skeleton.to("meta").eval()  # type: ignore[no-any-return]  # some draw parameters by functions that no context moves


def run_decoder(stack: DecoderStack) -> None:
    """Runs the decoder of a skeleton on two tokens."""
    tokens_BT = torch.zeros(1, 2, dtype=torch.long)
    stack.decoder(input_ids=tokens_BT, attention_mask=torch.ones_like(tokens_BT), use_cache=False)


def check_layer_inputs(model_class: Any, config: PretrainedConfig) -> None:
    """Checks that hidden states are all that a model's layers are given of what its weights have made.

    Masks and rotary angles are made by every stage for itself. But embeddings that each layer reads beside the hidden
    states (Gemma 4's per layer) are the first stage's, and zeros on the others.

    Args:
        model_class: The model's stock class.
        config: Its config.

    Raises:
        ValueError: If they are given more, or hidden states of another shape than tokens by channels.
    """
    with on_meta(), torch.enable_grad():
        skeleton = skeleton_of(model_class, config)
        stack = find_decoder_stack(skeleton)
        given = _first_layer_inputs(stack)
    if given is None:
        return
    args, kwargs = given
    hidden_BTD = hidden_of(args, kwargs)
    if hidden_BTD.shape[-1] != stack.hidden_size or hidden_BTD.ndim > 3:
        raise ValueError(
            f"model={model_class.__name__} {_REFUSED}: its layers hand on {tuple(hidden_BTD.shape)} for two tokens, "
            f"and not one vector of {stack.hidden_size} channels for each; {_INSTEAD}."
        )
    others = (value for value in tree_iter((args, kwargs)) if value is not hidden_BTD)
    made_by = _owners(stack.decoder, leaves_behind(others))
    if made_by:
        raise ValueError(
            f"model={model_class.__name__} {_REFUSED}: beside the hidden states its layers are given what "
            f"{', '.join(made_by)} makes, which is on one stage only; {_INSTEAD}."
        )


def _first_layer_inputs(stack: DecoderStack) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """What the first layer is called with; `None` where the model does not run on the meta device."""
    with stop_at(stack.layers[0]) as calls:
        if not runs(lambda: run_decoder(stack)):
            return None
    return calls[0] if calls else None


def runs(forward: Callable[[], object]) -> bool:
    """Tells whether a forward comes to its end, or where a block stops it, without an error of `CUT_ERRORS`."""
    try:
        forward()
    except CUT_ERRORS:
        return False
    return True


def _owners(decoder: nn.Module, leaves: set[torch.Tensor]) -> list[str]:
    """The modules of a decoder that some of its parameters are in, by name."""
    names = (name for name, parameter in decoder.named_parameters() if parameter in leaves)
    return list(dict.fromkeys(name.rpartition(".")[0] or name for name in names))
