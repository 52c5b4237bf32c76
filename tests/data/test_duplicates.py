"""Which documents count as having come before."""

import random
import sqlite3

import pytest

from gpt.config import UsageError
from gpt.data.duplicates import Seen, keys


def test_case_width_and_white_space_make_no_other_document(tmp_path):
    seen = Seen(tmp_path / "seen.sqlite")
    found = [
        seen.add(keys(text, "exact"), 1)
        for text in ("The ﬁrst  one", "the first\none\n", "the first one.", "THE FIRST ONE")
    ]
    assert found == ["", "exact", "", "exact"]


def test_what_came_after_a_mark_can_be_forgotten(tmp_path):
    seen = Seen(tmp_path / "seen.sqlite")
    for mark, text in enumerate("abc", 1):
        seen.add(keys(text, "exact"), mark)
    seen.flush()
    seen.close()
    again = Seen(tmp_path / "seen.sqlite")
    again.back_to(2)
    assert [again.add(keys(text, "exact"), 9) for text in "abc"] == ["exact", "exact", ""]


def test_near_duplicates_are_found_and_other_texts_are_not(tmp_path):
    pytest.importorskip("datasketch")
    draw = random.Random(0)
    words = [f"word{i}" for i in range(2000)]
    originals = [draw.choices(words, k=300) for _ in range(40)]
    seen = Seen(tmp_path / "seen.sqlite")
    assert {seen.add(keys(" ".join(text), "near"), 1) for text in originals} == {""}
    found = []
    for text in originals:
        copy = list(text)
        for i in draw.sample(range(300), 3):  # 15 of 296 shingles: similarity 0.9
            copy[i] = "other"
        found.append(seen.add(keys(" ".join(copy), "near"), 1))
    assert found.count("near") >= 39
    others = [draw.choices(words, k=300) for _ in range(40)]
    assert {seen.add(keys(" ".join(text), "near"), 1) for text in others} == {""}


def test_the_package_for_near_duplicates_is_named(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "datasketch", None)
    with pytest.raises(UsageError, match=r"needs the package datasketch.*gpt\[dedup\]"):
        keys("a b", "near")


def test_a_damaged_file_of_hashes_is_one_sentence(tmp_path):
    path = tmp_path / "seen.sqlite"
    path.write_bytes(b"x" * 5000)
    with pytest.raises(UsageError, match="cannot be used"):
        Seen(path)
    assert sqlite3.sqlite_version
