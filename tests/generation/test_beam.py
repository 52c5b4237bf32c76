"""Beam search, compared with Hugging Face's ``generate`` on the same random weights."""

import pytest
import torch

from gpt.config import GenerationConfig, ModelConfig, UsageError
from gpt.generation.beam import BeamSearch, beam_search
from gpt.generation.decode import decode
from gpt.generation.sampling import describe
from tests.model.test_gpt import with_hugging_face_weights

STOPPING = {"likely": False, "first": True, "never": "never"}
END = 5


@pytest.fixture(scope="module")
def both():
    torch.manual_seed(3)
    config = ModelConfig(
        vocab_size=23, context_length=48, n_layer=2, n_head=4, n_embd=32, tie_embeddings=False
    )
    return with_hugging_face_weights(config)


def prompt_of(length, seed):
    return torch.randint(23, (1, length), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("num_beams", [2, 5])
@pytest.mark.parametrize("early_stopping", STOPPING)
@pytest.mark.parametrize("length_penalty", [0.0, 1.0, 2.0, -1.0])
@pytest.mark.parametrize(
    ("settings", "ends"),
    [
        ({}, [END]),
        ({"repetition_penalty": 1.4, "min_new_tokens": 4}, [END]),
        ({"min_new_tokens": 2}, [END, 7, 11]),
    ],
    ids=["", "penalties", "ends"],
)
def test_sequences_and_scores_are_hugging_faces(
    both, seed, num_beams, early_stopping, length_penalty, settings, ends
):
    ours, theirs = both
    prompt = prompt_of(3 + seed, seed)
    config = GenerationConfig(
        max_new_tokens=14,
        num_beams=num_beams,
        num_samples=num_beams,
        early_stopping=early_stopping,
        length_penalty=length_penalty,
        bias=dict.fromkeys(ends, 2.5),
        **settings,
    )
    beams = beam_search(ours, prompt[0].tolist(), config, end_of_text=ends)
    expected = theirs.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=14,
        do_sample=False,
        num_beams=num_beams,
        num_return_sequences=num_beams,
        early_stopping=STOPPING[early_stopping],
        length_penalty=length_penalty,
        sequence_bias=[[[end], 2.5] for end in ends],
        eos_token_id=ends,
        pad_token_id=END,
        return_dict_in_generate=True,
        output_scores=True,
        **settings,
    )
    for beam, row, score in zip(
        beams, expected.sequences.tolist(), expected.sequences_scores.tolist(), strict=True
    ):
        new = row[prompt.shape[1] :]
        assert beam.tokens == new[: len(beam.tokens)]
        assert set(new[len(beam.tokens) :]) <= {END}  # their padding
        assert beam.score == pytest.approx(score, rel=1e-5, abs=1e-5)


def test_some_beams_end_early_and_some_do_not(both):
    config = GenerationConfig(max_new_tokens=14, num_beams=5, num_samples=5, bias={END: 2.5})
    lengths = {
        len(beam.tokens)
        for seed in range(4)
        for beam in beam_search(
            both[0], prompt_of(3 + seed, seed)[0].tolist(), config, end_of_text=END
        )
    }
    assert len(lengths) > 2


@pytest.mark.parametrize("seed", range(3))
def test_a_beam_of_one_is_greedy(both, seed):
    prompt = prompt_of(6, seed)[0].tolist()
    config = GenerationConfig(temperature=0, max_new_tokens=20)
    [beam] = beam_search(both[0], prompt, config)
    assert beam.tokens == [token.id for token in decode(both[0], [prompt], config)]


def test_enough_beams_find_the_best_of_all_continuations():
    config = ModelConfig(vocab_size=4, context_length=8, n_layer=1, n_head=1, n_embd=16)
    model, _ = with_hugging_face_weights(config)
    search = GenerationConfig(max_new_tokens=3, num_beams=64, num_samples=64, length_penalty=0.0)
    beams = beam_search(model, [1, 2], search)
    every = torch.cartesian_prod(*[torch.arange(4)] * 3)
    with torch.inference_mode():
        rows = torch.cat([torch.tensor([[1, 2]]).expand(64, 2), every], 1)
        logprobs = model(rows)[:, 1:-1].log_softmax(-1).gather(2, every[:, :, None]).sum((1, 2))
    order = logprobs.argsort(descending=True)
    assert [beam.tokens for beam in beams] == every[order].tolist()
    assert [beam.score for beam in beams] == pytest.approx(logprobs[order].tolist(), abs=1e-4)


def test_all_candidates_of_a_token_are_described_at_once(both, monkeypatch):
    asked = []

    def counted(logits, tokens, *args):
        asked.append(len(tokens))
        return describe(logits, tokens, *args)

    monkeypatch.setattr("gpt.generation.beam.describe", counted)
    config = GenerationConfig(max_new_tokens=6, num_beams=3, num_samples=3, logprobs=2)
    for beam in beam_search(both[0], [1, 2, 3], config):
        assert beam.score * 6 == pytest.approx(sum(logprob for logprob, _ in beam.details))
    assert asked == [6] * 6


def test_the_model_reads_the_prompt_and_each_beams_token_once(both, monkeypatch):
    shapes = []
    features = type(both[0]).features

    def counted(self, tokens, **kwargs):
        shapes.append(tuple(tokens.shape))
        return features(self, tokens, **kwargs)

    monkeypatch.setattr(type(both[0]), "features", counted)
    beam_search(both[0], [1, 2, 3], GenerationConfig(max_new_tokens=4, num_beams=3))
    assert shapes == [(1, 3), (3, 1), (3, 1), (3, 1)]


def test_a_search_ends_where_the_context_is_full(both):
    [beam] = beam_search(both[0], [1] * 45, GenerationConfig(max_new_tokens=20, num_beams=2))
    assert len(beam.tokens) == 4


@pytest.mark.parametrize(
    ("prompt", "message"),
    [([1] * 49, "has 49 tokens, and .* is 48; .* cannot slide"), ([23], "token id 23")],
)
def test_prompts_that_cannot_be_continued_are_refused(both, prompt, message):
    with pytest.raises(UsageError, match=message):
        beam_search(both[0], prompt, GenerationConfig(num_beams=2))


def test_more_results_than_beams_are_refused():
    with pytest.raises(UsageError, match="num_samples is 3, and must be at most num_beams"):
        GenerationConfig(num_beams=2, num_samples=3)


def test_banned_tokens_are_never_written(both):
    config = GenerationConfig(max_new_tokens=3, num_beams=4, num_samples=4, ban=tuple(range(20)))
    beams = beam_search(both[0], [1, 2], config)
    assert {token for beam in beams for token in beam.tokens} <= {20, 21, 22}
    with pytest.raises(UsageError, match="every token is banned"):
        beam_search(both[0], [1], GenerationConfig(num_beams=2, ban=tuple(range(23))))
    with pytest.raises(UsageError, match="ban has the token id 23"):
        beam_search(both[0], [1], GenerationConfig(num_beams=2, ban=(23,)))


def test_a_search_that_finds_too_few_continuations_is_refused():
    config = ModelConfig(vocab_size=3, context_length=8, n_layer=1, n_head=1, n_embd=16)
    model, _ = with_hugging_face_weights(config)
    search = BeamSearch(model, GenerationConfig(max_new_tokens=1, num_beams=4, num_samples=4))
    for sample in range(4):
        search.add([1], sample=sample)
    with pytest.raises(UsageError, match="num_samples is 4, .* found only 3 continuations"):
        search.advance()


def test_a_search_restores_the_models_mode_even_after_an_error(both):
    import copy

    model = copy.deepcopy(both[0]).train()
    beam_search(model, [1], GenerationConfig(num_beams=2, max_new_tokens=2))
    assert model.training
    with torch.no_grad():
        model.norm.weight[0] = torch.nan
    with pytest.raises(UsageError, match="logits are not numbers"):
        beam_search(model, [1], GenerationConfig(num_beams=2))
    assert model.training


def test_a_search_ends_when_every_candidate_has_ended():
    config = ModelConfig(vocab_size=1, context_length=8, n_layer=1, n_head=1, n_embd=16)
    model, _ = with_hugging_face_weights(config)
    search = GenerationConfig(max_new_tokens=4, num_beams=2)
    [beam] = beam_search(model, [0], search, end_of_text=0)
    assert beam.tokens == [0]


def test_beams_do_not_depend_on_torchs_default_device(both):
    config = GenerationConfig(
        max_new_tokens=9, num_beams=3, num_samples=3, repetition_penalty=1.4, logprobs=2
    )
    expected = beam_search(both[0], [3, 1, 2], config, end_of_text=END)
    with torch.device("meta"):
        assert beam_search(both[0], [3, 1, 2], config, end_of_text=END) == expected


def test_searches_run_in_order_and_their_last_tokens_say_why_they_ended(both):
    config = GenerationConfig(
        max_new_tokens=6, num_beams=3, num_samples=2, bias={END: 1.2}, logprobs=1
    )
    prompts, options = [[1, 2, 3], [4], [6] * 47], {"vocab_size": 20, "end_of_text": END}
    search, reasons = BeamSearch(both[0], config, **options), []
    assert not search.busy
    added = [search.add(prompt, sample=sample) for prompt in prompts for sample in range(2)]
    assert added == list(range(6))
    for number, prompt in enumerate(prompts):
        assert search.busy
        tokens = search.advance()
        beams = beam_search(both[0], prompt, config, **options)
        for sequence, beam in enumerate(beams, 2 * number):
            *before, last = [token for token in tokens if token.sequence == sequence]
            assert [token.id for token in (*before, last)] == beam.tokens
            assert [(token.logprob, token.top) for token in (*before, last)] == beam.details
            assert {(token.ended, token.score) for token in before} <= {(None, None)}
            assert last.score == beam.score
            full = "context" if len(prompt) == 47 else "length"
            assert last.ended == ("end_of_text" if last.id == END else full)
            reasons.append(last.ended)
    assert not search.busy
    assert set(reasons) == {"end_of_text", "context", "length"}
