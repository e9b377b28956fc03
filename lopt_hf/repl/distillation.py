"""Distillation from the full model: its next-token distribution, and its hidden states behind each removed span.

Logits of teacher and student exist for one chunk of tokens at a time, in the forward and again in the backward, so
that vocabulary x tokens is never in memory as a whole.

Shapes: B batch, T tokens, N tokens that count in the loss, D hidden channels, V vocabulary.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from lopt_hf.common.settings import option
from lopt_hf.common.trainer_base import TrainerBase
from lopt_hf.local.layer_calls import hidden_of
from lopt_hf.local.readout import IGNORED_LABEL, MAX_LOGITS
from lopt_hf.repl.modeling_repl import find_layers
from lopt_hf.repl.placement import Span
from lopt_hf.repl.surgery import kept_index, relative_distance

__all__ = [
    "DistillationArguments",
    "Seen",
    "TeacherMixin",
    "chunked_divergence",
    "recording",
]

# What a collator or the trainer puts into a batch that a decoder is not given
_NOT_FOR_DECODERS = ("labels", "use_cache", "output_router_logits", "completion_mask", "assistant_masks")


@dataclass
class DistillationArguments:
    """How much a pruned model learns from the full one beside its task; with both weights 0 there is no teacher.

    Parameters:
        teacher_logits_weight: Weight of the Kullback-Leibler divergence of the model's next-token distribution from
            the full model's, summed over tokens with a label and divided as the task loss is.
        teacher_hidden_weight: Weight of the distance of the hidden states behind each span from the full model's
            there: each token's mean square error relative to what the removed layers add, averaged over tokens and
            spans.
        teacher_temperature: Both distributions' temperature T; the divergence is multiplied by its square (Hinton et
            al., arXiv 1503.02531, Sec. 2).
        task_loss_weight: Weight of the task loss beside them; 0 learns from the full model alone.

    Raises:
        ValueError: If a value is out of range or has no effect; the message names field, value and fix.
    """

    teacher_logits_weight: float = option(
        0.0, "Weight of the divergence from the full model's next-token distribution."
    )
    teacher_hidden_weight: float = option(
        0.0, "Weight of the distance from its hidden states behind each removed span."
    )
    teacher_temperature: float = option(1.0, "Temperature of both distributions.")
    task_loss_weight: float = option(1.0, "Weight of the task loss beside the full model's.")

    @property
    def has_teacher(self) -> bool:
        """Whether there is anything to learn from the full model."""
        return self.teacher_logits_weight > 0 or self.teacher_hidden_weight > 0

    def check_distillation(self) -> None:
        """Checks the values; a config calls it in `__post_init__`."""
        for name in ("teacher_logits_weight", "teacher_hidden_weight", "task_loss_weight"):
            value = getattr(self, name)
            if not 0 <= value < float("inf"):
                raise ValueError(f"{name}={value} must be a number from 0 on.")
        if not 0 < self.teacher_temperature < float("inf"):
            raise ValueError(f"teacher_temperature={self.teacher_temperature} must be above 0; 1 changes nothing.")
        if self.teacher_temperature != 1 and self.teacher_logits_weight == 0:
            raise ValueError(
                f"teacher_temperature={self.teacher_temperature} has no effect without teacher_logits_weight; set "
                "that, or leave the temperature out."
            )
        if self.task_loss_weight != 1 and not self.has_teacher:
            raise ValueError(
                f"task_loss_weight={self.task_loss_weight} has no effect where there is nothing beside the task loss; "
                "set teacher_logits_weight or teacher_hidden_weight, or leave it out."
            )


@dataclass
class Seen:
    """Hidden states of one forward.

    Attributes:
        at: The first of a layer's inputs in the forward, by the layer's number.
        last: What the decoder hands to the LM head.
    """

    at: dict[int, torch.Tensor] = field(default_factory=dict)
    last: list[torch.Tensor] = field(default_factory=list)


@contextmanager
def recording(model: PreTrainedModel, numbers: Sequence[int]) -> Iterator[Seen]:
    """Records the inputs of some layers, behind what runs in front of them, and what the LM head is given.

    Of several forwards the first counts.

    Args:
        model: A causal language model, without adapters around it.
        numbers: The layers' numbers.
    """
    seen = Seen()

    def before(number: int) -> Any:
        def keep(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
            seen.at.setdefault(number, hidden_of(args, kwargs))

        return keep

    def behind(module: nn.Module, args: tuple, output: Any) -> None:
        if not seen.last:
            seen.last.append(output[0])

    layers = find_layers(model)
    with ExitStack() as hooks:
        handles = [layers[number].register_forward_pre_hook(before(number), with_kwargs=True) for number in numbers]
        for handle in (*handles, model.base_model.register_forward_hook(behind)):
            hooks.callback(handle.remove)
        yield seen


def _logits(model: PreTrainedModel, hidden_ND: torch.Tensor) -> torch.Tensor:
    logits_NV = model.get_output_embeddings()(hidden_ND).float()
    cap = model.config.get_text_config().to_dict().get("final_logit_softcapping")  # Gemma 2
    return logits_NV if cap is None else cap * torch.tanh(logits_NV / cap)


def chunked_divergence(
    student: PreTrainedModel,
    teacher: PreTrainedModel,
    hidden_ND: torch.Tensor,
    taught_ND: torch.Tensor,
    temperature: float = 1.0,
    max_logits: int = MAX_LOGITS,
) -> torch.Tensor:
    """KL(teacher || student) of the next-token distributions, summed over tokens, times the temperature squared.

    Args:
        student: Whose LM head makes logits of `hidden_ND`; both get gradients.
        teacher: Whose LM head makes logits of `taught_ND`; no gradients.
        hidden_ND: The student's last hidden states.
        taught_ND: The teacher's.
        temperature: Of both distributions.
        max_logits: Most logits of either model that exist at once.
    """

    def of_chunk(hidden: torch.Tensor, taught: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            target = F.log_softmax(_logits(teacher, taught) / temperature, dim=-1)
        found = F.log_softmax(_logits(student, hidden) / temperature, dim=-1)
        return F.kl_div(found, target.to(found.device), log_target=True, reduction="sum") * temperature**2

    size = max(1, max_logits // student.config.get_text_config().vocab_size)
    total = hidden_ND.new_zeros((), dtype=torch.float32)
    for hidden, taught in zip(hidden_ND.split(size), taught_ND.split(size), strict=True):
        total = total + checkpoint(of_chunk, hidden, taught, use_reentrant=False, preserve_rng_state=False)
    return total


def _bare_model(trainer: Any) -> Any:
    """Returns a trainer's model without what accelerate and PEFT have put around it."""
    model: Any = trainer.accelerator.unwrap_model(trainer.model)
    return model if isinstance(model, PreTrainedModel) else model.get_base_model()


def _added_loss_divisor(trainer: Any, num_items_in_batch: torch.Tensor | int | None) -> int:
    """Returns what to divide a loss by that is added to a micro-batch's task loss, as TRL does it for MoE models.

    With `num_items_in_batch` Trainer leaves the division by the accumulation steps to the loss.
    """
    steps: int = trainer.current_gradient_accumulation_steps
    return 1 if num_items_in_batch is None else steps


class TeacherMixin(TrainerBase):
    """Adds what is to be learnt from the full model to the loss of a trainer of TRL, as `DistillationArguments` say.

    The teacher runs in evaluation mode and without gradients, and is neither trained nor saved with the model; what it
    adds is logged as `teacher_divergence` (nats per token, times the temperature squared) and
    `teacher_distance`.

    Args:
        model: The pruned model.
        *args: As for the trainer.
        teacher: The full model; needed by `teacher_logits_weight` and `teacher_hidden_weight`, left as it is but for
            its mode and its device.
        removed_spans: Which of its layers are gone, as `[first, end)`.
        **kwargs: As for the trainer.

    Attributes:
        max_logits: Most logits of either model that exist at once.

    Raises:
        ValueError: If there is no teacher where one is needed, one where none is, or one of another model; or no span
            behind which to compare.
    """

    model: Any
    args: Any
    max_logits = MAX_LOGITS
    _metrics: dict[str, Any]  # TRL's

    def __init__(
        self,
        model: Any,
        *args: Any,
        teacher: PreTrainedModel | None = None,
        removed_spans: Sequence[Span] = (),
        **kwargs: Any,
    ) -> None:
        super().__init__(model, *args, **kwargs)
        is_taught = isinstance(self.args, DistillationArguments) and self.args.has_teacher
        if is_taught and teacher is None:
            raise ValueError(
                "teacher is missing, but teacher_logits_weight or teacher_hidden_weight is above 0; pass the full "
                "model, or set them to 0."
            )
        if teacher is not None and not is_taught:
            raise ValueError(
                "teacher has no effect while teacher_logits_weight and teacher_hidden_weight are 0; set one of them "
                "(HealingConfig), or leave the teacher out."
            )
        if is_taught and self.args.teacher_hidden_weight > 0 and not removed_spans:
            raise ValueError(
                f"teacher_hidden_weight={self.args.teacher_hidden_weight} compares hidden states behind "
                "removed_spans, of which there are none; name them, or set it to 0."
            )
        self._removed_spans = list(removed_spans)
        if teacher is not None:
            self._check_sizes(teacher)
        self._teacher = None if teacher is None else teacher.to(self.accelerator.device).eval()

    def _check_sizes(self, teacher: PreTrainedModel) -> None:
        model, full = (each.config.get_text_config() for each in (_bare_model(self), teacher))
        removed = sum(end - first for first, end in self._removed_spans)
        found = (full.num_hidden_layers, full.hidden_size, full.vocab_size)
        expected = (model.num_hidden_layers + removed, model.hidden_size, model.vocab_size)
        if found != expected:
            sizes = "{} layers of width {} and {} tokens"
            raise ValueError(
                f"teacher has {sizes.format(*found)}, but the model was made from one with {sizes.format(*expected)}; "
                "pass the full model, loaded anew."
            )

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Any:
        """Adds what the full model teaches to the trainer's loss."""
        if self._teacher is None or not self.model.training:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        removed = [layer for span in self._removed_spans for layer in range(*span)]
        student = _bare_model(self)
        places = {span: kept_index(span[1], removed) for span in self._removed_spans}
        with recording(student, list(places.values())) as seen:
            result: Any = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        given = {name: value for name, value in inputs.items() if name not in _NOT_FOR_DECODERS}
        bounds = sorted({layer for span in self._removed_spans for layer in span})
        with torch.no_grad(), self.accelerator.autocast(), recording(self._teacher, bounds) as taught:
            self._teacher.base_model(**given, use_cache=False)
        task_loss = result[0] if return_outputs else result
        if self.args.task_loss_weight == 0 and self.args.teacher_logits_weight > 0:
            task_loss = task_loss.detach()  # saves its backward: the divergence reaches the same weights
        loss = self.args.task_loss_weight * task_loss
        if self.args.teacher_logits_weight > 0:
            loss = loss + self.args.teacher_logits_weight * self._divergence(
                student, seen, taught, inputs["labels"], num_items_in_batch
            )
        if self.args.teacher_hidden_weight > 0:
            distances = [
                relative_distance(seen.at[places[span]], taught.at[span[1]], taught.at[span[0]], _mask(inputs))
                for span in self._removed_spans
            ]
            distance = torch.stack(distances).mean()
            self._metrics["train"]["teacher_distance"].append(distance.item())
            divisor = _added_loss_divisor(self, num_items_in_batch)
            loss = loss + self.args.teacher_hidden_weight * distance / divisor
        return (loss, result[1]) if return_outputs else loss

    def _divergence(
        self, student: Any, seen: Seen, taught: Seen, labels_BT: torch.Tensor, num_items: torch.Tensor | int | None
    ) -> torch.Tensor:
        """The divergence, divided as TRL divides the task loss."""
        assert self._teacher is not None
        counts_BT = labels_BT[:, 1:] != IGNORED_LABEL
        hidden_ND, taught_ND = (each.last[0][:, :-1][counts_BT] for each in (seen, taught))
        with self.accelerator.autocast():
            total = chunked_divergence(
                student, self._teacher, hidden_ND, taught_ND, self.args.teacher_temperature, self.max_logits
            )
        count = len(hidden_ND)
        self._metrics["train"]["teacher_divergence"].append(total.item() / max(1, count))
        mean = total / torch.as_tensor(count if num_items is None else num_items).clamp(min=1)
        if num_items is not None and self.args.average_tokens_across_devices:
            mean = mean * self.accelerator.num_processes  # which counts the tokens of all, and DDP averages
        return mean


def _mask(inputs: Mapping[str, Any]) -> torch.Tensor | None:
    mask_BT = inputs.get("attention_mask")
    return None if mask_BT is None or mask_BT.ndim != 2 else mask_BT.bool()
