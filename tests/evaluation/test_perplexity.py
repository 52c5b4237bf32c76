import dataclasses
import math

import numpy as np
import pytest
import torch

from gpt.config import ModelConfig, UsageError
from gpt.data.corpus import open_corpus
from gpt.data.tokenizer import ByteTokenizer
from gpt.evaluation.perplexity import encode_text, paired_bootstrap, score_text
from gpt.model.surgery import crop_context
from tests.conftest import make_model

CONTEXT = 16


@pytest.fixture(scope="module")
def model():
    return make_model(
        ModelConfig(vocab_size=257, context_length=CONTEXT, n_layer=2, n_head=2, n_embd=32)
    )


def some_ids(n, seed=0):
    return np.random.Generator(np.random.Philox(seed)).integers(0, 256, n).astype(np.uint32)


@torch.inference_mode()
def by_definition(model, ids, stride):
    """Each target's loss, from the first window that holds it."""
    losses = []
    for target in range(1, len(ids)):
        start = max(0, -(-(target - CONTEXT) // stride) * stride)
        tokens = torch.tensor(ids[start:target].astype(np.int64))[None]
        logits = model(tokens)[0, -1].double()
        losses.append(-logits.log_softmax(-1)[int(ids[target])].item())
    return losses


@pytest.mark.parametrize("stride", [1, 5, 8, 16])
@pytest.mark.parametrize("n", [2, 16, 17, 18, 60])
def test_each_token_counts_once_with_its_windows_context(stride, n, model):
    ids = some_ids(n)
    score = score_text(model, ByteTokenizer(), ids, stride=stride, batch_size=3)
    expected = by_definition(model, ids, stride)
    assert score.counts.sum() == n - 1
    assert score.losses.sum() == pytest.approx(sum(expected), rel=1e-5)
    assert score.loss == pytest.approx(np.mean(expected), rel=1e-5)
    assert score.perplexity == pytest.approx(math.exp(np.mean(expected)), rel=1e-4)
    assert score.bits_per_byte == pytest.approx(np.mean(expected) / math.log(2), rel=1e-5)


def test_the_batch_size_does_not_matter(model):
    losses = [
        score_text(model, ByteTokenizer(), some_ids(200), batch_size=size).loss
        for size in (1, 4, 9)
    ]
    assert losses == pytest.approx([losses[0]] * 3, rel=1e-6)


def test_the_standard_error_is_that_of_the_windows(model):
    score = score_text(model, ByteTokenizer(), some_ids(16 * 200 + 1), stride=16)
    per_window = score.losses / score.counts  # windows of equal size: the textbook's formula
    expected = per_window.std(ddof=1) / math.sqrt(len(per_window))
    assert score.standard_error == pytest.approx(expected, rel=1e-9)


def test_a_model_is_not_better_than_itself_and_a_better_one_is(model):
    ids = some_ids(1000)
    score = score_text(model, ByteTokenizer(), ids)
    assert paired_bootstrap(score, score) == (0, 0, 0)
    config = model.config
    calm = make_model(config)
    with torch.no_grad():
        calm.embed.weight.mul_(0.01)  # nearly uniform, and so less wrong on noise
    better = score_text(calm, ByteTokenizer(), ids)
    difference, low, high = paired_bootstrap(score, better)
    assert 0 < low < difference < high
    assert difference == pytest.approx(score.loss - better.loss)
    swapped = paired_bootstrap(better, score)
    assert swapped == pytest.approx((-difference, -high, -low), rel=1e-6)


def test_the_interval_covers_noise_of_its_own_size(model):
    """Two halves of one noise differ by chance: in about 95 of 100 draws the interval has 0."""
    from gpt.evaluation.perplexity import TextScore

    draw = np.random.Generator(np.random.Philox(0))
    counts, inside = np.full(100, 10), 0
    for seed in range(100):
        one, two = (TextScore(draw.normal(20, 3, 100), counts, 1000) for _ in range(2))
        _, low, high = paired_bootstrap(one, two, samples=1000, seed=seed)
        inside += low <= 0 <= high
    assert 87 <= inside <= 100


def test_scores_on_other_windows_are_not_compared(model):
    one = score_text(model, ByteTokenizer(), some_ids(100), stride=4)
    two = score_text(model, ByteTokenizer(), some_ids(100), stride=8)
    with pytest.raises(UsageError, match="not scored on the same windows"):
        paired_bootstrap(one, two)


def test_a_comparison_of_few_windows_is_refused(model):
    score = score_text(model, ByteTokenizer(), some_ids(60))
    with pytest.raises(UsageError, match=r"has \d windows, .* needs at least 10"):
        paired_bootstrap(score, score)


def test_a_model_that_is_as_wrong_as_can_be_has_an_infinite_perplexity():
    from gpt.evaluation.perplexity import TextScore

    score = TextScore(np.array([1e6]), np.array([10]), 10)
    assert score.perplexity == math.inf


@pytest.mark.parametrize("stride", [-1, 17])
def test_a_stride_that_would_skip_tokens_is_refused(stride, model):
    with pytest.raises(UsageError, match=f"stride is {stride}, and must be from 1 to .* .16."):
        score_text(model, ByteTokenizer(), some_ids(100), stride=stride)


@pytest.mark.parametrize("stride", [1, 6, 12])
def test_windows_may_be_shorter_than_the_context(stride, model):
    ids = some_ids(60)
    short = make_model(model.config)
    crop_context(short, 12)
    expected = score_text(short, ByteTokenizer(), ids, stride=stride)
    score = score_text(model, ByteTokenizer(), ids, context=12, stride=stride)
    assert score.losses == pytest.approx(expected.losses, rel=1e-6)
    with pytest.raises(UsageError, match="context_length is 17, .* learned positions for 16 tok"):
        score_text(model, ByteTokenizer(), ids, context=17)


@pytest.mark.parametrize("changes", [{"logit_softcap": 2.0}, {"copy": "pointer"}], ids=str)
def test_the_score_is_of_the_logits_and_not_of_the_heads_matrix(changes, model):
    other = make_model(dataclasses.replace(model.config, **changes))
    ids = some_ids(17)
    score = score_text(other, ByteTokenizer(), ids)
    logprobs = other(torch.from_numpy(ids[None, :-1].astype(np.int64)))[0].log_softmax(-1)
    expected = -logprobs[range(16), ids[1:].tolist()].sum().item()
    assert score.losses.sum() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("position", ["sinusoidal", "rotary", "alibi", "xpos", "none"])
def test_windows_may_be_longer_than_the_context_where_positions_have_no_end(position, model):
    longer = make_model(dataclasses.replace(model.config, position=position))
    ids = some_ids(161)
    score = score_text(longer, ByteTokenizer(), ids, context=40, stride=40)
    logits = longer(torch.from_numpy(ids[:160].astype(np.int64)).view(4, 40)).log_softmax(-1)
    targets = torch.from_numpy(ids[1:].astype(np.int64)).view(4, 40, 1)
    losses = -logits.gather(2, targets)[..., 0].detach().double().numpy()  # [windows, positions]
    assert score.loss == pytest.approx(losses.mean(), rel=1e-5)
    curve = score.curve(4)
    assert [(first, last) for first, last, _ in curve] == [(1, 10), (11, 20), (21, 30), (31, 40)]
    expected = losses.reshape(4, 4, 10).mean(axis=(0, 2))
    assert [loss for *_, loss in curve] == pytest.approx(expected.tolist(), rel=1e-5)


def test_documents_are_joined_by_end_of_text(tmp_path):
    for name in "ab":
        (tmp_path / name).write_text(name * 2)
    ids = encode_text(ByteTokenizer(), open_corpus(str(tmp_path)))
    assert ids.tolist() == [97, 97, 256, 98, 98]
    (tmp_path / "b").unlink()
    (tmp_path / "a").write_text("x")
    with pytest.raises(UsageError, match="has 1 tokens, and a score needs at least 2"):
        encode_text(ByteTokenizer(), open_corpus(str(tmp_path)))
