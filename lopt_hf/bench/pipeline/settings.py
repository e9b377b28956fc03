"""What `lopt-hf bench pipeline` measures: the settings."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from lopt_hf.bench.processes import MALLOC, MALLOC_HELP
from lopt_hf.common.architectures import ARCHITECTURES
from lopt_hf.common.arithmetic import DTYPE_HELP, read_dtype
from lopt_hf.common.settings import check_at_least, check_choices, check_distinct, check_lowest, option
from lopt_hf.pipeline.simulator.schedule_orders import SCHEDULES as SIMULATED
from lopt_hf.pipeline.simulator.schedule_orders import check_microbatches

__all__ = [
    "DEFAULT_METHODS",
    "DELAYED",
    "METHODS",
    "PPLL",
    "SCHEDULES",
    "TWO_STAGES_PER_RANK",
    "BenchSettings",
    "ImagePipelineBenchSettings",
    "PipelineBenchSettings",
]

METHODS = {
    "lopt": "one process, local learning",
    "local": "one process, local learning",
    "ppll": "PPLL",
    "gpipe": "GPipe, end-to-end",
    "1f1b": "1F1B, end-to-end",
    "e2e": "one process, end-to-end",
    "ppll_delayed": "PPLL, delayed gradient",
    "ppll_delayed_graph": "PPLL, delayed gradient, graph kept",
    "interleaved": "interleaved 1F1B, end-to-end",
    "interleaved_zb": "interleaved zero bubble, end-to-end",
    "zbv": "ZB-V, end-to-end",
    "dualpipev": "DualPipeV, end-to-end",
}
DEFAULT_METHODS = ("lopt", "ppll", "gpipe", "1f1b", "e2e")
LANGUAGE_METHODS = tuple(name for name in METHODS if name != "local")
IMAGE_METHODS = tuple(name for name in METHODS if name != "lopt")
DELAYED = ("ppll_delayed", "ppll_delayed_graph")
PPLL = ("ppll", *DELAYED)
TWO_STAGES_PER_RANK = tuple(name for name, schedule in SIMULATED.items() if schedule.stages_per_rank() == 2)
SCHEDULES = ("gpipe", "1f1b", *TWO_STAGES_PER_RANK)  # torch's; each computes the gradients of `e2e`
_CHOICES: dict[str, tuple[str, ...]] = {
    "split": ("auto", "even"),
    "malloc": tuple(MALLOC),
}
_SMALLEST = {
    "stages": 2,
    "microbatches": 1,
    "micro_batch_size": 1,
    "steps": 1,
    "warmup": 1,
    "rounds": 1,
    "threads": 1,
    "seed": 0,
}


@dataclass(frozen=True)
class BenchSettings:
    """What `run_pipeline_bench` measures, whatever the models are.

    Raises:
        ValueError: If a value is out of range; the message names field, value and fix.
    """

    unit: ClassVar[str] = ""  # what is counted per second
    one_process: ClassVar[str] = ""  # the method that is the same local learning in one process
    choices: ClassVar[Mapping[str, tuple[str, ...]]] = {}

    methods: tuple[str, ...] = ()
    stages: int = option(2, "Processes of a pipeline; the local learning has as many blocks.")
    microbatches: int = option(4, "Micro-batches of an optimizer step.")
    micro_batch_size: int = 1
    objective: str = ""
    split: str = option("auto", "auto: so that the slowest stage is as fast as can be, measured; even: by layers.")
    split_at: tuple[int, ...] | None = option(None, "First layer of every stage but the first; wins over --split.")
    steps: int = option(3, "Timed steps per method and round.")
    warmup: int = option(2, "Untimed steps before them; the last of them counts the saved bytes.")
    rounds: int = option(2, "How often the methods take turns, each time in new processes.")
    dtype: str = option("auto", f"{DTYPE_HELP} The weights are float32.")
    malloc: str = option("keep", MALLOC_HELP)
    threads: int = option(1, "CPU threads per process.")
    seed: int = option(0, "Seed of the data order and of new weights.")

    def __post_init__(self) -> None:
        object.__setattr__(self, "dtype", read_dtype(self.dtype))
        check_lowest(self, _SMALLEST)
        check_choices(self, {**_CHOICES, **self.choices})
        check_distinct("methods", self.methods)
        for method in self.methods:
            if method in SCHEDULES:  # what torch would say in a process of each round
                check_microbatches(method, self.stages, self.microbatches, by_torch=True)
        delayed = [method for method in self.methods if method in DELAYED]
        if delayed and self.warmup < self.stages:
            raise ValueError(
                f"warmup={self.warmup}: the first stage of {delayed[0]} has its first gradient in step {self.stages}; "
                f"set it to {self.stages} or more."
            )
        if self.split_at is not None and len(self.split_at) != self.stages - 1:
            raise ValueError(f"split_at={self.split_at} must have stages - 1 = {self.stages - 1} layers.")

    @property
    def parts_per_stage(self) -> int:
        """Parts into which each stage of the cut is divided: two if any schedule has two stages on a rank."""
        return 2 if set(self.methods) & set(TWO_STAGES_PER_RANK) else 1

    @property
    def batch_size(self) -> int:
        """Sequences or images of an optimizer step."""
        return self.microbatches * self.micro_batch_size

    @property
    def environment(self) -> dict[str, str]:
        """Variables of every process that is measured."""
        return {"OMP_NUM_THREADS": str(self.threads)} | MALLOC[self.malloc]

    @property
    def units_per_step(self) -> int:
        """How many of `unit` an optimizer step has."""
        return self.batch_size


@dataclass(frozen=True)
class PipelineBenchSettings(BenchSettings):
    """What is measured of a language model.

    Raises:
        ValueError: If a value is out of range; the message names field, value and fix.
    """

    unit: ClassVar[str] = "tokens"
    one_process: ClassVar[str] = "lopt"
    choices: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "methods": LANGUAGE_METHODS,
        "objective": ("reconstruction", "readout"),
        "lm_head": ("fused", "logits"),
    }

    methods: tuple[str, ...] = option(DEFAULT_METHODS, f"Any of {', '.join(LANGUAGE_METHODS)}.")
    micro_batch_size: int = option(2, "Sequences of a micro-batch.")
    objective: str = option("reconstruction", "Local objective: reconstruction or readout.")
    model: str = option("HuggingFaceTB/SmolLM2-135M-Instruct", "Hub id or local folder of a causal LM.")
    seq_length: int = option(128, "Tokens per sequence; there is no padding.")
    lm_head: str = option("fused", "fused: TRL's, in tiles; logits: those of all tokens at once, see below.")

    def __post_init__(self) -> None:
        super().__post_init__()
        check_lowest(self, {"seq_length": 2})

    @property
    def units_per_step(self) -> int:
        return self.batch_size * self.seq_length


@dataclass(frozen=True)
class ImagePipelineBenchSettings(BenchSettings):
    """What is measured of an image classifier.

    Raises:
        ValueError: If a value is out of range; the message names field, value and fix.
    """

    unit: ClassVar[str] = "images"
    one_process: ClassVar[str] = "local"
    choices: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "methods": IMAGE_METHODS,
        "objective": ("classifier", "readout"),
        "architecture": tuple(ARCHITECTURES),
    }

    methods: tuple[str, ...] = option(("local", *DEFAULT_METHODS[1:]), f"Any of {', '.join(IMAGE_METHODS)}.")
    micro_batch_size: int = option(16, "Images of a micro-batch.")
    objective: str = option(
        "classifier", "Local objective: classifier, of each early block's own, or readout, the model's, frozen."
    )
    model: str | None = option(None, "Hub id or local folder of an image classifier. Default: from random weights.")
    architecture: str = option("vit", "What to make from random weights: vit, a small one, or resnet20.")
    image_size: int | None = option(None, "Side of the images in pixels. Default: the model's.")

    def __post_init__(self) -> None:
        super().__post_init__()
        check_at_least("image_size", self.image_size, 8)
        if self.model is not None and self.architecture != "vit":
            raise ValueError(
                f"architecture={self.architecture!r} does nothing with model={self.model!r}, which has one; leave one "
                "of them out."
            )
        if self.model is not None and self.image_size is not None:
            raise ValueError(
                f"image_size={self.image_size} does nothing with model={self.model!r}, whose config has one; leave it "
                "out."
            )
