"""Parameters and layers by the patterns of their names."""

from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase

from gpt.config import UsageError, quoted


def selected(names: Iterable[str], patterns: Sequence[str], what: str) -> list[str]:
    """The names that one of the shell-style ``patterns`` matches: the whole name
    (``blocks.0.attn.*``), or for parts of a block, the name in the block (``attn.*``).

    ``UsageError`` for a pattern that matches nothing; ``what`` is the setting that has it.
    """
    known = list(names)
    found: set[str] = set()
    for pattern in patterns:
        matching = {name for name in known if matches(name, pattern)}
        if not matching:
            shown = ", ".join(dict.fromkeys(map(in_block, known)))
            raise UsageError(
                f"{what} has {quoted(pattern)}, which matches none of the names: {shown}"
            )
        found |= matching
    return [name for name in known if name in found]


def matches(name: str, pattern: str) -> bool:
    """Whether the pattern matches the name, or the name in its block."""
    return fnmatchcase(name, pattern) or fnmatchcase(in_block(name), pattern)


def in_block(name: str) -> str:
    """``attn.qkv`` for ``blocks.0.attn.qkv``; other names as they are."""
    return name.split(".", 2)[2] if name.startswith("blocks.") else name
