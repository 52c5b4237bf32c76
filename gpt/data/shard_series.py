"""Several shards that are written one after the other, and can be continued where they were."""

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from gpt.data.encoding import Encoded
from gpt.data.pieces import SPLITS, Split
from gpt.data.shards import ShardWriter
from gpt.data.tokenizer import Ids


class ShardSeries:
    """Shards one after the other: each is closed at ``shard_tokens`` ids, and another begun."""

    def __init__(
        self,
        folder: Path,
        name: str,
        *,
        vocab_size: int,
        tokenizer: bytes,
        corpus: bytes,
        shard_tokens: int,
        state: dict[str, Any],
    ) -> None:
        """The files are called ``name`` and a number. ``tokenizer`` and ``corpus`` are the
        fingerprints for their headers; ``state`` comes from :meth:`flush`.
        """
        self.folder, self.name, self.shard_tokens = folder, name, shard_tokens
        self.vocab_size, self.tokenizer, self.corpus = vocab_size, tokenizer, corpus
        self.closed: list[dict[str, Any]] = state.get("closed", [])
        self.open = self._new(tuple(state.get("open", (0, 0))))

    def _new(self, state: tuple[int, int] = (0, 0)) -> ShardWriter:
        name = f"{self.name}-{len(self.closed):05}.bin"
        return ShardWriter(
            self.folder / name,
            vocab_size=self.vocab_size,
            tokenizer=self.tokenizer,
            corpus=self.corpus,
            state=state,
        )

    def write(self, ids: Ids) -> None:
        """Append ``ids``."""
        while len(self.open) + len(ids) > self.shard_tokens:
            room = self.shard_tokens - len(self.open)
            self.open.write(ids[:room])
            ids = ids[room:]
            self._close()
            self.open = self._new()
        self.open.write(ids)

    def flush(self) -> dict[str, Any]:
        """The state that is on the disk now."""
        return {"closed": self.closed, "open": list(self.open.flush())}

    def _close(self) -> None:
        tokens, checksum = self.open.flush()
        self.open.__exit__(None)
        name = f"{self.name}-{len(self.closed):05}.bin"
        self.closed.append({"name": name, "tokens": tokens, "crc32": checksum})

    def close(self) -> list[dict[str, Any]]:
        """Finish the last shard, and return all."""
        self._close()
        return self.closed

    def abandon(self) -> None:
        """Close the file without a header, if it is still open."""
        self.open.close()


def write_block(
    block: Sequence[Encoded], series: Mapping[Split, ShardSeries], counts: Counter[str]
) -> None:
    """Append the pieces to the shards of their splits, and add them to the ``counts``."""
    begun = sum(each.piece.begins for each in block)
    texts = [each.piece.text for each in block]
    added = {
        "characters": sum(map(len, texts)),
        "tokens": sum(len(each.ids) for each in block),
        "bytes": sum(
            len(t) if t.isascii() else len(t.encode(errors="surrogatepass")) for t in texts
        ),
        "documents": begun,
        "kept": begun,
    }
    for split in SPLITS:
        own = [each for each in block if each.piece.split == split]
        if own:
            series[split].write(np.concatenate([each.ids for each in own]))
            added[f"{split} documents"] = sum(each.piece.ends for each in own)
    counts.update(added)


def _n_bytes(text: str) -> int:
    return len(text) if text.isascii() else len(text.encode(errors="surrogatepass"))
