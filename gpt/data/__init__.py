"""From text to batches: corpora, tokenizers, token shards, and the order of the windows."""
