"""Time of one micro-batch in each part of a model, measured with random weights, one part in memory at a time.

Shapes: B batch, T tokens, D hidden channels.
"""

import contextlib
import copy
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from peft import PeftConfig, get_peft_model
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from lopt_hf.common.settings import check_at_least, check_choice
from lopt_hf.common.upstream.trl import add_sft_head
from lopt_hf.local.embeddings import untie_output_embeddings
from lopt_hf.local.layer_calls import LayerCall, hidden_of, record_layer_calls, stop_at
from lopt_hf.local.objectives import LocalBatch, LocalObjective, ReconstructionObjective, head_of
from lopt_hf.local.readout import ReadoutObjective, model_after_the_layers
from lopt_hf.local.stacks import find_decoder_stack
from lopt_hf.pipeline.split.model_costs import ModelCosts
from lopt_hf.pipeline.split.stopwatch import LEAST_SECONDS, PartCost, Stopwatch, num_elements

__all__ = ["layer_kind", "measure_costs"]


def measure_costs(
    model: str | PretrainedConfig | PreTrainedModel,
    batch_size: int,
    seq_length: int,
    objective: str | LocalObjective = "reconstruction",
    dtype: torch.dtype = torch.float32,
    autocast: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    accumulation_steps: int = 1,
    activation_checkpointing: bool = False,
    tied_embeddings: str = "untie",
    peft_config: PeftConfig | None = None,
    make_optimizer: Callable[[Sequence[nn.Parameter]], torch.optim.Optimizer] | None = None,
    repeats: int = 5,
    least_seconds: float = LEAST_SECONDS,
) -> ModelCosts:
    """Measures the cost of each part of a causal language model in a pipeline of local learners.

    Only the configuration of the model is read. Its parts get random weights, one at a time, and are called as the
    model itself calls them; layers of the same kind and shapes are measured once. At most the embeddings, or the LM
    head, or one layer with its optimizer state is in memory. Every token counts as one with a label.

    Measure with the number of threads (`torch.set_num_threads`) and the load that the stages will run with.

    Args:
        model: Hub id or folder, configuration, or a model for its configuration.
        batch_size: Sequences of a micro-batch.
        seq_length: Tokens of a sequence.
        objective: `"reconstruction"`, `"readout"`, or a local objective.
        dtype: Data type of the weights.
        autocast: Data type of the arithmetic under autocast (the `bf16` of the training arguments); `None`: `dtype`.
        device: Where to measure.
        accumulation_steps: Micro-batches of an optimizer step.
        activation_checkpointing: Whether the layers run a second time in the backward.
        tied_embeddings: `"untie"` or `"freeze"`, see `LocalArguments`; without effect on untied models.
        peft_config: The adapter that is trained, if one is.
        make_optimizer: Makes the optimizer of given parameters. Default: fused AdamW, as transformers.
        repeats: Timed runs of each part, at least, of which the median counts. Ours: 5.
        least_seconds: Time to spend on each part, at least.

    Raises:
        ValueError: If the model is no decoder-only language model, or if an argument is out of range.
    """
    for name, value in {"batch_size": batch_size, "seq_length": seq_length, "repeats": repeats}.items():
        check_at_least(name, value, 1, "is too low")
    if isinstance(objective, str) and objective not in ("reconstruction", "readout"):
        raise ValueError(f"objective={objective!r} is unknown; choose 'reconstruction' or 'readout'.")
    check_choice("tied_embeddings", tied_embeddings, ("untie", "freeze"))
    skeleton = _skeleton(model, dtype, tied_embeddings, peft_config)
    if activation_checkpointing:
        skeleton.gradient_checkpointing_enable()
    stopwatch = Stopwatch(torch.device(device), autocast, repeats, least_seconds)
    optimizer = make_optimizer or partial(torch.optim.AdamW, fused=True)
    with torch.random.fork_rng(devices=[]), torch.enable_grad():
        bench = _Bench(skeleton, stopwatch, batch_size, seq_length)
        embeddings, calls = bench.measure_embeddings()
        layers, step_seconds = bench.measure_layers(calls, optimizer)
        head, local = bench.measure_head(objective)
    return ModelCosts(embeddings, layers, local, head, step_seconds, accumulation_steps)


def _skeleton(
    model: str | PretrainedConfig | PreTrainedModel,
    dtype: torch.dtype,
    tied_embeddings: str,
    peft_config: PeftConfig | None,
) -> PreTrainedModel:
    """The whole model without memory, on the meta device."""
    config = AutoConfig.from_pretrained(model) if isinstance(model, str) else model
    config = copy.deepcopy(config.config if isinstance(config, PreTrainedModel) else config)
    with torch.device("meta"):
        skeleton: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=dtype)
    if peft_config is not None:
        with torch.device("meta"):
            get_peft_model(skeleton, peft_config)  # puts the adapters into the skeleton, and freezes the rest
    elif tied_embeddings == "untie":
        untie_output_embeddings(skeleton)
    elif skeleton.get_output_embeddings().weight is skeleton.get_input_embeddings().weight:
        skeleton.get_output_embeddings().weight.requires_grad_(False)
    return skeleton.train()


class _Bench:
    """Gives the parts of a skeleton weights, measures them and takes the weights away again."""

    def __init__(self, skeleton: PreTrainedModel, stopwatch: Stopwatch, batch_size: int, seq_length: int) -> None:
        self.skeleton = skeleton
        self.stack = find_decoder_stack(skeleton)
        self.stopwatch = stopwatch
        vocabulary_size = skeleton.config.get_text_config(decoder=True).vocab_size
        self.tokens_BT = torch.randint(vocabulary_size, (batch_size, seq_length), device=stopwatch.device)
        self.mask_BT = torch.ones_like(self.tokens_BT)

    @contextlib.contextmanager
    def _present(self, modules: Iterable[nn.Module]) -> Iterator[list[nn.Parameter]]:
        """Gives modules random weights and true buffers on the device, and yields their trainable parameters."""
        modules = list(modules)
        for module in modules:
            module.to_empty(device=self.stopwatch.device)
            for part in module.modules():
                # What transformers itself calls for modules that it made on the meta device.
                self.skeleton._init_weights(part)
        yield [parameter for module in modules for parameter in module.parameters() if parameter.requires_grad]
        for module in modules:
            module.to("meta")
            module.zero_grad()

    def measure_embeddings(self) -> tuple[PartCost, list[LayerCall]]:
        """Times what runs before the layers; also returns how the decoder calls each of its layers."""
        with self._present(child for child in self.stack.decoder.children() if child is not self.stack.layers) as own:
            inputs = {"input_ids": self.tokens_BT, "attention_mask": self.mask_BT, "use_cache": False}
            with self.stopwatch.precision():
                calls = record_layer_calls(self.stack, (), inputs)
            self.stopwatch.run(self._before_the_first_layer, own)
            own = [parameter for parameter in own if parameter.grad is not None]  # not those after the layers
            cost = self.stopwatch.measure(self._before_the_first_layer, own)
        return cost, [calls[index] for index in range(len(self.stack.layers))]

    def _before_the_first_layer(self) -> torch.Tensor:
        with stop_at(self.stack.layers[0]) as reached:
            self.stack.decoder(input_ids=self.tokens_BT, attention_mask=self.mask_BT, use_cache=False)
        return hidden_of(*reached[0])

    def measure_layers(
        self, calls: Sequence[LayerCall], make_optimizer: Callable[[Sequence[nn.Parameter]], torch.optim.Optimizer]
    ) -> tuple[tuple[PartCost, ...], float]:
        """Times one layer of each kind, and the optimizer's step on the largest; returns the cost of every layer."""
        costs: dict[Any, PartCost] = {}
        step_seconds = 0.0
        kinds = [layer_kind(layer) for layer in self.stack.layers]
        sizes = [num_elements(p for p in layer.parameters() if p.requires_grad) for layer in self.stack.layers]
        largest = kinds[sizes.index(max(sizes))]  # of an adapter some layers may have nothing
        for layer, kind, call in zip(self.stack.layers, kinds, calls, strict=True):
            if kind in costs:
                continue
            with self._present([layer]) as own:
                costs[kind] = self.stopwatch.measure(partial(call, layer, self._random_hidden_states()), own)
                if kind == largest and own:
                    step_seconds = self.stopwatch.measure_step(make_optimizer(own), own) / num_elements(own)
        return tuple(costs[kind] for kind in kinds), step_seconds

    def measure_head(self, objective: str | LocalObjective) -> tuple[PartCost, PartCost]:
        """Times final norm, LM head and task loss as TRL's SFT trainer runs them, and the local objective."""
        modules: list[nn.Module] = []

        def take(own: nn.Module, empty: nn.Module) -> nn.Module:
            modules.append(own)
            return own

        model: Any = model_after_the_layers(self.skeleton, take)
        model.get_output_embeddings = self.skeleton.get_output_embeddings  # needs input embeddings to find it
        add_sft_head(model)
        h_BTD = self._random_hidden_states()

        def task_loss() -> torch.Tensor:
            outputs = model(inputs_embeds=h_BTD, labels=self.tokens_BT, use_cache=False, fused_lm_head=True)
            return -outputs.log_probs.sum() / self.tokens_BT.numel()

        with self._present(modules) as own:
            head = self.stopwatch.measure(task_loss, own)
            for parameter in own:
                parameter.requires_grad_(False)
            local = self._measure_objective(objective)
        return head, local

    def _measure_objective(self, objective: str | LocalObjective) -> PartCost:
        if objective == "reconstruction":
            objective = ReconstructionObjective()
        elif objective == "readout":
            objective = ReadoutObjective.from_model(self.skeleton, copy=False)
        assert not isinstance(objective, str)
        local: LocalObjective = objective
        head = head_of(local, self.stack.hidden_size).to(self.stopwatch.device)
        output_BTD, input_BTD = self._random_hidden_states(), self._random_hidden_states().detach()
        batch = LocalBatch(self.mask_BT, {"input_ids": self.tokens_BT, "labels": self.tokens_BT})
        return self.stopwatch.measure(lambda: local(head, output_BTD, input_BTD, batch), list(head.parameters()))

    def _random_hidden_states(self) -> torch.Tensor:
        shape = (*self.tokens_BT.shape, self.stack.hidden_size)
        dtype = self.skeleton.dtype
        return torch.randn(shape, device=self.stopwatch.device, dtype=dtype, requires_grad=True)


def layer_kind(layer: nn.Module) -> Any:
    """What makes two layers cost the same: modules, shapes, and every setting but the layer's own index."""
    return tuple(
        (
            name,
            type(module).__name__,
            tuple((n, tuple(p.shape), p.dtype) for n, p in module.named_parameters(recurse=False)),
            tuple(
                (key, value)
                for key, value in sorted(vars(module).items())
                if key not in ("layer_idx", "layer_id") and isinstance(value, bool | int | float | str | None)
            ),
        )
        for name, module in layer.named_modules()
    )
