"""Training agrees with LoPT written down a second time, without hooks, as the paper's equations say it."""

import pytest
import torch
from torch.nn import functional as F
from torch.nn.utils import clip_grad_norm_

from tests.tiny import make_model
from tests.trainers.helpers import make_trainer

STEPS, LEARNING_RATE, WEIGHT, CLIP = 4, 1e-3, 10.0, 0.05  # clipping binds in both blocks


def train_by_the_equations(model, head, batches, split):
    layers = model.model.layers
    early = [*model.model.embed_tokens.parameters(), *layers[:split].parameters(), *head.parameters()]
    late = [*layers[split:].parameters(), *model.model.norm.parameters(), *model.lm_head.parameters()]
    optimizers = [torch.optim.AdamW(group, lr=LEARNING_RATE, weight_decay=0.0) for group in (early, late)]
    model.train()
    for step, batch in enumerate(batches):
        inputs = {k: batch[k] for k in ("input_ids", "attention_mask")}
        outputs = model(**inputs, output_hidden_states=True)
        h0, h1 = outputs.hidden_states[0], outputs.hidden_states[split]
        mask = inputs["attention_mask"].bool()
        aux = (head(h1)[mask] - h0.detach()[mask]).square().mean()
        task = F.cross_entropy(outputs.logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten())
        gradients = torch.autograd.grad(WEIGHT * aux, early, retain_graph=True), torch.autograd.grad(task, late)
        for group, group_gradients, optimizer in zip((early, late), gradients, optimizers, strict=True):
            for parameter, gradient in zip(group, group_gradients, strict=True):
                parameter.grad = gradient
            clip_grad_norm_(group, CLIP)
            for settings in optimizer.param_groups:
                settings["lr"] = LEARNING_RATE * (1 - step / STEPS)
            optimizer.step()


@pytest.mark.parametrize("order", [{"local_backward": "eager"}, {"local_backward": "joint"}, {"local_step": True}])
def test_weights_after_training(tmp_path, order):
    settings = {"max_steps": STEPS, "learning_rate": LEARNING_RATE, "max_grad_norm": CLIP, "optim": "adamw_torch"}
    trainer = make_trainer(tmp_path, make_model(), **order, **settings)
    reference, head = make_model(), trainer.local_heads["0"]
    reference_head = type(head)(32, 4)
    reference_head.load_state_dict(head.state_dict())
    batches = []
    compute_loss = trainer.compute_loss

    def recording(model, inputs, *args, **kwargs):
        batches.append({name: tensor.clone() for name, tensor in inputs.items()})
        return compute_loss(model, inputs, *args, **kwargs)

    trainer.compute_loss = recording
    trainer.train()
    train_by_the_equations(reference, reference_head, batches, split=2)
    expected = {**dict(reference.named_parameters()), **dict(reference_head.named_parameters())}
    actual = {**dict(trainer.model.named_parameters()), **dict(head.named_parameters())}
    start = dict(make_model().named_parameters())
    for name, weight in expected.items():
        # Compared with how far training moved it, not with its size.
        moved = (weight - start[name]).norm() if name in start else weight.norm()
        assert (actual[name] - weight).norm() <= 2e-3 * moved, name
