"""What cannot be decoded, told in a sentence before anything is."""

from collections.abc import Iterable, Sequence

from gpt.config import GenerationConfig, UsageError
from gpt.model.gpt import GPT


def check_settings(model: GPT, config: GenerationConfig, vocab_size: int) -> None:
    """``UsageError`` for a bias or a ban of what is no token, and for more tokens than the model
    has.
    """
    if vocab_size > model.config.vocab_size:
        raise UsageError(
            f"the tokenizer has {vocab_size:,} tokens, and the model {model.config.vocab_size:,}"
        )
    check_ids("bias", config.bias, vocab_size)
    check_ids("ban", config.ban, vocab_size)


def check_prompt(
    model: GPT, prompt: Sequence[int], config: GenerationConfig, vocab_size: int
) -> None:
    """``UsageError`` for a prompt that cannot be continued."""
    context = model.config.context_length
    if not len(prompt):
        raise UsageError("the prompt has no tokens, and there must be one to continue")
    if config.past_context == "stop" and len(prompt) > context:
        raise UsageError(
            f"the prompt has {len(prompt):,} tokens, and the model's context_length is "
            f"{context:,}; shorten it, or let past_context be 'slide'"
        )
    check_ids("the prompt", prompt, vocab_size)


def check_ids(what: str, ids: Iterable[int], vocab_size: int) -> None:
    """``UsageError`` for an id that no token has."""
    for i in ids:
        if not 0 <= i < vocab_size:
            raise UsageError(
                f"{what} has the token id {i}, and the vocabulary ends at {vocab_size - 1}"
            )
