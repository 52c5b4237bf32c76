"""Log-likelihoods of continuations, which every multiple-choice task needs."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from gpt.config import UsageError
from gpt.data.tokenizer import Tokenizer, prompt_ids
from gpt.model.gpt import GPT


@dataclass(frozen=True)
class Request:
    """The ids of a context, and the ids to score after it."""

    context: Sequence[int]
    continuation: Sequence[int]


@dataclass(frozen=True)
class Likelihood:
    """A continuation's log-probability in nats, and whether each of its tokens was the likeliest
    one.
    """

    total: float
    is_greedy: bool


def encode_pair(tokenizer: Tokenizer, context: str, continuation: str) -> Request:
    """The request for two texts, split where the ids of ``context`` alone would end.

    White space at the end of ``context`` is moved to the continuation, as in lm-evaluation-harness.
    The context begins with the tokenizer's first tokens. An empty one without them becomes
    end-of-text.
    """
    spaces = len(context) - len(context.rstrip())
    if spaces:
        context, continuation = context[:-spaces], context[-spaces:] + continuation
    if not context:
        return Request(prompt_ids(tokenizer, ""), tokenizer.encode(continuation).tolist())
    whole = prompt_ids(tokenizer, context + continuation)
    start = len(prompt_ids(tokenizer, context))
    return Request(whole[:start], whole[start:])


@torch.inference_mode()
def likelihoods(
    model: GPT, requests: Sequence[Request], *, batch_size: int = 0, pad: int = 0
) -> list[Likelihood]:
    """One :class:`Likelihood` for each request, in order.

    Requests of similar length form a batch (of 16 unless ``batch_size`` is given). They are padded
    at the end, which changes nothing in a causal model. The beginning of a context that is too long
    is cut. ``UsageError`` for a continuation that is empty or does not fit.
    """
    limit = model.config.context_length
    device = model.device
    batch_size = batch_size or 16
    rows = []
    for request in requests:
        if not 0 < len(request.continuation) <= limit:
            raise UsageError(
                f"a continuation has {len(request.continuation)} tokens, and must have from 1 to "
                f"the model's context_length ({limit})"
            )
        rows.append([*request.context, *request.continuation][-(limit + 1) :])
    results: dict[int, Likelihood] = {}
    order = sorted(range(len(rows)), key=lambda i: len(rows[i]), reverse=True)
    for start in range(0, len(order), batch_size):
        batch = order[start : start + batch_size]
        longest = max(len(rows[i]) for i in batch)
        padded = [rows[i] + [pad] * (longest - len(rows[i])) for i in batch]
        ids = torch.tensor(padded, device=device)
        features = model.features(ids[:, :-1])
        for j, i in enumerate(batch):
            n = len(requests[i].continuation)
            end = len(rows[i]) - 1
            targets = ids[j, end - n + 1 : end + 1]
            logits = model.logits(features[j, end - n : end]).float()
            own = logits.gather(-1, targets[:, None]).squeeze(-1)
            total = (own - logits.logsumexp(dim=-1)).double().sum().item()
            is_greedy = bool((logits.argmax(dim=-1) == targets).all())
            results[i] = Likelihood(total, is_greedy)
    return [results[i] for i in range(len(rows))]
