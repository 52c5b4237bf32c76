"""Write a tokenizer as the files that Hugging Face's ``AutoTokenizer`` reads."""

import itertools
import json
from collections.abc import Mapping, Sequence
from typing import Any

from gpt.config import UsageError
from gpt.data.byte_characters import byte_characters
from gpt.data.byte_pair import END_OF_TEXT, GPT2Tokenizer
from gpt.data.chat_templates import DEFAULT
from gpt.data.library_tokenizer import LibraryTokenizer
from gpt.data.patterns import byte_level, steps_of
from gpt.data.tokenizer import ByteTokenizer, CharTokenizer, Tokenizer, special_tokens
from gpt.data.words import UNKNOWN
from gpt.interop.patterns import KNOWN


def hugging_face_files(tokenizer: Tokenizer) -> dict[str, str]:
    """The files, by name, from which ``AutoTokenizer`` builds a tokenizer with the same ids, the
    same first tokens and the same chat templates.
    """
    special = special_tokens(tokenizer)
    definition = definition_of(tokenizer)
    names = {i: text for text, i in {**definition["model"]["vocab"], **special}.items()}
    definition["post_processor"] = None
    if tokenizer.first:
        definition["post_processor"] = _putting_first([names[i] for i in tokenizer.first], names)
    end = next(
        (t for t, i in special.items() if i == tokenizer.end_of_text),
        END_OF_TEXT,
    )
    first = names[tokenizer.first[0]] if tokenizer.first else end
    settings: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": first,
        "eos_token": end,
        "unk_token": end,  # never used, but GPT-2's has it, and CTranslate2 needs it
        "clean_up_tokenization_spaces": False,
    }
    if tokenizer.chat:
        settings |= tokenizer.chat.tokens
        templates = tokenizer.chat.templates
        settings["chat_template"] = (
            templates[DEFAULT]
            if list(templates) == [DEFAULT]
            else [{"name": name, "template": text} for name, text in templates.items()]
        )
    files = {"tokenizer.json": definition, "tokenizer_config.json": settings}
    return {name: json.dumps(content, ensure_ascii=False) for name, content in files.items()}


def definition_of(tokenizer: Tokenizer) -> dict[str, Any]:
    """The content of ``tokenizer.json``, apart from what puts ``first`` before a text."""
    if isinstance(tokenizer, LibraryTokenizer):
        return dict(tokenizer.definition)
    if isinstance(tokenizer, CharTokenizer):
        characters = {character: i for i, character in enumerate(tokenizer.characters)}
        if tokenizer.unknown is not None:
            characters[UNKNOWN] = tokenizer.unknown
        definition = byte_level_definition(
            characters,
            [],
            added_tokens=added_entries(special_tokens(tokenizer), {}),
            before=None,
            decoder={"type": "Fuse"},
        )
        definition["model"]["unk_token"] = UNKNOWN if tokenizer.unknown is not None else None
        return definition
    if isinstance(tokenizer, ByteTokenizer):
        vocab = {byte_characters()[byte]: byte for byte in range(256)}
        entries, before = added_entries(special_tokens(tokenizer), {}), steps_of("gpt2")
        return byte_level_definition(vocab, [], added_tokens=entries, before=before)
    if not isinstance(tokenizer, GPT2Tokenizer):
        raise UsageError(f"a {tokenizer.kind} tokenizer cannot be exported to Hugging Face")
    if tokenizer.pattern not in KNOWN:
        raise UsageError(
            f"a tokenizer with the pattern {tokenizer.pattern} cannot be exported to Hugging Face"
        )
    vocab, merges = spelled(tokenizer)
    return byte_level_definition(
        vocab,
        merges,
        added_tokens=added_entries(tokenizer.special, tokenizer.added),
        before=steps_of(tokenizer.pattern),
        ignore_merges=KNOWN[tokenizer.pattern].ignore_merges,
        normalizer={"type": tokenizer.normalisation} if tokenizer.normalisation else None,
    )


def spelled(tokenizer: GPT2Tokenizer) -> tuple[dict[str, int], list[list[str]]]:
    """The vocabulary and the merges, with a printable character for each byte."""
    characters = byte_characters()
    tokens = ["".join(characters[b] for b in token) for token in tokenizer.ranks]
    vocab = {token: i for i, token in enumerate(tokens, tokenizer.first_id)}
    return vocab, [_merged_from(token, vocab) for token in tokens if len(token) > 1]


def _putting_first(texts: Sequence[str], names: Mapping[int, str]) -> dict[str, Any]:
    """A post-processor that puts the tokens ``texts`` before a text."""
    before = [{"SpecialToken": {"id": text, "type_id": 0}} for text in texts]
    one, two = ({"Sequence": {"id": name, "type_id": i}} for i, name in enumerate("AB"))
    ids = {text: i for i, text in names.items()}
    return {
        "type": "TemplateProcessing",
        "single": [*before, one],
        "pair": [*before, one, two],
        "special_tokens": {
            text: {"id": text, "ids": [ids[text]], "tokens": [text]} for text in texts
        },
    }


def byte_level_definition(
    vocab: Mapping[str, int],
    merges: Sequence[Sequence[str]],
    *,
    added_tokens: Sequence[Mapping[str, Any]] = (),
    before: Mapping[str, Any] | None,
    decoder: Mapping[str, Any] | None = None,
    ignore_merges: bool = False,
    **others: Any,
) -> dict[str, Any]:
    """The content of the ``tokenizer.json`` of a vocabulary. ``others`` are further fields of it,
    such as ``normalizer``.
    """
    model: dict[str, Any] = dict.fromkeys(
        ("dropout", "unk_token", "continuing_subword_prefix", "end_of_word_suffix")
    )
    model |= {"fuse_unk": False, "byte_fallback": False, "ignore_merges": ignore_merges}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": list(added_tokens),
        "normalizer": None,
        "pre_tokenizer": before,
        "post_processor": None,
        "decoder": decoder or byte_level(use_regex=True),
        **others,
        "model": {"type": "BPE", **model, "vocab": vocab, "merges": merges},
    }


def added_entries(
    special: Mapping[str, int], added: Mapping[str, int], *, kept: int | None = None
) -> list[dict[str, Any]]:
    """The ``added_tokens`` of a ``tokenizer.json``, those with ids below ``kept``."""
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    entries = [(i, token, True) for token, i in special.items()]
    entries += [(i, token, False) for token, i in added.items()]
    return [
        {"id": i, "content": token, **flags, "special": is_special}
        for i, token, is_special in sorted(entries)
        if kept is None or i < kept
    ]


def _merged_from(token: str, vocab: Mapping[str, int]) -> list[str]:
    """The two parts that ``token`` is merged from: the result of all merges before its own."""
    own = vocab[token]
    parts = list(token)
    while len(parts) > 2:
        ranks = [vocab.get(a + b, own) for a, b in itertools.pairwise(parts)]
        best = min(range(len(ranks)), key=ranks.__getitem__)
        parts[best : best + 2] = [parts[best] + parts[best + 1]]
    return parts
