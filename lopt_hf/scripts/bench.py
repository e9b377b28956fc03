"""Measure what training costs on this machine.

`step` compares methods step by step: bytes saved for backward, bytes of gradients, time, resident memory. `pipeline`
compares the pipeline of local learners with the same learning in one process, and with torch's schedules. `repl`
measures what a folded RepL model saves where it is used. `gpu` checks on a GPU what the package claims about one.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from lopt_hf.bench import repl
from lopt_hf.bench.gpu.check import run_gpu_check
from lopt_hf.bench.gpu.report import to_markdown as gpu_to_markdown
from lopt_hf.bench.gpu.settings import GpuCheckSettings
from lopt_hf.bench.gpu.workload import TrainingWorkload
from lopt_hf.bench.pipeline import report as pipeline_report
from lopt_hf.bench.pipeline.bench import run_pipeline_bench
from lopt_hf.bench.pipeline.settings import ImagePipelineBenchSettings, PipelineBenchSettings
from lopt_hf.bench.repl import RepLBenchSettings, run_repl_bench
from lopt_hf.bench.step import BenchWorkerError, StepBenchSettings, run_step_bench, to_json, to_markdown
from lopt_hf.common.arithmetic import choose_arithmetic
from lopt_hf.common.files import write_text
from lopt_hf.scripts.parsing import chosen
from lopt_hf.scripts.settings import OneLineErrors, OneLineParser, add_settings, check_output_files, read_settings

__all__ = ["main", "make_parser"]

_SPEED = "speed.json"  # in the folder of `bench gpu`

MALLOC_DESCRIPTION = """\
--malloc keep (the default) sets MALLOC_MMAP_MAX_ and MALLOC_TRIM_THRESHOLD_ for all processes, so that glibc keeps the
memory of large tensors from step to step instead of giving it back; --malloc default leaves that as it is.
"""
STEP_DESCRIPTION = """\
Train the same model on the same batches with several methods, one step of each at a time, and print what a step
costs: the bytes that autograd keeps for backward at the peak, the bytes of gradients at their peak and of the
optimizer's state, the time (median), the peak resident memory; as a table, then as JSON.

  e2e                SFTTrainer, no activation checkpointing: what the ratios refer to
  e2e_checkpointing  SFTTrainer with activation checkpointing (reentrant)
  lopt               LoPTTrainer; a row for each --num-blocks and --local-update-interval
  lopt_local_step    LoPTTrainer with local_step; a row for each --num-blocks and --clip-scope ("in parts": part)
  reach              LoPTTrainer whose task gradient reaches all blocks at some steps, the last one at the others
                     (--task-reach), without a local objective; a row for each --num-blocks
  reach_local_step   the same with local_step, for each --clip-scope (these two are not among the default methods)
  freeze             LoPTTrainer that leaves the early blocks frozen
  lora               SFTTrainer with a LoRA of rank 16 on all linear layers
  mlaan              MLAANTrainer, a row for each --num-blocks; windows of two blocks, of one where there are two
                     (not among the default methods)
  repl               SFTTrainer on a RepL model with every 4th layer replaced (not among the default methods)
  e2e_segments       SFTTrainer that checkpoints segments of the decoder, a row for each --num-blocks
  e2e_step_in_backward  SFTTrainer whose optimizer steps in the backward, without clipping
  freeze_last        SFTTrainer that trains the first of the first --num-blocks blocks
  lisa               SFTTrainer that trains embeddings, head and two layers at a time
  badam              SFTTrainer that trains one layer at a time: the mean over four of them, spread over the depth,
                     which change at every step (the last five are not among the default methods)

Each method takes turns with an end-to-end run of its own: two processes at a time, with their weights and optimizer
states (SmolLM2-135M: 2 to 3 GB each). Ratios are to the steps taken in turns.

{malloc}"""
STEP_EXAMPLE = """\
example:
  lopt-hf bench step --methods e2e,lopt --num-blocks 2,4 --batch-size 4 --seq-length 256 --output step.json
"""
PIPELINE_DESCRIPTION = """\
Train the same model on the same batches with the same optimizer, one thread per process on the CPU, and print how many
tokens per second each method trains, how long its stages wait for each other, and the bytes that autograd keeps for
backward on each; as a table, then as JSON.

  lopt   LoPTTrainer in one process: what the ratios refer to
  ppll   PipelineTrainer: the same local learning, one process per stage
  gpipe  ScheduleGPipe of torch.distributed.pipelining, end-to-end loss, the same stages
  1f1b   Schedule1F1B, likewise
  e2e    SFTTrainer in one process: tells what of a gain is the schedule and what the smaller graph

ppll_delayed is the pipeline with `--gradient delayed`: early stages learn from the task's gradient of a step before,
and run their forward again for it. It is counted from where all stages have one. With --split auto it has a cut of its
own, as in training, in which early stages are smaller by what runs again. ppll_delayed_graph has the others' cut, and
keeps the forward's graph and weights (`--gradient_recompute false`).

Others of torch's schedules have two stages on each rank, halves of these stages:

  interleaved     ScheduleInterleaved1F1B
  interleaved_zb  ScheduleInterleavedZeroBubble: the backward of the weights fills gaps
  zbv             ScheduleZBVZeroBubble: likewise, and the first rank has the first stage and the last
  dualpipev       ScheduleDualPipeV: likewise, forwards and backwards of different micro-batches together

All compute the task loss by TRL's fused LM head, and clip each stage's gradient apart (end-to-end each half's, where a
method has two stages on a rank), which is in favour of torch's schedules: a norm over all stages would make them wait
once more. So is it that these run in a plain loop, without what the trainers do besides. Time is counted after the
pipelines have filled. Methods take turns (--rounds), each time in new processes.

--lm-head logits has all methods compute the loss on the logits of all tokens at once, as a loss function passed to
torch's schedules does. A fused head never holds them; its backward computes them again, and twice where a schedule
runs a backward in two parts.

--task image compares image classifiers, a small ViT or ResNet from random weights where no model is named: images per
second, LocalImageTrainer (`local`) in the place of LoPTTrainer, and options of its own (`--task image --help`). The
images are tensors before they are given to a method: neither decoding nor augmentation is measured.

{malloc}"""
PIPELINE_EXAMPLE = """\
example:
  lopt-hf bench pipeline --stages 2 --microbatches 4 --output pipeline.json
  lopt-hf bench pipeline --methods ppll,1f1b,interleaved,interleaved_zb,zbv,dualpipev --microbatches 8
  lopt-hf bench pipeline --task image --architecture resnet20 --microbatches 8
"""
GPU_DESCRIPTION = """\
Check on this machine's GPU, in at most eight minutes and without a network, what the package claims about one, and
write gpu_check.json and gpu_check.md. Each part runs in a process of its own with a time limit; files are written as
results come.

  steps       peak memory, bytes saved for backward and tokens per second of end-to-end training, LoPT, LoRA and
              freezing, on models with random weights, beside what `lopt-hf plan` says
  equality    eager, joint and local step change the weights alike; in fp32 as on the CPU; in bf16 and fp16
  sharded     FSDP2 with one process, against no sharding
  generation  speed of a folded RepL model
  options     activation offloading, Liger kernels, flex and flash attention, torch_compile: alike with LoPT

Without a GPU it runs on the CPU with tiny sizes, as a test of itself. The status is 1 if something failed, was not
reached in time, or differed; targets that are missed are shown and change nothing.
"""


def make_parser(task: str = "sft") -> argparse.ArgumentParser:
    """Makes the parser of `lopt-hf bench`; its namespace has the sub-command's `run` and `parser`.

    Args:
        task: Whose options `pipeline` takes.
    """
    parser = OneLineParser("bench", __doc__)
    commands = parser.add_subparsers(
        title="what to measure", required=True, metavar="COMMAND", parser_class=OneLineErrors
    )
    step = commands.add_parser(
        "step",
        help="bytes, time and memory of one training step, by method",
        description=STEP_DESCRIPTION.format(malloc=MALLOC_DESCRIPTION),
        epilog=STEP_EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    _add_options(step, StepBenchSettings)
    step.set_defaults(run=_run_step, parser=step)
    pipeline_parser = commands.add_parser(
        "pipeline",
        help="speed, waiting and memory of pipeline training, by method",
        description=PIPELINE_DESCRIPTION.format(malloc=MALLOC_DESCRIPTION),
        epilog=PIPELINE_EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    settings = ImagePipelineBenchSettings if task == "image" else PipelineBenchSettings
    pipeline_parser.add_argument(
        "--task", choices=("sft", "image"), default="sft", help="Language models, or image classifiers. Default: sft"
    )
    _add_options(pipeline_parser, settings)
    pipeline_parser.set_defaults(run=_run_pipeline, parser=pipeline_parser, settings=settings)
    repl_parser = commands.add_parser(
        "repl",
        help="generation speed of a folded RepL model, and the time of its calibration",
        description="Generate with a model and with its folded RepL model in turns, after timing the calibration.",
    )
    _add_options(repl_parser, RepLBenchSettings)
    repl_parser.set_defaults(run=_run_repl, parser=repl_parser)
    gpu_parser = commands.add_parser(
        "gpu",
        help="memory, speed and equality of training on a GPU, by method",
        description=GPU_DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_settings(gpu_parser, GpuCheckSettings)
    gpu_parser.add_argument(
        "--output-dir", type=Path, metavar="FOLDER", required=True, help="Where the files go; older ones are replaced."
    )
    gpu_parser.set_defaults(run=_run_gpu, parser=gpu_parser)
    return parser


def _add_options(parser: argparse.ArgumentParser, settings: Any) -> None:
    add_settings(parser, settings)
    parser.add_argument("--output", type=Path, metavar="FILE", help="Write the JSON there instead of printing it.")


def _run_step(arguments: argparse.Namespace) -> None:
    settings = _choose_dtype(_read_settings(arguments, StepBenchSettings))
    results = run_step_bench(settings)
    _report(to_markdown(results), to_json(results, settings), arguments.output)


def _run_pipeline(arguments: argparse.Namespace) -> None:
    settings = _choose_dtype(_read_settings(arguments, arguments.settings), "cpu")
    report = run_pipeline_bench(settings)
    _report(pipeline_report.to_markdown(report), pipeline_report.to_json(report, settings), arguments.output)


def _run_repl(arguments: argparse.Namespace) -> None:
    settings = _choose_dtype(_read_settings(arguments, RepLBenchSettings), "cpu")
    result = run_repl_bench(settings)
    _report(repl.to_markdown(result), repl.to_json(result, settings), arguments.output)


def _run_gpu(arguments: argparse.Namespace) -> None:
    results = run_gpu_check(
        read_settings(arguments, GpuCheckSettings), arguments.output_dir, _load_config, _measure_device, _Plan
    )
    print(gpu_to_markdown(results))
    if results.problems:
        raise BenchWorkerError(f"{len(results.problems)} problems: {results.problems[0]}")


def _load_config(name: str) -> dict[str, Any]:
    from lopt_hf.planner.dimensions import load_config

    config: dict[str, Any] = load_config(name).to_dict()
    return config


def _measure_device(folder: Path) -> dict[str, Any]:
    """Measures this machine's speed as `lopt-hf plan --calibrate` does, and saves it in `folder` for `_Plan`."""
    from lopt_hf.planner.device import measure_speed, write_speed

    speed = measure_speed()
    write_speed(speed, folder / _SPEED)
    return asdict(speed)


@dataclass(frozen=True)
class _Plan:
    """The plan of a model for what is trained on a device, as plain numbers; a call may find its speed in `folder`.

    It is made where it is called, since its imports take long.
    """

    model: str
    workload: TrainingWorkload
    device_memory: int

    def __call__(self, folder: Path) -> dict[str, Any]:
        from transformers import AutoConfig

        from lopt_hf.planner.device import read_speed
        from lopt_hf.planner.plan import PlanSettings, make_plan
        from lopt_hf.planner.report import to_json as plan_to_json

        on_gpu = self.workload.device == "cuda"
        settings = PlanSettings(
            model=self.model,
            device_memory=self.device_memory,
            batch_size=self.workload.batch_size,
            seq_length=self.workload.seq_length,
            optim=self.workload.optim,
            strategies=("e2e", "lopt", "lopt_local_step", "freeze", "lora") if on_gpu else ("e2e", "lopt"),
            num_blocks=(2, 4, 8) if on_gpu else (2,),
        )
        values = dict(self.workload.config)
        config = AutoConfig.for_model(values.pop("model_type"), **values)
        speed = folder / _SPEED
        plan = make_plan(settings, config, read_speed(speed) if speed.exists() else None)
        content: dict[str, Any] = json.loads(plan_to_json(plan))
        return content


def _read_settings(arguments: argparse.Namespace, settings: Any) -> Any:
    check_output_files(arguments, ("output",))
    return read_settings(arguments, settings)


def _choose_dtype(settings: Any, device: str | None = None) -> Any:
    """Says which arithmetic is chosen and why; the settings, with that in place of `"auto"`."""
    arithmetic = choose_arithmetic(settings.dtype, device)
    print(f"{arithmetic}\n", flush=True)
    return replace(settings, dtype=arithmetic.dtype)


def _report(markdown: str, text: str, output: Path | None) -> None:
    print(markdown)
    if output is None:
        print(f"\n{text}")
    else:
        write_text(output, text + "\n")
        print(f"{output} has every step's numbers.", file=sys.stderr)


def main(argv: Sequence[str] | None = None) -> None:
    """Runs `lopt-hf bench`.

    Args:
        argv: The arguments after the command's name. Default: those of the process.

    Raises:
        SystemExit: On bad input (status 2) or if a measurement fails (status 1), after one line on stderr.
    """
    arguments = make_parser(chosen("task", argv, "sft")).parse_args(argv)
    try:
        with arguments.parser.ending_in_one_line():
            arguments.run(arguments)
    except BenchWorkerError as error:
        sys.exit(f"{arguments.parser.prog}: error: {error}")


if __name__ == "__main__":
    main()
