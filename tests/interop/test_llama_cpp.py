"""What llama.cpp makes of the same files: SmolLM2's conversations, and exported vocabularies. These
tests need the package llama-cpp-python, and SmolLM2's tests its file.
"""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from gpt.config import GenerationConfig, ModelConfig, UsageError
from gpt.data.tokenizer import ByteTokenizer, CharTokenizer, prompt_ids
from gpt.generation.chat import Conversation
from gpt.interop.gguf.export import export_gguf
from gpt.interop.load import load
from gpt.interop.named import named_file
from gpt.interop.vocabulary import load_tokenizer
from tests.conftest import make_model
from tests.interop.test_sentencepiece import SHAPES, SPACE, TEXTS, VOCAB, definition_of

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("llama_cpp") is None,
    reason="llama_cpp (pip install llama-cpp-python) is missing",
)
QUESTION = "What is the capital of France?"
PEER = """
import json, sys, llama_cpp
from llama_cpp.llama_chat_format import Jinja2ChatFormatter
asked = json.load(sys.stdin)
model = llama_cpp.Llama(
    sys.argv[1], n_ctx=256, n_threads=1, n_threads_batch=1, verbose=False,
    logits_all=bool(asked.get("logits")), vocab_only="texts" in asked,
)
told = {}
if "texts" in asked:
    told["ids"] = [model.tokenize(t.encode(), add_bos=asked["bos"]) for t in asked["texts"]]
if "messages" in asked:
    template = model.metadata["tokenizer.chat_template"]
    form = Jinja2ChatFormatter(template=template, eos_token="", bos_token="")
    told["text"] = form(messages=asked["messages"]).prompt
    told["ids"] = model.tokenize(told["text"].encode(), add_bos=False, special=True)
if "logits" in asked:
    model.eval(asked["logits"])
    told["logits"] = [row.tolist() for row in model.scores[: len(asked["logits"])]]
json.dump(told, sys.stdout)
sys.stdout.flush()
"""
LLAMA = {
    "context_length": 64, "n_layer": 1, "n_head": 4, "n_embd": 64, "n_kv_head": 2, "n_inner": 96,
    "position": "rotary", "norm": "rmsnorm", "mlp": "gated", "activation": "silu", "bias": False,
}  # fmt: skip
CHARACTERS = "\n !,.:;?abcdefghijklmnopqrstuvwxyzABCDEFGHé東'"
SOME = ["Hello there", "a b  c", "é東", " lead", "\n\n", "ab" * 40, "trail ", "Be:\nfore?"]


def asked(path, **questions):
    words = [sys.executable, "-c", PEER, str(path)]
    run = subprocess.run(words, input=json.dumps(questions), capture_output=True, text=True)
    assert run.stdout, run.stderr
    return json.loads(run.stdout)


def spm(shape, folder: Path):
    (folder / "tokenizer.json").write_text(json.dumps(definition_of(shape)))
    return load_tokenizer(folder, end_of_text=[VOCAB["</s>"]])


@pytest.mark.parametrize("name", ["char", "byte", *SHAPES])
def test_an_exported_vocabulary_has_the_same_ids(name, tmp_path):
    simple = {"char": CharTokenizer(CHARACTERS), "byte": ByteTokenizer()}
    tokenizer = simple.get(name) or spm(name, tmp_path)
    texts = SOME if name == "char" else [t.replace(SPACE, "_") for t in TEXTS if t]
    if name == "mistral":  # its rule writes no space before a text that has one; llama.cpp's does
        texts = [text for text in texts if not text.startswith(" ")]
    model = make_model(ModelConfig(vocab_size=tokenizer.vocab_size, **LLAMA))
    export_gguf(model, tokenizer, tmp_path / "model.gguf")
    told = asked(tmp_path / "model.gguf", texts=texts, bos=bool(tokenizer.first))
    for text, ids in zip(texts, told["ids"], strict=True):
        assert ids == list(map(int, prompt_ids(tokenizer, text))), text


@pytest.fixture(scope="module")
def smollm2():
    try:
        return load("smollm2")
    except UsageError as error:
        pytest.skip(str(error))


def test_smollm2s_conversation_is_llama_cpps_to_the_letter(smollm2):
    config = GenerationConfig(temperature=0, max_new_tokens=8)
    conversation = Conversation(smollm2, config)
    answer = "".join(conversation.ask(QUESTION))
    path = named_file("smollm2", say=lambda text: None)
    told = asked(path, messages=[{"role": "user", "content": QUESTION}])
    assert conversation.prompt == told["ids"]
    assert conversation._known[0] == told["text"] + answer


@torch.inference_mode()
def test_smollm2s_logits_differ_from_llama_cpps_as_both_do_from_exact_ones(smollm2):
    path = named_file("smollm2", say=lambda text: None)
    ids = smollm2.tokenizer.encode("Before we proceed any further, hear me speak. " * 3).tolist()
    theirs = torch.tensor(asked(path, logits=ids)["logits"])
    exact = load(path, trainable=True).model.eval()(torch.tensor([ids]))[0]
    cache, ours = smollm2.model.new_cache(), []
    for token in ids:
        ours.append(smollm2.model(torch.tensor([[token]]), cache=cache)[0, 0].float())
    for rounded in (theirs, torch.stack(ours)):
        assert (rounded - exact).norm() < 0.08 * (exact - exact.mean()).norm()
    best = exact.topk(2).values
    sure = best[:, 0] - best[:, 1] > 2  # far more than rounding
    assert sure.sum() > 5
    assert torch.equal(theirs.argmax(-1)[sure], exact.argmax(-1)[sure])
    assert torch.equal(torch.stack(ours).argmax(-1)[sure], exact.argmax(-1)[sure])
