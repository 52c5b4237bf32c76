import pytest
import torch

from gpt.config import UsageError
from gpt.data.word_vectors import fill_embedding, projected, read_vectors, words_of


class Words:
    """A tokenizer of whole words."""

    words = (b"cat", b"cat", b"Dog", b"?", b"fish", b"")
    kind, vocab_size, end_of_text = "words", 6, 5

    def decode_bytes(self, ids):
        return b"".join(self.words[i] for i in ids)


ROWS = ["cat 1 2 3", "dog 4 5 7", "Dog 9 9 8", "bird 0 0 1"]


@pytest.mark.parametrize("header", [[], ["4 3"]], ids=["GloVe", "word2vec"])
def test_tokens_that_are_words_get_their_vectors(header, tmp_path):
    path = tmp_path / "vectors.txt"
    path.write_text("\n".join(header + ROWS) + "\n")
    before = torch.randn(6, 3, generator=torch.Generator().manual_seed(1))
    embedding, said = before.clone(), []
    fill_embedding(embedding, path, Words(), say=said.append)
    assert said[0].startswith("3 of 6 tokens (50.0%) have a vector")
    assert torch.equal(embedding[3:], before[3:])
    assert torch.equal(embedding[0], embedding[1])
    ratio = embedding[[0, 2]] / torch.tensor([[1.0, 2, 3], [9, 9, 8]])
    assert torch.allclose(ratio, ratio[0, 0].expand_as(ratio))


class Spaced(Words):
    """Its words begin with a space; the others are parts of words."""

    words = (b"cat", b" cat", b" Dog", b"?", b"ing", b"")


def test_parts_of_words_are_no_words():
    assert words_of(Words()) == {"cat": [0, 1], "Dog": [2], "fish": [4]}
    assert words_of(Spaced()) == {"cat": [1], "Dog": [2]}


def test_a_word_without_a_vector_gets_that_of_its_lower_case_form(tmp_path):
    path = tmp_path / "vectors.txt"
    path.write_text("dog 4 5 7\n")
    assert read_vectors(path, {"Dog", "Cat"})["Dog"].tolist() == [4, 5, 7]


def test_projections_keep_distances_where_the_width_allows_it():
    rows = torch.randn(20, 4, generator=torch.Generator().manual_seed(1))
    wider = projected(rows, 9)
    assert torch.allclose(torch.cdist(rows, rows), torch.cdist(wider, wider), atol=1e-4)
    narrow = projected(wider, 4)
    assert torch.allclose(torch.cdist(rows, rows), torch.cdist(narrow, narrow), atol=1e-4)


@pytest.mark.parametrize("text", ["cat 1 2\ndog 1\n", "cat 1 x\n", "cat\n", "cat 1 nan\n"])
def test_a_file_of_another_format_is_refused_with_its_line(text, tmp_path):
    path = tmp_path / "vectors.txt"
    path.write_text(text)
    with pytest.raises(UsageError, match=r"line \d must have a word and"):
        read_vectors(path, {"cat", "dog"})


def test_a_file_without_the_tokenizers_words_is_refused(tmp_path):
    path = tmp_path / "vectors.txt"
    path.write_text("bird 1 2 3\n")
    with pytest.raises(UsageError, match="has none of the 3 words"):
        fill_embedding(torch.randn(6, 3), path, Words(), say=print)
