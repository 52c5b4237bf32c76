"""Chat templates: the text of a conversation, as ``transformers`` renders it."""

from collections.abc import Mapping, Sequence
from typing import Any

from gpt.config import UsageError, foreign, quoted
from gpt.data.chat_templates import DEFAULT, ChatTemplates
from gpt.generation.template_sandbox import LimitError, Limits, RefusedError, compiled

Message = Mapping[str, Any]


def render(
    chat: ChatTemplates,
    messages: Sequence[Message],
    *,
    name: str = "",
    add_generation_prompt: bool = True,
    **variables: Any,
) -> str:
    """The text of a conversation. Each message has a ``role`` and its ``content``.

    ``name`` is one of the model's templates, and ``default`` if it is not given, or ``tool_use`` if
    ``tools`` are. With ``add_generation_prompt``, the text ends where the answer begins. Further
    ``variables`` (``tools``, ``documents``, ``enable_thinking``) are the template's. Raises
    ``UsageError`` for messages that the template refuses, and for a template that is broken or goes
    beyond the limits.
    """
    if not name:
        uses_tools = variables.get("tools") is not None and "tool_use" in chat.templates
        name = "tool_use" if uses_tools else DEFAULT
    if name not in chat.templates:
        known = ", ".join(chat.templates)
        raise UsageError(f"the chat template {quoted(name)} does not exist; the model has {known}")
    given: dict[str, Any] = {
        "messages": [dict(m) for m in messages],
        "tools": None,
        "documents": None,
    }
    given |= {"add_generation_prompt": add_generation_prompt}
    try:
        limits, plain = Limits(), _plain({**chat.tokens, **given, **variables})
        limits.weigh(plain)
        text: str = compiled(chat.templates[name], limits).render(plain)
    except RefusedError as error:
        raise UsageError(f"the chat template refuses the messages: {foreign(error)}") from None
    except LimitError as error:
        raise UsageError(f"the chat template {error}") from None
    except UsageError:
        raise
    except (MemoryError, RecursionError):
        raise UsageError("the chat template needs too much memory, and was ended") from None
    except Exception as error:  # whatever a stranger's template does
        raise UsageError(f"the chat template cannot be rendered: {foreign(error)}") from None
    if not text.strip():
        raise UsageError("the chat template makes an empty text of the messages")
    return text


def _plain(value: Any) -> Any:
    """``value`` as JSON's types alone: objects with methods have no place in a template."""
    match value:
        case None | bool() | int() | float():
            return value
        case str():
            return str(value)
        case Mapping():
            return {str(key): _plain(item) for key, item in value.items()}
        case list() | tuple():
            return [_plain(item) for item in value]
    raise UsageError(
        f"the messages contain {quoted(value)}, and must consist of texts, numbers, lists and "
        "objects"
    )
