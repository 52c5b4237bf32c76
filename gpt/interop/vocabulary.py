"""Read and write the files of a GPT-2 tokenizer: ``tokenizer.json``, or ``vocab.json`` and
``merges.txt``.

The files write each byte as a printable character. tiktoken needs merges in the order of the ids,
which every trained vocabulary has.
"""

import itertools
import json
import re
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

from gpt.config import UsageError, foreign, quoted
from gpt.data.tokenizer import END_OF_TEXT, ByteTokenizer, CharTokenizer, GPT2Tokenizer, Tokenizer
from gpt.files import read_object, read_text

_WHAT = "the tokenizer's"


def load_tokenizer(
    folder: Path, *, end_of_text: Sequence[int] = (), rows: int | None = None
) -> Tokenizer:
    """The tokenizer in ``folder``, or the released one if the folder has no tokenizer files.

    ``end_of_text`` are the ids in the model's configuration. The special tokens among them end a
    generated text, and the first one becomes the tokenizer's ``end_of_text``. ``rows`` is the
    model's vocabulary size: special and added tokens with larger ids are left out, and a text that
    contains such an added token is refused when it is encoded. ``UsageError`` for broken files, and
    for a tokenizer whose ids might differ from those of Hugging Face.
    """
    whole, vocab, merges = (folder / n for n in ("tokenizer.json", "vocab.json", "merges.txt"))
    if whole.exists():
        state = read_object(whole, _WHAT)
        return _from_json(whole, state, end_of_text=end_of_text, rows=rows)
    if vocab.exists() != merges.exists():
        raise UsageError(f"{foreign(folder)} needs both vocab.json and merges.txt, and has one")
    if not vocab.exists():
        return GPT2Tokenizer.released()
    lines = [line.removesuffix("\r") for line in read_text(merges, _WHAT).split("\n")]
    pairs = _pairs(merges, [line for line in lines if line and not line.startswith("#version")])
    extra = folder / "added_tokens.json"
    added = _ids(extra, "its content", read_object(extra, _WHAT)) if extra.exists() else {}
    special, more = _settings(folder / "tokenizer_config.json")
    return _make(
        vocab,
        _ids(vocab, "its content", read_object(vocab, _WHAT)),
        pairs,
        special=special,
        added={k: i for k, i in (added | more).items() if k not in special},
        end_of_text=end_of_text,
        rows=rows,
    )


def _from_json(
    path: Path, state: dict[str, Any], *, end_of_text: Sequence[int], rows: int | None
) -> Tokenizer:
    model, before = _object(path, state, "model"), _object(path, state, "pre_tokenizer")
    is_characters = not before and state.get("decoder") == {"type": "Fuse"}
    needed = (
        ("pre_tokenizer.type", before.get("type"), "ByteLevel"),
        ("pre_tokenizer.add_prefix_space", before.get("add_prefix_space", False), False),
        ("pre_tokenizer.use_regex", before.get("use_regex", True), True),
    )
    for what, found, right in (
        ("model.type", model.get("type", "BPE"), "BPE"),
        ("model.ignore_merges", model.get("ignore_merges", False), False),
        ("model.dropout", model.get("dropout"), None),
        ("normalizer", state.get("normalizer"), None),
        ("model.end_of_word_suffix", model.get("end_of_word_suffix") or None, None),
        ("model.continuing_subword_prefix", model.get("continuing_subword_prefix") or None, None),
        *(() if is_characters else needed),
    ):
        if found != right:
            raise UsageError(
                f"{foreign(path)} has {what} {quoted(found)}, and must have {right!r} as in GPT-2"
            )
    after = state.get("post_processor")
    if not _adds_nothing(after):
        raise UsageError(
            f"{foreign(path)} has the post_processor {quoted(after)}, which could add tokens; this "
            "is not supported"
        )
    special, added = _added(path, state.get("added_tokens", []))
    vocab = _ids(path, "model.vocab", model.get("vocab"))
    if is_characters:
        return _characters(path, vocab, special | added)
    _settings(path.with_name("tokenizer_config.json"))
    pairs = _pairs(path, model.get("merges"))
    return _make(
        path, vocab, pairs, special=special, added=added, end_of_text=end_of_text, rows=rows
    )


def _characters(path: Path, vocab: dict[str, int], others: dict[str, int]) -> CharTokenizer:
    """The character tokenizer that :func:`hugging_face_files` wrote."""
    tokenizer = CharTokenizer(token for token in vocab if len(token) == 1)
    if {c: i for i, c in enumerate(tokenizer.characters)} != vocab:
        raise UsageError(
            f"{foreign(path)} has no pre_tokenizer, and its vocabulary is not one of characters"
        )
    if list(others.values()) != [tokenizer.end_of_text]:
        raise UsageError(
            f"{foreign(path)} has the added_tokens {quoted(others)}, and must have only "
            f"end-of-text, with the id {tokenizer.end_of_text}"
        )
    return tokenizer


def _adds_nothing(processor: object) -> bool:
    """Whether a post-processor adds no tokens."""
    match processor:
        case None | {"type": "ByteLevel"}:
            return True
        case {"type": "TemplateProcessing", "single": [{"Sequence": {"id": "A"}}]}:
            return True
        case {"type": "Sequence", "processors": [*parts]}:
            return all(map(_adds_nothing, parts))
    return False


def _object(path: Path, state: dict[str, Any], name: str) -> dict[str, Any]:
    """A field that must be an object, or absent."""
    value = state.get(name)
    if not isinstance(value, dict | None):
        raise UsageError(f"{foreign(path)} has {name} {quoted(value)}, which must be an object")
    return value or {}


def _ids(path: Path, name: str, value: object) -> dict[str, int]:
    """A field that maps tokens to ids."""
    if not isinstance(value, dict) or not all(type(i) is int for i in value.values()):
        raise UsageError(f"{foreign(path)} lacks an id for a token in {name}")
    return value


def _pairs(path: Path, merges: object) -> list[tuple[str, str]]:
    """The merges, each of two parts: ``"a b"`` or ``["a", "b"]``."""
    if not isinstance(merges, list):
        raise UsageError(f"{foreign(path)} has model.merges {quoted(merges)}, which must be a list")
    pairs = []
    for number, merge in enumerate(merges, 1):
        match merge.split(" ") if isinstance(merge, str) else merge:
            case [str() as a, str() as b] if a and b:
                pairs.append((a, b))
            case _:
                raise UsageError(
                    f"{foreign(path)} has {quoted(merge)} as merge {number:,}, which must have two "
                    "parts"
                )
    return pairs


def _added(path: Path, tokens: object) -> tuple[dict[str, int], dict[str, int]]:
    """The special tokens, and the other added tokens."""
    special, added = dict[str, int](), dict[str, int]()
    entries: list[Any] = tokens if isinstance(tokens, list) else [tokens]
    for token in entries:
        match token:
            case {"content": str() as content, "id": int() as i, "special": bool() as is_special}:
                (special if is_special else added)[content] = i
            case _:
                raise UsageError(
                    f"{foreign(path)} has the added token {quoted(token)}, which must have "
                    "content, id and special"
                )
        if not content:
            raise UsageError(f"{foreign(path)} has an added token without content")
        strips = token.get("lstrip") or token.get("rstrip") or token.get("single_word")
        if strips and not is_special:
            raise UsageError(
                f"{foreign(path)} has the added token {quoted(content)} with lstrip, rstrip or "
                "single_word, which is not supported"
            )
    return special, added


def _settings(path: Path) -> tuple[dict[str, int], dict[str, int]]:
    """The special and the other added tokens of ``tokenizer_config.json``."""
    if not path.exists():
        return {}, {}
    state = read_object(path, _WHAT)
    for name in ("add_prefix_space", "add_bos_token"):
        if state.get(name):
            raise UsageError(f"{foreign(path)} has {name} true, and must have false as in GPT-2")
    tokens = []
    for i, token in _object(path, state, "added_tokens_decoder").items():
        if not (isinstance(token, dict) and re.fullmatch(r"[0-9]{1,18}", i)):
            raise UsageError(
                f"{foreign(path)} has {quoted(i)}: {quoted(token)} in added_tokens_decoder, which "
                "must map an id to a token"
            )
        tokens.append({"special": False, **token, "id": int(i)})
    return _added(path, tokens)


def _make(
    path: Path,
    vocab: dict[str, int],
    merges: list[tuple[str, str]],
    *,
    special: dict[str, int],
    added: dict[str, int],
    end_of_text: Sequence[int],
    rows: int | None,
) -> GPT2Tokenizer:
    where = foreign(path)
    bytes_of = {character: byte for byte, character in byte_characters().items()}
    named = special | added
    if END_OF_TEXT in vocab and END_OF_TEXT not in named:
        special = special | {END_OF_TEXT: vocab[END_OF_TEXT]}
        named |= special
    # An added token that merges can also make stays in the vocabulary.
    made = {a + b for a, b in merges}
    spelled = sorted((i, t) for t, i in vocab.items() if t not in named or t in made)
    if not spelled:
        raise UsageError(f"{where} has an empty vocabulary")
    first_id = spelled[0][0]
    if [i for i, _ in spelled] != list(range(first_id, first_id + len(spelled))):
        raise UsageError(f"{where} has gaps in its ids; this is not supported")
    tokens = [token for _, token in spelled]
    if len(set(tokens) & bytes_of.keys()) != 256:
        raise UsageError(f"{where} lacks some of the 256 bytes, so some texts cannot be encoded")
    if [a + b for a, b in merges] != tokens[256:] or set(tokens[:256]) != bytes_of.keys():
        raise UsageError(f"{where} has merges in another order than its ids; this is not supported")
    if not {part for pair in merges for part in pair} <= set(tokens):
        raise UsageError(f"{where} has merges of parts that are not tokens")
    beyond = {t for t, i in named.items() if t not in made and rows is not None and i >= rows}
    apart = [i for token, i in named.items() if token not in made and token not in beyond]
    ids = sorted([*apart, *range(first_id, first_id + len(tokens))])
    if ids != list(range(len(ids))):
        raise UsageError(f"{where} has gaps in its ids, or two tokens with one id")
    missing = {token: i for token, i in added.items() if token in beyond}
    special, added = (
        {token: i for token, i in group.items() if token not in beyond}
        for group in (special, added)
    )
    ends = [i for i in end_of_text if i in special.values()]
    end = next(iter(ends), special.get(END_OF_TEXT))
    if end is None:
        at = f" below the model's {rows:,} rows" if beyond else ""
        raise UsageError(f"{where} has no end-of-text token ({END_OF_TEXT}){at}")
    ranks = [bytes(bytes_of[character] for character in token) for token in tokens]
    return GPT2Tokenizer(
        ranks,
        first_id=first_id,
        special=special,
        added=added,
        missing=missing,
        end_of_text=end,
        ends=ends,
    )


@cache
def byte_characters() -> dict[int, str]:
    """The printable character for each byte in GPT-2's files."""
    printable = [b for b in range(256) if chr(b).isprintable() and chr(b) != " "]
    others = [b for b in range(256) if b not in printable]
    return {b: chr(b) for b in printable} | {b: chr(256 + i) for i, b in enumerate(others)}


def hugging_face_files(tokenizer: Tokenizer) -> dict[str, str]:
    """The files, by name, from which ``AutoTokenizer`` builds a tokenizer with the same ids."""
    special = {END_OF_TEXT: tokenizer.end_of_text}
    added: dict[str, int] = {}
    characters = byte_characters()
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
    before: dict[str, Any] | None = byte_level | {"use_regex": True}
    after: dict[str, Any] = byte_level | {"use_regex": True}
    merges: list[list[str]] = []
    if isinstance(tokenizer, CharTokenizer):
        vocab = {character: i for i, character in enumerate(tokenizer.characters)}
        before, after = None, {"type": "Fuse"}
    elif isinstance(tokenizer, ByteTokenizer):
        vocab = {characters[byte]: byte for byte in range(256)}
    elif isinstance(tokenizer, GPT2Tokenizer):
        if tokenizer.pattern != "gpt2":  # ByteLevel has only this one
            raise UsageError(
                f"a tokenizer with the pattern {tokenizer.pattern} cannot be exported to Hugging "
                "Face"
            )
        tokens = ["".join(characters[b] for b in token) for token in tokenizer.ranks]
        vocab = {token: i for i, token in enumerate(tokens, tokenizer.first_id)}
        merges = [_merged_from(token, vocab) for token in tokens[256:]]
        special, added = tokenizer.special, tokenizer.added
    else:
        raise UsageError(f"a {tokenizer.kind} tokenizer cannot be exported to Hugging Face")
    entries = [(i, token, True) for token, i in special.items()]
    entries += [(i, token, False) for token, i in added.items()]
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    whole = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {"id": i, "content": token, **flags, "special": is_special}
            for i, token, is_special in sorted(entries)
        ],
        "normalizer": None,
        "pre_tokenizer": before,
        "post_processor": None,
        "decoder": after,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": vocab,
            "merges": merges,
        },
    }
    end = next(token for token, i in special.items() if i == tokenizer.end_of_text)
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": end,
        "eos_token": end,
        "unk_token": end,  # never used, but GPT-2's has it, and CTranslate2 needs it
        "clean_up_tokenization_spaces": False,
    }
    files = {"tokenizer.json": whole, "tokenizer_config.json": settings}
    return {name: json.dumps(content, ensure_ascii=False) for name, content in files.items()}


def _merged_from(token: str, vocab: dict[str, int]) -> list[str]:
    """The two parts that ``token`` is merged from: the result of all merges before its own."""
    own = vocab[token]
    parts = list(token)
    while len(parts) > 2:
        ranks = [vocab.get(a + b, own) for a, b in itertools.pairwise(parts)]
        best = min(range(len(ranks)), key=ranks.__getitem__)
        parts[best : best + 2] = [parts[best] + parts[best + 1]]
    return parts
