"""Tell what pipeline schedules cost, before anything is trained.

Simulate a pipeline's schedules on stage times that you measured or give, and print what each makes of them: the time
of an optimizer step, the throughput, how long stages idle (the bubble), and how many micro-batches' activations they
hold.

file of times (--times): JSON with one number for each stage in every list, in seconds for one micro-batch
  {"forward": [0.11, 0.13], "backward": [0.22, 0.31], "local": [0.01, 0], "optimizer": [0.04, 0.05],
   "message_bytes": 589824, "tokens_per_microbatch": 256}
  forward       forward; of the last stage with the task loss
  backward      backward, with respect to inputs and weights
  local         local objective, forward and backward; only ppll computes it (default: 0)
  optimizer     optimizer step, once for all micro-batches of a step (default: 0)
  message_bytes, tokens_per_microbatch  as --message-mb (times 10^6) and --tokens

examples:
  lopt-hf pipeline simulate --stages 16 --schedule ppll,gpipe,1f1b,interleaved --microbatches 8,32
  lopt-hf pipeline simulate --times measured.json --microbatches 4 --cores 2 --timeline timeline.png
  lopt-hf pipeline simulate --stages 2,4,8,16,32,64 --microbatches 32 --forward-ms 20 --backward-ms 40 \\
      --message-mb 8 --link-gbps 100 --latency-us 10 --plot scaling.png
  lopt-hf pipeline simulate --stages 2,3,4 --microbatches 8 --forward-ms 50 --validate
  lopt-hf pipeline simulate --stages 4 --schedule ppll,ppll_delayed,interleaved_zb,zbv,dualpipev --microbatches 8,32
"""

import argparse
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lopt_hf.common.figures import save_figure
from lopt_hf.common.files import write_text
from lopt_hf.common.settings import check_at_least, option
from lopt_hf.pipeline.events import chrome_trace, plot_timeline
from lopt_hf.pipeline.simulator import schedule_report
from lopt_hf.pipeline.simulator.schedule import SCHEDULES, ScheduleResult, Workload, simulate_all
from lopt_hf.pipeline.simulator.schedule_orders import Schedule
from lopt_hf.pipeline.simulator.schedule_times import TimesSource, read_times
from lopt_hf.scripts.settings import OneLineParser, add_settings, check_output_files

__all__ = ["main", "make_parser"]

ONE_OR_EACH = "; one number for all stages or one for each."
DEFAULT_SCHEDULES = ("ppll", "gpipe", "1f1b", "interleaved", "zero-bubble")
MAX_DRAWN_STAGES = 64
MAX_DRAWN_PIPELINES = 8
TIMELINE_STEPS = 2
MEGA, GIGA, MILLI, MICRO, BITS_PER_BYTE = 1e6, 1e9, 1e-3, 1e-6, 8
DEFAULT_FORWARD_SECONDS = 0.01  # ours: without messages only ratios of times matter
BACKWARD_PER_FORWARD = 2.0  # a matrix product's backward is two (arXiv 2401.10241, Sec. 2)

# Options that some schedules alone look at, and which these are
LOOKS_AT: dict[str, Callable[[Schedule], bool]] = {
    "virtual_stages": lambda schedule: schedule.has_virtual_stages,
    "channel_depth": lambda schedule: not schedule.flushes,
    "weight_share": lambda schedule: schedule.puts_weights_off,
    "keeps_graph": lambda schedule: schedule.is_delayed,
    "local_ms": lambda schedule: schedule.is_local,
}


@dataclass(frozen=True)
class SimulateOptions:
    """Options of the command; times are of one micro-batch on one stage."""

    stages: tuple[int, ...] | None = option(None, "Devices in the pipeline. Default: 4, or as many as --times has.")
    schedule: tuple[str, ...] = option(DEFAULT_SCHEDULES, "Schedules to simulate, see below.")
    microbatches: tuple[int, ...] = option((8, 32), "Micro-batches of an optimizer step.")
    virtual_stages: int | None = option(
        None,
        "Stages on each device in `interleaved` and `interleaved_zb`, each with its share of the time. "
        f"Default: {Workload.virtual_stages}",
    )
    channel_depth: int | None = option(
        None,
        "Hidden states that may wait at each end of a link between two stages of ppll and ppll_delayed. "
        f"Default: {Workload.channel_depth}",
    )
    weight_share: float | None = option(
        None,
        "Part of the backward that zero-bubble schedules put off: that of the weights. "
        f"Default: {Workload.weight_share}",
    )
    keeps_graph: bool = option(
        False, "ppll_delayed keeps the graphs whose gradients have not come, instead of running their forward again."
    )
    times: Path | None = option(None, "Measured times as JSON (see above), instead of the next four.")
    forward_ms: tuple[float, ...] | None = option(None, f"Forward{ONE_OR_EACH} Default: 10")
    backward_ms: tuple[float, ...] | None = option(None, f"Backward{ONE_OR_EACH} Default: twice the forward")
    local_ms: tuple[float, ...] | None = option(None, "Local objective of ppll's stages but the last. Default: 0")
    optimizer_ms: tuple[float, ...] | None = option(None, "Optimizer step. Default: 0")
    whole_model: bool = option(
        False,
        "The times are those of the whole model (of several stages: their sum), divided evenly among the stages. "
        "Without it, a model with more stages has more layers.",
    )
    tokens: int | None = option(None, "Tokens of a micro-batch, for the throughput in tokens.")
    message_mb: float | None = option(None, "Hidden states of a micro-batch: 10^6 bytes. Default: 0")
    link_gbps: float | None = option(None, "Gigabits per second of each link. Default: no limit")
    latency_us: float = option(0.0, "Time for any message to arrive.")
    cores: float | None = option(None, "Cores that all stages share. Default: a device for each stage")
    plot: Path | None = option(None, "Draw how the schedules scale with several --stages (PNG).")
    timeline: Path | None = option(
        None, "What each stage does when in two steps: a drawing (.png), or a trace for ui.perfetto.dev (.json)."
    )
    output: Path | None = option(None, "Write everything as JSON.")
    validate: bool = option(
        False,
        "Also run each schedule in real processes whose stages sleep for their times, those of "
        "torch.distributed.pipelining and ours, and print the difference. Messages then go through this machine's "
        "loopback and take its cores: leave --message-mb out to test the schedules alone.",
    )


def make_parser() -> OneLineParser:
    """Makes the parser of `lopt-hf pipeline simulate`."""
    schedules = "".join(f"  {name:<14} {schedule.summary}\n" for name, schedule in SCHEDULES.items())
    parser = OneLineParser("pipeline simulate", f"{__doc__}\nschedules:\n{schedules}")
    add_settings(parser, SimulateOptions)
    return parser


def _workloads(arguments: argparse.Namespace) -> list[Workload]:
    check_at_least("tokens", arguments.tokens, 1)
    check_at_least("latency_us", arguments.latency_us, 0)
    if arguments.link_gbps is not None and not arguments.link_gbps > 0:
        raise ValueError(f"link_gbps={arguments.link_gbps} must be more than 0; leave it out for no limit.")
    source = _source(arguments)
    if arguments.link_gbps is not None and source.message_bytes == 0:
        raise ValueError(
            f"link_gbps={arguments.link_gbps} has no effect on messages of no size; set --message-mb, or leave it out."
        )
    bandwidth = math.inf if arguments.link_gbps is None else arguments.link_gbps * GIGA / BITS_PER_BYTE
    names = ("channel_depth", "virtual_stages", "weight_share")
    given = {name: getattr(arguments, name) for name in names if getattr(arguments, name) is not None}
    return [
        Workload(
            source.of(stages),
            microbatches,
            message_bytes=source.message_bytes,
            latency=arguments.latency_us * MICRO,
            keeps_graph=arguments.keeps_graph,
            cores=arguments.cores,
            bandwidth=bandwidth,
            **given,
        )
        for stages in arguments.stages or (source.default_stages,)
        for microbatches in arguments.microbatches
    ]


def _source(arguments: argparse.Namespace) -> TimesSource:
    by_hand = ("forward_ms", "backward_ms", "local_ms", "optimizer_ms")
    given = {name: getattr(arguments, name) for name in by_hand if getattr(arguments, name) is not None}
    if arguments.times is not None:
        if given:
            raise ValueError(f"times and {', '.join(given)}: times come from the file or by hand; leave one out.")
        source = read_times(arguments.times, arguments.whole_model)
    else:
        seconds: dict[str, Any] = {
            name.removesuffix("_ms"): tuple(MILLI * ms for ms in values) for name, values in given.items()
        }
        forward = seconds.setdefault("forward", (DEFAULT_FORWARD_SECONDS,))
        seconds.setdefault("backward", tuple(BACKWARD_PER_FORWARD * value for value in forward))
        source = TimesSource(**seconds, whole_model=arguments.whole_model)
    if arguments.message_mb is not None:
        source = replace(source, message_bytes=arguments.message_mb * MEGA)
    return source if arguments.tokens is None else replace(source, tokens_per_microbatch=arguments.tokens)


def _check_schedules(arguments: argparse.Namespace) -> None:
    """Refuses what none of the schedules looks at."""
    if not set(arguments.schedule) <= SCHEDULES.keys():
        return  # the simulation says which there are
    for name, looks in LOOKS_AT.items():
        value = getattr(arguments, name)
        if value is None or value is False or any(looks(SCHEDULES[schedule]) for schedule in arguments.schedule):
            continue
        shown = list(value) if isinstance(value, tuple) else value
        users = [schedule for schedule, kind in SCHEDULES.items() if looks(kind)]
        which = f"{users[0]} alone; name it" if len(users) == 1 else f"{', '.join(users)} alone; name one of them"
        raise ValueError(f"{name}={shown} is for {which} in --schedule, or leave it out.")


def _check_drawing(arguments: argparse.Namespace, workloads: Sequence[Workload]) -> None:
    """What would fail only after the simulation."""
    if arguments.plot is not None and len({workload.times.num_stages for workload in workloads}) < 2:
        raise ValueError("plot: a plot of scaling needs several numbers of stages, such as --stages 2,4,8,16.")
    if arguments.plot is not None and arguments.plot.suffix != ".png":
        raise ValueError(f"plot={arguments.plot}: name a .png file.")
    if arguments.timeline is None:
        return
    if arguments.timeline.suffix not in (".png", ".json"):
        raise ValueError(f"timeline={arguments.timeline}: name a .png file for a drawing or .json for a Chrome trace.")
    panels = len(workloads) * len(arguments.schedule)
    stages = max(workload.times.num_stages for workload in workloads)
    if panels > MAX_DRAWN_PIPELINES or stages > MAX_DRAWN_STAGES:
        raise ValueError(
            f"timeline: {panels} pipelines of up to {stages} stages; name schedules, stages and micro-batches so that "
            f"there are at most {MAX_DRAWN_PIPELINES} with at most {MAX_DRAWN_STAGES} stages."
        )


def _run(arguments: argparse.Namespace) -> None:
    check_output_files(arguments, ("plot", "timeline", "output"))
    _check_schedules(arguments)
    workloads, tokens = _workloads(arguments), _source(arguments).tokens_per_microbatch
    _check_drawing(arguments, workloads)
    results, left_out = simulate_all(arguments.schedule, workloads)
    measured = _measure(results) if arguments.validate else None
    print(schedule_report.to_markdown(results, tokens))
    for reason in left_out:
        print(f"left out: {reason}")
    if measured is not None:
        print(f"\n{schedule_report.to_validation_markdown(results, measured)}")
    _write_files(arguments, results, measured)


def _measure(results: Sequence[ScheduleResult]) -> list[float]:
    # Only here, because of torch, which takes seconds to import.
    from lopt_hf.pipeline.simulator.schedule_validation import ScheduleRunError, check_measurable, measure_schedules

    cases = [(result.schedule, result.workload) for result in results]
    for case in cases:
        check_measurable(*case)
    print(f"running {len(cases)} schedules, a process for each stage ...", file=sys.stderr)
    try:
        return measure_schedules(cases)
    except ScheduleRunError as error:
        sys.exit(f"lopt-hf pipeline simulate: error: {error}")


def _write_files(
    arguments: argparse.Namespace, results: Sequence[ScheduleResult], measured: Sequence[float] | None
) -> None:
    if arguments.plot is not None:
        save_figure(schedule_report.plot_scaling(results), arguments.plot)
    if arguments.timeline is not None:
        timelines = schedule_report.make_timelines(results, TIMELINE_STEPS)
        if arguments.timeline.suffix == ".json":
            write_text(arguments.timeline, chrome_trace(timelines))
        else:
            save_figure(plot_timeline(timelines), arguments.timeline)
    if arguments.output is not None:
        write_text(arguments.output, schedule_report.to_json(results, measured) + "\n")


def main(argv: Sequence[str] | None = None) -> None:
    """Runs `lopt-hf pipeline simulate`.

    Args:
        argv: The arguments after the command's name. Default: those of the process.

    Raises:
        SystemExit: On bad input (status 2) or if a real run fails (status 1), after one line on stderr.
    """
    make_parser().run(_run, argv)


if __name__ == "__main__":
    main()
