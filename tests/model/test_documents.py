"""Claims about rows that hold several documents."""

import pytest
import torch
import torch.nn.functional as F

from gpt.model import documents, flex
from gpt.model.documents import documents_of
from gpt.model.masks import causal, window
from gpt.model.moe import auxiliary_loss
from tests.conftest import make_model
from tests.model.family import CONTEXT, ROWS, config_of, id_of

V = 61
SIZES = [[5, 1, 16, 2], [24], [13, 11]]
"""The lengths of the documents of each row: one fills a row, and one is a single token."""


def packed(sizes):
    """Tokens ``[B, T]``, and marks that repeat from document to document but never twice in a
    row.
    """
    tokens = torch.randint(V, (len(sizes), CONTEXT), generator=torch.Generator().manual_seed(0))
    marks = [[n % 2 for n, size in enumerate(row) for _ in range(size)] for row in sizes]
    return tokens, torch.tensor(marks)


def gradients(model, loss):
    model.zero_grad()
    loss.backward()
    auxiliary_loss(model)  # takes what the experts have kept
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


WAYS = {"one by one": 1, "with a mask": 1 << 62}
"""The scores that a document costs, for either way to be chosen."""


def over(rows):
    return pytest.mark.parametrize("row", rows, ids=map(id_of, rows))


def check_packed(row, monkeypatch):
    model = make_model(config_of(row), seed=1, dtype=torch.float64).train()
    tokens, marks = packed(SIZES)
    targets = torch.arange(tokens.numel()) % V
    parts = [
        part
        for row_of_tokens, sizes in zip(tokens, SIZES, strict=True)
        for part in row_of_tokens.split(sizes)
    ]
    alone = torch.cat([model(part[None])[0] for part in parts])
    expected = gradients(model, F.cross_entropy(alone, targets))
    monkeypatch.setattr(documents, "MULTIPLE", 4)
    monkeypatch.setattr(documents, "SHORT_MULTIPLE", 2)
    for way, scores in WAYS.items():
        monkeypatch.setattr(documents, "SCORES_A_DOCUMENT", scores)
        assert (documents_of(marks, 4).lengths is None) == (way == "with a mask")
        together = model(tokens, documents=marks).flatten(0, 1)
        torch.testing.assert_close(together, alone, rtol=0, atol=1e-8, msg=way)
        got = gradients(model, F.cross_entropy(together, targets))
        assert got.keys() == expected.keys()
        for name, gradient in expected.items():
            close = torch.allclose(got[name], gradient, rtol=1e-7, atol=1e-8)
            assert close, (way, name)


@over(ROWS[::3])
def test_packed_documents_are_the_same_as_one_by_one(row, monkeypatch):
    check_packed(row, monkeypatch)


@pytest.mark.slow
@over([row for number, row in enumerate(ROWS) if number % 3])
def test_packed_documents_are_the_same_as_one_by_one_in_more_models(row, monkeypatch):
    check_packed(row, monkeypatch)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_packed_documents_train_in_each_dtype(way, dtype, monkeypatch):
    monkeypatch.setattr(documents, "SCORES_A_DOCUMENT", WAYS[way])
    model = make_model(config_of({}, dropout=0.0), seed=1, dtype=torch.float32)
    tokens, marks = packed(SIZES)
    with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        together = model(tokens, documents=marks)
        alone = model(tokens[2:, :13])
    within = {torch.float32: 1e-4, torch.bfloat16: 0.3}[dtype]
    torch.testing.assert_close(together[2:, :13], alone, rtol=0, atol=within)


def test_one_by_one_few_lengths_are_computed(monkeypatch):
    """oneDNN keeps what it has compiled for each."""
    monkeypatch.setattr(documents, "MULTIPLE", 16)
    monkeypatch.setattr(documents, "SCORES_A_DOCUMENT", 1)
    asked, real = set(), documents._padded

    def padded(x, n):
        asked.add(n)
        return real(x, n)

    monkeypatch.setattr(documents, "_padded", padded)
    tokens, marks = packed(SIZES)
    make_model(config_of({}))(tokens, documents=marks)
    assert asked == {8, 16, CONTEXT}


def test_no_token_sees_another_document():
    model = make_model(config_of({}), dtype=torch.float64)
    tokens, marks = packed(SIZES)
    before = model(tokens, documents=marks)
    tokens[0, 5] += 1  # the document of one token
    changed = (model(tokens, documents=marks) != before).any(dim=-1)
    assert changed.nonzero().tolist() == [[0, 5]]


def test_rows_of_one_document_are_computed_as_without_documents():
    model = make_model(config_of({}))
    tokens, _ = packed(SIZES)
    marks = torch.arange(3)[:, None].expand(-1, CONTEXT)
    assert documents_of(marks, 4) is None
    assert torch.equal(model(tokens, documents=marks), model(tokens))


def test_equal_marks_that_are_apart_are_different_documents():
    [numbers], [at] = (getattr(documents_of(MARKS, 1), name) for name in ("number", "at"))
    assert numbers.tolist() == [0, 0, 1, 2, 2, 2, 3]
    assert at.tolist() == [0, 1, 0, 0, 1, 2, 0]


MARKS = torch.tensor([[7, 7, 3, 7, 7, 7, -1]])


@pytest.mark.parametrize("rule", [causal, window(2)])
def test_the_blocks_of_flex_attention_hide_other_documents(rule):
    found = documents_of(MARKS, 1)
    at = torch.arange(7)
    expected = rule(at[:, None], at) & found.same()
    blocks = flex.block_mask_of_documents(rule, found.number)
    got = blocks.mask_mod(torch.tensor(0), torch.tensor(0), at[:, None], at)
    assert torch.equal(got[None], expected)


def test_documents_with_a_cache_are_refused():
    model = make_model(config_of({}))
    tokens, marks = packed(SIZES)
    with pytest.raises(ValueError, match="a cache holds one document in each row"):
        model(tokens, documents=marks, cache=model.new_cache(3))
