import re
from pathlib import Path
from typing import get_args, get_type_hints

import pytest

from gpt.config import GenerationConfig, ModelConfig
from gpt.generation.context import Context, newest
from tests.conftest import make_model


def context_of(length, end_of_text=None, **settings):
    config = ModelConfig(vocab_size=9, context_length=length, n_layer=1, n_head=1, n_embd=8)
    return Context(make_model(config), GenerationConfig(**settings), end_of_text)


def test_only_stop_ends_a_sequence_in_a_full_context():
    for policy in get_args(get_type_hints(GenerationConfig)["past_context"]):
        context = context_of(4, past_context=policy)
        assert context.ended([1, 2, 3, 4], 1) is None
        assert context.ended([1, 2, 3, 4, 5], 2) == ("context" if policy == "stop" else None)


def test_the_page_of_generation_lists_every_policy():
    page = Path(__file__).parents[2] / "docs" / "generation.md"
    section = page.read_text(encoding="utf-8").split("## A full context")[1].split("\n## ")[0]
    listed = re.findall(r"^\| `(\w+)` \|", section, flags=re.MULTILINE)
    assert set(listed) == set(get_args(get_type_hints(GenerationConfig)["past_context"]))


def test_end_of_text_comes_before_the_length_and_the_length_before_the_context():
    context = context_of(2, end_of_text=7, max_new_tokens=3, past_context="stop")
    assert context.ended([1, 2, 7], 3) == "end_of_text"
    assert context.ended([1, 2, 3], 3) == "length"
    assert context.ended([1, 2, 3], 2) == "context"


@pytest.mark.parametrize(("length", "kept"), [(1, [6]), (4, [5, 6]), (5, [5, 6])])
def test_a_slide_keeps_the_newer_half_of_a_full_context(length, kept):
    context, tokens = context_of(length), list(range(7))
    assert context.slide(tokens[-length - 1 :]) == kept
    assert context.slide(tokens[:length]) == tokens[:length]


@pytest.mark.parametrize("length", [1, 2, 5, 8])
def test_the_newest_tokens_fill_half_of_the_context_or_more_and_rarely_move(length):
    text, starts = list(range(40)), []
    for n in range(1, 41):
        seen = newest(text[:n], length)
        assert seen == text[n - len(seen) : n]
        assert min(n, length // 2) <= len(seen) <= length
        starts.append(seen[0])
    assert set(starts) == set(range(0, starts[-1] + 1, max(1, length // 2)))
