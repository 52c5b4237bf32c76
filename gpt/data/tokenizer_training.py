"""Train a tokenizer on a text: byte pairs, words or characters.

The library ``tokenizers`` finds the merges (byte-pair encoding: Sennrich et al., 2016; on bytes:
Radford et al., 2019), and tiktoken encodes with them. Both give the same ids. The library merges
the pair of tokens that was learned first; tiktoken merges the two whose joined bytes have the
lowest id. For a token that was learned from the pair (l, r), the merges before it make l and r of
its bytes and no other two parts, since training itself merges in that order. So two neighbours
whose joined bytes are a token are always the pair that it was learned from.

Memory is bounded by the distinct pieces of the text, not by its length. A text longer than
``SAMPLE`` characters is sampled.
"""

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence

from gpt.config import MADE_FROM_TEXT, DataConfig, UsageError, quoted
from gpt.data.byte_characters import bytes_of_characters
from gpt.data.byte_pair import END_OF_TEXT, GPT2Tokenizer
from gpt.data.compression import extra
from gpt.data.corpus import Corpus, Say, Survey
from gpt.data.formats import Document
from gpt.data.patterns import steps_of
from gpt.data.tokenizer import ByteTokenizer, CharTokenizer, Tokenizer
from gpt.data.words import train_characters, train_words

SAMPLE = 400_000_000
"""Characters of a text that byte pairs are learned from at most."""
DEFAULT_VOCAB_SIZE = 8192
SLICE = 1 << 16
"""Characters that the library receives at once; it holds 256 of these."""
LEAST_COUNT = 2
"""How often a pair must occur to be merged."""


def tokenizer_of_corpus(
    config: DataConfig,
    corpus: Corpus,
    survey: Survey | None = None,
    *,
    say: Say = lambda text: None,
) -> Tokenizer:
    """As :func:`tokenizer_of_text`, for a corpus, which is surveyed first if it was not."""
    if survey is None and config.tokenizer in MADE_FROM_TEXT:
        survey = corpus.survey(characters=config.tokenizer == "char")
    return tokenizer_of_text(
        config,
        corpus.documents(),
        length=survey.length if survey else 0,
        characters=survey.characters if survey else "",
        say=say,
    )


def tokenizer_of_text(
    config: DataConfig,
    documents: Iterable[Document],
    *,
    length: int,
    characters: str,
    special_tokens: Sequence[str] = (),
    say: Say = lambda text: None,
) -> Tokenizer:
    """The tokenizer that ``config.tokenizer`` names: ``byte`` and ``gpt2``, and ``char``, ``words``
    and ``bpe`` for these documents of ``length`` characters in all, the last one with
    ``special_tokens``. ``char`` without ``config.unknown`` has all ``characters``. ``UsageError``
    for any other name.
    """
    whole = (piece for document in documents for piece in document)
    match config.tokenizer:
        case "char" if config.unknown:
            kept = train_characters(whole, vocab_size=config.vocab_size)
            return CharTokenizer(kept, unknown=True)
        case "char":
            return CharTokenizer(characters)
        case "byte":
            return ByteTokenizer()
        case "gpt2":
            return GPT2Tokenizer.released()
        case "words":
            return train_words(whole, vocab_size=config.vocab_size, unknown=config.unknown)
        case "bpe":
            return train_byte_pairs(
                sampled(documents, length, say=say),
                vocab_size=config.vocab_size or DEFAULT_VOCAB_SIZE,
                pattern=config.pattern,
                special_tokens=special_tokens,
                say=say,
            )
    raise UsageError(
        f"data.tokenizer is {quoted(config.tokenizer)}, and the caller gave no tokenizer that was "
        "loaded from there"
    )


def recipe(config: DataConfig) -> str:
    """What distinguishes the tokenizers that a text may get, for the name of its cache."""
    unknown = " unknown" * config.unknown
    match config.tokenizer:
        case "char" if config.unknown:
            return f"char {config.vocab_size}{unknown}"
        case "words":
            return f"words {config.vocab_size}{unknown}"
        case "bpe":
            return f"bpe {config.vocab_size or DEFAULT_VOCAB_SIZE} {config.pattern}"
    return config.tokenizer


def sampled(
    documents: Iterable[Document], length: int, *, limit: int = SAMPLE, say: Say = lambda text: None
) -> Iterator[str]:
    """The pieces of documents of ``length`` characters. Of longer ones than ``limit`` about that
    many: each document is drawn or not by a hash of its number, and so is each piece of about a
    million characters of a long document. The same documents give the same sample.
    """
    share = min(limit / max(length, 1), 1)
    if share < 1:
        say(
            f"the text has {length:,} characters: the tokenizer learns from a sample of "
            f"{share:.1%} of its documents"
        )
    for number, document in enumerate(documents):
        for part, piece in enumerate(document):
            digest = hashlib.blake2b(f"{number} {part}".encode(), digest_size=8).digest()
            if int.from_bytes(digest) < share * 2**64:
                yield piece


def train_byte_pairs(
    pieces: Iterable[str],
    *,
    vocab_size: int = DEFAULT_VOCAB_SIZE,
    pattern: str = "gpt2",
    special_tokens: Sequence[str] = (),
    say: Say = lambda text: None,
) -> GPT2Tokenizer:
    """Byte pairs learned from a text. ``vocab_size`` tokens are 256 bytes, the merges, end-of-text
    and ``special_tokens``. Fewer, if the text has no more pairs that occur twice, and ``say`` is
    told. The same text gives the same tokenizer.

    ``UsageError`` for a ``vocab_size`` without room for all bytes and special tokens, special
    tokens that are empty or doubled, a text without characters, and a missing library.
    """
    special = check_special(special_tokens)
    least = 256 + len(special)
    if vocab_size < least:
        raise UsageError(
            f"vocab_size is {vocab_size:,}, and must be at least {least:,}: 256 bytes and "
            f"{len(special)} special token{'s' * (len(special) > 1)}"
        )
    library = extra("tokenizers", "training a byte-pair tokenizer", "tokenizers")
    engine = library.Tokenizer(library.models.BPE())
    empty = {
        "version": "1.0",
        "added_tokens": [],
        "model": {"type": "BPE", "vocab": {}, "merges": []},
    }
    before = library.Tokenizer.from_str(json.dumps(empty | {"pre_tokenizer": steps_of(pattern)}))
    engine.pre_tokenizer = before.pre_tokenizer
    trainer = library.trainers.BpeTrainer(
        vocab_size=vocab_size - len(special),
        min_frequency=LEAST_COUNT,
        initial_alphabet=library.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    seen = 0

    def slices() -> Iterator[str]:
        nonlocal seen
        for piece in pieces:
            seen += len(piece)
            yield from sliced(piece)

    engine.train_from_iterator(slices(), trainer)
    if not seen:
        raise UsageError("the text is empty, and a tokenizer is trained on a text with characters")
    vocab: dict[str, int] = engine.get_vocab(with_added_tokens=False)
    bytes_of = bytes_of_characters()
    spelled = sorted(vocab, key=vocab.__getitem__)
    ranks = [bytes(bytes_of[character] for character in token) for token in spelled]
    learned = set(ranks)
    if doubled := [token for token in special if token.encode() in learned]:
        raise UsageError(
            f"special_tokens has {quoted(doubled[0])}, which is also an ordinary token of the "
            "text; mark it, as in <START>"
        )
    if len(ranks) + len(special) < vocab_size:
        say(
            f"the text gives {len(ranks) + len(special):,} tokens and not {vocab_size:,}: no other "
            "pairs occur twice"
        )
    return GPT2Tokenizer(
        ranks, special={token: len(ranks) + i for i, token in enumerate(special)}, pattern=pattern
    )


def check_special(tokens: Sequence[str]) -> list[str]:
    """The special tokens of a vocabulary, ``<|endoftext|>`` first. ``UsageError`` for an empty or a
    doubled one.
    """
    for i, token in enumerate(tokens):
        if not token.strip():
            raise UsageError(f"special_tokens has {quoted(token)}, and must have texts")
        if token in tokens[:i]:
            raise UsageError(f"special_tokens has {quoted(token)} twice")
    return list(dict.fromkeys([END_OF_TEXT, *tokens]))


def sliced(text: str) -> Iterator[str]:
    """Parts of about ``SLICE`` characters. They end where a space follows a word, as the pieces of
    a document do.
    """
    start = 0
    while len(text) - start > SLICE:
        end = start + SLICE
        while (end := text.rfind(" ", start + 1, end)) > 0 and text[end - 1].isspace():
            pass
        if end < 0:  # a long run without a space is not cut
            end = next(_word_ends(text, start + SLICE), len(text))
        yield text[start:end]
        start = end
    if text[start:]:
        yield text[start:]


def _word_ends(text: str, start: int) -> Iterator[int]:
    while (start := text.find(" ", start + 1)) > 0:
        if not text[start - 1].isspace():
            yield start
