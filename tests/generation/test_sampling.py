import math

import pytest
import torch
from transformers import TopKLogitsWarper, TopPLogitsWarper

from gpt.config import SamplingConfig
from gpt.generation.sampling import choose, keep_top_k, keep_top_p, next_token_probabilities

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


def test_top_k_keeps_what_ties_with_the_last():
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


def test_of_tokens_that_tie_top_p_keeps_the_lower_ids():
    assert kept(keep_top_p(torch.zeros(1, 4), 0.5)) == [0, 1]


def test_what_the_filters_keep_keeps_its_logit():
    for filtered in (keep_top_k(LOGITS, 2), keep_top_p(LOGITS, 0.6)):
        assert filtered[0, [0, 2]].tolist() == LOGITS[0, [0, 2]].tolist()


@pytest.mark.parametrize("seed", range(10))
def test_the_filters_are_hugging_faces(seed):
    logits = 3 * torch.randn(5, 100, generator=torch.Generator().manual_seed(seed))
    for k in (1, 7, 99):
        assert torch.equal(keep_top_k(logits, k), TopKLogitsWarper(k)(None, logits))
    for p in (0.05, 0.5, 0.9, 0.999):
        assert torch.equal(keep_top_p(logits, p), TopPLogitsWarper(p)(None, logits))


def test_the_order_is_temperature_then_top_k_then_top_p():
    config = SamplingConfig(temperature=2.0, top_k=3, top_p=0.7)
    # by hand: square roots of 0.4, 0.3, 0.2 share 1; the first two reach 0.7 of it
    weights = [math.sqrt(p) for p in (0.4, 0.3, 0.2)]
    assert (weights[0] + weights[1]) / sum(weights) > 0.7 > weights[0] / sum(weights)
    total = weights[0] + weights[1]
    expected = [[weights[1] / total, 0, weights[0] / total, 0]]
    torch.testing.assert_close(next_token_probabilities(LOGITS, config), torch.tensor(expected))


def test_temperature_0_takes_the_likeliest():
    assert choose(LOGITS, SamplingConfig(temperature=0), None).tolist() == [2]


def test_draws_follow_the_probabilities():
    config = SamplingConfig(temperature=1.0)
    generator = torch.Generator().manual_seed(0)
    n = 20_000
    counts = choose(LOGITS.expand(n, 4), config, generator).bincount(minlength=4)
    expected = n * LOGITS.exp()[0]
    chi_square = ((counts - expected) ** 2 / expected).sum()
    assert chi_square < 16.3  # 3 degrees of freedom, p = 0.001


def test_a_draw_depends_on_its_generator_alone():
    config = SamplingConfig(temperature=1.0)

    def draw(seed):
        torch.randn(3)  # the global generator moves, and that does not matter
        return choose(LOGITS.expand(50, 4), config, torch.Generator().manual_seed(seed)).tolist()

    assert draw(1) == draw(1)
    assert draw(1) != draw(2)
    assert len(set(draw(1))) > 1


def test_bfloat16_logits_are_filtered_in_float32():
    probabilities = next_token_probabilities(LOGITS.bfloat16(), SamplingConfig(temperature=0.7))
    assert probabilities.dtype == torch.float32
    assert probabilities.sum().item() == pytest.approx(1, abs=1e-6)
