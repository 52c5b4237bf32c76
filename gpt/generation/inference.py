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
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Self, cast, get_args
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from gpt import kernels
from gpt.config import UsageError, Weights, foreign
from gpt.device import choose_precision
from gpt.generation.fused import Fused
from gpt.generation.packed_layers import FEW, PackedEmbedding, PackedLinear
from gpt.generation.quantisation import GROUP, Matrix
from gpt.model.cache import KVCache
from gpt.model.gpt import GPT
from gpt.model.shared import Shared


class InferenceGPT(GPT):
    """A :class:`GPT` made to run. A few tokens go through all blocks in one call of the kernels,
    where these know the blocks and the cache.
    """

    weights: Weights
    """The format of its matrices."""
    few: int
    _found: WeakKeyDictionary[KVCache, Fused] | None

    def __init__(self, model: GPT, weights: Weights, *, wide: torch.dtype, few: int) -> None:
        """Of ``model``, with its matrices as ``weights``. Up to ``few`` tokens go through the
        kernels, more through products of the dtype ``wide``.
        """
        nn.Module.__init__(self)
        self.config, self.kinds, self.weights, self._found = (
            model.config,
            model.kinds,
            weights,
            None,
        )
        self.few = few if kernels.knows(model.config) else 0
        self.cache_dtype = torch.float32 if weights == "float32" else wide
        packing = _Packing(model, weights, wide, few)
        self.pointer = None
        for name, child in model.named_children():
            setattr(self, name, packing.of(child, f"model.{name}"))
        self.eval()

    def features(
        self,
        tokens: Tensor,
        *,
        cache: KVCache | None = None,
        valid: Sequence[int] | None = None,
    ) -> Tensor:
        """As :meth:`GPT.features`."""
        B, T = tokens.shape
        few = 2 * self.few if T == 1 else self.few  # a prompt goes well through matrix products
        padded = valid is not None and set(valid) != {T}
        fused = None
        if cache is not None and tokens.numel() <= few and not padded:
            fused = self._fused(cache, B)
        if cache is None or fused is None:
            return super().features(tokens, cache=cache, valid=valid)
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
        """The blocks and the cache for the kernels, if these know both.

        The blocks are looked at once for each cache: what is changed about them counts from the
        next text on.
        """
        if self._found is None:
            self._found = WeakKeyDictionary()
        found = self._found.get(cache)
        if found is None or not found.is_of(cache):
            found = self._found[cache] = Fused(self, cache)
        return found if found.is_known and cache.batch_size == rows <= found.rows else None

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
        self._found = None
        for module in self.modules():
            if isinstance(module, PackedLinear):
                module._raw = module._product = module._dense = None

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_found": None}


def prepare_for_inference(
    model: GPT, weights: Weights = "auto", *, device: torch.device | None = None
) -> InferenceGPT:
    """A model with ``model``'s methods that is made to run, its matrices in the format ``weights``.

    ``model`` stays as it is, and may be dropped; what needs no conversion is shared. ``auto`` is
    bfloat16 where the processor multiplies it, else float32 (float16 on GPUs without it). The new
    model cannot be trained. ``device`` is where it will run, ``model``'s unless given.
    ``UsageError`` for int8 and int4 on a GPU without Triton, and for subclasses of ``GPT``,
    ``nn.Linear`` and ``nn.Embedding``: what they have more would be lost.
    """
    if isinstance(model, InferenceGPT):
        raise UsageError(f"the model is made to run in {model.weights} already")
    if type(model) is not GPT:
        raise UsageError(f"the model is a {type(model).__name__}, and a GPT alone is made to run")
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
    return InferenceGPT(model, kind, wide=wide, few=few)


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

    def of(self, module: nn.Module, name: str) -> nn.Module:
        """The module, made to run; the one that was given stays as it is."""
        if isinstance(module, nn.Linear):
            _check_plain(module, nn.Linear, name)
            if name.endswith(".router"):  # rounding it would choose other experts
                matrix = Matrix("float32", module.weight.detach())
                return PackedLinear(matrix, module.bias, torch.float32, self.few)
            return PackedLinear(self.matrix(module.weight), module.bias, self.wide, self.few)
        if isinstance(module, nn.Embedding) and id(module.weight) in self.tables:
            _check_plain(module, nn.Embedding, name)
            return PackedEmbedding(self.matrix(module.weight), self.wide, self.few)
        new = copy.copy(module)
        new._parameters = {
            name: p if p is None else nn.Parameter(p.detach().to(self.rest), requires_grad=False)
            for name, p in module._parameters.items()
        }
        for field, hooks in list(vars(new).items()):
            if field.endswith("hooks"):
                setattr(new, field, type(hooks)())
        new._modules = {
            child: part and self.of(part, f"{name}.{child}")
            for child, part in module._modules.items()
        }
        return new

    def matrix(self, weight: Tensor) -> Matrix:
        """The weight's matrix: one for a head and the embedding that it is tied to."""
        if id(weight) not in self.matrices:
            self.matrices[id(weight)] = Matrix(self.kind, weight.detach())
        return self.matrices[id(weight)]


def _check_plain(module: nn.Module, kind: type[nn.Module], name: str) -> None:
    """``UsageError`` if there is more in the module than torch's own of this kind has."""
    more = module._parameters.keys() - {"weight", "bias"} or module._modules or module._buffers
    if type(module) is not kind or more or "forward" in vars(module):
        what = type(module).__name__ + (f" with {', '.join(map(str, more))}" if more else "")
        raise UsageError(
            f"{foreign(name)} is a {foreign(what)}, and only torch's own {kind.__name__} can be "
            "packed; merge what it adds into its weight first"
        )
