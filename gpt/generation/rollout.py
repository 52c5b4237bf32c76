"""Texts by a model in training.

There are three ways. If training is in bfloat16 and the CPU multiplies it, a copy of the weights in
bfloat16 writes the texts, and is freed afterwards. If training is in float32, :mod:`gpt.kernels`
read the weights in place: an :class:`InferenceGPT` of that format shares every tensor with the
model, so an optimizer's update in place updates both. If the weights cannot be converted (a GPU,
adapters, compiled or recomputed blocks), or the float32 kernels are not faster (many texts at
once), the model itself writes.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import nn

from gpt.config import GenerationConfig
from gpt.data.tokenizer import Tokenizer, ends_of
from gpt.device import choose_precision
from gpt.generation.decode import Decoder
from gpt.generation.inference import prepare_for_inference
from gpt.generation.prefill import evaluation_mode
from gpt.generation.text import GrowingText
from gpt.model.adapter import adapter_weights
from gpt.model.gpt import GPT

ROWS = 64
"""Texts that are written together."""
FEW = 32
"""Up to this many texts the kernels are faster than torch's matrix products of float32."""


class Written(NamedTuple):
    """A text that continues a prompt."""

    tokens: list[int]
    """Every token that was drawn, with end-of-text or a stop text."""
    text: str
    """Without end-of-text and stop text."""


def write_texts(
    model: GPT,
    tokenizer: Tokenizer,
    prompts: Sequence[Sequence[int]],
    samples: Sequence[int],
    config: GenerationConfig,
    dtype: torch.dtype = torch.float32,
) -> list[Written]:
    """Continue each prompt once, with the ``config``'s temperature, seed, length and stop texts.
    ``dtype`` is the dtype of the training's matrix products.

    A text depends on the weights, the seed, its prompt and its number in ``samples``, and on the
    rest of the batch only by rounding. The model's mode and random state stay as they are.
    """
    decoder = Decoder(
        writer(model, len(prompts), dtype),
        config,
        batch_size=ROWS,
        vocab_size=tokenizer.vocab_size,
        end_of_text=ends_of(tokenizer),
    )
    written, growing = [], []
    for prompt, sample in zip(prompts, samples, strict=True):
        decoder.add(prompt, sample=sample)
        written.append(Written([], ""))
        growing.append(GrowingText(tokenizer, config.stop))
    with evaluation_mode(model):  # once, and not for each token
        while decoder.busy:
            for token in decoder.advance():
                number = token.sequence
                tokens, text = written[number]
                if growing[number].ended:  # by a stop text, before tokens that were drawn ahead
                    continue
                tokens.append(token.id)
                text += growing[number].add(token.id)
                if token.ended:
                    text += growing[number].finish()
                elif growing[number].ended:
                    decoder.end(number)
                written[number] = Written(tokens, text)
    return written


def writer(model: GPT, texts: int, dtype: torch.dtype) -> GPT:
    """The model that writes so many texts, with the present weights of ``model``."""
    fast = choose_precision("auto", model.device)
    if dtype == fast == torch.bfloat16 and can_share(model):
        return prepare_for_inference(model, "bfloat16")
    return sharing(model) if texts <= FEW else model


def sharing(model: GPT) -> GPT:
    """A model for inference with the same tensors, or ``model`` itself."""
    return prepare_for_inference(model, "float32") if can_share(model) else model


def can_share(model: GPT) -> bool:
    """Whether every weight can be read where it is, by modules without changes."""
    if type(model) is not GPT or model.device.type != "cpu" or adapter_weights(model):
        return False
    layers = (m for m in model.modules() if isinstance(m, nn.Linear | nn.Embedding))
    return (
        all(type(layer) in (nn.Linear, nn.Embedding) for layer in layers)
        and all(p.dtype == torch.float32 and p.is_contiguous() for p in model.parameters())
        and not any("forward" in vars(m) or m._compiled_call_impl for m in model.modules())
    )
