"""Text from a pipe. It is copied into the cache, and then treated like any other file.

A pipe can be read once. A text is read more often: to hash and count it, to encode it, and again
when a run is resumed. The copy's name is a hash of its contents, so a text that is piped
twice has one copy.
"""

import contextlib
import dataclasses
import hashlib
import os
import re
import secrets
import stat
from collections.abc import Iterator
from pathlib import Path

from gpt.config import DataConfig, UsageError, foreign
from gpt.files import unwritable

_COPY = re.compile(r"piped-[0-9a-f]{12}\.txt")
_BLOCK = 1 << 20


def is_piped(config: DataConfig) -> bool:
    """Whether the source is a pipe or the copy of a pipe."""
    return config.descriptor is not None or is_copy(Path(config.source))


def is_copy(path: Path) -> bool:
    """Whether ``path`` has the name of a copy that :func:`keep` makes."""
    return _COPY.fullmatch(path.name) is not None


def keep(config: DataConfig, cache_dir: Path) -> DataConfig:
    """``config`` with a file as its source. A pipe is copied into ``cache_dir``.

    If ``config`` names a copy that no longer exists, the copy in ``cache_dir`` is used instead: the
    folder may have been moved with its run. ``UsageError`` for a pipe that cannot be read or
    copied.
    """
    path = Path(config.source)
    if config.descriptor is not None:
        path = copy(config.descriptor, cache_dir, f"data.source {config.source}")
    elif is_copy(path) and not path.exists() and (cache_dir / path.name).exists():
        path = cache_dir / path.name
    else:
        return config
    return dataclasses.replace(config, source=str(path))


def copy(descriptor: int, cache_dir: Path, what: str) -> Path:
    """Copy the whole pipe ``descriptor`` into a file in ``cache_dir``. ``what`` names the pipe in a
    ``UsageError``.
    """
    blocks, digest = _blocks(descriptor, what), hashlib.sha256()
    work = cache_dir / f".piped-{secrets.token_hex(8)}.new"
    try:
        cache_dir.mkdir(parents=True, exist_ok=True)
        with work.open("xb") as file:
            for block in blocks:
                digest.update(block)
                file.write(block)
            if not file.tell():
                raise UsageError(f"{what} is empty")
            file.flush()
            os.fsync(file.fileno())
        path = cache_dir / f"piped-{digest.hexdigest()[:12]}.txt"
        work.replace(path)
    except OSError as error:
        raise unwritable(cache_dir, error) from None
    finally:
        with contextlib.suppress(OSError):
            work.unlink()
    return path


def _blocks(descriptor: int, what: str) -> Iterator[bytes]:
    try:
        mode = os.fstat(descriptor).st_mode
        if not (stat.S_ISFIFO(mode) or stat.S_ISSOCK(mode) or stat.S_ISREG(mode)):
            raise UsageError(f"{what} is a terminal or a device, and must be a pipe or a file")
        os.set_blocking(descriptor, True)
        while block := os.read(descriptor, _BLOCK):
            yield block
    except OSError as error:
        raise UsageError(f"{what} cannot be read: {foreign(error.strerror)}") from None
