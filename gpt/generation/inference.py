"""A model made to run: its matrices in a smaller format, each read once a token.

Decoding one sequence reads every weight for every token, so the bytes of the weights are its time.
:func:`prepare_for_inference` makes of a model one with the same methods whose matrices, the head's
and the embedding's too, lie in one of the formats of :mod:`gpt.generation.quantisation`.

On a CPU a few tokens at a time (decoding) go through the kernels of :mod:`gpt.kernels`. Activations
are float32; products with int8 and int4 round them to 8 bits, with a scale for each 32. Many tokens
at a time (a prompt) go through torch's matrix products, in bfloat16 where the processor multiplies
it. On a GPU int8 and int4 have kernels in :mod:`gpt.triton_kernels`.
"""

import copy
import ctypes
from collections.abc import Callable, Mapping
from typing import Any, Self, cast, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gpt import kernels
from gpt.config import UsageError, Weights
from gpt.device import choose_precision
from gpt.generation.quantisation import GROUP, Matrix
from gpt.generation.torch_products import TorchProduct
from gpt.model.attention import CausalSelfAttention
from gpt.model.block import Block
from gpt.model.cache import KVCache
from gpt.model.gpt import GPT
from gpt.model.mlp import MLP

FEW = 32
"""Tokens of a prompt up to which the kernels are faster than matrix products; of rows that take one
token each, twice as many.
"""


class PackedLinear(nn.Module):
    """A linear layer of a :class:`Matrix`: up to ``few`` rows go through the kernels, more through
    a matrix product of the dtype ``wide``.
    """

    bias: Tensor | None

    def __init__(self, matrix: Matrix, bias: Tensor | None, wide: torch.dtype, few: int) -> None:
        super().__init__()
        self.matrix, self.wide, self.few = matrix, wide, few
        kept = torch.float32 if few else wide  # the kernels', or the matrix product's
        self.register_buffer("bias", None if bias is None else bias.detach().to(kept))
        self._raw: kernels.Matrix | None = None
        self._product: TorchProduct | None = None
        self._dense: Tensor | None = None

    @property
    def weight(self) -> Tensor:
        """``[N, K]``, as wide products have it. It is kept where every product needs it: without
        kernels, on a processor that only emulates the weights' dtype.
        """
        if self._dense is not None:
            return self._dense
        dense = self.matrix.dense(self.wide)
        if not self.few and dense.device.type == "cpu" and self.matrix.scales is None:
            self._dense = dense
        return dense

    @property
    def raw(self) -> kernels.Matrix:
        """As the kernels see it."""
        if self._raw is None:
            matrix = self.matrix
            tensors = (matrix.data, matrix.scales, matrix.lows, self.bias)
            self._raw = kernels.Matrix(matrix.kind, matrix.width, *tensors)
        return self._raw

    def forward(self, x: Tensor) -> Tensor:
        """``[..., K]`` to ``[..., N]``, of few rows on a CPU in float32."""
        if x.numel() <= self.few * self.matrix.width:
            return kernels.linear(x.float(), self.raw)
        if x.is_cuda and self.matrix.scales is not None:
            from gpt import triton_kernels

            if x.numel() <= triton_kernels.FEW * self.matrix.width:
                m = self.matrix
                y: Tensor = triton_kernels.linear(x, m.data, m.scales, m.lows, m.width, self.bias)
                return y
        few_rows = x.numel() <= FEW * self.matrix.width
        if not self.few and x.device.type == "cpu" and few_rows and self.matrix.scales is not None:
            if self._product is None:
                self._product = TorchProduct(self.matrix)
            y = self._product(x)
            return (y if self.bias is None else y + self.bias).to(x.dtype)
        bias = None if self.bias is None else self.bias.to(self.wide)
        return F.linear(x.to(self.wide), self.weight, bias).to(x.dtype)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        self._raw = self._product = self._dense = None  # they know the old places
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        return self

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_raw": None, "_product": None, "_dense": None}


class PackedEmbedding(nn.Module):
    """A table of tokens that is a :class:`Matrix`: few tokens become float32, many ``wide``."""

    def __init__(self, matrix: Matrix, wide: torch.dtype, few: int) -> None:
        super().__init__()
        self.matrix, self.wide, self.few = matrix, wide, few

    def forward(self, ids: Tensor) -> Tensor:
        """``[...]`` to ``[..., C]``."""
        few = ids.numel() <= self.few
        return self.matrix.rows(ids, torch.float32 if few else self.wide)


class InferenceGPT(GPT):
    """A :class:`GPT` made to run. A few tokens go through all blocks in one call of the kernels,
    where these know the blocks and the cache.
    """

    weights: Weights
    """The format of its matrices."""
    few: int
    _layers: "ctypes.Array[kernels.Layer] | None"

    def features(self, tokens: Tensor, *, cache: KVCache | None = None) -> Tensor:
        """As :meth:`GPT.features`."""
        B, T = tokens.shape
        few = 2 * self.few if T == 1 else self.few  # a prompt goes well through matrix products
        if tokens.numel() > few or cache is None or not self._fits(cache, B):
            return super().features(tokens, cache=cache)
        x = self.embed_tokens(tokens, cache.plan(T).at).float()
        x = x.flatten(0, 1).contiguous()
        places = [(b, start + t) for b, start in enumerate(cache.lengths) for t in range(T)]
        memory = kernels.Cache(cache.keys, cache.values)
        kernels.blocks(x, self._known_layers(), self._shape(), memory, places)
        cache.advance(T)
        out: Tensor = self.norm(x.view(B, T, -1))
        return out

    def _fits(self, cache: KVCache, rows: int) -> bool:
        """Whether the kernels can write to the cache: they check nothing themselves."""
        config, shape = self.config.resolved(), cache.keys.shape
        wanted = config.n_layer, config.n_kv_head, config.head_dim
        return (
            not cache.on_device
            and cache.batch_size == rows > 0
            and (shape[0], shape[2], shape[4]) == wanted
            and cache.keys.device.type == "cpu"
            and cache.keys.dtype in (torch.float32, torch.bfloat16)
        )

    def parameter_count(self, *, embeddings: bool = True) -> int:
        """Of the model that it was made of."""
        with torch.device("meta"):
            return GPT(self.config).parameter_count(embeddings=embeddings)

    def own_tensors(self) -> dict[str, Tensor]:
        """What it is made of by name, what is shared once."""
        return {**dict(self.named_parameters()), **dict(self.named_buffers())}

    def take(self, tensors: Mapping[str, Tensor]) -> None:
        """Be made of ``tensors``, named as by :meth:`own_tensors`. ``UsageError`` if they do not
        fit.
        """
        old = self.own_tensors()
        wants, has = (
            # norms and biases have the dtype that is right for where they run
            {(n, t.shape, t.dtype if ".matrix." in n else None) for n, t in each.items()}
            for each in (old, tensors)
        )
        if wants != has:
            odd = ", ".join(sorted({name for name, *_ in wants ^ has})[:3])
            raise UsageError(f"the packed weights do not fit their configuration: {odd}")
        kept = {name: t.to(old[name].dtype) for name, t in tensors.items()}
        self.load_state_dict(kept, strict=False, assign=True)

    def load_state_dict(self, *args: Any, **options: Any) -> Any:
        """As of any module."""
        result = super().load_state_dict(*args, **options)
        self._forget()
        return result

    def train(self, mode: bool = True) -> Self:
        """It is always in evaluation mode."""
        if mode:
            raise ValueError(
                "a model that was made to run cannot be trained; the one that it was made of can"
            )
        return super().train(mode)

    @property
    def is_known(self) -> bool:
        """Whether the kernels have the blocks' arithmetic."""
        return self.config.resolved().head_dim % 16 == 0 and all(
            (type(block), type(block.attn), type(block.mlp)) == (Block, CausalSelfAttention, MLP)
            for block in self.blocks
        )

    def _known_layers(self) -> "ctypes.Array[kernels.Layer]":
        if self._layers is None:
            layers = (_layer(cast(Block, block)) for block in self.blocks)
            self._layers = (kernels.Layer * len(self.blocks))(*layers)
        return self._layers

    def _shape(self) -> kernels.Shape:
        config, known = self.config.resolved(), kernels.ACTIVATIONS
        heads = (config.n_layer, config.n_head, config.n_kv_head, config.head_dim)
        return kernels.Shape(*heads, known[config.activation])

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self._forget()
        if any(isinstance(m, Matrix) and m.dtypes() != m.has_dtypes for m in self.modules()):
            raise TypeError(
                f"a model that was made to run in {self.weights} cannot become another dtype; "
                "prepare_for_inference makes one of the model that it was made of"
            )
        return self

    def _forget(self) -> None:
        """Where everything was: the kernels' places are taken anew."""
        self._layers = None
        for module in self.modules():
            if isinstance(module, PackedLinear):
                module._raw = module._product = module._dense = None

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_layers": None}


def prepare_for_inference(
    model: GPT, weights: Weights = "auto", *, device: torch.device | None = None
) -> InferenceGPT:
    """A model with ``model``'s methods that is made to run, its matrices in the format ``weights``.

    ``model`` stays as it is, and may be dropped; what needs no conversion is shared. ``auto`` is
    bfloat16 where the processor multiplies it, else float32 (float16 on GPUs without it). The new
    model cannot be trained. ``device`` is where it will run, ``model``'s unless given.
    ``UsageError`` for int8 and int4 on a GPU without Triton.
    """
    if isinstance(model, InferenceGPT):
        raise UsageError(f"the model is made to run in {model.weights} already")
    device = device or model.device
    kind, fast = choose_weights(weights, device), choose_precision("auto", device)
    if device.type == "cuda" and kind in ("int8", "int4"):
        _check_triton(kind, device)
    here = device.type == "cpu"
    known = here and kind in kernels.FORMATS and kernels.library() is not None
    few = FEW if known else 0
    wide = fast if kind in ("int8", "int4") else getattr(torch, kind)
    if here and wide not in (torch.float32, fast):
        wide = torch.float32  # the processor only emulates products of the format's dtype
    new = _Packing(model, kind, wide, few).of(model)
    new.__class__ = InferenceGPT
    assert isinstance(new, InferenceGPT)
    new._layers, new.weights = None, kind
    new.few = few if new.is_known else 0
    new.cache_dtype = torch.float32 if kind == "float32" else wide
    return new.eval()


def choose_weights(weights: Weights, device: torch.device) -> Weights:
    """The format that ``auto`` means on ``device``, or the one that was named."""
    if weights not in get_args(Weights):
        raise UsageError(
            f"weights is {weights!r}, and must be one of {', '.join(get_args(Weights))}"
        )
    if weights != "auto":
        return weights
    return cast(Weights, str(choose_precision("auto", device)).removeprefix("torch."))


def _check_triton(kind: Weights, device: torch.device) -> None:
    """Run each kernel once. ``UsageError`` where one fails: without Triton's kernels each token
    would convert the whole matrix, which takes longer than reading it in bfloat16.
    """
    try:
        from gpt import triton_kernels

        packed = Matrix(kind, torch.ones(1, GROUP, device=device))
        matrix = packed.data, packed.scales, packed.lows, GROUP
        for rows in (1, 2):  # one row has a kernel of its own
            triton_kernels.linear(torch.ones(rows, GROUP, device=device), *matrix, None)
        triton_kernels.dense(*matrix, torch.float32)
    except Exception as error:  # an import, a compiler of C, Triton's own: each fails in its way
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UsageError(
            f"weights {kind} need Triton on a GPU, and it does not work here ({reason}); "
            "weights bfloat16 need no compiler"
        ) from error


class _Packing:
    """Modules to their packed kin; what they share stays shared."""

    def __init__(self, model: GPT, kind: Weights, wide: torch.dtype, few: int) -> None:
        self.kind, self.wide, self.few = kind, wide, few
        self.rest = torch.float32 if few else wide  # norms and positions
        self.tables = {id(model.embed.weight)}
        self.matrices: dict[int, Matrix] = {}

    def of(self, module: nn.Module) -> nn.Module:
        """The module, made to run; the one that was given stays as it is."""
        if isinstance(module, nn.Linear):
            return PackedLinear(self.matrix(module.weight), module.bias, self.wide, self.few)
        if isinstance(module, nn.Embedding) and id(module.weight) in self.tables:
            return PackedEmbedding(self.matrix(module.weight), self.wide, self.few)
        new = copy.copy(module)
        new._parameters = {
            name: p if p is None else nn.Parameter(p.detach().to(self.rest), requires_grad=False)
            for name, p in module._parameters.items()
        }
        for name, hooks in list(vars(new).items()):
            if name.endswith("hooks"):
                setattr(new, name, type(hooks)())
        new._modules = {name: child and self.of(child) for name, child in module._modules.items()}
        return new

    def matrix(self, weight: Tensor) -> Matrix:
        """The weight's matrix: one for a head and the embedding that it is tied to."""
        if id(weight) not in self.matrices:
            self.matrices[id(weight)] = Matrix(self.kind, weight.detach())
        return self.matrices[id(weight)]


def _layer(block: Block) -> kernels.Layer:
    attn, mlp = block.attn, block.mlp
    linears = [cast(PackedLinear, linear) for linear in (attn.qkv, attn.out, mlp.up, mlp.down)]
    return kernels.Layer(
        *(_norm(cast(nn.LayerNorm, norm)) for norm in (block.attn_norm, block.mlp_norm)),
        *(linear.raw for linear in linears),
        attn.scale,
    )


def _norm(norm: nn.LayerNorm) -> kernels.Norm:
    bias = None if norm.bias is None else norm.bias.data_ptr()
    return kernels.Norm(norm.weight.data_ptr(), bias, norm.eps)
