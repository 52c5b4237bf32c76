"""A conversation with a model that has a chat template.

The template makes the text of all messages, and the model continues it with its answer. The special
tokens that the template writes become their ids; in a message, the same characters stay text
(:mod:`gpt.generation.marks`).
"""

import dataclasses
import re
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from typing import Any

from gpt.config import GenerationConfig, UsageError, quoted
from gpt.data.tokenizer import Tokenizer, decode, special_tokens
from gpt.generation.chat_template import Message, render
from gpt.generation.decode import Decoder
from gpt.generation.marks import MARKS, Marker, encode_rendered, unused_marks
from gpt.generation.prefix import Prefix
from gpt.generation.text import Completion, new_decoder, run, settings_of
from gpt.model.gpt import GPT

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
    own.messages = checked_messages(messages)
    answer = ""
    for piece in own.answer():
        answer += piece
        write(piece)
        if cancelled():
            break
    return answer


def chat_prompt(
    model: tuple[GPT, Tokenizer],
    messages: Sequence[Message],
    *,
    variables: Mapping[str, Any] | None = None,
) -> tuple[list[int], frozenset[int]]:
    """The ids of the prompt to which the model's answer is the continuation, and those that end the
    answer, besides the tokenizer's own. Raises ``UsageError`` as :func:`chat`.
    """
    conversation = Conversation(model, GenerationConfig(), variables=variables)
    conversation.messages = checked_messages(messages)
    return conversation.encoded()


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
        self._prefix = Prefix(network, cache=config.cache)
        self._known: tuple[str, list[int]] = ("", [])  # a rendered text, and the ids it has had
        self._marker, self._mark = Marker(special_tokens(tokenizer)), MARKS[0]
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
        earlier = Completion(0, 0)  # what the answer had before a turn was dropped
        self.completion = Completion(0, 0)
        try:
            while True:
                left = config.max_new_tokens - len(earlier.tokens)
                text, self.prompt = self._fitting(earlier.tokens, reserve=left)
                for piece in self._continued(
                    earlier.tokens, dataclasses.replace(config, max_new_tokens=left)
                ):
                    written += piece
                    yield piece
                if self.completion.reason != "context" or not self._drop():
                    break
                earlier.tokens += self.completion.tokens
                earlier.logprobs += self.completion.logprobs
                earlier.top += self.completion.top
                self.completion = Completion(0, 0)
        finally:
            self.completion.text = written
            self.completion.tokens[:0] = earlier.tokens
            self.completion.logprobs[:0] = earlier.logprobs
            self.completion.top[:0] = earlier.top
            if written or self.completion.reason:
                self.messages.append({"role": "assistant", "content": written})
                self._learn(text, written, self.completion.tokens)

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
        self._mark = unused_marks(self.messages, self._variables)[0]
        text = self._render(self.messages, self._mark)
        known, ids = self._known
        rest = text[len(known) :] if known and text.startswith(known) else None
        tokenizer = self.model[1]
        if rest is not None:
            return text, ids + encode_rendered(tokenizer, rest, self._mark, begins=False)
        return text, encode_rendered(tokenizer, text, self._mark)

    def encoded(self) -> tuple[list[int], frozenset[int]]:
        """The ids of the messages, and those that end the answer to them."""
        return self._rendered()[1], self._turn_ends()

    def _render(self, messages: Sequence[Message], mark: str, **more: Any) -> str:
        marked = self._marker.mark([messages, self._variables], mark)
        return render(self._templates, marked[0], name=self._template, **{**marked[1], **more})

    def _turn_ends(self) -> frozenset[int]:
        """The special token that the template writes after an answer, if it writes one."""
        if self._ends is None:
            self._ends = frozenset()
            mark, inside, *_ = unused_marks(self._variables)
            turns = [{"role": "user", "content": "?"}, {"role": "assistant", "content": inside}]
            try:
                text = self._render(turns, mark, add_generation_prompt=False)
            except UsageError:  # a template for other conversations than this one
                return self._ends
            after = text.rpartition(inside)[2].lstrip()
            special = special_tokens(self.model[1])
            found = [token for token in special if after.startswith(token)]
            if found:
                self._ends = frozenset([special[max(found, key=len)]])
        return self._ends


def checked_messages(messages: Sequence[Message]) -> list[dict[str, Any]]:
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
        content = message.get("content")
        if content is None and not set(message) - {"role", "content"}:
            raise UsageError(f"a message of the {role} has no content, and must have a text")
        if not isinstance(content, str | list | None):
            raise UsageError(
                f"a message of the {role} has the content {quoted(content)}, and must have a text"
            )
    return [{k: v for k, v in message.items() if v is not None} for message in messages]
