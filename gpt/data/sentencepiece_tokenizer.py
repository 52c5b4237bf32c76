"""SentencePiece models (``.model`` files; Kudo and Richardson, 2018), computed by its own library.

Unigram, byte-pair, word and character models have the ids of the package ``sentencepiece``, since
its code computes them: normalisation, byte fallback and user-defined symbols included.
"""

import base64
from collections.abc import Iterable
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gpt.config import quoted
from gpt.data.byte_pair import END_OF_TEXT
from gpt.data.chat_templates import ChatTemplates
from gpt.data.compression import extra

Ids = NDArray[np.uint32]
SPACE = "\u2581"
_SPACE_BEFORE = {False: b"\x1a\x02\x18\x00", True: b"\x1a\x02\x18\x01"}
"""Appended to a model's protobuf, it sets ``normalizer_spec.add_dummy_prefix``: messages that
follow one another are merged, and the last value counts.
"""


class SentencePieceTokenizer:
    """The tokenizer of a ``.model`` file, whose bytes are ``model``.

    ``end_of_text`` is the model's end of a sentence (``</s>``), or one more token if it has none.
    Control symbols in a text are text; user-defined symbols are tokens. ``ValueError`` if the
    library cannot read the model; ``UsageError`` if it is not installed.
    """

    kind = "sentencepiece"
    first: tuple[int, ...] = ()
    chat: ChatTemplates | None = None

    def __init__(self, model: bytes) -> None:
        self.model = model
        self._engine = _engine(model)
        n = self._engine.get_piece_size()
        end = self._engine.eos_id()
        self.end_of_text = end if end >= 0 else n
        self.vocab_size = n if end >= 0 else n + 1
        self.special = {
            self._engine.id_to_piece(i): i for i in range(n) if self._engine.is_control(i)
        }
        if end < 0:
            self.special[END_OF_TEXT] = self.end_of_text

    def encode(self, text: str) -> Ids:
        return self._encoded(self._engine, text)

    def encode_next(self, text: str) -> Ids:
        """The ids of a text that continues another one: no space is put before it. One that the
        model would strip from its beginning is kept.
        """
        starts_with_space = self._strips and text[:1].isspace()
        return self._encoded(self._spaced if starts_with_space else self._continuing, text)

    @staticmethod
    def _encoded(engine: Any, text: str) -> Ids:
        text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        return np.array(engine.encode(text, out_type=int), np.uint32)

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        return b"".join([self._bytes[i] for i in ids])

    @cached_property
    def opens_with_space(self) -> bool:
        """Whether the bytes of a whole text begin with a space that is not part of it."""
        return str(self._engine.normalize("a")).startswith(SPACE)

    @cached_property
    def _continuing(self) -> Any:
        return _engine(self.model + _SPACE_BEFORE[False])

    @cached_property
    def _spaced(self) -> Any:
        return _engine(self.model + _SPACE_BEFORE[True])

    @cached_property
    def _strips(self) -> bool:
        return bool(self._engine.normalize(" a") == self._engine.normalize("a"))

    @cached_property
    def _bytes(self) -> list[bytes]:
        spelled = [b""] * self.vocab_size
        for i in range(self._engine.get_piece_size()):
            piece = self._engine.id_to_piece(i)
            if self._engine.is_byte(i):
                spelled[i] = bytes([int(piece[3:5], 16)])
            elif self._engine.is_unknown(i):
                spelled[i] = "\ufffd".encode()
            elif not self._engine.is_control(i):
                spelled[i] = piece.replace(SPACE, " ").encode()
        return spelled

    def state(self) -> dict[str, Any]:
        return {"model": base64.b64encode(self.model).decode()}


def sentencepiece_from_state(state: dict[str, Any]) -> SentencePieceTokenizer:
    """The tokenizer of a saved ``state``; ``ValueError`` says what is wrong with it."""
    model = state.get("model")
    if not isinstance(model, str):
        raise ValueError(f"model is {quoted(model)}, and must be base64")
    try:
        content = base64.b64decode(model, validate=True)
    except ValueError as error:
        raise ValueError(f"model is not base64 ({error})") from None
    return SentencePieceTokenizer(content)


def _engine(model: bytes) -> Any:
    library = extra("sentencepiece", "a SentencePiece model", "sentencepiece")
    try:
        engine = library.SentencePieceProcessor(model_proto=model)
        if model and engine.get_piece_size() > 0:
            return engine
    except (RuntimeError, OSError) as error:
        raise ValueError(f"sentencepiece cannot read it ({error})") from None
    raise ValueError("it has no pieces")
