"""`lopt-hf peers` on a tiny model: from the arguments to a stock checkpoint, and what it refuses."""

import json

import pytest
from transformers import AutoModelForCausalLM

from lopt_hf import cli
from lopt_hf.common.compared_methods import PEERS
from lopt_hf.compare.curves import read_curve
from lopt_hf.scripts import peers
from tests.scripts.test_training import arguments


@pytest.mark.parametrize("method", PEERS)
def test_a_run(tmp_path, method):
    clipping = {"max_grad_norm": 0.0} if method == "e2e_step_in_backward" else {}
    cli.main(["peers", *arguments(tmp_path, "sft", method=method, **clipping)])
    _, info = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info.values()), info
    assert list(read_curve(str(tmp_path / "out"), "loss")) == [1, 2]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"method": "lisa", "lisa_period": 0}, "lisa_period=0 is too small; set it to 1 or more"),
        ({"method": "lisa", "lisa_layer": 2}, "'lisa_layer' (did you mean 'lisa_layers'?)"),
        ({"method": "osf", "osf_effective_rank": 1.0}, "osf_effective_rank=1.0 is no share of the directions"),
        ({"method": "lora"}, "method"),
    ],
)
def test_bad_options_are_one_line(tmp_path, capsys, values, message):
    with pytest.raises(SystemExit) as ended:
        peers.main(arguments(tmp_path, "sft", **values))
    assert ended.value.code == 2
    assert message in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"method": "e2e_step_in_backward"}, "max_grad_norm=1.0 clips"),
        ({"method": "e2e_segments", "num_blocks": 5}, "num_blocks=5 does not fit a model with 4 layers"),
        ({"method": "e2e_segments", "activation_checkpointing": True}, "set activation_checkpointing to False"),
        ({"method": "lisa", "lisa_layers": 5}, "LISA: layers=5, but the model has 4"),
        ({"method": "lisa", "use_peft": True}, "LISA trains the model's own weights"),
        (
            {"method": "lisa", "badam_period": 8},
            "badam_period=8 is an option of method 'badam', and method='lisa'; le",
        ),
        (
            {"method": "e2e_step_in_backward", "num_blocks": 4},
            "num_blocks=4 is an option of method 'freeze_last', and",
        ),
        ({"method": "osf", "use_peft": True}, "osf is an adapter itself; leave it out"),
    ],
)
def test_runs_that_do_not_suit_are_one_line(tmp_path, values, message):
    with pytest.raises(SystemExit, match=f"lopt-hf peers: .*{message}"):
        peers.main(arguments(tmp_path, "sft", **values))


def test_a_run_goes_on_with_its_own_cycle(tmp_path):
    saving = {"method": "badam", "save_strategy": "steps", "save_steps": 1, "resume_from_checkpoint": "auto"}
    peers.main(arguments(tmp_path, "sft", **saving, max_steps=1))
    with pytest.raises(SystemExit, match="BAdam began with period=100, and now it is 3"):
        peers.main(arguments(tmp_path, "sft", **saving, badam_period=3))
    peers.main(arguments(tmp_path, "sft", **saving, max_steps=2))
    assert list(read_curve(str(tmp_path / "out"), "loss")) == [1, 2]


def test_rows_that_are_left_out_or_cut_are_counted(tmp_path, caplog):
    rows = [("Hi", "Hello"), ("Hi", "Hello " * 99), ("Hi " * 99, "Hello"), ("Hi", "Bye")]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"question": asked, "answer": told}) + "\n" for asked, told in rows))
    peers.main(arguments(tmp_path, "sft", dataset_name=str(path), max_length=64, max_steps=1))
    assert "max_length=64 cuts off the whole answer of 1 of 4 rows, which are left out." in caplog.messages
    assert "1 of 3 rows reach max_length=64 and are cut where they are longer, within an answer" in caplog.text
