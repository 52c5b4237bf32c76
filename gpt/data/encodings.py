"""tiktoken's own encodings (``cl100k_base``, ``o200k_base``, ...) and those of its plug-ins."""

import tiktoken

from gpt.config import UsageError, foreign, quoted
from gpt.data.byte_pair import END_OF_TEXT, GPT2Tokenizer
from gpt.data.patterns import PATTERNS


def encoding_names() -> list[str]:
    """The names of the encodings that tiktoken knows."""
    return sorted(tiktoken.list_encoding_names())


def load_encoding(name: str) -> GPT2Tokenizer:
    """The encoding that tiktoken names ``name``, with the same ids.

    Its file comes from tiktoken's cache (``TIKTOKEN_CACHE_DIR``), or tiktoken downloads it. Ids
    that an encoding leaves out become special tokens that no text contains. ``UsageError`` if the
    file is not at hand, or if it splits a text in a way that has no name here.
    """
    try:
        encoding = tiktoken.get_encoding(name)
    except (OSError, ValueError) as error:
        raise UsageError(
            f"tiktoken's encoding {name} is not in its cache and could not be downloaded "
            f"({type(error).__name__}); set TIKTOKEN_CACHE_DIR to a folder that has its file"
        ) from None
    return of_encoding(encoding)


def of_encoding(encoding: tiktoken.Encoding) -> GPT2Tokenizer:
    """A tokenizer with the ids of a tiktoken ``encoding``, as :func:`load_encoding`."""
    spelled = encoding._pat_str
    names = [name for name, pattern in PATTERNS.items() if pattern == spelled]
    if not names:
        raise UsageError(
            f"tiktoken's encoding {encoding.name} splits a text with {quoted(spelled)}, which is "
            f"not one of the patterns {', '.join(PATTERNS)}"
        )
    special = dict(encoding._special_tokens)
    if END_OF_TEXT not in special:
        raise UsageError(f"tiktoken's encoding {foreign(encoding.name)} has no token {END_OF_TEXT}")
    by_id = {i: token for token, i in encoding._mergeable_ranks.items()}
    last, texts = max(by_id), {i: text for text, i in special.items()}
    for i in range(encoding.n_vocab):
        if i not in by_id and i not in texts:
            texts[i] = f"<|unused {i}|>"
    # A special token between the others keeps its place. No merges make its bytes in one piece.
    ranks = [by_id[i] if i in by_id else texts[i].encode() for i in range(last + 1)]
    return GPT2Tokenizer(
        ranks, special={text: i for i, text in sorted(texts.items())}, pattern=names[0]
    )
