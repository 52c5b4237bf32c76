"""The chat templates that belong to a tokenizer: Jinja's texts, and the tokens that they name.

A template turns the messages of a conversation into the text that the model was tuned on.
:mod:`gpt.generation.chat_template` renders it.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Self

from gpt.config import quoted

DEFAULT = "default"
PLAIN = (
    "{% for message in messages %}{{ message['role'] | capitalize }}:\n{{ message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}{{ '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}Assistant:\n{% endif %}"
)
"""The template for a model that has none: it needs no special token besides the end of a text."""
PLAIN_LETTERS = "System:\nUser:\nAssistant:\n"
"""What a vocabulary of characters needs for it."""


@dataclass(frozen=True)
class ChatTemplates:
    """A model's templates by name. ``default`` is the one for plain conversations."""

    templates: Mapping[str, str]
    tokens: Mapping[str, str] = field(default_factory=dict)
    """What templates call special tokens, such as ``bos_token``, and the texts of these tokens."""

    def state(self) -> dict[str, Any]:
        """JSON values for :meth:`from_state`."""
        return {"templates": dict(self.templates), "tokens": dict(self.tokens)}

    @classmethod
    def from_state(cls, state: Any) -> Self | None:
        """The templates of a tokenizer's ``chat`` field, which may be absent. ``ValueError`` says
        what is wrong with it.
        """
        if state is None:
            return None
        parts = state if isinstance(state, dict) else {}
        templates, tokens = parts.get("templates"), parts.get("tokens", {})
        for part in (templates, tokens):
            if not isinstance(part, dict) or not all(isinstance(t, str) for t in part.values()):
                raise ValueError(
                    f"chat is {quoted(state)}, and must have templates and tokens, which map names "
                    "to texts"
                )
        if not templates:
            raise ValueError("chat has no templates, and must have at least one")
        return cls(templates, tokens)
