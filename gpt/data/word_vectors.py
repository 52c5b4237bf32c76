"""Word vectors in the text formats of GloVe, word2vec and fastText, as rows of an embedding.

A line has a word and its numbers, with spaces between them. word2vec and fastText have a first line
with the count and the width.
"""

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from gpt.config import UsageError, foreign
from gpt.data.tokenizer import Tokenizer
from gpt.files import check_regular, unreadable

Say = Callable[[str], None]


def words_of(tokenizer: Tokenizer) -> dict[str, list[int]]:
    """The tokens that are words, by the word without the space before it. If some tokens begin
    with a space, those without one are mostly parts of words (``ing``), and are left out.
    """
    texts = [
        tokenizer.decode_bytes([i]).decode(errors="replace") for i in range(tokenizer.vocab_size)
    ]
    prefix = " " if any(text[:1] == " " and text[1:].isalpha() for text in texts) else ""
    words: dict[str, list[int]] = {}
    for i, text in enumerate(texts):
        if text.startswith(prefix) and text.strip(" ").isalpha():
            words.setdefault(text.strip(" "), []).append(i)
    return words


def read_vectors(path: Path, words: set[str]) -> dict[str, Tensor]:
    """The vectors of those ``words`` that the file has; a word without any gets that of its
    lower-case form. ``UsageError`` if the file has another format.
    """
    check_regular(path, "embeddings")
    wanted = {form.encode(): form for word in words for form in (word, word.lower())}
    found: dict[str, Tensor] = {}
    width = 0
    try:
        with path.open("rb") as file:
            for number, line in enumerate(file, 1):
                if number == 1:
                    fields = line.split()
                    has_header = len(fields) == 2 and all(field.isdigit() for field in fields)
                    width = int(fields[1]) if has_header else len(fields) - 1
                    if has_header:
                        continue
                first = line.split(maxsplit=1)[:1]  # not all numbers of the words of others
                word = wanted.get(first[0]) if first else None
                if word is None or word in found:
                    continue
                try:
                    row = torch.tensor([float(field) for field in line.split()[1:]])
                except ValueError:
                    row = torch.empty(0)
                if width < 1 or len(row) != width or not row.isfinite().all():
                    raise UsageError(
                        f"embeddings is {foreign(path)}, whose line {number:,} must have a word "
                        f"and {max(width, 1):,} numbers"
                    )
                found[word] = row
    except OSError as error:
        raise unreadable(path, "embeddings", error) from None
    pairs = ((word, found.get(word, found.get(word.lower()))) for word in words)
    return {word: row for word, row in pairs if row is not None}


@torch.no_grad()
def fill_embedding(embedding: Tensor, path: Path, tokenizer: Tokenizer, *, say: Say) -> None:
    """Set the rows ``[V, C]`` of the tokens that are words in the file to its vectors, with the
    standard deviation that all rows had.

    Wider vectors are projected on their first C principal axes, narrower ones embedded by a random
    isometry. ``say`` is told the share of the tokens. ``UsageError`` if there are none.
    """
    words = words_of(tokenizer)
    vectors = read_vectors(path, set(words))
    if not vectors:
        raise UsageError(
            f"embeddings is {foreign(path)}, which has none of the {len(words):,} words among the "
            "tokenizer's tokens"
        )
    order = sorted(vectors)
    rows = projected(torch.stack([vectors[word] for word in order]), embedding.shape[1])
    rows *= embedding.float().std() / rows.std().clamp_min(1e-12)
    ids = [words[word] for word in order]
    for row, own in zip(rows, ids, strict=True):
        embedding[own] = row.to(embedding)
    count = sum(map(len, ids))
    say(
        f"{count:,} of {tokenizer.vocab_size:,} tokens ({count / tokenizer.vocab_size:.1%}) have a "
        f"vector of {foreign(path)}"
    )


def projected(rows: Tensor, width: int) -> Tensor:
    """Vectors ``[N, D]`` as ``[N, width]``; distances stay as near as the width allows."""
    own = rows.shape[1]
    if own == width:
        return rows.clone()
    if own < width:
        axes = torch.randn(width, own, generator=torch.Generator().manual_seed(0))
        wider: Tensor = rows @ torch.linalg.qr(axes).Q.T
        return wider
    centred = (rows - rows.mean(dim=0)).double()
    axes = torch.linalg.eigh(centred.T @ centred).eigenvectors.flip(1)[:, :width]
    narrower: Tensor = (rows.double() @ axes).float()
    return narrower
