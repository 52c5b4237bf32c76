import json
import os
import stat

import pytest

from gpt.config import FOREIGN, MESSAGE, UsageError, foreign
from gpt.files import check_regular, new_folder, read_json, read_text, write_atomically

BROKEN = {
    "nothing": "",
    "a word": "word",
    "deep lists": "[" * 100_000,
    "deep objects": '{"a":' * 100_000,
    "long number": "[" + "1" * 5_000 + "]",
    "half a pair": '{"a": "\\ud800"}',
    "half a pair as a name": '{"\\udfff": 1}',
    "cut off": '{"a": 1',
}


@pytest.mark.parametrize("text", BROKEN.values(), ids=list(BROKEN))
def test_invalid_json_is_refused_in_one_sentence(text, tmp_path):
    path = tmp_path / "x.json"
    path.write_text(text)
    with pytest.raises(UsageError, match="the table .*x.json (is not|cannot be read)"):
        read_json(path, "the table")


def test_valid_json_is_read(tmp_path):
    path = tmp_path / "x.json"
    for value in ({"a": [1, 2.5, None, True]}, {"emoji": "\U0001f600"}, "\n"):
        path.write_text(json.dumps(value))
        assert read_json(path, "the table") == value


def test_a_byte_order_mark_is_dropped_and_line_ends_stay(tmp_path):
    path = tmp_path / "x.txt"
    path.write_bytes(b"\xef\xbb\xbfone\r\ntwo")
    assert read_text(path, "the prompt") == "one\r\ntwo"


def test_a_file_that_is_not_text_is_refused(tmp_path):
    path = tmp_path / "x.txt"
    path.write_bytes(b"abc\xff")
    with pytest.raises(UsageError, match="is not UTF-8 text: .* at byte 3"):
        read_text(path, "the prompt")


@pytest.mark.parametrize("name", ["no/such/file", "nul\0inside", "x" * 5_000])
def test_a_missing_file_or_an_impossible_path_is_refused(name, tmp_path):
    with pytest.raises(UsageError, match="the prompt .* cannot be read"):
        read_text(tmp_path / name, "the prompt")


def test_a_pipe_a_folder_and_a_device_are_refused_and_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path, kind in ((tmp_path / "pipe", "a pipe"), (tmp_path, "a folder")):
        with pytest.raises(UsageError, match=f"the prompt .* is {kind}"):
            check_regular(path, "the prompt")


def test_a_link_at_the_old_temporary_name_is_not_followed(tmp_path):
    victim = tmp_path / "victim"
    victim.write_text("mine")
    (tmp_path / ".x.new").symlink_to(victim)
    write_atomically(tmp_path / "x", "text")
    assert victim.read_text() == "mine"
    assert (tmp_path / "x").read_text() == "text"


def test_a_link_is_replaced_by_the_file(tmp_path):
    victim = tmp_path / "victim"
    victim.write_text("mine")
    (tmp_path / "x").symlink_to(victim)
    write_atomically(tmp_path / "x", "text")
    assert (victim.read_text(), (tmp_path / "x").read_text()) == ("mine", "text")


def test_temporary_names_are_unpredictable_and_new(tmp_path, monkeypatch):
    names = []
    opened = os.open

    def record(path, flags, *rest):
        if flags & os.O_CREAT:
            assert flags & os.O_EXCL
            assert flags & os.O_NOFOLLOW
            names.append(str(path))
        return opened(path, flags, *rest)

    monkeypatch.setattr(os, "open", record)
    for _ in range(2):
        write_atomically(tmp_path / "x", "text")
    assert len(set(names)) == 2


def test_a_write_that_fails_leaves_the_old_text_and_nothing_else(tmp_path, monkeypatch):
    write_atomically(tmp_path / "x", "old")

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left") as caught:
        write_atomically(tmp_path / "x", "new")
    assert caught.value.filename == str(tmp_path / "x")
    assert [p.name for p in tmp_path.iterdir()] == ["x"]
    assert (tmp_path / "x").read_text() == "old"


def test_a_new_folder_is_complete_or_absent(tmp_path):
    out = tmp_path / "deep" / "out"

    def fill(error):
        with new_folder(out) as work:
            (work / "half").write_text("half")
            raise error

    with pytest.raises(RuntimeError):
        fill(RuntimeError())
    assert list(out.parent.iterdir()) == []
    with new_folder(out) as work:
        (work / "a").write_text("a")
        assert not out.exists()
    assert (out / "a").read_text() == "a"
    with pytest.raises(UsageError, match="out exists"), new_folder(out):
        pass


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o755), (0o027, 0o750), (0o002, 0o775)])
def test_a_new_folder_has_the_users_umask(umask, mode, tmp_path):
    before = os.umask(umask)
    try:
        with new_folder(tmp_path / "out") as work:
            (work / "a").write_text("a")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "out").stat().st_mode) == mode


def test_a_full_disk_names_the_folder(tmp_path):
    def fill():
        with new_folder(tmp_path / "out"):
            raise OSError(28, "No space left on device")

    with pytest.raises(UsageError, match="out cannot be written: No space left"):
        fill()
    assert list(tmp_path.iterdir()) == []


def test_messages_are_short_and_printable():
    said = str(UsageError("a\x1b[31m\0\ud800" + "x" * 1_000_000))
    assert said.isprintable()
    assert len(said) <= MESSAGE + 5
    quoted = foreign("\x1b]0;title\x07" + "\0" * 1_000_000 + "end")
    assert quoted.isprintable()
    assert len(quoted) <= FOREIGN
    assert foreign("plain") == "plain"
