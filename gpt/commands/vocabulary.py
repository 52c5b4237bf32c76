"""The size of a run's vocabulary and the shape of its model, for ``gpt plan``."""

import dataclasses
from pathlib import Path

from gpt.config import MADE_FROM_TEXT, PlanConfig, UsageError
from gpt.console import tell
from gpt.data import tokenizer as tokenizers
from gpt.data.corpus import open_corpus
from gpt.data.piped import is_piped
from gpt.data.prepared import is_corpus, read_corpus
from gpt.data.reading import Reading
from gpt.data.token_files import is_token_files
from gpt.data.tokenizer import GPT2Tokenizer
from gpt.interop.load import load
from gpt.interop.named_tokenizer import named_tokenizer
from gpt.training.setup import take_initial_model


def with_vocabulary(config: PlanConfig) -> PlanConfig:
    """The configuration with the model's shape known, as training will find it."""
    if config.init:
        model, _ = take_initial_model(
            config.init, config.model, None, lambda name: load(name, trainable=True, say=tell), tell
        )
        return dataclasses.replace(config, model=model.config)
    if config.model.vocab_size:
        return config
    model_config = dataclasses.replace(config.model, vocab_size=_size(config))
    return dataclasses.replace(config, model=model_config)


def _size(config: PlanConfig) -> int:
    """The tokenizer's size."""
    data, own = config.data, config.run / "tokenizer.json"
    advice = "give its size with --model.vocab_size"
    if config.resume and own.is_file():
        return tokenizers.load(own).vocab_size
    if data.tokenizer not in MADE_FROM_TEXT:
        return named_tokenizer(data.tokenizer).vocab_size
    if data.mixture or is_piped(data):
        raise UsageError(f"the vocabulary of {data.described} is not known yet; {advice}")
    if is_corpus(data.source):
        return read_corpus(Path(data.source)).tokenizer.vocab_size
    if is_token_files(data.source):
        return GPT2Tokenizer.released().vocab_size
    if data.vocab_size:
        return data.vocab_size
    if data.tokenizer != "char":
        raise UsageError(f"data.tokenizer is {data.tokenizer}, learned from the text; {advice}")
    survey = open_corpus(data.source, Reading.of(data), say=tell).survey(characters=True)
    return len(survey.characters)
