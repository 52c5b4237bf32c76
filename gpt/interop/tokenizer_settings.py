"""What ``tokenizer_config.json`` and the files beside it say: special tokens and chat templates."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gpt.config import UsageError, foreign, quoted
from gpt.data.chat_templates import DEFAULT, ChatTemplates
from gpt.files import read_object, read_text

WHAT = "the tokenizer's"
NAMES = (
    "bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token",
)  # fmt: skip


@dataclass(frozen=True)
class Settings:
    """A tokenizer's settings outside of its vocabulary."""

    special: Mapping[str, int] = field(default_factory=dict)
    added: Mapping[str, int] = field(default_factory=dict)
    tokens: Mapping[str, str] = field(default_factory=dict)
    """The texts of the tokens in :data:`NAMES`."""
    add_first: bool | None = None
    """Whether a text begins with ``bos_token``; ``None`` leaves that to the post-processor."""
    add_prefix_space: bool = False
    chat: ChatTemplates | None = None


def read_settings(folder: Path) -> Settings:
    """The settings in ``folder``, where each file may be absent. ``UsageError`` for broken ones,
    and for a tokenizer that ends each text with a token.
    """
    path = folder / "tokenizer_config.json"
    state = read_object(path, WHAT) if path.exists() else {}
    if state.get("add_eos_token"):
        raise UsageError(f"{foreign(path)} has add_eos_token true, and must have false")
    entries = []
    for i, token in object_in(path, state, "added_tokens_decoder").items():
        if not (isinstance(token, dict) and re.fullmatch(r"[0-9]{1,18}", i)):
            raise UsageError(
                f"{foreign(path)} has {quoted(i)}: {quoted(token)} in added_tokens_decoder, which "
                "must map an id to a token"
            )
        entries.append({"special": False, **token, "id": int(i)})
    special, added = added_tokens(path, entries)
    more = folder / "special_tokens_map.json"
    named = (read_object(more, WHAT) if more.exists() else {}) | state
    tokens = {name: text for name in NAMES if (text := _text(named.get(name))) is not None}
    first = state.get("add_bos_token")
    return Settings(
        special=special,
        added=added,
        tokens=tokens,
        add_first=first if isinstance(first, bool) else None,
        add_prefix_space=bool(state.get("add_prefix_space")),
        chat=_chat(path, state.get("chat_template"), tokens),
    )


def _text(token: object) -> str | None:
    """The text of a token that is spelled out, or the ``content`` of an object."""
    content = token.get("content") if isinstance(token, dict) else token
    return content if isinstance(content, str) else None


def _chat(path: Path, listed: object, tokens: Mapping[str, str]) -> ChatTemplates | None:
    """The templates of a configuration's ``chat_template``, one or a list of named ones, and of the
    ``.jinja`` files in its folder.
    """
    templates: dict[str, str] = {}
    for entry in listed if isinstance(listed, list) else [] if listed is None else [listed]:
        match entry:
            case str():
                templates[DEFAULT] = entry
            case {"name": str() as name, "template": str() as template}:
                templates[name] = template
            case _:
                raise UsageError(
                    f"{foreign(path)} has {quoted(entry)} in chat_template, which must be a text, "
                    "or a list of objects with name and template"
                )
    whole = path.with_name("chat_template.jinja")
    if whole.exists():
        templates[DEFAULT] = read_text(whole, "the chat template")
    for file in sorted(path.parent.glob("additional_chat_templates/*.jinja")):
        templates[file.stem] = read_text(file, "the chat template")
    return chat_of(templates, tokens)


def chat_of(templates: Mapping[str, str], tokens: Mapping[str, str]) -> ChatTemplates | None:
    """The templates that are not empty; ``None`` if there is none."""
    written = {name: text for name, text in templates.items() if text.strip()}
    return ChatTemplates(written, tokens) if written else None


def object_in(path: Path, state: dict[str, Any], name: str) -> dict[str, Any]:
    """A field that must be an object, or absent."""
    value = state.get(name)
    if not isinstance(value, dict | None):
        raise UsageError(f"{foreign(path)} has {name} {quoted(value)}, which must be an object")
    return value or {}


def added_tokens(path: Path, tokens: object) -> tuple[dict[str, int], dict[str, int]]:
    """The special tokens, and the other added tokens, of a list of ``added_tokens``."""
    special, added = dict[str, int](), dict[str, int]()
    entries: list[Any] = tokens if isinstance(tokens, list) else [tokens]
    for token in entries:
        match token:
            case {"content": str() as content, "id": int() as i, "special": bool() as is_special}:
                (special if is_special else added)[content] = i
            case _:
                raise UsageError(
                    f"{foreign(path)} has the added token {quoted(token)}, which must have "
                    "content, id and special"
                )
        if not content:
            raise UsageError(f"{foreign(path)} has an added token without content")
    return special, added
