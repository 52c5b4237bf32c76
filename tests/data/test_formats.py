import bz2
import gzip
import io
import json
import lzma
import random

import pytest

from gpt.config import DataConfig, UsageError
from gpt.data import compression, formats, reading
from gpt.data.compression import Tap
from gpt.data.corpus import open_corpus
from gpt.data.formats import FORMATS
from gpt.data.prepare import prepare
from gpt.data.reading import Reading

TEXTS = ["the cat sat", "caf\u00e9 \u6771\u4eac", "def f():\n    return 1\n"]


def parquet(texts):
    arrow, tables = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    out = io.BytesIO()
    tables.write_table(arrow.table({"text": texts, "id": [*range(len(texts))]}), out)
    return out.getvalue()


def zstd(raw):
    return pytest.importorskip("zstandard").ZstdCompressor().compress(raw)


RAW = {
    "text": lambda texts: "\x1e".join(texts).encode(),
    "jsonl": lambda texts: b"".join(json.dumps({"text": t}).encode() + b"\n" for t in texts),
    "parquet": parquet,
}
COMPRESSED = {
    "": bytes,
    ".gz": gzip.compress,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
    ".zst": zstd,
}


def write(folder, kind, compression="", texts=TEXTS):
    path = folder / f"a.{kind}{compression}"
    path.write_bytes(COMPRESSED[compression](RAW[kind](texts)))
    return path


def read(path, **fields):
    corpus = open_corpus(str(path), Reading(**{"separator": "\x1e", **fields}))
    return ["".join(document) for document in corpus.documents()]


def test_every_format_is_tested():
    assert set(RAW) == set(FORMATS)
    assert set(COMPRESSED) == {"", *compression.COMPRESSIONS}


@pytest.mark.parametrize("compression", COMPRESSED)
@pytest.mark.parametrize("kind", RAW)
def test_the_documents_are_the_same_in_every_format_and_compression(kind, compression, tmp_path):
    assert read(write(tmp_path, kind, compression)) == TEXTS


@pytest.mark.parametrize("compression", [name for name in COMPRESSED if name])
def test_compressed_parts_in_a_row_are_one_text(compression, tmp_path):
    path = tmp_path / f"a.txt{compression}"
    path.write_bytes(b"".join(map(COMPRESSED[compression], (b"one ", b"two ", b"three"))))
    assert read(path) == ["one two three"]


@pytest.mark.parametrize("compression", [name for name in COMPRESSED if name])
@pytest.mark.parametrize("damage", ["cut", "changed", "other"])
def test_a_damaged_compressed_file_is_named(compression, damage, tmp_path):
    path = write(tmp_path, "jsonl", compression, TEXTS * 50)
    raw = bytearray(path.read_bytes())
    if damage == "changed":
        raw[len(raw) // 2 :] = bytes(reversed(raw[len(raw) // 2 :]))
    path.write_bytes({"cut": raw[:-9], "changed": raw, "other": b"plain text"}[damage])
    with pytest.raises(UsageError, match=rf"a\.jsonl\{compression} is not a whole"):
        read(path)


@pytest.mark.parametrize("kind", RAW)
def test_bad_bytes_are_refused_with_their_place_or_replaced(kind, tmp_path):
    path = write(tmp_path, kind, texts=["good", "b\u00e9d", "good"])
    raw = path.read_bytes().replace(b"\\u00e9", "\u00e9".encode())
    path.write_bytes(raw.replace("\u00e9".encode(), b"\xff!"))
    at = "row 2, byte 1" if kind == "parquet" else f"byte {path.read_bytes().index(0xFF)}"
    with pytest.raises(UsageError, match=rf"a\.{kind} is not UTF-8 .* byte 0xFF at {at}\)"):
        read(path)
    assert read(path, bad_bytes="replace") == ["good", "b\ufffd!d", "good"]


def test_the_place_of_a_bad_byte_counts_from_the_files_start(tmp_path, monkeypatch):
    monkeypatch.setattr(compression, "BLOCK", 64)
    (tmp_path / "a.txt").write_bytes("\u6771".encode() * 100 + b"\xff")
    with pytest.raises(UsageError, match=r"byte 0xFF at byte 300\)"):
        read(tmp_path / "a.txt")


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_the_field_of_the_text_is_chosen_and_a_missing_one_is_named(kind, tmp_path):
    path = write(tmp_path, kind)
    with pytest.raises(UsageError, match=rf"a\.{kind} .*has no .*'body'.*data\.text_field"):
        read(path, text_field="body")
    if kind == "jsonl":
        path.write_text('{"body": "one"}\n\n{"body": ""}\n{"body": "t\\r\\nwo"}')
        assert read(path, text_field="body") == ["one", "t\nwo"]


@pytest.mark.parametrize("compression", COMPRESSED)
@pytest.mark.parametrize("kind", RAW)
def test_who_wants_a_files_bytes_is_told_all_of_them(kind, compression, tmp_path):
    path, content = write(tmp_path, kind, compression, TEXTS * 100), []
    for document in FORMATS[kind](Reading(), path, Tap(content.append)):
        "".join(document)
    assert b"".join(content) == path.read_bytes()


def test_of_a_parquet_file_only_the_column_of_the_text_is_read_and_once(tmp_path):
    arrow, tables = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    draw, counted = random.Random(0), []
    columns = {name: [draw.randbytes(500).hex() for _ in range(1000)] for name in ("a", "text")}
    tables.write_table(arrow.table(columns), tmp_path / "a.parquet")
    documents = FORMATS["parquet"](Reading(), tmp_path / "a.parquet", Tap(count=counted.append))
    assert len(list(documents)) == 1000
    assert 0.4 < sum(counted) / (tmp_path / "a.parquet").stat().st_size < 0.7


def test_a_line_can_be_a_document_and_a_name_does_not_decide_a_given_format(tmp_path):
    (tmp_path / "a.jsonl").write_text("one\r\n\ntwo\nthree")
    assert read(tmp_path / "a.jsonl", format="text", separator="\n") == ["one", "two", "three"]


def test_a_line_that_does_not_end_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(reading, "LONGEST_RECORD", 1000)
    (tmp_path / "a.jsonl").write_text('{"text": "' + "x" * 2000)
    with pytest.raises(UsageError, match=r"a\.jsonl has a line longer than 1,000"):
        read(tmp_path / "a.jsonl")


def test_a_pattern_names_files_in_the_order_of_their_paths(tmp_path):
    for name in ("b.txt", "a.txt", "c.md", "d/e.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    assert read(tmp_path / "*.txt") == ["a.txt", "b.txt"]
    assert read(tmp_path / "**/*.txt") == ["a.txt", "b.txt", "d/e.txt"]
    with pytest.raises(UsageError, match="which no file matches"):
        read(tmp_path / "*.json")


@pytest.mark.parametrize("change", [{"text_field": "body"}, {"bad_bytes": "replace"}])
def test_another_way_of_reading_is_another_text(change, tmp_path):
    path = write(tmp_path, "jsonl", texts=["x"])
    path.write_text('{"text": "x", "body": "y"}')
    survey = open_corpus(str(path), Reading()).survey()
    assert open_corpus(str(path), Reading(**change)).survey().fingerprint != survey.fingerprint
    assert open_corpus(str(path)).survey().fingerprint != survey.fingerprint


@pytest.mark.parametrize("kind", RAW)
def test_a_text_of_any_format_is_prepared(kind, tmp_path):
    path = write(tmp_path, kind, ".gz", TEXTS * 20)
    config = DataConfig(source=str(path), tokenizer="byte", separator="\x1e")
    prepared = prepare(config, tmp_path / "cache")
    ids = [*prepared.train.ids.tolist(), *prepared.validation.ids.tolist()]
    assert ids == [i for text in TEXTS * 20 for i in [*text.encode(), 256]]


def test_a_missing_package_is_named_with_its_extra(monkeypatch, tmp_path):
    path = write(tmp_path, "text", ".zst")
    monkeypatch.setitem(__import__("sys").modules, "zstandard", None)
    with pytest.raises(UsageError, match=r"needs the package zstandard.*gpt\[zstd\]"):
        read(path)


@pytest.mark.parametrize("seed", range(40))
@pytest.mark.parametrize("name", ["parquet", "jsonl", "jsonl.gz", "jsonl.xz", "jsonl.zst"])
def test_whatever_a_damaged_file_holds_it_is_read_or_named(name, seed, tmp_path):
    kind, _, compression = name.partition(".")
    path = write(tmp_path, kind, compression and f".{compression}")
    draw, raw = random.Random(seed), bytearray(path.read_bytes())
    for _ in range(draw.randint(1, 3)):
        start = draw.randrange(len(raw))
        raw[start : start + draw.randint(0, 3)] = draw.randbytes(draw.randint(0, 3))
    path.write_bytes(raw[: draw.choice((len(raw), len(raw), len(raw) // 2, 3))])
    try:
        read(path)
    except UsageError as error:
        assert path.name in str(error)  # noqa: PT017
        assert len(str(error)) < 800  # noqa: PT017


def test_a_folder_of_a_dataset_is_streamed(tmp_path):
    pytest.importorskip("datasets")
    write(tmp_path, "jsonl")
    assert read(f"hf://{tmp_path}") == TEXTS
    with pytest.raises(UsageError, match="row 1 of the dataset .* has no text 'body'"):
        read(f"hf://{tmp_path}", text_field="body")
    with pytest.raises(UsageError, match="has the option 'x', and takes name, split, revision"):
        read(f"hf://{tmp_path}?x=1")


def test_a_text_without_the_end_of_a_word_is_cut_before_a_line_feed(monkeypatch):
    monkeypatch.setattr(formats, "PIECE_CHARACTERS", 10)
    pieces = list(formats.cut("\u3002\n".rjust(9, "\u6771") * 9))
    assert [len(piece) for piece in pieces[:2]] == [35, 36]
    assert all(piece.startswith("\n") for piece in pieces[1:])
    assert next(iter(formats.cut("x" * 95))) == "x" * 40


def test_a_separator_may_have_the_line_ends_of_the_file(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"one\r\ntwo\r\nthree")
    config = DataConfig(source=str(tmp_path / "a.txt"), separator=r"\r\n")
    corpus = open_corpus(config.source, Reading.of(config))
    assert ["".join(document) for document in corpus.documents()] == ["one", "two", "three"]
