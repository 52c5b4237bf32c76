"""Files that a user names or the program finds: reading raises ``UsageError`` for a bad file, and
writing is atomic.

A path may name anything: a FIFO that nobody writes to, a device, a link to someone else's file, a
JSON file that is nested 100,000 levels deep. Reading any of these raises ``UsageError``. Writing
never follows a link.
"""

import contextlib
import json
import os
import re
import secrets
import shutil
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from gpt.config import UsageError, foreign

_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")


def check_regular(path: Path, what: str) -> None:
    """``UsageError`` unless ``path`` is a regular file, or a link to one."""
    try:
        mode = path.stat().st_mode
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        raise unreadable(path, what, error) from None
    if not stat.S_ISREG(mode):
        kind = "a folder" if stat.S_ISDIR(mode) else "a pipe or a device"
        raise UsageError(f"{what} {foreign(path)} is {kind}, and must be a file")


def check_output(path: Path, what: str) -> None:
    """``UsageError`` unless ``path`` is a regular file, or can become one in its folder."""
    try:
        path.stat()
    except FileNotFoundError:
        if not path.parent.is_dir():
            parent = foreign(path.parent)
            raise UsageError(
                f"{what} is {foreign(path)}, and the folder {parent} does not exist"
            ) from None
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        reason = error.strerror if isinstance(error, OSError) else error
        raise UsageError(f"{what} {foreign(path)} cannot be written: {reason}") from None
    else:
        check_regular(path, what)


def unreadable(path: Path, what: str, error: Exception) -> UsageError:
    """The error for a file that cannot be read."""
    reason = error.strerror if isinstance(error, OSError) else error
    return UsageError(f"{what} {foreign(path)} cannot be read: {foreign(reason or error)}")


@contextlib.contextmanager
def about(path: Path) -> Iterator[None]:
    """Let a ``UsageError`` about the content of a file begin with its ``path``."""
    try:
        yield
    except UsageError as error:
        raise UsageError(f"{foreign(path)}: {error}") from None


def read_text(path: Path, what: str) -> str:
    """The text of a UTF-8 file without its byte-order mark; line ends are kept. Raises
    ``UsageError``, which calls the file ``what``, for anything else.
    """
    check_regular(path, what)
    try:
        return path.read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise unreadable(path, what, error) from None
    except UnicodeDecodeError as error:
        raise UsageError(
            f"{what} {foreign(path)} is not UTF-8 text: {error.reason} at byte {error.start:,}"
        ) from None


def as_training_text(text: str) -> str:
    """A text as training reads it: without a byte-order mark, and with newlines as line ends."""
    text = text.removeprefix("\ufeff")
    return text.replace("\r\n", "\n").replace("\r", "\n") if "\r" in text else text


def read_json(path: Path, what: str) -> Any:
    """The value in a JSON file; ``UsageError`` if it cannot be read or is not JSON."""
    return parse_json(read_text(path, what), f"{what} {foreign(path)}")


def read_object(path: Path, what: str) -> dict[str, Any]:
    """The object in a JSON file; ``UsageError`` for any other file."""
    value = read_json(path, what)
    if not isinstance(value, dict):
        raise UsageError(f"{what} {foreign(path)} is not a JSON object")
    return value


def parse_json(text: str, what: str) -> Any:
    """The value of a JSON ``text``, which errors call ``what``. Raises ``UsageError`` for invalid
    JSON, for nesting or numbers that Python rejects, and for strings that are not Unicode.
    """
    try:
        value = json.loads(text)
        if "\\u" in text and _SURROGATE.search(text):  # the first is much faster
            json.dumps(value, ensure_ascii=False).encode()
    except json.JSONDecodeError as error:
        line = f"line {error.lineno}, " if "\n" in text else ""
        raise UsageError(f"{what} is not JSON: {error.msg} ({line}column {error.colno})") from None
    except UnicodeEncodeError:
        raise UsageError(f"{what} is not JSON: it contains half of a surrogate pair") from None
    except RecursionError:
        raise UsageError(f"{what} cannot be read: it is nested too deeply") from None
    except ValueError as error:  # a number of thousands of digits
        raise UsageError(f"{what} cannot be read: {foreign(error)}") from None
    return value


def write_atomically(path: Path, text: str) -> None:
    """Replace the file's text atomically, and flush it to disk. A link is replaced, not
    followed.
    """
    work = _beside(path)
    # The name is unpredictable, and the file new and not a link: nobody can redirect the writing.
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_NOFOLLOW", 0)
    descriptor = os.open(work, flags, 0o666)
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8", newline="") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        work.replace(path)
    except BaseException as error:
        with contextlib.suppress(OSError):
            work.unlink()
        if isinstance(error, OSError):  # name the file that the user knows
            raise OSError(error.errno, error.strerror, str(path)) from None
        raise
    flush(path.parent)


@contextlib.contextmanager
def new_folder(out: Path) -> Iterator[Path]:
    """A temporary folder to write in, which is renamed to ``out`` at the end: ``out`` is complete
    or absent. It has the user's umask. ``UsageError`` if ``out`` exists or the disk fails.
    """
    if os.path.lexists(out):
        raise UsageError(f"{foreign(out)} exists already; name a new folder")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        work = _beside(out)
        work.mkdir()
    except OSError as error:
        raise unwritable(out, error) from None
    try:
        yield work
        for path in (*work.rglob("*"), work):
            flush(path)
        work.rename(out)
        flush(out.parent)
    except OSError as error:
        raise unwritable(out, error) from None
    finally:
        shutil.rmtree(work, ignore_errors=True)


@contextlib.contextmanager
def new_file(out: Path) -> Iterator[BinaryIO]:
    """A temporary file to write in, which is renamed to ``out`` at the end: ``out`` is complete or
    absent. It has the user's umask. ``UsageError`` if ``out`` exists or the disk fails.
    """
    if os.path.lexists(out):
        raise UsageError(f"{foreign(out)} exists already; name a new file")
    work = _beside(out)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with work.open("xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        work.rename(out)
        flush(out.parent)
    except OSError as error:
        raise unwritable(out, error) from None
    finally:
        work.unlink(missing_ok=True)


def unwritable(path: Path, error: OSError) -> UsageError:
    """The error for a file or folder that cannot be written."""
    return UsageError(f"{foreign(path)} cannot be written: {foreign(error.strerror or error)}")


def sentence(error: Exception) -> str:
    """The message of an error, after the path if the error is about a file."""
    if isinstance(error, OSError) and error.strerror:
        name = f"{foreign(error.filename)}: " if error.filename is not None else ""
        return f"{name}{error.strerror}"
    return str(error)


def flush(path: Path) -> None:
    """Wait until the file or folder is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _beside(path: Path) -> Path:
    return path.with_name(f".{path.name[:80]}-{secrets.token_hex(8)}.new")
