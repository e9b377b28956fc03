"""The parts of a check, for a GPU at full size, or for a CPU at a tiny one as a test of the check itself."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from lopt_hf.bench.gpu.generation import Generation
from lopt_hf.bench.gpu.parts import Case, Part
from lopt_hf.bench.gpu.rows import OPTION_ROWS, STEP_ROWS, UPDATE_ROWS, OptionRow, UpdateRow
from lopt_hf.bench.gpu.settings import GpuCheckSettings
from lopt_hf.bench.gpu.sharded import Sharded
from lopt_hf.bench.gpu.training import Training
from lopt_hf.bench.gpu.updates import Comparison
from lopt_hf.bench.gpu.workload import TrainingWorkload
from lopt_hf.bench.processes import one_gpu
from lopt_hf.common.packaged import find_accelerate_config

__all__ = ["TINY", "Sizes", "make_parts", "make_sizes"]

TINY = "tiny"
FSDP2 = find_accelerate_config("fsdp2_8")
# Segments that grow keep what is cached usable for tensors of other sizes. No managed memory.
_ALLOCATOR = {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"}
_DETERMINISTIC = {"CUBLAS_WORKSPACE_CONFIG": ":4096:8"}  # torch's documentation of use_deterministic_algorithms
_NO_GPU = {"CUDA_VISIBLE_DEVICES": ""}
_REPL_EVERY = 4  # RepL, arXiv 2605.19533
_BLOCKS = 4
_FSDP2_TOLERANCE = 1e-4  # fp32, other kernels for norm and optimizer


def _qwen2(hidden: int, layers: int, heads: int, key_value_heads: int, inner: int, vocabulary: int) -> dict[str, Any]:
    return {
        "model_type": "qwen2",
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": key_value_heads,
        "intermediate_size": inner,
        "vocab_size": vocabulary,
        "max_position_embeddings": 4096,
        "tie_word_embeddings": False,
    }


TINY_CONFIG = _qwen2(32, 8, 4, 2, 48, 96)


@dataclass(frozen=True)
class Sizes:
    """How large everything is.

    Attributes:
        device: `"cuda"` or `"cpu"`.
        models: Configurations of the models whose steps are measured, by name.
        steps: What a step of them trains, but for the configuration.
        equality: What the equality part trains.
        options: What the options part trains.
        generation: What generates.
    """

    device: str
    models: Mapping[str, Mapping[str, Any]]
    steps: TrainingWorkload
    equality: TrainingWorkload
    options: TrainingWorkload
    generation: Generation

    def workload(self, model: str) -> TrainingWorkload:
        """What a step of a model trains."""
        return replace(self.steps, config=self.models[model])


def make_sizes(settings: GpuCheckSettings, device: str, models: Mapping[str, Mapping[str, Any]]) -> Sizes:
    """The sizes for a device.

    Args:
        settings: The user's.
        device: `"cuda"` or `"cpu"`.
        models: Configurations of `settings.models`. On a CPU one tiny model stands for them.
    """
    if device == "cpu":
        tiny = TrainingWorkload(TINY_CONFIG, 2, 16, 1, 1, settings.optim, 1e-3, device)
        compared = replace(tiny, warmup=0, steps=2, optim="sgd", learning_rate=0.5, is_made_on_cpu=True)
        generation = Generation(TINY_CONFIG, _REPL_EVERY, 1, 4, 4, 1, device)
        return Sizes(device, {TINY: TINY_CONFIG}, tiny, compared, compared, generation)
    steps = TrainingWorkload(
        {}, settings.batch_size, settings.seq_length, 2, settings.steps, settings.optim, 1e-5, device
    )
    small = TrainingWorkload(_qwen2(256, 8, 8, 4, 704, 4096), 4, 128, 0, 7, "sgd", 0.5, device, True, True)
    wide = replace(small, config=_qwen2(896, 8, 14, 2, 4864, 8192), batch_size=4, seq_length=512, warmup=1)
    smallest = models[settings.models[-1]]
    return Sizes(device, models, steps, small, wide, Generation(smallest, _REPL_EVERY, 1, 128, 64, 5, device))


def make_parts(
    settings: GpuCheckSettings, sizes: Sizes, measure_device: Any, predictions: Mapping[str, Any]
) -> list[Part]:
    """The parts that were asked for, the most important first.

    Args:
        settings: The user's.
        sizes: How large everything is.
        measure_device: Measures the device's speed, as a case's `run`.
        predictions: Plans of the models by name, likewise.
    """
    models = list(sizes.models)
    parts = {
        "equality": [_equality(sizes)],
        "sharded": [_sharded(sizes)],
        "generation": [Part("RepL", "generation", (Case("generation", sizes.generation),), 60)],
        "options": _options(sizes),
    }
    planned = "steps" in settings.parts
    chosen = [Part("Device", "device", (Case("calibration", measure_device),), 60)] if planned else []
    if planned:
        chosen += [_plan(name, predictions[name], settings.limit) for name in models]
        chosen += [_steps(models[0], sizes, 150)]
    chosen += parts["equality"] if "equality" in settings.parts else []
    if planned:
        chosen += [_steps(name, sizes, 90) for name in models[1:]]
    for name in ("sharded", "generation", "options"):
        chosen += parts[name] if name in settings.parts else []
    if sizes.device == "cuda":
        return [replace(part, environment={**one_gpu(), **part.environment}) for part in chosen]
    # The parts' limits are a GPU's; as a test of itself the check may take as long as the machine needs.
    environments = [{**part.environment, **_NO_GPU} for part in chosen]
    return [
        replace(part, threads=1, limit=settings.limit, environment=environment)
        for part, environment in zip(chosen, environments, strict=True)
    ]


def _plan(model: str, prediction: Any, limit: float) -> Part:
    return Part(f"Plan {model}", "plan", (Case("plan", prediction),), limit, _NO_GPU, in_background=True)


def _steps(model: str, sizes: Sizes, limit: float) -> Part:
    workload = sizes.workload(model)
    cases = [Case(row.name, Training(workload, row.options, lora=row.lora, cycle=row.cycle)) for row in STEP_ROWS]
    return Part(model, "steps", tuple(cases), limit, _ALLOCATOR)


def _equality(sizes: Sizes) -> Part:
    cases = tuple(Case(row.name, _update_run(row, sizes.equality), row.needs) for row in UPDATE_ROWS)
    return Part("Equality", "updates", cases, 75, _DETERMINISTIC)


def _update_run(row: UpdateRow, workload: TrainingWorkload) -> Training:
    return Training(
        workload,
        {"num_blocks": _BLOCKS, **row.options},
        row.weights,
        row.precision,
        on_cpu=row.on_cpu,
        saved_as=row.kind if row.tolerance is None else None,
        comparison=None if row.tolerance is None else Comparison(row.kind, row.tolerance, not row.is_joint),
        metered=False,
    )


def _options(sizes: Sizes) -> list[Part]:
    """LoPT with each option, then end-to-end training with it, which tells whose fault a failure is."""
    together = [row for row in OPTION_ROWS if row.apart is None]
    parts = [Part("Options", "updates", tuple(_option_cases(together, sizes, True)), 75, _DETERMINISTIC)]
    for row in OPTION_ROWS:
        if row.apart is not None:
            cases = tuple(_option_cases([row], sizes, False))
            parts.append(Part(f"Options: {row.name}", "updates", cases, row.apart, _DETERMINISTIC))
    return parts


def _option_cases(rows: Sequence[OptionRow], sizes: Sizes, with_references: bool) -> Iterator[Case]:
    for method, blocks in (("LoPT K=4", {"num_blocks": _BLOCKS}), ("end-to-end", {})):
        for precision, title in (("no", "fp32"), ("bf16", "bf16")):
            name = f"{method}, {title}"
            # torch.compile traces the meters' hooks, and stops there.
            plain = Training(sizes.options, blocks, "float32", precision, saved_as=name, metered=False)
            if with_references:
                yield Case(name, plain)
            for row in rows:
                if row.precision == precision:
                    yield Case(f"{name}: {row.name}", _option_run(row, plain), row.needs)


def _option_run(row: OptionRow, plain: Training) -> Training:
    assert plain.saved_as is not None
    return replace(
        plain,
        options={**plain.options, **row.options},
        attention=row.attention,
        saved_as=None,
        comparison=Comparison(plain.saved_as, row.tolerance),
    )


def _sharded(sizes: Sizes) -> Part:
    """Runs of one process, and the same under FSDP2; then what a step of the smallest model costs there."""
    plain = Training(sizes.equality, weights="float32", precision="no", metered=False)
    smallest = list(sizes.models)[-1]
    whole = Training(sizes.workload(smallest), weights="float32", metered=False, sharded=True)
    methods: Sequence[tuple[str, Mapping[str, Any]]] = (("end-to-end", {}), ("LoPT K=4", {"num_blocks": _BLOCKS}))
    cases = [Case(name, replace(plain, options=options, saved_as=f"plain {name}")) for name, options in methods]
    runs = {
        f"{name}, FSDP2": replace(
            plain,
            options=options,
            comparison=Comparison(f"plain {name}", _FSDP2_TOLERANCE),
            sharded=True,
        )
        for name, options in methods
    }
    runs |= {f"{smallest}: {name}, FSDP2": replace(whole, options=options) for name, options in methods}
    cases += [Case(name, Sharded(tuple(runs.values()), index, FSDP2), ("cuda",)) for index, name in enumerate(runs)]
    return Part("FSDP2", "updates", tuple(cases), 90, _DETERMINISTIC)
