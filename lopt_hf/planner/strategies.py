"""The ways to train that a plan compares: each is a row, described by data."""

from dataclasses import dataclass

__all__ = ["STRATEGIES", "Strategy", "make_strategies"]

REPL_EVERY = 4  # RepL, arXiv 2605.19533: every 4th layer
STRATEGIES = ("e2e", "lopt", "freeze", "lora", "repl", "ppll", "joint")
DEFAULT_STRATEGIES = STRATEGIES[:-1]


@dataclass(frozen=True)
class Strategy:
    """One row of a plan.

    Attributes:
        name: Of the row.
        method: One of `STRATEGIES`. `"joint"` is LoPT as its released code runs it: one backward for all losses.
        num_blocks: Blocks of the decoder; 1 without boundaries.
        checkpointing: Whether activations are recomputed in the backward.
        num_stages: Devices that share one copy of the model.
    """

    name: str
    method: str
    num_blocks: int = 1
    checkpointing: bool = False
    num_stages: int = 1

    @property
    def trains_all(self) -> bool:
        """Whether it updates every weight of the unchanged model."""
        return self.method not in ("freeze", "lora", "repl")


def make_strategies(
    methods: tuple[str, ...], num_blocks: tuple[int, ...], num_layers: int, num_gpus: int, lora_rank: int
) -> list[Strategy]:
    """The rows of a plan, in order.

    Args:
        methods: Any of `STRATEGIES`.
        num_blocks: Blocks of the LoPT rows; freezing takes the first. Those above `num_layers` are left out.
        num_layers: Decoder layers of the model.
        num_gpus: Devices; the pipeline takes all of them, at most one per layer, and needs two.
        lora_rank: Rank of the adapters.
    """
    cuts = [blocks for blocks in num_blocks if blocks <= num_layers]
    rows: list[Strategy] = []

    def add(name: str, method: str, blocks: int = 1, stages: int = 1) -> None:
        rows.append(Strategy(name, method, blocks, False, stages))
        rows.append(Strategy(f"{name} + checkpointing", method, blocks, True, stages))

    if "e2e" in methods:
        add("end-to-end", "e2e")
    for blocks in cuts:
        if "lopt" in methods:
            add(f"LoPT K={blocks}", "lopt", blocks)
        if "joint" in methods:
            add(f"LoPT K={blocks}, joint", "joint", blocks)
    if "freeze" in methods and cuts:
        add(f"freeze 1 of {cuts[0]} blocks" if cuts[0] == 2 else f"freeze {cuts[0] - 1} of {cuts[0]} blocks", "freeze", cuts[0])
    if "lora" in methods:
        add(f"LoRA r={lora_rank}", "lora")
    if "repl" in methods and num_layers > REPL_EVERY:
        add(f"RepL, every {REPL_EVERY}th layer", "repl")
    stages = min(num_gpus, num_layers)
    if "ppll" in methods and stages > 1:
        add(f"PPLL on {stages} devices", "ppll", stages, stages)
    return rows
