import math

import pytest
import torch
from torch.nn import functional as F

from gpt.model.dropout import Dropout, dropout

N = 4_000_000


@pytest.mark.parametrize("p", [0.1, 0.2, 0.5, 0.9])
def test_elements_are_dropped_with_probability_p_and_the_others_scaled(p):
    torch.manual_seed(0)
    y = dropout(torch.ones(N), p)
    rounded = round(p * 2**16) / 2**16
    kept = y != 0
    deviation = math.sqrt(rounded * (1 - rounded) / N)
    assert abs(kept.double().mean().item() - (1 - rounded)) < 4 * deviation
    for lane in range(4):  # four elements share one draw of the generator
        share = kept[lane::4].double().mean().item()
        assert abs(share - (1 - rounded)) < 4 * 2 * deviation
    assert y[kept].unique().tolist() == pytest.approx([1 / (1 - rounded)])


def test_neighbours_are_dropped_independently():
    torch.manual_seed(0)
    centred = (dropout(torch.ones(N), 0.3) != 0).double() - 0.7
    for lag in (1, 2, 3, 4):
        correlation = (centred[:-lag] * centred[lag:]).mean().item() / 0.21
        assert abs(correlation) < 4 / math.sqrt(N)


def test_the_gradient_is_the_mask():
    x = torch.ones(3, 7, dtype=torch.float64, requires_grad=True)
    y = dropout(x, 0.4)
    y.sum().backward()
    assert torch.equal(x.grad, y.detach())


def test_the_seed_decides():
    def draw(seed):
        torch.manual_seed(seed)
        return dropout(torch.ones(100), 0.5)

    assert torch.equal(draw(1), draw(1))
    assert not torch.equal(draw(1), draw(2))


@pytest.mark.parametrize("p", [1 - 2**-20, 1 - 2**-16])
def test_a_probability_next_to_one_divides_by_nothing(p):
    assert dropout(torch.ones(1000), p).isfinite().all()


def test_the_input_is_left_alone_and_zero_is_no_dropout():
    x = torch.ones(1000)
    dropout(x, 0.5)
    assert (x == 1).all()
    assert dropout(x, 0.0) is x
    assert Dropout(0.5).eval()(x) is x


def test_off_the_cpu_it_is_torchs_own(monkeypatch):
    called = []
    monkeypatch.setattr(F, "dropout", lambda x, p: called.append(p) or x)
    Dropout(0.25)(torch.ones(2, device="meta"))
    assert called == [0.25]
