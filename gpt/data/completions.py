"""Completions of prompts as token ids, and batches of them in which only completions count."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from gpt.config import UsageError
from gpt.data.batches import IGNORED, Batch
from gpt.data.tokenizer import Tokenizer, encoder, prompt_ids


@dataclass(frozen=True)
class Completed:
    """The ids of a prompt, and those of a completion."""

    prompt: list[int]
    completion: list[int]


def encode_prompt_of(
    tokenizer: Tokenizer, prompt: str, *, context_length: int, what: str
) -> list[int]:
    """The prompt's ids; ``UsageError`` names the prompt by ``what`` if it fills the context."""
    try:
        ids = prompt_ids(tokenizer, prompt)
    except UsageError as error:  # a character that the vocabulary lacks
        raise UsageError(f"{what}: {error}") from None
    if len(ids) > context_length:
        raise UsageError(
            f"{what} has {len(ids):,} tokens, and model.context_length is {context_length:,}; "
            "shorten the prompt or leave it out"
        )
    return ids


def encode_completion(tokenizer: Tokenizer, text: str, *, what: str) -> list[int]:
    """The completion's ids and end-of-text. They do not depend on the prompt: a model that
    continues the prompt has the same tokens before it.
    """
    try:
        ids = encoder(tokenizer, begins=False)(text).tolist()
    except UsageError as error:
        raise UsageError(f"{what}: {error}") from None
    return [*ids, tokenizer.end_of_text]


def padded(rows: Sequence[Completed]) -> Batch:
    """The rows as a batch ``[B, T]``, padded at their ends. The targets of prompts and of padding
    are ``IGNORED``. T is the longest row's length without its last token.
    """
    length = max(len(row.prompt) + len(row.completion) for row in rows) - 1
    tokens = torch.zeros(len(rows), length, dtype=torch.int64)
    targets = torch.full((len(rows), length), IGNORED, dtype=torch.int64)
    for i, row in enumerate(rows):
        ids = torch.tensor([*row.prompt, *row.completion])
        start = len(row.prompt) - 1
        tokens[i, : len(ids) - 1] = ids[:-1]
        targets[i, start : len(ids) - 1] = ids[start + 1 :]
    return Batch(tokens, targets)
