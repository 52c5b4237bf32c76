"""Text to batches: corpora, tokenizers, shards of token ids, and the order in which they are
read.
"""
