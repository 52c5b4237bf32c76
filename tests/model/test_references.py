"""Tiny models of families that are not loaded from files give the logits of ours with the same
weights. The tests of ``gpt.interop.families`` have the other families.
"""

import itertools
import re

import pytest
import torch
import transformers

from gpt.config import ModelConfig
from gpt.model.gpt import GPT

WIDTH, HEADS, INNER, LAYERS, V, T = 64, 4, 96, 3, 61, 24
ROOT = {"hidden_size": WIDTH, "num_attention_heads": HEADS, "vocab_size": V}
GATED = ROOT | {
    "num_hidden_layers": LAYERS, "num_key_value_heads": 2, "intermediate_size": INNER,
    "tie_word_embeddings": False, "rms_norm_eps": 1e-5,
}  # fmt: skip
OURS = {
    "vocab_size": V, "context_length": 32, "n_layer": LAYERS, "n_head": HEADS, "n_embd": WIDTH,
}  # fmt: skip
LLAMA = OURS | {
    "n_kv_head": 2, "n_inner": INNER, "position": "rotary", "norm": "rmsnorm", "mlp": "gated",
    "activation": "silu", "bias": False, "tie_embeddings": False,
}  # fmt: skip
LLAMAS_NAMES = {
    "embed": "model.embed_tokens", "norm": "model.norm", "head": "lm_head",
    "blocks": "model.layers", "attn_norm": "input_layernorm",
    "mlp_norm": "post_attention_layernorm", "attn.qkv": "self_attn.{q,k,v}_proj",
    "attn.out": "self_attn.o_proj", "attn.q_norm": "self_attn.q_norm",
    "attn.k_norm": "self_attn.k_norm", "mlp.gate": "mlp.gate_proj", "mlp.up": "mlp.up_proj",
    "mlp.down": "mlp.down_proj",
}  # fmt: skip


def one_more(name, tensor):
    """Gemma's norms multiply by their weights and one."""
    return tensor + 1 if "norm" in name else tensor


def halves(name, tensor):
    """GPT-J rotates neighbours: numbers 0 and 1, 2 and 3; ours are n apart."""
    if not re.search(r"[qk]_proj", name):
        return tensor
    heads = tensor.unflatten(0, (HEADS, -1))
    order = [*range(0, 8, 2), *range(1, 8, 2), *range(8, WIDTH // HEADS)]
    return heads[:, order].flatten(0, 1)


MODELS = {
    "Gemma2": (
        GATED | {"head_dim": 16, "query_pre_attn_scalar": 16, "sliding_window": 6,
                 "attn_logit_softcapping": 5.0, "final_logit_softcapping": 3.0,
                 "tie_word_embeddings": True},
        LLAMA | {"norm_placement": "sandwich", "activation": "gelu_tanh", "tie_embeddings": True,
                 "scale_embeddings": True, "attention_softcap": 5.0, "logit_softcap": 3.0,
                 "window": 6, "window_pattern": "LG"},
        LLAMAS_NAMES | {"attn_out_norm": "post_attention_layernorm",
                        "mlp_norm": "pre_feedforward_layernorm",
                        "mlp_out_norm": "post_feedforward_layernorm"},
        one_more,
    ),
    "GPTJ": (
        {"n_embd": WIDTH, "n_head": HEADS, "n_layer": LAYERS, "vocab_size": V, "rotary_dim": 8,
         "n_positions": 32, "tie_word_embeddings": False},
        OURS | {"position": "rotary", "rotary_fraction": 0.5, "qkv_bias": "no",
                "norm_placement": "parallel_shared", "tie_embeddings": False},
        {"embed": "transformer.wte", "norm": "transformer.ln_f", "head": "lm_head",
         "blocks": "transformer.h", "attn_norm": "ln_1", "attn.qkv": "attn.{q,k,v}_proj",
         "attn.out": "attn.out_proj", "mlp.up": "mlp.fc_in", "mlp.down": "mlp.fc_out"},
        halves,
    ),
}  # fmt: skip
"""Of each model: its configuration, ours, its names for our modules, and what becomes of a tensor.
"""


def their_name(name, names):
    """Of our parameter."""
    module, kind = name.rsplit(".", 1)
    if module.startswith("blocks."):
        _, layer, inside = module.split(".", 2)
        module = f"{names['blocks']}.{layer}.{names[inside]}"
    else:
        module = names[module]
    return f"{module}.{kind}"


def weight(name, names, change, there):
    """Our parameter, from theirs."""
    theirs = their_name(name, names)
    parts = [theirs]
    if "{q,k,v}" in theirs:
        parts = [theirs.replace("{q,k,v}", letter) for letter in "qkv"]
    return torch.cat([change(part, there[part]) for part in parts])


@pytest.mark.parametrize("family", MODELS)
@torch.no_grad()
def test_a_model_of_transformers_has_the_same_logits(family):
    config, ours, names, change = MODELS[family]
    made = getattr(transformers, f"{family}Config")(**config)
    reference = getattr(transformers, f"{family}ForCausalLM")._from_config(
        made, attn_implementation="eager"
    )
    reference.eval()
    generator = torch.Generator().manual_seed(0)
    for name, parameter in reference.named_parameters():
        parameter.normal_(std=0.2, generator=generator)
        if parameter.ndim == 1 and name.endswith("weight") and change is not one_more:
            parameter.add_(1)
    there = dict(reference.named_parameters())
    if family == "GPTJ":
        reference.lm_head.bias.zero_()  # which ours has not
        for layer in range(LAYERS):  # which it has not
            there[f"transformer.h.{layer}.attn.out_proj.bias"] = torch.zeros(WIDTH)
    model = GPT(ModelConfig(**ours)).eval()
    read = set()

    def noted(name, tensor):
        read.add(name)
        return change(name, tensor)

    for name, parameter in model.named_parameters():
        parameter.copy_(weight(name, names, noted, there))
    left = set(there.keys() - read)
    assert left <= {"lm_head.bias"}  # every weight of theirs counts
    tokens = torch.randint(V, (2, T), generator=generator)
    expected, got = reference(tokens).logits, model(tokens)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-5 * float(expected.abs().max()))
    cache = model.new_cache(2)
    cached = [model(chunk, cache=cache) for chunk in tokens.split([9, *[1] * 15], dim=1)]
    torch.testing.assert_close(torch.cat(cached, 1), got, rtol=0, atol=1e-4)
    assert len({*itertools.chain(*got.argmax(-1).tolist())}) > 3  # a model that says something
