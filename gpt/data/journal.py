"""How far a preparation has come: a line of JSON for each step that is on the disk.

The first line describes the work, so that it is not continued as another. Each line begins with the
CRC-32 of the rest; a line that was not written whole does not count.
"""

import json
import os
import zlib
from pathlib import Path
from typing import Any, Self

from gpt.config import UsageError, foreign
from gpt.files import read_text, unwritable


class Journal:
    """The journal at ``path`` of the ``work``, which is continued if it is there.

    ``UsageError`` if the journal is that of other work.
    """

    def __init__(self, path: Path, work: dict[str, Any]) -> None:
        self.path = path
        found = self._read() if path.exists() else []
        self.last: dict[str, Any] | None = found[-1] if len(found) > 1 else None
        """The last step, if there is one."""
        if found and found[0] != work:
            changed = sorted(k for k in work | found[0] if work.get(k) != found[0].get(k))
            raise UsageError(
                f"{foreign(path.parent)} has an unfinished preparation of other data or settings "
                f"({foreign(', '.join(changed))}); delete the folder, or name a new one"
            )
        new = path.with_name(f".{path.name}.new")  # so that a failure here loses nothing
        try:
            self._file = new.open("w", encoding="utf-8", newline="")
        except OSError as error:
            raise unwritable(path, error) from None
        try:
            for line in [work, *([self.last] if self.last else [])]:
                self.write(line)
            new.replace(path)
        except BaseException as error:
            self._file.close()
            if isinstance(error, OSError):
                raise unwritable(path, error) from None
            raise

    def _read(self) -> list[dict[str, Any]]:
        lines = []
        for line in read_text(self.path, "the journal").split("\n"):
            checksum, _, content = line.partition(" ")
            if checksum != f"{zlib.crc32(content.encode()):08x}":
                break
            lines.append(json.loads(content))
        return lines

    def write(self, step: dict[str, Any]) -> None:
        """Add a step, and wait until it is on the disk."""
        content = json.dumps(step, sort_keys=True)
        try:
            self._file.write(f"{zlib.crc32(content.encode()):08x} {content}\n")
            self._file.flush()
            os.fsync(self._file.fileno())
        except OSError as error:
            raise unwritable(self.path, error) from None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self._file.close()
