"""Chat templates: the text is what transformers renders, to the letter."""

import json

import pytest
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from gpt.config import UsageError
from gpt.data.chat_templates import ChatTemplates
from gpt.generation import template_sandbox
from gpt.generation.chat_template import render

TOKENS = {"bos_token": "<s>", "eos_token": "</s>"}
TEMPLATES = {
    # in the style of Llama 3's: headers, trimmed contents, the date, tools as JSON
    "headers": """{{- bos_token }}
{%- if messages[0]['role'] == 'system' %}
    {%- set system = messages[0]['content'] | trim %}
    {%- set rest = messages[1:] %}
{%- else %}
    {%- set system = "" %}
    {%- set rest = messages %}
{%- endif %}
{{- "<|head|>system<|/head|>\\n\\n" }}
{{- "Year: " ~ strftime_now('%Y')[:2] ~ "\\n" }}
{%- if tools is not none %}
    {%- for tool in tools %}
        {{- tool | tojson(indent=4) }}
        {{- "\\n" }}
    {%- endfor %}
{%- endif %}
{{- system }}{{ "<|eot|>" }}
{%- for message in rest %}
    {%- if not (message.role == 'ipython' or 'tool_calls' in message) %}
        {{- '<|head|>' + message['role'] + '<|/head|>\\n\\n' }}
        {{- message['content'] | trim + '<|eot|>' }}
    {%- elif message.tool_calls | length != 1 %}
        {{- raise_exception("one call at a time") }}
    {%- else %}
        {{- message.tool_calls[0] | tojson }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|head|>assistant<|/head|>\\n\\n' }}
{%- endif %}
""",
    # in the style of Qwen's ChatML: a default system text, namespaces, thoughts that are removed
    "chatml": """{%- set ns = namespace(last=-1, many=false) %}
{%- for message in messages[::-1] %}
    {%- set index = (messages | length - 1) - loop.index0 %}
    {%- if ns.last < 0 and message.role == "user" and message.content is string %}
        {%- set ns.last = index %}
        {%- break %}
    {%- endif %}
{%- endfor %}
{% for message in messages %}
  {% if loop.first and message['role'] != 'system' %}
<|im_start|>system
Be brief.<|im_end|>
  {% endif %}
  {%- set content = message.content %}
  {%- if message.role == "assistant" and '</think>' in content and loop.index0 < ns.last %}
    {%- set content = content.split('</think>')[-1].lstrip('\\n') %}
  {%- endif %}
{{ '<|im_start|>' + message.role }}
{{ content }}<|im_end|>
{% endfor %}
{% if add_generation_prompt %}
{% generation %}{{ '<|im_start|>assistant\\n' }}{% endgeneration %}
{%- if enable_thinking is defined and enable_thinking is false %}{{ '<think></think>' }}{% endif %}
{% endif %}""",
    # in the style of Gemma's: the system text goes into the first turn, roles must alternate
    "turns": """{{ bos_token }}{%- if messages[0]['role'] == 'system' -%}
    {%- set before = messages[0]['content'] + '\\n\\n' -%}{%- set rest = messages[1:] -%}
{%- else -%}{%- set before = "" -%}{%- set rest = messages -%}{%- endif -%}
{%- for message in rest -%}
    {%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) -%}
        {{ raise_exception("Roles must alternate user/assistant") }}
    {%- endif -%}
    {%- set role = "model" if message['role'] == "assistant" else message['role'] -%}
    {{ '<turn>' + role + '\\n' + (before if loop.first else "") }}
    {%- if message['content'] is string -%}{{ message['content'] | trim }}
    {%- elif message['content'] is iterable -%}
        {%- for item in message['content'] -%}{{ item['text'] | trim }}{%- endfor -%}
    {%- endif -%}
    {{ '<end>\\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<turn>model\\n' }}{%- endif -%}
""",
    # in the style of Mistral's: brackets, the end token after each answer
    "brackets": """{{ bos_token }}{% for message in messages %}{% if message['role'] == 'user' %}"""
    """{{ '[ASK] ' + message['content'] + ' [/ASK]' }}{% elif message['role'] == 'assistant' %}"""
    """{{ ' ' + message['content'] | trim + eos_token }}{% else %}"""
    """{{ raise_exception('Only user and assistant roles are supported!') }}"""
    """{% endif %}{% endfor %}""",
}
TALK = [
    {"role": "user", "content": '  What is 1 < 2 & "3"?\n'},
    {"role": "assistant", "content": "<think>\nhm\n</think>\n\nTrue, é 東. "},
    {"role": "user", "content": "And\n\n2?"},
]
SYSTEM = {"role": "system", "content": " You know numbers. "}
PARTS = [
    {"role": "user", "content": [{"type": "text", "text": "a "}, {"type": "text", "text": "b"}]}
]
TOOLS = [{"type": "function", "function": {"name": "é<>", "parameters": {"type": "object"}}}]
CONVERSATIONS = [TALK, [SYSTEM, *TALK], TALK[:1], TALK[:2], PARTS, [SYSTEM, SYSTEM]]


@pytest.fixture(scope="module")
def theirs():
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE()), **TOKENS)


@pytest.mark.parametrize("conversation", CONVERSATIONS)
@pytest.mark.parametrize("opens", [True, False])
@pytest.mark.parametrize("name", TEMPLATES)
def test_the_text_is_transformers_to_the_letter(name, opens, conversation, theirs):
    options = {"tools": TOOLS if name == "headers" and opens else None}
    options |= {"enable_thinking": False} if name == "chatml" else {}
    chat = ChatTemplates({"default": TEMPLATES[name]}, TOKENS)

    def ours():
        return render(chat, conversation, add_generation_prompt=opens, **options)

    try:
        expected = theirs.apply_chat_template(
            conversation,
            chat_template=TEMPLATES[name],
            tokenize=False,
            add_generation_prompt=opens,
            **options,
        )
    except Exception:
        with pytest.raises(UsageError, match="the chat template (refuses|cannot be rendered)"):
            ours()
    else:
        assert ours() == expected


def test_a_template_is_chosen_by_name_and_tools_have_their_own():
    chat = ChatTemplates({"default": "plain", "tool_use": "tools", "rag": "documents"})
    assert render(chat, TALK) == "plain"
    assert render(chat, TALK, tools=TOOLS) == "tools"
    assert render(chat, TALK, name="rag") == "documents"
    with pytest.raises(UsageError, match="'other' does not exist; the model has default, tool_use"):
        render(chat, TALK, name="other")


def test_what_a_template_refuses_is_told_in_its_words():
    with pytest.raises(UsageError, match="refuses the messages: Only user and assistant roles"):
        render(ChatTemplates({"default": TEMPLATES["brackets"]}), [SYSTEM])


LARGE, LONG = "makes more than .* characters, and was ended", "steps, and was ended"
GROWING = (
    "{%% set n = namespace(x=%s) %%}{%% for a in range(99) %%}{%% set n.x = %s %%}{%% endfor %%}"
)
HOSTILE = {
    "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}": LONG,
    "{% macro f() %}{% for i in range(9) %}{{ f() }}{% endfor %}{% endmacro %}{{ f() }}": "ended",
    "{% for a in range(10**7) %}{% endfor %}": "cannot be rendered: Range too big",
    "{% for a in messages recursive %}{{ loop(messages) }}{% endfor %}": "ended",
    "{% for a in range(99999) %}" + 9000 * "a" + "{% endfor %}": LARGE,
    GROWING % ("'a'", "n.x + n.x"): LARGE,
    GROWING % ("'a'", "n.x ~ n.x"): LARGE,
    GROWING % ("[1]", "[n.x, n.x]"): LONG,
    GROWING % ("9", "n.x * n.x"): "computes a number that is too large",
    "{{ 10 ** 10 ** 10 }}": "computes a power that is too large",
    "{{ 'a' * 10000000000 }}": LARGE,
    "{{ [messages] * 10000000000 }}": LARGE,
    "{{ 'a' | center(1000000000) }}": LARGE,
    "{{ 'a\\nb' | indent(1000000000) }}": LARGE,
    "{{ 'a'.ljust(1000000000) }}": LARGE,
    "{{ messages | tojson(indent=1000000000) }}": LARGE,
    "{{ '%1000000000d' % 1 }}": LARGE,
    "{{ '%*d' % (1000000000, 1) }}": LARGE,
    "{{ '%1000000000d' | format(1) }}": LARGE,
    "{{ '{:1000000000}'.format(1) }}": LARGE,
    "{{ '{:{}}'.format(1, 1000000000) }}": LARGE,
    "{{ ('x' * 4000).replace('x', 'y' * 40000) }}": LARGE,
    "{{ ('x' * 4000) | replace('', 'y' * 40000) }}": LARGE,
    "{{ ('x' * 4000) | join('y' * 40000) }}": LARGE,
    "{{ ('y' * 40000).join('x' * 4000) }}": LARGE,
    "{% import 'os' as os %}": "imports another template",
    "{% from 'os' import path %}": "imports another template",
    "{% include '/etc/passwd' %}": "imports another template",
    "{% extends 'x' %}": "imports another template",
    "{{ ''.__class__ }}": "reads the attribute '__class__' of a str",
    "{{ messages | attr('__class__') }}": "reads the attribute '__class__' of a list",
    "{{ cycler.__init__.__globals__ }}": "reads the attribute '__init__'",
    "{{ '{0.__class__}'.format(messages) }}": "reads the attribute '__class__'",
    "{{ messages.append(1) }}": "reads the attribute 'append' of a list",
    "{{ messages[0].clear() }}": "reads the attribute 'clear' of a dict",
    "{{ lipsum(1000) }}": "'lipsum' is undefined",
    "{{ nothing.at.all }}": "'nothing' is undefined",
    "{% if %}": "cannot be rendered: Expected an expression",
    "{{ " + "(" * 5000 + ")" * 5000 + " }}": "needs too much memory|cannot be rendered",
    "a" * 600_000: "600,000 characters, which is too long",
}


@pytest.mark.parametrize("template", HOSTILE, ids=lambda text: text[:40])
def test_a_hostile_template_ends_in_one_sentence(template, monkeypatch):
    monkeypatch.setattr(template_sandbox, "MOST_STEPS", 20_000)
    monkeypatch.setattr(template_sandbox, "MOST_SIZE", 10_000_000)
    messages = [dict(message) for message in TALK]
    with pytest.raises(UsageError, match=HOSTILE[template]) as error:
        render(ChatTemplates({"default": template}), messages)
    assert str(error.value).startswith("the chat template ")
    assert len(str(error.value)) < 1000
    assert messages == TALK


def test_a_template_is_ended_by_the_clock_too(monkeypatch):
    monkeypatch.setattr(template_sandbox, "MOST_SECONDS", 0.0)
    with pytest.raises(UsageError, match="takes more than 0 seconds, and was ended"):
        render(ChatTemplates({"default": TEMPLATES["headers"]}), TALK)


def test_messages_of_objects_are_refused_before_a_template_sees_them():
    message = {"role": "user", "content": json}
    with pytest.raises(UsageError, match="and must consist of texts, numbers, lists and objects"):
        render(ChatTemplates({"default": "x"}), [message])


def test_without_jinja2_a_sentence_says_what_to_install(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "jinja2", None)
    with pytest.raises(UsageError, match="need the package jinja2: pip install jinja2"):
        render(ChatTemplates({"default": "x"}), TALK)
