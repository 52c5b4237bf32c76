"""Read the files of a tokenizer: ``tokenizer.json``, or ``vocab.json`` and ``merges.txt``.

tiktoken computes byte-level vocabularies with a known pattern whose merges are in the order of
their ids (:class:`GPT2Tokenizer`). The library ``tokenizers`` computes all others
(:class:`LibraryTokenizer`). The ids are those of Hugging Face's fast tokenizers in both cases.
"""

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from gpt.config import UsageError, foreign, quoted
from gpt.data.byte_characters import byte_characters
from gpt.data.byte_pair import END_OF_TEXT, GPT2Tokenizer
from gpt.data.library_tokenizer import LibraryTokenizer, check_definition
from gpt.data.patterns import byte_level
from gpt.data.tokenizer import CharTokenizer, Tokenizer
from gpt.data.words import UNKNOWN
from gpt.files import read_object, read_text
from gpt.interop.patterns import pattern_of_steps
from gpt.interop.tokenizer_settings import (
    WHAT,
    Settings,
    added_tokens,
    object_in,
    read_settings,
)


class OtherEngineError(UsageError):
    """A vocabulary that tiktoken cannot express."""


def load_tokenizer(
    folder: Path, *, end_of_text: Sequence[int] = (), rows: int | None = None
) -> Tokenizer:
    """The tokenizer in ``folder``, or GPT-2's released one if the folder has no tokenizer files.

    ``end_of_text`` are the ids in the model's configuration. The special tokens among them end a
    generated text, and the first one becomes the tokenizer's ``end_of_text``. So does the
    ``eos_token`` of ``tokenizer_config.json``. ``rows`` is the model's vocabulary size: special and
    added tokens with larger ids are left out, and a text that contains such an added token is
    refused when it is encoded. ``UsageError`` for broken files, and for a tokenizer whose ids might
    differ from those of Hugging Face.
    """
    whole, vocab, merges = (folder / n for n in ("tokenizer.json", "vocab.json", "merges.txt"))
    if whole.exists():
        state = read_object(whole, WHAT)
        return _from_json(whole, state, end_of_text=end_of_text, rows=rows)
    if vocab.exists() != merges.exists():
        raise UsageError(f"{foreign(folder)} needs both vocab.json and merges.txt, and has one")
    if not vocab.exists():
        if (folder / "tokenizer.model").exists():
            raise UsageError(
                f"{foreign(folder)} has tokenizer.model alone, and tokenizer.json is needed: "
                "transformers' AutoTokenizer.from_pretrained(FOLDER).save_pretrained(FOLDER) "
                "writes it"
            )
        return GPT2Tokenizer.released()
    lines = [line.removesuffix("\r") for line in read_text(merges, WHAT).split("\n")]
    pairs = pairs_of(merges, [line for line in lines if line and not line.startswith("#version")])
    extra = folder / "added_tokens.json"
    more = _ids(extra, "its content", read_object(extra, WHAT)) if extra.exists() else {}
    settings = read_settings(folder)
    if settings.add_prefix_space:
        raise UsageError(
            f"{foreign(folder / 'tokenizer_config.json')} has add_prefix_space true, and must have "
            "false as in GPT-2"
        )
    vocabulary = _ids(vocab, "its content", read_object(vocab, WHAT))
    special, end = dict(settings.special), settings.tokens.get("eos_token", "")
    if not special and end in vocabulary | more:
        special = {end: (vocabulary | more)[end]}
    return byte_pair(
        vocab,
        vocabulary,
        pairs,
        special=special,
        added={k: i for k, i in {**more, **settings.added}.items() if k not in special},
        end_of_text=end_of_text,
        rows=rows,
        settings=settings,
        first=_first(folder, special, settings, ()),
    )


def tokenizer_of_json(path: Path) -> Tokenizer:
    """The tokenizer of a file in the format of ``tokenizer.json``, with any name. The folder's
    ``tokenizer_config.json`` counts too. Errors as :func:`load_tokenizer`.
    """
    return _from_json(path, read_object(path, WHAT), end_of_text=(), rows=None)


def _from_json(
    path: Path, state: dict[str, Any], *, end_of_text: Sequence[int], rows: int | None
) -> Tokenizer:
    model, before = object_in(path, state, "model"), object_in(path, state, "pre_tokenizer")
    special, added = added_tokens(path, state.get("added_tokens") or [])
    vocab = _ids(path, "model.vocab", model.get("vocab"))
    if not before and state.get("decoder") == {"type": "Fuse"} and not model.get("merges"):
        if _adds_first(path, state.get("post_processor")):
            raise UsageError(f"{foreign(path)} has a post_processor that adds tokens to characters")
        return _characters(path, vocab, special | added)
    if model.get("type", "BPE") != "BPE":
        raise UsageError(
            f"{foreign(path)} has model.type {quoted(model['type'])}, and must have BPE"
        )
    settings = read_settings(path.parent)
    first = _first(path.parent, special, settings, _adds_first(path, state.get("post_processor")))
    pairs = pairs_of(path, model.get("merges"))
    if (pattern := _expressible(state, first)) is not None:
        if settings.add_prefix_space:
            raise UsageError(
                f"{foreign(path.parent / 'tokenizer_config.json')} has add_prefix_space true, and "
                f"{path.name} has false"
            )
        try:
            return byte_pair(
                path,
                vocab,
                pairs,
                special=special,
                added=added,
                end_of_text=end_of_text,
                rows=rows,
                settings=settings,
                first=first,
                pattern=pattern,
                normalisation="NFC" if state.get("normalizer") else "",
            )
        except OtherEngineError:
            pass
    return library_tokenizer(
        path, state, end_of_text=end_of_text, rows=rows, settings=settings, first=first
    )


def _expressible(state: dict[str, Any], first: Sequence[int]) -> str | None:
    """The pattern of a ``tokenizer.json`` without anything that :class:`GPT2Tokenizer` lacks."""
    model, normaliser = state["model"], state.get("normalizer")
    entries = state.get("added_tokens") or []
    matched = [entry for entry in entries if not entry["special"]]
    special = {entry["id"] for entry in entries if entry["special"]}
    plain = (
        not any(
            model.get(name)
            for name in (
                "dropout", "unk_token", "end_of_word_suffix", "continuing_subword_prefix",
                "byte_fallback",
            )
        )
        and normaliser in (None, {"type": "NFC"})
        and not any(entry.get(n) for entry in matched for n in ("lstrip", "rstrip", "single_word"))
        # tokens of the text as it is are matched before those of the normalised text
        and len({entry.get("normalized", True) for entry in matched}) < 2
        and not (normaliser and any(e.get("normalized") and e["content"].strip() for e in matched))
        and set(first) <= special
    )  # fmt: skip
    ignore_merges = bool(model.get("ignore_merges"))
    before = state.get("pre_tokenizer") or {}
    return pattern_of_steps(before, ignore_merges=ignore_merges) if plain else None


def library_tokenizer(
    path: Path,
    definition: dict[str, Any],
    *,
    end_of_text: Sequence[int],
    rows: int | None,
    settings: Settings,
    first: Sequence[int] = (),
) -> LibraryTokenizer:
    """The tokenizer of a ``definition`` as in ``tokenizer.json``, which the library computes."""
    try:
        check_definition(definition)
    except ValueError as error:
        raise UsageError(f"{foreign(path)} cannot be read: {foreign(error)}") from None
    special, added = added_tokens(path, definition.get("added_tokens") or [])
    vocab = definition["model"]["vocab"]
    tokens = max(vocab.values()) + 1
    every = max([tokens - 1, *special.values(), *added.values()]) + 1
    size = every if rows is None else max(tokens, min(every, rows))
    unknown = definition["model"].get("unk_token")
    named = {t: i for t, i in (vocab | special).items() if i < size}
    ends = _ends(special, settings, end_of_text, size)
    end = next(iter(ends), named.get(END_OF_TEXT, named.get(unknown)))
    if end is None:
        raise UsageError(_no_end(path, rows))
    try:
        return LibraryTokenizer(
            definition, end_of_text=end, vocab_size=size, ends=ends, first=first, chat=settings.chat
        )
    except ValueError as error:
        raise UsageError(f"{foreign(path)} cannot be used: {foreign(error)}") from None


def _no_end(path: Path, rows: int | None) -> str:
    at = "" if rows is None else f" below the model's {rows:,} rows"
    return f"{foreign(path)} has no end-of-text token ({END_OF_TEXT}){at}"


def _ends(
    special: Mapping[str, int], settings: Settings, declared: Sequence[int], size: int | None
) -> list[int]:
    """The special tokens that end a text: the ``declared`` ids, then the tokenizer's own."""
    own = settings.tokens.get("eos_token", "")
    ids = [*declared, *([special[own]] if own in special else [])]
    known = set(special.values())
    return [i for i in dict.fromkeys(ids) if i in known and (size is None or i < size)]


def _first(
    folder: Path, special: Mapping[str, int], settings: Settings, added: Sequence[int]
) -> tuple[int, ...]:
    """The ids that begin a text: ``add_bos_token`` decides, or the post-processor, which has
    ``added`` them.
    """
    if settings.add_first is None or bool(added) == settings.add_first:
        return tuple(added)
    if not settings.add_first:
        return ()
    token = settings.tokens.get("bos_token", "")
    if not token:
        return ()
    if token not in special:
        raise UsageError(
            f"{foreign(folder / 'tokenizer_config.json')} has add_bos_token true, and its "
            f"bos_token {quoted(token)} must be a special token"
        )
    return (special[token],)


def _adds_first(path: Path, processor: Any) -> tuple[int, ...]:
    """The ids that a post-processor puts before a text; ``UsageError`` if it adds others."""
    match processor:
        case None | {"type": "ByteLevel"}:
            return ()
        case {"type": "Sequence", "processors": [*parts]}:
            return tuple(i for part in parts for i in _adds_first(path, part))
        case {"type": "TemplateProcessing", "single": [*first, {"Sequence": {"id": "A"}}]}:
            specials = processor.get("special_tokens")
            ids: list[int] = []
            for part in first:
                match part, specials:
                    case {"SpecialToken": {"id": str() as name}}, {**known}:
                        entry = known.get(name)
                        found = entry.get("ids") if isinstance(entry, dict) else None
                        if isinstance(found, list) and all(type(i) is int for i in found):
                            ids += found
                            continue
                raise UsageError(f"{foreign(path)} has {quoted(part)} in its post_processor")
            return tuple(ids)
    raise UsageError(
        f"{foreign(path)} has the post_processor {quoted(processor)}, which could add tokens after "
        "a text; this is not supported"
    )


def _characters(path: Path, vocab: dict[str, int], others: dict[str, int]) -> CharTokenizer:
    """The character tokenizer that this project exported."""
    unknown = {UNKNOWN: vocab[UNKNOWN]} if UNKNOWN in vocab else {}
    tokenizer = CharTokenizer((token for token in vocab if len(token) == 1), unknown=bool(unknown))
    if {c: i for i, c in enumerate(tokenizer.characters)} | unknown != vocab:
        raise UsageError(
            f"{foreign(path)} has no pre_tokenizer, and its vocabulary is not one of characters"
        )
    if sorted(others.values()) != sorted(tokenizer.special.values()):
        raise UsageError(
            f"{foreign(path)} has the added_tokens {quoted(others)}, and must have only "
            f"end-of-text, with the id {tokenizer.end_of_text}, and {UNKNOWN} after it, if at all"
        )
    return tokenizer


def _ids(path: Path, name: str, value: object) -> dict[str, int]:
    """A field that maps tokens to ids."""
    if not isinstance(value, dict) or not all(type(i) is int for i in value.values()):
        raise UsageError(f"{foreign(path)} lacks an id for a token in {name}")
    return value


def pairs_of(path: Path, merges: object) -> list[tuple[str, str]]:
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


def byte_pair(
    path: Path,
    vocab: dict[str, int],
    merges: list[tuple[str, str]],
    *,
    special: dict[str, int],
    added: dict[str, int],
    end_of_text: Sequence[int],
    rows: int | None,
    settings: Settings,
    first: Sequence[int] = (),
    pattern: str = "gpt2",
    normalisation: str = "",
) -> GPT2Tokenizer:
    """The tokenizer of a byte-level vocabulary, which tiktoken computes.

    The file at ``path`` has the tokens ``vocab``, spelled with :func:`byte_characters`. Raises
    ``OtherEngineError`` if tiktoken would not give the same ids, and ``UsageError`` if the
    vocabulary is broken.
    """
    where = foreign(path)
    bytes_of = {character: byte for byte, character in byte_characters().items()}
    named = special | added
    if END_OF_TEXT in vocab and END_OF_TEXT not in named:
        special = special | {END_OF_TEXT: vocab[END_OF_TEXT]}
        named |= special
    # An added token that merges can also make stays in the vocabulary.
    made = [a + b for a, b in merges]
    can_make = set(made)
    spelled = sorted((i, t) for t, i in vocab.items() if t not in named or t in can_make)
    if not spelled:
        raise UsageError(f"{where} has an empty vocabulary")
    if not {part for pair in merges for part in pair} <= {token for _, token in spelled}:
        raise UsageError(f"{where} has merges of parts that are not tokens")
    first_id, tokens = spelled[0][0], [token for _, token in spelled]
    if [i for i, _ in spelled] != list(range(first_id, first_id + len(spelled))):
        raise OtherEngineError(f"{where} has gaps in its ids; this is not supported")
    n = sum(token in bytes_of for token in tokens)
    if set(tokens[:n]) - bytes_of.keys() or made != tokens[n:]:
        raise OtherEngineError(
            f"{where} has merges in another order than its ids; this is not supported"
        )
    beyond = {t for t, i in named.items() if t not in can_make and rows is not None and i >= rows}
    apart = [i for token, i in named.items() if token not in can_make and token not in beyond]
    if not set("".join(tokens)) <= bytes_of.keys():
        raise OtherEngineError(f"{where} has a token that is not one of bytes")
    ids = sorted([*apart, *range(first_id, first_id + len(tokens))])
    if len(set(ids)) < len(ids):
        raise UsageError(f"{where} has two tokens with one id")
    if ids != list(range(len(ids))):
        raise OtherEngineError(f"{where} has gaps in its ids; this is not supported")
    missing = {token: i for token, i in added.items() if token in beyond}
    special, added = (
        {token: i for token, i in group.items() if token not in beyond}
        for group in (special, added)
    )
    ends = _ends(special, settings, end_of_text, rows)
    end = next(iter(ends), special.get(END_OF_TEXT))
    if end is None:
        raise UsageError(_no_end(path, rows if beyond else None))
    ranks = [bytes(bytes_of[character] for character in token) for token in tokens]
    return GPT2Tokenizer(
        ranks,
        first_id=first_id,
        special=special,
        added=added,
        missing=missing,
        end_of_text=end,
        ends=ends,
        pattern=pattern,
        normalisation=normalisation,
        first=first,
        chat=settings.chat,
    )


def byte_level_definition(
    vocab: Mapping[str, int],
    merges: Sequence[Sequence[str]],
    *,
    added_tokens: Sequence[Mapping[str, Any]] = (),
    before: Mapping[str, Any] | None,
    decoder: Mapping[str, Any] | None = None,
    ignore_merges: bool = False,
    **others: Any,
) -> dict[str, Any]:
    """The content of the ``tokenizer.json`` of a vocabulary. ``others`` are further fields of it,
    such as ``normalizer``.
    """
    model: dict[str, Any] = dict.fromkeys(
        ("dropout", "unk_token", "continuing_subword_prefix", "end_of_word_suffix")
    )
    model |= {"fuse_unk": False, "byte_fallback": False, "ignore_merges": ignore_merges}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": list(added_tokens),
        "normalizer": None,
        "pre_tokenizer": before,
        "post_processor": None,
        "decoder": decoder or byte_level(use_regex=True),
        **others,
        "model": {"type": "BPE", **model, "vocab": vocab, "merges": merges},
    }


def added_entries(
    special: Mapping[str, int], added: Mapping[str, int], *, kept: int | None = None
) -> list[dict[str, Any]]:
    """The ``added_tokens`` of a ``tokenizer.json``, those with ids below ``kept``."""
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    entries = [(i, token, True) for token, i in special.items()]
    entries += [(i, token, False) for token, i in added.items()]
    return [
        {"id": i, "content": token, **flags, "special": is_special}
        for i, token, is_special in sorted(entries)
        if kept is None or i < kept
    ]


def merged_from(token: str, vocab: Mapping[str, int]) -> list[str]:
    """The two parts that ``token`` is merged from: the result of all merges before its own."""
    own = vocab[token]
    parts = list(token)
    while len(parts) > 2:
        ranks = [vocab.get(a + b, own) for a, b in itertools.pairwise(parts)]
        best = min(range(len(ranks)), key=ranks.__getitem__)
        parts[best : best + 2] = [parts[best] + parts[best + 1]]
    return parts
