"""Weight decay that agrees with the update."""

import pytest
import torch

from gpt.training.decay import CautiousAdamW
from gpt.training.muon import Muon, orthogonalise

RATE, DECAY = 0.05, 0.4


def steps(n=5):
    """Weights and the gradients of some steps."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(6, 8, generator=generator)
    return weight, [torch.randn(6, 8, generator=generator) for _ in range(n)]


def test_cautious_adamw_is_its_formula():
    weight, gradients = steps()
    parameter = torch.nn.Parameter(weight.clone())
    options = {"lr": RATE, "betas": (0.8, 0.9), "eps": 1e-8, "weight_decay": DECAY}
    optimizer = CautiousAdamW([parameter], **options, fused=True)
    mean, square, expected = torch.zeros(6, 8), torch.zeros(6, 8), weight.clone()
    for n, gradient in enumerate(gradients, 1):
        parameter.grad = gradient.clone()
        optimizer.step()
        mean = 0.8 * mean + 0.2 * gradient
        square = 0.9 * square + 0.1 * gradient**2
        update = (mean / (1 - 0.8**n)) / ((square / (1 - 0.9**n)).sqrt() + 1e-8)
        agrees = (update * expected > 0).float()
        assert 0.2 < agrees.mean() < 0.8
        expected = expected - RATE * (update + DECAY * agrees * expected)
        torch.testing.assert_close(parameter.data, expected, rtol=1e-4, atol=1e-5)
    assert optimizer.param_groups[0]["weight_decay"] == DECAY


@pytest.mark.parametrize("cautious", [False, True])
def test_muon_decays_where_the_update_agrees(cautious):
    weight, gradients = steps()
    parameter = torch.nn.Parameter(weight.clone())
    optimizer = Muon([parameter], lr=RATE, weight_decay=DECAY, cautious=cautious)
    momentum, expected = torch.zeros(6, 8), weight.clone()
    for gradient in gradients:
        parameter.grad = gradient.clone()
        optimizer.step()
        momentum = 0.95 * momentum + 0.05 * gradient
        [update] = orthogonalise((0.05 * gradient + 0.95 * momentum)[None])
        agrees = (update * expected > 0).float() if cautious else 1.0
        expected = expected - RATE * (update + DECAY * agrees * expected)
        torch.testing.assert_close(parameter.data, expected)
