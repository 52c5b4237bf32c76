import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gpt.config import UsageError
from gpt.data.jsonl import read_jsonl

FIELDS = {"text": str, "choices": list, "answer": int}
LINE = b'{"text": "caf\xc3\xa9", "choices": ["a", "b"], "answer": 1}'


def read(folder, raw, fields=FIELDS):
    (folder / "a.jsonl").write_bytes(raw)
    return read_jsonl(folder / "a.jsonl", fields)


@pytest.mark.parametrize(
    "raw",
    [
        LINE + b"\n" + LINE,
        LINE + b"\n" + LINE + b"\n",
        b"\xef\xbb\xbf" + LINE + b"\r\n\r\n" + LINE + b"\r\n",
        LINE + b"\n \n" + LINE,
    ],
    ids=["bare", "with a last line feed", "of Windows", "with a blank line"],
)
def test_a_file_is_its_lines_whatever_ends_them(raw, tmp_path):
    one = {"text": "caf\u00e9", "choices": ["a", "b"], "answer": 1}
    assert read(tmp_path, raw) == [one, one]


@pytest.mark.parametrize(
    ("line", "said"),
    [
        (b"{", r"is not JSON: .* \(column 2\)"),
        (b"[]", "has no 'text'"),
        (b'{"text": 1}', "has 1 as its 'text', which must be a string"),
        (LINE.replace(b"1}", b"true}"), "has True as its 'answer', .* whole number"),
        (LINE.replace(b"1}", b"7" * 5000 + b"}"), "cannot be read"),
        (LINE.replace(b"1}", b'"' + b"7" * 5000 + b'"}'), "as its 'answer'"),
        (LINE.replace(b"caf", b"\\ud83d"), "half of a surrogate pair"),
        (b"[" * 100_000, "nested too deeply"),
    ],
)
def test_a_broken_line_is_named_in_a_short_sentence(line, said, tmp_path):
    with pytest.raises(UsageError, match=rf"a\.jsonl line 2 .*{said}") as error:
        read(tmp_path, LINE + b"\n" + line + b"\n" + LINE)
    assert len(str(error.value)) < 800


def test_a_file_of_other_bytes_or_of_nothing_is_named(tmp_path):
    with pytest.raises(UsageError, match=r"a\.jsonl is not UTF-8 text"):
        read(tmp_path, LINE + b"\xff")
    with pytest.raises(UsageError, match=r"a\.jsonl has no items"):
        read(tmp_path, b"\n")


@settings(derandomize=True, deadline=None, max_examples=200)
@given(data=st.data())
def test_whatever_a_file_holds_its_items_have_their_fields_or_it_is_named(data, tmp_path_factory):
    raw = bytearray(LINE + b"\r\n" + LINE + b"\n")
    for _ in range(data.draw(st.integers(1, 3))):
        start = data.draw(st.integers(0, len(raw)))
        piece = st.binary(max_size=3) | st.sampled_from([b"\\ud800", b"9" * 5000, b"[" * 5000])
        raw[start : start + data.draw(st.integers(0, 3))] = data.draw(piece)
    try:
        items = read(tmp_path_factory.getbasetemp(), bytes(raw))
    except UsageError as error:
        assert "a.jsonl" in str(error)  # noqa: PT017
    else:
        assert all(type(item[name]) is kind for item in items for name, kind in FIELDS.items())
