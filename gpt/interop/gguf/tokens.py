"""A tokenizer as metadata of a GGUF file, in and out."""

from typing import Any

from gpt.data.tokenizer import GPT2Tokenizer, Tokenizer
from gpt.interop.gguf.format import GGUF
from gpt.interop.vocabulary import _make, _merged_from, byte_characters

NORMAL, CONTROL, USER, UNUSED = 1, 3, 4, 5
"""``tokenizer.ggml.token_type``: ordinary, special, added, and padding."""


def tokenizer_of(file: GGUF, *, rows: int) -> Tokenizer:
    """The tokenizer."""
    theirs = {
        key.removeprefix("tokenizer.ggml."): value
        for key, value in file.metadata.items()
        if key.startswith("tokenizer.ggml.")
    }
    tokens, types = theirs["tokens"], theirs["token_type"].tolist()
    pairs = [tuple(merge.split(" ", 1)) for merge in theirs["merges"]]
    ids = {token: i for i, token in enumerate(tokens) if types[i] != UNUSED}
    special = {t: i for t, i in ids.items() if types[i] == CONTROL}
    added = {t: i for t, i in ids.items() if types[i] == USER}
    end = [theirs[k] for k in ("eos_token_id", "eot_token_id") if k in theirs]
    return _make(file.path, ids, pairs, special=special, added=added, end_of_text=end, rows=rows)


def tokenizer_metadata(tokenizer: Tokenizer, *, rows: int) -> dict[str, Any]:
    """The metadata of a tokenizer, with unused tokens up to the model's ``rows``."""
    characters = byte_characters()
    assert isinstance(tokenizer, GPT2Tokenizer)
    tokens = ["".join(characters[b] for b in token) for token in tokenizer.ranks]
    vocab = {token: i for i, token in enumerate(tokens, tokenizer.first_id)}
    named = dict(enumerate(tokens, tokenizer.first_id))
    types = dict.fromkeys(named, NORMAL)
    for group, kind in ((tokenizer.special, CONTROL), (tokenizer.added, USER)):
        for token, i in group.items():
            named[i], types[i] = token, kind
    for i in range(rows):
        if i not in named:
            named[i], types[i] = f"[PAD{i}]", UNUSED
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.tokens": [named[i] for i in range(rows)],
        "tokenizer.ggml.token_type": [types[i] for i in range(rows)],
        "tokenizer.ggml.merges": [" ".join(_merged_from(t, vocab)) for t in tokens[256:]],
        "tokenizer.ggml.bos_token_id": tokenizer.end_of_text,
        "tokenizer.ggml.eos_token_id": tokenizer.end_of_text,
        "tokenizer.ggml.add_bos_token": False,
        "tokenizer.ggml.add_space_prefix": False,
    }
