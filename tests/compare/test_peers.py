"""What others would take instead, as methods of a grid: averages with the base, general text, other adapters."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from datasets import load_dataset
from peft import OSFConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, Trainer

from lopt_hf.common.compared_methods import PEERS
from lopt_hf.compare.averaging import average_with_base, save_average
from lopt_hf.compare.grid import GridRun
from lopt_hf.compare.grid_data import model_folder, prepare_data, run_folder
from lopt_hf.compare.grid_training import check_trained_runs, train_grid
from lopt_hf.compare.replay import INSTRUCTION
from lopt_hf.local.embeddings import untie_output_embeddings
from lopt_hf.scripts import compare
from tests.compare.changes import change
from tests.tiny import make_model, make_tokenizer

ADAPTER = {"method": "e2e", "use_peft": True, "lora_r": 4, "lora_target_modules": ["all-linear"]}


def trained(config: Path, **settings: Any) -> tuple[list[GridRun], dict[str, Path]]:
    """Trains a grid; the runs, and the folders of their models by method."""
    change(config, contrasts=[], seeds=[0], **settings)
    grid = compare.load_grid(config)
    prepare_data(grid)
    train_grid(grid)
    return grid.runs(), {run.method: model_folder(grid, run) for run in grid.runs()}


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return AutoModelForCausalLM.from_pretrained(folder).state_dict()


def test_averages_lie_between_the_base_and_the_model(config: Path, tmp_path: Path, trained_here: list[str]) -> None:
    """Bit for bit at both ends; one run serves all of them; made anew when that run was."""
    ends = {f"alpha {alpha}": {"average_of": "e2e", "alpha": alpha} for alpha in (0.0, 0.25, 1.0)}
    _, models = trained(config, methods={"e2e": {"method": "e2e"}, **ends})
    assert trained_here == ["e2e_lr0.01_seed0"]
    base, tuned, start, quarter, end = map(weights, (tmp_path / "base", *models.values()))
    for name, of_base in base.items():
        assert torch.equal(start[name], of_base) and torch.equal(end[name], tuned[name])
        torch.testing.assert_close(quarter[name], 0.75 * of_base + 0.25 * tuned[name])
    assert any(not torch.equal(base[name], tuned[name]) for name in base)
    before = models["alpha 0.25"].joinpath("model.safetensors").read_bytes()
    grid = compare.load_grid(config)
    file = models["e2e"] / "model.safetensors"
    save_file({name: weight + 1 for name, weight in load_file(file).items()}, file, {"format": "pt"})
    train_grid(grid)
    assert models["alpha 0.25"].joinpath("model.safetensors").read_bytes() != before
    change(config, methods={"e2e": {"method": "e2e"}, **ends, "alpha 0.25": {"average_of": "e2e", "alpha": 0.3}})
    with pytest.raises(ValueError, match="alpha-0-25_lr0.01_seed0: made with alpha=0.25, and now alpha is 0.3"):
        check_trained_runs(compare.load_grid(config))


def test_averages_of_an_adapter_and_of_an_untied_head(tmp_path: Path) -> None:
    """LoRA's average is the adapter's at a share of its scale; a head made in training counts from the embeddings."""
    base = make_model(tie_word_embeddings=True)
    base.save_pretrained(tmp_path / "base")
    make_tokenizer().save_pretrained(tmp_path / "base")
    adapted = get_peft_model(
        AutoModelForCausalLM.from_pretrained(tmp_path / "base"),
        OSFConfig(task_type="CAUSAL_LM", target_modules="all-linear"),
    )
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter += 0.05 * torch.randn_like(parameter)
    adapted.save_pretrained(tmp_path / "adapter")
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    (tmp_path / "adapter" / "adapter_config.json").write_text(
        json.dumps({**config, "base_model_name_or_path": str(tmp_path / "base")})
    )
    save_average(str(tmp_path / "base"), tmp_path / "adapter", 0.5, tmp_path / "half")
    merged = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(tmp_path / "base"), tmp_path / "adapter"
    ).merge_and_unload()
    half, start = weights(tmp_path / "half"), base.state_dict()
    for name, weight in merged.state_dict().items():
        torch.testing.assert_close(half[name], (weight + start[name]) / 2)
    untied = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    untie_output_embeddings(untied)
    with torch.no_grad():
        untied.lm_head.weight += 1
    expected = untied.lm_head.weight - 0.5
    average_with_base(base, untied, 0.5)
    torch.testing.assert_close(untied.lm_head.weight, expected)
    torch.testing.assert_close(untied.get_input_embeddings().weight, base.get_input_embeddings().weight)


def test_general_text_is_among_the_batches(
    config: Path, tmp_path: Path, trained_here: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two rows in ten, twice over: the task's rows are those that others with the seed draw."""
    text = tmp_path / "general.txt"
    lines = [" ".join(f"w{line}x{word}" for word in range(90)) for line in range(6)]
    text.write_text("\n\n".join(lines))
    settings = yaml.safe_load(config.read_text())["training"]
    seen: list[tuple[int, ...]] = []
    step = Trainer.training_step

    def recorded(self: Trainer, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        for token_ids, mask in zip(inputs["input_ids"], inputs["attention_mask"], strict=True):
            seen.append(tuple(token_ids[mask.bool()].tolist()))
        return step(self, model, inputs, *args, **kwargs)

    monkeypatch.setattr(Trainer, "training_step", recorded)
    methods = {"e2e": {"method": "e2e"}, "replay": {"method": "e2e", "replay_share": 0.2}}
    training = {**settings, "max_length": 2000, "num_train_epochs": 1}
    runs, _ = trained(config, methods=methods, training=training, replay_dataset=str(text))
    assert [run.num_replayed for run in runs] == [0, 2]
    grid = compare.load_grid(config)
    mixed = load_dataset("json", data_files=str(run_folder(grid, runs[1]) / "train.jsonl"), split="train")
    is_general = [row[0]["content"].startswith(INSTRUCTION) for row in mixed["prompt"]]
    assert sum(is_general) == 2
    tokenizer = make_tokenizer()
    conversations = [one + other for one, other in zip(mixed["prompt"], mixed["completion"], strict=True)]
    rows = [tuple(tokenizer.apply_chat_template(row)["input_ids"]) for row in conversations]
    assert sorted(seen[8:]) == sorted(rows)
    assert sorted(seen[:8]) == sorted(row for row, general in zip(rows, is_general, strict=True) if not general)
    change(config, replay_dataset=str(tmp_path / "other.txt"))
    with pytest.raises(ValueError, match="general text of the runs .* made with replay_dataset="):
        prepare_data(compare.load_grid(config))


def test_adapters_train_their_own_parameters(config: Path, tmp_path: Path, trained_here: list[str]) -> None:
    """DoRA has magnitudes; OSF is written into its base and moves no matrix in its largest directions."""
    methods = {"DoRA": {**ADAPTER, "use_dora": True}, "OSF": {"method": "osf", "osf_effective_rank": 0.25}}
    _, models = trained(config, methods=methods)
    adapter = load_file(models["DoRA"] / "adapter_model.safetensors")
    assert {name.rpartition(".lora_")[2].split(".")[0] for name in adapter} == {"A", "B", "magnitude_vector"}
    assert all(bool(weight.any()) for name, weight in adapter.items() if "lora_B" in name)
    base, tuned = weights(tmp_path / "base"), weights(models["OSF"])
    changed = {name for name in base if not torch.equal(base[name], tuned[name])}
    assert changed == {name for name in base if "_proj" in name}
    name = "model.layers.0.self_attn.q_proj.weight"
    left, values, right = torch.linalg.svd(base[name])
    kept = int(0.25 * len(values))
    moved = tuned[name] - base[name]
    assert moved.abs().max() > 1e-3
    # AdamW's step is not the projected gradient itself, so little and not nothing
    inside = (left[:, :kept].T @ moved @ right[:kept].T).norm()
    assert inside < 0.25 * moved.norm()


@pytest.mark.parametrize(
    ("methods", "message"),
    [
        ({"a": {"average_of": "b", "alpha": 0.5}}, "a.average_of: no method of the grid is trained"),
        ({"e2e": {}, "a": {"average_of": "e2", "alpha": 0.5}}, "average_of='e2' is unknown, nearest is 'e2e'"),
        ({"e2e": {}, "a": {"average_of": "e2e"}}, "alpha=None is no weight; give one from 0"),
        ({"e2e": {}, "a": {"average_of": "e2e", "alpha": 1.5}}, "alpha=1.5 is no weight"),
        ({"e2e": {}, "a": {"average_of": "e2e", "alpha": "half"}}, "alpha='half' must be a number"),
        ({"e2e": {}, "a": {"average_of": "e2e", "alpha": 0.5, "num_blocks": 2}}, "a.num_blocks: an average .* trains"),
        ({"e2e": {}, "a": {"average_of": "e2e", "alpha": 0.5, "learning_rates": [1.0]}}, "e2e has no run at 1;"),
        ({"e2e": {"alpha": 0.5}}, "e2e.alpha is a weight of an average; name the method in average_of"),
        ({"e2e": {"replay_share": 1.0}}, "replay_share=1.0 is no share; give one between 0 and 1"),
        ({"e2e": {"replay_share": 5}}, "replay_share=5 is no share"),
    ],
)
def test_bad_methods(config: Path, methods: dict[str, Any], message: str) -> None:
    change(config, methods=methods, contrasts=[])
    with pytest.raises(ValueError, match=message):
        compare.load_grid(config)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"methods": {"e2e": {"replay_share": 0.01}}}, "replay_share=0.01 of 8 rows is less than one row"),
        ({"replay_dataset": "general.txt"}, "replay_dataset='general.txt', but no method has a replay_share"),
    ],
)
def test_general_text_that_would_not_be_trained_on(config: Path, settings: dict[str, Any], message: str) -> None:
    change(config, contrasts=[], **settings)
    with pytest.raises(ValueError, match=message):
        compare.load_grid(config)


@pytest.mark.parametrize("option", [{"replay_share": 1.0}, {"learning_rates": [1e-4]}, {"num_train": 4}])
def test_an_option_of_a_method_among_those_of_training(config: Path, option: dict[str, Any]) -> None:
    training = yaml.safe_load(config.read_text())["training"]
    change(config, training={**training, **option})
    (name,) = option
    with pytest.raises(ValueError, match=f"training.{name} is an option of a method; set methods.<label>.{name}"):
        compare.load_grid(config)


def test_text_that_is_measured_is_not_trained_on(config: Path) -> None:
    change(config, methods={"e2e": {"replay_share": 0.1}}, contrasts=[], tasks=["offline_prose"])
    with pytest.raises(ValueError, match="replay_dataset is not set, .*offline_prose measures; name other text"):
        prepare_data(compare.load_grid(config))
    training = yaml.safe_load(config.read_text())["training"]
    change(config, tasks=["tiny_sums"], training={**training, "max_length": 2000})
    prepare_data(compare.load_grid(config))
    rows = (config.parent / "out" / "data" / "replay.jsonl").read_text().splitlines()
    assert len(rows) > 50 and all(INSTRUCTION in row for row in rows)


def test_text_of_a_hub_that_does_not_answer_is_not_replaced(config: Path) -> None:
    """By the prose, which would be recorded under the hub's name and may be what is measured."""
    text = "Salesforce/wikitext:wikitext-2-raw-v1:train"
    change(config, methods={"e2e": {"replay_share": 0.1}}, contrasts=[], replay_dataset=text)
    with pytest.raises(SystemExit, match=f"replay_dataset='{text}': .* set data_dir to a folder") as error:
        compare.main(["--config", str(config)])
    assert "\n" not in str(error.value) and not (config.parent / "out" / "data" / "replay.jsonl").exists()


def test_families() -> None:
    """Each kind of method is drawn by a colour and a shape of its own."""
    known = {
        "end-to-end": [{"method": "e2e"}, {"method": "e2e_segments"}],
        "adapters": [ADAPTER, {"method": "osf"}],
        "freezing": [
            *({"method": name} for name in ("freeze", "freeze_last")),
            *({"train_early_blocks": False}, {"local_objective": "none"}),
        ],
        "one part at a time": [{"method": "lisa"}, {"method": "badam"}],
        "reach": [{"method": "reach"}, {"local_objective": "none", "task_reach": [2, 1]}],
        "local losses": [{}, {"method": "mlaan"}, {"method": "lopt", "use_peft": True}],
    }
    for family, methods in known.items():
        assert {GridRun("a", 1e-4, 0, 8, arguments).family for arguments in methods} == {family}
    assert GridRun("a", 1e-4, 0, 8, {"method": "e2e"}, replay_share=0.05).family == "replay"
    assert GridRun("a", 1e-4, 0, 8, {}, source="e2e", alpha=0.5).family == "weight averaging"
    assert set(PEERS) >= {"lisa", "badam", "freeze_last"}


@pytest.mark.parametrize(("rows", "replayed"), [(95, 5), (96, 5), (190, 10), (8, 0)])
def test_the_share_is_as_near_as_whole_rows_come(rows: int, replayed: int) -> None:
    assert GridRun("a", 1e-4, 0, rows, {}, replay_share=0.05).num_replayed == replayed
