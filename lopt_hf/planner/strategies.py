"""The ways to train that a plan compares: each is a row, described by data."""

from dataclasses import dataclass, replace

from transformers import PretrainedConfig

from lopt_hf.common.compared_methods import PEERS, REPL_EVERY, method_arguments, reach_cycle, row_label
from lopt_hf.local.arguments import LocalArguments
from lopt_hf.local.methods.lopt import LoPTArguments
from lopt_hf.local.methods.mlaan.method import MLAANArguments
from lopt_hf.local.vision import num_deepstack_layers
from lopt_hf.repl.neighbours import check_family

__all__ = ["STRATEGIES", "Strategy", "make_strategies"]

END_TO_END = "end-to-end"
DEFAULT_STRATEGIES = ("e2e", "reach", "lopt", "lopt_local_step", "mlaan", "freeze", "lora", "repl", "ppll")
STRATEGIES = (*DEFAULT_STRATEGIES, "reach_local_step", "joint", *PEERS)


@dataclass(frozen=True)
class Strategy:
    """One row of a plan.

    Attributes:
        name: Of the row.
        method: One of `STRATEGIES`. `"joint"` is LoPT as its released code runs it: one backward for all losses.
        num_blocks: Blocks of the decoder; 1 without boundaries.
        checkpointing: Whether activations are recomputed in the backward.
        num_stages: Devices that share one copy of the model.
        task_reach: Blocks, counted from the last, that the task's gradient reaches, over a cycle of steps; over a run
            they cost the same.
        settings: Arguments of another method of local learning, whose row this is.
        freezes_embeddings: Whether it freezes an embedding that the LM head shares.
        unties_embeddings: Whether it gives an LM head that shares the embedding a copy of its own.
    """

    name: str
    method: str
    num_blocks: int = 1
    checkpointing: bool = False
    num_stages: int = 1
    task_reach: tuple[int, ...] = (1,)
    settings: LocalArguments | None = None
    freezes_embeddings: bool = False
    unties_embeddings: bool = False

    @property
    def is_peer(self) -> bool:
        """Whether a callback of a stock trainer makes it, see `lopt_hf.peers`."""
        return self.method in PEERS

    def local_arguments(self, tied_embeddings: str) -> LocalArguments | None:
        """The arguments of the row's method of local learning; `None` where one loss trains the model.

        Args:
            tied_embeddings: See `LocalArguments`.
        """
        if self.settings is not None or self.num_blocks == 1 or self.is_peer:
            return self.settings
        kind = MLAANArguments if self.method == "mlaan" else LoPTArguments
        method = "lopt" if self.method == "ppll" else self.method
        arguments = method_arguments(method, self.num_blocks, self.task_reach)
        return kind(num_blocks=self.num_blocks, tied_embeddings=tied_embeddings, **arguments)

    @property
    def trains_layers(self) -> bool:
        """Whether it updates every weight of the unchanged model's layers."""
        return self.method not in ("freeze", "freeze_last", "badam", "lora", "repl")

    @property
    def trains_all(self) -> bool:
        """Whether it updates every weight of the unchanged model."""
        return self.trains_layers and not self.freezes_embeddings


def make_strategies(
    methods: tuple[str, ...],
    num_blocks: tuple[int, ...],
    config: PretrainedConfig,
    num_gpus: int = 1,
    lora_rank: int = 16,
    accumulation_steps: int = 1,
    task_reach: tuple[int, ...] | None = None,
    tied_embeddings: str = "untie",
) -> tuple[list[Strategy], list[str]]:
    """The rows of a plan, each without and with activation checkpointing where it leaves a choice, in order.

    Args:
        methods: Any of `STRATEGIES`.
        num_blocks: Blocks of the LoPT and MLAAN rows; freezing takes the first.
        config: Configuration of the model.
        num_gpus: Devices; the pipeline takes all of them, at most one per layer, and needs two.
        lora_rank: Rank of the adapters.
        accumulation_steps: Micro-batches of an optimizer step; one that steps in the backward has no second.
        task_reach: Cycle of the reach rows, which have as many blocks as it reaches. Default: see `reach_cycle`.
        tied_embeddings: See `LocalArguments`.

    Returns:
        The rows, and why others are left out.
    """
    num_layers = config.get_text_config(decoder=True).num_hidden_layers
    cuts = [blocks for blocks in num_blocks if blocks <= num_layers]
    stages = min(num_gpus, num_layers)
    left_out = [f"K={blocks}: the model has {num_layers} layers." for blocks in num_blocks if blocks not in cuts]
    for kind, misfit in _vision_misfits(config).items():
        if any(method.startswith(kind) for method in methods) and (kind != "ppll" or stages > 1):
            left_out.append(misfit)
            methods = tuple(method for method in methods if not method.startswith(kind))
    is_tied = getattr(config, "tie_word_embeddings", False)
    rows: list[Strategy] = []

    def add(name: str, method: str, blocks: int = 1, stages: int = 1, reach: tuple[int, ...] = (1,)) -> None:
        row = Strategy(name, method, blocks, False, stages, reach)
        if is_tied and row.local_arguments(tied_embeddings) is not None:
            freezes = tied_embeddings == "freeze"
            row = replace(row, freezes_embeddings=freezes, unties_embeddings=not freezes)
        rows.append(row)
        if method != "e2e_segments":
            rows.append(replace(row, name=f"{name} + checkpointing", checkpointing=True))

    if "e2e" in methods:
        add(END_TO_END, "e2e")
    for method in ("e2e_segments", "lopt", "lopt_local_step", "joint"):
        if method in methods:
            for blocks in cuts:
                add(row_label(method, blocks), method, blocks)
    for method in ("reach", "reach_local_step"):
        for blocks in cuts:
            cycle = reach_cycle(blocks, task_reach)
            if method in methods and max(cycle) == blocks:
                add(row_label(method, blocks, task_reach=cycle), method, blocks, reach=cycle)
    if "mlaan" in methods:
        for blocks in cuts:
            add(row_label("mlaan", blocks), "mlaan", blocks)
    if "freeze" in methods and cuts:
        add(f"freeze {cuts[0] - 1} of {cuts[0]} blocks", "freeze", cuts[0])
    for method in ("freeze_last", "e2e_step_in_backward", "lisa", "badam"):
        if method in methods and cuts:
            add(row_label(method, cuts[0]), method, cuts[0] if method == "freeze_last" else 1)
    if "lora" in methods:
        add(row_label("lora", rank=lora_rank), "lora")
    if "repl" in methods:
        reason = _why_not_repl(config, num_layers)
        if reason is None:
            add(row_label("repl"), "repl")
        else:
            left_out.append(f"RepL: {reason}")
    if "ppll" in methods and stages > 1:
        add(f"PPLL on {stages} devices", "ppll", stages, stages)
    alone = [row.name for row in rows if row.is_peer and row.method != "freeze_last" and num_gpus > 1]
    left_out += [f"{name}: it trains in one process, on one device." for name in alone]
    stepping = [row.name for row in rows if row.method == "e2e_step_in_backward" and accumulation_steps > 1]
    left_out += [f"{name}: a second micro-batch would find no gradients to add to." for name in stepping]
    return [row for row in rows if row.name not in (*alone, *stepping)], left_out


def _vision_misfits(config: PretrainedConfig) -> dict[str, str]:
    """What a vision-language model cannot be trained by, as the learner and the pipeline say, with the reasons."""
    if config.get_text_config(decoder=True) is config:
        return {}
    misfits = {"ppll": "PPLL: no stage of a pipeline would hold the vision tower."}
    if num_deepstack_layers(config):
        misfits["reach"] = (
            "reach: image features come in behind the first layers, which needs reach_recompute=False, and the rows "
            "run blocks again."
        )
    return misfits


def _why_not_repl(config: PretrainedConfig, num_layers: int) -> str | None:
    if num_layers <= REPL_EVERY:
        return f"the model has {num_layers} layers."
    try:
        check_family(config)
    except ValueError as error:
        return str(error)
    return None
