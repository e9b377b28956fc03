"""Small evaluations of a causal language model: loss of answers, loss of plain text, exact match of generated answers.

Shapes: B batch, T tokens, V vocabulary, N counted tokens.
"""

from collections.abc import Iterator, Sequence
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
    total = count = 0.0
    for batch in _batches(rows, batch_size):
        whole = [tokenizer.apply_chat_template(row["prompt"] + row["completion"], tokenize=False) for row in batch]
        prompts = [
            tokenizer.apply_chat_template(row["prompt"], tokenize=False, add_generation_prompt=True) for row in batch
        ]
        inputs = _tokenize(tokenizer, whole, "right").to(model.device)
        lengths = [len(tokenizer(prompt, add_special_tokens=False)["input_ids"]) for prompt in prompts]
        positions_BT = torch.arange(inputs["input_ids"].shape[1], device=model.device)
        is_answer_BT = (positions_BT >= torch.tensor(lengths, device=model.device)[:, None]) & (
            inputs["attention_mask"].bool()
        )
        loss, tokens = _sum_of_losses(model, inputs, is_answer_BT)
        total, count = total + loss, count + tokens
    return total / count


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
    total = count = 0.0
    for batch_BT in rows_BT.split(4):
        inputs = {"input_ids": batch_BT, "attention_mask": torch.ones_like(batch_BT)}
        loss, tokens = _sum_of_losses(model, inputs, torch.ones_like(batch_BT, dtype=torch.bool))
        total, count = total + loss, count + tokens
    return total / count


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


def _sum_of_losses(model: PreTrainedModel, inputs: Any, counts_BT: torch.Tensor) -> tuple[float, float]:
    logits_BTV = model(**inputs).logits[:, :-1]
    target_BT, counts_BT = inputs["input_ids"][:, 1:], counts_BT[:, 1:]
    # Of the counted tokens N alone: in float32 the others' logits would take most of the time and memory
    loss = torch.nn.functional.cross_entropy(logits_BTV[counts_BT].float(), target_BT[counts_BT], reduction="sum")
    return loss.item(), float(counts_BT.sum())
