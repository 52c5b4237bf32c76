import html.parser
import math
import re

import numpy as np
import pytest
import torch

from gpt.config import ModelConfig
from gpt.data.tokenizer import ByteTokenizer, GPT2Tokenizer
from gpt.evaluation.perplexity import score_text
from gpt.generation.explain import as_page, as_text, explain, token_text, visible
from tests.conftest import make_model


@pytest.fixture(scope="module")
def model():
    config = ModelConfig(vocab_size=257, context_length=32, n_layer=2, n_head=2, n_embd=32)
    return make_model(config), ByteTokenizer()


IDS = list("Hé <b>&\n\t東 hello".encode())


def test_the_surprisals_sum_to_the_evaluations_loss(model):
    tokens = explain(model, IDS[:9], IDS[9:])
    score = score_text(*model, np.array(IDS, np.uint32))
    assert -sum(token.logprob for token in tokens) == pytest.approx(score.losses.sum(), abs=1e-5)
    assert [token.is_prompt for token in tokens] == [True] * 8 + [False] * (len(IDS) - 9)


def test_a_text_longer_than_the_context_has_the_evaluations_scores(model):
    ids = (IDS * 5)[:79]
    tokens = explain(model, ids[:9], ids[9:])
    assert len(tokens) == len(ids) - 1
    score = score_text(*model, np.array(ids, np.uint32))
    assert -sum(token.logprob for token in tokens) == pytest.approx(score.losses.sum(), abs=1e-4)


def test_a_context_of_one_token_is_enough():
    config = ModelConfig(vocab_size=257, context_length=1, n_layer=1, n_head=1, n_embd=8)
    model = make_model(config), ByteTokenizer()
    tokens = explain(model, [1], [2, 3])
    score = score_text(*model, np.array([1, 2, 3], np.uint32))
    assert -sum(token.logprob for token in tokens) == pytest.approx(score.losses.sum(), abs=1e-5)


def test_probabilities_and_entropies_are_the_models(model):
    tokens = explain(model, IDS[:4], IDS[4:])
    distribution = model[0](torch.tensor([IDS]))[0, :-1].softmax(-1)
    for i, token in enumerate(tokens):
        p = distribution[i]
        assert token.probability == pytest.approx(p[IDS[i + 1]].item(), rel=1e-3)
        assert token.entropy == pytest.approx(-(p * p.log()).sum().item(), abs=1e-3)
        assert [x for _, x in token.alternatives] == pytest.approx(
            p.topk(10).values.tolist(), rel=1e-3
        )


class Page(html.parser.HTMLParser):
    """The text of a page without its head and its cards, and the surprisals in the cards."""

    def __init__(self):
        super().__init__()
        self.stack, self.text, self.surprisals, self.sources = [], "", [], []

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        self.sources += [v for k, v in attributes.items() if k in ("src", "href")]
        if tag in ("span", "main", "u", "style", "b", "table"):
            self.stack.append(attributes.get("class", tag))

    def handle_endtag(self, tag):
        if tag in ("span", "main", "u", "style", "b", "table"):
            self.stack.pop()

    def handle_data(self, data):
        if self.stack[-1:] == ["u"]:
            self.surprisals.append(float(data))
        elif "main" in self.stack and not {"c", "n"} & set(self.stack):
            self.text += data


def test_the_page_has_the_text_and_its_loss_and_needs_no_other_file(model):
    tokens = explain(model, IDS[:9], IDS[9:])
    content = as_page(tokens, title="a <title>", opening="H")
    page = Page()
    page.feed(content)
    assert page.text == "H" + "".join(token.text for token in tokens)
    assert page.surprisals == pytest.approx([-token.logprob for token in tokens], abs=1e-6)
    assert not page.sources
    assert "url(" not in content
    assert "<title>a &lt;title&gt;</title>" in content
    written = [token for token in tokens if not token.is_prompt]
    total = float(re.search(r"([\d.]+) nats in all", content)[1])
    assert total == pytest.approx(-sum(token.logprob for token in written), abs=1e-4)


def test_a_character_of_several_tokens_is_shown_whole_where_it_ends(model):
    text = "東京 \U0001f600!"
    tokens = explain(model, [104], list(text.encode()))
    assert "".join(token.text for token in tokens) == text
    assert [token.text for token in tokens[:4]] == ["", "", "東", ""]
    assert tokens[0].name == r"\xe6"
    assert text in as_text(tokens).plain
    page = Page()
    page.feed(as_page(tokens, title="t"))
    assert page.text == text
    half = explain(model, [104], list("a東".encode())[:-1])
    assert "".join(token.text for token in half) == "a\ufffd"


def test_the_summary_counts_the_continuation_and_the_prompt(model):
    tokens = explain(model, IDS[:9], IDS[9:])
    said = as_text(tokens).plain.strip().splitlines()[-1]
    numbers = [float(n) for n in re.findall(r"([\d.]+) nats", said)]
    total = sum(score_text(*model, np.array(IDS, np.uint32)).losses)
    assert sum(numbers) == pytest.approx(total, abs=1e-3)
    assert said.startswith(f"{len(IDS) - 9} tokens")
    assert "the prompt's 8 before them" in said


def test_the_terminals_text_lists_the_least_likely_tokens(model):
    tokens = explain(model, IDS[:9], IDS[9:])
    shown = as_text(tokens, opening="H").plain
    assert shown.startswith("H" + "".join(token.text for token in tokens))
    worst = min((token for token in tokens if not token.is_prompt), key=lambda t: t.logprob)
    assert f"{worst.probability:.2%}" in shown
    assert visible(worst.alternatives[0][0]) in shown


def test_a_token_that_is_not_text_is_shown_as_bytes():
    tokenizer = GPT2Tokenizer.released()
    assert token_text(tokenizer, tokenizer.end_of_text) == "<end of text>"
    [first, *_] = tokenizer.encode("東").tolist()
    assert re.fullmatch(r"(\\x[0-9a-f]{2})+", token_text(tokenizer, first))
    assert visible(" a\n\t\x00") == "·a⏎⇥\\x00"


def test_an_empty_continuation_has_a_summary(model):
    tokens = explain(model, IDS[:5], [])
    assert "nothing was written" in as_text(tokens).plain
    assert math.isfinite(tokens[0].logprob)
