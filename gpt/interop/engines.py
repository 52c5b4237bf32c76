"""Make a tokenizer of a vocabulary from a file.

tiktoken computes byte-level vocabularies with a known pattern whose merges are in the order of
their ids (:class:`GPT2Tokenizer`). The library ``tokenizers`` computes all others
(:class:`LibraryTokenizer`).
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from gpt.config import UsageError, foreign, quoted
from gpt.data.byte_characters import bytes_of_characters
from gpt.data.byte_pair import END_OF_TEXT, GPT2Tokenizer
from gpt.data.library_definition import check_definition
from gpt.data.library_tokenizer import LibraryTokenizer
from gpt.interop.tokenizer_settings import Settings, added_tokens


class OtherEngineError(UsageError):
    """A vocabulary that tiktoken cannot express."""


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

    The file at ``path`` has the tokens ``vocab``, in the spelling of byte-level vocabularies.
    Raises ``OtherEngineError`` if tiktoken would not give the same ids, and ``UsageError`` if the
    vocabulary is broken.
    """
    where = foreign(path)
    bytes_of = bytes_of_characters()
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
    spelling = {ord(character): chr(byte) for character, byte in bytes_of.items()}
    ranks = [token.translate(spelling).encode("latin-1") for token in tokens]
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
