"""What a model's parts cost where early blocks learn through MLAAN's auxiliaries."""

from dataclasses import replace

from lopt_hf.local.blocks import Block
from lopt_hf.local.methods.mlaan.leaps import even_leaps, leap_counts
from lopt_hf.pipeline.split.model_costs import ModelCosts
from lopt_hf.pipeline.split.stopwatch import PartCost
from lopt_hf.trainers.configs import MLAANConfig

__all__ = ["with_auxiliaries"]


def with_auxiliaries(costs: ModelCosts, args: MLAANConfig) -> ModelCosts:
    """What a model's parts cost where early blocks learn by MLAAN; translators and averages are left out.

    Args:
        costs: The costs with the objective `"readout"`.
        args: Training arguments.
    """
    num_layers = len(costs.layers)
    num_losses = 2 if args.independent_weight else 1
    recomputes = args.auxiliary_checkpointing and not args.activation_checkpointing  # whose costs have it already

    def objective(stop: int) -> PartCost:
        (count,) = leap_counts([Block(0, 0, stop), Block(1, stop, num_layers)], args.leap_share)
        leapt = [costs.layers[index] for index in even_leaps(stop, num_layers, count)]
        return PartCost(
            forward=sum(layer.forward for layer in leapt) + num_losses * costs.objective.forward,
            backward=sum(layer.backward + recomputes * layer.forward for layer in leapt)
            + num_losses * costs.objective.backward,
            num_trainable=sum(layer.num_trainable for layer in leapt),
        )

    return replace(costs, objectives={stop: objective(stop) for stop in range(1, num_layers)})
