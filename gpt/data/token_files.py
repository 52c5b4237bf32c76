"""Other projects' files of GPT-2's token ids, read in place.

nanoGPT's are bare ids of 16 bits. llm.c's and modded-nanogpt's have a header of 256 numbers of 32
bits before them: magic, version, and how many ids follow. A file is validation data if its name
has the word ``val`` or ``validation``, and training data otherwise.
"""

import hashlib
import re
from pathlib import Path

import numpy as np

from gpt.config import UsageError, foreign, quoted
from gpt.data.shards import MAGIC, Shard, Shards, mapped
from gpt.files import check_regular, unreadable

HEADER = 256 * 4
MAGICS = {20240520: 1}
"""Of the header's first number, the version that is read: llm.c's files of GPT-2's ids."""
LLAMA3_MAGIC = 20240801
"""Of llm.c's files of Llama 3's ids."""
_VALIDATION = re.compile(r"(?<![a-z])val(idation)?(?![a-z])", re.IGNORECASE)
_BLOCK = 1 << 24


def token_files(source: str) -> list[Path]:
    """The ``.bin`` files that ``source`` is, contains, or matches, sorted; none if it is a text, or
    a folder that has other files too.
    """
    try:
        path = Path(source).expanduser()
        if path.is_dir():
            found = sorted(p for p in path.iterdir() if not p.name.startswith("."))
            if any(p.suffix != ".bin" and p.name != "meta.pkl" for p in found):
                return []
            found = [p for p in found if p.suffix == ".bin"]
        elif path.suffix == ".bin":
            found = [path] if path.is_file() else sorted(path.parent.glob(path.name))
        else:
            found = []
    except (OSError, RuntimeError, ValueError):
        return []
    return [] if any(_is_own(path) for path in found) else found


def is_token_files(source: str) -> bool:
    """Whether ``source`` names such files."""
    return bool(token_files(source))


def read_token_files(source: str, *, vocab_size: int) -> tuple[Shards, Shards]:
    """The training and validation ids of ``source``, memory-mapped. Each file is read once.

    ``UsageError`` for a file that is truncated or has ids of another vocabulary, and if one of the
    two parts is missing.
    """
    files = token_files(source)
    folder = files[0].parent
    if (folder / "meta.pkl").exists():
        raise UsageError(
            f"{foreign(folder)} has a vocabulary of its own in meta.pkl, and a pickle is never "
            "read, because it can run code; prepare the text itself"
        )
    parts: dict[bool, list[Shard]] = {False: [], True: []}
    for path in files:
        parts[bool(_VALIDATION.search(path.name))].append(_opened(path, vocab_size))
    for name, part in (("train", parts[False]), ("val", parts[True])):
        if not part:
            raise UsageError(
                f"{quoted(source)} has no .bin file for {name}; training needs files of both "
                "parts, and those for validation have the word val in their names"
            )
    digest = hashlib.sha256(b"".join(part.corpus for part in parts[False])).digest()
    train, validation = (Shards(folder, parts[is_val], digest) for is_val in (False, True))
    return train, validation


def _is_own(path: Path) -> bool:
    try:
        with path.open("rb") as file:
            return file.read(len(MAGIC)) == MAGIC
    except OSError:
        return False


def _opened(path: Path, vocab_size: int) -> Shard:
    shown = foreign(path)
    check_regular(path, "the token file")
    try:
        size = path.stat().st_size
        header = np.fromfile(path, "<i4", 3)
        begin = 0
        if len(header) == 3 and int(header[0]) == LLAMA3_MAGIC:
            raise UsageError(
                f"{shown} is a file of llm.c with Llama 3's ids, and only GPT-2's are read in "
                "place; prepare the text itself with Llama 3's tokenizer"
            )
        if len(header) == 3 and int(header[0]) in MAGICS:
            begin, version = HEADER, MAGICS[int(header[0])]
            if header[1] != version:
                raise UsageError(f"{shown} has version {header[1]}, and must have {version}")
            if size != HEADER + 2 * int(header[2]):
                raise UsageError(
                    f"{shown} is truncated: it has {size:,} bytes and should have "
                    f"{HEADER + 2 * int(header[2]):,}"
                )
        elif size % 2 or not size:
            raise UsageError(f"{shown} has {size:,} bytes, which are not ids of 16 bits")
        ids, memory = np.zeros(0, "<u2"), None
        if size > begin:
            ids, memory = mapped(path, ids.dtype, (size - begin) // 2, begin)
    except OSError as error:
        raise unreadable(path, "the token file", error) from None
    digest = hashlib.sha256(f"{path.name} {size}".encode(errors="surrogatepass"))
    for start in range(0, len(ids), _BLOCK):
        block = ids[start : start + _BLOCK]
        if block.max() >= vocab_size:
            first = int((block >= vocab_size).argmax())
            raise UsageError(
                f"{shown} has the id {block[first]:,} at index {start + first:,}, and GPT-2's are "
                f"below {vocab_size:,}: it is not a file of GPT-2's ids"
            )
        digest.update(block.tobytes())
    shard = Shard(path, ids, digest.digest(), memory)
    shard.release()
    return shard
