import dataclasses
import random

import pytest
import torch

from gpt.config import GenerationConfig, ModelConfig, UsageError
from gpt.generation.ahead import TokenLoop
from gpt.generation.decode import Decoder, decode
from gpt.model.cache import DeviceLengths
from gpt.model.gpt import GPT
from gpt.model.store import Store
from tests.conftest import make_model
from tests.model.test_gpt import with_hugging_face_weights

CONTEXT = 16


def greedy(max_new_tokens, **settings):
    return GenerationConfig(temperature=0, max_new_tokens=max_new_tokens, **settings)


def continued(model, prompts, config, **options):
    """The new tokens of each sequence."""
    rows = [[] for _ in range(len(prompts) * config.num_samples)]
    for token in decode(model, prompts, config, **options):
        rows[token.sequence].append(token.id)
    return rows


@pytest.fixture
def tiny_model(tiny_config):
    """A model with varied likeliest tokens: with tied embeddings it would repeat its last one."""
    model = make_model(dataclasses.replace(tiny_config, tie_embeddings=False))
    with torch.no_grad():
        model.position.weight.mul_(10)
        model.norm.bias.zero_()
    return model


def prompt_of(length, seed=None):
    return random.Random(seed or length).choices(range(61), k=length)


def test_decoded_tokens_vary(tiny_model):
    [tokens] = continued(tiny_model, [prompt_of(5)], greedy(40))
    assert len(set(tokens)) > 4


@torch.inference_mode()
def without_a_cache(model, prompt, n, *, slide):
    """Greedy decoding by the definition: a full forward over the context for each token."""
    seen, out = prompt[-CONTEXT:], []
    for _ in range(n):
        token = int(model(torch.tensor([seen]))[0, -1].argmax())
        out.append(token)
        seen = [*seen, token]
        if len(seen) > CONTEXT:
            if not slide:
                break
            seen = seen[-(CONTEXT // 2) :]
    return out


@pytest.mark.parametrize("policy", ["stop", "slide"])
@pytest.mark.parametrize("batch_size", [1, 2, 3, 10])
@pytest.mark.parametrize("seed", range(4))
def test_ragged_batches_give_the_tokens_of_one_sequence_without_a_cache(
    policy, batch_size, seed, tiny_model
):
    draw = random.Random(seed)
    prompts = [prompt_of(draw.randint(1, CONTEXT), seed=i) for i in range(1, 10)]
    config = greedy(40, past_context=policy)
    expected = [without_a_cache(tiny_model, p, 40, slide=policy == "slide") for p in prompts]
    assert continued(tiny_model, prompts, config, batch_size=batch_size) == expected


@pytest.mark.parametrize("num_samples", [1, 3])
@pytest.mark.parametrize("batch_size", [2, 7])
def test_shared_beginnings_do_not_change_the_tokens(num_samples, batch_size, tiny_model):
    common = prompt_of(10)
    prompts = [common + prompt_of(n, seed=n + 50) for n in (0, 1, 3, 5, 1)] + [prompt_of(4)]
    config = greedy(12, num_samples=num_samples)
    alone = [without_a_cache(tiny_model, p, 12, slide=True) for p in prompts]
    expected = [tokens for tokens in alone for _ in range(num_samples)]
    assert continued(tiny_model, prompts, config, batch_size=batch_size) == expected


@pytest.mark.parametrize("batch_size", [1, 2, 5])
@pytest.mark.parametrize("seed", range(12))
def test_shared_beginnings_of_any_length_do_not_change_the_tokens(seed, batch_size):
    model = make_model(
        ModelConfig(vocab_size=61, context_length=64, n_layer=1, n_embd=16, n_head=2)
    )
    draw = random.Random(seed)
    base = draw.choices(range(61), k=50)
    prompts = [base[: draw.randint(1, 50)] + draw.choices(range(61), k=n) for n in [0, 1, 2, 0, 9]]
    together = continued(model, prompts, greedy(4), batch_size=batch_size)
    assert together == [continued(model, [prompt], greedy(4))[0] for prompt in prompts]


@pytest.mark.parametrize("policy", ["stop", "slide"])
@pytest.mark.parametrize("ahead", [2, 5, 16])
@pytest.mark.parametrize("batch_size", [1, 3])
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"temperature": 1.3, "top_p": 0.9, "seed": 3},
        {"bias": {4: 2.0}, "ban": (7, 9), "min_new_tokens": 4},
        {"repetition_penalty": 1.5},
    ],
    ids=["greedy", "drawn", "biased", "penalised"],
)
def test_tokens_chosen_ahead_are_the_same(settings, batch_size, ahead, policy, tiny_model):
    config = GenerationConfig(
        **{"temperature": 0, "max_new_tokens": 23, "past_context": policy} | settings
    )
    prompts = [prompt_of(n) for n in (3, 9, 16, 5, 1)]
    plain = list(decode(tiny_model, prompts, config, batch_size=batch_size, end_of_text=11))
    got = list(
        decode(tiny_model, prompts, config, batch_size=batch_size, end_of_text=11, ahead=ahead)
    )
    for number in range(len(prompts)):
        assert [t for t in got if t.sequence == number] == [
            t for t in plain if t.sequence == number
        ]


@pytest.mark.parametrize("ahead", [1, 4])
@pytest.mark.parametrize("settings", [{}, {"repetition_penalty": 1.5, "logprobs": 2}], ids=str)
def test_tokens_do_not_depend_on_torchs_default_device(settings, ahead, tiny_model):
    config = GenerationConfig(
        temperature=0.9,
        seed=3,
        max_new_tokens=20,
        min_new_tokens=2,
        bias={4: 2.0},
        **settings,
    )
    prompts = [[*prompt_of(9, 1), token] for token in (3, 4, 5)]
    options = {"batch_size": 2, "end_of_text": 11, "ahead": ahead}
    expected = list(decode(tiny_model, prompts, config, **options))
    with torch.device("meta"):
        assert list(decode(tiny_model, prompts, config, **options)) == expected


@pytest.mark.parametrize("prefill", [1, 5, 12])
def test_reading_prompts_in_chunks_does_not_change_the_tokens(prefill, tiny_model, monkeypatch):
    prompts = [prompt_of(n) for n in (3, 9, 16, 5, 1)]
    whole = continued(tiny_model, prompts, greedy(8), batch_size=3)
    read = []
    features = GPT.features

    def count(self, tokens, **options):
        read.append(tokens.numel())
        return features(self, tokens, **options)

    monkeypatch.setattr("gpt.generation.prefill.PREFILL", prefill)
    monkeypatch.setattr(GPT, "features", count)
    assert continued(tiny_model, prompts, greedy(8), batch_size=3) == whole
    assert max(read) <= max(prefill, 3)


@pytest.mark.parametrize("window", [0, 5])
@pytest.mark.parametrize("cache", ["float", "int8"])
def test_prompts_that_fill_the_cache_are_read_into_it(window, cache, tiny_config, monkeypatch):
    model = make_model(dataclasses.replace(tiny_config, window=window))
    prompts = [prompt_of(9), prompt_of(5)]
    config = dataclasses.replace(greedy(6), cache=cache)
    expected = [continued(model, [prompt], config)[0] for prompt in prompts]

    def copied(*_):
        raise AssertionError("a cache was copied")

    monkeypatch.setattr(Store, "take", copied)
    assert continued(model, prompts[:1], config) == expected[:1]
    assert continued(model, [prompts[1], prompts[0]], config)[::-1] == expected
    with pytest.raises(AssertionError, match="was copied"):
        continued(model, [prompts[0]] * 2, config)  # it is read once


@pytest.mark.parametrize("cache", ["float", "int8"])
def test_details_of_prompts_are_told_with_every_cache(cache, tiny_model):
    config = dataclasses.replace(greedy(3), cache=cache, logprobs=2)
    found = [*decode(tiny_model, [prompt_of(6), prompt_of(4), prompt_of(6)], config)]
    assert len(found) == 9


@pytest.mark.parametrize("window", [0, 5])
def test_only_rings_need_the_numbers_of_valid_tokens(window, tiny_config, monkeypatch):
    """Packed models read prompts with padding in the kernels only without these numbers."""
    told = []
    features = GPT.features

    def recorded(self, tokens, *, valid=None, **options):
        told.append(valid)
        return features(self, tokens, valid=valid, **options)

    monkeypatch.setattr(GPT, "features", recorded)
    model = make_model(dataclasses.replace(tiny_config, window=window))
    continued(model, [prompt_of(2), prompt_of(3)], greedy(1))
    assert told == [[2, 3] if window else None]


def test_tokens_chosen_ahead_come_several_at_a_time(tiny_model, monkeypatch):
    counts = []
    run = TokenLoop.run

    def counted(self, model, last, numbers, **options):
        counts.append(len(numbers))
        return run(self, model, last, numbers, **options)

    monkeypatch.setattr(TokenLoop, "run", counted)
    config = GenerationConfig(temperature=0, max_new_tokens=12, past_context="stop")
    got = list(decode(tiny_model, [prompt_of(3)], config, ahead=4))
    assert len(got) == 12
    assert counts == [4, 4, 3]  # the prompt's prefill gives the first token


def test_tokens_ahead_from_logits_that_are_not_numbers_are_refused(tiny_model):
    decoder = Decoder(tiny_model, greedy(20), ahead=4)
    decoder.add([1, 2])
    decoder.advance()
    with torch.no_grad():
        tiny_model.head.weight.fill_(torch.nan)
    with pytest.raises(UsageError, match="logits are not numbers"):
        decoder.advance()


@pytest.mark.parametrize("ahead", [1, 4])
def test_an_advance_waits_for_the_device_once(ahead, tiny_model, monkeypatch):
    # only on a CPU, and it reads the lengths
    monkeypatch.setattr(DeviceLengths, "check_room", lambda self, *room: None)
    waits = []
    for read in ("tolist", "item", "__bool__", "__int__", "__float__"):
        method = getattr(torch.Tensor, read)
        monkeypatch.setattr(
            torch.Tensor, read, lambda self, method=method: waits.append(1) or method(self)
        )
    decoder = Decoder(tiny_model, greedy(13, past_context="stop"), ahead=ahead)
    decoder.add(prompt_of(3))
    decoder.add(prompt_of(3, seed=9))
    decoder.advance()  # reads the prompts
    while decoder.busy:
        waits.clear()
        decoder.advance()
        assert len(waits) == 1


def test_greedy_decoding_is_hugging_faces():
    config = ModelConfig(
        vocab_size=97, context_length=48, n_layer=2, n_head=4, n_embd=32, tie_embeddings=False
    )
    ours, theirs = with_hugging_face_weights(config)
    prompt = torch.randint(97, (2, 7), generator=torch.Generator().manual_seed(0))
    expected = theirs.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=30,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
    )
    assert len(expected[:, 7:].unique()) > 8
    assert continued(ours, prompt.tolist(), greedy(30)) == expected[:, 7:].tolist()


def test_stop_ends_a_sequence_when_the_context_is_full(tiny_model):
    tokens = list(decode(tiny_model, [prompt_of(10)], greedy(100, past_context="stop")))
    assert len(tokens) == CONTEXT - 10 + 1  # a full context predicts the last one
    assert [token.ended for token in tokens] == [None] * 6 + ["context"]


def test_slide_takes_the_end_of_a_prompt_longer_than_the_context(tiny_model):
    prompt = prompt_of(30)
    assert continued(tiny_model, [prompt], greedy(20)) == (
        continued(tiny_model, [prompt[-CONTEXT:]], greedy(20))
    )


def test_slide_works_in_a_context_of_one_token():
    model = make_model(ModelConfig(vocab_size=9, context_length=1, n_layer=1, n_head=1, n_embd=8))
    assert len(list(decode(model, [[3]], greedy(5)))) == 5


@pytest.fixture
def reads(tiny_model, monkeypatch):
    """The shapes of the tokens that the model reads."""
    shapes = []
    features = type(tiny_model).features

    def counted(self, tokens, **kwargs):
        shapes.append(tuple(tokens.shape))
        return features(self, tokens, **kwargs)

    monkeypatch.setattr(type(tiny_model), "features", counted)
    return shapes


def test_the_model_reads_each_token_once(tiny_model, reads):
    continued(tiny_model, [prompt_of(6)], greedy(5))
    assert reads == [(1, 6), (1, 1), (1, 1), (1, 1), (1, 1)]


def test_a_cache_is_no_longer_than_prompt_and_new_tokens(tiny_model, monkeypatch):
    capacities, new_cache = [], tiny_model.new_cache

    def recorded(*args, capacity, **kwargs):
        capacities.append(capacity)
        return new_cache(*args, capacity=capacity, **kwargs)

    monkeypatch.setattr(tiny_model, "new_cache", recorded)
    continued(tiny_model, [prompt_of(4), prompt_of(2)], greedy(3))
    assert max(capacities) == 7


def test_the_samples_of_a_prompt_share_its_prefill(tiny_model, reads):
    continued(tiny_model, [prompt_of(6)], greedy(3, num_samples=4))
    assert reads == [(1, 6), (4, 1), (4, 1)]


def test_the_shared_beginning_of_prompts_is_read_once(tiny_model, reads):
    prompts = [prompt_of(10) + [i] * (1 + i) for i in range(4)]
    continued(tiny_model, prompts, greedy(1), batch_size=2)
    # the beginning, then the ends of the first two prompts, then those of the others
    assert reads == [(1, 10), (2, 2), (2, 4)]


@pytest.mark.parametrize("batch_size", [1, 3])
def test_a_shared_beginning_is_kept_for_the_next_prompts(batch_size, tiny_model, reads):
    prompts = [[*prompt_of(10), i] for i in range(6)]
    continued(tiny_model, prompts, greedy(1), batch_size=batch_size)
    assert sum(rows * n for rows, n in reads) == 10 + 6
    reads.clear()
    continued(tiny_model, [prompt_of(12)], greedy(1, num_samples=6), batch_size=batch_size)
    assert sum(rows * n for rows, n in reads) <= 11 + 6


def test_a_later_prompt_does_not_keep_the_next_ones_from_sharing(tiny_model, reads):
    prompts = [[*prompt_of(10), 1], [*prompt_of(10), 2], prompt_of(12)]
    continued(tiny_model, prompts, greedy(1), batch_size=1)
    assert sum(rows * n for rows, n in reads) == 10 + 2 + 12


def test_without_a_seed_equal_prompts_get_different_texts(tiny_model):
    config = GenerationConfig(temperature=50.0, max_new_tokens=8)
    assert len(set(map(tuple, continued(tiny_model, [[1, 2]] * 5, config)))) == 5


def test_a_slide_costs_one_prefill_of_half_the_context(tiny_model, reads):
    continued(tiny_model, [prompt_of(CONTEXT)], greedy(11))
    half = CONTEXT // 2
    assert reads == [(1, CONTEXT), (1, half), *[(1, 1)] * half, (1, half)]


def test_the_next_prompt_takes_the_row_of_a_sequence_that_ends(tiny_model, reads):
    decoder = Decoder(tiny_model, greedy(6, past_context="stop"), batch_size=2)
    for length in (15, 3, 4):  # the first one's context is full after 2 tokens
        decoder.add(prompt_of(length))
    ends = {}
    while decoder.busy:
        for token in decoder.advance():
            if token.ended:
                ends[token.sequence] = token.ended
    assert reads == [(2, 15), (2, 1), (1, 1), (1, 4), (2, 1), (2, 1), (2, 1), (1, 1), (1, 1)]
    assert ends == {0: "context", 1: "length", 2: "length"}


def test_sequences_can_be_added_and_ended_at_any_time(tiny_model):
    decoder = Decoder(tiny_model, greedy(8), batch_size=4)
    rows = {decoder.add(prompt_of(2)): []}
    ended = None
    for turn in range(12):
        if turn in (2, 3, 5):
            rows[decoder.add(prompt_of(turn + 7))] = []
        if turn == 4:
            decoder.end(ended := 1)
        for token in decoder.advance():
            assert turn < 4 or token.sequence != ended
            rows[token.sequence].append(token.id)
    for sequence, length in enumerate((2, 9, 10, 12)):
        expected = without_a_cache(tiny_model, prompt_of(length), 8, slide=True)
        n = 2 if sequence == ended else min(8, 12 - (0, 2, 3, 5)[sequence])
        assert rows[sequence] == expected[:n]


def test_end_of_text_ends_a_sequence_unless_it_is_too_early(tiny_model):
    [tokens] = continued(tiny_model, [prompt_of(5)], greedy(20))
    end = tokens[6]
    first = tokens.index(end)
    got = list(decode(tiny_model, [prompt_of(5)], greedy(20), end_of_text=end))
    assert [token.id for token in got] == tokens[: first + 1]
    assert got[-1].ended == "end_of_text"
    later = list(
        decode(tiny_model, [prompt_of(5)], greedy(20, min_new_tokens=first + 1), end_of_text=end)
    )
    assert [token.id for token in later[:first]] == tokens[:first]
    assert end not in [token.id for token in later[: first + 1]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("batch_size", [1, 3, 8])
def test_a_seed_gives_a_prompt_the_same_tokens_in_any_batch(batch_size, dtype, tiny_config):
    model = make_model(tiny_config, dtype=dtype)
    config = GenerationConfig(temperature=1.5, max_new_tokens=20, num_samples=2, seed=7)
    prompts = [prompt_of(n) for n in (3, 9, 5, 12)]
    together = continued(model, prompts, config, batch_size=batch_size)
    for i, prompt in enumerate(prompts):
        assert together[2 * i : 2 * i + 2] == continued(model, [prompt], config)
    assert together[0] != together[1]
    other = dataclasses.replace(config, seed=8)
    assert continued(model, prompts, other, batch_size=batch_size) != together


@pytest.mark.parametrize("batch_size", [1, 4])
def test_penalties_follow_each_row(batch_size, tiny_model):
    settings = {"repetition_penalty": 1.3, "presence_penalty": 0.5, "frequency_penalty": 0.25}
    config = greedy(25, **settings)
    prompts = [prompt_of(n) for n in (3, 9, 5, 12, 1, 7)]
    together = continued(tiny_model, prompts, config, batch_size=batch_size)
    for prompt, tokens in zip(prompts, together, strict=True):
        seen = prompt[-CONTEXT:]
        everything, written = list(prompt), []
        for token in tokens:
            logits = tiny_model(torch.tensor([seen]))[0, -1]
            for i in set(everything):
                logits[i] = logits[i] / 1.3 if logits[i] > 0 else logits[i] * 1.3
            for i in set(written):
                logits[i] -= 0.5 + 0.25 * written.count(i)
            assert token == int(logits.argmax())
            seen, everything, written = [*seen, token], [*everything, token], [*written, token]
            if len(seen) > CONTEXT:
                seen = seen[-(CONTEXT // 2) :]


def test_log_probabilities_are_the_models_before_bias_and_temperature(tiny_model):
    config = GenerationConfig(
        temperature=0.7, top_k=5, max_new_tokens=8, logprobs=3, seed=0, bias={4: 2.0}
    )
    prompt, tokens = prompt_of(5), []
    for token in decode(tiny_model, [prompt], config):
        expected = tiny_model(torch.tensor([prompt + tokens]))[0, -1].log_softmax(-1)
        assert token.logprob == pytest.approx(expected[token.id].item(), abs=1e-4)
        best = expected.topk(3)
        assert [i for i, _ in token.top] == best.indices.tolist()
        assert [x for _, x in token.top] == pytest.approx(best.values.tolist(), abs=1e-4)
        tokens.append(token.id)


def test_log_probabilities_of_a_padded_vocabulary_are_those_of_the_loss(tiny_model):
    """As in the loss, the softmax includes the rows without a token."""
    config = greedy(4, logprobs=60)
    for token in decode(tiny_model, [[1, 2]], config, vocab_size=50):
        assert len(token.top) == 50
        assert max(i for i, _ in token.top) < 50
    expected = tiny_model(torch.tensor([[1, 2]]))[0, -1].log_softmax(-1)
    [first, *_] = decode(tiny_model, [[1, 2]], config, vocab_size=50)
    assert first.logprob == pytest.approx(expected[first.id].item(), abs=1e-4)


def test_a_cache_keeps_no_gradients(tiny_model):
    decoder = Decoder(tiny_model, greedy(3))
    decoder.add(prompt_of(3))
    decoder.advance()
    assert not decoder._cache.layer(0)[0].keys.requires_grad


def test_decoding_turns_dropout_off_and_restores_the_models_mode(tiny_config):
    config = dataclasses.replace(tiny_config, dropout=0.5, tie_embeddings=False)
    model = make_model(config)
    expected = continued(model, [prompt_of(5)], greedy(10))
    model.train()
    assert continued(model, [prompt_of(5)], greedy(10)) == expected
    assert model.training


@pytest.mark.parametrize(
    ("prompt", "settings", "message"),
    [
        ([], {}, "prompt has no tokens"),
        ([1, 61], {}, "prompt has the token id 61, and the vocabulary ends at 60"),
        ([-1], {}, "prompt has the token id -1"),
        ([1], {"ban": (61,)}, "ban has the token id 61"),
        ([1], {"bias": {99: 1.0}}, "bias has the token id 99"),
        ([1] * 17, {"past_context": "stop"}, "has 17 tokens, and .* context_length is 16"),
        ([1], {"ban": tuple(range(61))}, "every token is banned"),
    ],
)
def test_prompts_that_cannot_be_continued_are_refused(prompt, settings, message, tiny_model):
    with pytest.raises(UsageError, match=message):
        continued(tiny_model, [prompt], greedy(2, **settings))


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logits_that_are_not_numbers_are_refused(temperature, tiny_model):
    with torch.no_grad():
        tiny_model.norm.weight[0] = torch.nan
    config = GenerationConfig(temperature=temperature, max_new_tokens=2)
    with pytest.raises(UsageError, match="the model's logits are not numbers"):
        continued(tiny_model, [[1]], config)


def test_a_tokenizer_with_more_tokens_than_the_model_is_refused(tiny_model):
    with pytest.raises(UsageError, match="the tokenizer has 62 tokens, and the model 61"):
        Decoder(tiny_model, greedy(1), vocab_size=62)


def test_a_batch_size_of_0_is_refused(tiny_model):
    with pytest.raises(UsageError, match="batch_size is 0"):
        Decoder(tiny_model, greedy(1), batch_size=0)


OTHERS = [
    greedy(12),
    greedy(9, repetition_penalty=1.7),
    GenerationConfig(max_new_tokens=14, seed=1, temperature=1.3, logprobs=2),
    GenerationConfig(max_new_tokens=5, seed=2, presence_penalty=2.0, frequency_penalty=0.5),
    GenerationConfig(max_new_tokens=10, seed=3, bias={7: 9.0}, top_k=5, min_new_tokens=4),
    greedy(30, past_context="stop"),
]


@pytest.mark.parametrize("reserve", [None, 0, 3])
def test_sequences_with_settings_of_their_own_are_those_of_decoders_of_their_own(
    tiny_model, reserve
):
    decoder = Decoder(tiny_model, greedy(1), batch_size=3, reserve=reserve)
    prompts = [prompt_of(3 + 2 * (n % 6)) for n in range(12)]
    configs = [OTHERS[n % len(OTHERS)] for n in range(12)]
    found = {}
    for prompt, config in zip(prompts, configs, strict=True):
        found[decoder.add(prompt, config=config, end_of_text=5)] = []
        for token in decoder.advance():
            found[token.sequence].append((token.id, token.ended, len(token.top)))
    while decoder.busy:
        for token in decoder.advance():
            found[token.sequence].append((token.id, token.ended, len(token.top)))
    for tokens, prompt, config in zip(found.values(), prompts, configs, strict=True):
        alone = decode(tiny_model, [prompt], config, end_of_text=5)
        assert tokens == [(token.id, token.ended, len(token.top)) for token in alone]


def test_with_reserve_the_cache_grows_with_its_rows(tiny_config):
    model = make_model(dataclasses.replace(tiny_config, context_length=128))
    decoder = Decoder(model, greedy(100), reserve=8)
    decoder.add(prompt_of(4))
    decoder.advance()
    small = decoder.cache_bytes
    while decoder.busy:
        decoder.advance()
    assert small * 5 < decoder.cache_bytes <= model.new_cache(1).nbytes
    decoder.release()
    assert decoder.cache_bytes == 0


def test_a_copy_of_a_sequence_has_what_the_model_has_read(tiny_model):
    decoder = Decoder(tiny_model, greedy(6), batch_size=2)
    prompts = [prompt_of(5), prompt_of(9)]
    for prompt in prompts:
        decoder.add(prompt)
    written = {0: [], 1: []}
    for _ in range(3):
        for token in decoder.advance():
            written[token.sequence].append(token.id)
    for number, prompt in enumerate(prompts):
        tokens, cache = decoder.copy_of(number)
        assert tokens == prompt + written[number][:-1]
        assert cache.lengths == [len(tokens)]
        cache = cache.expand(1, capacity=CONTEXT)
        nexts = tiny_model(torch.tensor([[written[number][-1]]]), cache=cache)
        whole = tiny_model(torch.tensor([tokens + written[number][-1:]]))
        torch.testing.assert_close(nexts[:, -1], whole[:, -1], atol=1e-4, rtol=1e-4)
    assert decoder.copy_of(7) is None
