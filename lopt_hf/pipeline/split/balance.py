"""The cut of a model into stages whose slowest stage is the fastest possible.

```python
costs = measure_costs("HuggingFaceTB/SmolLM2-135M-Instruct", batch_size=2, seq_length=128)
split_at = balanced_split(costs, num_stages=2)
print(format_split(costs, split_at))
```
"""

import math
import operator
from collections.abc import Callable, Mapping, Sequence

from lopt_hf.common.tables import markdown_table
from lopt_hf.pipeline.split.model_costs import ModelCosts, StageCost

__all__ = ["balanced_split", "format_split", "stage_costs"]

COLUMNS = ("forward", "backward", "local", "optimizer", "total")


def balanced_split(costs: ModelCosts, num_stages: int, least_layers: int = 1) -> list[int]:
    """Finds the cut whose slowest stage is the fastest possible, and of such cuts the most even one.

    Exact, by dynamic programming over contiguous cuts: the embeddings are on the first stage, a local objective on
    each but the last, norm, LM head and task loss on the last. All stages work at the same time, so the slowest one
    sets the pace of the pipeline.

    Args:
        costs: Costs of the model's parts.
        num_stages: Number of stages.
        least_layers: Layers that each stage has at least.

    Returns:
        The first layer of every stage but the first: `split_at` of `LoPTConfig`.

    Raises:
        ValueError: If there are too many stages for the layers.
    """
    num_layers = len(costs.layers)
    most_stages = num_layers // least_layers
    if not 1 <= num_stages <= most_stages:
        raise ValueError(
            f"num_stages={num_stages} does not fit a model with {num_layers} layers; choose a number from 1 "
            f"to {most_stages}."
        )
    seconds = [
        {
            (start, stop): costs.stage(start, stop, delay).total if stop - start >= least_layers else math.inf
            for start in range(num_layers)
            for stop in range(start + 1, num_layers + 1)
        }
        for delay in reversed(range(num_stages))
    ]
    pace, _ = _best_cut(seconds, num_layers, max)
    squares = [{part: s**2 if s <= pace else math.inf for part, s in stage.items()} for stage in seconds]
    _, split_at = _best_cut(squares, num_layers, operator.add)
    return split_at


def _best_cut(
    charges: Sequence[Mapping[tuple[int, int], float]], num_layers: int, combine: Callable[[float, float], float]
) -> tuple[float, list[int]]:
    """Finds the cut with the least combined charge; what each stage is charged is given by first layer and end."""
    best = {stop: (charges[0][0, stop], [0]) for stop in range(1, num_layers + 1)}
    for stage in range(1, len(charges)):
        best = {
            stop: min(
                (combine(best[start][0], charges[stage][start, stop]), [*best[start][1], start])
                for start in range(stage, stop)
            )
            for stop in range(stage + 1, num_layers + 1)
        }
    charge, starts = best[num_layers]
    return charge, starts[1:]


def stage_costs(costs: ModelCosts, split_at: Sequence[int]) -> list[StageCost]:
    """Returns the cost of each stage of a cut.

    Args:
        costs: Costs of the model's parts.
        split_at: The first layer of every stage but the first.
    """
    edges = [0, *split_at, len(costs.layers)]
    delays = reversed(range(len(edges) - 1))
    return [costs.stage(*stage) for stage in zip(edges[:-1], edges[1:], delays, strict=True)]


def format_split(costs: ModelCosts, split_at: Sequence[int]) -> str:
    """Returns a Markdown table of the cost of each stage of a cut, in milliseconds per micro-batch."""
    stages = stage_costs(costs, split_at)
    slowest = max(stage.total for stage in stages)
    titles = ("stage", "layers", *(f"{name} (ms)" for name in COLUMNS), "of slowest")
    rows = []
    for index, stage in enumerate(stages):
        milliseconds = (f"{1e3 * getattr(stage, name):,.1f}" for name in COLUMNS)
        cells = [str(index), f"{stage.start}-{stage.stop - 1}", *milliseconds]
        rows.append([*cells, f"{stage.total / slowest:.0%}"])
    return markdown_table(titles, rows, text_columns=(1,))
