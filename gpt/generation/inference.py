"""A model converted for inference: its matrices have a smaller format, and are read once per token.

Decoding one sequence reads every weight for every token, so its time is proportional to the bytes
of the weights. :func:`prepare_for_inference` converts a model to one that has the same methods. All
its matrices, also those of the head and the embedding, are stored in one of the formats of
:mod:`gpt.generation.quantisation`.

On a CPU, a few tokens at a time (decoding) use the kernels of :mod:`gpt.kernels`. Activations are
float32; products with int8 and int4 round them to 8 bits, with one scale for 32 numbers. Many
tokens at a time (a prompt) use torch's matrix products, in bfloat16 if the processor has
instructions for it. On a GPU, int8 and int4 have kernels in :mod:`gpt.triton_kernels`.
"""

import copy
from collections.abc import Callable, Mapping, Sequence, Set
from typing import Any, Literal, Self, TypeVar, cast, get_args
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from gpt import kernels
from gpt.config import ModelConfig, UsageError, Weights, foreign, nearest
from gpt.device import choose_precision
from gpt.generation.fused import Fused
from gpt.generation.packed_layers import FEW, PackedEmbedding, PackedLinear
from gpt.generation.quantisation import Format, Matrix
from gpt.kernels import GROUP
from gpt.model.cache import KVCache
from gpt.model.gpt import GPT
from gpt.model.shared import Shared

Part = TypeVar("Part", Matrix, Tensor)


class InferenceGPT(GPT):
    """A :class:`GPT` converted for inference. One call of the kernels computes all blocks for a few
    tokens, if the kernels support the blocks and the cache.
    """

    weights: Weights | Literal["gguf"]
    """The format of the matrices; ``gguf`` if each has its own."""
    few: int
    """Up to this many tokens use the kernels; 0 if no matrix or block does."""
    _found: WeakKeyDictionary[KVCache, Fused] | None

    def __init__(self, model: GPT, weights: Weights | Literal["gguf"], packing: "_Packing") -> None:
        """The modules of ``model``, packed."""
        nn.Module.__init__(self)
        self.config, self.kinds, self.weights, self._found = (
            model.config,
            model.kinds,
            weights,
            None,
        )
        self.cache_dtype = torch.float32 if weights == "float32" else packing.wide
        self.pointer = self.skips = None
        for name, child in model.named_children():
            setattr(self, name, packing.of(child, name))
        self.few = packing.few if kernels.knows(model.config) else 0
        self.eval()

    @classmethod
    def of(
        cls,
        config: ModelConfig,
        matrices: Mapping[str, Matrix],
        tensors: Mapping[str, Tensor],
        *,
        weights: Weights | Literal["gguf"] = "gguf",
        device: torch.device | None = None,
    ) -> "InferenceGPT":
        """A model of ready matrices, each in a format of its own (:meth:`Matrix.of_blocks`).

        The names are those of ``GPT(config).named_parameters()``: ``matrices`` has the weights of
        linear layers and of the token embedding (``embed.weight``, ``blocks.0.attn.qkv.weight``),
        ``tensors`` all other parameters (norms, biases, positions). A tied head has no entry and
        shares the matrix of the embedding. Nothing is copied, except tensors of a dtype other than
        float32 (on a GPU, than the products'). ``device`` is where the matrices are, or will be
        moved to. ``UsageError`` if a parameter is missing or has another shape, if there are other
        names, and for matrices of integers on a GPU without Triton.
        """
        device = device or next(iter(matrices.values())).data.device
        kinds = {matrix.kind for matrix in matrices.values()}
        with torch.device("meta"):
            model = GPT(config)
        left = {**matrices}, {**tensors}

        def matrix(name: str, parameter: Tensor) -> Matrix:
            return _taken(left[0], name, parameter, lambda m: [len(m.data), m.width])

        def tensor(name: str, parameter: Tensor) -> Tensor:
            return _taken(left[1], name, parameter, lambda t: [*t.shape])

        made = cls(model, weights, _Packing(kinds, device, matrix, tensor))
        if odd := sorted(left[0] | left[1]):
            names = ", ".join(map(foreign, odd[:3]))
            raise UsageError(f"the configuration has no parameters for these weights: {names}")
        return made

    def features(
        self,
        tokens: Tensor,
        *,
        cache: KVCache | None = None,
        valid: Sequence[int] | None = None,
        documents: Tensor | None = None,
    ) -> Tensor:
        """The same as :meth:`GPT.features`."""
        B, T = tokens.shape
        few = 2 * self.few if T == 1 else self.few  # for prompts, matrix products are fast too
        padded = valid is not None and set(valid) != {T}
        fused = None
        if cache is not None and tokens.numel() <= few and not padded and documents is None:
            fused = self._fused(cache, B)
        if cache is None or fused is None:
            return super().features(tokens, cache=cache, valid=valid, documents=documents)
        plan, starts = cache.plan(T), cache.lengths
        x = self.embed_tokens(tokens, plan.at).float()
        x = x.flatten(0, 1).contiguous()
        fused.run(x, [(b, start + t) for b, start in enumerate(starts) for t in range(T)])
        out: Tensor = self.norm(x.view(B, T, -1))
        if self.pointer is not None:
            out = self.pointer(out, tokens, Shared(plan.at, {}, cache, plan))
        cache.advance(plan)
        return out

    def _fused(self, cache: KVCache, rows: int) -> Fused | None:
        """The blocks and the cache for the kernels; ``None`` if the kernels do not support them.

        The blocks are read once for each cache. A later change to them applies from the next text.
        """
        if self._found is None:
            self._found = WeakKeyDictionary()
        found = self._found.get(cache)
        if found is None or not found.is_of(cache):
            found = self._found[cache] = Fused(self, cache)
        return found if found.is_known and cache.batch_size == rows <= found.rows else None

    def parameter_count(self, *, embeddings: bool = True) -> int:
        """The number of parameters of the original model."""
        with torch.device("meta"):
            return GPT(self.config).parameter_count(embeddings=embeddings)

    def formats(self) -> dict[str, Format]:
        """The format of each matrix, by the names of :meth:`of`."""
        matrices = {n: m for n, m in self.named_modules() if isinstance(m, Matrix)}
        return {f"{name.removesuffix('matrix')}weight": m.kind for name, m in matrices.items()}

    def own_tensors(self) -> dict[str, Tensor]:
        """The parameters and buffers by name; shared ones once."""
        return {**dict(self.named_parameters()), **dict(self.named_buffers())}

    def load_state_dict(self, *args: Any, **options: Any) -> Any:
        """The same as :meth:`torch.nn.Module.load_state_dict`."""
        result = super().load_state_dict(*args, **options)
        self._forget()
        return result

    def train(self, mode: bool = True) -> Self:
        """Always evaluation mode; ``ValueError`` for training mode."""
        if mode:
            raise ValueError(
                "a model that was converted for inference cannot be trained; train the original"
            )
        return super().train(mode)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self._forget()
        if any(isinstance(m, Matrix) and m.dtypes() != m.has_dtypes for m in self.modules()):
            raise TypeError(
                f"a model that was converted to {self.weights} cannot change its dtype; "
                "call prepare_for_inference on the original model"
            )
        return self

    def _forget(self) -> None:
        """Drop cached addresses; they are read again at the next call."""
        self._found = None
        for module in self.modules():
            if isinstance(module, PackedLinear):
                module._raw = module._product = module._dense = None

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_found": None}


def prepare_for_inference(
    model: GPT, weights: Weights = "auto", *, device: torch.device | None = None
) -> InferenceGPT:
    """Convert ``model`` for inference, with its matrices in the format ``weights``.

    The result has the same methods, but cannot be trained. ``model`` does not change; tensors that
    need no conversion are shared with it. ``auto`` is bfloat16 if the processor has instructions
    for it, else float32 (float16 on GPUs without bfloat16). ``device`` is where the result will
    run; by default, that of ``model``. ``UsageError`` for int8 and int4 on a GPU without Triton,
    and for subclasses of ``GPT``, ``nn.Linear`` and ``nn.Embedding``: the conversion would drop
    their changes.
    """
    if isinstance(model, InferenceGPT):
        raise UsageError(f"the model is already converted to {model.weights}")
    if type(model) is not GPT:
        raise UsageError(f"expected a GPT; cannot convert a {type(model).__name__}")
    device = device or model.device
    kind = choose_weights(weights, device)

    def matrix(name: str, weight: Tensor) -> Matrix:
        # rounded weights would choose other experts
        return Matrix("float32" if name.endswith(".router.weight") else kind, weight.detach())

    return InferenceGPT(model, kind, _Packing({kind}, device, matrix, lambda name, p: p.detach()))


def choose_weights(weights: Weights, device: torch.device) -> Weights:
    """The format for ``weights``; ``auto`` depends on ``device``."""
    if weights not in get_args(Weights):
        raise UsageError(
            f"weights is {weights!r}, and must be one of {', '.join(get_args(Weights))}"
            f"{nearest(weights, get_args(Weights))}"
        )
    if weights != "auto":
        return weights
    return cast(Weights, str(choose_precision("auto", device)).removeprefix("torch."))


def _check_triton(kind: Weights, device: torch.device) -> None:
    """Run each kernel once; ``UsageError`` if one fails. Without Triton's kernels, each token would
    convert the whole matrix, which takes longer than a product with a bfloat16 matrix.
    """
    try:
        from gpt import triton_kernels

        packed = Matrix(kind, torch.ones(1, GROUP, device=device))
        matrix = packed.data, packed.scales, packed.lows, GROUP
        for rows in (1, 2):  # one row has its own kernel
            triton_kernels.linear(torch.ones(rows, GROUP, device=device), *matrix, None)
        triton_kernels.dense(*matrix, torch.float32)
    except Exception as error:  # the import, the C compiler, or Triton's
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UsageError(
            f"weights {kind} need Triton on a GPU, which does not work here ({reason}); "
            "weights bfloat16 need no compiler"
        ) from error


def _taken(
    left: dict[str, Part], name: str, parameter: Tensor, shape: Callable[[Part], list[int]]
) -> Part:
    """Remove and return what is given for a parameter."""
    if name not in left:
        raise UsageError(f"the weights do not have {foreign(name)}")
    part = left.pop(name)
    if shape(part) != [*parameter.shape]:
        raise UsageError(
            f"{foreign(name)} has the shape {shape(part)}, and the configuration needs "
            f"{[*parameter.shape]}"
        )
    return part


class _Packing:
    """Converts modules to packed ones; shared weights stay shared."""

    def __init__(
        self,
        kinds: Set[Format],
        device: torch.device,
        matrix: Callable[[str, Tensor], Matrix],
        tensor: Callable[[str, Tensor], Tensor],
    ) -> None:
        """``matrix`` and ``tensor`` give what replaces a parameter, by its name. ``kinds`` are the
        formats of the matrices, which are or will be on ``device``.
        """
        self._new_matrix, self._new_tensor = matrix, tensor
        here, packed = device.type == "cpu", kinds & kernels.PACKED.keys()
        for kind in sorted(packed) if device.type == "cuda" else ():
            if kind == "int8_gguf" or kind == "int4_gguf":
                raise UsageError(f"matrices of {kind} run on a CPU; convert them for a GPU")
            _check_triton(kind, device)
        fast = choose_precision("auto", device)
        self.wide = fast if packed or len(kinds) > 1 else getattr(torch, min(kinds))
        if here and self.wide not in (torch.float32, fast):
            self.wide = torch.float32  # the processor only emulates the format's dtype
        known = here and kinds & kernels.FORMATS.keys() and kernels.library() is not None
        self.few = FEW if known else 0
        self.matrices: dict[int, Matrix] = {}

    def of(self, module: nn.Module, name: str) -> nn.Module:
        """The converted module; ``module`` does not change. ``name`` is its name in the model."""
        if isinstance(module, nn.Linear):
            _check_plain(module, nn.Linear, name)
            bias = None if module.bias is None else self._new_tensor(f"{name}.bias", module.bias)
            matrix = self.matrix(module.weight, f"{name}.weight")
            return PackedLinear(matrix, bias, *self._products(matrix))
        if isinstance(module, nn.Embedding) and name == "embed":
            _check_plain(module, nn.Embedding, name)
            matrix = self.matrix(module.weight, f"{name}.weight")
            return PackedEmbedding(matrix, *self._products(matrix))
        new = copy.copy(module)
        rest = torch.float32 if self.few else self.wide  # norms and positions
        new._parameters = {
            own: None
            if p is None
            else nn.Parameter(self._new_tensor(f"{name}.{own}", p).to(rest), requires_grad=False)
            for own, p in module._parameters.items()
        }
        for field, hooks in list(vars(new).items()):
            if field.endswith("hooks"):
                setattr(new, field, type(hooks)())
        new._modules = {
            child: part and self.of(part, f"{name}.{child}")
            for child, part in module._modules.items()
        }
        return new

    def matrix(self, weight: Tensor, name: str) -> Matrix:
        """The weight's matrix; a head and an embedding that are tied share one."""
        if id(weight) not in self.matrices:
            self.matrices[id(weight)] = self._new_matrix(name, weight)
        return self.matrices[id(weight)]

    def _products(self, matrix: Matrix) -> tuple[torch.dtype, int]:
        """The dtype of products of many tokens, and the most tokens that the kernels take."""
        wide = torch.float32 if matrix.kind == "float32" else self.wide
        return wide, self.few if matrix.kind in kernels.FORMATS else 0


def _check_plain(module: nn.Module, kind: type[nn.Module], name: str) -> None:
    """``UsageError`` if the module has more parts than torch's class ``kind``."""
    more = module._parameters.keys() - {"weight", "bias"} or module._modules or module._buffers
    if type(module) is not kind or more or "forward" in vars(module):
        what = type(module).__name__ + (f" with {', '.join(map(str, more))}" if more else "")
        raise UsageError(
            f"model.{foreign(name)} is a {foreign(what)}; only torch's own {kind.__name__} can be "
            "packed, so merge its additions into its weight first"
        )
