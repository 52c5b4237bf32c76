"""The adapter for EleutherAI's lm-evaluation-harness (the extra ``lm-eval``).

``lm_eval.simple_evaluate(model=HarnessModel(*gpt.load("gpt2")), tasks=["lambada_openai"])``
"""

from collections.abc import Sequence
from typing import Any

from lm_eval import utils
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM

from gpt.data.tokenizer import Tokenizer
from gpt.evaluation.continuation import continued
from gpt.evaluation.likelihood import Request, likelihoods
from gpt.model.gpt import GPT


class HarnessModel(TemplateLM):
    """A model and its tokenizer as a model of the harness. Scores equal those of its ``hf``
    backend.
    """

    def __init__(self, model: GPT, tokenizer: Tokenizer, *, batch_size: int = 0) -> None:
        super().__init__()
        self.model, self.codec, self.batch_size = model, tokenizer, batch_size

    @property
    def eot_token_id(self) -> int:
        """End-of-text, which replaces an empty context."""
        return self.codec.end_of_text

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **options: Any
    ) -> list[int]:
        """The ids of a text, without special tokens."""
        ids: list[int] = self.codec.encode(string).tolist()
        return ids

    def _loglikelihood_tokens(
        self, requests: list[tuple[tuple[str, str], list[int], list[int]]], **options: Any
    ) -> list[tuple[float, bool]]:
        pairs = [Request(context, continuation) for _, context, continuation in requests]
        scores = likelihoods(self.model, pairs, batch_size=self.batch_size)
        return [(score.total, score.is_greedy) for score in scores]

    def loglikelihood_rolling(
        self, requests: Sequence[Instance], disable_tqdm: bool = False
    ) -> list[float]:
        """The log-probability of whole texts, in windows that do not overlap."""
        totals = []
        for request in requests:
            windows = utils.get_rolling_token_windows(
                token_list=self.tok_encode(request.args[0]),
                prefix_token=self.eot_token_id,
                max_seq_len=self.model.config.context_length,
                context_len=1,
            )
            pairs = [Request(*utils.make_disjoint_window(window)) for window in windows]
            scores = likelihoods(self.model, pairs, batch_size=self.batch_size)
            totals.append(sum(score.total for score in scores))
        return totals

    def generate_until(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[str]:
        """Continue each context with its options (:func:`continued`)."""
        return [continued(self.model, self.codec, *request.args) for request in requests]
