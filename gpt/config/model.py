"""The shape of a model: sizes, and which variant of each part it has."""

import dataclasses
import math
from dataclasses import dataclass
from typing import Literal, Self

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
Choice = Literal["auto", "yes", "no"]
LAYER_KINDS = "GLS"
"""The letters of ``window_pattern``: global, local (an attention window), sparse (blocks)."""


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The shape of a :class:`gpt.GPT`. The defaults are GPT-2's smallest model, for ever."""

    vocab_size: int = number(50257, at_least=0)
    """Rows of the token embedding. In a run, 0 takes the tokenizer's (from 1,024 tokens on, padded
    to a multiple of 128 for GPUs), and a larger number pads it."""
    context_length: int = number(1024, at_least=0)
    """The most tokens the model sees at once. In a run with init, 0 keeps the model's own."""
    n_layer: int = number(12, at_least=1)
    """Blocks, each of attention and a feed-forward layer."""
    n_head: int = number(12, at_least=1)
    """Attention heads in a block; they share n_embd."""
    n_kv_head: int = number(0, at_least=0)
    """Heads of keys and values (grouped-query attention); 0: as many as n_head."""
    head_dim: int = number(0, at_least=0)
    """Width of one attention head; 0: n_embd / n_head."""
    n_embd: int = number(768, at_least=1)
    """Width of the residual stream."""
    position: PositionScheme = "learned"
    """How tokens know their positions. learned: an embedding for each (GPT-2). sinusoidal: fixed
    waves are added. rotary: queries and keys are rotated. alibi: distant keys lose score. xpos:
    rotary, and distant keys decay. none: from the causal mask alone."""
    rotary_base: float = number(10_000.0, above=1)
    """Base of the rotary frequencies (rotary, xpos)."""
    rotary_base_local: float = number(0.0, at_least=0)
    """The same for layers with an attention window; 0: rotary_base."""
    rotary_fraction: float = number(1.0, above=0, at_most=1)
    """Part of each head's width that is rotated (GPT-NeoX: 0.25)."""
    rotary_scaling: RotaryScaling = "none"
    """How rotary positions reach beyond the length they were trained for."""
    rotary_scaling_factor: float = number(1.0, at_least=1)
    """How many times the trained length the scaling is made for."""
    rotary_trained_length: int = number(0, at_least=0)
    """Tokens of context before the scaling; 0: context_length / rotary_scaling_factor (dynamic_ntk:
    context_length)."""
    rotary_low_frequency: float = number(1.0, above=0)
    """llama3: turns over the trained length below which a frequency is divided by the factor. yarn:
    the same (its beta_slow)."""
    rotary_high_frequency: float = number(0.0, at_least=0)
    """Turns above which a frequency stays; 0: 4 for llama3, 32 for yarn (its beta_fast)."""
    rotary_temperature: float = number(0.0, at_least=0)
    """yarn: queries and keys are multiplied by this; 0: 0.1 ln(rotary_scaling_factor) + 1."""
    norm: Norm = "layernorm"
    """layernorm: mean 0, variance 1 (GPT-2). rmsnorm: root mean square 1."""
    norm_weight: bool = True
    """Norms have a weight."""
    norm_bias: Choice = "auto"
    """Norms have a bias; auto: layernorm as bias says, rmsnorm has none."""
    norm_placement: NormPlacement = "pre"
    """pre: before each branch (GPT-2). post: after each sum (2017). deepnorm: post, with a larger
    residual. sandwich: before and after each branch (Gemma). parallel: attention and feed-forward
    side by side, each with a norm (GPT-NeoX); parallel_shared: with one norm (GPT-J)."""
    qk_norm: bool = False
    """An RMSNorm over each head's queries and keys, before they are rotated."""
    mlp: Mlp = "plain"
    """plain: up, activation, down. gated: down(activation(gate) * up), with silu SwiGLU."""
    dropout: float = number(0.0, at_least=0, below=1)
    """Probability of dropping an embedding, an attention weight or a residual branch's output."""
    bias: bool = True
    """Biases in the linear layers and the norms."""
    qkv_bias: Choice = "auto"
    """Biases of queries, keys and values; auto: as bias says."""
    tie_embeddings: bool = True
    """One matrix for the token embedding and the head."""
    scale_embeddings: bool = False
    """Multiply token embeddings by the square root of n_embd (2017, Gemma)."""
    embedding_norm: bool = False
    """A norm right after the embedding (BLOOM)."""
    norm_eps: float = number(1e-5, above=0)
    """Epsilon of the norms."""
    n_inner: int = number(0, at_least=0)
    """Width inside the feed-forward layers; 0: four times n_embd."""
    activation: Activation = "gelu_tanh"
    """What the feed-forward layers apply in their middle."""
    scale_attention: bool = True
    """Divide attention scores by the square root of the head's width."""
    scale_attention_by_layer: bool = False
    """Divide attention scores by the number of the layer, from 1, as well."""
    window: int = number(0, at_least=0)
    """Attention window: tokens that a query of a local layer sees, its own included; 0: all."""
    window_pattern: str = ""
    """A letter for each layer, repeated: L local (window), G global, S sparse blocks; empty: L
    where window is set, else G."""
    sinks: int = number(0, at_least=0)
    """First tokens that local layers see as well (attention sinks)."""
    learned_sinks: bool = False
    """A learned score for each head that takes part in the softmax and has no value."""
    sparse_block: int = number(64, at_least=1)
    """Tokens in a block of the sparse layers."""
    sparse_local: int = number(3, at_least=1)
    """Blocks that a query of a sparse layer sees, its own and those before it."""
    sparse_global: int = number(1, at_least=0)
    """First blocks that every query of a sparse layer sees (Longformer)."""
    sparse_random: int = number(1, at_least=0)
    """Earlier blocks drawn at random for each block of a sparse layer (BigBird)."""
    attention_softcap: float = number(0.0, at_least=0)
    """Attention scores s become softcap * tanh(s / softcap); 0: they stay (Gemma 2: 50)."""
    attention_top_k: int = number(0, at_least=0)
    """Attend to the k best keys alone; 0: all. 1 is hard attention, with the softmax's gradient."""
    logit_softcap: float = number(0.0, at_least=0)
    """The same as attention_softcap for the logits (Gemma 2: 30)."""
    n_expert: int = number(0, at_least=0)
    """Experts in each feed-forward layer (mixture of experts); 0: one dense layer."""
    n_expert_active: int = number(1, at_least=1)
    """Experts that each token goes through (Switch: 1, Mixtral: 2)."""
    moe_shared: int = number(0, at_least=0)
    """Experts that every token goes through beside them (DeepSeek)."""
    moe_score: RouterScore = "softmax"
    """What makes the router's outputs weights."""
    moe_renormalise: bool = False
    """Make the weights of a token's experts sum to 1 (Mixtral)."""
    moe_capacity: float = number(0.0, at_least=0)
    """Tokens that an expert takes in training, in multiples of an equal share; the rest skip it
    (Switch: 1.25). 0: no limit."""
    moe_balance: Balance = "none"
    """What spreads tokens over the experts. switch: Switch's loss, of the first choices. mixtral:
    the loss of all choices. bias: a bias on the choice that follows the load (DeepSeek)."""
    moe_balance_weight: float = number(0.01, at_least=0)
    """Weight of the loss, or how far one step moves the bias."""
    moe_z_weight: float = number(0.0, at_least=0)
    """Weight of the router's z-loss, the squared log of its softmax's sum (ST-MoE: 0.001)."""
    copy: Copy = "none"
    """pointer: a part of each prediction is copied from the context (pointer sentinel)."""
    initial: Initial = "auto"
    """Initial weights; auto: deepnorm with norm_placement deepnorm, else gpt2."""

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
        """Combinations of fields that mean nothing, each as a sentence."""
        rotary = self.position in ("rotary", "xpos")
        width = self.head_dim or self.n_embd // self.n_head
        pattern = self._pattern()
        found = {
            f"model.window_pattern is '{self.window_pattern}', and must be made of the letters "
            f"{', '.join(LAYER_KINDS)}": bool(set(self.window_pattern) - set(LAYER_KINDS)),
            f"model.window_pattern is '{self.window_pattern}', whose local layers (L) need a "
            "model.window of at least 1": "L" in pattern and not self.window,
            f"model.window is {self.window}, and no layer of model.window_pattern "
            f"'{self.window_pattern}' is local (L)": bool(self.window) and "L" not in pattern,
            f"model.sinks is {self.sinks}, and only local layers have sinks: set "
            "model.window": bool(self.sinks) and "L" not in pattern,
            f"model.rotary_scaling is '{self.rotary_scaling}', and model.position "
            f"'{self.position}' is not rotary": self.rotary_scaling != "none" and not rotary,
            f"model.rotary_scaling is '{self.rotary_scaling}', and needs a "
            "model.rotary_scaling_factor above 1": self.rotary_scaling in ("linear", "ntk", "yarn")
            and self.rotary_scaling_factor == 1,
            f"model.rotary_fraction is {self.rotary_fraction} of a head's {width} numbers, which "
            "leaves no pair to rotate": rotary and int(width * self.rotary_fraction) < 2,
            f"the heads are {width} wide, and model.position '{self.position}' needs an even "
            "number: set model.head_dim": rotary and bool(width % 2),
            f"model.n_embd is {self.n_embd}, and model.position 'sinusoidal' needs an even "
            "number": self.position == "sinusoidal" and bool(self.n_embd % 2),
            f"model.n_expert_active is {self.n_expert_active}, and model.n_expert is "
            f"{self.n_expert}": self.n_expert_active > max(1, self.n_expert),
            "model.moe_shared, moe_capacity, moe_balance and moe_z_weight need "
            "model.n_expert": not self.n_expert
            and (
                self.moe_shared > 0
                or self.moe_capacity > 0
                or self.moe_balance != "none"
                or self.moe_z_weight > 0
            ),
            "model.norm_bias is 'yes' and model.norm_weight false: a norm without a weight has no "
            "bias": self.norm_bias == "yes" and not self.norm_weight,
        }
        return [problem for problem, is_so in found.items() if is_so]

    def layer_pattern(self) -> str:
        """The letter of each layer: G global, L local, S sparse."""
        pattern = self._pattern()
        return (pattern * math.ceil(self.n_layer / len(pattern)))[: self.n_layer]

    def _pattern(self) -> str:
        return self.window_pattern or ("L" if self.window else "G")

    def most_positions(self) -> int | None:
        """The most positions that there are; ``None`` where any position has a meaning."""
        return self.context_length if self.position == "learned" else None

    def resolved(self) -> Self:
        """The same shape with every 0, '' and None that stands for a value replaced by it."""
        factor = 1.0 if self.rotary_scaling == "dynamic_ntk" else self.rotary_scaling_factor
        placed: Initial = "deepnorm" if self.norm_placement == "deepnorm" else "gpt2"
        turns = 4.0 if self.rotary_scaling == "llama3" else 32.0
        norm_bias = self.norm_weight and self.norm == "layernorm" and self.bias
        return dataclasses.replace(
            self,
            n_kv_head=self.n_kv_head or self.n_head,
            head_dim=self.head_dim or self.n_embd // self.n_head,
            n_inner=self.n_inner or 4 * self.n_embd,
            rotary_base_local=self.rotary_base_local or self.rotary_base,
            rotary_trained_length=self.rotary_trained_length
            or max(1, round(self.context_length / factor)),
            rotary_high_frequency=self.rotary_high_frequency or turns,
            rotary_temperature=self.rotary_temperature
            or 0.1 * math.log(self.rotary_scaling_factor) + 1,
            norm_bias=_decided(self.norm_bias, norm_bias),
            qkv_bias=_decided(self.qkv_bias, self.bias),
            window_pattern=self.layer_pattern(),
            initial=placed if self.initial == "auto" else self.initial,
        )


def _decided(choice: Choice, auto: bool) -> Choice:
    return ("yes" if auto else "no") if choice == "auto" else choice
