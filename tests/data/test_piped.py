import contextlib
import os
import stat
import threading
from pathlib import Path

import pytest

from gpt.config import DataConfig, UsageError
from gpt.data.piped import is_piped, keep
from gpt.data.prepare import prepare

TEXT = b"the cat sat on the mat\r\n" * 9000


@contextlib.contextmanager
def piped(raw):
    """The path of a pipe that gives ``raw``, as a shell's ``<(...)`` makes it."""
    reading, writing = os.pipe()

    def write():
        with contextlib.suppress(BrokenPipeError), open(writing, "wb") as file:  # noqa: PTH123
            file.write(raw)

    thread = threading.Thread(target=write)
    thread.start()
    try:
        yield f"/dev/fd/{reading}"
    finally:
        os.close(reading)
        thread.join()


def test_a_pipe_is_copied_whole_under_a_name_by_its_contents(tmp_path):
    copies = set()
    for raw in (TEXT, TEXT, TEXT + b"!"):
        with piped(raw) as source:
            kept = keep(DataConfig(source=source, tokenizer="byte"), tmp_path / "cache")
        assert Path(kept.source).read_bytes() == raw
        assert kept.tokenizer == "byte"
        copies.add(kept.source)
    assert len(copies) == 2
    assert {str(path) for path in (tmp_path / "cache").iterdir()} == copies


def test_a_copy_has_the_users_umask(tmp_path):
    before = os.umask(0o027)
    try:
        with piped(TEXT) as source:
            kept = keep(DataConfig(source=source), tmp_path)
    finally:
        os.umask(before)
    assert stat.S_IMODE(Path(kept.source).stat().st_mode) == 0o640


def test_text_from_a_pipe_is_prepared_as_from_a_file_and_found_again(tmp_path):
    (tmp_path / "a.txt").write_bytes(TEXT)
    expected = prepare(DataConfig(source=str(tmp_path / "a.txt")), tmp_path / "cache")
    prepared = []
    for _ in range(2):
        with piped(TEXT) as source:
            prepared.append(prepare(DataConfig(source=source), tmp_path / "cache"))
    assert prepared[0].train.path == prepared[1].train.path
    assert prepared[0].train.ids.tolist() == expected.train.ids.tolist()
    assert prepared[0].train.path.parent.name.startswith("piped-")


def test_a_copy_is_found_in_the_cache_when_that_was_moved(tmp_path):
    with piped(TEXT) as source:
        kept = keep(DataConfig(source=source), tmp_path / "old")
    assert keep(kept, tmp_path / "new") == kept
    (tmp_path / "old").rename(tmp_path / "new")
    moved = keep(kept, tmp_path / "new")
    assert Path(moved.source) == tmp_path / "new" / Path(kept.source).name
    assert is_piped(moved)
    Path(moved.source).unlink()
    with pytest.raises(UsageError, match="piped-.* which is not a file"):
        prepare(kept, tmp_path / "new")


def test_an_empty_pipe_has_no_text_and_leaves_nothing(tmp_path):
    with piped(b"") as source, pytest.raises(UsageError, match=f"{source} is empty"):
        keep(DataConfig(source=source), tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_pipe_that_is_not_open_and_a_device_are_told(tmp_path):
    with pytest.raises(UsageError, match="/dev/fd/987654321 cannot be read: Bad file descriptor"):
        keep(DataConfig(source="/dev/fd/987654321"), tmp_path)
    with (
        open(os.devnull) as device,  # noqa: PTH123
        pytest.raises(UsageError, match="is a terminal or a device, and must be a pipe or a file"),
    ):
        keep(DataConfig(source=f"/dev/fd/{device.fileno()}"), tmp_path)


def test_a_full_disk_while_copying_is_one_sentence_and_leaves_nothing(tmp_path, monkeypatch):
    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with (
        piped(TEXT) as source,
        pytest.raises(UsageError, match="cache cannot be written: No space"),
    ):
        keep(DataConfig(source=source), tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []


@pytest.mark.parametrize("source", ["-", "/dev/stdin", "/dev/fd/0", "/proc/self/fd/0"])
def test_standard_input_has_many_names(source):
    assert DataConfig(source=source).descriptor == 0


@pytest.mark.parametrize("source", ["", "--", "/dev/fd/x", "/dev/fd/", "dev/fd/0", "a.txt"])
def test_other_sources_are_names(source):
    assert not is_piped(DataConfig(source=source))
