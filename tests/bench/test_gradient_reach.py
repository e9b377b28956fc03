"""Where gradients arrive: compared with the stock model's own, and with what each method promises."""

import pytest
import torch

from lopt_hf.bench.gradient_reach import GradientReach, measure_gradient_reach, plot_gradient_reach
from tests.local.methods.mlaan.helpers import make_mlaan_trainer
from tests.tiny import make_model
from tests.trainers.helpers import make_stock_trainer, make_trainer

PARTS = ("embeddings", "0", "1", "2", "3", "norm, head")
BLOCKS = [{"embeddings", "0"}, {"1"}, {"2"}, {"3", "norm, head"}]


def reached(reach: GradientReach) -> dict[str, set[str]]:
    rows = zip(reach.losses, reach.norms, strict=True)
    return {loss: {part for part, norm in zip(reach.parts, row, strict=True) if norm > 0} for loss, row in rows}


def test_norms_are_those_of_the_stock_model(tmp_path):
    trainer = make_stock_trainer(tmp_path, make_model())
    rows = [trainer.train_dataset[i] for i in range(4)]
    reach = measure_gradient_reach(trainer)
    model = make_model().eval()
    model(**trainer._prepare_inputs(trainer.data_collator(rows))).loss.backward()
    layers = model.model.layers
    parts = [model.model.embed_tokens, *layers, torch.nn.ModuleList([model.model.norm, model.lm_head])]
    expected = [sum(p.grad.square().sum().item() for p in part.parameters()) ** 0.5 for part in parts]
    assert (reach.losses, reach.parts) == (("task loss",), PARTS)
    assert reach.norms[0] == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("mode", ["eager", "joint"])
def test_lopt_keeps_each_loss_in_its_block(tmp_path, mode):
    trainer = make_trainer(tmp_path / "lopt", make_model(), num_blocks=4, local_backward=mode)
    reach = measure_gradient_reach(trainer)
    names = [*(f"local loss, block {i}" for i in range(3)), "task loss"]
    assert reached(reach) == dict(zip(names, BLOCKS, strict=True))
    whole = measure_gradient_reach(make_stock_trainer(tmp_path / "e2e", make_model()))
    assert reach.norms[-1][-2:] == pytest.approx(whole.norms[0][-2:], rel=1e-5)  # the last block sees what it saw


@pytest.mark.parametrize("window", [1, 2, 3])
def test_mlaan_reaches_its_window(tmp_path, window):
    trainer = make_mlaan_trainer(tmp_path, num_blocks=4, window=window)
    found = list(reached(measure_gradient_reach(trainer)).values())
    assert found == [set().union(*BLOCKS[max(0, i - window + 1) : i + 1]) for i in range(4)]


def end_to_end(folder):
    return measure_gradient_reach(make_stock_trainer(folder, make_model())).norms[0]


@pytest.mark.parametrize("recomputes", [True, False])
@pytest.mark.parametrize(
    "schedule",
    [
        {"task_reach": [2]},
        {"task_reach": [1, 2]},
        {"task_reach": [2, 1, 1, 1], "reach_unit": "run"},
        {"task_reach": [2, 1], "reach_unit": "microbatch", "gradient_accumulation_steps": 2},
    ],
)
def test_reach_of_all_blocks_is_end_to_end_training(tmp_path, schedule, recomputes):
    settings = {"local_objective": "none", "reach_recompute": recomputes, **schedule}
    trainer = make_trainer(tmp_path / "reach", make_model(), num_blocks=2, **settings)
    reach = measure_gradient_reach(trainer)
    assert reach.losses == ("task loss",)
    assert reach.norms[0] == pytest.approx(end_to_end(tmp_path / "e2e"), rel=1e-5)
    if 1 in trainer.learner.schedule.cycle:
        last = measure_gradient_reach(trainer, reach=1)
        assert last.norms[0] == pytest.approx((0.0, 0.0, 0.0, *reach.norms[0][3:]), rel=1e-5, abs=0)


def test_reach_beside_a_local_objective(tmp_path):
    """The task's gradient is that of end-to-end training where it reaches; a local one stays in its block."""
    trainer = make_trainer(tmp_path / "reach", make_model(), num_blocks=4, task_reach=[3, 1, 4])
    whole = end_to_end(tmp_path / "e2e")
    local = [norm for row in measure_gradient_reach(trainer, reach=1).norms[:-1] for norm in row]
    for blocks in (1, 3, 4):
        reach = measure_gradient_reach(trainer, blocks)
        assert list(reached(reach).values()) == [*BLOCKS[:3], set().union(*BLOCKS[-blocks:])]
        first = 0 if blocks == 4 else 5 - blocks  # embeddings are of the first block
        assert reach.norms[-1][first:] == pytest.approx(whole[first:], rel=1e-5)
        assert [norm for row in reach.norms[:-1] for norm in row] == pytest.approx(local, rel=1e-5, abs=0)


def test_reach_of_mlaan_is_wider_than_its_window(tmp_path):
    trainer = make_mlaan_trainer(tmp_path, num_blocks=4, window=2, task_reach=[4, 1])
    *local, task = reached(measure_gradient_reach(trainer)).values()
    assert local == [set().union(*BLOCKS[max(0, i - 1) : i + 1]) for i in range(3)]
    assert task == set(PARTS)
    *_, task = reached(measure_gradient_reach(trainer, reach=2)).values()
    assert task == BLOCKS[2] | BLOCKS[3]


@pytest.mark.parametrize("kind", ["lopt", "mlaan", "reach"])
def test_training_goes_on_as_if_nobody_had_looked(tmp_path, kind):
    make = make_mlaan_trainer if kind == "mlaan" else make_trainer
    settings = {"num_blocks": 4 if kind == "mlaan" else 2}
    if kind == "reach":
        settings |= {"task_reach": [2, 1], "local_objective": "none"}
    weights = []
    for looks in (False, True):
        trainer = make(tmp_path / f"{kind}{looks}", make_model(attention_dropout=0.1), **settings)
        if looks:
            gradient = next(trainer.model.parameters()).grad = torch.ones_like(next(trainer.model.parameters()))
            measure_gradient_reach(trainer)
            assert next(trainer.model.parameters()).grad is gradient
            trainer.model.zero_grad()
            assert len(trainer.boundary._unchecked_replays) == len(trainer.blocks)  # with dropout they are not checked
        trainer.train()
        weights.append([parameter.detach().clone() for parameter in trainer.model.parameters()])
    assert all(torch.equal(one, other) for one, other in zip(*weights, strict=True))


def test_frozen_blocks_have_no_loss(tmp_path):
    reach = measure_gradient_reach(make_trainer(tmp_path, make_model(), num_blocks=2, train_early_blocks=False))
    assert reached(reach) == {"task loss": {"2", "3", "norm, head"}}


def test_other_trainers_are_refused(tmp_path):
    with pytest.raises(ValueError, match="trainer=object .* pass an SFTTrainer"):
        measure_gradient_reach(object())


def test_reaches_that_the_trainer_has_not_are_refused(tmp_path):
    trainer = make_trainer(tmp_path / "reach", make_model(), num_blocks=4, task_reach=[2, 1])
    with pytest.raises(ValueError, match=r"reach=4 is none of the reaches \[1, 2\] that LoPTTrainer trains with; use"):
        measure_gradient_reach(trainer, reach=4)
    with pytest.raises(ValueError, match=r"reach=1 is none of the reaches \[\] that SFTTrainer .* leave it out"):
        measure_gradient_reach(make_stock_trainer(tmp_path / "e2e", make_model()), reach=1)


def test_the_plot_has_a_panel_for_each_model(tmp_path):
    reach = GradientReach(
        ("local loss, block 0", "task loss"), ("embeddings", "0", "norm, head"), ((2.0, 1.0, 0.0),) * 2
    )
    figure = plot_gradient_reach({"one": reach, "two": reach})
    figure.savefig(tmp_path / "reach.png")
    titles = [axes.get_title(loc="left") for axes in figure.axes[:2]]
    assert titles == ["one", "two"]
    assert [text.get_text() for text in figure.axes[0].get_yticklabels()] == list(reach.losses)
    with pytest.raises(ValueError, match="empty"):
        plot_gradient_reach({})
