"""`lopt-hf compare` on a tiny model: trains, measures, reports, and goes on where it was stopped."""

import json
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from filelock import FileLock
from safetensors.torch import load_file, save_file

from lopt_hf.compare import grid_data, grid_training
from lopt_hf.retention import evaluation
from lopt_hf.scripts import compare
from tests.compare.changes import change
from tests.machine import set_machine
from tests.tiny import make_tokenizer


def test_trains_measures_and_reports(
    config: Path, tmp_path: Path, trained_here: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Four runs and the base; gain and retention over two seeds; a second call does nothing but report."""
    compare.main(["--config", str(config)])
    assert len(trained_here) == 4
    report = json.loads((tmp_path / "out" / "report.json").read_text(encoding="utf-8"))
    assert [model["label"] for model in report["models"]] == ["end-to-end, 0.01", "LoPT, 0.01"]
    for model in report["models"]:
        assert len(model["seeds"]) == 2
        by_seed = [seed["gain"]["delta"] for seed in model["seeds"]]
        assert by_seed[0] != by_seed[1]
        assert model["gain"]["delta"] == pytest.approx(sum(by_seed) / 2)
        assert model["gain"]["n"] == 6
        assert set(model["drift"]) == {"embeddings", "0", "1", "2", "3", "rest"}
    same_rate = [row for row in report["contrasts"] if row["second"] == "end-to-end, 0.01"]
    assert [row["task"] for row in same_rate] == ["held-out answers", "tiny_sums", "tiny_text"]
    first, second = report["models"][1], report["models"][0]
    assert same_rate[0]["difference"] == pytest.approx(first["gain"]["value"] - second["gain"]["value"])
    assert (tmp_path / "out" / "report.html").is_file()
    assert report["settings"]["command"] == f"lopt-hf compare --config {config}"
    rows = [json.loads(line) for line in (tmp_path / "out" / "flips.jsonl").read_text(encoding="utf-8").splitlines()]
    for model in report["models"]:
        for seed, of_seed in enumerate(model["seeds"]):
            label = f"{model['label']}, seed {seed}"
            accuracy = next(delta for delta in of_seed["deltas"] if delta["metric"] == "acc")
            changed = [row for row in rows if (row["model"], row["metric"]) == (label, "acc,none")]
            assert len(changed) == accuracy["right_to_wrong"] + accuracy["wrong_to_right"]
    assert rows

    def never(*_: Any) -> None:
        raise AssertionError("measured again")

    monkeypatch.setattr(evaluation, "load_language_model", never)
    compare.main(["--config", str(config)])
    assert len(trained_here) == 4
    again = json.loads((tmp_path / "out" / "report.json").read_text(encoding="utf-8"))
    assert again["models"] == report["models"]


def test_plots_that_cannot_be_drawn_are_told_before_training(
    config: Path, tmp_path: Path, trained_here: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(SystemExit, match=r'Plots need `matplotlib`: `pip install "lopt_hf\[demo\]"`') as ended:
        compare.main(["--config", str(config)])
    assert ended.value.code == 2 and not trained_here and not (tmp_path / "out").exists()


def test_rows_that_do_not_fit_are_left_out(config: Path, tmp_path: Path, trained_here: list[str]) -> None:
    grid_data.prepare_data(compare.load_grid(config))
    rows = [json.loads(line) for line in (tmp_path / "out" / "data" / "train.jsonl").read_text().splitlines()]
    tokenizer = make_tokenizer()
    lengths = [len(tokenizer.apply_chat_template(row["prompt"] + row["completion"])["input_ids"]) for row in rows]
    assert 8 <= len(rows) < 40
    assert max(lengths) <= 50


def test_interrupted_training_starts_that_run_anew(config: Path, tmp_path: Path, trained_here: list[str]) -> None:
    """What a kill leaves half done is done again; what is complete is not."""
    grid = compare.load_grid(config)
    grid_data.prepare_data(grid)
    grid_training.train_grid(grid)
    run = grid.runs()[1]
    model = grid_data.model_folder(grid, run)
    left = model.with_name("model.partial-1")  # no process of ours has this number
    shutil.move(model, left)
    (left / "model.safetensors").unlink()
    trained_here.clear()
    grid_training.train_grid(grid)
    assert trained_here == [run.name]
    assert (model / "model.safetensors").is_file()
    assert not left.exists()


def test_a_method_with_more_rows_than_the_others(config: Path, tmp_path: Path, trained_here: list[str]) -> None:
    """As when a cheaper method trains for the same time."""
    change(config, methods={"end-to-end": {"method": "e2e"}, "more": {"method": "e2e", "num_train": 12}}, contrasts=[])
    compare.main(["--config", str(config)])
    report = json.loads((tmp_path / "out" / "report.json").read_text(encoding="utf-8"))
    assert report["settings"]["train_dataset"].endswith("8 rows for each run, 12 of more")
    for label, steps in (("end-to-end", 6), ("more", 9)):  # of 4 rows, three times over
        state = tmp_path / "out" / "runs" / f"{label}_lr0.01_seed0" / "model" / "trainer_state.json"
        assert json.loads(state.read_text(encoding="utf-8"))["global_step"] == steps
    change(config, methods={"more": {"num_train": 100}})
    with pytest.raises(SystemExit):
        compare.main(["--config", str(config), "--output-dir", str(tmp_path / "new")])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"methods": {"end-to-end": {"method": "e2e"}, "LoPT": {"num_blocks": 4}}}, "num_blocks=2, and now .* is 4"),
        ({"num_train": 7}, "run end-to-end_lr0.01_seed0: made with dataset_max_samples=8, and now .* is 7"),
        ({"methods": {"end-to-end": {}, "LoPT": {"num_blocks": 2}}}, "method='e2e', and now method is 'not set'"),
        ({"model": "elsewhere"}, "data of the runs .* made with model=.*/base', and now model is 'elsewhere'"),
        ({"heldout_dataset": "new.jsonl"}, "heldout_dataset=.*rows.jsonl', and now heldout_dataset is 'new.jsonl'"),
        ({"num_heldout": 39}, "num_heldout=39, but only .* rows of .*rows.jsonl fit in max_length=50"),
    ],
)
def test_trained_runs_are_not_taken_for_those_of_other_settings(
    config: Path, trained_here: list[str], settings: dict[str, Any], message: str
) -> None:
    """Found before anything is trained; the last run is missing, and the order of the YAML says nothing."""
    grid = compare.load_grid(config)
    grid_data.prepare_data(grid)
    grid_training.train_grid(grid)
    shutil.rmtree(grid_data.run_folder(grid, grid.runs()[-1]))
    trained_here.clear()
    change(config, **settings)
    with pytest.raises(SystemExit, match=message):
        compare.main(["--config", str(config)])
    assert not trained_here


def test_the_type_of_a_grid_is_kept(
    config: Path, trained_here: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """Begun where bfloat16 is fast, a grid goes on elsewhere in bfloat16 or not at all."""
    training = yaml.safe_load(config.read_text())["training"]
    del training["bf16"]
    change(config, training=training, seeds=[0])
    grid = compare.load_grid(config)
    grid_data.prepare_data(grid)
    set_machine(monkeypatch, has_bfloat16=True)
    grid_training.train_grid(grid)
    assert yaml.safe_load((grid_data.run_folder(grid, grid.runs()[0]) / "sft.yaml").read_text())["bf16"] is True
    set_machine(monkeypatch, has_bfloat16=False)
    with pytest.raises(SystemExit) as stopped:
        compare.main(["--config", str(config)])
    message = str(stopped.value)
    assert "seed0: trained in bfloat16, but now it would be float32 on cpu" in message
    assert "set dtype to bfloat16 to go on as it began" in message and "\n" not in message
    capsys.readouterr()
    compare.main(["--config", str(config), "--dtype", "bfloat16"])
    assert "training in bfloat16 on cpu, as asked for" in capsys.readouterr().out
    assert len(trained_here) == 2
    report = json.loads((grid.output_path / "report.json").read_text())
    assert report["settings"]["training"]["bf16"] is True and report["settings"]["dtype"] == "bfloat16"


def test_a_moved_folder_is_used_again(config: Path, tmp_path: Path, trained_here: list[str]) -> None:
    grid = compare.load_grid(config)
    grid_data.prepare_data(grid)
    grid_training.train_grid(grid)
    shutil.move(tmp_path / "out", tmp_path / "moved")
    moved = compare.load_grid(config, output_dir=str(tmp_path / "moved"))
    grid_data.prepare_data(moved)
    grid_training.train_grid(moved)
    assert len(trained_here) == 4


def test_data_are_prepared_again_while_nothing_is_trained(
    config: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """With other settings, and where they are deleted; not with the same. How many rows are too long is said."""
    train = tmp_path / "out" / "data" / "train.jsonl"
    grid_data.prepare_data(compare.load_grid(config))
    of_first = train.read_text()
    too_long = 40 - len(of_first.splitlines())
    said = f"train_dataset: {too_long} of 40 rows are longer than max_length=50 tokens and are left out."
    assert too_long and said in caplog.messages
    training = yaml.safe_load(config.read_text())["training"]
    change(config, training={**training, "max_length": 45})
    grid_data.prepare_data(compare.load_grid(config))
    of_second = train.read_text()
    assert 0 < len(of_second) < len(of_first)
    train.write_text(of_first)
    grid_data.prepare_data(compare.load_grid(config))
    assert train.read_text() == of_first
    (train.parent / "settings.json").write_text('{"train_dataset": "ro')
    with pytest.raises(ValueError, match=f"settings.json is damaged .*; delete {train.parent}, and the data are prep"):
        grid_data.prepare_data(compare.load_grid(config))
    shutil.rmtree(train.parent)
    grid_data.prepare_data(compare.load_grid(config))
    assert train.read_text() == of_second


@pytest.mark.parametrize("setting", ["train_dataset", "heldout_dataset", "replay_dataset"])
@pytest.mark.parametrize("named", ["the file", "its folder", "a link"])
def test_data_are_not_written_over_their_source(config: Path, tmp_path: Path, setting: str, named: str) -> None:
    """In a project whose own data lie where a grid's would."""
    data = tmp_path / "out" / "data"
    data.mkdir(parents=True)
    for name in ("train", "heldout", "replay"):
        shutil.copy(tmp_path / "rows.jsonl", data / f"{name}.jsonl")
    mine = data / f"{setting.removesuffix('_dataset')}.jsonl"
    (tmp_path / "link.jsonl").symlink_to(mine)
    source = {"the file": mine, "its folder": data, "a link": tmp_path / "link.jsonl"}[named]
    methods = {"replay": {"method": "e2e", "replay_share": 0.25}}
    change(config, **{setting: str(source)}, methods=methods, contrasts=[])
    before = {path: path.read_bytes() for path in data.iterdir()}
    with pytest.raises(SystemExit, match=f"would be written in the place of {setting}='{source}'") as ended:
        compare.main(["--config", str(config)])
    assert ended.value.code == 2 and {path: path.read_bytes() for path in data.iterdir()} == before


@pytest.mark.parametrize("name", ["train.jsonl", "heldout.jsonl", "replay.jsonl", "settings.json", "replay.json"])
def test_files_of_somebody_elses_are_kept(config: Path, tmp_path: Path, name: str) -> None:
    mine = tmp_path / "out" / "data" / name
    mine.parent.mkdir(parents=True)
    mine.write_text('{"of": "me"}\n')
    change(config, methods={"replay": {"method": "e2e", "replay_share": 0.25}}, contrasts=[])
    with pytest.raises(
        SystemExit, match=f"{name} is (there, and no .*json beside it says|no record of lopt-hf compare)"
    ):
        compare.main(["--config", str(config)])
    assert mine.read_text() == '{"of": "me"}\n'


def test_data_that_a_kill_left_half_prepared_are_prepared_again(
    config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    grid = compare.load_grid(config)
    load = grid_data.load_sft_dataset
    with monkeypatch.context() as patch:

        def killed(*arguments: Any) -> Any:
            if (tmp_path / "out" / "data" / "train.jsonl").exists():
                raise KeyboardInterrupt
            return load(*arguments)

        patch.setattr(grid_data, "load_sft_dataset", killed)
        with pytest.raises(KeyboardInterrupt):
            grid_data.prepare_data(grid)
    assert not (tmp_path / "out" / "data" / "heldout.jsonl").exists()
    grid_data.prepare_data(grid)
    assert json.loads((tmp_path / "out" / "data" / "settings.json").read_text())["model"] == grid.model


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("report.json", "mine", "has a report.json that no command here wrote, which would be lost"),
        (
            "report.json",
            '{"baseline": "b", "models": [], "settings": {"command": "lopt-hf retention --baseline b"}}',
            "has a report.json of `lopt-hf retention`, not of `lopt-hf compare`",
        ),
        ("report.md", "mine", "has a report.md and holds no earlier report; name another folder."),
        ("report.html", "mine", "has a report.html and holds no earlier report; name another folder."),
        ("flips.jsonl", "mine", "has a flips.jsonl and holds no earlier report; name another folder."),
    ],
)
def test_a_report_of_something_else_is_kept(
    config: Path, tmp_path: Path, trained_here: list[str], name: str, text: str, message: str
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / name).write_text(text)
    with pytest.raises(SystemExit, match=message):
        compare.main(["--config", str(config)])
    assert not trained_here and [path.name for path in out.iterdir()] == [name] and (out / name).read_text() == text


def test_a_base_that_is_not_whole_ends_before_training(config: Path, tmp_path: Path, trained_here: list[str]) -> None:
    weights = load_file(tmp_path / "base" / "model.safetensors")
    of_compiled = {f"_orig_mod.{name}": weight for name, weight in weights.items()}
    save_file(of_compiled, tmp_path / "base" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(SystemExit, match=f"model '{tmp_path / 'base'}' lacks 39 of the weights") as ended:
        compare.main(["--config", str(config)])
    assert ended.value.code == 2 and not trained_here


def test_files_of_data_that_change(config: Path, tmp_path: Path) -> None:
    """They are prepared again while nothing is trained, and later an error; earlier records do not tell."""
    folder = tmp_path / "test"
    folder.mkdir()
    texts = {name: tmp_path / name for name in ("rows.jsonl", "test/train.jsonl", "replay.jsonl")}
    rows = texts["rows.jsonl"].read_text()
    for path in texts.values():
        path.write_text(rows)
    settings = {"heldout_dataset": str(folder), "replay_dataset": str(texts["replay.jsonl"])}
    change(config, **settings, methods={"replay": {"method": "e2e", "replay_share": 0.25}}, contrasts=[])
    grid = compare.load_grid(config)
    data = grid.output_path / "data"
    grid_data.prepare_data(grid)
    for path in texts.values():
        path.write_text(rows.replace("What is", "Add up"))
    grid_data.prepare_data(grid)
    for name in ("train", "heldout", "replay"):
        assert "Add up" in (data / f"{name}.jsonl").read_text()
    grid_data.model_folder(grid, grid.runs()[0]).mkdir(parents=True)
    for setting, path in zip(("train_dataset", "heldout_dataset", "replay_dataset"), texts.values(), strict=True):
        changed = path.read_text()
        path.write_text(rows)
        with pytest.raises(ValueError, match=f"made with content of {setting}='.*set another output_dir, or delete"):
            grid_data.prepare_data(grid)
        path.write_text(changed)
    for name in ("settings.json", "replay.json"):
        stored = json.loads((data / name).read_text())
        (data / name).write_text(json.dumps({key: stored[key] for key in stored if not key.startswith("content")}))
    for path in texts.values():
        path.write_text(rows)
    grid_data.prepare_data(grid)
    assert "Add up" in (data / "train.jsonl").read_text()


def test_a_base_that_was_trained_on_in_place(config: Path, tmp_path: Path, trained_here: list[str]) -> None:
    """What was fine-tuned from it as it was is no longer its own."""
    change(config, methods={"end-to-end": {"method": "e2e"}}, seeds=[0], contrasts=[])
    grid = compare.load_grid(config)
    grid_data.prepare_data(grid)
    grid_training.train_grid(grid)
    weights = tmp_path / "base" / "model.safetensors"
    save_file({name: 2 * w for name, w in load_file(weights).items()}, weights, metadata={"format": "pt"})
    folder = grid_data.run_folder(grid, grid.runs()[0])
    message = f"run end-to-end_lr0.01_seed0: trained from model=.*/base' as it was before.*or delete {folder} to train"
    with pytest.raises(ValueError, match=message):
        grid_training.train_grid(grid)
    assert len(trained_here) == 1


def test_splits_of_one_data_set(config: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """As hub ids have them; other splits are other data."""
    folder = tmp_path / "sums"
    folder.mkdir()
    rows = (tmp_path / "rows.jsonl").read_text().splitlines(keepends=True)
    (folder / "train.jsonl").write_text("".join(rows[:20]))
    (folder / "test.jsonl").write_text("".join(rows[20:]))
    change(config, train_dataset=str(folder), heldout_dataset=str(folder), heldout_split="test")
    grid = compare.load_grid(config)
    caplog.clear()
    grid_data.prepare_data(grid)
    assert all("longer than max_length" in record.getMessage() for record in caplog.records)
    train, heldout = (
        {json.loads(row)["prompt"][0]["content"] for row in (tmp_path / "out" / "data" / name).open()}
        for name in ("train.jsonl", "heldout.jsonl")
    )
    questions = [json.loads(row)["question"] for row in rows]
    assert train <= set(questions[:20]) and heldout <= set(questions[20:]) and train and heldout
    (grid_data.run_folder(grid, grid.runs()[0]) / "model").mkdir(parents=True)
    change(config, heldout_split="train")
    with pytest.raises(ValueError, match="heldout_split='test', and now heldout_split is 'not set'"):
        grid_data.prepare_data(compare.load_grid(config))
    assert "the gain may be of rows seen in training" in caplog.text


def test_another_command_at_the_same_run_is_waited_for(config: Path, trained_here: list[str]) -> None:
    """Its model is taken, and not trained twice."""
    grid = compare.load_grid(config)
    grid_data.prepare_data(grid)
    run = grid.runs()[0]
    model = grid_data.model_folder(grid, run)
    model.parent.mkdir(parents=True)
    with ThreadPoolExecutor(1) as pool, FileLock(model.with_name("train.lock")) as lock:
        waiting = pool.submit(grid_training._train, grid, run, "of the base")
        with pytest.raises(TimeoutError):
            waiting.result(timeout=0.3)
        arguments = grid_training._arguments(grid, run, model)
        model.with_name("sft.yaml").write_text(yaml.safe_dump(arguments))
        model.with_name("base.txt").write_text("of the base")
        model.mkdir()
        lock.release()
        assert waiting.result(timeout=30) == []
    assert not trained_here


def test_threads_are_shared_out(config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those that PyTorch may use, which know of affinity."""
    given: list[str] = []

    def run(command: list[str], **options: Any) -> subprocess.CompletedProcess:
        given.append(options["env"]["OMP_NUM_THREADS"])
        return subprocess.CompletedProcess(command, 1)

    in_process = SimpleNamespace(run=run, DEVNULL=subprocess.DEVNULL, STDOUT=subprocess.STDOUT)
    monkeypatch.setattr(grid_training, "subprocess", in_process)
    monkeypatch.setattr(grid_training.torch, "get_num_threads", lambda: 6)
    with pytest.raises(grid_training.GridTrainingError):
        grid_training.train_grid(compare.load_grid(config, workers=2))
    assert given == ["3"] * 4
    given.clear()
    methods = {"in three processes": {"num_stages": 3}}
    with pytest.raises(grid_training.GridTrainingError):
        grid_training.train_grid(compare.load_grid(config, workers=1, methods=methods, contrasts=[]))
    assert given == ["2"] * 2


def test_failed_run_is_named_and_the_others_are_kept(
    config: Path, tmp_path: Path, trained_here: list[str], capsys: pytest.CaptureFixture
) -> None:
    settings = yaml.safe_load(config.read_text(encoding="utf-8"))
    settings["methods"]["LoPT"]["num_blocks"] = 99
    config.write_text(yaml.safe_dump(settings, sort_keys=False), encoding="utf-8")
    with pytest.raises(SystemExit, match="2 of 4 runs failed. lopt_lr0.01_seed0 ended with status 1"):
        compare.main(["--config", str(config)])
    kept = [path.parent.name for path in (tmp_path / "out" / "runs").glob("*/model")]
    assert sorted(kept) == ["end-to-end_lr0.01_seed0", "end-to-end_lr0.01_seed1"]


def test_training_runs_in_a_process_of_its_own(config: Path) -> None:
    """The real command, once."""
    settings = yaml.safe_load(config.read_text(encoding="utf-8"))
    settings.update(methods={"LoPT": {"num_blocks": 2}}, seeds=[0], contrasts=[])
    config.write_text(yaml.safe_dump(settings, sort_keys=False), encoding="utf-8")
    grid = compare.load_grid(config)
    grid_data.prepare_data(grid)
    grid_training.train_grid(grid)
    (run,) = grid.runs()
    folder = grid_data.run_folder(grid, run)
    assert (folder / "model" / "model.safetensors").is_file()
    assert "Model saved to" in (folder / "train.log").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tasks": ["tiny_sum"]}, "'tiny_sum' is unknown; nearest are tiny_sums"),
        ({"num_train": 100}, "num_train=100, but only"),
        ({"train_dataset": "/nowhere.jsonl"}, "There is no file or folder '/nowhere.jsonl'"),
    ],
)
def test_bad_settings_end_before_training(
    config: Path, trained_here: list[str], change: dict[str, Any], message: str
) -> None:
    settings = yaml.safe_load(config.read_text(encoding="utf-8"))
    config.write_text(yaml.safe_dump({**settings, **change}, sort_keys=False), encoding="utf-8")
    with pytest.raises(SystemExit, match=message):
        compare.main(["--config", str(config)])
    assert trained_here == []
