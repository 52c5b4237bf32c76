"""A GPT-2 tokenizer's files to a tokenizer and back: ``tokenizer.json``, or ``vocab.json`` and
``merges.txt``.

They spell each byte as a printable character. tiktoken encodes with them when the order of the
merges is the order of the ids, as in every vocabulary that was trained and not put together by
hand.
"""

import itertools
import json
from functools import cache
from pathlib import Path
from typing import Any

from gpt.config import UsageError
from gpt.data.tokenizer import END_OF_TEXT, ByteTokenizer, CharTokenizer, GPT2Tokenizer, Tokenizer


def load_tokenizer(folder: Path, *, end_of_text: int | None = None) -> Tokenizer:
    """The tokenizer in ``folder``; the released one where it has no tokenizer's files.

    ``end_of_text`` is the id that the model's configuration names. ``UsageError`` for a tokenizer
    whose ids could come out otherwise than Hugging Face's.
    """
    whole, vocab, merges = (folder / n for n in ("tokenizer.json", "vocab.json", "merges.txt"))
    try:
        if whole.exists():
            return _from_json(whole, json.loads(whole.read_text(encoding="utf-8")), end_of_text)
        if vocab.exists() != merges.exists():
            raise UsageError(f"{folder} has one of vocab.json and merges.txt, and needs both")
        if vocab.exists():
            lines = merges.read_text(encoding="utf-8").splitlines()
            pairs = [line.split(" ") for line in lines if line and not line.startswith("#version")]
            ids = json.loads(vocab.read_text(encoding="utf-8"))
            extra = folder / "added_tokens.json"
            added = json.loads(extra.read_text(encoding="utf-8")) if extra.exists() else {}
            special, more = _settings(folder / "tokenizer_config.json")
            added = {k: i for k, i in (added | more).items() if k not in special}
            return _make(vocab, ids, pairs, special=special, added=added, end_of_text=end_of_text)
    except OSError as error:
        raise UsageError(f"{error.filename} cannot be read: {error.strerror}") from None
    except UsageError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UsageError(f"the tokenizer in {folder} is broken ({error!r})") from None
    return GPT2Tokenizer.released()


def _characters(path: Path, vocab: dict[str, int]) -> CharTokenizer:
    """The character tokenizer that :func:`hugging_face_files` wrote."""
    tokenizer = CharTokenizer(token for token in vocab if len(token) == 1)
    if {c: i for i, c in enumerate(tokenizer.characters)} != vocab:
        raise UsageError(f"{path} has no pre_tokenizer, and is no vocabulary of characters either")
    return tokenizer


def _from_json(path: Path, state: dict[str, Any], end_of_text: int | None) -> Tokenizer:
    model, before = state["model"], state.get("pre_tokenizer") or {}
    after = state.get("post_processor") or {}
    if state.get("pre_tokenizer") is None and state.get("decoder") == {"type": "Fuse"}:
        return _characters(path, model["vocab"])
    for what, found, right in (
        ("model.type", model.get("type", "BPE"), "BPE"),
        ("model.ignore_merges", model.get("ignore_merges", False), False),
        ("model.dropout", model.get("dropout"), None),
        ("normalizer", state.get("normalizer"), None),
        ("pre_tokenizer.type", before.get("type"), "ByteLevel"),
        ("pre_tokenizer.add_prefix_space", before.get("add_prefix_space", False), False),
        ("pre_tokenizer.use_regex", before.get("use_regex", True), True),
        ("post_processor.type", after.get("type", "ByteLevel"), "ByteLevel"),
        ("model.end_of_word_suffix", model.get("end_of_word_suffix") or None, None),
        ("model.continuing_subword_prefix", model.get("continuing_subword_prefix") or None, None),
    ):
        if found != right:
            raise UsageError(f"{path} has {what} {found!r}, and GPT-2's tokenizer has {right!r}")
    special, added = _added(path, state.get("added_tokens", []))
    _settings(path.with_name("tokenizer_config.json"))
    pairs = [pair.split(" ") if isinstance(pair, str) else pair for pair in model["merges"]]
    return _make(path, model["vocab"], pairs, special=special, added=added, end_of_text=end_of_text)


def _added(path: Path, tokens: list[dict[str, Any]]) -> tuple[dict[str, int], dict[str, int]]:
    """Special tokens, and others that are taken whole."""
    special, added = {}, {}
    for token in tokens:
        if token["special"]:
            special[token["content"]] = token["id"]
        elif token.get("lstrip") or token.get("rstrip") or token.get("single_word"):
            raise UsageError(
                f"{path} has the added token {token['content']!r} with lstrip, rstrip or "
                "single_word, which is not supported"
            )
        else:
            added[token["content"]] = token["id"]
    return special, added


def _settings(path: Path) -> tuple[dict[str, int], dict[str, int]]:
    """What ``tokenizer_config.json`` adds: special tokens, and others that are taken whole."""
    if not path.exists():
        return {}, {}
    state = json.loads(path.read_text(encoding="utf-8"))
    if state.get("add_prefix_space"):
        raise UsageError(f"{path} has add_prefix_space true, and GPT-2's tokenizer has false")
    if state.get("add_bos_token"):
        raise UsageError(f"{path} has add_bos_token true, and GPT-2's tokenizer has false")
    entries = state.get("added_tokens_decoder", {}).items()
    return _added(path, [{"special": False, **token, "id": int(i)} for i, token in entries])


def _make(
    path: Path,
    vocab: dict[str, int],
    merges: list[list[str]],
    *,
    special: dict[str, int],
    added: dict[str, int],
    end_of_text: int | None,
) -> GPT2Tokenizer:
    bytes_of = {character: byte for byte, character in byte_characters().items()}
    named = special | added
    if END_OF_TEXT in vocab and END_OF_TEXT not in named:
        special = special | {END_OF_TEXT: vocab[END_OF_TEXT]}
        named |= special
    # A token that was added and is made by merges too stays in the vocabulary.
    made = {a + b for a, b in merges}
    spelled = sorted((i, t) for t, i in vocab.items() if t not in named or t in made)
    if not spelled:
        raise UsageError(f"{path} has an empty vocabulary")
    first_id = spelled[0][0]
    if [i for i, _ in spelled] != list(range(first_id, first_id + len(spelled))):
        raise UsageError(f"{path} has gaps in its ids, which is not supported")
    tokens = [token for _, token in spelled]
    if len(set(tokens) & bytes_of.keys()) != 256:
        raise UsageError(f"{path} lacks some of the 256 bytes, so not every text could be encoded")
    if [a + b for a, b in merges] != tokens[256:] or set(tokens[:256]) != bytes_of.keys():
        raise UsageError(f"{path} has merges in another order than its ids, which is not supported")
    apart = [i for token, i in named.items() if token not in made]
    ids = sorted([*apart, *range(first_id, first_id + len(tokens))])
    if ids != list(range(len(ids))):
        raise UsageError(f"{path} has gaps in its ids, or two tokens with one id")
    if end_of_text not in special.values():
        end_of_text = special.get(END_OF_TEXT)
    if end_of_text is None:
        raise UsageError(f"{path} has no token for the end of a text ({END_OF_TEXT})")
    ranks = [bytes(bytes_of[character] for character in token) for token in tokens]
    return GPT2Tokenizer(
        ranks, first_id=first_id, special=special, added=added, end_of_text=end_of_text
    )


@cache
def byte_characters() -> dict[int, str]:
    """The printable character that stands for each byte in GPT-2's files."""
    printable = [b for b in range(256) if chr(b).isprintable() and chr(b) != " "]
    others = [b for b in range(256) if b not in printable]
    return {b: chr(b) for b in printable} | {b: chr(256 + i) for i, b in enumerate(others)}


def hugging_face_files(tokenizer: Tokenizer) -> dict[str, str]:
    """The files, by name, from which ``AutoTokenizer`` makes a tokenizer with the same ids."""
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
        tokens = ["".join(characters[b] for b in token) for token in tokenizer.ranks]
        vocab = {token: i for i, token in enumerate(tokens, tokenizer.first_id)}
        merges = [_merged_from(token, vocab) for token in tokens[256:]]
        special, added = tokenizer.special, tokenizer.added
    else:
        raise UsageError(f"a {tokenizer.kind} tokenizer has no form that Hugging Face reads")
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
        "unk_token": end,  # never needed, but GPT-2's has it, and CTranslate2 wants one
        "clean_up_tokenization_spaces": False,
    }
    files = {"tokenizer.json": whole, "tokenizer_config.json": settings}
    return {name: json.dumps(content, ensure_ascii=False) for name, content in files.items()}


def _merged_from(token: str, vocab: dict[str, int]) -> list[str]:
    """The two parts that ``token`` is merged from: what the merges before its own leave of it."""
    own = vocab[token]
    parts = list(token)
    while len(parts) > 2:
        ranks = [vocab.get(a + b, own) for a, b in itertools.pairwise(parts)]
        best = min(range(len(ranks)), key=ranks.__getitem__)
        parts[best : best + 2] = [parts[best] + parts[best + 1]]
    return parts
