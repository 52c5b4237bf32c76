"""Answers to held-out questions, beside the reference answers."""

import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from gpt.config import GenerationConfig
from gpt.data.examples import Examples
from gpt.data.tokenizer import Tokenizer, decode
from gpt.generation.text import new_decoder, run
from gpt.model.gpt import GPT


@dataclass(frozen=True)
class Answer:
    """A question, its reference answer, and the model's answer, as texts."""

    question: str
    reference: str
    answer: str

    @property
    def is_exact(self) -> bool:
        """Whether both answers are equal, apart from white space around them."""
        return self.answer.strip() == self.reference.strip()


def answer_questions(
    model: tuple[GPT, Tokenizer], examples: Examples, n: int, *, batch_size: int = 32
) -> list[Answer]:
    """The model's greedy answers to ``n`` questions, evenly spread over the examples that have one.

    An answer may be twice as long as its reference, and at most fills the context. Questions that
    fill the context themselves are left out.
    """
    network, tokenizer = model
    room = network.config.context_length
    numbers = np.linspace(0, len(examples.ends) - 1, min(n, len(examples.ends))).astype(int)
    asked = [
        question
        for question in map(examples.question, numbers.tolist())
        if question is not None and len(question[0]) < room
    ]
    if not asked:
        return []
    longest = max(len(reference) for _, reference in asked)
    config = GenerationConfig(temperature=0, max_new_tokens=2 * longest, past_context="stop")
    ends = {reference[-1] for _, reference in asked}
    decoder = new_decoder(model, config, batch_size=batch_size, ends=ends)
    texts = {
        completion.prompt: completion.text
        for _, completion in run(model, [prompt for prompt, _ in asked], decoder, begins=False)
    }
    return [
        Answer(decode(tokenizer, prompt), decode(tokenizer, reference), texts[number])
        for number, (prompt, reference) in enumerate(asked)
    ]


def figures(answers: Sequence[Answer]) -> dict[str, float]:
    """``exact_match``, the fraction of answers that equal their references, and ``bleu`` from 0 to
    100 (Papineni et al., 2002), if the package sacrebleu is installed.
    """
    found = {"exact_match": sum(a.is_exact for a in answers) / len(answers)}
    if importlib.util.find_spec("sacrebleu") is not None:
        import sacrebleu

        texts, references = [a.answer for a in answers], [a.reference for a in answers]
        found["bleu"] = sacrebleu.corpus_bleu(texts, [references]).score
    return found


def shown(answers: Sequence[Answer], n: int) -> str:
    """The first ``n`` answers with their questions and references, as lines."""
    lines = []
    for answer in answers[:n]:
        lines += [
            answer.question.strip(),
            f"  reference: {answer.reference.strip()}",
            f"  answer:    {answer.answer.strip()}",
        ]
    return "\n".join(lines)
