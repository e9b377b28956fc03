"""The peers by their names in the benches, with their options as those of a command."""

from dataclasses import dataclass

from peft import OSFConfig
from trl import SFTConfig

from lopt_hf.common.arithmetic import fit_to_machine
from lopt_hf.common.settings import check_choice, check_left_out, check_lowest, option
from lopt_hf.common.training_numbers import check_training_numbers
from lopt_hf.peers.base import Peer
from lopt_hf.peers.freezing import FreezeLast
from lopt_hf.peers.layer_switching import BADAM_PERIOD, LISA, LISA_LAYERS, LISA_PERIOD, BAdam
from lopt_hf.peers.segments import CheckpointSegments
from lopt_hf.peers.step_in_backward import StepInBackward

__all__ = ["PeerArguments", "PeerConfig"]

OSF_EFFECTIVE_RANK = 0.5  # PEFT's default

_LOWEST = {"num_blocks": 2, "lisa_layers": 1, "lisa_period": 1, "badam_period": 1}


# Which options a method has
_OPTIONS = {
    "osf": ("osf_effective_rank",),
    "lisa": ("lisa_layers", "lisa_period"),
    "badam": ("badam_period",),
    "freeze_last": ("num_blocks", "split_at"),
    "e2e_segments": ("num_blocks", "split_at"),
}


@dataclass
class PeerArguments:
    """Options of the peers.

    Parameters:
        num_blocks: Blocks of `freeze_last`, of which the first is trained, and segments of `e2e_segments`.
        split_at: First layer of every block but the first, instead of an even split.
        lisa_layers: Layers that LISA trains at a time, besides embeddings, last norm and LM head.
        lisa_period: Optimizer steps after which LISA draws other layers.
        badam_period: Optimizer steps that BAdam trains a layer for.
        osf_effective_rank: Share of each matrix's singular directions, the largest, that OSF leaves as they are.
    """

    num_blocks: int = option(2, "Blocks of freeze_last, which trains the first, or segments of e2e_segments.")
    split_at: list[int] | None = option(None, "First layer of every block but the first, instead of an even split.")
    lisa_layers: int = option(LISA_LAYERS, "Layers that LISA trains at a time (paper, Tab. 1: 2 of E+H+2L).")
    lisa_period: int = option(LISA_PERIOD, "Optimizer steps from one draw of LISA's layers to the next (code: 20).")
    badam_period: int = option(BADAM_PERIOD, "Optimizer steps that BAdam trains a layer for (its README: 100).")
    osf_effective_rank: float = option(
        OSF_EFFECTIVE_RANK,
        "Share of each matrix's singular directions, the largest, that OSF leaves as they are (PEFT: half).",
    )

    def check_peers(self) -> None:
        """Checks the values alone.

        Raises:
            ValueError: If one is out of range; the message names field, value and fix.
        """
        check_lowest(self, _LOWEST)
        if not 0 < self.osf_effective_rank < 1:
            raise ValueError(
                f"osf_effective_rank={self.osf_effective_rank} is no share of the directions; give one between 0 and "
                "1, such as 0.5."
            )

    def check_unused(self, method: str) -> None:
        """Checks that the options of other methods than the one that trains are left out.

        Args:
            method: One of `PEERS`, or `"osf"`.

        Raises:
            ValueError: If one has another value than its default.
        """
        own = _OPTIONS.get(method, ())
        for other, names in _OPTIONS.items():
            unused = [name for name in names if name not in own]
            check_left_out(self, unused, f"is an option of method {other!r}, and method={method!r}; leave it out.")

    def make_osf_config(self) -> OSFConfig:
        """Makes PEFT's configuration of orthogonal subspace fine-tuning (https://huggingface.co/papers/2504.07097).

        All linear layers of the decoder are trained, each orthogonally to its largest singular directions.
        """
        return OSFConfig(
            task_type="CAUSAL_LM", target_modules="all-linear", effective_rank=float(self.osf_effective_rank)
        )

    def make_peer(self, method: str) -> Peer:
        """Makes the callback of a method.

        Args:
            method: One of `PEERS`.

        Raises:
            ValueError: If there is no such method.
        """
        makers = {
            "e2e_segments": lambda: CheckpointSegments(self.num_blocks, self.split_at),
            "e2e_step_in_backward": StepInBackward,
            "freeze_last": lambda: FreezeLast(self.num_blocks, self.split_at),
            "lisa": lambda: LISA(self.lisa_layers, self.lisa_period),
            "badam": lambda: BAdam(self.badam_period),
        }
        check_choice("method", method, list(makers))
        return makers[method]()


@dataclass
class PeerConfig(PeerArguments, SFTConfig):
    """Every argument of [`~trl.SFTConfig`] and the options of the peers.

    On a machine without an accelerator `use_cpu` is set, and `bf16`, where nobody has said, is the faster of the two
    types.

    Raises:
        ValueError: If a value is out of range; the message names field, value and fix.
    """

    def __post_init__(self) -> None:
        self.check_peers()
        check_training_numbers(self)
        fit_to_machine(self)
        super().__post_init__()
