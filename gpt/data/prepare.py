"""From documents to token shards, which are cached under the fingerprints of text and tokenizer.

The end of the text is held out for validation. The boundary depends only on the text, so it is the
same for all tokenizers. Each document ends with the tokenizer's end-of-text.
"""

import contextlib
import dataclasses
import hashlib
import shutil
from collections.abc import Callable
from pathlib import Path

from gpt.config import DataConfig, UsageError, foreign, quoted
from gpt.data import tokenizer as tokenizers
from gpt.data.corpus import PREPARED_FILES, Corpus, Say, Survey, open_corpus
from gpt.data.encoding import encoded
from gpt.data.pieces import at_end, pieces
from gpt.data.piped import keep
from gpt.data.prepared import Prepared, is_corpus, read_corpus, read_prepared
from gpt.data.reading import Reading
from gpt.data.shards import ShardWriter
from gpt.data.token_files import is_token_files, read_token_files
from gpt.data.tokenizer import GPT2Tokenizer, Tokenizer
from gpt.data.tokenizer_training import recipe, tokenizer_of_corpus
from gpt.files import new_folder

Progress = Callable[[float], None]
"""Receives the fraction of the work that is done, from 0 to 1."""


def prepare(
    config: DataConfig,
    cache_dir: Path,
    *,
    tokenizer: Tokenizer | None = None,
    progress: Progress = lambda fraction: None,
    say: Say = lambda text: None,
) -> Prepared:
    """The shards of ``config.source`` in ``cache_dir``; they are written if they are not there yet.

    ``tokenizer`` replaces the one that ``config.tokenizer`` names, and is needed if that is a file
    or an encoding of tiktoken. ``say`` is told what the source means if that may be unexpected.
    ``UsageError`` for a text that cannot be read, a folder that cannot be written, and damaged
    shards.
    """
    if is_corpus(config.source) or is_token_files(config.source):
        say(
            f"{foreign(config.source)} is prepared: it has its own tokenizer and validation, and "
            "data.tokenizer, data.validation_fraction and the settings of reading are not used"
        )
    if is_corpus(config.source):
        return dataclasses.replace(read_corpus(Path(config.source), tokenizer), kind=config.windows)
    if is_token_files(config.source):
        gpt2 = GPT2Tokenizer.released()
        if tokenizer and tokenizers.fingerprint(tokenizer) != tokenizers.fingerprint(gpt2):
            raise UsageError(
                f"{quoted(config.source)} has GPT-2's token ids, and the model has another "
                "tokenizer; give the text itself"
            )
        files = read_token_files(config.source, vocab_size=gpt2.vocab_size)
        return Prepared(gpt2, *files, kind=config.windows)
    config = keep(config, cache_dir)
    corpus = open_corpus(config.source, Reading.of(config), say=say)
    kind = tokenizer.kind if tokenizer else config.tokenizer
    survey = corpus.survey(characters=kind == "char" and tokenizer is None)
    if survey.length == 0:
        raise UsageError(f"data.source is {quoted(config.source)}, which has no text")
    made = kind if tokenizer else recipe(config)
    key = hashlib.sha256(survey.fingerprint + f"{made} {config.validation_fraction!r}".encode())
    if tokenizer:
        key.update(tokenizers.fingerprint(tokenizer))
    folder = cache_dir / f"{config.name[:40]}-{kind}-{key.hexdigest()[:12]}"
    if not _is_whole(folder):
        shutil.rmtree(folder, ignore_errors=True)  # a part of it was deleted
        try:
            with new_folder(folder) as work:
                tokenizer = tokenizer or tokenizer_of_corpus(config, corpus, survey, say=say)
                _write(config, corpus, survey, work, tokenizer, progress)
        except UsageError:
            if not _is_whole(folder):  # else another run has prepared it meanwhile
                raise
    return dataclasses.replace(read_prepared(folder), kind=config.windows)


def _is_whole(folder: Path) -> bool:
    return all((folder / name).exists() for name in PREPARED_FILES)


def _write(
    config: DataConfig,
    corpus: Corpus,
    survey: Survey,
    folder: Path,
    tokenizer: Tokenizer,
    progress: Progress,
) -> None:
    (folder / "tokenizer.json").write_text(tokenizers.to_json(tokenizer), encoding="utf-8")
    boundary = round(survey.length * (1 - config.validation_fraction))
    done = 0
    with contextlib.ExitStack() as stack:
        writers = {
            split: stack.enter_context(
                ShardWriter(
                    folder / f"{split}.bin",
                    vocab_size=tokenizer.vocab_size,
                    tokenizer=tokenizers.fingerprint(tokenizer),
                    corpus=survey.fingerprint,
                )
            )
            for split in ("train", "validation")
        }
        splitter = at_end(boundary, whole_words=tokenizer.kind == "words")
        for block in encoded(pieces(corpus, splitter), tokenizer):
            for each in block:
                writers[each.piece.split].write(each.ids)
                done += len(each.piece.text)
                progress(done / survey.length)
