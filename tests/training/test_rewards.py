import pytest

from gpt.config import ObjectiveConfig, UsageError
from gpt.training.rewards import READY, reward_of


def made(reward, **fields):
    return reward_of(ObjectiveConfig(kind="reward", reward=reward, **fields))


def test_a_regular_expression_rewards_a_match():
    reward = made("regex", pattern=r"\bcat\b")
    assert [reward("p", text, {}) for text in ("a cat", "cats", "")] == [1, 0, 0]


def test_a_length_is_rewarded_the_less_the_further_away_it_is():
    reward = made("length", length=10)
    assert [reward("p", "x" * n, {}) for n in (10, 5, 15, 0, 30)] == [1, 0.5, 0.5, 0, -1]


def test_bleu_is_that_of_sacrebleu():
    sacrebleu = pytest.importorskip("sacrebleu", reason="the extra bleu has it")
    reward, reference = made("bleu"), "the cat sat on the old mat"
    assert reward("p", reference, {"prompt": "p", "reference": reference}) == pytest.approx(1)
    text = "the cat sat on a mat"
    wanted = sacrebleu.sentence_bleu(text, ["a cat sat on the mat", reference]).score / 100
    record = {"prompt": "p", "references": ["a cat sat on the mat", reference]}
    assert reward("p", text, record) == wanted
    assert 0 < wanted < 1


@pytest.mark.parametrize("found", [None, [], 3, ["a", 1]])
def test_bleu_needs_references(found):
    pytest.importorskip("sacrebleu", reason="the extra bleu has it")
    with pytest.raises(UsageError, match=r"prompt 'p' has .* as its references, and .* needs"):
        made("bleu")("p", "text", {"prompt": "p", "references": found})


def test_bleu_without_its_package_says_what_to_install(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "sacrebleu", None)
    with pytest.raises(UsageError, match=r"pip install sacrebleu \(or gpt\[bleu\]\)"):
        made("bleu")


def test_every_ready_reward_is_a_choice_of_the_configuration():
    for name in READY:
        fields = {"pattern": "a"} if name == "regex" else {}
        ObjectiveConfig(kind="reward", reward=name, **fields)


def test_a_users_function_gets_the_prompt_the_text_and_the_record(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text("def count(prompt, text, record):\n    return text.count(record['letter'])\n")
    assert made(f"{file}:count")("p", "banana", {"letter": "a"}) == 3


@pytest.mark.parametrize("value", ["True", "np.bool_(True)", "np.float32(1)", "torch.ones(())"])
def test_a_users_function_may_return_any_kind_of_number(value, tmp_path):
    file = tmp_path / "mine.py"
    file.write_text(f"import numpy as np, torch\ndef f(p, t, r):\n    return {value}\n")
    assert made(f"{file}:f")("p", "t", {}) == 1.0


CODES = {
    "def f(prompt, text, record):\n    return float('nan')\n": r"f of .*mine.py returned nan for",
    "def f(prompt, text, record):\n    return 'good'\n": r"returned 'good' for the text 't', and",
    "def f(prompt, text, record):\n    return None\n": r"returned None",
    "def f(prompt, text, record):\n    x = 1\n    return record['none']\n": (
        r"mine.py line 3: f failed: KeyError: 'none'"
    ),
    "def f(prompt, text, record):\n    return 10**400\n": r"f of .*mine.py returned 1000",
    "def f(prompt, text, record):\n    raise SystemExit(3)\n": r"f failed: SystemExit: 3",
    "raise SystemExit(3)\n": r"mine.py line 1: cannot be imported: SystemExit: 3",
    "def f(prompt, text):\n    return 1\n": r"f failed: TypeError: f\(\) takes 2 positional",
    "def f(:\n": r"mine.py line 1: cannot be imported: SyntaxError: invalid syntax",
    "x = 1\n1 / 0\n": r"mine.py line 2: cannot be imported: ZeroDivisionError: division by zero",
    "g = 3\n": r"mine.py has no function f",
}


@pytest.mark.parametrize("code", CODES)
def test_a_users_function_that_fails_is_told_in_one_sentence(code, tmp_path):
    file = tmp_path / "mine.py"
    file.write_text(code)
    with pytest.raises(UsageError, match=CODES[code]) as told:
        made(f"{file}:f")("p", "t", {"prompt": "p"})
    assert "\n" not in str(told.value)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"reward": ""}, "objective.reward is '', and must be file.py:function or one of bleu"),
        ({"reward": "best"}, "objective.reward is 'best'"),
        ({"reward": "file.py"}, "objective.reward is 'file.py'"),
        ({"reward": "regex"}, "objective.pattern is empty"),
        ({"reward": "regex", "pattern": "("}, r"objective.pattern is '\(', which is not a regular"),
        ({"reward": "length", "samples": 1}, "objective.samples is 1, and objective.baseline"),
        ({"reward": "length", "stop": ("",)}, "objective.stop has an empty text"),
    ],
)
def test_a_wrong_objective_names_its_field(fields, said):
    with pytest.raises(UsageError, match=said):
        ObjectiveConfig(kind="reward", **fields)


def test_a_file_that_does_not_exist_is_named(tmp_path):
    with pytest.raises(UsageError, match=r"none.py does not exist"):
        made(f"{tmp_path}/none.py:f")
