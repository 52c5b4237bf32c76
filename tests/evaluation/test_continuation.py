"""Continuations by a task's options, beside what transformers' ``generate`` makes of the same."""

import pytest
import torch
from transformers import GPT2LMHeadModel

from gpt.config import ModelConfig, UsageError
from gpt.data.tokenizer import ByteTokenizer
from gpt.evaluation.continuation import continued
from gpt.interop.export import export_huggingface
from tests.conftest import make_model

CONTEXT = "One two three."


def printing_model():
    """A model whose likeliest tokens are printable and change with the position."""
    config = ModelConfig(
        vocab_size=257, context_length=48, n_layer=2, n_head=2, n_embd=32, tie_embeddings=False
    )
    model = make_model(config)
    with torch.no_grad():
        model.position.weight.mul_(10)
        model.head.weight[:32].zero_()
        model.head.weight[127:].zero_()
    return model


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    """A model and the same in transformers."""
    ours = printing_model()
    folder = tmp_path_factory.mktemp("model") / "out"
    export_huggingface(ours, ByteTokenizer(), folder)
    return ours, GPT2LMHeadModel.from_pretrained(folder).eval()


def theirs(model, context, *, max_new_tokens, **options):
    ids = torch.tensor([list(context.encode())])[:, -(48 - max_new_tokens) :]
    made = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_length=ids.shape[1] + max_new_tokens,
        pad_token_id=256,
        **options,
    )
    return bytes(i for i in made[0, ids.shape[1] :].tolist() if i != 256).decode(errors="replace")


GREEDY = {"do_sample": False}
SAME = [  # a task's options, and what they are to generate
    ({"max_gen_toks": 9}, {"max_new_tokens": 9} | GREEDY),
    ({"max_new_tokens": 3}, {"max_new_tokens": 3} | GREEDY),
    ({"max_tokens": 3}, {"max_new_tokens": 3} | GREEDY),
    ({"max_completion_tokens": 3}, {"max_new_tokens": 3} | GREEDY),
    ({"max_new_tokens": 3, "max_gen_toks": 5}, {"max_new_tokens": 5} | GREEDY),
    ({"max_gen_toks": "4"}, {"max_new_tokens": 4} | GREEDY),
    ({"max_gen_toks": 47}, {"max_new_tokens": 47} | GREEDY),
    ({"max_gen_toks": 5, "do_sample": False, "temperature": 9.0}, {"max_new_tokens": 5} | GREEDY),
    ({"max_gen_toks": 5, "do_sample": None, "top_k": None}, {"max_new_tokens": 5} | GREEDY),
    (
        {"max_gen_toks": 8, "do_sample": True, "temperature": 0.7, "top_k": 1},
        {"max_new_tokens": 8, "do_sample": True, "temperature": 0.7, "top_k": 1},
    ),
    (
        {"max_gen_toks": 8, "temperature": 0.7, "top_p": 1e-6},
        {"max_new_tokens": 8, "do_sample": True, "temperature": 0.7, "top_p": 1e-6},
    ),
    (
        {"max_gen_toks": 8, "temperature": 2.0, "min_p": 1.0},
        {"max_new_tokens": 8, "do_sample": True, "temperature": 2.0, "min_p": 1.0},
    ),
    (
        {"max_gen_toks": 8, "repetition_penalty": 1.7},
        {"max_new_tokens": 8, "repetition_penalty": 1.7} | GREEDY,
    ),
]


@pytest.mark.parametrize(("options", "meaning"), SAME, ids=lambda o: str(o))
def test_options_mean_what_transformers_means_by_them(options, meaning, both):
    ours, their = both
    assert continued(ours, ByteTokenizer(), CONTEXT, options) == theirs(their, CONTEXT, **meaning)


def test_greedy_texts_tell_the_options_apart(both):
    """Or the tests above would say nothing."""
    ours, _ = both
    text = continued(ours, ByteTokenizer(), CONTEXT, {"max_gen_toks": 9})
    other = continued(
        ours, ByteTokenizer(), CONTEXT, {"max_gen_toks": 9, "repetition_penalty": 1.7}
    )
    assert text != other


def draws(ours, options, n=400):
    torch.manual_seed(0)
    options = {"max_gen_toks": 1, "do_sample": True, "temperature": 3.0, **options}
    return [continued(ours, ByteTokenizer(), CONTEXT, options) for _ in range(n)]


def test_draws_are_among_the_50_likeliest_unless_top_k_says_otherwise(both):
    ours, _ = both
    with torch.inference_mode():
        logits = ours(torch.tensor([list(CONTEXT.encode())]))[0, -1]
    likeliest = [
        bytes([i]).decode(errors="replace") for i in logits.argsort()[-50:].tolist() if i < 256
    ]
    assert set(draws(ours, {})) <= {*likeliest, ""}
    assert not set(draws(ours, {"top_k": 0})) <= {*likeliest, ""}
    assert len(set(draws(ours, {"top_k": 3}))) <= 3


def test_torchs_seed_decides_what_is_drawn(both):
    ours, _ = both
    assert draws(ours, {}, n=20) == draws(ours, {}, n=20)
    assert len(set(draws(ours, {}, n=20))) > 1


def test_a_text_ends_before_the_first_of_its_stop_texts_in_their_order(both):
    ours, _ = both
    whole = continued(ours, ByteTokenizer(), CONTEXT, {"max_gen_toks": 30})
    one, two = whole[5:7], whole[9]
    assert one not in whole[:5]
    for until in ([one, two], [two, one], one, ["never", one]):
        made = continued(ours, ByteTokenizer(), CONTEXT, {"max_gen_toks": 30, "until": until})
        stops = [until] if isinstance(until, str) else until
        assert made == min((whole.partition(stop)[0] for stop in stops), key=len)


def test_max_length_counts_the_context_as_well(both):
    ours, _ = both
    made = continued(ours, ByteTokenizer(), CONTEXT, {"max_gen_toks": 20, "max_length": 20})
    assert made == continued(ours, ByteTokenizer(), CONTEXT, {"max_gen_toks": 20 - len(CONTEXT)})


def test_a_document_ends_where_the_model_ends_it(both):
    made = theirs(both[1], CONTEXT, max_new_tokens=6, do_sample=False).encode()
    new = printing_model()
    with torch.no_grad():  # end-of-text is now a little likelier than the third token
        new.head.weight[256] = new.head.weight[made[2]] * 1.5
    text = continued(new, ByteTokenizer(), CONTEXT, {"max_gen_toks": 6})
    assert text == bytes(made).partition(made[2:3])[0].decode(errors="replace")


def test_a_long_context_loses_its_beginning_and_this_is_logged(both, caplog):
    ours, their = both
    context = "a long text " * 10
    options = {"max_gen_toks": 8}
    text = continued(ours, ByteTokenizer(), context, options)
    assert text == theirs(their, context, max_new_tokens=8, do_sample=False)
    assert "the context has 120 tokens; only the last 40 are used" in caplog.text


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({}, "max_gen_toks is 256, and the model's context_length is 48, which leaves no room"),
        ({"max_gen_toks": 48}, "max_gen_toks is 48, and .* leaves no room for the prompt"),
        (
            {"max_gen_toks": 0},
            "the context has 14 tokens, and .* allows 14 in all",
        ),
        ({"max_gen_toks": 4, "max_length": 14}, "allows 14 in all"),
        ({"max_gen_toks": 4, "max_length": 49}, "allows 49 in all"),
        ({"max_gen_toks": "x"}, "max_gen_toks is 'x', and must be a whole number"),
        ({"max_gen_toks": 4, "do_sample": True}, "temperature is 0, and must be above 0"),
        ({"max_gen_toks": 4, "do_sample": True, "top_k": 1}, "temperature is 0, and must be"),
        ({"max_gen_toks": 4, "num_beams": 2}, "unknown generation option 'num_beams'; choose from"),
        ({"max_gen_toks": 4, "temperature": "x"}, "temperature is 'x', and must be a number"),
        ({"max_gen_toks": 4, "temperature": 1, "top_p": 2}, "top_p is 2"),
    ],
    ids=str,
)
def test_options_that_cannot_be_are_refused_as_there(options, said, both):
    with pytest.raises(UsageError, match=said):
        continued(both[0], ByteTokenizer(), CONTEXT, options)
