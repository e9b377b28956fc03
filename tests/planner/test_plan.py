"""Which row is the cheapest, what does not fit, and bad settings."""

import json
from dataclasses import replace

import pytest
from transformers import AutoConfig

from lopt_hf.common.arithmetic import measure_arithmetic
from lopt_hf.planner import device
from lopt_hf.planner.device import DeviceSpeed, measure_speed, read_speed, write_speed
from lopt_hf.planner.memory import CATEGORIES
from lopt_hf.planner.plan import Plan, PlanRow, PlanSettings, make_plan
from lopt_hf.planner.report import to_json, to_markdown
from lopt_hf.planner.step import StepCost
from lopt_hf.planner.strategies import Strategy
from lopt_hf.planner.units import GIB
from tests.planner.test_simulation import tiny_config

SETTINGS = PlanSettings(model="tiny", device_memory=10 * GIB, batch_size=2, seq_length=16, num_blocks=(2,))
SPEED = DeviceSpeed("cpu", "test", 1e9, 1e9)


def make_row(name, method, gib, time, fits):
    peak = dict.fromkeys(CATEGORIES, 0) | {"parameters": int(gib * GIB)}
    cost = StepCost(
        peak, gradient_bytes=GIB, saved_bytes=GIB, flops=10**12, moved_bytes=10**9, parameters=100, trainable=100
    )
    return PlanRow(Strategy(name, method), cost, fits, 1e9, None, time)


FROZEN = make_row("freeze", "freeze", 4, 0.7, True)
SLOW = make_row("slow", "e2e", 6, 1.3, True)
FAST = make_row("fast", "lopt", 8, 1.0, True)
SMALLER = make_row("smaller", "lopt", 7, 1.0, True)
LARGE = make_row("large", "e2e", 12, 0.9, False)


@pytest.mark.parametrize(
    ("rows", "cheapest"),
    [
        ((FROZEN, SLOW, FAST, LARGE), FAST),
        ((FROZEN, SLOW, FAST, SMALLER), SMALLER),
        ((FROZEN, SLOW, LARGE), SLOW),
        ((FROZEN, LARGE), FROZEN),
        ((LARGE,), None),
    ],
)
def test_cheapest_is_the_fastest_that_fits_and_trains_everything(rows, cheapest):
    assert Plan(SETTINGS, rows).cheapest is cheapest


def test_report_marks_the_cheapest():
    text = to_markdown(Plan(SETTINGS, (FROZEN, SLOW, FAST, LARGE), left_out=("RepL: why.",)))
    assert "| **fast** (cheapest) | 8.00 |" in text
    assert "Cheapest that fits in 10.00 GiB with 10% kept free: fast (every weight is trained)." in text
    assert text.endswith("Left out: RepL: why.")


def test_report_says_where_end_to_end_training_fits_too():
    dearer = make_row("end-to-end", "e2e", 9, 1.1, True)
    assert "End-to-end training fits too, and learns most" in to_markdown(Plan(SETTINGS, (FAST, dearer)))
    for rows in ((FAST, replace(dearer, fits=False)), (FAST, replace(dearer, relative_time=0.9)), (FAST,)):
        assert "End-to-end training fits too" not in to_markdown(Plan(SETTINGS, rows))


def test_rows_that_freeze_tied_embeddings():
    """Come behind those that train every weight, and before those that leave layers out; the report says so."""
    settings = replace(SETTINGS, strategies=("e2e", "reach", "lopt", "freeze"), tied_embeddings="freeze")
    plan = make_plan(settings, tiny_config(tie_word_embeddings=True))
    assert {row.strategy.method for row in plan.rows if row.strategy.trains_all} == {"e2e"}
    assert plan.cheapest.strategy.method == "e2e"
    plan = replace(plan, rows=plan.rows[2:])
    assert plan.cheapest.strategy.method == "reach"
    assert "reach 2,1,1,1 (every weight but the tied embeddings is trained)." in to_markdown(plan)


@pytest.mark.parametrize(("tied", "setting"), [(True, "untie"), (False, "freeze")])
def test_rows_that_freeze_no_embeddings(tied, setting):
    settings = replace(SETTINGS, strategies=("reach", "lopt"), tied_embeddings=setting)
    plan = make_plan(settings, tiny_config(tie_word_embeddings=tied))
    assert all(row.strategy.trains_all for row in plan.rows)
    assert "(every weight is trained)." in to_markdown(plan)
    assert ("unless `--tied-embeddings freeze` keeps them" in to_markdown(plan)) is tied


def test_report_says_what_would_be_needed():
    text = to_markdown(Plan(SETTINGS, (LARGE,)))
    assert "Nothing fits in 10.00 GiB with 10% kept free. The least is 'large' with 13.33 GiB" in text
    assert json.loads(to_json(Plan(SETTINGS, (LARGE,))))["cheapest"] is None


def test_plan_of_a_tiny_model():
    settings = replace(SETTINGS, strategies=("e2e", "lopt", "ppll"), num_gpus=2)
    plan = make_plan(settings, tiny_config())
    assert [row.strategy.name for row in plan.rows[::2]] == ["end-to-end", "LoPT K=2", "PPLL on 2 devices"]
    rows = {row.strategy.name: row for row in plan.rows}
    assert all(row.fits for row in plan.rows)
    assert rows["end-to-end"].relative_time == 1
    assert rows["PPLL on 2 devices"].flops_per_token == pytest.approx(rows["LoPT K=2"].flops_per_token)
    assert rows["PPLL on 2 devices"].relative_time >= 1  # two devices are never faster than twice one
    assert plan.cheapest is rows["end-to-end"]


def test_time_by_a_devices_speed():
    settings = replace(SETTINGS, strategies=("e2e",))
    row, _ = make_plan(settings, tiny_config(), SPEED).rows
    assert row.step_seconds == (row.cost.flops + row.cost.moved_bytes) / 1e9
    assert "A step of 'end-to-end'" in to_markdown(make_plan(settings, tiny_config(), SPEED))


def test_speed_is_saved_and_read(tmp_path):
    path = tmp_path / "speed.json"
    write_speed(SPEED, path)
    assert read_speed(path) == SPEED
    assert SPEED.seconds(2e9, 1e9) == 3


def test_the_type_of_a_speed_is_measured_saved_and_told(tmp_path, monkeypatch):
    monkeypatch.setattr(device, "_MATRIX", {"cpu": 8, "accelerator": 8})
    monkeypatch.setattr(device, "_VECTOR", {"cpu": 8, "accelerator": 8})
    path = tmp_path / "speed.json"
    write_speed(measure_speed(), path)
    speed = read_speed(path)
    assert speed.dtype == measure_arithmetic().dtype
    plan = make_plan(replace(SETTINGS, strategies=("e2e",)), tiny_config(), speed)
    assert f"Time: at the speed of {speed.name} ({speed.device}, {speed.dtype}), communication" in to_markdown(plan)


def test_a_speed_of_before_its_type_was_saved(tmp_path):
    path = tmp_path / "speed.json"
    path.write_text('{"device": "cpu", "name": "x", "flops_per_second": 2, "bytes_per_second": 1}')
    speed = read_speed(path)
    assert speed == DeviceSpeed("cpu", "x", 2, 1) and speed.dtype is None
    assert "Time: at the speed of x (cpu), communication" in to_markdown(Plan(SETTINGS, (FAST,), speed))


NO_NUMBER = '{"device": "cpu", "name": "x", "flops_per_second": "fast", "bytes_per_second": 1}'


@pytest.mark.parametrize("text", ["", "{}", "[1]", NO_NUMBER])
def test_what_is_no_speed(text, tmp_path):
    path = tmp_path / "speed.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"calibration='.*speed.json' is no measurement of `lopt-hf plan --calibrate"):
        read_speed(path)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"batch_size": 0}, "batch_size=0 is too small; set it to 1 or more"),
        ({"seq_length": 1}, "seq_length=1 is too small; set it to 2 or more"),
        ({"num_gpus": 0}, "num_gpus=0 is too small"),
        ({"headroom": 1.0}, "headroom=1.0 must be a share of the device"),
        ({"num_blocks": (1, 2)}, r"num_blocks=\(1, 2\) must name numbers of 2 or more"),
        ({"num_blocks": ()}, r"num_blocks=\(\) must name"),
        ({"dtype": "bf16"}, "dtype='bf16' is unknown, nearest is 'bfloat16'; use bfloat16, float32"),
        ({"optim": "adamw8bit"}, "optim='adamw8bit' is unknown, nearest is 'adamw_8bit'"),
        ({"strategies": ("e2e", "loptt")}, "strategies='loptt' is unknown, nearest is 'lopt'"),
        ({"tied_embeddings": "tie"}, "tied_embeddings='tie' is unknown"),
        ({"strategies": ("e2e", "lopt"), "task_reach": (2, 1)}, r"task_reach=\(2, 1\) is for the rows reach, "),
        ({"strategies": ("lora",), "reach_unit": "step"}, "reach_unit='step' is for the rows reach, "),
        ({"strategies": ("e2e",), "lora_r": 32}, r"lora_r=32 is for the rows lora, which strategies=\('e2e',\) "),
    ],
)
def test_bad_settings(values, message):
    with pytest.raises(ValueError, match=message):
        replace(SETTINGS, **values)


def test_sequence_longer_than_the_model_takes():
    with pytest.raises(ValueError, match="seq_length=129: the model takes 128 tokens; use at most 128"):
        make_plan(replace(SETTINGS, seq_length=129), tiny_config())


@pytest.mark.parametrize("family", ["t5", "vit"])
def test_model_that_is_no_decoder(family):
    with pytest.raises(ValueError, match="model='tiny' .* is no decoder-only language model"):
        make_plan(SETTINGS, AutoConfig.for_model(family))


def test_experts_in_fp32():
    with pytest.raises(ValueError, match="dtype='float32': of the experts of mixtral .* set dtype to bfloat16"):
        make_plan(replace(SETTINGS, dtype="float32"), tiny_config("mixtral"))


def test_experts_in_fp32_of_a_model_with_images():
    """Whose experts are in the config of its text model."""
    with pytest.raises(ValueError, match="dtype='float32': of the experts of qwen3_vl_moe .* set dtype to bfloat16"):
        make_plan(replace(SETTINGS, dtype="float32"), AutoConfig.for_model("qwen3_vl_moe"))


def test_strategies_none_of_which_is_possible():
    with pytest.raises(ValueError, match=r"strategies=\('ppll',\): none of them is possible .* num_gpus=1"):
        make_plan(replace(SETTINGS, strategies=("ppll",)), tiny_config())
