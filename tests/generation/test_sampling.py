import math

import pytest
import torch
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    SequenceBiasLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from gpt.config import SamplingConfig, UsageError
from gpt.generation.sampling import (
    History,
    add_bias,
    choose,
    draw,
    finite,
    keep_min_p,
    keep_top_k,
    keep_top_p,
    next_token_probabilities,
    penalise,
    penalise_counts,
    penalise_repetition,
)

# Probabilities 0.4, 0.3, 0.2, 0.1 of ids 2, 0, 3, 1.
LOGITS = torch.tensor([[0.3, 0.1, 0.4, 0.2]]).log()


def kept(logits):
    return [i for i, x in enumerate(logits[0].tolist()) if x > -math.inf]


@pytest.mark.parametrize(
    ("k", "ids"),
    [
        (0, [0, 1, 2, 3]),
        (1, [2]),
        (2, [0, 2]),
        (3, [0, 2, 3]),
        (4, [0, 1, 2, 3]),
        (9, [0, 1, 2, 3]),
    ],
)
def test_top_k_keeps_the_k_likeliest(k, ids):
    assert kept(keep_top_k(LOGITS, k)) == ids


def test_top_k_keeps_tokens_that_tie_with_the_last():
    assert kept(keep_top_k(torch.tensor([[1.0, 2.0, 1.0, 0.0]]), 2)) == [0, 1, 2]


@pytest.mark.parametrize(
    ("p", "ids"),
    [
        (1e-9, [2]),
        (0.39, [2]),
        (0.41, [0, 2]),
        (0.69, [0, 2]),
        (0.71, [0, 2, 3]),
        (0.89, [0, 2, 3]),
        (0.91, [0, 1, 2, 3]),
        (1.0, [0, 1, 2, 3]),
    ],
)
def test_top_p_keeps_the_fewest_that_reach_p(p, ids):
    assert kept(keep_top_p(LOGITS, p)) == ids


def test_top_p_keeps_the_lower_ids_among_tokens_that_tie():
    assert kept(keep_top_p(torch.zeros(1, 4), 0.5)) == [0, 1]


def test_filters_do_not_change_the_logits_that_they_keep():
    for filtered in (keep_top_k(LOGITS, 2), keep_top_p(LOGITS, 0.6)):
        assert filtered[0, [0, 2]].tolist() == LOGITS[0, [0, 2]].tolist()


@pytest.mark.parametrize("vocab_size", [100, 50257])
@pytest.mark.parametrize("seed", range(10))
def test_the_filters_are_hugging_faces(seed, vocab_size):
    logits = 3 * torch.randn(5, vocab_size, generator=torch.Generator().manual_seed(seed))
    for k in (1, 7, 99):
        assert torch.equal(keep_top_k(logits, k), TopKLogitsWarper(k)(None, logits))
    for p in (0.05, 0.5, 0.9, 0.999):
        assert torch.equal(keep_top_p(logits, p), TopPLogitsWarper(p)(None, logits))
    for p in (0.001, 0.1, 0.9, 1.0):
        assert torch.equal(keep_min_p(logits, p), MinPLogitsWarper(p)(None, logits))
    bias = {3: 1.5, 99: -2.0, 0: 0.25}
    sequences = [([i], number) for i, number in bias.items()]
    ids = torch.zeros(5, 1, dtype=torch.int64)
    assert torch.equal(add_bias(logits, bias), SequenceBiasLogitsProcessor(sequences)(ids, logits))
    tokens = torch.randint(vocab_size, (5, 30), generator=torch.Generator().manual_seed(seed))
    seen = torch.zeros(5, vocab_size, dtype=torch.bool).scatter_(1, tokens, True)
    for penalty in (0.8, 1.0, 1.3):
        assert torch.equal(
            penalise_repetition(logits, seen, penalty),
            RepetitionPenaltyLogitsProcessor(penalty)(tokens, logits.clone()),
        )


@pytest.mark.parametrize("seed", range(5))
def test_the_order_is_hugging_faces(seed):
    logits = 3 * torch.randn(4, 100, generator=torch.Generator().manual_seed(seed))
    tokens = torch.randint(100, (4, 20), generator=torch.Generator().manual_seed(seed))
    config = SamplingConfig(
        temperature=1.7, bias={5: 2.0}, repetition_penalty=1.2, top_k=30, top_p=0.8, min_p=0.05
    )
    theirs = LogitsProcessorList(
        [
            SequenceBiasLogitsProcessor([([5], 2.0)]),
            RepetitionPenaltyLogitsProcessor(1.2),
            TemperatureLogitsWarper(1.7),
            TopKLogitsWarper(30),
            TopPLogitsWarper(0.8),
            MinPLogitsWarper(0.05),
        ]
    )
    history = History(100, torch.device("cpu"))
    for row in tokens.tolist():
        history.add(row)
    got = next_token_probabilities(penalise(logits, config, history), config)
    torch.testing.assert_close(got, theirs(tokens, logits.clone()).softmax(-1))


def test_presence_and_frequency_count_new_tokens_and_not_the_prompt():
    history = History(4, torch.device("cpu"))
    history.add([0, 0, 1])
    history.add([3])
    for tokens in ([1, 3], [1, 2]):
        history.append(torch.tensor(tokens))
    assert history.counts.tolist() == [[0, 2, 0, 0], [0, 0, 1, 1]]
    assert history.seen.tolist() == [[True, True, False, False], [False, False, True, True]]
    punished = penalise_counts(torch.zeros(2, 4), history.counts, presence=0.5, frequency=0.25)
    assert punished.tolist() == [[0, -1.0, 0, 0], [0, 0, -0.75, -0.75]]
    history.keep([1])
    assert history.counts.tolist() == [[0, 0, 1, 1]]


def test_banned_tokens_are_never_drawn():
    config = SamplingConfig(temperature=3.0, ban=(2, 0))
    probabilities = next_token_probabilities(penalise(LOGITS, config, None), config)
    assert probabilities[0, [0, 2]].tolist() == [0, 0]


def test_a_draw_is_the_first_token_whose_cumulative_probability_is_above_the_number():
    probabilities = torch.tensor([[0.0, 0.25, 0.0, 0.75, 0.0]])
    for number, token in ((0.0, 1), (0.2499, 1), (0.25, 3), (0.5, 3), (1 - 2**-53, 3)):
        assert draw(probabilities, [number]).tolist() == [token]


def test_the_order_is_temperature_then_top_k_then_top_p():
    config = SamplingConfig(temperature=2.0, top_k=3, top_p=0.7)
    # by hand, from the square roots of 0.4, 0.3, 0.2: the first two have more than 0.7 of the sum
    weights = [math.sqrt(p) for p in (0.4, 0.3, 0.2)]
    assert (weights[0] + weights[1]) / sum(weights) > 0.7 > weights[0] / sum(weights)
    total = weights[0] + weights[1]
    expected = [[weights[1] / total, 0, weights[0] / total, 0]]
    torch.testing.assert_close(next_token_probabilities(LOGITS, config), torch.tensor(expected))


def test_temperature_0_takes_the_likeliest_token():
    assert choose(LOGITS, SamplingConfig(temperature=0), []).tolist() == [2]


def test_draws_follow_the_probabilities():
    config = SamplingConfig(temperature=1.0)
    n = 20_000
    numbers = torch.rand(n, generator=torch.Generator().manual_seed(0)).tolist()
    counts = choose(LOGITS.expand(n, 4), config, numbers).bincount(minlength=4)
    expected = n * LOGITS.exp()[0]
    chi_square = ((counts - expected) ** 2 / expected).sum()
    assert chi_square < 16.3  # 3 degrees of freedom, p = 0.001


@pytest.mark.parametrize("logits", [[0.0, torch.nan], [-torch.inf] * 2, [torch.inf, 0.0]], ids=str)
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logits_that_are_not_numbers_are_refused(logits, temperature):
    with pytest.raises(UsageError, match="logits are not numbers"):
        choose(finite(torch.tensor([logits])), SamplingConfig(temperature=temperature), [0.5])


def test_bfloat16_logits_are_filtered_in_float32():
    probabilities = next_token_probabilities(LOGITS.bfloat16(), SamplingConfig(temperature=0.7))
    assert probabilities.dtype == torch.float32
    assert probabilities.sum().item() == pytest.approx(1, abs=1e-6)
