r"""Split a text twice as fast: mark where white space is cut, and then need no look-ahead.

Of several white-space characters before a word, the last one belongs to the word's piece. A pattern
says that with ``\s+(?!\S)``, and for a look-ahead tiktoken's engine has to backtrack. Here the
place is marked before, by a character that the text does not have. Without look-ahead and
possessive quantifiers an expression is a finite automaton, which reads a text 2.4 times as fast.
"""

import numpy as np
from numpy.typing import ArrayLike, NDArray

from gpt.data.patterns import LINE_ENDS_ARE_CUT, MARK, MARKED_PATTERNS

_WHITE_SPACE = "\t\n\v\f\r \x85\xa0\u1680\u2028\u2029\u202f\u205f\u3000" + "".join(
    map(chr, range(0x2000, 0x200B))
)
# A table of all characters up to the last white space, and one more for those above.
_IS_SPACE = np.zeros(0x3002, bool)
_IS_SPACE[[ord(character) for character in _WHITE_SPACE]] = True
_IS_LINE_END = np.zeros_like(_IS_SPACE)
_IS_LINE_END[[ord("\r"), ord("\n")]] = True


def can_mark(pattern: str, text: str) -> bool:
    """Whether the pattern has a spelling in ``MARKED_PATTERNS``, and the text no ``MARK``."""
    return pattern in MARKED_PATTERNS and MARK not in text


def marked(pattern: str, text: str, uncut: ArrayLike = ()) -> str:
    """``text`` with a ``MARK`` at each place where ``pattern`` cuts white space by looking ahead.
    None is put directly before the character before each offset of ``uncut``: there a document
    ends.
    """
    encoding = "ascii" if text.isascii() else "utf-32-le"
    codes: NDArray[np.uint8] | NDArray[np.uint32] = np.frombuffer(
        text.encode(encoding), np.uint8 if encoding == "ascii" else "<u4"
    )
    kinds = codes if text.isascii() else np.minimum(codes, len(_IS_SPACE) - 1)
    space = _IS_SPACE[kinds]
    last = np.zeros(len(codes), bool)
    last[1:-1] = space[:-2] & space[1:-1] & ~space[2:]
    if pattern not in LINE_ENDS_ARE_CUT:
        last &= ~_IS_LINE_END[kinds]
    last[np.asarray(uncut, np.int64) - 1] = False
    places = np.flatnonzero(last)
    if not len(places):
        return text
    return np.insert(codes, places, ord(MARK)).tobytes().decode(encoding)
