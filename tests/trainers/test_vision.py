"""Vision-language models: what sees belongs to the first block, and images come in any batch or in none."""

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.nn import functional as F
from transformers import AutoModelForImageTextToText
from trl import DPOTrainer, SFTConfig, SFTTrainer

from lopt_hf import (
    LoPTConfig,
    LoPTDPOConfig,
    LoPTDPOTrainer,
    LoPTGRPOConfig,
    LoPTGRPOTrainer,
    LoPTTrainer,
    MLAANConfig,
    MLAANTrainer,
    RepLConfig,
    get_repl_model,
)
from lopt_hf.local.blocks import split_layers
from lopt_hf.local.embeddings import untie_output_embeddings
from lopt_hf.local.learner import LearnerEvents, LocalLearner
from lopt_hf.local.methods.lopt import LoPTArguments
from lopt_hf.local.objectives import LocalBatch, ReconstructionObjective
from lopt_hf.pipeline.runtime.stage import keep_stage
from lopt_hf.pipeline.runtime.stage_plan import StagePlan
from tests.tiny import make_model, make_questions, make_tokenizer
from tests.tiny_vision import VISION_FAMILIES, make_processor, make_vision_dataset, make_vision_model
from tests.trainers.helpers import one_step_gradients, token_reward, training_args

IMAGES, TEXT, MIXED = [1, 1, 1, 1], [0, 0, 0, 0], [2, 0, 1, 0]  # pictures of each of a batch's four rows


def sees(name):
    """Whether a parameter, by its name, is of the vision tower or its projector."""
    return any(f".{part}." in f".{name}" for part in ("visual", "vision_tower", "multi_modal_projector"))


def make_trainer(folder, family, pictures, trainer=LoPTTrainer, config=LoPTConfig, model=None, **settings):
    """A run over these rows in their order, four at a time."""
    kind = "dpo" if issubclass(trainer, DPOTrainer) else "sft"
    args = training_args(folder, max_steps=len(pictures) // 4, train_sampling_strategy="sequential", **settings)
    kwargs = {"train_dataset": make_vision_dataset(pictures, kind), "processing_class": make_processor(family)}
    model = model or make_vision_model(family)
    if kind == "dpo":
        kwargs["ref_model"] = copy.deepcopy(model)
    return trainer(model=model, args=config(**args), **kwargs)


def moved(trainer, family):
    """The names of what differs from the model that was trained."""
    start = dict(make_vision_model(family).named_parameters())
    return {n for n, p in trainer.model.named_parameters() if not torch.equal(p, start.get(n, p))}


@pytest.mark.parametrize("family", VISION_FAMILIES)
def test_gradients_are_those_of_a_graph_that_is_cut(family, tmp_path):
    """The stock model's own graph with a detach between the blocks, task and local loss in one backward."""
    settings = {"train_vision": True, "max_grad_norm": 0.0}
    eager = make_trainer(tmp_path, family, MIXED, local_backward="eager", **settings)
    joint = make_trainer(tmp_path, family, MIXED, local_backward="joint", **settings)
    inputs = eager._prepare_inputs(next(iter(eager.get_train_dataloader())))
    assert not inputs["attention_mask"].all()  # padding is to be left out of the local loss
    model = make_vision_model(family).train()
    untie_output_embeddings(model)
    head, block = copy.deepcopy(eager.local_heads["0"]), {}

    def enter(layer, args, kwargs):
        block["input"] = args[0] if args else kwargs["hidden_states"]

    def leave(layer, args, output):
        block["output"] = output
        return output.detach()

    layers = model.get_decoder().layers
    layers[0].register_forward_pre_hook(enter, with_kwargs=True)
    layers[1].register_forward_hook(leave)
    logits = model(**{k: v for k, v in inputs.items() if k != "labels"}, use_cache=False).logits
    task = F.cross_entropy(logits[:, :-1].flatten(0, 1), inputs["labels"][:, 1:].flatten())
    batch = LocalBatch(inputs["attention_mask"], inputs)
    local = eager.boundary.objective(head, block["output"], block["input"].detach(), batch)
    (task + 10.0 * local).backward()
    expected = {n: p.grad for n, p in model.named_parameters()} | {
        f"head.0.{n}": p.grad for n, p in head.named_parameters()
    }
    assert all(g is not None for n, g in expected.items() if sees(n) and "post_layernorm" not in n)
    for trainer in (eager, joint):
        found = one_step_gradients(trainer)
        assert found.keys() == expected.keys()
        for name, gradient in expected.items():
            assert (gradient is None) == (found[name] is None), name
            if gradient is not None:
                torch.testing.assert_close(
                    found[name], gradient, rtol=2e-5, atol=1e-7, msg=lambda m, n=name: f"{n}: {m}"
                )


@pytest.mark.parametrize("pictures", [IMAGES + MIXED + TEXT, TEXT + IMAGES], ids=["images-first", "text-first"])
@pytest.mark.parametrize("family", VISION_FAMILIES)
def test_what_sees_stands_still_unless_asked(family, pictures, tmp_path):
    trainer = make_trainer(tmp_path, family, pictures)
    trainer.train()
    changed = moved(trainer, family)
    assert not any(map(sees, changed))
    assert changed == {n for n, p in trainer.model.named_parameters() if p.requires_grad and n in changed} != set()
    trainer = make_trainer(tmp_path / "sees", family, pictures, train_vision=True)
    owned = trainer.learner.owned()
    assert any(map(sees, owned[0])) and not any(map(sees, owned[1]))
    trainer.train()
    changed = moved(trainer, family)
    assert any(map(sees, changed))
    trainer.save_model(tmp_path / "saved")
    loaded, info = AutoModelForImageTextToText.from_pretrained(tmp_path / "saved", output_loading_info=True)
    assert not any(info.values()), info
    inputs = {k: v for k, v in next(iter(trainer.get_train_dataloader())).items() if k != "labels"}
    with torch.no_grad():
        assert torch.equal(loaded.eval()(**inputs).logits, trainer.model.eval()(**inputs).logits)


@pytest.mark.parametrize("mode", ["eager", "joint"])
def test_the_check_of_reach_looks_again_at_the_first_image(mode, tmp_path, monkeypatch):
    """With the early refusal out of the way: Qwen3-VL gives image features to the second block too."""
    monkeypatch.setattr("lopt_hf.local.vision.num_deepstack_layers", lambda config: 0)
    trainer = make_trainer(tmp_path, "qwen3_vl", TEXT + IMAGES, num_blocks=4, train_vision=True, local_backward=mode)
    with pytest.raises(RuntimeError, match=r"block 1 reaches 'model\.visual\..*freeze that parameter"):
        trainer.train()
    assert trainer.state.global_step == 1


@pytest.mark.parametrize("recompute", [True, False])
def test_full_reach_is_stock_training_bit_for_bit(recompute, tmp_path):
    settings = {"model": make_vision_model("llava"), "trainer": SFTTrainer, "config": SFTConfig}
    stock = make_trainer(tmp_path / "stock", "llava", MIXED + TEXT + IMAGES, **settings)
    stock.train()
    ours = make_trainer(
        tmp_path / "ours",
        "llava",
        MIXED + TEXT + IMAGES,
        task_reach=[2],
        local_objective="none",
        reach_recompute=recompute,
        clip_scope="global",
        train_vision=True,
    )
    ours.train()
    expected = dict(stock.model.named_parameters())
    assert any(map(sees, moved(ours, "llava")))
    assert [n for n, p in ours.model.named_parameters() if not torch.equal(p, expected[n])] == []


@pytest.mark.parametrize("family", VISION_FAMILIES)
def test_a_resumed_run_has_the_checkpoints_weights(family, tmp_path):
    """They are saved under the hub's names, which differ from those of most families' modules."""
    settings = {"save_strategy": "steps", "save_steps": 1}
    whole = make_trainer(tmp_path, family, IMAGES + MIXED, **settings)
    whole.train()
    expected = {name: tensor.clone() for name, tensor in whole.model.state_dict().items()}
    resumed = make_trainer(tmp_path, family, IMAGES + MIXED, **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    assert [n for n, tensor in resumed.model.state_dict().items() if not torch.equal(tensor, expected[n])] == []


@pytest.mark.parametrize(("family", "trains"), [("qwen2_5_vl", True), ("gemma3", False)])
def test_preferences_about_images(family, trains, tmp_path):
    trainer = make_trainer(
        tmp_path, family, TEXT + MIXED, LoPTDPOTrainer, LoPTDPOConfig, num_blocks=3, train_vision=trains
    )
    trainer.train()
    changed = moved(trainer, family)
    assert changed and any(map(sees, changed)) == trains


@pytest.mark.parametrize("family", VISION_FAMILIES)
def test_padding_of_prompts_and_completions_has_no_local_loss(family, tmp_path, monkeypatch):
    """The mask is the one that the model is called with: a batch of GRPO has it in two parts, under other names."""
    given, used = [], []
    compute = ReconstructionObjective.__call__

    def note(objective, *args):
        used.append(args[-1].mask_BT)
        return compute(objective, *args)

    monkeypatch.setattr(ReconstructionObjective, "__call__", note)
    settings = {"max_completion_length": 4, "num_generations": 2, "max_steps": 2}
    trainer = LoPTGRPOTrainer(
        model=make_vision_model(family),
        reward_funcs=token_reward,
        args=LoPTGRPOConfig(**training_args(tmp_path, **settings)),
        train_dataset=make_questions(8),
        processing_class=make_processor(family),
    )

    def note_given(module, args, kwargs):
        if torch.is_grad_enabled():
            given.append(kwargs["attention_mask"])

    trainer.model.register_forward_pre_hook(note_given, with_kwargs=True)
    trainer.train()
    assert any(not mask_BT.all() for mask_BT in given)
    assert len(used) == len(given) and all(map(torch.equal, used, given))


@pytest.mark.parametrize(("family", "trains"), [("qwen3_vl", False), ("gemma3", True)])
def test_mlaan(family, trains, tmp_path):
    trainer = make_trainer(
        tmp_path, family, TEXT + MIXED, MLAANTrainer, MLAANConfig, num_blocks=2, window=1, train_vision=trains
    )
    trainer.train()
    changed = moved(trainer, family)
    assert changed and any(map(sees, changed)) == trains


def test_readout(tmp_path):
    trainer = make_trainer(tmp_path, "qwen2_5_vl", MIXED, local_objective="readout")
    trainer.train()
    assert moved(trainer, "qwen2_5_vl")


def lora(targets="all-linear"):
    return LoraConfig(r=2, target_modules=targets, task_type="CAUSAL_LM")


def learn(model, **settings):
    """What a learner says of a model."""
    lines = []
    LocalLearner(model, LoPTArguments(**settings), events=LearnerEvents(say=lines.append))
    return lines


def test_one_line_says_what_is_frozen():
    model = make_vision_model("llava")
    (line,) = learn(model)
    assert "LlavaForConditionalGeneration (model.vision_tower, model.multi_modal_projector; 6,640 parameters)" in line
    assert "train_vision" in line and learn(model) == []  # frozen already
    adapted = get_peft_model(make_vision_model("llava"), lora())
    assert any(sees(n) and p.requires_grad for n, p in adapted.named_parameters())
    (line,) = learn(adapted)
    assert "adapters on them included" in line
    assert not any(sees(n) and p.requires_grad for n, p in adapted.named_parameters())


def test_adapters_on_what_sees_train_if_asked():
    adapted = get_peft_model(make_vision_model("qwen2_5_vl"), lora())
    before = {n for n, p in adapted.named_parameters() if p.requires_grad}
    assert learn(adapted, train_vision=True) == []
    assert {n for n, p in adapted.named_parameters() if p.requires_grad} == before and any(map(sees, before))


def text_only_adapter():
    return get_peft_model(make_vision_model("llava"), lora(r".*language_model.*q_proj"))


@pytest.mark.parametrize(
    ("make", "settings", "message"),
    [
        (make_model, {}, "train_vision=True: LlamaForCausalLM has no vision tower"),
        (text_only_adapter, {}, "nothing of the vision tower of LlavaForConditionalGeneration is trainable"),
        (lambda: make_vision_model("llava"), {"local_objective": "none"}, "no loss reaches the first block"),
        (
            lambda: make_vision_model("qwen3_vl"),
            {"num_blocks": 4},
            r"features behind its first 1 layers.*give the first block 2 layers or more by split_at",
        ),
        (
            lambda: make_vision_model("qwen3_vl"),
            {"local_objective": "none", "task_reach": [1, 2]},
            "reach_recompute=True: Qwen3VL.*set reach_recompute to False",
        ),
    ],
)
def test_what_cannot_be_is_refused(make, settings, message):
    with pytest.raises(ValueError, match=message):
        learn(make(), train_vision=True, **settings)


def test_options_that_contradict_each_other(tmp_path):
    with pytest.raises(ValueError, match=r"train_vision=True does not work with train_early_blocks=False"):
        LoPTConfig(str(tmp_path), train_vision=True, train_early_blocks=False)
    with pytest.raises(ValueError, match=r"neftune_noise_alpha=5\.0 is not supported for a vision-language model"):
        make_trainer(tmp_path, "llava", TEXT, neftune_noise_alpha=5.0)


def test_what_takes_text_only_says_so(tmp_path):
    with pytest.raises(ValueError, match="vision-related"):  # TRL's line
        LoPTTrainer(
            make_model(),
            LoPTConfig(**training_args(tmp_path)),
            train_dataset=make_vision_dataset(IMAGES),
            processing_class=make_tokenizer(),
        )
    model = make_vision_model("gemma3")
    first, _ = split_layers(4, 2)
    with pytest.raises(ValueError, match=r"'model\.vision_tower.*no stage of a pipeline.*in one process"):
        keep_stage(model, StagePlan(0, 2, (first,), 4))
    with pytest.raises(ValueError, match="model_type='gemma3' is not supported by RepL"):
        get_repl_model(make_vision_model("gemma3"), RepLConfig(placement="every", every=2, init="skip"))
