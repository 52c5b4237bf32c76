"""Policy gradients on policies that are small enough to enumerate."""

import itertools
import math

import pytest
import torch

from gpt.config import UsageError
from gpt.training.policy import ADVANTAGES, advantages, kl_estimate, policy_loss

REWARDS = {(0, 0): 0.3, (0, 1): -1.0, (1, 0): 2.0, (1, 1): 0.5}
"""Of the texts of two tokens, of two kinds each."""


def new_policy():
    """The logits of the first token ``[2]``, and of the second after each first one ``[2, 2]``."""
    torch.manual_seed(0)
    first, second = torch.randn(2, dtype=torch.float64), torch.randn(2, 2, dtype=torch.float64)
    return [first.requires_grad_(), second.requires_grad_()]


def logprobs_of(policy, texts):
    """Those of the two tokens of each text, ``[N, 2]``."""
    first, second = policy
    texts = torch.tensor(texts)
    one = first.log_softmax(-1)[texts[:, 0]]
    two = second.log_softmax(-1)[texts[:, 0], texts[:, 1]]
    return torch.stack([one, two], dim=1)


def gradient(loss, policy):
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss, policy)])


def exact_gradient(policy):
    """That of the negative mean reward."""
    texts = list(REWARDS)
    rewards = torch.tensor([REWARDS[t] for t in texts], dtype=torch.float64)
    probabilities = logprobs_of(policy, texts).sum(1).exp()
    return -gradient((probabilities * rewards).sum(), policy)


def loss_of(policy, groups, baseline="leave_one_out", **options):
    """The loss of each text of groups ``[N][K]`` of texts, ``[N, K]``."""
    texts = [text for group in groups for text in group]
    rewards = torch.tensor([REWARDS[t] for t in texts], dtype=torch.float64)
    gains = advantages(rewards.view(len(groups), -1), baseline).flatten()
    logprobs = logprobs_of(policy, texts)
    counted = torch.ones_like(logprobs, dtype=torch.bool)
    return policy_loss(logprobs, counted, gains, **options).view(len(groups), -1)


def expected_gradient(policy, k, baseline):
    """The expectation over all groups of ``k`` texts, by enumeration."""
    groups = list(itertools.product(REWARDS, repeat=k))
    chances = torch.stack(
        [logprobs_of(policy, list(group)).sum().exp().detach() for group in groups]
    )
    assert chances.sum().item() == pytest.approx(1)
    losses = loss_of(policy, groups, baseline).mean(1)
    return gradient((chances * losses).sum(), policy)


@pytest.mark.parametrize(
    ("baseline", "k"), [("none", 1), ("none", 2), ("leave_one_out", 2), ("leave_one_out", 3)]
)
def test_the_expected_gradient_is_exactly_that_of_the_mean_reward(baseline, k):
    policy = new_policy()
    torch.testing.assert_close(expected_gradient(policy, k, baseline), exact_gradient(policy))


def test_a_baseline_that_includes_the_text_itself_makes_the_gradient_too_small(monkeypatch):
    policy = new_policy()
    monkeypatch.setitem(ADVANTAGES, "group", lambda rewards: rewards - rewards.mean(1)[:, None])
    torch.testing.assert_close(expected_gradient(policy, 2, "group"), exact_gradient(policy) / 2)


def test_the_gradient_of_samples_is_the_exact_one_within_their_error():
    policy, n = new_policy(), 20_000
    texts = list(REWARDS)
    chances = logprobs_of(policy, texts).sum(1).exp().detach()
    drawn = torch.multinomial(chances, 2 * n, replacement=True, generator=torch.manual_seed(1))
    numbers, counts = drawn.view(n, 2).unique(dim=0, return_counts=True)
    each = torch.stack(
        [gradient(loss_of(policy, [[texts[i] for i in pair]]).mean(), policy) for pair in numbers]
    )
    shares = (counts / n)[:, None]
    mean = (shares * each).sum(0)
    error = ((shares * (each - mean) ** 2).sum(0) / n).sqrt()
    assert ((mean - exact_gradient(policy)).abs() < 4 * error).all()
    assert (4 * error < 0.2 * exact_gradient(policy).abs().max()).all()


def test_the_leave_one_out_baseline_lowers_the_variance(monkeypatch):
    policy, groups = new_policy(), list(itertools.product(REWARDS, repeat=2))
    for text in REWARDS:
        monkeypatch.setitem(REWARDS, text, REWARDS[text] + 5)  # high for every text
    variance = {}
    for baseline in ("none", "leave_one_out"):
        variance[baseline] = 0.0
        for group in groups:
            chance = logprobs_of(policy, list(group)).sum().exp().item()
            slope = gradient(loss_of(policy, [group], baseline).mean(), policy)
            variance[baseline] += chance * (slope**2).sum().item()
    assert variance["leave_one_out"] < variance["none"] / 5


def test_the_k3_estimate_is_unbiased_and_never_negative():
    policy, texts = new_policy(), list(REWARDS)
    reference = [part.detach() + 0.5 * part.detach() ** 2 for part in policy]
    logprobs, at_start = logprobs_of(policy, texts), logprobs_of(reference, texts)
    chances = logprobs.sum(1).exp()
    estimates = kl_estimate(logprobs, at_start)
    exact = (chances * (logprobs - at_start).sum(1)).sum()
    # The sum over tokens of per-token divergences, each in expectation over what is drawn there.
    assert (chances[:, None] * estimates).sum().item() == pytest.approx(exact.item())
    assert (estimates >= 0).all()
    assert kl_estimate(logprobs, logprobs).abs().max() == 0


def test_the_gradient_of_the_k3_term_is_that_of_the_divergence_of_the_reference():
    policy = new_policy()
    first = policy[0].log_softmax(-1)
    before = policy[0].detach().add(torch.tensor([0.7, -0.4])).log_softmax(-1)
    estimates = kl_estimate(first, before)
    found = torch.autograd.grad((first.exp().detach() * estimates).sum(), policy[0])[0]
    first = policy[0].log_softmax(-1)
    wanted = torch.autograd.grad((before.exp() * (before - first)).sum(), policy[0])[0]
    torch.testing.assert_close(found, wanted)


def test_a_clipped_ratio_has_no_gradient_where_the_gain_would_grow():
    gains = torch.tensor([1.0, 1.0, -1.0, -1.0])
    ratios = torch.tensor([1.5, 0.5, 1.5, 0.5])  # GRPO's equation 3, by hand with clip 0.2
    logprobs = ratios.log()[:, None].requires_grad_()
    losses = policy_loss(
        logprobs, torch.ones(4, 1, dtype=torch.bool), gains, old=torch.zeros(4, 1), clip=0.2
    )
    assert losses.tolist() == pytest.approx([-1.2, -0.5, 1.5, 0.8])
    [slope] = torch.autograd.grad(losses.sum(), logprobs)
    assert slope.flatten().tolist() == pytest.approx([0.0, -0.5, 1.5, 0.0])


def test_with_the_same_policy_the_clipped_loss_has_the_plain_gradient():
    policy = new_policy()
    groups = [[(0, 0), (1, 0)], [(1, 1), (0, 1)]]
    old = logprobs_of(policy, [t for g in groups for t in g]).detach()
    plain = gradient(loss_of(policy, groups).sum(), policy)
    clipped = gradient(loss_of(policy, groups, old=old, clip=0.2).sum(), policy)
    torch.testing.assert_close(clipped, plain)


def test_a_loss_counts_the_texts_tokens_alone_and_may_be_divided_by_their_number():
    logprobs = torch.tensor([[-1.0, -2.0, -3.0], [-1.0, -2.0, 5.0]], requires_grad=True)
    counted = torch.tensor([[True, True, True], [False, True, False]])
    for by_length, wanted in ((False, [[2.0] * 3, [0, 2.0, 0]]), (True, [[2 / 3] * 3, [0, 2, 0]])):
        losses = policy_loss(logprobs, counted, torch.tensor([-2.0, -2.0]), by_length=by_length)
        [slope] = torch.autograd.grad(losses.sum(), logprobs)
        torch.testing.assert_close(slope, torch.tensor(wanted))


def test_the_advantages_of_a_group_have_its_deviation_as_their_unit():
    made = advantages(torch.tensor([[1.0, 2.0, 3.0], [4.0, 4.0, 4.0]]), "group")
    torch.testing.assert_close(made[0], torch.tensor([-1.0, 0.0, 1.0]) / 1.0001)
    assert made[1].abs().max() == 0


def test_a_reward_that_is_not_finite_is_refused():
    with pytest.raises(UsageError, match="a reward is not finite"):
        advantages(torch.tensor([[1.0, math.nan]]), "leave_one_out")
