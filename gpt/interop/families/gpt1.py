"""GPT-1: GPT-2 with the norms after the sums, and without a last norm.

Reference: ``transformers``' ``OpenAIGPTConfig`` and ``OpenAIGPTLMHeadModel``.
"""

from typing import Any

from gpt.config import ModelConfig
from gpt.interop.families.family import Setting
from gpt.interop.families.gpt2 import GPT2


class GPT1(GPT2):
    """The family ``openai-gpt``."""

    name = "GPT-1"
    model_type = "openai-gpt"
    architecture = "OpenAIGPTLMHeadModel"
    fixed = {"norm_placement": "post"}
    settings = {
        "vocab_size": Setting("vocab_size", 40478),
        "context_length": Setting("n_positions", 512, ("max_position_embeddings",)),
        "n_layer": Setting("n_layer", 12, ("num_hidden_layers",)),
        "n_head": Setting("n_head", 12, ("num_attention_heads",)),
        "n_embd": Setting("n_embd", 768, ("hidden_size",)),
        "norm_eps": Setting("layer_norm_epsilon", 1e-5),
        "activation": Setting("afn", "gelu"),
        "tie_embeddings": Setting("tie_word_embeddings", True),
    }
    modules = {**GPT2.modules, "embed": "tokens_embed", "position": "positions_embed"}

    activations = {"gelu": "gelu_tanh", "relu": "relu", "silu": "silu", "swish": "silu"}

    def others_of(self, config: ModelConfig) -> dict[str, Any]:
        """All fields are in the table."""
        return {}
