"""`--accelerate_config`: a training command that starts itself by `accelerate launch`."""

import sys
from subprocess import CalledProcessError

import pytest

from lopt_hf import cli
from lopt_hf.common import host_launcher
from lopt_hf.common.launching import ON_THIS_HOST
from lopt_hf.scripts import launching
from lopt_hf.scripts.launching import launch_if_asked
from tests.scripts.test_training import arguments


@pytest.fixture
def launched(monkeypatch):
    """What would be launched, in place of a launcher that ends with status 3."""
    commands = []

    def run(command, environment):
        assert list(environment) == ["LOPT_HF_LAUNCHED"]
        commands.append(list(command))
        return 3

    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.setattr(launching, "run_launcher", run)
    return commands


def launch(*given, command="sft"):
    checked = []
    with pytest.raises(SystemExit) as ended:
        launch_if_asked(command, list(given), checked.append)
    assert ended.value.code == 3
    return checked


def test_the_launcher_gets_its_own_options_and_the_command_all_others(launched):
    checked = launch("--accelerate_config", "fsdp2_8", "--num_blocks", "4", "--num_processes=2", "--config", "a.yaml")
    (command,) = launched
    assert command[:4] == [sys.executable, "-m", "lopt_hf.common.host_launcher", "--config_file"]
    assert command[4].endswith("accelerate_configs/fsdp2_8.yaml")
    rest = ["--num_blocks", "4", "--config", "a.yaml"]
    assert command[5:] == ["--num_processes", "2", *ON_THIS_HOST, "-m", "lopt_hf.scripts.sft", *rest]
    assert checked == [rest]


def test_several_machines_meet_where_the_user_says(launched):
    launch("--accelerate-config", "ddp_8", "--num_machines", "2", "--main_process_port", "29501")
    assert not {"0", "--rdzv_backend"} & set(launched[0])
    assert launched[0][launched[0].index("--main_process_port") + 1] == "29501"


def test_processes_of_one_machine_meet_at_the_port_that_the_user_gives(launched):
    launch("--accelerate-config", "ddp_8", "--main-process-port", "29501")
    assert launched[0][5:-2] == [*ON_THIS_HOST, "--rdzv_conf", "port=29501"]


def test_a_recipe_may_name_the_configuration(launched, tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("accelerate_config: ddp_2")
    launch("--config", str(recipe), command="dpo")
    launch("--config", str(recipe), "--accelerate_config", "single", command="dpo")
    assert [command[4].rpartition("/")[2] for command in launched] == ["ddp_2.yaml", "single.yaml"]
    assert launched[0][-4:] == ["-m", "lopt_hf.scripts.dpo", "--config", str(recipe)]


@pytest.mark.parametrize("value", ["[ddp_2]", "8", "''"])
def test_what_is_no_name_is_left_to_the_command(launched, tmp_path, value):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"accelerate_config: {value}")
    launch_if_asked("sft", ["--config", str(recipe)])
    assert not launched


def test_nothing_is_launched_twice(launched, tmp_path, monkeypatch, capsys):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("accelerate_config: ddp_2")
    launch_if_asked("sft", ["--num_blocks", "2"])
    monkeypatch.setenv("RANK", "0")
    launch_if_asked("sft", ["--config", str(recipe)])
    with pytest.raises(SystemExit) as ended:
        launch_if_asked("sft", ["--accelerate_config", "ddp_2"])
    assert ended.value.code == 2 and "leave out one of the two" in capsys.readouterr().err
    monkeypatch.setenv("LOPT_HF_LAUNCHED", "1")
    launch_if_asked("sft", ["--accelerate_config", "ddp_2"])
    assert not launched


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            ["--accelerate_config", "ddp2"],
            "accelerate_config='ddp2' is no file here, nor one of the package's",
        ),
        (["--accelerate_config", "ddp_2", "--num_blcks", "2"], "did you mean 'num_blocks'?"),
        (["--accelerate_config", "single", "--num_processes", "2"], "num_processes=2 has no effect"),
    ],
)
@pytest.mark.parametrize("command", ["sft", "dpo", "grpo", "mlaan", "pipeline"])
def test_errors_come_before_the_launch(launched, capsys, command, given, message):
    with pytest.raises(SystemExit) as ended:
        cli.main([command, *given])
    error = capsys.readouterr().err
    assert ended.value.code == 2 and error.count("\n") == 1 and message in error
    assert not launched


def test_a_run_in_one_process(tmp_path, capfd):
    """The real launcher, from the command to the saved model."""
    with pytest.raises(SystemExit) as ended:
        cli.main(["sft", *arguments(tmp_path, "sft"), "--accelerate_config", "single"])
    assert ended.value.code == 0, capfd.readouterr().err
    assert (tmp_path / "out" / "model.safetensors").is_file()


class TestLauncher:
    """How the launcher itself ends where it is not its processes that are many."""

    @pytest.mark.parametrize(("status", "expected"), [(2, 2), (1, 1), (-9, 1)])
    def test_one_process_that_failed(self, status, expected, monkeypatch, capsys):
        def fail(arguments):
            raise CalledProcessError(status, "sft")

        monkeypatch.setattr(host_launcher, "launch_command", fail)
        with pytest.raises(SystemExit) as ended:
            host_launcher.main(["script.py"])
        assert ended.value.code == expected and capsys.readouterr().err == ""  # the process has said why

    def test_a_configuration_that_accelerate_refuses(self, capsys):
        with pytest.raises(SystemExit) as ended:
            host_launcher.main(["--cpu", "--multi_gpu", "--num_processes", "2", "--gpu_ids", "0", "script.py"])
        error = capsys.readouterr().err
        assert ended.value.code == 2 and error.startswith("lopt-hf: ") and error.count("\n") == 1
