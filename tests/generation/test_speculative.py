import functools
import itertools
import random

import pytest
import torch

from gpt.config import GenerationConfig, ModelConfig, SamplingConfig, UsageError
from gpt.generation.decode import decode
from gpt.generation.sampling import draw, new_draws, next_token_probabilities, penalise
from gpt.generation.speculative import DraftModel, PromptLookup, Speculator, _Reader
from tests.conftest import make_model

CONTEXT = 24


def model_of(seed, vocab_size=31):
    config = ModelConfig(
        vocab_size=vocab_size,
        context_length=CONTEXT,
        n_layer=2,
        n_head=2,
        n_embd=16,
        tie_embeddings=False,
    )
    model = make_model(config, seed=seed)
    with torch.no_grad():
        model.position.weight.mul_(5)
    return model


def near(model, noise):
    """A model that guesses well: the same one with some noise."""
    other = model_of(0, model.config.vocab_size)
    other.load_state_dict(model.state_dict())
    torch.manual_seed(9)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(noise * torch.randn_like(parameter))
    return other


class Right:
    """Guesses the right tokens."""

    def start(self, prompt, sample):
        pass

    def __init__(self, tokens):
        self.tokens = tokens

    def propose(self, tokens, n):
        return self.tokens[len(tokens) : len(tokens) + n], None


def draft_of(name, config):
    """A draft for ``model_of(1)``."""
    if name == "look-up":
        return PromptLookup()
    return DraftModel(near(model_of(1), 0.02) if name == "near" else model_of(5), config)


@functools.cache
def plain(policy, settings, seed, end):
    """A prompt, and its greedy tokens without guesses."""
    prompt = random.Random(seed).choices(range(31), k=5 + seed)
    config = greedy(policy, settings)
    return prompt, list(decode(model_of(1), [prompt], config, end_of_text=end))


def greedy(policy, settings):
    options = {"temperature": 0, "max_new_tokens": 60, "past_context": policy, "logprobs": 2}
    return GenerationConfig(**options, **dict(settings))


@pytest.fixture
def remembered(monkeypatch):
    """A reader's logits after equal tokens are computed once."""
    logits, known = _Reader.logits, {}

    def once(self, tokens, n, each=None):
        key = self.model, tuple(tokens), n
        if key not in known:
            known[key] = logits(self, tokens, n, each)
        return known[key]

    monkeypatch.setattr(_Reader, "logits", once)


@pytest.mark.parametrize("policy", ["stop", "slide"])
@pytest.mark.parametrize("num_draft_tokens", [1, 3, 8])
@pytest.mark.parametrize("name", ["look-up", "near", "another model"])
@pytest.mark.parametrize(
    "settings",
    [(), (("repetition_penalty", 1.3), ("frequency_penalty", 0.2), ("min_new_tokens", 9))],
    ids=str,
)
def test_greedy_tokens_are_those_of_plain_decoding(name, num_draft_tokens, policy, settings):
    model, config = model_of(1), greedy(policy, settings)
    draft = draft_of(name, config)
    for seed, end in itertools.product(range(4), (None, 3)):
        prompt, expected = plain(policy, settings, seed, end)
        speculator = Speculator(
            model, config, draft, num_draft_tokens=num_draft_tokens, end_of_text=end
        )
        got = list(speculator.decode(prompt))
        assert [(t.id, t.ended) for t in got] == [(t.id, t.ended) for t in expected]
        assert [t.logprob for t in got] == pytest.approx([t.logprob for t in expected], abs=1e-3)
        assert speculator.written == len(got)
        assert speculator.accepted <= speculator.guesses


@torch.inference_mode()
def distribution(model, prompt, config, n):
    """The probability of every text of ``n`` tokens, by the definition."""
    V = model.config.vocab_size
    probabilities = {(): 1.0}
    for _ in range(n):
        further = {}
        for text, p in probabilities.items():
            logits = model(torch.tensor([[*prompt, *text]]))[:, -1]
            each = next_token_probabilities(penalise(logits, config), config)[0].tolist()
            further |= {(*text, i): p * each[i] for i in range(V)}
        probabilities = further
    return probabilities


@pytest.mark.parametrize("filters", [{"top_k": 3}, {"ban": (2,), "bias": {1: 1.0}, "min_p": 0.1}])
@pytest.mark.parametrize("name", ["look-up", "near", "another model"])
def test_samples_have_the_models_distribution(name, filters, remembered):
    model = model_of(1, vocab_size=4)
    config = GenerationConfig(temperature=2.0, max_new_tokens=3, seed=0, **filters)
    own = SamplingConfig(temperature=2.0)  # the draft has other settings
    draft = {
        "look-up": PromptLookup(),
        "near": DraftModel(near(model, 0.1), own, seed=0),
        "another model": DraftModel(model_of(5, vocab_size=4), own, seed=0),
    }[name]
    prompt = [1, 2, 3, 1, 2]
    speculator = Speculator(model, config, draft, num_draft_tokens=2)
    n, counts = 3000, {}
    for sample in range(n):
        text = tuple(token.id for token in speculator.decode(prompt, sample=sample))
        counts[text] = counts.get(text, 0) + 1
    assert 0.05 < speculator.accepted / speculator.guesses < 0.999
    chi_square, cells, rest, rest_seen = 0.0, 0, 0.0, 0
    for text, p in distribution(model, prompt, config, 3).items():
        if p == 0:
            continue  # then it stays in counts
        if p * n < 5:
            rest, rest_seen = rest + p * n, rest_seen + counts.pop(text, 0)
        else:
            chi_square += (counts.pop(text, 0) - p * n) ** 2 / (p * n)
            cells += 1
    chi_square += (rest_seen - rest) ** 2 / max(rest, 1e-9) if rest > 1 else 0
    assert not counts
    assert cells > 5
    freedom = cells + (rest > 1) - 1
    assert chi_square < freedom + 3.1 * (2 * freedom) ** 0.5 + 6  # beyond p = 0.001


@torch.inference_mode()
def one_by_one(model, prompt, config, draft, num_draft_tokens):
    """The published algorithm: each guess is verified alone, with the next random number."""
    draws, tokens, n = new_draws(config.seed, prompt, 0), list(prompt), config.max_new_tokens
    draft.start(prompt, 0)
    while (left := len(prompt) + n - len(tokens)) > 0:
        guesses, q = draft.propose(tokens, min(left - 1, num_draft_tokens))
        for i in range(len(guesses) + 1):
            logits = penalise(model(torch.tensor([tokens]))[:, -1], config)
            p, kept = next_token_probabilities(logits, config), False
            if i < len(guesses):
                own = torch.zeros_like(p)
                own[0, guesses[i]] = 1.0
                own = own if q is None else q[i : i + 1]
                kept = draws.random() * own[0, guesses[i]].item() < p[0, guesses[i]].item()
                p = (p - own).clamp_min(0) if q is not None else p * (own == 0)
            tokens.append(guesses[i] if kept else int(draw(p, [draws.random()])))
            if not kept:
                break
    return tokens[len(prompt) :]


@pytest.mark.parametrize("num_draft_tokens", [1, 4])
@pytest.mark.parametrize("name", ["look-up", "near", "another model"])
def test_a_round_uses_the_random_numbers_of_guesses_that_are_verified_one_by_one(
    name, num_draft_tokens
):
    model = model_of(1)
    for seed in range(6):
        config = GenerationConfig(temperature=1.2, max_new_tokens=18, seed=seed, top_k=9)

        def draft(config=config):
            if name == "look-up":
                return PromptLookup()
            guesser = near(model, 0.02) if name == "near" else model_of(5)
            return DraftModel(guesser, config, seed=config.seed)

        prompt = random.Random(seed).choices(range(6), k=5)
        speculator = Speculator(model, config, draft(), num_draft_tokens=num_draft_tokens)
        got = [token.id for token in speculator.decode(prompt)]
        assert got == one_by_one(model, prompt, config, draft(), num_draft_tokens)


def test_guesses_have_other_numbers_than_decisions_at_every_seed_and_sample(remembered):
    """One sample for each of many seeds: equal numbers for both would bias it."""
    model, smaller = model_of(1, vocab_size=4), model_of(5, vocab_size=4)
    prompt, n = [1, 2, 3], 1500
    expected = distribution(model, prompt, SamplingConfig(temperature=2.0), 1)
    for sample in (0, 1):
        counts = [0] * 4
        for seed in range(n):
            config = GenerationConfig(temperature=2.0, max_new_tokens=2, seed=seed)
            draft = DraftModel(smaller, config, seed=seed)
            speculator = Speculator(model, config, draft, num_draft_tokens=1)
            counts[next(speculator.decode(prompt, sample=sample)).id] += 1
        chi_square = sum((counts[i] - p * n) ** 2 / (p * n) for (i,), p in expected.items())
        assert chi_square < 16.3  # 3 degrees of freedom, p = 0.001


@pytest.mark.parametrize("name", ["look-up", "another model"])
def test_a_seed_gives_a_prompt_the_same_tokens_in_any_batch(name):
    model = model_of(1)
    config = GenerationConfig(temperature=1.5, max_new_tokens=12, seed=3)

    def texts(*prompts):
        draft = {
            "look-up": PromptLookup(),
            "another model": DraftModel(model_of(5), config, seed=3),
        }
        speculator = Speculator(model, config, draft[name])
        rows = {speculator.add(prompt): [] for prompt in prompts}
        while speculator.busy:
            for token in speculator.advance():
                rows[token.sequence].append(token.id)
        return list(rows.values())

    assert texts([4, 5], [1, 2, 3])[1] == texts([1, 2, 3])[0]


def test_right_guesses_are_all_kept_and_read_together(monkeypatch):
    model = model_of(1)
    config = GenerationConfig(temperature=0, max_new_tokens=12)
    prompt = [1, 2, 3]
    tokens = [token.id for token in decode(model, [prompt], config)]
    speculator = Speculator(model, config, Right(prompt + tokens), num_draft_tokens=5)
    shapes = []
    features = type(model).features

    def counted(self, tokens, **kwargs):
        shapes.append(tokens.shape[1])
        return features(self, tokens, **kwargs)

    monkeypatch.setattr(type(model), "features", counted)
    assert [token.id for token in speculator.decode(prompt)] == tokens
    assert shapes == [3 + 5, 1 + 5]
    assert (speculator.rounds, speculator.guesses, speculator.accepted) == (2, 10, 10)


@pytest.mark.parametrize("settings", [{}, {"repetition_penalty": 1.3, "top_k": 5}], ids=str)
@pytest.mark.parametrize("name", ["look-up", "near"])
def test_all_guesses_of_a_round_are_verified_with_one_wait(name, settings, monkeypatch):
    model = model_of(1)
    config = GenerationConfig(temperature=1.0, seed=1, max_new_tokens=40, **settings)
    speculator = Speculator(model, config, draft_of(name, config), num_draft_tokens=4)
    waits = []
    for read in ("tolist", "item", "__bool__", "__int__", "__float__"):
        method = getattr(torch.Tensor, read)
        monkeypatch.setattr(
            torch.Tensor, read, lambda self, method=method: waits.append(1) or method(self)
        )
    assert len(list(speculator.decode([1, 2, 3, 1, 2]))) == 40
    drawn = speculator.guesses if name == "near" else 0  # a draft model waits for each guess
    assert speculator.guesses > 20
    assert len(waits) == speculator.rounds + drawn


def test_logits_that_are_not_numbers_are_refused_at_their_token(monkeypatch):
    model = model_of(1)
    config = GenerationConfig(temperature=0, max_new_tokens=12)
    prompt = [1, 2, 3]
    tokens = [token.id for token in decode(model, [prompt], config)]
    speculator = Speculator(model, config, Right(prompt + tokens), num_draft_tokens=5)
    head = model.head.forward

    def broken(x):
        logits = head(x)
        logits[3:] = torch.nan
        return logits

    monkeypatch.setattr(model.head, "forward", broken)
    got = []
    with pytest.raises(UsageError, match="logits are not numbers"):
        got.extend(token.id for token in speculator.decode(prompt))
    assert speculator.accepted == 3


def test_a_draft_with_logits_that_are_not_numbers_is_refused():
    model, broken = model_of(1), model_of(2)
    with torch.no_grad():
        broken.head.weight.fill_(torch.nan)
    config = GenerationConfig(temperature=1.0, max_new_tokens=5)
    speculator = Speculator(model, config, DraftModel(broken, config), num_draft_tokens=2)
    with pytest.raises(UsageError, match="logits are not numbers"):
        list(speculator.decode([1, 2]))


def test_look_up_takes_the_latest_occurrence_of_the_longest_match():
    tokens = [1, 2, 3, 4, 9, 2, 3, 5, 3, 6, 2, 3]
    assert PromptLookup(3).propose(tokens, 2) == ([5, 3], None)
    assert PromptLookup(1).propose(tokens, 2) == ([6, 2], None)
    assert PromptLookup(3).propose([1, 2, 3], 2) == ([], None)
    assert PromptLookup(3).propose([7], 2) == ([], None)


def test_invalid_prompts_and_settings_are_refused():
    model = model_of(1)
    with pytest.raises(UsageError, match="num_draft_tokens is 0"):
        Speculator(model, GenerationConfig(), PromptLookup(), num_draft_tokens=0)
    for settings in ({"ban": (31,)}, {"bias": {-1: 1.0}}):
        with pytest.raises(UsageError, match="has the token id"):
            Speculator(model, GenerationConfig(**settings), PromptLookup())
    speculator = Speculator(model, GenerationConfig(past_context="stop"), PromptLookup())
    for prompt, message in (([], "no tokens"), ([31], "token id 31"), ([1] * 25, "has 25 tokens")):
        with pytest.raises(UsageError, match=message):
            next(speculator.decode(prompt))


@pytest.mark.parametrize("draft", ["look-up", "near"])
def test_tokens_do_not_depend_on_torchs_default_device(draft):
    model = model_of(1)
    config = GenerationConfig(
        max_new_tokens=30, seed=2, bias={4: 1.0}, repetition_penalty=1.1, logprobs=2
    )

    smaller = near(model, 0.02)

    def written():
        guesses = PromptLookup() if draft == "look-up" else DraftModel(smaller, config, seed=2)
        return list(Speculator(model, config, guesses, end_of_text=7).decode([1, 2, 3, 1, 2]))

    expected = written()
    with torch.device("meta"):
        assert written() == expected
