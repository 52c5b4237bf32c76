"""From a record to one training sequence, in which only the answers count in the loss.

A record is a conversation (``messages``), a ``prompt`` with its ``completion``, or a ``text``. A
conversation is rendered whole by the model's chat template, so the ids are those that
:mod:`gpt.generation.chat` gives the model. An answer counts from where the template leaves the
model to speak, to the special token that ends its turn.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from gpt.config import UsageError, quoted
from gpt.data.examples import Example
from gpt.data.tokenizer import Tokenizer, encoder, prompt_ids, special_tokens
from gpt.generation.chat import checked_messages
from gpt.generation.chat_template import Message, render
from gpt.generation.marks import Marker, encode_rendered, unused_marks

VARIABLES = ("tools", "documents")
"""Fields of a record that are given to the template beside its messages."""


class ExampleEncoder:
    """Encodes records with a model's tokenizer and chat template."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self._marker = Marker(special_tokens(tokenizer))

    def __call__(self, record: Mapping[str, Any], where: str) -> Example:
        """The example of a record. ``UsageError`` names the record by ``where`` if it has no such
        fields, no answer, or messages that the template refuses.
        """
        try:
            if "messages" in record:
                return self._conversation(record)
            if "prompt" in record or "completion" in record:
                return self._completion(_text(record, "prompt"), _text(record, "completion"))
            return self._document(_text(record, "text"))
        except UsageError as error:
            raise UsageError(f"{where}: {error}") from None

    def _document(self, text: str) -> Example:
        ids = [*prompt_ids(self.tokenizer, text), self.tokenizer.end_of_text]
        return example([(ids, True)])

    def _completion(self, prompt: str, completion: str) -> Example:
        answer = encoder(self.tokenizer, begins=False)(completion).tolist()
        return example(
            [
                (prompt_ids(self.tokenizer, prompt), False),
                ([*answer, self.tokenizer.end_of_text], True),
            ]
        )

    def _conversation(self, record: Mapping[str, Any]) -> Example:
        messages = checked_messages(record["messages"])
        answers = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
        if not answers:
            raise UsageError("messages has no message of the assistant, and needs at least one")
        for i in answers:
            _check_content(messages[i])
        variables = {name: record[name] for name in VARIABLES if record.get(name) is not None}
        mark, opening, closing = unused_marks(messages, variables)[:3]
        marked: list[Message]
        marked, given = self._marker.mark([messages, variables], mark)
        text = self._render(marked, given)
        spans = self._spans(answers, marked, given, text, opening, closing)
        parts: list[tuple[list[int], bool]] = []
        done = 0
        for start, end in spans:
            for piece, counts in ((text[done:start], False), (text[start:end], True)):
                ids = encode_rendered(self.tokenizer, piece, mark, begins=not parts)
                parts.append((ids, counts))
            done = end
        if not self._ends_turn(parts[-1][0]):
            parts.append(([self.tokenizer.end_of_text], True))
        return example(parts)

    def _spans(
        self,
        answers: Sequence[int],
        messages: Sequence[Message],
        variables: Mapping[str, Any],
        text: str,
        opening: str,
        closing: str,
    ) -> list[tuple[int, int]]:
        """Where each answer is in the rendered ``text``: from the end of what the template writes
        before an answer, to the end of the turn.

        The answers are found by rendering the messages again, each answer between two marks.
        """
        for tidy in (str, str.strip):  # many templates strip the messages
            enclosed = [dict(message) for message in messages]
            for i in answers:
                enclosed[i]["content"] = opening + tidy(messages[i]["content"]) + closing
            found = self._render(enclosed, variables)
            if found.replace(opening, "").replace(closing, "") == text:
                break
        else:
            raise UsageError("the chat template changes the text of answers, so none can be found")
        special = re.compile("|".join(map(re.escape, special_tokens(self.tokenizer))) or r"(?!)")
        spans = []
        for number, i in enumerate(answers):
            start, end = found.find(opening), found.find(closing) - len(opening)
            if start < 0 or end < start:
                raise UsageError(
                    f"the chat template leaves out the answer {number + 1}, and must show each"
                )
            found = found.replace(opening, "", 1).replace(closing, "", 1)
            if i and text.startswith(before := self._before(messages[:i], variables)):
                start = min(start, len(before))
            turn_end = special.match(text, end + _spaces(text, end))
            spans.append((start, turn_end.end() if turn_end else end))
        return spans

    def _before(self, messages: Sequence[Message], variables: Mapping[str, Any]) -> str:
        """The prompt of an answer to these messages."""
        return self._render(messages, variables, add_generation_prompt=True)

    def _render(
        self,
        messages: Sequence[Message],
        variables: Mapping[str, Any],
        *,
        add_generation_prompt: bool = False,
    ) -> str:
        assert self.tokenizer.chat is not None  # the caller gave it the plain one
        return render(
            self.tokenizer.chat,
            messages,
            add_generation_prompt=add_generation_prompt,
            **variables,
        )

    def _ends_turn(self, ids: Sequence[int]) -> bool:
        """Whether the last answer ends with a special token."""
        return bool(ids) and ids[-1] in special_tokens(self.tokenizer).values()


def example(parts: Sequence[tuple[Sequence[int], bool]]) -> Example:
    """The example of parts that count in the loss, and parts that do not."""
    ids = np.concatenate([np.array(ids, np.uint32) for ids, _ in parts])
    counted = np.concatenate([np.full(len(ids), counts) for ids, counts in parts])
    return Example(ids, counted)


def _text(record: Mapping[str, Any], name: str) -> str:
    if name not in record:
        raise UsageError(
            f"there is no {name!r}; a record has messages, or prompt and completion, or text"
        )
    if not isinstance(record[name], str) or not (record[name] or name == "prompt"):
        raise UsageError(f"{name} is {quoted(record[name])}, and must be a text")
    return str(record[name])


def _check_content(message: Message) -> None:
    content = message.get("content")
    if not isinstance(content, str) or not content.strip():
        raise UsageError(f"an answer has the content {quoted(content)}, and must be a text")


def _spaces(text: str, start: int) -> int:
    """The number of white spaces in ``text`` from ``start`` on."""
    return len(text[start:]) - len(text[start:].lstrip())
