"""A conversation with a model that has a chat template.

The template makes the text of all messages, and the model continues it with its answer. The special
tokens that the template writes become their ids. The same characters in a message stay text: before
rendering, a character that occurs nowhere (the mark) is put into each special token that a message
contains or begins or ends with. The text is split at the special tokens that are still whole, and
the marks are removed from the text between them.
"""

import dataclasses
import re
from collections.abc import Callable, Collection, Generator, Iterable, Iterator, Mapping, Sequence
from typing import Any

from gpt.config import GenerationConfig, UsageError, quoted
from gpt.data.tokenizer import Tokenizer, decode, encoder
from gpt.generation.chat_template import Message, render
from gpt.generation.decode import Decoder
from gpt.generation.prefix import Prefix
from gpt.generation.text import Completion, new_decoder, run, settings_of
from gpt.model.gpt import GPT

_MARKS = [chr(code) for code in range(0xFDD0, 0xFDF0)]
"""Unicode's noncharacters, which no text needs."""
_ROLE = re.compile(r"[\w.-]{1,64}")
Say = Callable[[str], None]


def chat(
    model: tuple[GPT, Tokenizer],
    messages: Sequence[Message],
    *,
    template: str = "",
    variables: Mapping[str, Any] | None = None,
    write: Callable[[str], object] = lambda piece: None,
    cancelled: Callable[[], bool] = lambda: False,
    **settings: Any,
) -> str:
    """The model's answer to a conversation.

    ``messages`` are objects with a ``role`` (``system``, ``user``, ``assistant``) and ``content``;
    the last one is usually the user's. ``template`` is one of the model's chat templates by name,
    and ``variables`` are further values for it, such as ``tools``. ``write`` gets each piece of the
    answer when it is certain. ``cancelled`` is called after each piece; if it returns True, the
    answer ends there. ``settings`` are those of :func:`gpt.generate`. If the context is full, the
    oldest turns are left out. Raises ``UsageError`` for a model without a template, for messages
    that the template refuses, and for a last message that does not fit the context.
    """
    options = ("template", "variables", "write", "cancelled")
    own = Conversation(
        model, settings_of(settings, options), template=template, variables=variables
    )
    own.messages = _checked(messages)
    answer = ""
    for piece in own.answer():
        answer += piece
        write(piece)
        if cancelled():
            break
    return answer


class Conversation:
    """The messages of a conversation, and the cache of what the model has read of them.

    A turn reads only the tokens that differ from those of the turn before. ``say`` is told when the
    oldest turns are dropped because the context is full. With beams or guessed tokens, each turn
    reads the whole conversation.
    """

    def __init__(
        self,
        model: tuple[GPT, Tokenizer],
        config: GenerationConfig,
        *,
        system: str = "",
        template: str = "",
        variables: Mapping[str, Any] | None = None,
        draft: tuple[GPT, Tokenizer] | None = None,
        num_draft_tokens: int = 0,
        say: Say = lambda text: None,
    ) -> None:
        network, tokenizer = model
        if tokenizer.chat is None:
            raise UsageError(
                "the model has no chat template, and a conversation needs one: use a model that "
                "was tuned for conversations, or continue a text instead"
            )
        self.model, self.config, self.say = model, config, say
        self._templates = tokenizer.chat
        self._template, self._variables = template, dict(variables or {})
        self._guessing: dict[str, Any] = {"draft": draft, "num_draft_tokens": num_draft_tokens}
        self._prefix = Prefix(network)
        self._known: tuple[str, list[int]] = ("", [])  # a rendered text, and the ids it has had
        self._marker, self._mark = _Marker(special_texts(tokenizer)), _MARKS[0]
        self._ends: frozenset[int] | None = None
        self.messages: list[dict[str, Any]] = []
        self.prompt: list[int] = []
        """The ids of the last prompt."""
        self.completion = Completion(0, 0)
        """The last answer."""
        if system:
            self.messages.append({"role": "system", "content": system})

    def ask(self, text: str) -> Generator[str, None, None]:
        """Add the user's message, and yield the pieces of the answer. A message that gets no answer
        is not added.
        """
        before = list(self.messages)
        self.messages.append({"role": "user", "content": text})
        try:
            yield from self.answer()
        finally:
            if self.messages[-1]["role"] == "user":
                self.messages = before

    def retry(self) -> Generator[str, None, None]:
        """Yield another answer to the last message of the user."""
        last = [i for i, message in enumerate(self.messages) if message["role"] == "user"]
        if not last:
            raise UsageError("there is no message to answer")
        del self.messages[last[-1] + 1 :]
        return self.answer()

    def answer(self) -> Generator[str, None, None]:
        """Yield the pieces of the answer to the messages, and add it to them, also when it is
        interrupted.
        """
        config, text, written = self.config, "", ""
        if config.num_samples != 1:
            raise UsageError(f"num_samples is {config.num_samples}, and must be 1 for an answer")
        if config.past_context != "sinks":
            config = dataclasses.replace(config, past_context="stop")
        done: list[int] = []  # the answer's tokens of earlier rounds
        self.completion = Completion(0, 0)
        try:
            while True:
                left = config.max_new_tokens - len(done)
                text, self.prompt = self._fitting(done, reserve=left)
                for piece in self._continued(
                    done, dataclasses.replace(config, max_new_tokens=left)
                ):
                    written += piece
                    yield piece
                if self.completion.reason != "context" or not self._drop():
                    break
                done += self.completion.tokens
        finally:
            if written or self.completion.reason:
                self.messages.append({"role": "assistant", "content": written})
                self._learn(text, written, done + self.completion.tokens)

    def _continued(self, done: list[int], config: GenerationConfig) -> Iterator[str]:
        """The pieces that continue the prompt and the tokens ``done`` of its answer. What the model
        has read is kept for the next turn, also when it is interrupted.
        """
        decoder = new_decoder(
            self.model, config, ends=self._turn_ends(), prefix=self._prefix, **self._guessing
        )
        try:
            for piece, completion in run(
                self.model, [self.prompt + done], decoder, begins=not done
            ):
                self.completion = completion
                if piece:
                    yield piece
        finally:
            if isinstance(decoder, Decoder):
                decoder.remember()

    def _learn(self, text: str, written: str, tokens: list[int]) -> None:
        """Keep the ids of the prompt's ``text`` and of the answer for the next turn."""
        if self.completion.reason == "end_of_text":
            tokens = tokens[:-1]
        same = decode(self.model[1], tokens) == written
        marked: str = self._marker.mark(written, self._mark)
        self._known = (text + marked, self.prompt + tokens) if same else ("", [])

    def _fitting(self, new: list[int], reserve: int) -> tuple[str, list[int]]:
        """The rendered messages and their ids, after the oldest turns were dropped so that the
        answer's tokens so far (``new``) and ``reserve`` more fit the context.
        """
        length = self.model[0].config.context_length
        reserve = max(1, min(reserve, length // 4))
        while True:
            text, ids = self._rendered()
            if self.config.past_context == "sinks" or len(ids) + len(new) + reserve <= length:
                return text, ids
            if not self._drop():
                if len(ids) + len(new) < length:
                    return text, ids
                raise UsageError(
                    f"the message and its system prompt have {len(ids):,} tokens, and the model's "
                    f"context_length is {length:,}; write a shorter message"
                )

    def _drop(self) -> bool:
        """Drop the oldest turn: a message of the user with what follows it. Returns whether there
        was one besides the last.
        """
        turns = [i for i, message in enumerate(self.messages) if message["role"] == "user"]
        if len(turns) < 2:
            return False
        del self.messages[turns[0] : turns[1]]
        self.say("the context is full; the oldest turn was dropped")
        return True

    def _rendered(self) -> tuple[str, list[int]]:
        """The text of the messages up to the answer, with marks, and its ids. What was answered
        before keeps the ids that it was made of.
        """
        self._mark = _unused_marks(self.messages, self._variables)[0]
        text = self._render(self.messages, self._mark)
        known, ids = self._known
        rest = text[len(known) :] if known and text.startswith(known) else None
        tokenizer = self.model[1]
        if rest is not None:
            return text, ids + encode_rendered(tokenizer, rest, self._mark, begins=False)
        return text, encode_rendered(tokenizer, text, self._mark)

    def _render(self, messages: Sequence[Message], mark: str, **more: Any) -> str:
        marked = self._marker.mark([messages, self._variables], mark)
        return render(self._templates, marked[0], name=self._template, **{**marked[1], **more})

    def _turn_ends(self) -> frozenset[int]:
        """The special token that the template writes after an answer, if it writes one."""
        if self._ends is None:
            self._ends = frozenset()
            mark, inside, *_ = _unused_marks(self._variables)
            turns = [{"role": "user", "content": "?"}, {"role": "assistant", "content": inside}]
            try:
                text = self._render(turns, mark, add_generation_prompt=False)
            except UsageError:  # a template for other conversations than this one
                return self._ends
            after = text.rpartition(inside)[2].lstrip()
            special = special_texts(self.model[1])
            found = [token for token in special if after.startswith(token)]
            if found:
                self._ends = frozenset([special[max(found, key=len)]])
        return self._ends


def special_texts(tokenizer: Tokenizer) -> Mapping[str, int]:
    """The special tokens that a template can write, by their texts."""
    special: Mapping[str, int] = getattr(tokenizer, "special", {})
    return special


def encode_rendered(
    tokenizer: Tokenizer, text: str, mark: str, *, begins: bool = True
) -> list[int]:
    """The ids of a rendered ``text``, in which whole special tokens count and those with a ``mark``
    are text. ``begins`` is whether it is the beginning of the conversation.
    """
    special = special_texts(tokenizer)
    parts = re.split(f"({_any_of(special)})", text) if special else [text]
    everywhere = getattr(tokenizer, "spaces_after_special", False)
    ids: list[int] = []
    for number, part in enumerate(parts):
        if number % 2:
            ids.append(special[part])
        elif part := part.replace(mark, ""):
            starts = begins if number == 0 else everywhere
            encode = tokenizer.encode if starts else encoder(tokenizer, begins=False)
            ids += encode(part).tolist()
    return ids


def _any_of(texts: Iterable[str]) -> str:
    """An expression for one of ``texts``, the longest that matches."""
    return "|".join(map(re.escape, sorted(texts, key=len, reverse=True)))


class _Marker:
    """Puts a mark into each special token in a text, and into a part of one at the text's beginning
    or end, because the template may write the rest of it.
    """

    def __init__(self, special: Collection[str]) -> None:
        self._whole = re.compile(f"(?={_any_of(special)})", re.IGNORECASE) if special else None
        self._beginnings = {token[:n] for token in special for n in range(1, len(token))}
        self._ends = {token[n:] for token in special for n in range(1, len(token))}
        self._longest = max(map(len, special), default=1)

    def mark(self, value: Any, mark: str) -> Any:
        """``value`` with marks in all its texts. Keys and roles are the caller's own, and stay."""
        if isinstance(value, str):
            return self._marked(value, mark) if self._whole else value
        if isinstance(value, Mapping):
            return {k: v if k == "role" else self.mark(v, mark) for k, v in value.items()}
        if isinstance(value, list | tuple):
            return [self.mark(item, mark) for item in value]
        return value

    def _marked(self, text: str, mark: str) -> str:
        assert self._whole is not None
        places = {match.start() + 1 for match in self._whole.finditer(text)}
        for n in range(1, min(self._longest, len(text) + 1)):
            if text[-n:] in self._beginnings:
                places.add(len(text) - n + 1)
            if text[:n] in self._ends:
                places.add(n - 1)
        for place in sorted(places, reverse=True):
            text = text[:place] + mark + text[place:]
        return text


def _unused_marks(*values: Any) -> list[str]:
    """Marks that are in none of the texts; ``UsageError`` if they leave too few."""
    texts = repr(values)  # in which they are escaped
    unused = [mark for mark in _MARKS if f"\\u{ord(mark):04x}" not in texts]
    if len(unused) < 2:
        raise UsageError(
            "the messages contain Unicode's noncharacters U+FDD0 to U+FDEF; remove some"
        )
    return unused


def _checked(messages: Sequence[Message]) -> list[dict[str, Any]]:
    """The messages as objects; ``UsageError`` if they are not messages."""
    if isinstance(messages, str | Mapping) or not isinstance(messages, Sequence) or not messages:
        raise UsageError(
            f"messages is {quoted(messages)}, and must be a list of one or more messages, as in "
            "[{'role': 'user', 'content': 'Hello'}]"
        )
    for message in messages:
        if not isinstance(message, Mapping):
            raise UsageError(
                f"messages has {quoted(message)}, and must have objects with role and content"
            )
        role = message.get("role")
        if not isinstance(role, str) or not _ROLE.fullmatch(role):
            raise UsageError(
                f"a message has the role {quoted(role)}, and must have one such as system, user or "
                "assistant"
            )
    return [{k: v for k, v in message.items() if v is not None} for message in messages]
