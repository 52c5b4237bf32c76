"""What llama.cpp makes of files that are written here: the logits of every architecture in every
weights format, and the ids of exported vocabularies.
"""

import json
from pathlib import Path

import pytest

from gpt.config import ModelConfig
from gpt.data.tokenizer import ByteTokenizer, CharTokenizer, GPT2Tokenizer, prompt_ids
from gpt.interop.gguf.architectures import ARCHITECTURES
from gpt.interop.gguf.export import export_gguf
from gpt.interop.gguf.model import described, load_dense
from gpt.interop.vocabulary import load_tokenizer
from tests.conftest import make_model
from tests.interop import llama_cpp_peer
from tests.interop.llama_cpp_peer import asked
from tests.interop.test_gguf import MODELS, RANKS, architecture, logits_of, random_model
from tests.interop.test_sentencepiece import SHAPES, SPACE, TEXTS, VOCAB, definition_of

needs_llama_cpp = pytest.mark.skipif(llama_cpp_peer.IS_MISSING, reason=llama_cpp_peer.REASON)
LLAMA = {
    "context_length": 64, "n_layer": 1, "n_head": 4, "n_embd": 64, "n_kv_head": 2, "n_inner": 96,
    "position": "rotary", "norm": "rmsnorm", "mlp": "gated", "activation": "silu", "bias": False,
}  # fmt: skip
CHARACTERS = "\n !,.:;?abcdefghijklmnopqrstuvwxyzABCDEFGHé東'"
SOME = ["Hello there", "a b  c", "é東", " lead", "\n\n", "ab" * 40, "trail ", "Be:\nfore?"]
BOUNDS = {"float32": 1e-5, "float16": 2e-3, "bfloat16": 2e-2, "int8": 4e-2, "int4": 4e-2}
"""llama.cpp rounds activations to the format of the weights, or to 8 bits for integers."""
GELU = {"gpt2", "bloom", "gemma3", "gptneox"}
"""Architectures whose GELU llama.cpp looks up in a table of float16; for ``gptneox`` it computes
another GELU than the models have.
"""
IDS = [7 * i % 256 for i in range(40)]


def test_every_architecture_is_compared():
    assert {architecture(name) for name in MODELS} == {*ARCHITECTURES}


@needs_llama_cpp
@pytest.mark.slow
@pytest.mark.parametrize("weights", BOUNDS)
@pytest.mark.parametrize("name", MODELS)
def test_llama_cpp_has_the_logits_of_this_project(name, weights, tmp_path):
    if name == "gemma3 of 62 layers" and weights != "float32":
        pytest.skip("the rounding of activations grows too far in 62 layers of random weights")
    path = tmp_path / "model.gguf"
    export_gguf(random_model(name), GPT2Tokenizer(RANKS), path, weights=weights)
    ours = logits_of(load_dense(described(path), device="cpu"), IDS)
    theirs = asked(path, logits=IDS, context=64)["logits"]
    bound = max(BOUNDS[weights], 2e-3) if architecture(name) in GELU else BOUNDS[weights]
    assert (ours - theirs).norm() < bound * ours.norm()


def spm(shape, folder: Path):
    (folder / "tokenizer.json").write_text(json.dumps(definition_of(shape)))
    return load_tokenizer(folder, end_of_text=[VOCAB["</s>"]])


@needs_llama_cpp
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
