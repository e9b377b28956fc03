"""The gradients of a step by torch alone: TRL's loss on a stock model, plain hooks, and the formula of the paper."""

import copy
from typing import Any

import torch
from torch import nn


def block_gradients(stock: Any, trainer: Any, seed: int = 0) -> dict[str, torch.Tensor | None]:
    """For each trained parameter the gradient that its block's loss has in the graph of an end-to-end model.

    Args:
        stock: TRL's trainer of a model like that of `trainer`, with a whole graph and a head of its own.
        trainer: LoPT's, for blocks and heads; its model does not run.
        seed: Of the order of the rows, as it was before `one_step_gradients(trainer)`.
    """
    path = {id(module): name for name, module in trainer.model.named_modules()}[id(trainer.stack.layers)]
    inputs: dict[int, torch.Tensor] = {}
    outputs: dict[int, torch.Tensor] = {}

    def watch(index: int, layer: nn.Module) -> None:
        def keep(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            inputs[index] = args[0] if args else kwargs["hidden_states"]
            outputs[index] = output[0] if isinstance(output, tuple | list) else output

        layer.register_forward_hook(keep, with_kwargs=True)

    for index, layer in enumerate(stock.model.get_submodule(path)):
        watch(index, layer)
    stock.model.train()
    stock.current_gradient_accumulation_steps = 1
    torch.manual_seed(seed)
    batch = stock._prepare_inputs(next(iter(stock.get_train_dataloader())))
    loss = stock.compute_loss(stock.model, batch)
    parameters = dict(stock.model.named_parameters(remove_duplicate=False))
    gradients: dict[str, torch.Tensor | None] = {}
    for block, owned in zip(trainer.blocks, trainer.learner.owned(), strict=True):
        objective = loss
        if block.index < len(trainer.blocks) - 1:
            head = copy.deepcopy(trainer.local_heads[str(block.index)])
            error = head(outputs[block.stop - 1]) - inputs[block.start].detach().float()
            objective = 10 / (len(trainer.blocks) - 1) * error[batch["attention_mask"].bool()].square().mean()
        names = [name for name, parameter in owned.items() if parameter.requires_grad]
        own = [parameters[name] for name in names]
        gradients.update(
            zip(names, torch.autograd.grad(objective, own, retain_graph=True, allow_unused=True), strict=True)
        )
    return gradients


def assert_gradients(found: dict[str, torch.Tensor | None], expected: dict[str, torch.Tensor | None]) -> None:
    """Raises unless these are the gradients that were expected, where none is as good as zero."""
    assert any(gradient is not None and gradient.any() for gradient in expected.values())
    for name, gradient in expected.items():
        if gradient is None:
            assert found[name] is None or not found[name].any(), name
        else:
            torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")
