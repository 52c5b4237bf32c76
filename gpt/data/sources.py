"""The sources of a preparation as one corpus, and a description of what decides its shards."""

import dataclasses
import hashlib
from pathlib import Path
from typing import Any

from gpt.config import PrepareConfig, UsageError, foreign
from gpt.data.corpus import Corpus, Say, joined, open_corpus
from gpt.data.piped import is_copy, keep
from gpt.data.reading import Reading
from gpt.data.tokenizer_training import recipe

PIPED = ".piped"
"""The folder of the copies of pipes, in the output folder until it is complete."""


def open_sources(config: PrepareConfig, say: Say) -> tuple[Corpus, list[int | None]]:
    """All sources as one corpus, and the sizes of its files (none for what is no file).

    ``UsageError`` for a source that does not exist, and if the output folder is inside a source.
    """
    corpora = []
    for source in config.sources or (config.data.source,):
        one = dataclasses.replace(config.data, source=source)
        one = keep(one, config.out / PIPED) if one.descriptor is not None else one
        corpora.append(open_corpus(one.source, Reading.of(one), field="a source", say=say))
    for folder in filter(None, (corpus.folder for corpus in corpora)):
        if config.out.resolve().is_relative_to(folder.resolve()):
            raise UsageError(
                f"out is {foreign(config.out)}, which is inside the source {foreign(folder)}; name "
                "a folder elsewhere"
            )
    corpus = joined(corpora)
    return corpus, [path.stat().st_size if path.is_file() else None for path in corpus.files]


def work_of(config: PrepareConfig, corpus: Corpus, sizes: list[int | None]) -> dict[str, Any]:
    """What decides the shards, apart from the tokenizer: files and settings. A preparation is
    continued only if this is the same.
    """
    files, times = hashlib.sha256(), hashlib.sha256()
    for path, size in zip(corpus.files, sizes, strict=True):
        files.update(f"{path} {size}\n".encode(errors="surrogatepass"))
        if size is not None and not is_copy(path):  # the name of a pipe's copy tells its contents
            times.update(f"{path.stat().st_mtime_ns}\n".encode())
    named = Path(config.data.tokenizer).expanduser()
    if named.is_file():
        times.update(named.read_bytes())
    return {
        "files": files.hexdigest(),
        "contents": times.hexdigest(),
        "reading": corpus.name,
        "tokenizer setting": recipe(config.data),
        "engine": config.engine,
        "duplicates": config.duplicates,
        "shard_tokens": config.shard_tokens,
        "validation": config.validation,
        "validation_fraction": config.data.validation_fraction,
    }
