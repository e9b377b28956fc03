"""What `experiments/cifar10/run.py` trains is what `lopt-hf image` takes."""

import argparse
import importlib.util
from pathlib import Path

import pytest

from lopt_hf.scripts import image
from lopt_hf.scripts.image_models import make_image_model
from lopt_hf.scripts.image_replacement import replace_layers
from lopt_hf.scripts.parsing import chosen_method

SCRIPT = Path(__file__).parents[2] / "experiments" / "cifar10" / "run.py"


@pytest.fixture(scope="module")
def experiment():
    spec = importlib.util.spec_from_file_location("cifar10_run", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_results_of_other_arguments_are_not_taken(experiment, tmp_path, capsys):
    options = {"architecture": "vit", "train_file": "a.parquet", "eval_file": "b.parquet", "output_dir": tmp_path}
    file = tmp_path / "run.json"
    for epochs in (1, 1):
        arguments = experiment.arguments_of(argparse.Namespace(**options, epochs=epochs), [], 0, tmp_path)
        experiment.check_arguments(file, arguments)
    with pytest.raises(SystemExit, match="2"):
        experiment.check_arguments(
            file, experiment.arguments_of(argparse.Namespace(**options, epochs=2), [], 0, tmp_path)
        )
    assert "--num_train_epochs 1" in capsys.readouterr().err


@pytest.mark.parametrize("architecture, every_second", [("vit", [1, 3, 5]), ("resnet20", [1, 4, 7])])
def test_every_run_is_one_that_the_command_takes(experiment, architecture, every_second, tmp_path):
    options = argparse.Namespace(architecture=architecture, train_file="a.parquet", eval_file="b.parquet", epochs=1)
    models = {}
    methods = {}
    for claim in experiment.CLAIMS:
        methods |= experiment.methods_of(architecture, claim)
    for name, method in methods.items():
        arguments = experiment.arguments_of(options, method, 0, tmp_path)
        script_args, _, model_args = image.make_parser(chosen_method(arguments)).parse_args_and_config(arguments)
        assert script_args.method == method[1] and model_args.architecture == architecture
        if name in experiment.CLAIMS["repl"] and script_args.method == "repl":
            models[name] = replace_layers(make_image_model(model_args, ["a", "b"])[0], model_args)
    assert list(experiment.methods_of(architecture, "repl")) == ["end-to-end", *models]
    replaced, plain = models.values()
    assert replaced.config.repl["removed"] == every_second
    stock = {name: value.shape for name, value in plain.state_dict().items()}
    kept = {name: value.shape for name, value in replaced.state_dict().items() if ".surrogate." not in name}
    assert kept == stock, "the same layers go"
