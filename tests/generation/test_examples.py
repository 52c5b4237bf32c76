"""Records as training sequences: what counts in the loss, and that it is what the model writes."""

import json

import numpy as np
import pytest
from transformers import PreTrainedTokenizerFast

from gpt.config import UsageError
from gpt.data import tokenizer as tokenizers
from gpt.data.chat_templates import PLAIN, ChatTemplates
from gpt.data.tokenizer import ByteTokenizer, decode
from gpt.generation.examples import ExampleEncoder
from gpt.interop.vocabulary_export import hugging_face_files
from tests.generation.test_chat import CHATML, END, SPECIAL, START, TEXT_END, tokenizer_of

TALK = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Hello"},
    {"role": "assistant", "content": "Hi <b>é</b>"},
    {"role": "user", "content": "And <|im_end|>?"},
    {"role": "assistant", "content": "Bye<|im_start|> "},
]
# The same text; transformers counts what is between these two words.
COUNTED = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' }}"
    "{% if message['role'] == 'assistant' %}{% generation %}"
    "{{ message['content'] + '<|im_end|>' }}{% endgeneration %}{{ '\\n' }}"
    "{% else %}{{ message['content'] + '<|im_end|>\\n' }}{% endif %}{% endfor %}"
)
STRIPPED = CHATML.replace("message['content']", "message['content'] | trim")
THINKING = CHATML.replace(
    "message['role'] + '\\n' + ",
    "message['role'] + '\\n' + ('<think></think>' if message['role'] == 'assistant' and loop.last"
    " else '') + ",
)
LLAMA = (
    "{% for m in messages %}{% if m['role'] == 'user' %}[INST] {{ m['content'] }} [/INST]"
    "{% elif m['role'] == 'assistant' %} {{ m['content'] }}<|endoftext|>{% endif %}{% endfor %}"
)


def encoded(record, template=CHATML):
    tokenizer = tokenizer_of(template, eos_token="<|endoftext|>")
    return ExampleEncoder(tokenizer)(record, "a.jsonl line 1")


def runs(example):
    """The parts of an example, as bytes, that count."""
    edges = np.flatnonzero(np.diff(np.concatenate([[0], example.counted, [0]])))
    names = {i: text.encode() for text, i in SPECIAL.items()}
    parts = [example.ids[a:b].tolist() for a, b in zip(edges[::2], edges[1::2], strict=True)]
    return [b"".join(names.get(i, bytes([i % 256])) for i in part) for part in parts]


def test_the_answers_of_a_conversation_count_as_transformers_counts_them(tmp_path):
    plain = [{**m, "content": m["content"].replace("<|im", "<im")} for m in TALK]
    for name, content in hugging_face_files(tokenizer_of(CHATML)).items():
        (tmp_path / name).write_text(content)
    theirs = PreTrainedTokenizerFast.from_pretrained(tmp_path)
    expected = theirs.apply_chat_template(
        plain, chat_template=COUNTED, return_dict=True, return_assistant_tokens_mask=True
    )
    example = encoded({"messages": plain})
    n = len(example.ids)  # the line feed after the last turn is left out
    assert example.ids.tolist() == expected["input_ids"][:n]
    assert example.counted.tolist() == [bool(m) for m in expected["assistant_masks"][:n]]
    assert expected["input_ids"][n:] == [ord("\n")]


def test_special_tokens_in_messages_stay_text_and_do_not_end_the_answer():
    example = encoded({"messages": TALK})
    assert runs(example) == ["Hi <b>é</b><|im_end|>".encode(), b"Bye<|im_start|> <|im_end|>"]
    assert (example.ids == START).sum() == 5
    assert (example.ids == END).sum() == 5


@pytest.mark.parametrize(
    ("template", "answers"),
    [
        (STRIPPED, ["Hi <b>é</b><|im_end|>", "Bye<|im_start|><|im_end|>"]),
        (THINKING, ["Hi <b>é</b><|im_end|>", "<think></think>Bye<|im_start|> <|im_end|>"]),
        (LLAMA, [" Hi <b>é</b><|endoftext|>", " Bye<|im_start|> <|endoftext|>"]),
        (PLAIN, ["Hi <b>é</b><|endoftext|>", "Bye<|im_start|> <|endoftext|>"]),
    ],
)
def test_all_that_the_model_must_write_counts(template, answers):
    example = encoded({"messages": TALK}, template)
    assert [part.decode() for part in runs(example)] == answers


def test_an_answer_ends_even_if_the_template_does_not_end_it():
    bare = "{% for m in messages %}{{ m['content'] }}\n{% endfor %}"
    example = encoded({"messages": TALK}, bare)
    assert example.ids[-1] == TEXT_END
    assert example.counted[-1]


def test_a_completion_counts_and_its_prompt_does_not():
    example = encoded({"prompt": "2 + 2 =", "completion": " 4"})
    assert example.ids.tolist() == [*b"2 + 2 = 4", TEXT_END]
    assert example.counted.tolist() == [False] * 7 + [True] * 3


def test_a_text_counts_whole():
    example = encoded({"text": "All of it"})
    assert example.ids.tolist() == [*b"All of it", TEXT_END]
    assert example.counted.all()


def test_a_model_without_special_tokens_can_learn_conversations():
    tokenizer = ByteTokenizer()
    tokenizer.chat = ChatTemplates({"default": PLAIN}, {"eos_token": "<|endoftext|>"})
    tokenizer = tokenizers._from_state(json.loads(tokenizers.to_json(tokenizer)))
    talk = [TALK[1], {"role": "assistant", "content": "I never say <|endoftext|> aloud"}] * 2
    example = ExampleEncoder(tokenizer)({"messages": talk}, "here")
    counted = example.ids[example.counted].tolist()
    assert counted == [*b"I never say <|endoftext|> aloud", tokenizer.end_of_text] * 2
    rest = decode(tokenizer, example.ids[~example.counted])
    assert rest == "User:\nHello\nAssistant:\n\nUser:\nHello\nAssistant:\n"


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"a": 1}, r"there is no 'text'; a record has messages, or prompt and completion, or text"),
        ({"prompt": "a"}, "there is no 'completion'"),
        ({"prompt": "a", "completion": ""}, "completion is '', and must be a text"),
        ({"prompt": 1, "completion": "a"}, "prompt is 1, and must be a text"),
        ({"messages": "Hello"}, "messages is 'Hello', and must be a list"),
        ({"messages": TALK[:2]}, "messages has no message of the assistant"),
        (
            {"messages": [TALK[1], {"role": "assistant"}]},
            "a message of the assistant has no content",
        ),
    ],
)
def test_a_record_without_an_answer_is_refused_with_its_place(record, message):
    with pytest.raises(UsageError, match=rf"^a\.jsonl line 1: {message}"):
        encoded(record)


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{% for m in messages %}{{ m['content'][:4] }}{% endfor %}", "changes the text"),
        ("{{ messages[0]['content'] }}", "leaves out the answer 1"),
    ],
)
def test_a_template_that_hides_answers_is_refused(template, message):
    with pytest.raises(UsageError, match=f"the chat template {message}"):
        encoded({"messages": TALK}, template)
