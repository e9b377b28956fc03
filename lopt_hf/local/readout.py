"""The `readout` local objective: a block learns the next token through the model's own norm and head, frozen.

Shapes: B batch, T tokens, N tokens that count in the loss, D hidden channels, V vocabulary.
"""

import copy as copying
import functools
import hashlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import ModulesToSaveWrapper
from torch import nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from transformers import PreTrainedModel
from transformers.modeling_outputs import MoeModelOutputWithPast

from lopt_hf.common.labels import IGNORED_LABEL
from lopt_hf.common.upstream.torch import FakeTensorMode
from lopt_hf.common.upstream.transformers import no_init_weights
from lopt_hf.local.objectives import LocalBatch
from lopt_hf.local.ownership import modules_before_decoder
from lopt_hf.local.stacks import find_decoder_stack

__all__ = [
    "IGNORED_LABEL",
    "ChunkedCrossEntropy",
    "Readout",
    "ReadoutObjective",
    "TokenLoss",
    "frozen_copy",
    "model_after_the_layers",
    "tokens_at_once",
    "unadapted",
]

# Ours: 64 MiB of fp32 logits, 341 tokens at SmolLM2's 49,152 entries. On a CPU larger chunks were no faster.
MAX_LOGITS = 2**24


def tokens_at_once(model: PreTrainedModel, max_logits: int = MAX_LOGITS) -> int:
    """Returns of how many tokens the logits may exist at once, one at least.

    Args:
        model: The language model.
        max_logits: Most logits that exist at once, as tokens times vocabulary.
    """
    vocabulary_size: int = model.config.get_text_config(decoder=True).vocab_size
    return max(1, max_logits // vocabulary_size)


class ReadoutObjective:
    """Next-token cross-entropy of a block's output, read through the final norm and LM head as they were at the start.

    The form of ZeroLock (arXiv 2608.07974): one readout, frozen, shared by all early blocks, which have nothing
    trainable besides their own weights. Hidden states take the model's own path to logits (projection, soft-capping
    and scaling of logits included), so at the start the loss of the last layer's output is the model's own loss.

    The loss is the mean over the micro-batch's tokens with a label. The boundary divides it by the accumulation
    steps, as every local loss: the micro-batches of a step weigh the same, however many labels each has.

    Logits exist for one chunk of tokens at a time. Their gradient is taken in the forward (the readout is frozen, so
    only the hidden states need one), which saves recomputing them; the backward multiplies it.

    Attributes:
        token_loss: How the loss is computed; whoever simulates it has another.

    Args:
        readout: Frozen module, from (1, N, D) hidden states of the last layer's kind to (1, N, V) logits.
        tokens_per_chunk: Tokens whose logits exist at once.

    Raises:
        ValueError: If a parameter of `readout` is trainable.

    Example: what `LoPTConfig(local_objective="readout")` does.

    ```python
    objective = ReadoutObjective.from_model(model)
    LoPTTrainer(model, args, local_objective=objective, train_dataset=dataset)
    ```
    """

    def __init__(self, readout: nn.Module, tokens_per_chunk: int) -> None:
        trainable = [name for name, parameter in readout.named_parameters() if parameter.requires_grad]
        if trainable:
            raise ValueError(
                f"readout has the trainable parameter {trainable[0]!r}; its final norm and LM head must be frozen: "
                "call `requires_grad_(False)` on them, or let `from_model(model, copy=True)` copy them."
            )
        self.readout = readout
        self.tokens_per_chunk = tokens_per_chunk
        self.token_loss = TokenLoss()

    @classmethod
    def from_model(
        cls, model: PreTrainedModel, copy: bool | Literal["all"] = True, max_logits: int = MAX_LOGITS
    ) -> "ReadoutObjective":
        """Makes the objective from what a causal language model runs after its decoder layers.

        Adapters on these modules are left out: the readout is the base model's.

        Args:
            model: A `transformers` causal language model, with the weights that the run starts from (of a
                `PeftModel`, its base model). Of its weights only those after the layers are read.
            copy: Copy what trains; modules that are frozen are shared, since they stay as they are. `False` shares
                all of them, `"all"` none: an engine is going to shard the model's.
            max_logits: Most logits that exist at once, as tokens times vocabulary.

        Raises:
            ValueError: If a weight is not there (on the `meta` device), or if `copy=False` and one is trainable.
        """
        readout = Readout(model_after_the_layers(model, functools.partial(frozen_copy, copy=copy)))
        return cls(readout, tokens_at_once(model, max_logits))

    @functools.cached_property
    def fingerprint(self) -> str:
        """SHA-256 of the readout's weights: a run resumes exactly only with the readout that it began with."""
        digest = hashlib.sha256()
        for name, tensor in self.readout.state_dict().items():
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
        return digest.hexdigest()

    def __call__(
        self, head: nn.Module, output_BTD: torch.Tensor, input_BTD: torch.Tensor, batch: LocalBatch
    ) -> torch.Tensor:
        hidden_ND, labels_N = self.token_loss.counted(output_BTD, batch)
        total = self.token_loss.total(hidden_ND, labels_N, self.readout, self.tokens_per_chunk)
        return total / max(1, labels_N.numel())


Chunks = Callable[..., Iterable[tuple[torch.Tensor, ...]]]  # of tensors of the same length


class ChunkedCrossEntropy(torch.autograd.Function):
    """The sum of the tokens' cross-entropy, with the gradient of the hidden states alone."""

    @staticmethod
    def forward(
        ctx: Any, hidden_ND: torch.Tensor, labels_N: torch.Tensor, readout: nn.Module, chunks: Chunks
    ) -> torch.Tensor:
        device = next(readout.parameters()).device  # of the last block, where a model is spread over several
        total = torch.zeros((), device=hidden_ND.device)
        gradient_ND = torch.empty_like(hidden_ND)
        for hidden, labels, gradient in chunks(hidden_ND, labels_N, gradient_ND):
            hidden = hidden.detach().to(device).requires_grad_(ctx.needs_input_grad[0])
            with torch.set_grad_enabled(ctx.needs_input_grad[0]):
                logits = readout(hidden[None])[0]
                loss = F.cross_entropy(logits.float(), labels.to(device), reduction="sum")
            total += loss.detach().to(total.device)
            if ctx.needs_input_grad[0]:
                with torch.autocast(device.type, enabled=False):
                    gradient.copy_(torch.autograd.grad(loss, hidden)[0])
        ctx.save_for_backward(gradient_ND)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, scale: torch.Tensor) -> tuple[torch.Tensor | None, None, None, None]:
        (gradient_ND,) = ctx.saved_tensors
        return gradient_ND * scale.to(gradient_ND.dtype), None, None, None


class TokenLoss:
    """Cross-entropy of next tokens through a readout, whose logits exist for one chunk of tokens at a time."""

    def counted(self, output_BTD: torch.Tensor, batch: LocalBatch) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns the hidden states (N, D) before each token that has a label, and these labels (N,).

        Raises:
            ValueError: If the batch has not a label for each token.
        """
        labels_BT = batch.inputs.get("labels")
        if labels_BT is None or labels_BT.shape != output_BTD.shape[:2]:
            found = "none" if labels_BT is None else f"{tuple(labels_BT.shape)}"
            raise ValueError(
                f"a local loss through the LM head needs a label for each of the {tuple(output_BTD.shape[:2])} "
                "tokens, "
                f"but the batch has {found}; use a collator that makes `labels`, or local_objective='reconstruction'."
            )
        labels_BT = labels_BT[:, 1:].to(output_BTD.device)
        counts_BT = labels_BT != IGNORED_LABEL
        return output_BTD[:, :-1][counts_BT], labels_BT[counts_BT]

    def chunks(self, size: int, *tensors: torch.Tensor) -> Iterator[tuple[torch.Tensor, ...]]:
        """Yields tensors of the same length, `size` of their entries at a time."""
        return zip(*(tensor.split(size) for tensor in tensors), strict=True)

    def total(self, hidden_ND: torch.Tensor, labels_N: torch.Tensor, readout: nn.Module, size: int) -> torch.Tensor:
        """Returns the sum over the tokens, through a frozen readout, `size` tokens at a time."""
        total: torch.Tensor = ChunkedCrossEntropy.apply(hidden_ND, labels_N, readout, partial(self.chunks, size))
        return total


@dataclass
class _DecoderOutput(MoeModelOutputWithPast):
    """What the models' own forwards ask of their decoder's output: routers' logits here, cross-attentions there."""

    cross_attentions: tuple[torch.Tensor, ...] | None = None


class _AfterTheLayers(nn.Module):
    """Stands in the decoder's place: runs only what the decoder runs after its layers."""

    def __init__(self, modules: dict[str, nn.Module]) -> None:
        super().__init__()
        self.tail = nn.ModuleDict(modules)

    def forward(self, *args: Any, inputs_embeds: torch.Tensor, **kwargs: Any) -> _DecoderOutput:
        hidden_BTD = inputs_embeds
        for module in self.tail.values():
            hidden_BTD = module(hidden_BTD)
        return _DecoderOutput(last_hidden_state=hidden_BTD)


class Readout(nn.Module):
    """A model of the stock class whose decoder is `_AfterTheLayers`: its own forward makes the logits."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, h_BTD: torch.Tensor) -> torch.Tensor:
        return self.model(inputs_embeds=h_BTD, use_cache=False).logits


def model_after_the_layers(
    model: PreTrainedModel, take: Callable[[nn.Module, nn.Module], nn.Module]
) -> PreTrainedModel:
    """Makes a model of the same class whose decoder only runs what comes after the layers, on `inputs_embeds`.

    Args:
        model: A causal language model, or the part of one that has its final norm and LM head.
        take: Gives the module to use for each that runs after the layers. Called with the model's own and with one of
            the same kind that has no weights.

    Raises:
        ValueError: If the layers hand on several residual streams.
    """
    streams = vars(model.config.get_text_config(decoder=True)).get("hc_mult")
    if streams is not None:
        raise ValueError(
            f"model={type(model).__name__} has hyper-connections: its layers hand on hc_mult={streams} streams of "
            "hidden states, which no readout is made for. Use LoPT with local_objective='reconstruction' or 'none'."
        )
    with FakeTensorMode():  # without memory: it is traced, then its modules are replaced
        shell = _empty_model(model).eval()
        fake_decoder = find_decoder_stack(shell).decoder
        names = _run_after_the_layers(shell)
    decoder, fake_head = find_decoder_stack(model).decoder, shell.get_output_embeddings()
    tail = {name: take(decoder.get_submodule(name), fake_decoder.get_submodule(name)) for name in names}
    head = take(model.get_output_embeddings(), fake_head)
    for name in modules_before_decoder(shell, find_decoder_stack(shell)):  # to what is read no image comes
        owner, _, attribute = name.rpartition(".")
        setattr(shell.get_submodule(owner), attribute, None)
    path = {id(module): name for name, module in shell.named_modules()}
    shell.set_submodule(path[id(fake_decoder)], _AfterTheLayers(tail))
    shell.set_submodule(path[id(fake_head)], head)
    return shell


def _empty_model(model: PreTrainedModel) -> PreTrainedModel:
    config = copying.deepcopy(model.config)
    config.get_text_config(decoder=True).output_router_logits = False  # no router runs
    with no_init_weights():  # some of vision towers' draws depend on values
        return type(model)._from_config(config, attn_implementation="eager")


def _run_after_the_layers(model: PreTrainedModel) -> list[str]:
    """Names of the decoder's children that run after its last layer, in the order in which they do."""
    stack = find_decoder_stack(model)
    tokens_BT = torch.zeros(1, 2, dtype=torch.long)
    order: list[str] = []
    for layer in stack.layers:
        # Some decoders take the first element of what a layer returns, which a first axis of length one allows.
        layer.forward = lambda h_BTD, *args, **kwargs: h_BTD.reshape(1, 2, -1)
    stack.layers[-1].register_forward_hook(lambda *args: order.clear())
    for name, child in stack.decoder.named_children():
        child.register_forward_hook(lambda *args, name=name: order.append(name))
    with torch.no_grad():
        stack.decoder(input_ids=tokens_BT, use_cache=False)
    return order


def unadapted(module: nn.Module) -> Any:
    """The module under an adapter, or itself."""
    if isinstance(module, BaseTunerLayer):
        return module.get_base_layer()
    return module.original_module if isinstance(module, ModulesToSaveWrapper) else module


def frozen_copy(module: nn.Module, empty: nn.Module, copy: bool | Literal["all"]) -> nn.Module:
    """The module itself if it is not to be copied, else `empty` with frozen copies of its weights.

    Not a deep copy: that would take hooks along, and forwards that are bound to the module they were made for.
    """
    module = unadapted(module)
    weights = module.state_dict()
    names = empty.state_dict(keep_vars=True).keys()  # detached they would be of two fake modes where the model is fake
    if any(tensor.is_meta for tensor in weights.values()) or not names <= weights.keys():
        raise ValueError(
            f"model: the weights of {type(empty).__name__}, after the decoder layers, are not loaded; load them "
            "before making the readout."
        )
    if copy != "all" and not (copy and any(parameter.requires_grad for parameter in module.parameters())):
        return module
    empty.load_state_dict({name: tensor.clone() for name, tensor in weights.items()}, assign=True)
    return empty.requires_grad_(False)
