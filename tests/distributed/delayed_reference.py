"""Delayed gradients in one process, as plainly as can be: whole models, whole forwards, and a list of what is late.

Block k of K learns, at an optimizer step, from the task's gradient of K - 1 - k steps ago, if that is to reach it.
"""

import contextlib
import copy
import math
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn.utils import clip_grad_norm_
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func
from trl import SFTTrainer

from lopt_hf import LoPTTrainer
from lopt_hf.local.layer_calls import hidden_of, output_hidden, with_hidden
from lopt_hf.local.stacks import find_decoder_stack


class Delayed:
    """To be mixed in before a trainer whose task loss is to train all blocks, most of them late."""

    def begin(
        self: Any,
        edges: list[int],
        recompute: bool,
        predicts: bool = False,
        reaches: Sequence[int] = (),
        rates: Sequence[float] = (),
        balance: float = 0.0,
        warmup: float | None = 0.0,
    ) -> None:
        """Prepares for training.

        Args:
            edges: The first layers of the blocks but the first.
            recompute: Whether a late backward sees the weights of its own step, or those of the forward's.
            predicts: Whether a block's forward sees its weights as they will be if each of the steps that move them
                before its gradient comes goes where Adam's moments point by now.
            reaches: For each step how many blocks, counted from the last, its gradient is for. Default: all.
            rates: The blocks' learning rates, each as a factor. Default: 1.
            warmup: Share of the steps in which late blocks' rates rise. `None`: four for each block, at most half of
                the run, and all rates are higher by the root of the factor by which that lowers their sum.
            balance: Weight of the load-balancing loss; each block has it of its own layers' routers.
        """
        self.balance = balance
        self.warmup = warmup
        self.reaches = reaches
        self.rates = rates
        stack = find_decoder_stack(self.model.get_base_model() if hasattr(self.model, "peft_config") else self.model)
        self.edges = [0, *edges, len(stack.layers)]
        self.num_blocks = len(edges) + 1
        self.recompute = recompute
        self.predicts = predicts
        self.position = 0
        self.batches: dict[tuple[int, int], dict[str, Any]] = {}
        self.inputs: dict[tuple[int, int, int], torch.Tensor] = {}  # by block, step, micro-batch
        self.cotangents: dict[tuple[int, int, int], torch.Tensor] = {}
        self.old_models: dict[int, nn.Module] = {}
        for block in range(1, self.num_blocks):
            stack.layers[self.edges[block]].register_forward_pre_hook(
                lambda layer, args, kwargs, block=block: self.cut(block, args, kwargs), with_kwargs=True
            )
        self.is_late = False

    def cut(self: Any, block: int, args: tuple, kwargs: dict) -> Any:
        if self.is_late or not self.model.training:
            return None
        self.entered[block] = hidden_of(args, kwargs).detach().requires_grad_()
        return with_hidden(args, kwargs, self.entered[block])

    def block_of(self: Any, name: str) -> int:
        """By the name of a parameter."""
        if ".layers." in name or ".h." in name:
            layer = next(int(part) for part in name.split(".") if part.isdigit())
            return max(block for block in range(self.num_blocks) if self.edges[block] <= layer)
        return 0 if "embed_tokens" in name or "wte" in name or "wpe" in name else self.num_blocks - 1

    def members(self: Any, block: int, model: nn.Module | None = None) -> dict[str, nn.Parameter]:
        named = (model or self.model).named_parameters()
        return {name: p for name, p in named if p.requires_grad and self.block_of(name) == block}

    # ---- Mixtures of experts ----

    @contextlib.contextmanager
    def routers(self: Any, block: int) -> Iterator[list[torch.Tensor]]:
        """Gathers the logits of a block's routers in a forward."""
        found: list[torch.Tensor] = []
        layers = find_decoder_stack(self.model).layers[self.edges[block] : self.edges[block + 1]]
        hooks = [
            layer.mlp.gate.register_forward_hook(lambda gate, args, output: found.append(output[0]))
            for layer in layers
            if self.balance
        ]
        yield found
        for hook in hooks:
            hook.remove()

    def balance_of(self: Any, logits: list[torch.Tensor], mask_BT: torch.Tensor) -> torch.Tensor:
        """As in end-to-end training a layer's routers weigh as much as another's."""
        config, num_layers = self.model.config, self.edges[-1]
        loss = load_balancing_loss_func(tuple(logits), config.num_experts, config.num_experts_per_tok, mask_BT)
        return self.balance * len(logits) / num_layers * loss

    def compute_loss(self: Any, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        with self.routers(self.num_blocks - 1) as logits:
            loss = super().compute_loss(model, inputs, *args, **kwargs)  # type: ignore[misc]
        if not logits:
            return loss
        return loss + self.balance_of(logits, inputs["attention_mask"]) / self.current_gradient_accumulation_steps

    # ---- Steps ----

    def training_step(self: Any, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> torch.Tensor:
        step = self.state.global_step
        self.entered: dict[int, torch.Tensor] = {}
        if self.position == 0:
            self.expected = self.expect(step) if self.predicts else {}
        now = self.exchange(self.expected)
        if self.position == 0 and not self.recompute:
            self.old_models[step] = self.whole_copy()
        self.batches[step, self.position] = {name: value for name, value in inputs.items() if name != "labels"}
        loss = super().training_step(model, inputs, *args, **kwargs)  # type: ignore[misc]
        self.exchange(now)
        for block, hidden_BTD in self.entered.items():
            self.inputs[block, step, self.position] = hidden_BTD.detach()
        last = self.num_blocks - 1
        self.cotangents[last, step, self.position] = self.entered[last].grad
        is_last = self.accelerator.sync_gradients
        for block in range(last):
            self.learn_late(block, step - (last - block), self.position, is_last)
        self.position = 0 if is_last else self.position + 1
        return loss

    def expect(self: Any, step: int) -> dict[str, torch.Tensor]:
        """The early blocks' weights of the step in which they learn from the one that begins."""
        expected = {}
        scheduler, states = self.lr_scheduler, self.optimizer.state
        index_of = {id(p): index for index, group in enumerate(self.optimizer.param_groups) for p in group["params"]}
        for block in range(self.num_blocks - 1):
            late = self.num_blocks - 1 - block
            comes = [at for at in range(max(0, step - late), step + 1) if not self.reaches or self.reaches[at] > late]
            moves = [at + late for at in comes[:-1]] if comes and comes[-1] == step else []
            for name, parameter in self.members(block).items():
                if not states.get(parameter) or not moves:
                    continue
                index, state = index_of[id(parameter)], states[parameter]
                distance = sum(scheduler.base_lrs[index] * scheduler.lr_lambdas[index](at) for at in moves)
                (beta1, beta2), count = self.optimizer.param_groups[index]["betas"], state["step"].item()
                mean, square = state["exp_avg"] / (1 - beta1**count), state["exp_avg_sq"] / (1 - beta2**count)
                expected[name] = parameter.detach() - distance * (mean / (square.sqrt() + self.args.adam_epsilon))
        return expected

    def exchange(self: Any, weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Gives the model weights, by reference; returns those that it had."""
        parameters = dict(self.model.named_parameters())
        had = {name: parameters[name].data for name in weights}
        for name, weight in weights.items():
            parameters[name].data = weight
        return had

    def whole_copy(self: Any) -> nn.Module:
        hooks = [(layer, layer._forward_pre_hooks, layer._forward_hooks) for layer in self.model.modules()]
        for layer, *_ in hooks:
            layer._forward_pre_hooks, layer._forward_hooks = OrderedDict(), OrderedDict()
        try:
            return copy.deepcopy(self.model)
        finally:
            for layer, before, behind in hooks:
                layer._forward_pre_hooks, layer._forward_hooks = before, behind

    def learn_late(self: Any, block: int, step: int, position: int, takes_rest: bool) -> None:
        if self.reaches and step >= 0 and self.num_blocks - block > self.reaches[step]:
            return
        there = sorted(at for from_step, at in self.batches if from_step == step)
        for at in there:
            if at == position or (takes_rest and at > position):
                self.learn_from(block, step, at)

    def learn_from(self: Any, block: int, step: int, position: int) -> None:
        model = self.model if self.recompute else self.old_models[step]
        model.zero_grad() if model is not self.model else None
        base = model.get_base_model() if hasattr(model, "peft_config") else model
        layers = find_decoder_stack(base).layers
        hidden_BTD, outputs = self.inputs.get((block, step, position)), []
        if hidden_BTD is not None:
            hidden_BTD.requires_grad_()
        handles = [
            layers[self.edges[block]].register_forward_pre_hook(
                lambda layer, args, kwargs: None if hidden_BTD is None else with_hidden(args, kwargs, hidden_BTD),
                with_kwargs=True,
            ),
            layers[self.edges[block + 1] - 1].register_forward_hook(
                lambda layer, args, output: outputs.append(output_hidden(output)), prepend=True
            ),
        ]
        self.is_late = True
        with self.accelerator.autocast(), self.routers(block) as logits:
            base.base_model(**self.batches[step, position], use_cache=False)
        self.is_late = False
        for handle in handles:
            handle.remove()
        roots, gradients = [outputs[0]], [self.cotangents[block + 1, step, position]]
        if logits:
            roots.append(self.balance_of(logits, self.batches[step, position]["attention_mask"]))
            steps = 1 + max(at for from_step, at in self.batches if from_step == step)
            gradients.append(torch.full_like(roots[-1], 1 / steps))
        torch.autograd.backward(roots, gradients)
        if hidden_BTD is not None:
            self.cotangents[block, step, position] = hidden_BTD.grad
        if model is not self.model:
            for (_, own), (_, old) in zip(
                self.members(block).items(), self.members(block, model).items(), strict=True
            ):
                if old.grad is not None:
                    own.grad = old.grad.clone() if own.grad is None else own.grad + old.grad

    def finish(self: Any) -> None:
        """Learns from what is left."""
        last, end = self.num_blocks - 1, self.state.global_step
        self.position = 0
        for step in range(end, end + last):
            self.model.zero_grad()
            for head in getattr(self, "local_heads", {}).values():
                head.zero_grad()
            for block in range(last):
                if step - (last - block) < end:
                    self.learn_late(block, step - (last - block), 0, True)
            self._clip_grad_norm(self.model)
            self.optimizer.step()
            self.lr_scheduler.step()

    # ---- What each block has for itself ----

    def _clip_grad_norm(self: Any, model: nn.Module) -> torch.Tensor:
        heads = getattr(self, "local_heads", {})
        norms = []
        for block in range(self.num_blocks):
            own = [*self.members(block).values()]
            own += list(heads[str(block)].parameters()) if str(block) in heads else []
            norms.append(clip_grad_norm_(own, self.args.max_grad_norm or math.inf))
        return torch.stack(norms).norm()

    def create_optimizer(self: Any, *args: Any, **kwargs: Any) -> Any:
        optimizer = super().create_optimizer(*args, **kwargs)  # type: ignore[misc]
        block_of = {id(p): block for block in range(self.num_blocks) for p in self.members(block).values()}
        for index, head in getattr(self, "local_heads", {}).items():
            block_of |= {id(p): int(index) for p in head.parameters()}
        groups = optimizer.param_groups
        self.group_blocks = [block for _ in groups for block in range(self.num_blocks)]
        rates = self.rates or [1.0] * self.num_blocks
        optimizer.param_groups = [
            {
                **group,
                "params": [p for p in group["params"] if block_of[id(p)] == block],
                "lr": group["lr"] * rates[block],
            }
            for group in groups
            for block in range(self.num_blocks)
        ]
        return optimizer

    def create_scheduler(self: Any, *args: Any, **kwargs: Any) -> Any:
        scheduler = super().create_scheduler(*args, **kwargs)  # type: ignore[misc]
        (factor, *_) = scheduler.lr_lambdas
        steps = range(self.args.max_steps)
        end = min(4 * self.num_blocks, len(steps) // 2) if self.warmup is None else math.ceil(len(steps) * self.warmup)

        def lower(own: int, late: int) -> float:
            return (1 + late) ** -(1 - own / end if own < end else 0.0)

        def rate(step: int, late: int) -> float:
            own = max(step - late, 0)
            whole, lowered = sum(map(factor, steps)), sum(factor(at) * lower(at, late) for at in steps)
            made_up = math.sqrt(whole / lowered) if self.warmup is None and lowered else 1.0
            return factor(own) * lower(own, late) * made_up

        scheduler.lr_lambdas = [partial(rate, late=self.num_blocks - 1 - block) for block in self.group_blocks]
        return scheduler


class DelayedTrainer(Delayed, SFTTrainer):
    """The task's gradient alone."""


class LocalAndDelayedTrainer(Delayed, LoPTTrainer):
    """With the blocks' local losses at once."""
