"""Whole tiny models of transformers, with random weights, give the logits of ours of the same
weights.
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


def same(name, tensor):
    return tensor


def by_head(name, tensor):
    """A head's query, key and value beside each other become all queries, keys and values."""
    if "query_key_value" not in name:
        return tensor
    return tensor.unflatten(0, (HEADS, 3, -1)).transpose(0, 1).flatten(0, 2)


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
    "Llama": (GATED | {"rope_parameters": {"rope_theta": 500.0}}, LLAMA | {"rotary_base": 500.0},
              LLAMAS_NAMES, same),
    "Qwen3": (
        GATED | {"head_dim": 32, "rope_parameters": {"rope_theta": 1e6}},
        LLAMA | {"head_dim": 32, "qk_norm": True, "rotary_base": 1e6}, LLAMAS_NAMES, same,
    ),
    "Mixtral": (
        GATED | {"num_local_experts": 4, "num_experts_per_tok": 2,
                 "rope_parameters": {"rope_theta": 1e4}},
        LLAMA | {"n_expert": 4, "n_expert_active": 2, "moe_renormalise": True},
        LLAMAS_NAMES | {"mlp.router": "mlp.gate"}, same,
    ),
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
    "GPTNeoX": (
        ROOT | {"num_hidden_layers": LAYERS, "intermediate_size": INNER, "rotary_pct": 0.25},
        OURS | {"n_inner": INNER, "position": "rotary", "rotary_fraction": 0.25,
                "norm_placement": "parallel", "activation": "gelu", "tie_embeddings": False},
        {"embed": "gpt_neox.embed_in", "norm": "gpt_neox.final_layer_norm",
         "head": "lm_head", "blocks": "gpt_neox.layers", "attn_norm": "input_layernorm",
         "mlp_norm": "post_attention_layernorm", "attn.qkv": "attention.query_key_value",
         "attn.out": "attention.dense", "mlp.up": "mlp.dense_h_to_4h",
         "mlp.down": "mlp.dense_4h_to_h"},
        by_head,
    ),
    "Bloom": (
        {"hidden_size": WIDTH, "n_head": HEADS, "n_layer": LAYERS, "vocab_size": V},
        OURS | {"position": "alibi", "embedding_norm": True},
        {"embed": "transformer.word_embeddings",
         "embed_norm": "transformer.word_embeddings_layernorm", "norm": "transformer.ln_f",
         "blocks": "transformer.h", "attn_norm": "input_layernorm",
         "mlp_norm": "post_attention_layernorm", "attn.qkv": "self_attention.query_key_value",
         "attn.out": "self_attention.dense", "mlp.up": "mlp.dense_h_to_4h",
         "mlp.down": "mlp.dense_4h_to_h"},
        by_head,
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
    expert = re.fullmatch(r"(.*mlp)\.experts\.(\d+)\.(gate|up|down)\.weight", name)
    if expert:  # Mixtral's experts are one tensor
        mlp, number, matrix = expert.groups()
        experts = f"{mlp.replace('blocks', 'model.layers')}.experts"
        if matrix == "down":
            return there[f"{experts}.down_proj"][int(number)]
        both = there[f"{experts}.gate_up_proj"][int(number)]
        return both.chunk(2)[matrix == "up"]
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
    left = {name for name in there.keys() - read if "experts" not in name}
    assert left <= {"lm_head.bias"}  # every weight of theirs counts
    tokens = torch.randint(V, (2, T), generator=generator)
    expected, got = reference(tokens).logits, model(tokens)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-5 * float(expected.abs().max()))
    cache = model.new_cache(2)
    cached = [model(chunk, cache=cache) for chunk in tokens.split([9, *[1] * 15], dim=1)]
    torch.testing.assert_close(torch.cat(cached, 1), got, rtol=0, atol=1e-4)
    assert len({*itertools.chain(*got.argmax(-1).tolist())}) > 3  # a model that says something
