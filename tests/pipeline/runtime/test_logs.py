"""What a pipeline's run leaves beside the model, of which nothing may cost the model; and what draws its dropout."""

import json
import sys
from collections import defaultdict
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from transformers import set_seed
from trl import SFTTrainer

from lopt_hf import PipelineConfig
from lopt_hf.pipeline.events import Event
from lopt_hf.pipeline.runtime.logs import StageCallback, add_final_figures, collect_timelines
from lopt_hf.pipeline.runtime.timeline import Timeline
from lopt_hf.pipeline.runtime.trainer import PipelineTrainer
from tests.distributed.pipeline_processes import assert_succeeded, run, write_inputs

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


def test_a_stage_logs_the_drift_of_its_own_blocks(monkeypatch):
    """Those of other stages are not here, and have not moved for that reason."""
    trainer = object.__new__(PipelineTrainer)
    trainer.model, trainer._metrics = SimpleNamespace(training=True), {"train": defaultdict(list)}
    trainer.learner = SimpleNamespace(owned=lambda: None)
    trainer.plan = SimpleNamespace(blocks=[SimpleNamespace(index=1)])
    trainer._drift, trainer._own_drift = None, SimpleNamespace(measure=lambda owned: [0.0, 0.25])
    monkeypatch.setattr(SFTTrainer, "log", lambda *args: None)
    trainer.log({})
    assert trainer._metrics["train"] == {"drift/block_1": [0.25]}


@pytest.mark.parametrize("text", ["My own notes\n", None], ids=["the user's", "none"])
def test_a_readme_of_the_users_is_kept(tmp_path, monkeypatch, text):
    if text is not None:
        (tmp_path / "README.md").write_text(text)
    written = []
    monkeypatch.setattr("lopt_hf.pipeline.runtime.stage_trainer.save_stage_model", lambda *args: None)
    monkeypatch.setattr(PipelineTrainer, "create_model_card", lambda self, **given: written.append(given))
    trainer = object.__new__(PipelineTrainer)
    trainer.args, trainer.world = SimpleNamespace(output_dir=str(tmp_path)), SimpleNamespace(reports=True)
    trainer.save_model()
    assert bool(written) == (text is None)


def final_figures(monkeypatch, replicas=1, max_steps=4, resumed_stages=None):
    """Of the last of two stages, whose own figures are a loss of 2, 10 rows a second and 100 operations."""
    monkeypatch.setattr(dist, "all_reduce", lambda tensor, group: tensor.add_(3.0))  # the other replica's loss
    monitor = SimpleNamespace(wait_for=lambda store, key: store[key])
    mesh = SimpleNamespace(size=lambda: 2 * replicas)
    trainer = SimpleNamespace(
        args=SimpleNamespace(max_steps=max_steps),
        world=SimpleNamespace(
            num_replicas=replicas, rank=replicas, reports=True, mesh=mesh, monitor=monitor, data_group=None
        ),
        store=Store({f"total_flos/{rank}": "10.0" for rank in range(2 * replicas)}),
        plans=[None, None],
        state=SimpleNamespace(total_flos=100.0),
        _manifest=None if resumed_stages is None else SimpleNamespace(stage_folders=[None] * resumed_stages),
    )
    logs = {"train_loss": 2.0, "train_samples_per_second": 10.0, "total_flos": 100.0}
    add_final_figures(trainer, logs)
    assert trainer.state.total_flos == logs.get("total_flos", 100.0)
    return logs


def test_final_figures_are_of_all_stages_and_replicas(monkeypatch):
    assert final_figures(monkeypatch) == {
        "train_loss": 2.0,
        "train_samples_per_second": 10.0,
        "total_flos": 110.0,
    }
    of_two = {"train_loss": 2.5, "train_samples_per_second": 20.0, "total_flos": 130.0}
    assert final_figures(monkeypatch, replicas=2) == of_two
    # Of epochs transformers takes all rows of the data set, however many replicas share them
    assert final_figures(monkeypatch, replicas=2, max_steps=-1) == of_two | {"train_samples_per_second": 10.0}


def test_operations_are_not_told_where_the_stages_before_were_others(monkeypatch):
    assert "total_flos" in final_figures(monkeypatch, resumed_stages=2)
    assert "total_flos" not in final_figures(monkeypatch, resumed_stages=3)


def masks_drawn_by(stage, folder, step=0, **settings):
    """What is drawn after a stage's training has begun, and the seed by which its next run would order the data."""
    args = PipelineConfig(output_dir=str(folder), bf16=False, **settings)
    callback = StageCallback(SimpleNamespace(plan=SimpleNamespace(index=stage)))
    set_seed(args.seed)
    torch.rand(3)  # in making the trainer
    state = SimpleNamespace(global_step=step)
    callback.on_train_begin(args, state, None)
    drawn = torch.rand(8).tolist()
    callback.on_train_end(args, state, None)
    return drawn, torch.initial_seed()


def test_each_stage_draws_masks_of_its_own(tmp_path):
    set_seed(42)
    torch.rand(3)
    today = torch.rand(8).tolist()
    drawn = [masks_drawn_by(stage, tmp_path) for stage in range(3)]
    assert drawn[0] == (today, 42)
    assert len({tuple(masks) for masks, _ in drawn}) == 3 and {seed for _, seed in drawn} == {42}
    assert masks_drawn_by(1, tmp_path, step=5)[0] == today  # until the checkpoint's state is loaded


@pytest.mark.parametrize(
    "settings",
    [{"train_sampling_strategy": "group_by_length"}, {"accelerator_config": {"use_seedable_sampler": False}}],
    ids=["grouped", "not seedable"],
)
def test_not_where_the_order_of_the_data_is_drawn_too(tmp_path, settings):
    assert masks_drawn_by(1, tmp_path, **settings) == masks_drawn_by(0, tmp_path, **settings)


@pytest.mark.parametrize("resumes", [False, True], ids=["whole", "resumed"])
def test_the_stages_of_a_run_are_seeded_apart_and_their_replicas_alike(tmp_path, resumes):
    write_inputs(tmp_path)
    settings = {"num_blocks": 2, "data_parallel": 2, "save_steps": 1, "use_peft": True, "lora_dropout": 0.5}
    folder = tmp_path / "out"
    for steps in (1, 2) if resumes else (2,):
        assert_succeeded(*run(tmp_path, folder, ranks=4, max_steps=steps, resume_from_checkpoint="auto", **settings))
    seeds = []
    for name in ("stage-0", "stage-0-replica-1", "stage-1", "stage-1-replica-1"):
        state = torch.load(folder / "checkpoint-2" / name / "rng_state.pth", weights_only=False)
        generator = torch.Generator()
        generator.set_state(state["cpu"])
        seeds.append(generator.initial_seed())
    assert seeds == [0, 0, 1, 1]
