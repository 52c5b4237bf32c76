r"""Split a text twice as fast: mark where white space is cut, and then need no look-ahead.

Of several white-space characters before a word, the last one belongs to the word's piece. A pattern
says that with ``\s+(?!\S)``, and for a look-ahead tiktoken's engine has to backtrack. Here the
place is marked before, by a character that the text does not have. Without look-ahead and
possessive quantifiers an expression is a finite automaton, which reads a text 2.4 times as fast.
"""

import numpy as np
from numpy.typing import ArrayLike, NDArray

from gpt.data.patterns import LINE_ENDS_ARE_CUT, MARK, MARKED_PATTERNS

_ABOVE_ASCII = "\x85\xa0\u1680\u2028\u2029\u202f\u205f\u3000" + "".join(
    map(chr, range(0x2000, 0x200B))
)
Codes = NDArray[np.uint8] | NDArray[np.uint32]


def can_mark(pattern: str, text: str) -> bool:
    """Whether the pattern has a spelling in ``MARKED_PATTERNS``, and the text no ``MARK``."""
    return pattern in MARKED_PATTERNS and MARK not in text


def marked(pattern: str, text: str, uncut: ArrayLike = ()) -> str:
    """``text`` with a ``MARK`` at each place where ``pattern`` cuts white space by looking ahead.
    None is put directly before the character before each offset of ``uncut``: there a document
    ends.
    """
    encoding, kind = ("ascii", "u1") if text.isascii() else ("utf-32-le", "<u4")
    codes: Codes = np.frombuffer(text.encode(encoding), kind)
    space = is_space(codes)
    last = np.zeros(len(codes), bool)
    last[1:-1] = space[:-2] & space[1:-1] & ~space[2:]
    last[np.asarray(uncut, np.int64) - 1] = False
    places = np.flatnonzero(last)
    if pattern not in LINE_ENDS_ARE_CUT:
        places = places[~np.isin(codes[places], (ord("\r"), ord("\n")))]
    if not len(places):
        return text
    return np.insert(codes, places, ord(MARK)).tobytes().decode(encoding)


def is_space(codes: Codes) -> NDArray[np.bool_]:
    """Which characters are white space in Unicode, ``[n]``."""
    first = codes.dtype.type(ord("\t"))
    space: NDArray[np.bool_] = (codes == ord(" ")) | (codes - first < 5)  # below 0 wraps around
    if codes.dtype != np.uint8:
        above = np.flatnonzero(codes > 0x7F)
        space[above] = np.isin(codes[above], [ord(character) for character in _ABOVE_ASCII])
    return space
