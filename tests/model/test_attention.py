import math
import threading

import pytest
import torch
import torch.nn.functional as F

from gpt.model import attend as attention
from gpt.model.attend import attend
from gpt.model.masks import causal


def plain_attention(q, k, v, weights=1):
    """Causal attention by the formula, the last query at the last key; grouped heads repeated.

    ``weights`` multiply the probabilities, as dropout does.
    """
    group = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    scores = torch.einsum("bhid,bhjd->bhij", q, k) / math.sqrt(q.shape[-1])
    n_query, n_key = scores.shape[-2:]
    for i in range(n_query):
        scores[..., i, n_key - n_query + i + 1 :] = -torch.inf
    return torch.einsum("bhij,bhjd->bhid", scores.softmax(-1) * weights, v)


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize(
    ("n_query", "n_key"), [(7, 7), (1, 1), (1, 9), (3, 9), (9, 9), (2, 3)], ids=str
)
def test_each_path_of_attention_is_the_plain_formula(n_query, n_key, kv_heads):
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(2, 4, n_query, 8, generator=generator, dtype=torch.float64)
    k, v = torch.randn(2, 2, kv_heads, n_key, 8, generator=generator, dtype=torch.float64)
    at = torch.arange(n_key - n_query, n_key)[:, None]
    mask = causal(at, torch.arange(n_key)) if n_query not in (1, n_key) else None
    torch.testing.assert_close(attend(q, k, v, mask=mask), plain_attention(q, k, v))


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("added", [False, True], ids=["true or false", "added"])
def test_one_query_of_grouped_heads_sees_what_its_rows_mask_allows(added, kv_heads, monkeypatch):
    heads = []
    fused = F.scaled_dot_product_attention

    def counted(q, k, v, **options):
        heads.append((q.shape[1], options["enable_gqa"]))
        return fused(q, k, v, **options)

    monkeypatch.setattr(attention.F, "scaled_dot_product_attention", counted)
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(3, 4, 1, 8, generator=generator, dtype=torch.float64)
    k, v = torch.randn(2, 3, kv_heads, 9, 8, generator=generator, dtype=torch.float64)
    lengths = torch.tensor([4, 9, 1])
    mask = (torch.arange(9) < lengths[:, None])[:, None, None]  # B, 1, 1, S
    if added:
        mask = torch.zeros(mask.shape, dtype=q.dtype).masked_fill(~mask, -torch.inf)
    got = attend(q, k, v, mask=mask)
    for row, n in enumerate(lengths):
        one = slice(row, row + 1)
        expected = plain_attention(q[one], k[one, :, :n], v[one, :, :n])
        torch.testing.assert_close(got[one], expected)
    assert heads == [(kv_heads, False)]  # what takes no groups can take it


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize(
    ("dtype", "dropout", "tolerance"),
    [(torch.bfloat16, 0.0, 0.03), (torch.float64, 0.4, 1e-12), (torch.float32, 0.4, 1e-5)],
    ids=str,
)
def test_attention_in_training_has_the_plain_formulas_value_and_gradients(
    dtype, dropout, tolerance, kv_heads, monkeypatch
):
    generator = torch.Generator().manual_seed(0)
    keep = torch.rand(2, 4, 7, 7, generator=generator, dtype=torch.float64) >= dropout
    keep = keep.double()
    monkeypatch.setattr("gpt.model.attend.drop", lambda x, p: x * keep.to(x) / (1 - p))
    monkeypatch.setattr("gpt.model.attend.F", None)  # the fused kernel takes no part in it
    if dropout:  # the kernels draw their own, see tests/test_training_kernels.py
        monkeypatch.setattr("gpt.training_kernels.library", lambda: None)
    exact = [
        torch.randn(2, heads, 7, 8, generator=generator, dtype=torch.float64)
        for heads in (4, kv_heads, kv_heads, 4)
    ]

    def run(attention, dtype):
        q, k, v = (x.to(dtype).requires_grad_() for x in exact[:3])
        y = attention(q, k, v)
        y.backward(exact[3].to(y.dtype))
        return [x.double() for x in (y.detach(), q.grad, k.grad, v.grad)]

    def plainly(q, k, v):
        weights = keep / (1 - dropout)
        return plain_attention(q, k, v, weights)

    got = run(lambda q, k, v: attend(q, k, v, dropout=dropout), dtype)
    for mine, expected in zip(got, run(plainly, torch.float64), strict=True):
        assert (mine - expected).norm() <= tolerance * expected.norm()


def test_evaluation_and_decoding_take_the_fused_kernel(monkeypatch):
    monkeypatch.setattr("gpt.model.attend._plain", None)
    q = torch.zeros(1, 2, 5, 8, dtype=torch.bfloat16)
    assert attend(q, q, q).shape == q.shape  # the plain formula is gone: it was not asked for
    assert attend(q[:, :, :1], q, q).shape == (1, 2, 1, 8)


def test_the_causal_rule_hides_what_comes_after_a_position():
    expected = [[True, True, True, False], [True, True, True, True]]
    assert causal(torch.tensor([[2], [3]]), torch.arange(4)).tolist() == expected


@pytest.mark.parametrize("training", [False, True])
def test_the_scale_may_be_given(training):
    q, k, v = torch.randn(3, 1, 2, 5, 8, generator=torch.Generator().manual_seed(0)).bfloat16()
    q.requires_grad_(training)
    got = attend(q, k, v, scale=0.1)
    expected = plain_attention((q * 0.1 * math.sqrt(8)).double(), k.double(), v.double())
    torch.testing.assert_close(got.double(), expected, rtol=0, atol=0.03)


def test_fewer_queries_than_keys_without_a_mask_is_a_mistake_of_the_program():
    q, k = torch.zeros(1, 1, 2, 4), torch.zeros(1, 1, 3, 4)
    with pytest.raises(AssertionError, match="mask"):
        attend(q, k, k)


@pytest.fixture
def cudnn():
    """Whether CUDA's attention may be cuDNN's; afterwards as it was."""
    before = torch.backends.cuda.cudnn_sdp_enabled()
    yield torch.backends.cuda.cudnn_sdp_enabled
    torch.backends.cuda.enable_cudnn_sdp(before)


class OnCuda(torch.Tensor):
    """A tensor that says that it is on CUDA."""

    device = torch.device("cuda")


@pytest.mark.parametrize("before", [True, False])
def test_attention_on_cuda_is_never_cudnns_outside_of_training(before, cudnn):
    torch.backends.cuda.enable_cudnn_sdp(before)
    q = torch.zeros(1, 1, 1, 4)
    on_cuda = q.as_subclass(OnCuda)
    for tensor, training, inside in (
        (on_cuda, False, False),
        (on_cuda, True, before),
        (q, False, before),
    ):
        with attention._kernels(tensor, training):
            assert cudnn() == inside
        assert cudnn() == before


def test_threads_that_generate_keep_cudnn_out_until_the_last_one_has_left(cudnn):
    torch.backends.cuda.enable_cudnn_sdp(True)
    entered, leave = threading.Barrier(3), [threading.Event() for _ in range(2)]

    def generate(number):
        with attention._without_cudnn:
            entered.wait()
            leave[number].wait()

    threads = [threading.Thread(target=generate, args=(n,)) for n in range(2)]
    for thread in threads:
        thread.start()
    entered.wait()
    seen = [cudnn()]
    for event, thread in zip(leave, threads, strict=True):
        event.set()
        thread.join()
        seen.append(cudnn())
    assert seen == [False, False, True]


def test_the_chosen_kernels_are_part_of_a_compiled_graph():
    def attention_of(q):
        with attention.sdpa_kernel(attention.INFERENCE):
            return F.scaled_dot_product_attention(q, q, q)

    q = torch.randn(1, 2, 5, 8, generator=torch.Generator().manual_seed(0))
    compiled = torch.compile(attention_of, backend="eager", fullgraph=True)(q)
    torch._dynamo.reset()
    torch.testing.assert_close(compiled, attention_of(q))


def test_a_model_asks_for_the_kernels_of_its_mode(monkeypatch, tiny_model):
    asked = []
    monkeypatch.setattr(
        "gpt.model.attend._kernels",
        lambda q, training: asked.append(training) or torch.no_grad(),
    )
    tokens = torch.zeros(1, 4, dtype=torch.int64)
    tiny_model(tokens)
    tiny_model.train()(tokens)
    assert asked == [False] * 2 + [True] * 2
