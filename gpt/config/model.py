"""The shape of a model: its sizes, and the variant of each part."""

import dataclasses
import functools
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, Self

from gpt.config.checks import UsageError, check, number

Activation = Literal["gelu_tanh", "gelu", "relu", "relu_squared", "silu", "tanh"]
PositionScheme = Literal["learned", "sinusoidal", "rotary", "alibi", "xpos", "none"]
RotaryScaling = Literal["none", "linear", "ntk", "dynamic_ntk", "yarn", "llama3"]
Norm = Literal["layernorm", "rmsnorm"]
NormPlacement = Literal["pre", "post", "deepnorm", "sandwich", "parallel", "parallel_shared"]
Mlp = Literal["plain", "gated"]
Initial = Literal["auto", "gpt2", "depth", "zero", "deepnorm"]
Balance = Literal["none", "switch", "mixtral", "bias"]
RouterScore = Literal["softmax", "sigmoid"]
Copy = Literal["none", "pointer"]
SoftcapForm = Literal["tanh", "root"]
Choice = Literal["auto", "yes", "no"]
LAYER_KINDS = "GLS"
"""The letters of ``window_pattern``: global, local (an attention window), sparse (blocks)."""


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The shape of a :class:`gpt.GPT`. The defaults are GPT-2's smallest model, and
    stay so.
    """

    vocab_size: int = number(50257, at_least=0)
    """Tokens of the vocabulary, which are the rows of the token embedding. In a run, 0 takes the
    tokenizer's size, and a larger number adds unused rows."""
    context_length: int = number(1024, at_least=0)
    """Maximum number of tokens that the model sees at once. With init, 0 keeps the model's own."""
    n_layer: int = number(12, at_least=1)
    """Blocks, each of attention and a feed-forward layer."""
    n_head: int = number(12, at_least=1)
    """Attention heads in a block."""
    n_kv_head: int = number(0, at_least=0)
    """Key and value heads (grouped-query attention); 0: the same as n_head."""
    head_dim: int = number(0, at_least=0)
    """Width of one attention head; 0: n_embd / n_head."""
    n_embd: int = number(768, at_least=1)
    """Width of the residual stream."""
    position: PositionScheme = "learned"
    """How positions are encoded. learned: an embedding for each position (GPT-2). sinusoidal: fixed
    waves are added to the embeddings. rotary: queries and keys are rotated. alibi: the scores of
    distant keys are lowered. xpos: rotary, with a decay for distant keys. none: only by the causal
    mask."""
    rotary_base: float = number(10_000.0, above=1)
    """Base of the rotary frequencies (for rotary and xpos)."""
    rotary_base_local: float = number(0.0, at_least=0)
    """Base of the rotary frequencies in layers with an attention window; 0: rotary_base."""
    rotary_fraction: float = number(1.0, above=0, at_most=1)
    """Fraction of each head's width that is rotated (GPT-NeoX: 0.25)."""
    rotary_scaling: RotaryScaling = "none"
    """How rotary positions are extended beyond the trained length."""
    rotary_scaling_factor: float = number(1.0, at_least=1)
    """By what factor the scaling extends the trained length."""
    rotary_trained_length: int = number(0, at_least=0)
    """Context length before the scaling; 0: context_length / rotary_scaling_factor (with
    dynamic_ntk: context_length)."""
    rotary_low_frequency: float = number(1.0, above=0)
    """llama3 and yarn (its beta_slow): frequencies with fewer turns over the trained length are
    divided by the factor."""
    rotary_high_frequency: float = number(0.0, at_least=0)
    """llama3 and yarn (its beta_fast): frequencies with more turns stay unchanged; 0: 4 for llama3,
    32 for yarn."""
    rotary_temperature: float = number(0.0, at_least=0)
    """yarn: factor of queries and keys; 0: 0.1 ln(rotary_scaling_factor) + 1."""
    rotary_scaling_local: bool = True
    """The scaling also applies to layers with an attention window (Gemma 3: no)."""
    norm: Norm = "layernorm"
    """The kind of norm. layernorm: mean 0, variance 1 (GPT-2). rmsnorm: root mean square 1."""
    norm_weight: bool = True
    """Norms have a weight."""
    norm_bias: Choice = "auto"
    """Norms have a bias. auto: as bias for layernorm, no for rmsnorm."""
    norm_placement: NormPlacement = "pre"
    """Where the norms are. pre: before each branch (GPT-2). post: after each sum (the original
    transformer). deepnorm: post, with a larger residual. sandwich: before and after each branch
    (Gemma). parallel: attention and feed-forward layer in parallel, each with a norm (GPT-NeoX).
    parallel_shared: in parallel, with one norm (GPT-J)."""
    qk_norm: bool = False
    """Apply an RMSNorm to each head's queries and keys, before the rotation."""
    mlp: Mlp = "plain"
    """The feed-forward layer. plain: down(activation(up)). gated: down(activation(gate) * up),
    which is SwiGLU with the activation silu."""
    dropout: float = number(0.0, at_least=0, below=1)
    """Dropout probability of embeddings, attention weights and the outputs of residual branches."""
    bias: bool = True
    """Biases in the linear layers and the norms."""
    qkv_bias: Choice = "auto"
    """Biases of queries, keys and values. auto: as bias."""
    mlp_bias: Choice = "auto"
    """Biases of the feed-forward layers. auto: as bias."""
    tie_embeddings: bool = True
    """Use one matrix for the token embedding and the head."""
    scale_embeddings: bool = False
    """Multiply token embeddings by the square root of n_embd (the original transformer, Gemma)."""
    embedding_norm: bool = False
    """Apply a norm after the embedding (BLOOM)."""
    norm_eps: float = number(1e-5, above=0)
    """Epsilon of the norms."""
    n_inner: int = number(0, at_least=0)
    """Inner width of the feed-forward layers; 0: four times n_embd."""
    activation: Activation = "gelu_tanh"
    """Activation function of the feed-forward layers."""
    scale_attention: bool = True
    """Divide attention scores by the square root of head_dim."""
    scale_attention_width: int = number(0, at_least=0)
    """Divide attention scores by the square root of this number instead (Gemma 3 27B: 168); 0:
    head_dim."""
    scale_attention_by_layer: bool = False
    """Divide attention scores by the layer's number (counted from 1) as well."""
    window: int = number(0, at_least=0)
    """Attention window: how many tokens a query of a local layer sees, including its own; 0:
    all."""
    window_pattern: str = ""
    """The kind of each layer, as a pattern that repeats. L: local (window); G: global; S: sparse
    blocks. Empty: L if window is set, else G."""
    sinks: int = number(0, at_least=0)
    """How many of the first tokens local layers always see (attention sinks)."""
    learned_sinks: bool = False
    """Each head has a learned score that takes part in the softmax but has no value."""
    sparse_block: int = number(64, at_least=1)
    """Size of a block of the sparse layers, in tokens."""
    sparse_local: int = number(3, at_least=1)
    """How many blocks a query of a sparse layer sees: its own and those before it."""
    sparse_global: int = number(1, at_least=0)
    """How many of the first blocks every query of a sparse layer sees (Longformer)."""
    sparse_random: int = number(1, at_least=0)
    """How many random earlier blocks each block of a sparse layer sees (BigBird)."""
    attention_softcap: float = number(0.0, at_least=0)
    """Attention scores s become softcap * tanh(s / softcap); 0: off (Gemma 2: 50)."""
    attention_top_k: int = number(0, at_least=0)
    """Attend only to the k best keys; 0: all. 1 is hard attention, with the softmax's gradient."""
    logit_softcap: float = number(0.0, at_least=0)
    """The same as attention_softcap, for the logits; 0: off (Gemma 2: 30)."""
    logit_softcap_form: SoftcapForm = "tanh"
    """The function of the logits z and the cap c. tanh: c tanh(z / c). root: c z / sqrt(z^2 + c^2),
    whose slope falls more slowly."""
    value_embeddings: int = number(0, at_least=0)
    """Each so many layers, counted back from the last one, a layer has an embedding of the tokens
    that is added to its values; 1: every layer, 2: every other one, 0: none."""
    skip_embedding: bool = False
    """Before each block, the stream becomes a learned mixture of itself and the first block's
    input."""
    skip_layers: bool = False
    """The blocks of the second half also read the outputs of the first half, the last block that of
    the first one, with learned weights (U-net)."""
    n_expert: int = number(0, at_least=0)
    """Experts in each feed-forward layer (mixture of experts); 0: one dense layer."""
    n_expert_active: int = number(1, at_least=1)
    """How many experts the router selects for each token (Switch: 1, Mixtral: 2)."""
    moe_shared: int = number(0, at_least=0)
    """How many additional experts every token uses (DeepSeek)."""
    moe_score: RouterScore = "softmax"
    """How the router's outputs become weights."""
    moe_renormalise: bool = False
    """Normalise the weights of a token's experts to a sum of 1 (Mixtral)."""
    moe_capacity: float = number(0.0, at_least=0)
    """Maximum number of tokens that an expert accepts in training, relative to an equal share
    (Switch: 1.25); other tokens skip it; 0: no limit."""
    moe_balance: Balance = "none"
    """How the load of the experts is balanced. switch: Switch's loss, over the first choices.
    mixtral: the loss over all choices. bias: a bias of the selection that follows the load
    (DeepSeek)."""
    moe_balance_weight: float = number(0.01, at_least=0)
    """Weight of the balancing loss, or the step size of the bias."""
    moe_z_weight: float = number(0.0, at_least=0)
    """Weight of the router's z-loss, the squared log of its softmax's sum (ST-MoE: 0.001)."""
    copy: Copy = "none"
    """pointer: each prediction is partly copied from the context (pointer sentinel)."""
    initial: Initial = "auto"
    """The scheme of the initial weights. auto: deepnorm with norm_placement deepnorm, else gpt2."""

    def __post_init__(self) -> None:
        check(self, "model.")
        if not self.head_dim and self.n_embd % self.n_head:
            raise UsageError(
                f"model.n_embd is {self.n_embd}, and must be a multiple of "
                f"model.n_head ({self.n_head})"
            )
        if self.n_kv_head and self.n_head % self.n_kv_head:
            raise UsageError(
                f"model.n_kv_head is {self.n_kv_head}, and must divide model.n_head ({self.n_head})"
            )
        for problem in self._contradictions():
            raise UsageError(problem)

    def _contradictions(self) -> list[str]:
        """One sentence for each combination of fields that contradicts itself."""
        rotary = self.position in ("rotary", "xpos")
        width = self.head_dim or self.n_embd // self.n_head
        pattern = self._pattern()
        found = {
            f"model.window_pattern is '{self.window_pattern}', and must have only the letters "
            f"{', '.join(LAYER_KINDS)}": bool(set(self.window_pattern) - set(LAYER_KINDS)),
            f"model.window_pattern is '{self.window_pattern}', and its local layers (L) need a "
            "model.window of at least 1": "L" in pattern and not self.window,
            f"model.window is {self.window}, and no layer of model.window_pattern "
            f"'{self.window_pattern}' is local (L)": bool(self.window) and "L" not in pattern,
            f"model.sinks is {self.sinks}, and only local layers have sinks: set "
            "model.window": bool(self.sinks) and "L" not in pattern,
            f"model.rotary_scaling is '{self.rotary_scaling}', and model.position "
            f"'{self.position}' is not rotary": self.rotary_scaling != "none" and not rotary,
            f"model.rotary_scaling is '{self.rotary_scaling}', and needs a "
            "model.rotary_scaling_factor above 1": self.rotary_scaling
            in ("linear", "ntk", "yarn", "llama3", "dynamic_ntk")
            and self.rotary_scaling_factor == 1,
            f"model.rotary_fraction is {self.rotary_fraction}, and must rotate at least 2 of the "
            f"{width} numbers of a head": rotary and int(width * self.rotary_fraction) < 2,
            f"model.position is '{self.position}', and needs heads of an even width (they have "
            f"{width}): set model.head_dim": rotary and bool(width % 2),
            f"model.n_embd is {self.n_embd}, and model.position 'sinusoidal' needs an even "
            "number": self.position == "sinusoidal" and bool(self.n_embd % 2),
            f"model.n_expert_active is {self.n_expert_active}, and model.n_expert is "
            f"{self.n_expert}": self.n_expert_active > max(1, self.n_expert),
            f"model.rotary_base_local is {self.rotary_base_local}, and must be 0 or above 1": 0
            < self.rotary_base_local
            <= 1,
            f"model.rotary_low_frequency is {self.rotary_low_frequency}, and must be below "
            f"model.rotary_high_frequency ({self.rotary_high_frequency})": self.rotary_scaling
            in ("yarn", "llama3")
            and 0 < self.rotary_high_frequency <= self.rotary_low_frequency,
            "model.rotary_scaling 'dynamic_ntk' needs model.position 'rotary' and no "
            "model.sinks": self.rotary_scaling == "dynamic_ntk"
            and (self.position == "xpos" or self.sinks > 0),
            f"model.initial 'zero' makes each block the identity, which model.norm_placement "
            f"'{self.norm_placement}' undoes": self.initial == "zero"
            and self.norm_placement in ("post", "deepnorm", "sandwich"),
            "model.norm_bias is 'yes', and needs model.norm_weight": self.norm_bias == "yes"
            and not self.norm_weight,
        }
        return [problem for problem, is_so in found.items() if is_so] + self._without_effect()

    def _without_effect(self) -> list[str]:
        """One sentence for each field that was set and does nothing in this model."""
        rotary, local = self.position in ("rotary", "xpos"), "L" in self._pattern()
        needs = {
            "rotary_base": (rotary, "model.position 'rotary' or 'xpos'"),
            "rotary_fraction": (rotary, "model.position 'rotary' or 'xpos'"),
            "rotary_scaling_factor": (self.rotary_scaling != "none", "model.rotary_scaling"),
            "rotary_scaling_local": (
                self.rotary_scaling != "none" and local,
                "model.rotary_scaling and local layers (model.window)",
            ),
            "scale_attention_width": (self.scale_attention, "model.scale_attention"),
            "logit_softcap_form": (self.logit_softcap > 0, "model.logit_softcap"),
            "rotary_base_local": (
                (rotary and local) or self.rotary_base_local == self.rotary_base,
                "rotary positions and local layers (model.window)",
            ),
        }
        for item in dataclasses.fields(self):
            if item.name.startswith("sparse_"):
                needs[item.name] = "S" in self._pattern(), "sparse layers (S in window_pattern)"
            if item.name.startswith("moe_"):
                needs[item.name] = self.n_expert > 0, "model.n_expert"
        defaults = {item.name: item.default for item in dataclasses.fields(self)}
        return [
            f"model.{name} is {getattr(self, name)!r}, and has an effect only with {what}"
            for name, (has_effect, what) in needs.items()
            if not has_effect and getattr(self, name) != defaults[name]
        ]

    def check_learns(self) -> None:
        """``UsageError`` for a model that runs, and of which a part would learn nothing."""
        if self.n_expert and self.moe_renormalise and self.n_expert_active == 1:
            raise UsageError(
                "model.moe_renormalise makes the weight of a single expert 1, and its router would "
                "not learn: set model.n_expert_active above 1"
            )

    def layer_pattern(self) -> str:
        """The letter of each layer: G global, L local, S sparse."""
        pattern = self._pattern()
        return (pattern * math.ceil(self.n_layer / len(pattern)))[: self.n_layer]

    def _pattern(self) -> str:
        return self.window_pattern or ("L" if self.window else "G")

    def has_value_embedding(self, layer: int) -> bool:
        """Whether layer number ``layer``, from 0, has value embeddings."""
        every = self.value_embeddings
        return every > 0 and (self.n_layer - 1 - layer) % every == 0

    def most_positions(self) -> int | None:
        """The number of positions; ``None`` if it is unlimited. The decay of xPos leaves the range
        of float32 after some 35,000.
        """
        limits = {"learned": self.context_length, "xpos": max(self.context_length, 32_768)}
        return limits.get(self.position)

    @functools.lru_cache(maxsize=64)  # noqa: B019 - checks take longer than small models
    def resolved(self) -> Self:
        """The same shape, with each 0, '' and 'auto' that means a default replaced by that
        default.
        """
        factor = 1.0 if self.rotary_scaling == "dynamic_ntk" else self.rotary_scaling_factor
        matching: Initial = "deepnorm" if self.norm_placement == "deepnorm" else "gpt2"
        turns = 4.0 if self.rotary_scaling == "llama3" else 32.0
        norm_bias = self.norm_weight and self.norm == "layernorm" and self.bias
        head_dim = self.head_dim or self.n_embd // self.n_head
        return dataclasses.replace(
            self,
            n_kv_head=self.n_kv_head or self.n_head,
            head_dim=head_dim,
            n_inner=self.n_inner or 4 * self.n_embd,
            rotary_base_local=self.rotary_base_local or self.rotary_base,
            rotary_trained_length=self.rotary_trained_length
            or max(1, round(self.context_length / factor)),
            rotary_high_frequency=self.rotary_high_frequency or turns,
            rotary_temperature=self.rotary_temperature
            or 0.1 * math.log(self.rotary_scaling_factor) + 1,
            norm_bias=_decided(self.norm_bias, norm_bias),
            qkv_bias=_decided(self.qkv_bias, self.bias),
            mlp_bias=_decided(self.mlp_bias, self.bias),
            scale_attention_width=(self.scale_attention_width or head_dim)
            if self.scale_attention
            else 0,
            window_pattern=self._pattern(),
            initial=matching if self.initial == "auto" else self.initial,
        )


def with_present_names(fields: Mapping[str, Any]) -> dict[str, Any]:
    """A saved model's fields, with values of older versions under their present names."""
    older = {"norm": {"layer": "layernorm"}}
    return {
        name: older[name].get(value, value) if name in older and isinstance(value, str) else value
        for name, value in fields.items()
    }


def _decided(choice: Choice, auto: bool) -> Choice:
    return ("yes" if auto else "no") if choice == "auto" else choice
