"""Tokenizers that the library ``tokenizers`` computes from its own JSON: the vocabularies that
tiktoken cannot express.

Among them are SentencePiece's (Llama 1 and 2, Mistral, Gemma), GPT-1's, and byte-level ones whose
merges are in another order than their ids. The ids are those of Hugging Face's fast tokenizers,
because the same code computes them.
"""

import copy
import json
from collections.abc import Iterable, Mapping
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gpt.config import UsageError, quoted
from gpt.data.chat_templates import ChatTemplates
from gpt.data.library_definition import all_ids, check_definition, parts, prepends, spelling

Ids = NDArray[np.uint32]


class LibraryTokenizer:
    """The tokenizer of a ``tokenizer.json``, whose content is ``definition``.

    The parameters are as in :class:`gpt.data.byte_pair.GPT2Tokenizer`. Special tokens in a text are
    text. ``ValueError`` if the library cannot read the definition, or if its decoder is not one
    whose bytes are known token by token; ``UsageError`` if the library is not installed.
    """

    kind = "tokenizers"

    def __init__(
        self,
        definition: Mapping[str, Any],
        *,
        end_of_text: int,
        vocab_size: int | None = None,
        ends: Iterable[int] = (),
        first: Iterable[int] = (),
        chat: ChatTemplates | None = None,
    ) -> None:
        self.definition, self.chat, self.first = definition, chat, tuple(first)
        self.end_of_text = end_of_text
        self.ends = frozenset(ends) | {end_of_text}
        self._engine = _engine(definition)
        entries: list[dict[str, Any]] = definition.get("added_tokens") or []
        self.special = {entry["content"]: entry["id"] for entry in entries if entry["special"]}
        self.added = {entry["content"]: entry["id"] for entry in entries if not entry["special"]}
        self._ids: dict[str, int] = definition["model"]["vocab"]
        self._spell = spelling(definition.get("decoder"))
        last = max([*self._ids.values(), *self.special.values(), *self.added.values()])
        self.vocab_size = last + 1 if vocab_size is None else vocab_size
        if not {end_of_text, *self.ends, *self.first} <= set(range(self.vocab_size)):
            raise ValueError("end_of_text, ends and first must be ids of its tokens")

    def encode(self, text: str) -> Ids:
        """The ids of ``text``. ``UsageError`` for a token for which the model has no row."""
        return self._encoded(self._engine, text)

    def encode_next(self, text: str) -> Ids:
        """The ids of a text that continues another one: no space is put before it."""
        return self._encoded(self._continuing, text)

    def _encoded(self, engine: Any, text: str) -> Ids:
        text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        ids = np.array(engine.encode(text, add_special_tokens=False).ids, np.uint32)
        if len(ids) and ids.max() >= self.vocab_size:
            missing = int(ids.max())
            raise UsageError(
                f"the text has the token {quoted(self._engine.id_to_token(missing))} with the id "
                f"{missing}, and the model's last id is {self.vocab_size - 1}"
            )
        return ids

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        return b"".join([self._bytes[i] for i in ids])

    @property
    def opens_with_space(self) -> bool:
        """Whether the bytes of a whole text begin with a space that is not part of it."""
        return any(
            prepends(part) != "never" or (part.get("type") == "Strip" and part.get("start"))
            for part in parts(self.definition.get("decoder"), "decoders")
        )

    @property
    def spaces_after_special(self) -> bool:
        """Whether the space is put before each piece of text between special tokens, and not only
        before the first one.
        """
        return any(
            part.get("type") == "Prepend" or prepends(part) == "always"
            for name, several in (("normalizer", "normalizers"), ("pre_tokenizer", "pretokenizers"))
            for part in parts(self.definition.get(name), several)
        )

    @cached_property
    def _bytes(self) -> list[bytes]:
        spelled = [b""] * self.vocab_size
        special = set(self.special.values())
        for token, i in (self._ids | self.added).items():
            if i < self.vocab_size and i not in special:
                spelled[i] = self._spell(token)
        return spelled

    @cached_property
    def _continuing(self) -> Any:
        changed = copy.deepcopy({k: v for k, v in self.definition.items() if k != "model"})
        for part in parts(changed.get("normalizer"), "normalizers"):
            if part.get("type") == "Prepend":  # replaced by a no-op
                part.clear()
                part.update(type="Replace", pattern={"String": "\ufdd0"}, content="")
        for part in parts(changed.get("pre_tokenizer"), "pretokenizers"):
            if part.get("type") == "Metaspace":
                part.pop("add_prefix_space", None)
                part["prepend_scheme"] = "never"
            elif part.get("type") == "ByteLevel":
                part["add_prefix_space"] = False
        return _engine(changed | {"model": self.definition["model"]})

    def state(self) -> dict[str, Any]:
        state: dict[str, Any] = {
            "definition": dict(self.definition),
            "end_of_text": self.end_of_text,
            "vocab_size": self.vocab_size,
        }
        if len(self.ends) > 1:
            state["ends"] = sorted(self.ends)
        if self.first:
            state["first"] = list(self.first)
        return state


def library_tokenizer_from_state(state: dict[str, Any]) -> LibraryTokenizer:
    """The tokenizer of a saved ``state``; ``ValueError`` says what is wrong with it."""
    definition: Any = state.get("definition")
    end, size = state.get("end_of_text"), state.get("vocab_size")
    check_definition(definition)
    if type(end) is not int or type(size) is not int:
        raise ValueError("end_of_text and vocab_size must be whole numbers")
    if not 0 < size <= 1 + max(all_ids(definition)):
        raise ValueError(f"vocab_size is {size:,}, and the vocabulary has fewer tokens")
    lists = {name: state.get(name, []) for name in ("ends", "first")}
    for name, ids in lists.items():
        if not isinstance(ids, list) or not all(type(i) is int for i in ids):
            raise ValueError(f"{name} is {quoted(ids)}, and must be a list of ids")
    return LibraryTokenizer(
        definition,
        end_of_text=end,
        vocab_size=size,
        **lists,
    )


def _engine(definition: Mapping[str, Any]) -> Any:
    """The library's tokenizer, which reads special tokens in a text as text."""
    try:
        from tokenizers import Tokenizer
    except ImportError:
        raise UsageError(
            "this tokenizer needs the package tokenizers: pip install tokenizers"
        ) from None
    try:
        engine = Tokenizer.from_str(json.dumps(definition))
    except Exception as error:  # the library raises Exception itself
        raise ValueError(f"tokenizers cannot read it ({error})") from None
    engine.no_truncation()
    engine.no_padding()
    engine.encode_special_tokens = True
    return engine
