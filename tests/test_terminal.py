import dataclasses
import json
import os
import stat
from pathlib import Path

import pytest

import gpt
from gpt import terminal
from gpt.cli import main
from gpt.config import SampleConfig, UsageError
from gpt.terminal import Session
from tests.generation.test_chat import model_of
from tests.test_cli import RUN


@pytest.fixture(scope="module")
def model():
    return gpt.load(RUN)


def session(model, **settings):
    return Session(SampleConfig(model=str(RUN), max_new_tokens=20, **settings), model)


def talk(monkeypatch, capsys, session, *lines):
    """What is shown, on standard output and error, when the lines are typed."""
    typed = iter(lines)

    def read(prompt):
        line = next(typed, EOFError)
        if not isinstance(line, str):
            raise line
        return line

    monkeypatch.setattr("builtins.input", read)
    session.ask()
    return capsys.readouterr()


def test_a_setting_changes_what_follows(monkeypatch, capsys, model):
    own = session(model, seed=1)
    out, err = talk(monkeypatch, capsys, own, "/temperature 0", "JULIET", "/settings")
    [expected] = gpt.generate(model, "JULIET", temperature=0, max_new_tokens=20)
    assert out == "JULIET" + expected.text + "\n\n"
    assert "temperature         0.0" in err


def test_retry_writes_something_else_and_the_seed_makes_it_repeatable(monkeypatch, capsys, model):
    words = ("/temperature 3", "/seed 5", "JULIET", "/retry", "/retry", "JULIET", "/retry")
    first, _ = talk(monkeypatch, capsys, session(model), *words)
    assert (first, "") == (talk(monkeypatch, capsys, session(model), *words)[0], "")
    each = first.split("JULIET")[1:]
    assert len({*each[:3]}) == 3
    assert each[3].strip() == each[0].strip()
    assert each[4].strip() == each[1].strip()


def test_a_prompt_may_have_several_lines(monkeypatch, capsys, model):
    lines = ('"""ROMEO:', 'But, soft"""')
    out, _ = talk(monkeypatch, capsys, session(model, temperature=0), *lines)
    [expected] = gpt.generate(model, "ROMEO:\nBut, soft", temperature=0, max_new_tokens=20)
    assert out == "ROMEO:\nBut, soft" + expected.text + "\n\n"


def test_ctrl_c_stops_the_answer_and_not_the_session(monkeypatch, capsys, model):
    own = session(model, temperature=0)
    pieces = terminal.run

    def interrupted(*args, **options):
        for n, piece in enumerate(pieces(*args, **options)):
            if n == 3:
                raise KeyboardInterrupt
            yield piece

    monkeypatch.setattr(terminal, "run", interrupted)
    out, _ = talk(monkeypatch, capsys, own, "JULIET", KeyboardInterrupt, "JULIET")
    [expected] = gpt.generate(model, "JULIET", temperature=0, max_new_tokens=3)
    assert out.split("JULIET")[1:] == [expected.text + "\n\n", expected.text + "\n\n"]


def test_explain_shows_the_last_answer(monkeypatch, capsys, model):
    out, _ = talk(monkeypatch, capsys, session(model, temperature=0), "JULIET", "/explain")
    [expected] = gpt.generate(model, "JULIET", temperature=0, max_new_tokens=20)
    assert out.count("JULIET" + expected.text) == 2
    assert "20 tokens" in out
    assert "expected: " in out


def test_explain_writes_the_page_that_is_named(monkeypatch, capsys, model, tmp_path):
    page = tmp_path / "page.html"
    lines = ("JULIET", f"/explain {page}", "/explain a.txt", "/explain no/such/folder.html")
    _, err = talk(monkeypatch, capsys, session(model, temperature=0), *lines)
    assert "20 tokens" in page.read_text()
    assert "explain is 'a.txt', and must be one .html file" in err
    assert "the folder no/such does not exist" in err


def test_ctrl_d_ends_a_text_of_several_lines(monkeypatch, capsys, model):
    own = session(model, temperature=0)
    out, _ = talk(monkeypatch, capsys, own, '"""ROMEO:', "But", EOFError(), "JULIET")
    assert out.count("ROMEO:\nBut") == 1
    assert out.count("JULIET") == 1


def test_lines_are_remembered_for_the_next_session(monkeypatch, capsys, model, tmp_path):
    readline = pytest.importorskip("readline")
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    readline.clear_history()
    readline.add_history("JULIET")
    kept = []
    monkeypatch.setattr(terminal.atexit, "register", lambda *call: kept.append(call))
    talk(monkeypatch, capsys, session(model))
    [(write, path)] = kept
    write(path)
    readline.clear_history()
    talk(monkeypatch, capsys, session(model))
    assert readline.get_history_item(1) == "JULIET"
    readline.clear_history()


def test_explain_shows_nothing_of_a_stop_text(monkeypatch, capsys, model):
    [whole] = gpt.generate(model, "JULIET", temperature=0, max_new_tokens=20)
    own = session(model, temperature=0, stop=(whole.text[5:8],))
    out, _ = talk(monkeypatch, capsys, own, "JULIET", "/explain")
    assert out.count("JULIET" + whole.text[:5]) == 2
    assert "\n5 tokens" in out


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("/temperature", "/temperature takes one value, as in /temperature 0.8"),
        ("/temperature hot", "takes a number, not 'hot'"),
        ("/temperature -1", "temperature is -1.0, and must be"),
        ("/top_p 2", "top_p is 2.0, and must be above 0 and at most 1"),
        ("/top_k 1.5", "takes a number, not '1.5'"),
        ("/past_context never", "must be one of slide, stop"),
        ("/retry", "/retry needs an answer"),
        ("/explain", "/explain needs an answer"),
        ("/temprature 1", "unknown command /temprature; choose from help, retry"),
        ("/help", "Ctrl-D ends"),
        ("/", "unknown command /"),
        ('/stop "a', "has an unclosed quote"),
    ],
)
def test_a_mistake_is_told_in_a_sentence_and_changes_nothing(
    monkeypatch, capsys, model, line, said
):
    own = session(model)
    before = own.config
    assert said in talk(monkeypatch, capsys, own, line).err
    assert own.config == before


def test_stops_and_no_seed_can_be_set(model):
    own = session(model, seed=3)
    own.command('/stop \\n\\n "JULIET É"')
    own.command("/seed")
    assert own.config == dataclasses.replace(
        session(model).config, stop=("\n\n", "JULIET É"), seed=None
    )


def test_beams_and_guesses_are_shown_as_texts(capsys, model):
    session(model, num_beams=3, num_samples=2).answer_once("JULIET")
    assert capsys.readouterr().out.count("JULIET") >= 2
    [plain] = gpt.generate(model, "JULIET", temperature=0, max_new_tokens=20)
    guessing = SampleConfig(
        model=str(RUN), temperature=0, max_new_tokens=20, num_draft_tokens=3, draft=str(RUN)
    )
    Session(guessing, model, model).answer_once("JULIET")
    out, err = capsys.readouterr()
    assert out == "JULIET" + plain.text + "\n"
    assert "guesses were right (100%)" in err


def test_a_draft_with_another_tokenizer_is_refused(capsys, model):
    other = gpt.interop.load.Loaded(model.model, gpt.data.tokenizer.ByteTokenizer())
    config = SampleConfig(model=str(RUN), num_draft_tokens=3, draft="other")
    with pytest.raises(UsageError, match="the draft model's tokenizer differs"):
        Session(config, model, other).answer_once("JULIET")


def test_a_file_of_prompts_is_continued_by_the_command(tmp_path, capsys, model):
    prompts, out = tmp_path / "prompts.jsonl", tmp_path / "out.jsonl"
    prompts.write_text('{"prompt": "JULIET"}\n{"prompt": ""}\n')
    words = ["--model", str(RUN), "--temperature", "0", "--max_new_tokens", "9"]
    words += ["--weights", "float32", "--prompt_file", str(prompts), "--out", str(out)]
    assert main(["sample", *words]) == 0
    assert "2 prompts continued" in capsys.readouterr().err
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    for line in lines:
        [expected] = gpt.generate(model, line["prompt"], temperature=0, max_new_tokens=9)
        assert line["completions"] == [{"text": expected.text, "reason": expected.reason}]
    assert main(["sample", *words]) == 0
    assert "0 prompts continued" in capsys.readouterr().err


def test_the_command_writes_a_page_that_explains(tmp_path, capsys):
    page = tmp_path / "out.html"
    words = ["--model", str(RUN), "--prompt", "JULIET", "--explain", str(page)]
    assert main(["sample", *words]) == 0
    assert "tokens explained" in capsys.readouterr().err
    assert page.read_text().startswith("<!doctype html>")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"prompt_file": "a.jsonl"}, "prompt_file is a.jsonl and out is not given; a .jsonl"),
        ({"prompt": "x", "out": "a.jsonl"}, "prompt_file is not given and out is a.jsonl"),
        ({"draft": "gpt2"}, "draft is 'gpt2' and num_draft_tokens is 0"),
        ({"num_draft_tokens": 2, "num_beams": 2}, "give only one of them"),
        ({"explain": ("a.txt",)}, "explain is 'a.txt', and must be one .html file"),
        ({"explain": (), "prompt_file": "a.jsonl", "out": "b"}, "prompt_file is a .jsonl file"),
        ({"batch_size": 0}, "batch_size is 0"),
        (
            {"prompt_file": "a.jsonl", "out": "a.jsonl"},
            "out is a.jsonl, and must be another",
        ),
        ({"early_stopping": "x"}, "early_stopping is 'x', and must be one of likely"),
        ({"past_context": "x"}, "past_context is 'x', and must be one of slide, stop"),
        ({"max_new_tokens": 2.5}, "max_new_tokens is 2.5, and must be a whole number"),
        ({"temperature": "hot"}, "temperature is 'hot', and must be a number"),
        ({"min_p": 1.5}, "min_p is 1.5"),
        ({"repetition_penalty": 0.0}, "repetition_penalty is 0.0"),
        ({"presence_penalty": float("nan")}, "presence_penalty is nan"),
        ({"bias": {3: float("inf")}}, "bias has inf for the token 3"),
    ],
)
def test_options_that_do_not_fit_are_refused(settings, message):
    from pathlib import Path

    for name in ("prompt_file", "out"):
        if name in settings:
            settings = settings | {name: Path(settings[name])}
    with pytest.raises(UsageError, match=message):
        SampleConfig(**settings)


def test_explain_writes_a_page_once_and_then_shows_the_next_one(
    monkeypatch, capsys, model, tmp_path
):
    page = tmp_path / "page.html"
    own = session(model, temperature=0)
    page.write_text("old")
    lines = ("JULIET", f"/explain {page}", "/explain", "/settings")
    out, err = talk(monkeypatch, capsys, own, *lines)
    assert page.read_text().startswith("<!doctype html>")
    assert err.count("tokens explained") == 1
    assert out.count("JULIET") == 2
    assert "expected: " in out
    assert list(tmp_path.iterdir()) == [page]


def test_a_page_that_cannot_be_written_does_not_end_the_session(
    monkeypatch, capsys, model, tmp_path
):
    (tmp_path / "dev.html").symlink_to("/dev/null")
    os.mkfifo(tmp_path / "fifo.html")
    (tmp_path / "folder.html").mkdir()
    names = ["dev.html", "fifo.html", "folder.html", "none/x.html"]
    lines = [f"/explain {tmp_path / name}" for name in names]
    lines += ["/explain /proc/x.html", '/explain "a\0.html"']
    out, err = talk(monkeypatch, capsys, session(model, temperature=0), "JULIET", *lines, "ROMEO")
    assert out.count("ROMEO") == 1
    for name in names:
        assert f"explain {tmp_path / name}" in err or f"explain is {tmp_path / name}" in err
    assert "/proc/x.html cannot be written: " in err
    assert "embedded null byte" in err
    assert stat.S_ISFIFO((tmp_path / "fifo.html").stat().st_mode)
    assert (tmp_path / "dev.html").is_symlink()


def test_a_full_disk_while_a_page_is_written_leaves_the_old_one(
    monkeypatch, capsys, model, tmp_path
):
    resource = pytest.importorskip("resource")
    page = tmp_path / "page.html"
    page.write_text("old")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    try:
        _, err = talk(monkeypatch, capsys, session(model), "JULIET", f"/explain {page}")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert f"{page} cannot be written: File too large" in err
    assert page.read_text() == "old"
    assert list(tmp_path.iterdir()) == [page]


def test_no_setting_and_no_error_of_the_system_ends_the_session(monkeypatch, capsys, model):
    own = session(model, num_beams=2)
    lines = ["/length_penalty 3000", "/length_penalty -2000", "/length_penalty nan"]
    lines += ["/num_beams 100000000", "JULIET", "/num_beams 1", "/num_samples 1000000000", "JULIET"]
    lines += ["/num_samples 1", "/seed " + "9" * 5000, "/top_k " + "9" * 30, "/" + "x" * 5000]
    out, err = talk(monkeypatch, capsys, own, *lines, "ROMEO")
    assert err.count("length_penalty is ") == 3
    assert "100,000,000 beams" in err
    assert "1,000,000,000 sequences" in err
    assert max(map(len, err.splitlines())) < 1000
    assert out.startswith("ROMEO")

    def fail(*_):
        raise OSError(5, "I/O error", "x")

    monkeypatch.setattr(Session, "write", fail)
    assert "x: I/O error\n" in talk(monkeypatch, capsys, own, "JULIET").err


def test_what_is_typed_at_a_stop_is_unescaped(model):
    own = session(model)
    own.command(r"/stop \n\t \\n")
    assert own.config.stop == ("\n\t", "\\n")


def test_signs_of_white_space_are_ascii_where_nothing_else_can_be_shown(monkeypatch, capsys, model):
    monkeypatch.setattr("rich.console.Console.encoding", "cp1252")
    out, _ = talk(monkeypatch, capsys, session(model, temperature=0), "JULIET", "/explain")
    assert out.isascii()
    assert "' '" in out


@pytest.mark.parametrize("home", ["none", "unwritable"])
def test_a_history_that_cannot_be_kept_is_not_kept(monkeypatch, capsys, model, home):
    pytest.importorskip("readline")
    monkeypatch.setenv("XDG_STATE_HOME", "" if home == "none" else "/proc/none")
    kept = []
    monkeypatch.setattr(terminal.atexit, "register", lambda *call: kept.append(call))
    if home == "none":

        def nowhere():
            raise RuntimeError("no home")

        monkeypatch.setattr(Path, "home", nowhere)
    talk(monkeypatch, capsys, session(model))
    assert kept == []
    terminal._write_history(Path("/proc/none/history"))


def conversation(**settings):
    """A session that is a conversation with a model that says little."""
    config = SampleConfig(model="chatty", chat=True, max_new_tokens=8, **settings)
    return Session(config, gpt.interop.load.Loaded(*model_of(128)))


def test_a_conversation_answers_each_message_and_remembers_the_others(monkeypatch, capsys):
    own = conversation(temperature=0, system="Be brief.")
    out, err = talk(monkeypatch, capsys, own, "Hello", '"""And', 'now?"""', "/help")
    system = {"role": "system", "content": "Be brief."}
    messages = [system, {"role": "user", "content": "Hello"}]
    first = gpt.chat(own.model, messages, temperature=0, max_new_tokens=8)
    messages += [{"role": "assistant", "content": first}, {"role": "user", "content": "And\nnow?"}]
    second = gpt.chat(own.model, messages, temperature=0, max_new_tokens=8)
    assert out == f"{first}\n{second}\n\n"
    assert own.conversation.messages[:4] == messages
    assert "type a message; /help shows" in err
    assert "/new                begin a new conversation" in err


def test_in_a_conversation_new_begins_again_and_retry_answers_again(monkeypatch, capsys):
    own = conversation(temperature=3, seed=1)
    out, err = talk(monkeypatch, capsys, own, "/retry", "Hello", "/retry", "/new", "Hello")
    answers = out.splitlines()
    assert "/retry needs an answer" in err
    assert len(own.conversation.messages) == 2
    assert out.count(own.conversation.messages[1]["content"]) >= 2  # the seed makes it the first
    assert len(set(answers)) >= 2
    assert "unknown command /new" in talk(monkeypatch, capsys, session(own.model), "/new").err


def test_a_long_conversation_says_what_it_drops_and_explains_its_answer(monkeypatch, capsys):
    own = conversation(temperature=0)
    out, err = talk(monkeypatch, capsys, own, *["A message with words"] * 4, "/explain")
    assert "the context is full; the oldest turn was dropped\n" in err
    assert "8 tokens" in out
    assert "<|im_start|>" not in out


def test_ctrl_c_stops_an_answer_and_the_conversation_keeps_it(monkeypatch, capsys):
    own = conversation(temperature=0)
    pieces = own.conversation.ask

    def interrupted(text):
        for n, piece in enumerate(pieces(text)):
            if n == 3:
                raise KeyboardInterrupt
            yield piece

    monkeypatch.setattr(own.conversation, "ask", interrupted)
    out, _ = talk(monkeypatch, capsys, own, "Hello")
    [_, answer] = own.conversation.messages
    assert answer["role"] == "assistant"
    assert answer["content"].startswith(out.rstrip("\n"))


def test_a_model_without_a_template_is_told_before_the_conversation(capsys):
    words = ["--model", str(RUN), "--chat", "--prompt", "JULIET"]
    assert main(["sample", *words]) == 2
    assert "the model has no chat template" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"system": "x"}, "system is 'x', and is for conversations: add --chat"),
        ({"chat": True, "num_samples": 2}, "num_samples is 2, and must be 1 with chat"),
        (
            {"chat": True, "prompt_file": Path("a.jsonl"), "out": Path("b")},
            "chat is a conversation, and prompt_file is a .jsonl file of prompts",
        ),
    ],
)
def test_options_that_do_not_fit_a_conversation_are_refused(settings, said):
    with pytest.raises(UsageError, match=said):
        SampleConfig(**settings)
