"""Read the files of a tokenizer: ``tokenizer.json``, or ``vocab.json`` and ``merges.txt``.

The ids are those of Hugging Face's fast tokenizers, whichever engine computes them
(:mod:`gpt.interop.engines`).
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from gpt.config import UsageError, foreign, quoted
from gpt.data.byte_pair import GPT2Tokenizer
from gpt.data.tokenizer import CharTokenizer, Tokenizer
from gpt.data.words import UNKNOWN
from gpt.files import read_object, read_text
from gpt.interop.engines import OtherEngineError, byte_pair, library_tokenizer, pairs_of
from gpt.interop.patterns import pattern_of_steps
from gpt.interop.tokenizer_settings import (
    WHAT,
    Settings,
    added_tokens,
    object_in,
    read_settings,
)


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
