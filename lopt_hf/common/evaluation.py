"""Small evaluations of a causal language model: loss of answers, loss of plain text, exact match of generated answers.

Shapes: B batch, T tokens, V vocabulary, N counted tokens.
"""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = ["answer_loss", "generate_answers", "general_text", "text_loss"]

Conversation = list[dict[str, str]]


@torch.no_grad()
def answer_loss(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, rows: Sequence[dict[str, Any]], batch_size: int = 16
) -> float:
    """Mean loss of the answers' tokens, given their prompts, in nats per token.

    Args:
        model: A causal language model in evaluation mode.
        tokenizer: Its tokenizer, with a chat template.
        rows: Rows with `prompt` and `completion`, each a list of messages.
        batch_size: Rows per forward.
    """
    batches = (_tokenize_answers(tokenizer, batch, model.device) for batch in _batches(rows, batch_size))
    return _mean_loss(model, batches)


@torch.no_grad()
def text_loss(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, text: str, chunk: int = 512, num_chunks: int = 16
) -> float:
    """Mean next-token loss on plain text in chunks of `chunk` tokens, in nats per token.

    Raises:
        ValueError: If the text is shorter than one chunk.
    """
    token_ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"][: chunk * num_chunks]
    if len(token_ids) < chunk:
        raise ValueError(f"text has {len(token_ids)} tokens, less than one chunk of {chunk}; pass more text.")
    rows_BT = torch.tensor(token_ids[: len(token_ids) // chunk * chunk], device=model.device).view(-1, chunk)
    inputs = ({"input_ids": batch_BT, "attention_mask": torch.ones_like(batch_BT)} for batch_BT in rows_BT.split(4))
    return _mean_loss(model, ((batch, batch["attention_mask"].bool()) for batch in inputs))


@torch.no_grad()
def generate_answers(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Conversation],
    max_new_tokens: int = 96,
    batch_size: int = 16,
    description: str | None = None,
) -> list[str]:
    """Answers each conversation greedily.

    Args:
        model: A causal language model in evaluation mode.
        tokenizer: Its tokenizer, with a chat template.
        prompts: Conversations that end with the user's turn.
        max_new_tokens: Where an answer is cut.
        batch_size: Conversations per call of `generate`.
        description: Label of the progress bar; none without it.
    """
    answers: list[str] = []
    with tqdm(total=len(prompts), desc=description, disable=description is None, unit="answer") as progress:
        for batch in _batches(prompts, batch_size):
            texts = [tokenizer.apply_chat_template(p, tokenize=False, add_generation_prompt=True) for p in batch]
            inputs = _tokenize(tokenizer, texts, "left").to(model.device)
            output_BT: torch.Tensor = model.generate(  # type: ignore[operator]
                **inputs, max_new_tokens=max_new_tokens, do_sample=False, pad_token_id=tokenizer.pad_token_id
            )
            new_BT = output_BT[:, inputs["input_ids"].shape[1] :]
            answers += tokenizer.batch_decode(new_BT, skip_special_tokens=True)
            progress.update(len(batch))
    return answers


def general_text() -> str:
    """English prose that every Python carries: the language reference in `pydoc_data.topics`."""
    from pydoc_data.topics import topics

    return "\n\n".join(topics[name] for name in sorted(topics))


def _batches(items: Sequence[Any], size: int) -> Iterator[list[Any]]:
    for start in range(0, len(items), size):
        yield [items[i] for i in range(start, min(start + size, len(items)))]


def _tokenize(tokenizer: PreTrainedTokenizerBase, texts: list[Any], padding_side: str) -> Any:
    return tokenizer(texts, add_special_tokens=False, padding=True, padding_side=padding_side, return_tensors="pt")


def _tokenize_answers(
    tokenizer: PreTrainedTokenizerBase, rows: Sequence[dict[str, Any]], device: torch.device
) -> tuple[Any, torch.Tensor]:
    """The model's inputs, and which of their tokens are the answers'."""
    whole = [tokenizer.apply_chat_template(row["prompt"] + row["completion"], tokenize=False) for row in rows]
    prompts = [tokenizer.apply_chat_template(r["prompt"], tokenize=False, add_generation_prompt=True) for r in rows]
    inputs = _tokenize(tokenizer, whole, "right").to(device)
    lengths = [len(tokenizer(prompt, add_special_tokens=False)["input_ids"]) for prompt in prompts]
    positions_BT = torch.arange(inputs["input_ids"].shape[1], device=device)
    is_answer_BT = positions_BT >= torch.tensor(lengths, device=device)[:, None]
    return inputs, is_answer_BT & inputs["attention_mask"].bool()


def _mean_loss(model: PreTrainedModel, batches: Iterable[tuple[Any, torch.Tensor]]) -> float:
    """The mean over those tokens of all batches that count, in nats."""
    total = count = 0.0
    for inputs, counts_BT in batches:
        logits_BTV = model(**inputs).logits[:, :-1]
        target_BT, counts_BT = inputs["input_ids"][:, 1:], counts_BT[:, 1:]
        # Of the counted tokens N alone: in float32 the others' logits would take most of the time and memory
        loss = torch.nn.functional.cross_entropy(logits_BTV[counts_BT].float(), target_BT[counts_BT], reduction="sum")
        total, count = total + loss.item(), count + float(counts_BT.sum())
    return total / count
