from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from gpt.model import head
from gpt.model.gpt import GPT
from gpt.training.loss import summed_loss

BATCH = torch.randint(61, (2, 3, 15), generator=torch.Generator().manual_seed(0))


def gradients(model, objective):
    tokens, targets = BATCH
    loss = objective(model(tokens), targets)
    loss.backward()
    found = [loss.detach(), *(p.grad for p in model.parameters())]
    model.zero_grad(set_to_none=True)
    return found


def cross_entropy(logits, targets):
    return F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), reduction="sum")


@pytest.mark.parametrize("objective", [summed_loss, cross_entropy])
@pytest.mark.parametrize("autocast", [False, True])
def test_columns_that_nobody_sees_change_no_gradient(objective, autocast, tiny_model, monkeypatch):
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        expected = gradients(tiny_model, objective)
        monkeypatch.setattr(head, "_is_faster", lambda weight, x: True)
        logits = tiny_model(BATCH[0])
        assert logits.shape == (3, 15, 61)
        assert logits.stride(1) == 64
        for got, wanted in zip(gradients(tiny_model, objective), expected, strict=True):
            torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5)


def test_a_gradient_in_the_logits_memory_is_not_copied(tiny_model, monkeypatch):
    monkeypatch.setattr(head, "_is_faster", lambda weight, x: True)
    monkeypatch.setattr(F, "pad", None)
    gradients(tiny_model, summed_loss)
    with pytest.raises(TypeError):
        gradients(tiny_model, cross_entropy)


def test_few_rows_a_cpu_and_a_fitting_vocabulary_need_no_more_columns():
    def is_faster(vocab_size, rows, device="cuda"):
        weight, x = torch.empty(vocab_size, 8, device="meta"), torch.empty(rows, 8, device="meta")
        on = SimpleNamespace(device=torch.device(device), shape=x.shape, numel=x.numel)
        return head._is_faster(weight, on)

    assert is_faster(50257, 2048)
    assert not is_faster(50257, 2048, "cpu")
    assert not is_faster(50304, 2048)
    assert not is_faster(50257, 32)


def test_a_head_of_another_class_is_called(tiny_config, monkeypatch):
    class Other(nn.Linear):
        def forward(self, x):
            return super().forward(x) + 1

    monkeypatch.setattr(head, "_is_faster", lambda weight, x: True)
    model = GPT(tiny_config).eval()
    plain = model(BATCH[0])
    model.head.__class__ = Other
    torch.testing.assert_close(model(BATCH[0]), plain + 1)
