import math

import pytest
import torch

from gpt.model.attention import attend, causal_mask


def plain_attention(q, k, v):
    """Causal attention by the formula, the last query at the last key; grouped heads repeated."""
    group = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    scores = torch.einsum("bhid,bhjd->bhij", q, k) / math.sqrt(q.shape[-1])
    n_query, n_key = scores.shape[-2:]
    for i in range(n_query):
        scores[..., i, n_key - n_query + i + 1 :] = -torch.inf
    return torch.einsum("bhij,bhjd->bhid", scores.softmax(-1), v)


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize(
    ("n_query", "n_key"), [(7, 7), (1, 1), (1, 9), (3, 9), (9, 9), (2, 3)], ids=str
)
def test_each_path_of_attention_is_the_plain_formula(n_query, n_key, kv_heads):
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(2, 4, n_query, 8, generator=generator, dtype=torch.float64)
    k, v = torch.randn(2, 2, kv_heads, n_key, 8, generator=generator, dtype=torch.float64)
    mask = causal_mask(n_query, n_key) if n_query not in (1, n_key) else None
    torch.testing.assert_close(attend(q, k, v, mask=mask), plain_attention(q, k, v))


def test_the_mask_puts_the_last_query_at_the_last_key():
    expected = [[True, True, True, False], [True, True, True, True]]
    assert causal_mask(2, 4).tolist() == expected


def test_fewer_queries_than_keys_without_a_mask_is_a_mistake_of_the_program():
    q, k = torch.zeros(1, 1, 2, 4), torch.zeros(1, 1, 3, 4)
    with pytest.raises(AssertionError, match="mask"):
        attend(q, k, k)
