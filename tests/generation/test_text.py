import math
import random
import re
import time

import numpy as np
import pytest
import torch

import gpt
from gpt.config import ModelConfig, UsageError
from gpt.data.tokenizer import ByteTokenizer, CharTokenizer, GPT2Tokenizer, decode
from gpt.generation.text import GrowingText, encode_prompt
from tests.conftest import make_model


@pytest.fixture(scope="module")
def gpt2():
    return GPT2Tokenizer.released()


@pytest.fixture
def byte_model():
    config = ModelConfig(vocab_size=257, context_length=32, n_layer=2, n_head=2, n_embd=32)
    return make_model(config), ByteTokenizer()


def streamed(tokenizer, ids, stop=()):
    sample = GrowingText(tokenizer, stop)
    pieces = [sample.add(i) for i in ids]
    return [*pieces, sample.finish()]


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("kind", ["byte", "gpt2", "char"])
def test_streamed_text_is_decoded_text(kind, seed, gpt2):
    hard = "héllo wörld 東京 \U0001f469‍\U0001f467 "
    chars = CharTokenizer("".join(sorted(set(hard))))
    tokenizer = {"byte": ByteTokenizer(), "gpt2": gpt2, "char": chars}[kind]
    draw = random.Random(seed)
    noise = draw.choices(range(tokenizer.end_of_text), k=80)
    text = tokenizer.encode(hard).tolist()
    for ids in (noise, text, noise[:5] + text + noise[5:9]):
        assert "".join(streamed(tokenizer, ids)) == decode(tokenizer, ids)


def test_no_piece_has_a_broken_character():
    text = "é東\U0001f600"
    pieces = streamed(ByteTokenizer(), text.encode())
    assert pieces == ["", "é", "", "", "東", "", "", "", "\U0001f600", ""]


def test_a_character_that_never_becomes_whole_is_shown_at_the_end():
    assert streamed(ByteTokenizer(), "é".encode()[:1]) == ["", "\ufffd"]


@pytest.mark.parametrize(
    ("text", "stop", "shown"),
    [
        ("one END two", ["END"], "one "),
        ("one EN two END", ["END"], "one EN two "),
        ("one EEND", ["END"], "one E"),
        ("one EN", ["END"], "one EN"),
        ("ENENEND", ["ENEND"], "EN"),
        ("abc", ["c", "b"], "a"),
        ("END", ["END"], ""),
        ("a\n\nb", ["\n\n"], "a"),
        ("é東x", ["東"], "é"),
        ("plain", [], "plain"),
    ],
)
@pytest.mark.parametrize("chunk", [1, 2, 3, 100])
def test_a_stop_text_is_not_shown_and_all_text_before_it_is(text, stop, shown, chunk):
    # each token has `chunk` characters: a stop text can lie within one, or span several
    class Chunks(CharTokenizer):
        def decode_bytes(self, ids):
            return b"".join(text[chunk * i : chunk * (i + 1)].encode() for i in ids)

    n = -(-len(text) // chunk)
    tokenizer = Chunks("")
    tokenizer.end_of_text = -1
    pieces = streamed(tokenizer, range(n), stop)
    assert "".join(pieces) == shown


def test_text_is_held_back_only_while_it_can_become_a_stop_text():
    pieces = streamed(ByteTokenizer(), b"aENbENDc", ["END"])
    assert pieces == ["a", "", "", "ENb", "", "", "", "", ""]


def test_end_of_text_ends_a_sample():
    assert streamed(ByteTokenizer(), [97, 256, 98]) == ["a", "", "", ""]


def test_the_same_seed_gives_the_same_text_and_another_seed_another_text(byte_model):
    def text(seed):
        return gpt.generate(byte_model, "x", max_new_tokens=30, seed=seed)[0].text

    assert text(1) == text(1)
    assert text(1) != text(2)


def test_without_a_seed_each_text_is_new(byte_model):
    texts = {
        gpt.generate(byte_model, "x", max_new_tokens=40, temperature=2.0)[0].text for _ in range(4)
    }
    assert len(texts) == 4


def test_samples_already_differ_in_their_first_token(byte_model):
    texts = gpt.generate(
        byte_model,
        "x",
        num_samples=8,
        max_new_tokens=1,
        temperature=5.0,
        seed=0,
    )
    assert len({text.tokens[0] for text in texts}) > 4


def test_streaming_gives_the_generated_text(byte_model):
    options = {"max_new_tokens": 60, "seed": 3, "temperature": 1.0}
    pieces = list(gpt.stream(byte_model, "x", **options))
    assert len(pieces) > 10
    assert "".join(pieces) == gpt.generate(byte_model, "x", **options)[0].text


def test_generation_stops_at_a_stop_text(byte_model):
    options = {"max_new_tokens": 60, "seed": 3, "temperature": 1.0}
    text = gpt.generate(byte_model, "x", **options)[0].text
    # its first character also occurs earlier: a stop text must not count as a list of characters
    stop = next(text[i : i + 2] for i in range(10, 50) if text[i] in text[:i])
    expected = text[: text.find(stop)]
    for stops in (stop, [stop], ["\x00\x00", stop]):
        [got] = gpt.generate(byte_model, "x", stop=stops, **options)
        assert (got.text, got.reason) == (expected, "stop")


def test_a_beam_ends_before_its_stop_text(byte_model):
    options = {"max_new_tokens": 20, "num_beams": 3}
    [whole] = gpt.generate(byte_model, "to be", **options)
    stop = next(whole.text[i] for i in range(1, 20) if whole.text[i] not in whole.text[:i])
    [got] = gpt.generate(byte_model, "to be", stop=stop, **options)
    assert (got.text, got.reason) == (whole.text[: whole.text.find(stop)], "stop")
    assert got.tokens == whole.tokens[: len(got.tokens)]
    assert len(got.tokens) < len(whole.tokens)
    assert got.score == whole.score


def test_prompts_may_be_token_ids(byte_model):
    options = {"max_new_tokens": 5, "temperature": 0}
    texts = gpt.generate(byte_model, ["ab", "c"], **options)
    assert gpt.generate(byte_model, [[97, 98], [99]], **options) == texts
    assert "".join(gpt.stream(byte_model, [97, 98], **options)) == texts[0].text


def test_cancelled_generation_returns_the_text_so_far(byte_model):
    options = {"max_new_tokens": 30, "temperature": 0}
    asked = []

    def cancelled():
        asked.append(True)
        return len(asked) == 12

    got = gpt.generate(byte_model, ["ab", "c"], cancelled=cancelled, **options)
    whole = gpt.generate(byte_model, ["ab", "c"], **options)
    for one, all_of_it in zip(got, whole, strict=True):
        assert one.reason is None
        assert 3 < len(one.tokens) < 30
        assert all_of_it.tokens[: len(one.tokens)] == one.tokens


def test_each_sample_has_the_details_of_its_prompt(byte_model):
    options = {"max_new_tokens": 3, "logprobs": 1, "batch_size": 2, "seed": 1}
    got = gpt.generate(byte_model, ["abcd", "c"], num_samples=3, **options)
    assert [len(one.prompt_details) for one in got] == [3, 3, 3, 0, 0, 0]
    assert got[0].prompt_details == got[1].prompt_details == got[2].prompt_details
    [plain] = gpt.generate(byte_model, "abcd", max_new_tokens=3, seed=1)
    assert plain.prompt_details is None


def test_rows_of_a_padded_vocabulary_are_never_drawn():
    config = ModelConfig(vocab_size=320, context_length=32, n_layer=1, n_head=2, n_embd=32)
    model = make_model(config)
    with torch.no_grad():
        model.embed.weight[257:] *= 100  # the padding would win each draw
    for temperature in (0.0, 1.0):
        [got] = gpt.generate(
            (model, ByteTokenizer()), "x", max_new_tokens=5, temperature=temperature
        )
        assert max(got.tokens) < 257


def test_an_empty_prompt_is_the_start_of_a_document():
    assert encode_prompt(ByteTokenizer(), "") == [256]


def test_a_prompt_with_a_lone_surrogate_is_refused():
    with pytest.raises(UsageError, match="not UTF-8 text: surrogates not allowed at character 1"):
        encode_prompt(ByteTokenizer(), "a\udcff")


def test_impossible_settings_are_refused(byte_model):
    with pytest.raises(UsageError, match="temperature is -1"):
        gpt.generate(byte_model, "x", temperature=-1)
    with pytest.raises(UsageError, match="num_samples is 0"):
        gpt.generate(byte_model, "x", num_samples=0)
    with pytest.raises(UsageError, match="max_new_tokens is 0"):
        gpt.generate(byte_model, "x", max_new_tokens=0)
    for name, value in {"seed": "a", "logprobs": True, "stop": [3], "bias": {"a": 1.0}}.items():
        with pytest.raises(UsageError, match=f"{name} (is|has)"):
            gpt.generate(byte_model, "x", **{name: value})
    with pytest.raises(UsageError, match="num_draft_tokens is 0, and a draft needs at least 1"):
        gpt.generate(byte_model, "x", draft=byte_model)
    with pytest.raises(UsageError, match="both given; give only one of them"):
        gpt.generate(byte_model, "x", num_beams=2, num_draft_tokens=2)


@pytest.mark.parametrize("function", [gpt.generate, gpt.stream])
def test_a_misspelt_setting_gets_the_nearest_right_one(function, byte_model):
    for wrong, right in (
        ("max_new_token", "did you mean max_new_tokens?"),
        ("num_drafts_tokens", "did you mean num_draft_tokens?"),
        ("xyz", "choose from temperature, bias, "),
    ):
        with pytest.raises(UsageError, match=re.escape(f"'{wrong}' is not a setting; {right}")):
            function(byte_model, "x", **{wrong: 2})


def test_a_stream_that_is_closed_leaves_the_model_as_it_was(byte_model):
    byte_model[0].train()
    pieces = gpt.stream(byte_model, "x", max_new_tokens=30, seed=1)
    next(pieces)
    pieces.close()
    assert byte_model[0].training
    assert not torch.is_inference_mode_enabled()


def test_python_callers_can_use_guesses_and_beams(byte_model):
    options = {"max_new_tokens": 20, "temperature": 0}
    [plain] = gpt.generate(byte_model, "x", **options)
    [guessed] = gpt.generate(byte_model, "x", draft=byte_model, num_draft_tokens=3, **options)
    assert guessed.tokens == plain.tokens
    pieces = gpt.stream(byte_model, "x", num_draft_tokens=3, **options)
    assert "".join(pieces) == plain.text
    one, two = gpt.generate(byte_model, "x", num_beams=3, num_samples=2, **options)
    assert one.score >= two.score


def test_log_probabilities_sum_to_the_evaluations_loss(byte_model):
    import numpy as np

    from gpt.evaluation.perplexity import score_text

    [got] = gpt.generate(byte_model, "prompt", max_new_tokens=20, logprobs=2, seed=1)
    ids = np.array([*b"prompt", *got.tokens], np.uint32)
    loss = score_text(*byte_model, ids).losses.sum()
    total = sum(got.logprobs) + sum(token.logprob for token in got.prompt_details)
    assert -total == pytest.approx(loss, abs=1e-4)
    assert -total / (len(ids) - 1) == pytest.approx(loss / (len(ids) - 1), abs=1e-5)
    assert len(got.prompt_details) == 5


@pytest.mark.parametrize("dtype", [np.uint8, np.int8, np.uint16, np.int64, np.uint64])
def test_ids_of_any_width_are_the_same_prompt(byte_model, dtype):
    options = {"max_new_tokens": 8, "temperature": 1.0, "seed": 3, "repetition_penalty": 1.2}
    ids = [97, 98, 127]
    [expected] = gpt.generate(byte_model, [ids], **options)
    assert gpt.generate(byte_model, [np.array(ids, dtype)], **options) == [expected]
    assert gpt.generate(byte_model, np.array([ids], dtype), **options) == [expected]
    assert gpt.generate(byte_model, [torch.tensor(ids)], **options) == [expected]
    guessing = {"num_draft_tokens": 2, "max_new_tokens": 4, "temperature": 0}
    assert gpt.generate(byte_model, [np.array(ids, dtype)], **guessing) == gpt.generate(
        byte_model, [ids], **guessing
    )
    searching = {"num_beams": 2, "max_new_tokens": 4}
    assert gpt.generate(byte_model, [np.array(ids, dtype)], **searching) == gpt.generate(
        byte_model, [ids], **searching
    )
    banned = {"ban": np.arange(97, 127).astype(dtype), "bias": {dtype(5): np.float32(2)}}
    [got] = gpt.generate(byte_model, [ids], **options, **banned)
    assert not set(got.tokens) & set(range(97, 127))


@pytest.mark.parametrize(
    ("prompts", "said"),
    [
        ([1.0], r"prompts contains 1.0, and takes texts and lists of token ids"),
        ([5, 6], r"prompts contains 5"),
        (5, r"prompts is 5, and must be a text, or a list"),
        (None, r"prompts is None"),
        (torch.tensor(1), r"prompts is tensor\(1\)"),
        (torch.tensor([[1]], device="meta"), r"which is not a token id"),
        (b"ab", r"prompts contains 97"),
        ([b"ab"], r"the prompt is b'ab', and must be a list of token ids"),
        ([[1.0]], r"the prompt has 1.0, which is not a token id"),
        ([[True]], r"the prompt has True, which is not a token id"),
        ([np.array([1.5])], r"the prompt has np.float64\(1.5\), which is not"),
        ([["a"]], r"the prompt has 'a', which is not"),
        ([[-1]], r"the token id -1, and the vocabulary ends at 256"),
        ([[10**5000]], r"the token id a value of type int, too long to show"),
    ],
)
def test_values_that_are_not_prompts_are_refused(byte_model, prompts, said):
    with pytest.raises(UsageError, match=said):
        gpt.generate(byte_model, prompts)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("bias", [1]), ("bias", {1: "x"}), ("bias", {1: True}), ("bias", {True: 1.0}),
        ("bias", {1: float("nan")}), ("bias", {1: 1e300}), ("bias", {1: 10**400}), ("bias", 5),
        ("ban", 5), ("ban", [1.0]), ("ban", [True]), ("ban", "ab"), ("ban", [1000]),
        ("stop", 5), ("stop", [5]), ("stop", True), ("stop", {"a": 1}), ("stop", b"a"),
        ("logprobs", True), ("temperature", float("nan")), ("temperature", 10**400),
        ("top_p", float("nan")), ("length_penalty", 2000), ("length_penalty", -2000.0),
        ("batch_size", 0), ("batch_size", 1.5), ("batch_size", True), ("batch_size", "x"),
        ("num_draft_tokens", -1), ("num_draft_tokens", 2.5), ("max_new_tokens", 2**70),
    ],
)  # fmt: skip
def test_a_setting_of_a_wrong_type_is_refused_by_its_name(byte_model, name, value):
    with pytest.raises(UsageError, match=f"{name} (is|has) "):
        gpt.generate(byte_model, "x", **{name: value})


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"num_samples": 10**9}, "1,000,000,000 sequences need"),
        ({"num_beams": 10**8}, "100,000,000 beams of up to 32 tokens need"),
        ({"num_beams": 10**8, "num_samples": 10**8}, "100,000,000 sequences need"),
    ],
)
def test_settings_that_need_more_than_the_memory_are_refused_at_once(byte_model, settings, said):
    start = time.perf_counter()
    with pytest.raises(UsageError, match=rf"{said} [\d,.]+ GB, and this machine has [\d,.]+ GB: "):
        gpt.generate(byte_model, "x", **settings)
    assert time.perf_counter() - start < 1


def test_a_cache_that_does_not_fit_is_refused_before_it_is_made(byte_model, monkeypatch):
    monkeypatch.setattr("gpt.device.memory", lambda device: 1_200_000)
    options = {"max_new_tokens": 4, "num_samples": 200}
    said = "the keys, values and logits of 200 sequences of up to 5 tokens need 0.0 GB"
    with pytest.raises(UsageError, match=f"{said}.*a smaller batch_size"):
        gpt.generate(byte_model, "x", batch_size=200, **options)
    assert len(gpt.generate(byte_model, "x", batch_size=20, **options)) == 200


@pytest.mark.parametrize("length_penalty", [-20, 20])
def test_the_strongest_length_penalties_give_finite_scores(byte_model, length_penalty):
    options = {"num_beams": 3, "num_samples": 3, "max_new_tokens": 31}
    beams = gpt.generate(byte_model, "x", length_penalty=length_penalty, **options)
    for beam in beams:
        assert math.isfinite(beam.score)
        assert beam.score < 0
