"""What a pipeline's run leaves beside the model; nothing of it may cost the model."""

import json
import sys
from types import SimpleNamespace

import pytest

from lopt_hf.pipeline.events import Event
from lopt_hf.pipeline.runtime.logs import collect_timelines
from lopt_hf.pipeline.runtime.timeline import Timeline
from lopt_hf.pipeline.runtime.trainer import PipelineTrainer

EVENTS = [Event(0, "forward", 0, 5.0, 6.0), Event(0, "backward", 0, 6.0, 8.0)]


class Store(dict):
    def set(self, key, value):
        self[key] = value


def trainer_with(events, folder):
    """What `collect_timelines` reads of the trainer of a pipeline's only stage."""
    plan = SimpleNamespace(index=0)
    monitor = SimpleNamespace(wait_for=lambda store, key: store[key])
    return SimpleNamespace(
        args=SimpleNamespace(timeline_steps=8, output_dir=str(folder)),
        world=SimpleNamespace(replica=0, reports=True, monitor=monitor),
        store=Store(),
        plan=plan,
        plans=[plan],
        timeline=SimpleNamespace(events=events),
    )


def test_a_run_that_went_on_behind_the_first_steps_has_no_timeline(tmp_path):
    collect_timelines(trainer_with([], tmp_path / "out"))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("draws", [True, False])
def test_without_matplotlib_the_trace_alone_is_written(draws, tmp_path, monkeypatch, caplog):
    if not draws:
        monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    collect_timelines(trainer_with(EVENTS, tmp_path))
    trace = json.loads((tmp_path / "timeline.json").read_text())
    assert any(event.get("ts") == 1e6 for event in trace["traceEvents"])
    assert (tmp_path / "timeline.png").is_file() == draws
    assert ("Of the timeline only" in caplog.text) != draws


def test_local_backwards_are_recorded_in_the_timeline_of_then():
    """The learner is made before a benchmark puts a timeline that keeps more steps in the place of the trainer's."""
    trainer = object.__new__(PipelineTrainer)
    trainer.accelerator = SimpleNamespace(backward=None, autocast=None)
    trainer.timeline = Timeline(0)
    events = trainer._learner_events()
    trainer.timeline = Timeline(0, kept_steps=1)
    for span in (events.around_backward, events.around_step):
        with span():
            pass
    assert [event.kind for event in trainer.timeline.events] == ["backward", "optimizer"]
