"""Several shards that are written one after the other, and can be continued where they were."""

from pathlib import Path
from typing import Any

from gpt.data import tokenizer as tokenizers
from gpt.data.shards import ShardWriter
from gpt.data.tokenizer import Ids, Tokenizer


class ShardSeries:
    """Shards one after the other: each is closed at ``shard_tokens`` ids, and another begun."""

    def __init__(
        self,
        folder: Path,
        name: str,
        tokenizer: Tokenizer,
        corpus: bytes,
        shard_tokens: int,
        state: dict[str, Any],
    ) -> None:
        """The files are called ``name`` and a number; ``state`` comes from :meth:`flush`."""
        self.folder, self.name, self.shard_tokens = folder, name, shard_tokens
        self.vocab_size, self.corpus = tokenizer.vocab_size, corpus
        self.tokenizer = tokenizers.fingerprint(tokenizer)
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
