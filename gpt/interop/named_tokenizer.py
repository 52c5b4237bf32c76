"""A tokenizer by its name: ``byte``, ``gpt2``, an encoding of tiktoken, a file or a folder."""

import re
from pathlib import Path

from gpt.config import MADE_FROM_TEXT, TOKENIZERS, UsageError, foreign, quoted
from gpt.data import tokenizer as tokenizers
from gpt.data.encodings import encoding_names, load_encoding
from gpt.data.sentencepiece_tokenizer import SentencePieceTokenizer
from gpt.data.tokenizer import ByteTokenizer, GPT2Tokenizer, Tokenizer
from gpt.files import check_regular, read_object, unreadable
from gpt.interop.vocabulary import load_tokenizer, tokenizer_of_json

_RANKS = re.compile(rb"[A-Za-z0-9+/]+=* [0-9]+\r?\n")
"""The first line of a file of tiktoken."""
FILES = ("tokenizer.json", "vocab.json", "tokenizer.model")
"""The files of a tokenizer in a folder; the first one that is there counts."""


def named_tokenizer(name: str, *, field: str = "data.tokenizer") -> Tokenizer:
    """The tokenizer ``name``, the value of the setting ``field``.

    A file is one of this project's (a run's ``tokenizer.json``, or what ``gpt tokenizer train``
    wrote), one of Hugging Face's, or a SentencePiece model (``.model``). ``UsageError`` if there is
    no such tokenizer, if it cannot be read, and for the names of those that are made from a text.
    """
    if name in MADE_FROM_TEXT:
        raise UsageError(
            f"{field} is {name!r}, which is made from a text: gpt tokenizer train SOURCE "
            f"--tokenizer {name} --out FILE makes a file that can be named here"
        )
    if name == "byte":
        return ByteTokenizer()
    if name == "gpt2":
        return GPT2Tokenizer.released()
    path = Path(name)
    try:
        there, folder = path.exists(), path.is_dir()
    except (OSError, ValueError) as error:
        raise unreadable(path, field, error) from None
    if there:
        return _in_folder(path, field) if folder else _of_file(path)
    if name in encoding_names():
        return load_encoding(name)
    raise UsageError(
        f"{field} is {quoted(name)}, which is neither a file nor one of "
        f"{', '.join((*TOKENIZERS, *(e for e in encoding_names() if e not in TOKENIZERS)))}"
    )


def _in_folder(folder: Path, field: str) -> Tokenizer:
    found = [folder / name for name in FILES if (folder / name).exists()]
    if not found:
        raise UsageError(
            f"{field} is the folder {foreign(folder)}, which has none of {', '.join(FILES)}"
        )
    return load_tokenizer(folder) if found[0].name == "vocab.json" else _of_file(found[0])


def _of_file(path: Path) -> Tokenizer:
    if path.suffix == ".model":
        return _sentencepiece(path)
    state = read_object(path, "the tokenizer")
    if "kind" in state or "model" not in state:
        return tokenizers.load(path)
    return tokenizer_of_json(path)


def _sentencepiece(path: Path) -> Tokenizer:
    check_regular(path, "the tokenizer")
    try:
        content = path.read_bytes()
    except OSError as error:
        raise unreadable(path, "the tokenizer", error) from None
    if _RANKS.match(content):
        raise UsageError(
            f"the tokenizer {foreign(path)} has tiktoken's ranks, as Llama 3's .model file, and no "
            "SentencePiece model; give the tokenizer.json of the same model"
        )
    try:
        return SentencePieceTokenizer(content)
    except ValueError as error:
        if isinstance(error, UsageError):
            raise
        raise UsageError(f"the tokenizer {foreign(path)} is broken: {foreign(error)}") from None
