"""Reports are made from values that the test knows; what tables, page and plots say is compared with them."""

import base64
import json
import math
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from html.parser import HTMLParser
from itertools import product
from pathlib import Path

import pytest

from lopt_hf.retention.comparisons import adjusted
from lopt_hf.retention.report import report as report_module
from lopt_hf.retention.report.findings import findings
from lopt_hf.retention.report.frontier import frontier_labels, pareto_frontier, plot_frontier, retention_outcomes
from lopt_hf.retention.report.plots import group_styles, plot_deltas, plot_drift, plot_similarity
from lopt_hf.retention.report.report import to_html, to_markdown, write_report
from lopt_hf.retention.report.tables import make_tables
from lopt_hf.retention.results import Contrast, Delta, ModelResult, RetentionReport, main_outcomes

NAN = float("nan")
PNG = b"\x89PNG"
ALL_FILES = ["report.json", "report.md", "report.html", "deltas.png", "frontier.png", "drift.png"]


def accuracy(change=-0.05, half_width=0.02, task="arc_easy", metric="acc", **settings):
    settings = {"p_value": 0.0312, "right_to_wrong": 31, "wrong_to_right": 21, "detectable": 0.03, **settings}
    ends = change - half_width, change + half_width
    return Delta(task, metric, True, 0.6, 0.6 + change, change, *ends, 200, 0.01, **settings)


def perplexity(change=2.0, half_width=0.5, **settings):
    ends = change - half_width, change + half_width
    return Delta("wikitext", "word_perplexity", False, 30.0, 30.0 + change, change, *ends, 62, 0.3, **settings)


def loss(change=-0.7, half_width=0.1):
    ends = change - half_width, change + half_width
    return Delta("held-out answers", "answer_loss", False, 1.7, 1.7 + change, change, *ends, 64, 0.017)


@pytest.fixture
def single():
    """One model, two tasks, no gain, no drift."""
    deltas = (
        accuracy(),
        accuracy(-0.01, metric="acc_norm", p_value=0.0001),
        accuracy(0.04, task="piqa", p_value=None, right_to_wrong=None, wrong_to_right=None),
    )
    model = ModelResult("lopt", "lopt", deltas, mean=accuracy(-0.005, task="mean of 2 tasks", metric="accuracy"))
    settings = {"limit": 200, "tasks": ["arc_easy", "piqa"], "chat": False}
    return adjusted(RetentionReport("the base", (model,), settings))


@pytest.fixture(scope="module")
def grid():
    """Nine methods at two rates with three seeds each; the first method's high rate ruins the model."""
    models = [_averaged(number, rate) for number, rate in product(range(9), (2e-5, 1e-4))]
    labels = [model.label for model in models]
    contrasts = (
        Contrast(
            *(labels[0], labels[2], "held-out answers", "answer_loss", False, -0.2, -0.3, -0.1, 3, 0.017),
            p_value=0.002,
            detectable=0.14,
        ),
        Contrast(labels[0], labels[2], "piqa", "acc", True, 0.01, -0.01, 0.03, 3, 0.05, is_within_margin=True),
    )
    return adjusted(RetentionReport("the base", tuple(models), {"seeds": [0, 1, 2]}, contrasts=contrasts))


@pytest.fixture(scope="module")
def pair(grid):
    """One method of the grid."""
    return replace(grid, models=grid.models[:2], contrasts=())


@pytest.fixture(scope="module")
def grid_html(grid):
    return to_html(grid)


def _averaged(number, rate):
    single_runs = tuple(_run(number, rate, seed) for seed in range(3))
    return replace(_run(number, rate, 1), label=f"method {number}, lr {rate:g}", seeds=single_runs)


def _run(number, rate, seed):
    step = 5 if rate > 5e-5 else 1
    forgotten = 0.002 * number * step + 0.001 * seed
    ruined = 40.0 if (number, step) == (0, 5) else 0.0
    return ModelResult(
        f"run {number} {rate:g} {seed}",
        f"method {number}",
        (accuracy(-forgotten), accuracy(-forgotten, task="piqa"), perplexity(0.1 * number * step + 10 * ruined)),
        mean=accuracy(-forgotten, task="mean of 2 tasks", metric="accuracy"),
        gain=loss(-0.2 - 0.05 * number * step + 0.01 * seed + ruined / 40),
        drift={"embeddings": 1e-7, **{str(layer): 1e-3 * layer * step for layer in range(12)}, "rest": 1e-4},
    )


class Page(HTMLParser):
    """What a browser sees: visible text, and the tags with their attributes."""

    def __init__(self, html):
        super().__init__()
        self.tags, self.texts, self._inside = [], [], []
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "img", "br"):
            self._inside.append(tag)

    def handle_endtag(self, tag):
        assert self._inside.pop() == tag

    def handle_data(self, data):
        if not {"style", "title", "script"} & set(self._inside):
            self.texts.append(data)

    @property
    def text(self):
        return " ".join(" ".join(self.texts).split())


def markdown_rows(text, title):
    """The cells of the table under a title, its headers first."""
    lines = text.partition(f"## {title}\n")[2].strip().partition("\n\n")[0].splitlines()
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines if not line.startswith("|--")]


def test_table_of_one_model(single):
    headers, *rows = markdown_rows(to_markdown(single), "lopt")
    assert headers == ["Tasks", "Metric", "", "Baseline", "", "Value", "Delta", "95 % interval", "n"] + [
        "right to wrong / wrong to right",
        "McNemar p",
        "Holm p",
        "detectable",
        "Reading",
    ]
    mean, first, second, third = rows
    assert mean[0] == "mean of 2 tasks" and mean[-1] == "cannot tell"
    assert first == ["arc_easy", "acc", "↑", "0.6000", "→", "0.5500", "-0.0500", "[-0.0700, -0.0300]", "200"] + [
        "31 / 21",
        "0.031",
        "0.031",
        "±0.0300",
        "worse",
    ]
    assert second[:3] == ["", "acc_norm", "↑"] and second[-4:] == ["<0.001", "<0.001", "±0.0300", "cannot tell"]
    assert third[0] == "piqa" and third[-5:] == ["-", "-", "-", "±0.0300", "better"]
    assert "Overview" not in to_markdown(single)


def test_gain_comes_first_and_is_named(single):
    model = replace(single.models[0], gain=loss())
    rows = markdown_rows(to_markdown(replace(single, models=(model,))), "lopt")[1:]
    assert rows[0][:7] == [
        "held-out answers (task trained on)",
        "answer_loss",
        "↓",
        "1.7000",
        "→",
        "1.0000",
        "-0.7000",
    ]
    assert rows[0][-1] == "better"


def test_intervals_of_another_level(single):
    assert "90 % interval" in markdown_rows(to_markdown(replace(single, confidence=0.9)), "lopt")[0]


def test_overview_of_many_models(grid):
    text = to_markdown(grid)
    headers, *rows = markdown_rows(text, "Overview: change from the base, 95 % interval")
    assert headers == [
        "Model",
        "held-out answers answer_loss ↓",
        "mean of 2 tasks accuracy ↑",
        "wikitext word_perplexity ↓",
        "arc_easy acc ↑",
        "piqa acc ↑",
        "Seeds",
    ]
    assert [row[0] for row in rows] == [model.label for model in grid.models]
    low_rate = grid.models[2]
    assert rows[2][1] == f"{low_rate.gain.value:.4f} ({low_rate.gain.delta:+.4f})"
    assert rows[2][2] == "-0.0030 [-0.0230, +0.0170]"
    assert rows[2][3] == "+0.1000 [-0.4000, +0.6000]"
    assert rows[2][-1] == "3"
    assert markdown_rows(text, low_rate.label)[0][9] == "Seeds"
    assert markdown_rows(text, low_rate.label)[1][9] == "3"


def test_overview_without_seeds_from_five_models_on(single):
    models = [replace(single.models[0], label=f"model {number}") for number in range(5)]
    assert make_tables(replace(single, models=tuple(models[:4])))[0].title == "model 0"
    overview = make_tables(replace(single, models=tuple(models)))[0]
    assert overview.title.startswith("Overview") and "Seeds" not in overview.headers


def test_contrasts(grid):
    headers, loss_row, accuracy_row = markdown_rows(
        to_markdown(grid), "Differences between methods: first minus second"
    )
    assert headers == ["First", "Second", "Task", "Metric", "", "Difference", "95 % interval", "Seeds"] + [
        "Holm p",
        "detectable",
        "Better",
    ]
    assert loss_row[2:] == ["held-out answers", "answer_loss", "↓", "-0.2000", "[-0.3000, -0.1000]", "3"] + [
        "0.002",
        "±0.1400",
        "method 0, lr 2e-05",
    ]
    assert accuracy_row[-3:] == ["-", "-", "no difference larger than 0.05"]


def test_findings_say_what_can_be_told(single):
    model = replace(single.models[0], gain=loss())
    same = accuracy(0.01, is_within_margin=True), perplexity(0.1, is_within_margin=True)
    unchanged = replace(model, label="still", gain=loss(0.01), deltas=same, mean=None)
    first, second = findings(replace(single, models=(model, unchanged)))
    said = {statement.start: statement.text.replace("\u00a0", " ") for statement in first.statements}
    assert said["Task trained on:"] == (
        "better; held-out answers answer_loss 1.7000 → 1.0000, -0.7000 [-0.8000, -0.6000]."
    )
    assert said["Worse:"] == "arc_easy acc -0.0500 [-0.0700, -0.0300]."
    assert said["Better:"] == "piqa acc +0.0400 [+0.0200, +0.0600]."
    assert said["Cannot tell:"] == (
        "mean of 2 tasks accuracy -0.0050 [-0.0250, +0.0150] (could have seen ±0.0300); "
        "arc_easy acc_norm -0.0100 [-0.0300, +0.0100] (could have seen ±0.0300)."
    )
    said = {statement.start: statement.text.replace("\u00a0", " ") for statement in second.statements}
    assert said["Task trained on:"].startswith("cannot tell;")
    assert said["No change larger than the margin"] == "in any retention task (n = 200 arc_easy, 62 wikitext)."


def test_a_metric_without_a_direction_is_neither_better_nor_worse(single, tmp_path):
    """No arrow, no colour and no place among what gain is drawn against; what is of no size known has no size."""
    told = replace(accuracy(-0.05, task="share"), higher_is_better=None, right_to_wrong=None, wrong_to_right=None)
    unknown = replace(accuracy(0.01, task="few"), higher_is_better=None, detectable=NAN)
    contrast = Contrast("a", "b", "share", "acc", None, -0.2, -0.3, -0.1, 3, 0.01)
    model = replace(single.models[0], gain=loss(), deltas=(told, unknown, perplexity()))
    report = replace(single, models=(model,), contrasts=(contrast,))
    row = next(row for row in markdown_rows(to_markdown(report), "lopt") if row[0] == "share")
    assert row[2] == "" and row[9] == "-" and row[-1] == "lower"
    (finding,) = findings(report)
    (statement,) = (statement for statement in finding.statements if statement.start == "Lower:")
    assert statement.text.startswith("share acc") and not statement.verdict
    assert not any("nan" in statement.text for statement in finding.statements)
    assert contrast.verdict == "b is higher"
    assert [outcome.task for outcome in retention_outcomes(report)] == ["mean of 2 tasks", "wikitext"]
    labels = [axes.get_xlabel() for axes in plot_deltas(report).axes]
    assert labels[-2:] == ["change in acc"] * 2
    write_report(report, tmp_path)
    assert json.loads((tmp_path / "report.json").read_text())["models"][0]["deltas"][0]["higher_is_better"] is None


def test_page_shows_tables_findings_and_settings(grid, grid_html):
    page = Page(grid_html)
    model = grid.models[3]
    for shown in (
        model.label,
        f"{model.gain.value:.4f} ({model.gain.delta:+.4f})",
        "cannot tell",
        "flips.jsonl",
        "seeds 0, 1, 2",
        f"This page has {18 * 4 + 2} of retention and between methods",
        "no difference larger than 0.05",
    ):
        assert shown in page.text
    images = [attributes for tag, attributes in page.tags if tag == "img"]
    assert len(images) == 2 and [tag for tag, _ in page.tags].count("svg") == 1  # the frontier's points can be focused
    for image in images:
        assert image["alt"]
        assert base64.b64decode(image["src"].removeprefix("data:image/png;base64,")).startswith(PNG)


@pytest.mark.skipif(shutil.which("node") is None, reason="a browser's language needs something that runs it")
@pytest.mark.parametrize(
    "cells",
    [
        ["[-inf, +0.2000]", "[-0.0300, -0.0100]", "[-0.0100, +0.0200]", "[+0.0000, +0.0100]", "[+0.0200, +inf]", "-"],
        ["-inf", "-3.0000", "7.1000", "12.5000", "+inf", "+inf", "-"],
        ["<0.001", "0.031", "1.000", "-"],
        ["\u00b10.0500", "\u00b10.2000", "\u00b1inf", "-"],
        ["3 / 10", "12 / 4", "-"],
    ],
    ids=["intervals", "infinite ones", "p-values", "sizes", "flips"],
)
def test_columns_of_numbers_are_sorted_by_them(cells):
    code = (Path(report_module.__file__).parent / "page.js").read_text().partition("function sort(")[0]
    code += """
    const cell = (text) => ({ textContent: text, classList: { contains: (name) => name === "number" } });
    const sorted = JSON.parse(process.argv[1]).sort((one, other) => compare(keyOf(cell(one)), keyOf(cell(other))));
    console.log(JSON.stringify(sorted));
    """
    shuffled = json.dumps([*cells[1::2], *cells[::2]])
    done = subprocess.run(["node", "-e", code, shuffled], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == cells


def test_page_loads_nothing(grid_html):
    for tag, attributes in Page(grid_html).tags:
        assert tag not in ("link", "iframe")
        assert tag != "script" or not attributes
        for name in {"src", "href", "srcset"} & attributes.keys():
            assert attributes[name].startswith("data:")
        assert attributes.get("xlink:href", "#").startswith("#")
    assert not re.search(r"https?://|@import|url\((?!#)", grid_html)


def test_points_of_the_frontier_tell_of_their_models(grid):
    """By pointing at them or by the tabulator key: values with their intervals, and the command."""
    command = 'lopt-hf sft --method e2e --note "<5>"'
    told = replace(grid, models=tuple(replace(model, command=command) for model in grid.models))
    points = [attributes for tag, attributes in Page(to_html(told)).tags if attributes.get("class") == "point"]
    assert len(points) == 2 * len(grid.models)  # in each panel
    assert all(point["tabindex"] == "0" and point["role"] == "img" for point in points)
    model = grid.models[3]
    (text,) = [p["aria-label"] for p in points if model.label in p["aria-label"] and "mean of" in p["aria-label"]]
    assert text == (
        f"{model.label}; gain {-model.gain.delta:+.4f} [{-model.gain.high:+.4f}, {-model.gain.low:+.4f}], "
        f"mean of 2 tasks {model.mean.delta:+.4f} [{model.mean.low:+.4f}, {model.mean.high:+.4f}]: {command}"
    )


def test_a_family_has_a_colour_and_a_shape(grid):
    """Its members differ by which half of the shape is filled; without families each method is one."""
    alone = group_styles(grid)
    assert len({(style.color, style.marker) for style in alone.values()}) == 9
    assert {style.fill for style in alone.values()} == {"full"}
    models = [replace(model, family=f"family {number // 6}") for number, model in enumerate(grid.models)]
    styles = list(group_styles(replace(grid, models=tuple(models))).values())
    assert len(set(styles)) == 9
    for start in (0, 3, 6):
        assert len({(style.color, style.marker) for style in styles[start : start + 3]}) == 1
    assert len({style.color for style in styles}) == len({style.marker for style in styles}) == 3


def test_plot_of_similarity(single):
    """How far from 1, by layer; what is the same bit for bit is grey, and what computes no numbers is left blank."""
    model = replace(single.models[0], similarity={"embeddings": 1.0, "0": 0.999, "1": 0.9, "2": NAN})
    axes = plot_similarity(replace(single, models=(model,))).axes[0]
    assert [text.get_text() for text in axes.get_xticklabels()] == ["embeddings", "layer 0", "layer 1", "layer 2"]
    drawn = [image.get_array().filled(math.nan).tolist()[0] for image in axes.images]
    assert drawn[0] == pytest.approx([0, math.nan, math.nan, math.nan], nan_ok=True)
    assert drawn[1] == pytest.approx([math.nan, 0.001, 0.1, math.nan], nan_ok=True)
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["unchanged"]
    assert plot_similarity(single) is None


@pytest.mark.parametrize("label", ["<b>bold</b>", 'quote " and & sign', "a | b", "price $5 and $6"])
def test_labels_are_escaped(single, label):
    model = replace(single.models[0], label=label, group=label, gain=loss(), drift={"0": 0.1})
    hostile = replace(single, models=(model,), settings={label: {label: [label]}}, baseline=label)
    page = Page(to_html(hostile))
    assert page.text.count(label) >= 6  # heading, introduction, setting and its two values, finding, table
    if "<" in label:
        assert label not in to_html(hostile)
        assert label not in to_markdown(hostile).replace("\\<b>", "")


def test_missing_intervals(single):
    """An interval of one sample is nan: no bar, no verdict in words, `-` in tables. Infinities are no trouble."""
    model = single.models[0]
    unknown = replace(accuracy(task="boolq", p_value=NAN), low=NAN, high=NAN)
    endless = replace(perplexity(), value=math.inf, delta=math.inf, low=math.inf, high=math.inf)
    gone = replace(accuracy(task="copa"), value=NAN, delta=NAN, low=NAN, high=NAN)
    gain = replace(loss(), low=NAN, high=NAN)
    models = (
        replace(model, deltas=(unknown, endless, gone), mean=None, gain=gain),
        replace(model, label="other", deltas=(accuracy(task="boolq"), perplexity()), gain=gain),
    )
    report = replace(single, models=models)
    rows = markdown_rows(to_markdown(report), "lopt")
    row = next(row for row in rows if row[0] == "boolq")
    assert row[6:8] == ["-0.0500", "-"] and row[-4:-2] == ["-", "-"]
    assert next(row for row in rows if row[0] == "copa")[5:8] == ["-", "-", "-"]
    said = {statement.start: statement.text for statement in findings(report)[0].statements}
    assert said["No interval, so nothing can be told:"] == "boolq acc; copa acc."
    assert PNG in base64.b64decode(re.search('base64,([^"]+)', to_html(report)).group(1))


@pytest.mark.parametrize(
    "points, frontier",
    [
        ([(0, 0)], [(0, 0)]),
        ([(0, 0), (1, -1), (2, -3), (1.5, -4), (0.5, -2)], [(0, 0), (1, -1), (2, -3)]),
        ([(0, 0), (1, 0.5), (2, 0.5)], [(2, 0.5)]),  # as much kept, more gained
        ([(0, 0), (1, -1), (1, -2), (1, -1)], [(0, 0), (1, -1)]),
        ([(0, 0), (-1, -1), (-0.5, 0.1)], [(-0.5, 0.1), (0, 0)]),
    ],
)
def test_pareto_frontier(points, frontier):
    assert pareto_frontier(points) == frontier


def test_frontier_of_a_report(grid):
    by_mean, by_perplexity = retention_outcomes(grid)
    assert (by_mean.kind, by_perplexity.task) == ("mean", "wikitext")
    labels = frontier_labels(grid, by_mean)
    assert labels[0] == "baseline"
    assert labels[-1] == "method 8, lr 0.0001"  # has gained most
    assert "method 0, lr 0.0001" not in labels  # has lost both


def test_plot_of_deltas(grid):
    figure = plot_deltas(grid)
    panels = figure.axes
    assert [axes.get_title() for axes in panels] == [
        "held-out answers (task trained on)",
        *(outcome.task for outcome in main_outcomes(grid)[1:]),
    ]
    directions = [re.search(r"\((\w+) is better", axes.get_xlabel()).group(1) for axes in panels]
    assert directions == ["lower", "higher", "lower", "higher", "higher"]
    assert [text.get_text() for text in panels[0].get_yticklabels()] == [model.label for model in grid.models]
    assert panels[2].get_xlim()[1] < 10  # one ruined model leaves room for the others, whose changes are up to 4


def test_a_ruined_model_stands_at_the_edge_with_its_values(grid):
    """In each plot of it; all others are where they are."""
    outcome = main_outcomes(grid)[2]
    axes = plot_deltas(grid).axes[2]
    ruined = outcome.of(grid.models[1])
    assert [text.get_text() for text in axes.texts] == [f"{ruined.delta:+.3g} [{ruined.low:+.3g}, {ruined.high:+.3g}]"]
    hollow = [line for line in axes.lines if line.get_markerfacecolor() == "white"]
    assert [(line.get_xdata()[0], line.get_ydata()[0]) for line in hollow] == [(axes.get_xlim()[1], 1)]
    filled = {line.get_ydata()[0]: line.get_xdata()[0] for line in axes.lines if line.get_markersize() == 5}
    assert filled == {row: outcome.of(model).delta for row, model in enumerate(grid.models) if row != 1}

    axes = plot_frontier(grid).axes[1]
    assert f"0.0001 ({-grid.models[1].gain.delta:.3g}, {-ruined.delta:.3g})" in {
        text.get_text() for text in axes.texts
    }
    assert axes.get_ylim()[0] > -10
    hollow = [line for line in axes.lines if line.get_markerfacecolor() == "white"]
    assert [line.get_ydata()[0] for line in hollow] == [axes.get_ylim()[0]]
    inside = [line for line in axes.lines if line.get_markersize() == 7.5]
    assert len(inside) == len(grid.models) - 1


def test_an_infinite_perplexity_is_drawn(grid):
    """At the edge, as `inf`; what is no number is left out."""
    outcome = main_outcomes(grid)[2]
    first, second, third = grid.models[:3]
    endless = replace(outcome.of(first), value=math.inf, delta=math.inf, low=NAN, high=NAN)
    models = (
        replace(first, deltas=(*first.deltas[:2], endless)),
        replace(second, deltas=(*second.deltas[:2], replace(endless, delta=NAN))),
        third,
    )
    report = replace(grid, models=models)
    (text,) = plot_deltas(report).axes[2].texts
    assert text.get_text() == "+inf"
    notes = [text.get_text() for text in plot_frontier(report).axes[1].texts]
    assert len(notes) == 1 and notes[0].endswith("-inf)")


def test_plot_of_the_frontier(grid):
    figure = plot_frontier(grid)
    assert [axes.get_title() for axes in figure.axes] == ["Gain against mean of 2 tasks", "Gain against wikitext"]
    assert all("up is better" in axes.get_ylabel() for axes in figure.axes)
    for axes in figure.axes:  # points of a group are told apart by their rate
        assert {text.get_text().partition(" ")[0] for text in axes.texts} == {"0.0001", "2e-05"}
    entries = [text.get_text() for text in figure.legends[0].get_texts()]
    assert entries == [f"method {number}" for number in range(9)] + [
        "baseline",
        "Pareto frontier",
        "single seeds",
        "beyond the edge: (gain, kept)",
    ]


def test_plot_of_drift(grid):
    ticks = plot_drift(grid).axes[0].get_xticklabels()
    assert [text.get_text() for text in ticks] == ["embeddings", *(f"layer {layer}" for layer in range(12)), "rest"]


def test_nothing_to_plot(single):
    assert plot_frontier(single) is None
    assert plot_drift(single) is None


def test_a_heat_maps_labels_do_not_stick_out(single):
    """Also where the bar of its colours is short beside its title."""
    moved = replace(single.models[0], drift={"embeddings": 1e-3, "0": 1e-3, "1": 2e-3, "rest": 0.0})
    figure = plot_drift(replace(single, models=(moved,)))
    pytest.importorskip("matplotlib.backends.backend_agg").FigureCanvasAgg(figure).draw()
    heat, bar = figure.axes
    assert bar.xaxis.label.get_window_extent().x0 >= heat.get_window_extent().x0 - 1
    drawn, (width, height) = figure.get_tightbbox(), figure.get_size_inches()
    assert min(drawn.x0, drawn.y0) >= 0 and drawn.x1 <= width and drawn.y1 <= height


def test_type_on_the_page_is_of_one_size_however_wide_a_plot_is(single):
    """An image's width there is that of its figure in inches, not the page's."""
    page = to_html(single)
    (width,) = re.findall(r'style="--width: (\d+)px"', page)
    assert int(width) == pytest.approx(96 * plot_deltas(single).get_figwidth(), abs=1)
    assert "width: var(--width)" in page


def test_a_page_has_a_dark_mode(single):
    page = to_html(single)
    light, dark = (
        dict(re.findall(r"--([\w]+): (#\w+);", part)) for part in page.split("prefers-color-scheme: dark")[:2]
    )
    assert "color-scheme: light dark" in page and dark.keys() >= light.keys() == {
        "ink",
        "faint",
        "line",
        "paper",
        "worse",
        "better",
    }
    assert not re.search(r"background: #", page.split(".scroll img")[0])  # but of drawings, which are on white


def test_unmoved_weights_are_drawn(single):
    frozen = replace(single.models[0], drift={"embeddings": 0.0, "0": 0.0})
    axes = plot_drift(replace(single, models=(frozen,))).axes[0]
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["unchanged"]


def test_infinite_drift_is_left_blank(single):
    diverged = replace(single.models[0], drift={"embeddings": 1e-3, "0": math.inf})
    image = plot_drift(replace(single, models=(diverged,))).axes[0].images[1]
    assert math.isfinite(image.norm.vmax) and image.get_array().tolist()[0] == [1e-3, None]


def test_files(pair, single, tmp_path):
    written = write_report(pair, tmp_path / "new" / "report")
    assert [path.name for path in written] == ALL_FILES
    assert sorted(path.name for path in written[0].parent.iterdir()) == sorted(ALL_FILES)
    assert json.loads(written[0].read_text())["models"][0]["gain"]["verdict"] == "better"
    assert written[1].read_text() == to_markdown(pair)
    assert all(path.read_bytes().startswith(PNG) for path in written[3:])

    rewritten = write_report(single, written[0].parent)
    assert [path.name for path in rewritten] == ALL_FILES[:4]
    assert not (written[0].parent / "frontier.png").exists()  # it was of the other report


def test_failing_plot_leaves_the_earlier_report(pair, single, tmp_path, monkeypatch):
    write_report(pair, tmp_path)
    earlier = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def fail(report):
        raise RuntimeError("no room to draw")

    monkeypatch.setitem(report_module.PLOTS, "drift.png", fail)
    with pytest.raises(RuntimeError, match="no room"):
        write_report(single, tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(ALL_FILES)
    for name in ("report.html", "deltas.png", "frontier.png", "drift.png"):
        assert (tmp_path / name).read_bytes() == earlier[name]
    assert (tmp_path / "report.md").read_text() == to_markdown(single)  # what was measured is kept


def test_failing_write_leaves_the_earlier_file(pair, single, tmp_path, monkeypatch):
    write_report(pair, tmp_path)
    earlier = (tmp_path / "report.json").read_bytes()

    def fail(self, path):
        path.write_text("{")
        raise OSError("disk full")

    monkeypatch.setattr(RetentionReport, "save", fail)
    with pytest.raises(OSError, match="disk full"):
        write_report(single, tmp_path)
    assert (tmp_path / "report.json").read_bytes() == earlier
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(ALL_FILES)


def test_without_matplotlib(single, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r'pip install "lopt_hf\[demo\]"'):
        write_report(single, tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["report.json", "report.md"]
