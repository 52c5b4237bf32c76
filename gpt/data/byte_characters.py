"""The printable characters by which byte-level vocabularies spell bytes in their files."""

import json
from functools import cache


@cache
def byte_characters() -> dict[int, str]:
    """The printable character for each byte in the files of byte-level vocabularies."""
    printable = [b for b in range(256) if chr(b).isprintable() and chr(b) != " "]
    others = [b for b in range(256) if b not in printable]
    return {b: chr(b) for b in printable} | {b: chr(256 + i) for i, b in enumerate(others)}


@cache
def bytes_of_characters() -> dict[str, int]:
    """The byte for each of these characters."""
    return {character: byte for byte, character in byte_characters().items()}


def ranks_of(encoder: bytes) -> list[bytes]:
    """The byte strings of a GPT-2 ``encoder.json`` in the order of their ids, without special
    tokens. The spelling is that of https://github.com/openai/gpt-2 (``bytes_to_unicode``).
    """
    ids: dict[str, int] = json.loads(encoder)
    ids.pop("<|endoftext|>", None)
    between = "\uffff"  # no byte's character: all tokens are translated in one call
    codes = {ord(character): byte for character, byte in bytes_of_characters().items()}
    spelled = between.join(sorted(ids, key=ids.__getitem__)).translate(codes)
    return [token.encode("latin-1") for token in spelled.split(between)]
