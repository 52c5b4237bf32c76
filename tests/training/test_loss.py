import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from gpt.config import ModelConfig
from gpt.data.batches import IGNORED
from gpt.model.gpt import GPT
from gpt.training import loss
from gpt.training.loss import loss_of_features, losses_of_features, summed_loss


def made(dtype=torch.float32):
    logits = torch.randn(3, 7, 61, dtype=dtype, requires_grad=True)
    targets = torch.randint(61, (3, 7))
    targets[0, 1:5] = targets[2] = IGNORED
    return logits, targets


@pytest.mark.parametrize("rows", [1, 4, 21, 100])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_loss_and_gradient_equal_cross_entropy_for_every_chunk_size(rows, dtype, monkeypatch):
    monkeypatch.setitem(loss.CHUNK, "cpu", rows * 61)
    logits, targets = made(dtype)
    mine = summed_loss(logits * 1, targets)
    (gradient,) = torch.autograd.grad(mine * 3, logits)
    theirs = F.cross_entropy(
        logits.float().flatten(0, 1), targets.flatten(), reduction="sum", ignore_index=IGNORED
    )
    (expected,) = torch.autograd.grad(theirs * 3, logits)
    assert mine.dtype == torch.float32
    torch.testing.assert_close(mine, theirs)
    torch.testing.assert_close(gradient, expected)


def test_a_batch_with_only_ignored_targets_has_no_loss_and_no_gradient():
    logits, targets = made()
    total = summed_loss(logits * 1, torch.full_like(targets, IGNORED))
    total.backward()
    assert total == 0
    assert not logits.grad.any()


class Largest(TorchDispatchMode):
    """The most elements in a tensor that an operation allocates."""

    def __init__(self):
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        out = function(*arguments, **(keywords or {}))
        given = {a.untyped_storage().data_ptr() for a in arguments if isinstance(a, torch.Tensor)}
        for made in out if isinstance(out, tuple | list) else (out,):
            if isinstance(made, torch.Tensor) and made.untyped_storage().data_ptr() not in given:
                self.elements = max(self.elements, made.numel())
        return out


def test_the_loss_makes_no_second_tensor_of_all_logits(monkeypatch):
    monkeypatch.setitem(loss.CHUNK, "cpu", 4 * 61)
    logits, targets = made(torch.bfloat16)
    output = logits.detach().requires_grad_()
    with Largest() as largest:
        summed_loss(output, targets).backward()
    assert 0 < largest.elements <= 4 * 61


def test_overwriting_logits_that_another_backward_pass_needs_is_an_error():
    logits, targets = made()
    capped = torch.tanh(logits)  # whose derivative is computed from its output
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        summed_loss(capped, targets).backward()


HEADS = {
    "plain": {},
    "capped": {"logit_softcap": 3.0},
    "with a pointer": {"copy": "pointer"},
}


def features_of(**fields):
    torch.manual_seed(0)
    model = GPT(
        ModelConfig(
            **{"vocab_size": 61, "context_length": 8, "n_layer": 1, "n_head": 2, "n_embd": 16}
            | fields
        )
    )
    tokens, (_, targets) = torch.randint(61, (3, 7)), made()
    return model, model.features(tokens).detach().requires_grad_(), targets


@pytest.fixture
def few_rows(monkeypatch):
    """Two positions of the small heads at a time, or four if they learn."""
    monkeypatch.setattr(loss, "ROWS", 2)
    monkeypatch.setattr(loss, "MIN_POSITIONS_PER_FEATURE", 0)
    monkeypatch.setattr(loss, "MULTIPLE", 4)
    monkeypatch.setitem(loss.LOGITS, "cpu", 4 * 61)


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("head", HEADS)
def test_the_loss_of_features_is_that_of_their_logits(head, frozen, few_rows):
    model, features, targets = features_of(**HEADS[head])
    wanted = summed_loss(model.logits(features), targets)
    weight = model.head.weight
    slope, of_head = torch.autograd.grad(3 * wanted, [features, weight])
    model.head.weight.requires_grad_(not frozen)
    rows = []
    model.head.register_forward_hook(lambda head, given, out: rows.append(out.shape[-2]))
    own = loss_of_features(model, features, targets=targets)
    (3 * own).backward()
    torch.testing.assert_close(own, wanted)
    torch.testing.assert_close(features.grad, slope)
    assert frozen == (weight.grad is None)
    if not frozen:
        torch.testing.assert_close(weight.grad, of_head)
    assert (targets != IGNORED).sum() <= sum(rows) < targets.numel()


@pytest.mark.parametrize("frozen", [False, True])
def test_the_logits_of_a_whole_batch_are_never_made(frozen, few_rows):
    model, features, targets = features_of(n_embd=4)
    model.requires_grad_(not frozen)
    n = int((targets != IGNORED).sum()) * 61
    with Largest() as largest:
        loss_of_features(model, features, targets=targets).backward()
    assert largest.elements <= model.head.weight.numel() < n


def test_few_positions_of_a_head_that_learns_are_computed_at_once(monkeypatch):
    """Two gradients of its matrix would take more memory than the logits."""
    monkeypatch.setitem(loss.LOGITS, "cpu", 61)
    model, features, targets = features_of()
    rows = []
    model.head.register_forward_hook(lambda head, given, out: rows.append(out.shape[-2]))
    monkeypatch.setattr(loss, "MULTIPLE", 4)
    loss_of_features(model, features, targets=targets)
    assert (targets != IGNORED).sum() == 10
    assert rows == [12]


def test_the_gradients_of_a_chunked_head_are_summed_in_float32(few_rows):
    """In bfloat16, 256 + 1 is 256."""
    model, features, _ = features_of()
    model.to(torch.bfloat16)
    many = features[:1, :1].detach().bfloat16().expand(1, 2000, -1)
    loss_of_features(model, many, targets=torch.full((1, 2000), 5)).backward()
    found, model.head.weight.grad = model.head.weight.grad, None
    loss_of_features(model, many[:, :2], targets=torch.full((1, 2), 5)).backward()
    torch.testing.assert_close(found, 1000 * model.head.weight.grad)


@pytest.mark.parametrize("learns", [set(), {"head"}, {"features"}, {"features", "head"}])
def test_only_the_gradients_that_are_wanted_are_computed(learns, few_rows):
    model, features, targets = features_of()
    features = features.requires_grad_("features" in learns)
    model.head.requires_grad_("head" in learns)
    asked = set()
    model.head.register_forward_hook(
        lambda head, given, out: asked.add((given[0].requires_grad, out.requires_grad))
    )
    total = loss_of_features(model, features, targets=targets)
    assert asked == {("features" in learns, bool(learns))}
    assert total.requires_grad == bool(learns)


def test_an_evaluation_of_a_chunked_head_computes_no_gradients(few_rows):
    model, features, targets = features_of()
    asked = set()
    model.head.register_forward_hook(lambda head, given, out: asked.add(out.requires_grad))
    with torch.no_grad():
        loss_of_features(model, features.detach(), targets=targets)
    assert asked == {False}


@pytest.mark.parametrize("frozen", [False, True])
def test_a_second_backward_pass_is_an_error(frozen, few_rows):
    model, features, targets = features_of()
    model.requires_grad_(not frozen)
    total = loss_of_features(model, features, targets=targets)
    total.backward(retain_graph=True)
    with pytest.raises((TypeError, AttributeError)):
        total.backward()


def test_in_float16_the_scale_of_the_loss_reaches_the_gradient_of_the_logits(few_rows):
    """Each of them is too small for float16 without it."""
    model, features, _ = features_of()
    with torch.no_grad():
        model.head.weight.zero_()
        model.head.weight[5] = 20 * features[0, 0] / features[0, 0].square().sum()
    features = features[:1, :1].expand(1, 9, -1)
    with torch.autocast("cpu", torch.float16):
        total = loss_of_features(model, features, targets=torch.full((1, 9), 5))
    (2.0**14 * total).backward()
    assert model.head.weight.grad[6].any()


def test_a_frozen_head_has_no_loss_where_nothing_counts():
    model, features, targets = features_of()
    model.requires_grad_(False)
    loss_of_features(model, features, targets=torch.full_like(targets, IGNORED)).backward()
    assert not features.grad.any()


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("head", ["plain", "capped"])
def test_each_loss_is_that_of_the_scaled_logits_of_the_tokenizers_tokens(head, frozen, monkeypatch):
    monkeypatch.setattr(loss, "ROWS", 4)
    model, features, _ = features_of(**HEADS[head])
    model.requires_grad_(not frozen)
    flat, targets = features.flatten(0, 1), torch.randint(50, (21,))
    logits = model.logits(flat)[:, :50] / 0.7
    wanted = -logits.log_softmax(-1).gather(1, targets[:, None])[:, 0]
    weights = torch.randn(21)
    [slope] = torch.autograd.grad((wanted * weights).sum(), features)
    own = losses_of_features(model, features.flatten(0, 1), targets, temperature=0.7, vocab_size=50)
    torch.testing.assert_close(own, wanted)
    [found] = torch.autograd.grad((own * weights).sum(), features)
    torch.testing.assert_close(found, slope)


def test_under_an_adapter_the_losses_of_texts_never_make_the_logits_of_a_whole_batch(monkeypatch):
    monkeypatch.setattr(loss, "ROWS", 2)
    model, features, targets = features_of()
    model.requires_grad_(False)
    with Largest() as largest:
        losses_of_features(model, features.flatten(0, 1), targets.flatten()).sum().backward()
    assert largest.elements <= features.numel() < targets.numel() * 61
