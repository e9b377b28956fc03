"""What GRPO adds: generation, several updates of one batch of completions, the weights that vLLM is sent."""

import contextlib

import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file
from transformers import AutoConfig, TrainerCallback
from trl import GRPOConfig
from trl.generation.vllm_generation import VLLMGeneration

from lopt_hf import LoPTGRPOConfig, LoPTGRPOTrainer
from tests.tiny import make_model, make_questions, make_tokenizer
from tests.trainers.helpers import (
    InTwoForwards,
    WithFixedCompletions,
    make_trainer,
    one_step_gradients,
    snapshot,
    token_reward,
    training_args,
)


def make_grpo(output_dir, model=None, trainer_class=None, **settings):
    return make_trainer(output_dir, model, kind="grpo", trainer_class=trainer_class, **settings)


def logged(trainer, name):
    return [row[name] for row in trainer.state.log_history if name in row]


def test_too_few_questions_for_one_generation_are_refused(tmp_path):
    """TRL's sampler yields whole generations only: nothing would be trained, and the model saved as if it were."""
    with pytest.raises(ValueError, match=r"train_dataset has 1 questions, fewer than the 2 of a generation"):
        make_trainer(tmp_path, kind="grpo", trainer_kwargs={"train_dataset": make_questions(1)})
    make_trainer(tmp_path, kind="grpo", trainer_kwargs={"train_dataset": make_questions(2)})


def test_the_papers_values_are_the_defaults(tmp_path):
    args = LoPTGRPOConfig(str(tmp_path))
    paper = {"learning_rate": 5e-6, "num_generations": 4, "temperature": 0.7, "top_p": 0.95, "epsilon": 0.2, "beta": 0}
    assert {name: vars(args)[name] for name in paper} == paper
    assert (args.num_blocks, args.reconstruction_weight, args.loss_type) == (2, 10.0, "grpo")


def test_plain_grpo_arguments_are_accepted(tmp_path):
    args = GRPOConfig(**training_args(tmp_path, num_generations=2, gradient_accumulation_steps=3))
    trainer = LoPTGRPOTrainer(make_model(), token_reward, args, make_questions(), processing_class=make_tokenizer())
    assert (trainer.args.num_blocks, trainer.args.steps_per_generation, trainer.args.temperature) == (2, 3, 1.0)


class RecordForwards:
    """Whether each forward of the decoder had gradients, and whether the boundary was on."""

    def __init__(self, trainer):
        self.seen = []
        trainer.stack.layers[-1].register_forward_hook(
            lambda *_: self.seen.append((torch.is_grad_enabled(), trainer.boundary._in_forward))
        )


@pytest.mark.parametrize("peft", [False, True], ids=["full", "lora"])
def test_the_boundary_is_on_in_the_gradient_forward_only(tmp_path, peft):
    """Off while completions are generated, and for old and reference log-probabilities."""
    make_model().save_pretrained(tmp_path / "base")
    make_tokenizer().save_pretrained(tmp_path / "base")
    kwargs = {"peft_config": LoraConfig(target_modules="all-linear")} if peft else {}
    settings = {"beta": 0.1, "num_iterations": 2, "max_steps": 3, "logging_steps": 1}
    trainer = make_trainer(tmp_path / "out", str(tmp_path / "base"), kwargs, "grpo", **settings)
    record = RecordForwards(trainer)
    trainer.train()
    assert all(has_gradient == is_on for has_gradient, is_on in record.seen)
    assert sum(is_on for _, is_on in record.seen) == 3  # one for each update
    # Twice: up to 8 tokens of completions, old log-probabilities, and with an adapter those of the model without it.
    assert len(record.seen) - 3 in (range(6, 21) if peft else range(4, 19))
    assert len(logged(trainer, "kl")) == 3 and len(logged(trainer, "local_loss/block_0")) == 3


def test_the_reference_stays_the_stock_model(tmp_path):
    make_model().save_pretrained(tmp_path / "base")
    make_tokenizer().save_pretrained(tmp_path / "base")
    trainer = make_trainer(tmp_path / "out", str(tmp_path / "base"), kind="grpo", beta=0.1)
    assert not any(layer._forward_hooks for layer in trainer.ref_model.model.layers)
    trainer.train()
    stock = make_model().state_dict()
    assert all(torch.equal(tensor, stock[name]) for name, tensor in trainer.ref_model.state_dict().items())


@pytest.mark.parametrize("kind", ["grpo", "dpo"])
def test_a_reference_that_follows_the_model(tmp_path, kind):
    """TRL copies parameters in pairs: of a model whose head was untied the reference's has to be untied too."""
    make_model(tie_word_embeddings=True).save_pretrained(tmp_path / "base")
    make_tokenizer().save_pretrained(tmp_path / "base")
    follow = {"sync_ref_model": True, "ref_model_sync_steps": 1, "ref_model_mixup_alpha": 1.0, "beta": 0.1}
    trainer = make_trainer(tmp_path / "out", str(tmp_path / "base"), kind=kind, **follow)
    trainer.train()
    model = trainer.model.state_dict()
    assert all(torch.equal(tensor, model[name]) for name, tensor in trainer.ref_model.state_dict().items())


@pytest.mark.parametrize("mode", ["eager", "joint"])
def test_the_local_loss_is_scaled_under_accumulation(tmp_path, mode):
    """The same completions in 1, 2 and 4 micro-batches: the same gradient, of the task and of the local loss."""
    gradients = {}
    for accumulation in (1, 2, 4):
        settings = {"gradient_accumulation_steps": accumulation, "per_device_train_batch_size": 8 // accumulation}
        output_dir = tmp_path / str(accumulation)
        seen = gradients[accumulation] = {}
        trainer = make_grpo(
            output_dir, None, WithFixedCompletions, local_backward=mode, max_steps=1, max_grad_norm=0.0, **settings
        )
        # All prompts are as long: an average over tokens is then the average of averages.
        trainer.train_dataset = make_questions().map(lambda row: {"prompt": f"{row['prompt'][:12]:12}"})

        class Watch(TrainerCallback):
            def on_pre_optimizer_step(self, *args, trainer=trainer, seen=seen, **kwargs):
                heads = {f"head.{n}": p for n, p in trainer.local_heads.named_parameters()}
                parameters = {**dict(trainer.model.named_parameters()), **heads}
                seen.update({name: p.grad.clone() for name, p in parameters.items() if p.grad is not None})

        trainer.add_callback(Watch())
        trainer.train()
    assert gradients[1]["model.layers.0.mlp.up_proj.weight"].any()
    for accumulation in (2, 4):
        assert gradients[accumulation].keys() == gradients[1].keys()
        for name, expected in gradients[1].items():
            message = lambda m, n=name: f"{n}: {m}"  # noqa: E731
            torch.testing.assert_close(gradients[accumulation][name], expected, rtol=1e-4, atol=1e-7, msg=message)


@pytest.mark.parametrize("mode", ["eager", "joint"])
def test_several_gradient_forwards_in_a_step(tmp_path, mode):
    """Each adds its local gradient; the task gradient is that of one forward."""
    halves = make_grpo(tmp_path / "2", None, InTwoForwards, local_backward=mode)
    whole = make_grpo(tmp_path / "1", None, WithFixedCompletions, local_backward=mode)
    gradients = [one_step_gradients(trainer) for trainer in (halves, whole)]
    assert [len(trainer.boundary.losses[0]) for trainer in (halves, whole)] == [2, 1]
    for name in halves.learner.owned()[-1]:
        torch.testing.assert_close(gradients[0][name], gradients[1][name], rtol=1e-4, atol=1e-7)
    halves.train()
    assert all(torch.isfinite(weight).all() for weight in snapshot(halves).values())


@pytest.mark.parametrize("sharded", [False, True], ids=["heads apart", "heads in the model"])
def test_heads_do_not_reach_vllm(tmp_path, sharded):
    """TRL's own walk over the weights, with a client that records what it is sent."""
    trainer = make_grpo(tmp_path)
    if sharded:  # as under FSDP
        trainer.local_heads.attach(trainer.model)
    sent = []

    class Client:
        def update_named_params(self, metadata, weights):
            sent.extend(name for name, _ in weights)

        def reset_prefix_cache(self):
            pass

    generation = trainer.vllm_generation = VLLMGeneration.__new__(VLLMGeneration)
    generation.model, generation.accelerator, generation._dist = trainer.model, trainer.accelerator, trainer._dist
    generation.mode, generation.enable_sleep_mode, generation._weight_metadata = "server", False, None
    generation.vllm_client = Client()
    generation.generate = lambda prompts, **kwargs: (None, [[5]] * len(prompts), [[[0.0]]] * len(prompts), None)
    trainer.use_vllm, trainer._last_loaded_step = True, -1
    trainer._generate_single_turn([[4, 5, 6]], None, {}, 1)
    assert sent == list(make_model().state_dict())
    assert ("local_heads" in trainer.model._modules) == sharded


@pytest.mark.parametrize("as_string", [False, True])
def test_vllm_with_an_untied_head_is_refused(tmp_path, as_string):
    """vLLM would go on sampling with the embedding as head."""
    model = make_model(tie_word_embeddings=True)
    if as_string:
        model.save_pretrained(tmp_path / "base")
        model = str(tmp_path / "base")
    with pytest.raises(
        ValueError, match="use_vllm=True with tied_embeddings='untie'.*set tied_embeddings to 'freeze'"
    ):
        make_grpo(tmp_path, model, use_vllm=True)


def test_the_config_that_is_checked_is_the_one_that_is_loaded(tmp_path, monkeypatch):
    """With the revision and the trust in remote code that the model is loaded with."""
    make_model().save_pretrained(tmp_path / "base")
    original, asked = AutoConfig.from_pretrained, []
    monkeypatch.setattr(
        AutoConfig, "from_pretrained", lambda *args, **kwargs: asked.append(kwargs) or original(*args, **kwargs)
    )
    settings = {"use_vllm": True, "trust_remote_code": True, "model_init_kwargs": {"revision": "v1"}}
    with contextlib.suppress(ImportError):  # there is no vLLM here
        make_grpo(tmp_path, str(tmp_path / "base"), **settings)
    assert len(asked) >= 2
    assert all((each.get("revision"), each.get("trust_remote_code")) == ("v1", True) for each in asked[:2])


def resumable(output_dir, **settings):
    schedule = {"max_steps": 6, "save_strategy": "steps", "save_steps": 3, "lr_scheduler_type": "cosine"}
    reuse = {"gradient_accumulation_steps": 2, "num_iterations": 2, "steps_per_generation": 4}
    return make_grpo(output_dir, **{"per_device_train_batch_size": 2, **schedule, **reuse, **settings})


def resume(checkpoint, output_dir):
    """Resumes a run; returns the steps at which it generated."""
    trainer = resumable(output_dir)
    generated = []
    original = trainer._generate_single_turn
    trainer._generate_single_turn = lambda *args: generated.append(trainer.state.global_step) or original(*args)
    trainer.train(resume_from_checkpoint=str(checkpoint))
    return generated


def test_completions_that_wait_for_their_update_are_resumed(tmp_path):
    """At steps 2 and 3 of 4 with the same completions the checkpoint holds them."""
    resumable(tmp_path / "whole", save_steps=1).train()
    whole = load_file(tmp_path / "whole/checkpoint-6/model.safetensors")
    for step in (2, 3):
        generated = resume(tmp_path / f"whole/checkpoint-{step}", tmp_path / f"from {step}")
        assert generated == [4]
        again = load_file(tmp_path / f"from {step}/checkpoint-6/model.safetensors")
        assert [name for name in whole if not torch.equal(whole[name], again[name])] == []


@pytest.mark.parametrize("changed", ["num_processes", "steps_per_generation"])
def test_completions_that_were_cut_into_other_parts_are_generated_anew(changed, tmp_path):
    resumable(tmp_path / "run", max_steps=1, save_steps=1).train()
    checkpoint = tmp_path / "run/checkpoint-1"
    state = torch.load(checkpoint / "generation_0.pt", weights_only=True)
    assert state["step"] == 2 and state["inputs"]
    torch.save({**state, changed: state[changed] + 1}, checkpoint / "generation_0.pt")
    trainer = resumable(tmp_path / "resumed")
    trainer._load_from_checkpoint(str(checkpoint))
    assert (trainer._step, trainer._buffered_inputs) == (0, None)
