"""Measure what fine-tuned models kept of what their base knew, and what they gained.

The untouched base and every model answer the same samples of lm-eval's tasks; what is printed is the paired change
with its confidence interval. Results are kept: a stopped run goes on where it was, and nothing is measured twice.
"""

import argparse
import logging
import shlex
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState

from lopt_hf.common.settings import check_folder
from lopt_hf.data.pretrained import SMOLLM2_ID
from lopt_hf.retention.benchmark import Candidate, RetentionBenchmark, check_candidates, flips, write_flips
from lopt_hf.retention.clusters import AUTO, CLUSTER_HELP
from lopt_hf.retention.deltas import MARGIN, MARGIN_HELP, check_change, check_confidence
from lopt_hf.retention.evaluation_settings import EvaluationSettings
from lopt_hf.retention.heldout import NUM_HELDOUT, load_heldout_rows
from lopt_hf.retention.lengths import check_max_length
from lopt_hf.retention.power import detectable_changes, detection_table
from lopt_hf.retention.references import ModelReference
from lopt_hf.retention.report.report import FLIPS, check_plots, check_report_folder, write_report
from lopt_hf.retention.report.tables import to_markdown
from lopt_hf.retention.representations import LayerSimilarity, with_similarity
from lopt_hf.retention.results import RetentionReport
from lopt_hf.retention.scores import DEFAULT_CACHE, ScoreCache
from lopt_hf.retention.suites import SUITES, SuiteTask, load_entries
from lopt_hf.retention.weights import check_files
from lopt_hf.scripts.settings import OneLineParser, add_settings, read_settings

__all__ = ["main", "make_parser", "tell_replaced", "write_results"]

# A rank may wait for another's long answers; lm-eval sets the same, but `run` has brought them together before
DISTRIBUTED_TIMEOUT = timedelta(weeks=52)

OUTPUT_DIR = Path("retention-report")

# Of `--detect`, where none is given: cautious, as a fine-tuned model answers most questions as its base does
CORRELATION = 0.5

EXAMPLES = f"""\
examples:
  lopt-hf retention --baseline {SMOLLM2_ID} --model out --suite offline --limit 100
  lopt-hf retention --baseline BASE --model e2e=out_e2e --model lopt=out_lopt --tasks arc_easy,piqa --limit 200
  lopt-hf retention --baseline BASE --model out --suite paper --heldout-data my_test.jsonl
  lopt-hf retention --baseline BASE --tasks arc_easy,piqa --detect 1.0
  accelerate launch -m lopt_hf.scripts.retention --baseline BASE --model out --suite paper

suites:
  offline  4,604 questions on knowledge, language, numbers, words, code and the world, and prose, that come with the
           package; needs no network; --limit 100 takes some of every kind and difficulty
  paper    the seven tasks of LoPT (arXiv 2605.04913 v3) with its shots and metrics:
           {", ".join(task.name for task in SUITES["paper"])};
           ifeval needs the packages of pip install "lopt_hf[ifeval]"
  generation
           gsm8k and ifeval, whose answers are written; a run that was stopped goes on after the last batch of answers
"""


def make_parser() -> OneLineParser:
    """Makes the parser of this command."""
    parser = OneLineParser("retention", __doc__, EXAMPLES)
    parser.add_argument(
        "--baseline",
        required=True,
        metavar="MODEL",
        help="the untouched base: local folder or hub id; a branch, tag or commit may follow an id, as in org/name@v1",
    )
    parser.add_argument(
        "--model",
        default=[],
        action="append",
        metavar="[LABEL=]MODEL",
        help="a model fine-tuned from it, or a PEFT adapter; give it once for each",
    )
    parser.add_argument(
        "--adapter-base",
        metavar="MODEL",
        help="base of the adapters, the baseline among them if it is one, where it is no longer what they name; "
        "usually the baseline",
    )
    what = parser.add_argument_group("what to measure")
    what.add_argument("--suite", choices=sorted(SUITES), help="a named set of tasks (default: offline)")
    what.add_argument("--tasks", metavar="NAME,NAME", help="lm-eval tasks, groups or tags; with --suite in addition")
    what.add_argument(
        "--include-path", type=Path, action="append", default=[], help="folder with further lm-eval tasks"
    )
    what.add_argument(
        "--heldout-data",
        metavar="DATA",
        help="held-out data of the task trained on, in any layout of lopt-hf sft: their answers' loss is the gain",
    )
    what.add_argument(
        "--heldout-split", metavar="NAME", help="split of it, such as test (default: train, the only one of a file)"
    )
    what.add_argument("--num-heldout", type=int, metavar="N", help=f"first rows of it (default: {NUM_HELDOUT})")
    how = parser.add_argument_group("how")
    add_settings(how, EvaluationSettings, leave_out=("samples",))
    how.add_argument("--confidence", type=float, default=0.95, help="level of the intervals (default: %(default)s)")
    how.add_argument("--margin", type=float, metavar="POINTS", help=f"{MARGIN_HELP} (default: {MARGIN})")
    how.add_argument("--cluster-by", default=AUTO, metavar="FIELD", help=f"{CLUSTER_HELP} (default: %(default)s)")
    how.add_argument("--no-drift", action="store_true", help="do not compare weights and hidden states layer by layer")
    before = parser.add_argument_group("before anything is trained")
    before.add_argument(
        "--detect",
        type=float,
        metavar="POINTS",
        help="say how many samples each task needs to see a change of so many points of a score from 0 to 1 (per cent "
        "of other metrics) with 80 %% power, from the baseline's own answers; needs no --model",
    )
    before.add_argument(
        "--correlation",
        type=float,
        metavar="R",
        help="for --detect: between the scores of baseline and model on the same samples; the more training leaves as "
        f"it was, the higher, and the fewer samples are needed (default: {CORRELATION})",
    )
    out = parser.add_argument_group("where results go")
    out.add_argument("--output-dir", type=Path, help=f"folder of the report (default: {OUTPUT_DIR})")
    out.add_argument(
        "--cache-dir", type=Path, help="folder of finished scores (default: lopt_hf/retention in HF_HOME)"
    )
    return parser


def run(options: argparse.Namespace, command: str) -> None:
    """Evaluates the models, and writes and prints the report.

    Args:
        options: Parsed arguments.
        command: The command line, for the report.
    """
    # Without an accelerator, accelerate has to be told that launched processes belong together
    PartialState(cpu=not torch.accelerator.is_available(), timeout=DISTRIBUTED_TIMEOUT)
    output_dir, has_earlier = options.output_dir or OUTPUT_DIR, False
    if options.detect is None:  # which writes no report
        has_earlier = check_report_folder(output_dir, "lopt-hf retention")
        check_plots()
    check_folder("cache_dir", options.cache_dir)
    _check_what_is_asked(options)
    settings = read_settings(options, EvaluationSettings, leave_out=("samples",))
    candidates = [_candidate(text) for text in options.model]
    _check_models(options, candidates)
    heldout = (
        []
        if options.heldout_data is None
        else load_heldout_rows(options.heldout_data, options.num_heldout, options.heldout_split)
    )
    benchmark = RetentionBenchmark(
        options.baseline,
        load_entries(
            _wanted(options.suite, options.tasks), options.include_path, shows_progress=PartialState().is_main_process
        ),
        settings,
        ScoreCache(options.cache_dir or DEFAULT_CACHE),
        heldout,
        options.confidence,
        options.adapter_base,
        MARGIN if options.margin is None else options.margin,
        options.cluster_by,
    )
    if PartialState().is_main_process:
        print(benchmark.arithmetic, flush=True)
        if has_earlier:
            tell_replaced(output_dir)
    if options.detect is not None:
        _print_detectable(benchmark, options)
        return
    report = benchmark.compare(candidates, with_drift=not options.no_drift)
    if report is None:  # not the first process
        return
    if not options.no_drift:
        references = {c.label: [benchmark.reference(model) for model in c.models] for c in candidates}
        measure = LayerSimilarity(benchmark.baseline, benchmark.settings.dtype, benchmark.cache.folder)
        report = with_similarity(report, references, measure)
    before = benchmark.scores(benchmark.baseline.name)
    rows = (row for c in candidates for row in flips(c.label, before, benchmark.scores(c.models[0])))
    write_results(report, rows, output_dir, command)


def _check_what_is_asked(options: argparse.Namespace) -> None:
    """Checks options alone and beside each other, before anything takes time."""
    check_confidence(options.confidence)
    if options.margin is not None:
        check_change("margin", options.margin)
    for name in ("num_heldout", "heldout_split"):
        if (value := getattr(options, name)) is not None and options.heldout_data is None:
            raise ValueError(f"{name}={value} is for --heldout-data; leave it out, or name such data.")
    if options.detect is None:
        if not options.model:
            raise ValueError("the following arguments are required: --model (or --detect, which needs the base only)")
        if options.correlation is not None:
            raise ValueError(f"correlation={options.correlation} is for --detect; leave it out, or add --detect 1.")
        return
    of_reports = ("model", "heldout_data", "margin", "no_drift", "output_dir")
    given = [f"--{name.replace('_', '-')}" for name in of_reports if getattr(options, name) not in (None, [], False)]
    if given:
        raise ValueError(
            f"detect={options.detect:g} is answered by the baseline's tasks alone, without a report; leave out "
            f"{', '.join(given)}."
        )
    check_change("detect", options.detect)
    if options.correlation is not None and not -1 <= options.correlation < 1:
        raise ValueError(f"correlation={options.correlation} is not from -1 to below 1; 0.5 is cautious.")


def _check_models(options: argparse.Namespace, candidates: Sequence[Candidate]) -> None:
    """Checks that the models are there and whole, before tasks are loaded, which takes longer."""
    if options.detect is None:
        check_candidates(candidates)
    names = [options.baseline, *(each.models[0] for each in candidates)]
    references = [ModelReference.find(name, options.adapter_base) for name in names]
    if options.adapter_base and not any(reference.adapter for reference in references):
        raise ValueError(f"adapter_base={options.adapter_base!r}: no model is an adapter; leave it out.")
    for reference in references:
        check_max_length(reference, options.max_length)
        check_files(reference)


def _print_detectable(benchmark: RetentionBenchmark, options: argparse.Namespace) -> None:
    baseline = benchmark.scores(benchmark.baseline.name)
    if not PartialState().is_main_process:
        return
    correlation = CORRELATION if options.correlation is None else options.correlation
    changes = detectable_changes(benchmark.entries, baseline, options.detect, correlation, benchmark.confidence)
    print(f"""
Samples needed to see a change of {options.detect:g} point{"s" if options.detect != 1 else ""} of a score from 0 to 1,
or of {options.detect:g} % of another metric, at {100 * benchmark.confidence:g} % with 80 % power, if the scores of
baseline and model correlate by {correlation:g} on the same samples:

{detection_table(changes)}""")


def tell_replaced(folder: Path) -> None:
    """Says that a report is there, which another takes the place of."""
    print(f"The earlier report in {folder} will be replaced.", file=sys.stderr, flush=True)


def write_results(report: RetentionReport, rows: Iterator[Mapping[str, Any]], folder: Path, command: str) -> None:
    """Prints and writes a report, and writes the samples whose answers changed; plots come last, as they may fail.

    Args:
        report: The report.
        rows: From `benchmark.flips`.
        folder: Where the files go.
        command: The command line, for the report.
    """
    report = replace(report, settings={"command": command, **report.settings})
    print(f"\n{to_markdown(report)}\n", flush=True)
    write_flips(rows, folder / FLIPS)
    print("\n".join(map(str, [*write_report(report, folder), folder / FLIPS])))


def _wanted(suite: str | None, tasks: str | None) -> list[SuiteTask]:
    named = [SuiteTask(name.strip()) for name in (tasks or "").split(",") if name.strip()]
    if tasks is not None and not named:
        raise ValueError(f"tasks={tasks!r} names nothing; give names with commas between, such as arc_easy,piqa.")
    return [*SUITES[suite or "offline"], *named] if suite or not named else named


def _candidate(text: str) -> Candidate:
    label, separator, model = text.partition("=")
    if not separator or Path(text).exists():  # the sign may be part of a path
        label = model = text
    if not label or not model:
        raise ValueError(f"model={text!r} names no label or no model; give LABEL=MODEL, or MODEL alone.")
    return Candidate(label, label, (model,))


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the benchmark.

    Args:
        argv: Arguments without the program's name; default: those of the process.
    """
    arguments = sys.argv[1:] if argv is None else argv
    parser = make_parser()
    options = parser.parse_args(arguments)
    logging.getLogger("lm_eval").setLevel(logging.ERROR)  # its warnings are about tasks' defaults, at every task
    try:
        with parser.ending_in_one_line():
            run(options, shlex.join(["lopt-hf", "retention", *arguments]))
    finally:
        PartialState().destroy_process_group()


if __name__ == "__main__":
    main()
