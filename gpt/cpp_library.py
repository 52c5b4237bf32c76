"""Compile the package's C++ files at their first use, and store the libraries.

The machine's C++ compiler (``CXX``, or c++) needs two seconds for each file. The libraries stay in
the user's cache folder, where only the user can write.
"""

import ctypes
import hashlib
import os
import platform
import shlex
import shutil
import stat
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path

from gpt.config import UsageError, foreign
from gpt.device import cpu_limit

HEADER = Path(__file__).parent / "vectors.h"
"""The file that all sources include."""
FLAGS = (
    *("-std=c++17", "-O3", "-fopenmp", "-shared", "-fPIC"),
    # Not -ffast-math: NaN stays NaN, and the order of a sum does not depend on the number of rows.
    *("-fno-math-errno", "-fno-trapping-math", "-fno-signed-zeros"),
)
TARGETS = {None: "native", "avx2": "x86-64-v3", "default": "x86-64"}
"""The compiler's ``-march`` for each :func:`gpt.device.cpu_limit`, on x86."""
OTHERS = stat.S_IWGRP | stat.S_IWOTH
"""The bits of a file's mode that let users other than its owner write."""


def load(source: Path) -> ctypes.CDLL:
    """Load the functions of ``source`` from the cache folder, or compile them and store them there
    if the folder is safe. ``UsageError`` or ``OSError`` if neither works.
    """
    words, key = command(source)
    name, folder = f"{source.stem}-{key}", _folder()
    for kept in folder.glob(f"{name}-*.so") if folder else ():
        if _is_whole(kept):
            return ctypes.CDLL(str(kept))
    with tempfile.TemporaryDirectory(prefix="gpt-kernels-") as work:
        made = Path(work) / "library.so"
        done = subprocess.run(
            [*words, "-o", str(made), str(source)],
            capture_output=True,
            text=True,
            errors="replace",
        )
        if done.returncode:
            said = (done.stderr.strip().splitlines() or ["no message"])[0]
            raise UsageError(f"{words[0]} cannot compile {source.name}: {foreign(said)}")
        kept_file = _keep(made, folder, name) if folder else None
        # a loaded library works after its file is removed
        return ctypes.CDLL(str(kept_file or made))


def attempt(load: Callable[[], ctypes.CDLL]) -> tuple[ctypes.CDLL | None, str | None]:
    """The library that ``load`` returns; or ``None`` and a sentence that says why there is none."""
    try:
        return load(), None
    except (UsageError, OSError) as error:
        return None, foreign(error)


def compiler() -> list[str]:
    """The C++ compiler and its options, from ``CXX`` or c++; ``UsageError`` without one."""
    try:
        words = shlex.split(os.environ.get("CXX", "")) or ["c++"]
    except ValueError as error:
        raise UsageError(f"CXX is {foreign(os.environ['CXX'])!r}: {error}") from None
    found = shutil.which(words[0])
    if found is None:
        raise UsageError(f"there is no C++ compiler '{foreign(words[0])}'; CXX can name one")
    return [found, *words[1:]]


def command(source: Path) -> tuple[list[str], str]:
    """The compiler's command without file names, and the key of the library that it makes of
    ``source``.
    """
    is_x86 = platform.machine().lower() in ("x86_64", "amd64")
    march = f"-march={TARGETS[cpu_limit()] if is_x86 else 'native'}"
    words = [*compiler(), *FLAGS, march]
    key = hashlib.sha256(source.read_bytes() + HEADER.read_bytes())
    key.update(repr((words, platform.machine(), _processor())).encode())
    return words, key.hexdigest()[:16]


def _folder() -> Path | None:
    """The folder of compiled kernels, where only the user can write; ``None`` if it cannot be made
    or is not safe.
    """
    try:
        cache = Path(os.environ.get("XDG_CACHE_HOME", ""))
        folder = (cache if cache.is_absolute() else Path.home() / ".cache") / "gpt"
        if not folder.is_absolute():
            return None
        for path in (folder.parent, folder):
            path.mkdir(mode=0o700, parents=True, exist_ok=True)
        above, status = folder.parent.stat().st_mode, folder.lstat()
        may_be_swapped = above & stat.S_IWOTH and not above & stat.S_ISVTX
        if may_be_swapped or not stat.S_ISDIR(status.st_mode) or status.st_uid != os.getuid():
            return None
        if status.st_mode & OTHERS:  # others may have written its files
            folder.chmod(0o700)
            for kept in folder.glob("*.so"):
                kept.unlink()
    except (OSError, RuntimeError):  # RuntimeError: no home folder
        return None
    return folder


def _is_whole(kept: Path) -> bool:
    """Whether the file belongs to the user, is not a link, and has the hash in its name."""
    try:
        status = kept.lstat()
        if status.st_uid != os.getuid() or status.st_mode & OTHERS:
            return False
        return stat.S_ISREG(status.st_mode) and kept.stem.endswith(_hash(kept.read_bytes()))
    except OSError:
        return False


def _hash(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _keep(made: Path, folder: Path, name: str) -> Path | None:
    """Copy the file into the folder, and flush the copy before it gets its name. ``None`` if
    writing fails.
    """
    data = made.read_bytes()
    path = folder / f"{name}-{_hash(data)}.so"
    try:
        # private, of an unpredictable name, and new
        with tempfile.NamedTemporaryFile(dir=folder, suffix=".new", delete=False) as file:
            try:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
                Path(file.name).replace(path)
            except BaseException:
                Path(file.name).unlink(missing_ok=True)
                raise
    except OSError:
        return None
    return path


def _processor() -> str:
    """The processor's features, on which ``native`` depends: machines may share a home folder."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line for line in lines if line.startswith(("flags", "Features"))), "")
