r"""The patterns that split a text into pieces before bytes are merged, as regular expressions.

No merge crosses the border of a piece. Each pattern has two spellings with the same pieces: one for
tiktoken (its possessive quantifiers, such as ``++``, keep long runs of one character fast), and the
steps of the ``pre_tokenizer`` in Hugging Face's ``tokenizer.json``.

No piece has a space, or a line feed after a letter or a digit, behind its first character that is
not white space. So a text that is cut at such a place has the ids of the whole.
"""

from typing import Any

_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_PREFIX = r"[^\r\n\p{L}\p{N}]?"
_END = r"|\s*[\r\n]|\s++$|\s+(?!\S)|\s"
_END_STEP = r"|\s*[\r\n]+|\s+(?!\S)|\s+"

_WORDS = r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|%s| ?[^\s\p{L}\p{N}]++[\r\n]*+"
_WORDS_STEP = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|%s| ?[^\s\p{L}\p{N}]+[\r\n]*"
_CASES = rf"{_PREFIX}{_UPPER}*{_LOWER}+%s|{_PREFIX}{_UPPER}+{_LOWER}*%s"
_CONTRACTION = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
_O200K = (
    _CASES % (_CONTRACTION, _CONTRACTION) + r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
_BLOOM = r"(\s|.,!?\u2026\u3002\uff0c\u3001\u0964\u06d4\u060c)"

_ONLY_LETTERS = r"[\p{L}&&[^\p{Han}]]"
_ONLY_DIGITS = r"[\p{N}&&[^\p{Han}]]"
_NEITHER = r"\p{L}\p{N}\p{Han}"

PATTERNS = {
    "gpt2": r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s",
    # Each digit by itself, then GPT-2's: white space before a digit is at the end of a text.
    "smollm": r"'(?:[sdmt]|ll|ve|re)|\p{N}| ?\p{L}++| ?[^\s\p{L}\p{N}]++|\s++$"
    r"|\s+(?![^\s\p{N}])|\s",
    "llama3": _WORDS % r"\p{N}{1,3}+" + _END,
    "cl100k": _WORDS % r"\p{N}{1,3}+" + _END,
    # tiktoken's own: all white space at the end of a text is one piece, and not only up to its
    # last line feed.
    "cl100k_base": _WORDS % r"\p{N}{1,3}+" + r"|\s++$|\s*[\r\n]|\s+(?!\S)|\s",
    "qwen2": _WORDS % r"\p{N}" + _END,
    "tekken": _CASES % ("", "") + r"|\p{N}| ?[^\s\p{L}\p{N}]++[\r\n/]*+" + _END,
    "o200k": _O200K,
    # Words, and the runs between them.
    "bloom": f" ?[^{_BLOOM}]++|(?:(?! [^{_BLOOM}])[{_BLOOM}])+",
    "chinese": r" ?\p{Han}++|\u3000++|'(?i:[sdmt]|ll|ve|re)"
    rf"|[^\r\n{_NEITHER}]?+{_ONLY_LETTERS}++|{_ONLY_DIGITS}{{1,3}}+"
    rf"| ?[^\s{_NEITHER}]++[\r\n]*+" + _END,
    "code": r"\s*[\r\n]++[ \t]*+|" + _CASES % ("", "") + r"|\p{N}| ?[^\s\p{L}\p{N}]++|\s++$"
    r"|\s+(?!\S)|\s",
}
"""Regular expressions in tiktoken's syntax. Each gives the pieces of the released tokenizer that it
is named for: Llama 3's, GPT-4's (``cl100k``), GPT-4o's (``o200k``), Qwen 2's and 3's, SmolLM's,
Mistral Nemo's (``tekken``), BLOOM's. Two are for texts that these split badly:

- ``chinese``: GPT-4's, with each run of Chinese characters apart from letters and punctuation, as
  Kimi K2 and DeepSeek V3 have it. GPT-4's joins a mark to the phrase after it, and so has tokens
  for the same word after a comma, after a full stop and after neither. It needs 1 to 2% fewer
  tokens for that. The spaces that begin a paragraph (U+3000) are one piece.
- ``code``: identifiers are split where the case changes (``readLine``) and at ``_``, as in GPT-4o's
  and Mistral Nemo's. Each digit is a piece, as in StarCoder's. A line's end and the indentation of
  the next line are one piece, so they can be one token, and the first word of a line is the same
  token at every depth.
"""

MARK = "\0"
_MARKED_WORDS = (
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}\x00]?\p{L}+|%s| ?[^\s\p{L}\p{N}\x00]+[\r\n]*"
    r"|\s*[\r\n]|\s+|\x00"
)
MARKED_PATTERNS = {
    "gpt2": r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}\x00]+|\s+|\x00",
    "llama3": _MARKED_WORDS % r"\p{N}{1,3}",
    "cl100k": _MARKED_WORDS % r"\p{N}{1,3}",
    "qwen2": _MARKED_WORDS % r"\p{N}",
}
"""The same pieces without look-ahead, for a text that has a ``MARK`` before the last white-space
character of each run before a word (``gpt.data.marks``). Each mark is a piece of its own.
"""
LINE_ENDS_ARE_CUT = frozenset({"gpt2"})
"""Patterns in which a line's end before a word is cut from the white space before it."""

Step = tuple[str, str | bool]
_BYTES: Step = ("ByteLevel", False)
"""The bytes of each piece, which is not split again."""
STEPS: dict[str, tuple[Step, ...]] = {
    "gpt2": (("ByteLevel", True),),
    "smollm": (("Digits", True), ("ByteLevel", True)),
    "llama3": (("Split", _WORDS_STEP % r"\p{N}{1,3}" + _END_STEP), _BYTES),
    "cl100k": (("Split", _WORDS_STEP % r"\p{N}{1,3}" + _END_STEP), _BYTES),
    "cl100k_base": (("Split", _WORDS_STEP % r"\p{N}{1,3}" + r"|\s+\z" + _END_STEP), _BYTES),
    "qwen2": (("Split", _WORDS_STEP % r"\p{N}" + _END_STEP), _BYTES),
    "tekken": (
        ("Split", _CASES % ("", "") + r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*" + _END_STEP),
        _BYTES,
    ),
    "o200k": (("Split", _O200K), _BYTES),
    "bloom": (
        ("Split", r" ?[^(\s|[.,!?" + "\u2026\u3002\uff0c\u3001\u0964\u06d4\u060c" + "])]+"),
        _BYTES,
    ),
    "chinese": (
        (
            "Split",
            " ?\\p{Han}+|\u3000+|(?i:'s|'t|'re|'ve|'m|'ll|'d)"
            rf"|[^\r\n{_NEITHER}]?{_ONLY_LETTERS}+|{_ONLY_DIGITS}{{1,3}}"
            rf"| ?[^\s{_NEITHER}]+[\r\n]*" + _END_STEP,
        ),
        _BYTES,
    ),
    "code": (
        (
            "Split",
            r"\s*[\r\n]+[ \t]*|" + _CASES % ("", "") + r"|\p{N}| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
        ),
        _BYTES,
    ),
}
"""The steps of each pattern in ``tokenizer.json``."""


def steps_of(pattern: str) -> dict[str, Any]:
    """The ``pre_tokenizer`` of a pattern."""
    parts: list[dict[str, Any]] = []
    for step in STEPS[pattern]:
        match step:
            case ("ByteLevel", bool() as splits):
                parts.append(byte_level(use_regex=splits))
            case ("Digits", _):
                parts.append({"type": "Digits", "individual_digits": True})
            case (_, expression):
                split = {"type": "Split", "pattern": {"Regex": expression}}
                parts.append(split | {"behavior": "Isolated", "invert": False})
    return parts[0] if len(parts) == 1 else {"type": "Sequence", "pretokenizers": parts}


def byte_level(*, use_regex: bool) -> dict[str, Any]:
    """The step that writes bytes as printable characters."""
    return {
        "type": "ByteLevel",
        "add_prefix_space": False,
        "trim_offsets": True,
        "use_regex": use_regex,
    }
