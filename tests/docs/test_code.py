"""The code of README and the pages: Python runs as written, commands are run or parsed as written.

Tiny models with random weights stand in for the named ones, and made sums for the data, so that no hub is needed.
"""

import re
import tomllib

import datasets
import pytest
from datasets import Dataset

from lopt_hf import cli
from tests.docs.commands import as_command, command_lines, parse
from tests.docs.markdown import PAGES, ROOT, blocks, read
from tests.docs.test_pages import MARKDOWN
from tests.tiny import make_dataset, make_model, make_tokenizer

CODE = [ROOT / "README.md", *(page for page in PAGES if page.name != "index.md")]
NAMED = re.compile(r"\b(?:Qwen|HuggingFaceTB|meta-llama)/[\w.-]+")
TRAINING = ("sft", "mlaan", "peers", "dpo", "grpo")
SHORT = {
    "max_steps": 4,
    "dataset_max_samples": 16,
    "per_device_train_batch_size": 4,
    "eval_strategy": "no",
    "report_to": "none",
}


@pytest.fixture(scope="module")
def tiny_model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("named") / "model"
    make_model("qwen2", max_position_embeddings=1024).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return str(folder)


@pytest.fixture
def stand_ins(tmp_path, monkeypatch):
    """A folder of one's own to run in, and rows in the layout of the data set that the pages name."""
    monkeypatch.chdir(tmp_path)

    def load_dataset(name, split):
        assert (name, split) == ("trl-lib/Capybara", "train")
        rows = make_dataset(16)  # two steps an epoch
        turns = zip((prompt * 4 for prompt in rows["prompt"]), rows["completion"], strict=True)
        roles = ("user", "assistant")
        messages = [[{"role": r, "content": c} for r, c in zip(roles, turn, strict=True)] for turn in turns]
        return Dataset.from_dict({"messages": messages})

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)


@pytest.mark.parametrize("page", [page for page in CODE if blocks(read(page), "python")], ids=lambda page: page.stem)
def test_python_runs_from_top_to_bottom(page, stand_ins, tiny_model):
    names = {"__name__": "__main__"}
    for block in blocks(read(page), "python"):
        exec(compile(NAMED.sub(tiny_model, block), page.name, "exec"), names)


def commands(paths):
    """All commands of some files, but of those that run what `lopt-hf plan --write recipe.yaml` has written."""
    found = [(path, as_command(words)) for path in paths for words in command_lines(read(path))]
    return [(path, *command) for path, command in found if command is not None and "recipe.yaml" not in command[1][:2]]


@pytest.mark.parametrize(
    "path", [path for path in MARKDOWN if commands([path])], ids=lambda p: str(p.relative_to(ROOT))
)
def test_commands_are_taken_as_written(path, monkeypatch):
    monkeypatch.chdir(ROOT)
    for _, name, arguments in commands([path]):
        parse(name, arguments)


def test_a_wrong_command_is_found(monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    for line in ("lopt-hf sft --num_blok 2", "lopt-hf plan --model x", "lopt-hf sft --config smollm2-135m/sft/none"):
        with pytest.raises(SystemExit):
            parse(*as_command(line.split()))
    assert "num_blok" in capsys.readouterr().err


def one_of_each():
    """Of the training commands of README and the pages one for each command and recipe; what differs was parsed."""
    found = {}
    for _, name, arguments in commands(CODE):
        if name in TRAINING and "--accelerate_config" not in arguments:  # which starts processes
            recipe = arguments[arguments.index("--config") + 1] if "--config" in arguments else " ".join(arguments)
            found.setdefault((name, recipe), arguments)
    return [pytest.param(name, arguments, id=f"{name} {recipe}") for (name, recipe), arguments in found.items()]


@pytest.mark.parametrize(("name", "arguments"), one_of_each())
def test_training_commands_run(name, arguments, tiny_model, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    options = {**SHORT, "model_name_or_path": tiny_model, "output_dir": tmp_path / "out"}
    if "--config" not in arguments:
        options["dataset_name"] = "word-problems"
    cli.main([name, *arguments, *(word for key, value in options.items() for word in (f"--{key}", str(value)))])
    assert (tmp_path / "out/config.json").is_file()


def test_extras_and_targets_exist():
    extras = tomllib.loads(read(ROOT / "pyproject.toml"))["project"]["optional-dependencies"]
    targets = re.findall(r"^([\w-]+):", read(ROOT / "Makefile"), re.MULTILINE)
    for path in MARKDOWN:
        for names in re.findall(r'"(?:lopt_hf|\.)\[([\w,]+)\]"', read(path)):
            assert set(names.split(",")) <= set(extras), path
        assert set(re.findall(r"`make ([\w-]+)`", read(path))) <= set(targets), path
