"""Records with answers: which are held out, how they are packed, and what is refused."""

import json

import numpy as np
import pytest

from gpt.config import DataConfig, UsageError
from gpt.data.batches import IGNORED
from gpt.data.example_windows import ExampleWindows
from gpt.data.examples import Example, load_examples, save_examples
from gpt.data.instructions import held_out, is_instructions, prepare_instructions
from gpt.data.tokenizer import ByteTokenizer
from gpt.generation.examples import ExampleEncoder


def lines(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def sums(n, start=0):
    return [{"prompt": f"{i} + 1 =", "completion": f" {i + 1}"} for i in range(start, start + n)]


def prepared(path, cache, **fields):
    config = DataConfig(source=str(path), **{"tokenizer": "byte", **fields})
    return prepare_instructions(config, cache, ExampleEncoder)


def examples_of(folder, sizes, uncounted=2):
    """Examples of these numbers of tokens, the first ``uncounted`` of which do not count."""
    folder.mkdir()
    made = []
    for number, n in enumerate(sizes):
        ids = np.arange(n, dtype=np.uint32) + 100 * number
        made.append(Example(ids, np.arange(n) >= uncounted))
    save_examples(folder, made)
    return load_examples(folder, b"")


@pytest.mark.parametrize(
    ("record", "answers"),
    [
        ({"messages": []}, True),
        ({"prompt": "", "completion": "a"}, True),
        ({"text": "a"}, False),
        ({"prompt": "a", "chosen": "b", "rejected": "c"}, False),
    ],
)
def test_the_first_record_says_whether_a_file_has_instructions(record, answers, tmp_path):
    path = lines(tmp_path / "a.jsonl", [record])
    assert is_instructions(DataConfig(source=str(path))) == answers
    assert not is_instructions(DataConfig(source=str(path), records="text"))
    assert is_instructions(DataConfig(source=str(path), records="instructions"))
    path.rename(tmp_path / "a.txt")
    assert not is_instructions(DataConfig(source=str(tmp_path / "a.txt")))


def test_a_record_is_held_out_by_its_question_however_many_others_there_are():
    few, many = sums(200), sums(400)
    assert held_out(few, 0.1) == held_out(many, 0.1)[:200]
    assert 0.02 < np.mean(held_out(many, 0.1)) < 0.2
    twice = [*many, *({**record, "completion": "other"} for record in many)]
    assert held_out(twice, 0.1) == held_out(many, 0.1) * 2
    talks = [{"messages": [{"role": "user", "content": r["prompt"]},
                           {"role": "assistant", "content": r["completion"]}]}
             for r in twice]  # fmt: skip
    split = held_out(talks, 0.1)
    assert split[:400] == split[400:]


def test_one_record_is_always_held_out():
    assert sum(held_out(sums(3), 1e-9)) == 1
    with pytest.raises(UsageError, match="all 4 records would be held out"):
        held_out(sums(1) * 4, 0.5)


def test_examples_are_read_again_from_the_cache(tmp_path, monkeypatch):
    path = lines(tmp_path / "a.jsonl", sums(40))
    first = prepared(path, tmp_path / "cache")
    assert len(first.train.ends) + len(first.validation.ends) == 40
    monkeypatch.setattr(ExampleEncoder, "__call__", None)
    again = prepared(path, tmp_path / "cache")
    assert again.train.ids.tolist() == first.train.ids.tolist()
    lines(path, sums(41))
    with pytest.raises(TypeError):  # another text is another cache
        prepared(path, tmp_path / "cache")


def test_conversations_give_a_model_without_a_template_the_plain_one(tmp_path):
    answer = {"role": "assistant", "content": "Ho"}
    records = [{"messages": [{"role": "user", "content": str(i)}, answer] * 2} for i in range(9)]
    data = prepared(lines(tmp_path / "a.jsonl", records), tmp_path / "cache", tokenizer="char")
    assert data.tokenizer.chat is not None
    prompt, answer = data.train.question(0)
    assert data.tokenizer.decode_bytes(prompt).endswith(b"\nAssistant:\n")
    assert answer == [*data.tokenizer.encode("Ho").tolist(), data.tokenizer.end_of_text]
    plain = prepared(lines(tmp_path / "b.jsonl", sums(9)), tmp_path / "cache")
    assert plain.tokenizer.chat is None


def test_a_window_holds_examples_one_after_the_other(tmp_path):
    windows = ExampleWindows(examples_of(tmp_path / "e", [5, 4, 9, 3]), 8, too_long="cut")
    assert (len(windows), windows.cut, windows.dropped) == (3, 0, 0)
    batch = windows.batch(np.arange(3))
    assert batch.tokens.tolist() == [
        [200, 201, 202, 203, 204, 205, 206, 207],
        [0, 1, 2, 3, 100, 101, 102, 0],
        [300, 301, 0, 0, 0, 0, 0, 0],
    ]
    no = IGNORED
    assert batch.targets.tolist() == [
        [no, 202, 203, 204, 205, 206, 207, 208],
        [no, 2, 3, 4, no, 102, 103, no],
        [no, 302, no, no, no, no, no, no],
    ]
    assert batch.documents.tolist() == [[0] * 8, [0] * 4 + [1] * 3 + [2], [0] * 2 + [1] * 6]
    assert windows.fill == 17 / 24
    assert windows.counted == 13 / 17
    [line] = windows.describe()
    assert line == ("packing  4 examples in 3 windows, 70.8% full; 76.5% of the targets count")


@pytest.mark.parametrize(("too_long", "n", "cut", "dropped"), [("cut", 2, 1, 1), ("drop", 1, 0, 2)])
def test_what_is_too_long_is_cut_or_left_out_and_counted(too_long, n, cut, dropped, tmp_path):
    save_examples(tmp_path, [
        Example(np.arange(20, dtype=np.uint32), np.arange(20) > 3),
        Example(np.arange(20, dtype=np.uint32), np.arange(20) > 12),  # no answer in the first 9
        Example(np.arange(4, dtype=np.uint32), np.arange(4) > 1),
    ])  # fmt: skip
    windows = ExampleWindows(load_examples(tmp_path, b""), 8, too_long=too_long)
    assert (len(windows), windows.cut, windows.dropped) == (n, cut, dropped)
    assert f"{dropped} left out" in windows.describe()[0]


def test_a_context_without_room_for_an_answer_is_refused(tmp_path):
    examples = examples_of(tmp_path / "e", [12], uncounted=9)
    with pytest.raises(UsageError, match=r"no example with an answer within .* 4; use a larger"):
        ExampleWindows(examples, 4, too_long="cut")


@pytest.mark.parametrize("name", ["ids", "counted", "ends"])
@pytest.mark.parametrize("damage", ["gone", "cut", "other"])
def test_damaged_examples_are_one_sentence(name, damage, tmp_path):
    examples_of(tmp_path / "e", [5, 4])
    path = tmp_path / "e" / f"{name}.npy"
    if damage == "gone":
        path.unlink()
    elif damage == "cut":
        path.write_bytes(path.read_bytes()[:100])
    else:
        np.save(path, np.zeros(2, np.load(path).dtype))
    with pytest.raises(UsageError):
        load_examples(tmp_path / "e", b"")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"prompt": "a", "completion": "b"}\n', "has 1 records, and needs 2"),
        ('{"prompt": "a", "completion": "b"}\n[]\n', "line 2 is not an object"),
        ('{"prompt": "a", "completion": "b"}\n{"prompt": "c"}\n', "line 2: there is no 'comple"),
    ],
)
def test_records_that_are_no_instructions_are_one_sentence(content, message, tmp_path):
    (tmp_path / "a.jsonl").write_text(content)
    with pytest.raises(UsageError, match=message):
        prepared(tmp_path / "a.jsonl", tmp_path / "cache")


def test_the_tokenizer_of_an_initial_model_is_used(tmp_path):
    config = DataConfig(source=str(lines(tmp_path / "a.jsonl", sums(9))))
    data = prepare_instructions(
        config, tmp_path / "cache", ExampleEncoder, tokenizer=ByteTokenizer()
    )
    assert data.tokenizer.kind == "byte"
