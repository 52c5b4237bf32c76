"""LoRA in the file format of the library PEFT: ``adapter_config.json`` and
``adapter_model.safetensors``.

PEFT has a pair of matrices for each of the family's layers. Where three of those are one layer here
(queries, keys, values), an export gives each the common ``A`` and its rows of ``B``. An import
stacks their three ``A``, and gives each layer's rows their own columns of ``B``, the rest 0. Both
are exact. The format is that of PEFT 0.21.
"""

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gpt import tensors
from gpt.config import AdapterConfig, UsageError, foreign, quoted
from gpt.files import new_folder, read_object
from gpt.interop.families import family_for
from gpt.interop.weights import Rows, layout
from gpt.model.adapter import A, B, adapter_weights
from gpt.model.gpt import GPT

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model"
PREFIX = "base_model.model."
SUPPORTED = {
    "use_dora": False, "bias": "none", "modules_to_save": None, "rank_pattern": {},
    "alpha_pattern": {}, "lora_bias": False, "use_qalora": False, "layer_replication": None,
    "alora_invocation_tokens": None, "trainable_token_indices": None, "arrow_config": None,
    "kasa_config": None, "use_bdlora": None, "monteclora_config": None,
}  # fmt: skip
"""Settings of PEFT that change the result, and the values that are supported."""
OTHER_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
"""Initialisations that also change the base's weights, which the adapter's file does not have."""


def is_peft(path: Path) -> bool:
    """Whether the folder has an adapter of PEFT."""
    return (path / CONFIG).is_file()


def _modules(model: GPT, family: str) -> dict[str, list[Rows]]:
    """The family's linear layers, by their names without ``.weight``, and our rows for each."""
    with torch.device("meta"):
        whole = GPT(model.config)
    found = layout(family_for(model.config, family), whole)
    suffix = ".weight"
    return {
        theirs.removesuffix(suffix): held
        for theirs, held in found.items()
        if theirs.endswith(suffix) and held[0].parameter.startswith("blocks.")
    }


def save_peft(
    model: GPT, config: AdapterConfig, base: str, out: Path, *, family: str = "auto"
) -> None:
    """Write the model's LoRA as a new folder for PEFT. ``base`` is the name of the model under it.

    ``UsageError`` for a bottleneck, and where the family's layer joins several layers of ours.
    """
    if config.kind != "lora":
        raise UsageError(f"adapter.kind is {config.kind}, and PEFT's format holds lora alone")
    own = adapter_weights(model)
    written: dict[str, Tensor] = {}
    ranks = set()
    for theirs, held in _modules(model, family).items():
        ours = {rows.parameter.removesuffix(".weight") for rows in held}
        if not any(f"{name}.{A}" in own for name in ours):
            continue
        if len(ours) > 1:
            raise UsageError(f"{theirs} joins the layers {', '.join(sorted(ours))}: merge instead")
        a, b = (own[f"{min(ours)}.{part}"].detach() for part in (A, B))
        ranks.add(len(a))
        pieces = [b[rows.ours] for rows in sorted(held, key=lambda rows: rows.theirs.start)]
        written[f"{PREFIX}{theirs}.lora_A.weight"] = a.clone()
        written[f"{PREFIX}{theirs}.lora_B.weight"] = torch.cat(pieces)
    rank = max(ranks)
    for name, tensor in written.items():  # layers of a smaller rank get rows and columns of 0
        side = 0 if ".lora_A." in name else 1
        pad = [0, 0, 0, rank - len(tensor)] if side == 0 else [0, rank - tensor.shape[1]]
        written[name] = torch.nn.functional.pad(tensor, pad)
    targets = sorted({n.removeprefix(PREFIX).rpartition(".lora_")[0] for n in written})
    settings: dict[str, Any] = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": rank,
        "lora_alpha": config.scale * rank,
        "lora_dropout": config.dropout,
        "target_modules": targets,
        "fan_in_fan_out": any(h[0].part.turn for h in _modules(model, family).values()),
        "bias": "none",
        "use_rslora": False,
        "inference_mode": True,
    }
    with new_folder(out) as work:
        (work / CONFIG).write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
        tensors.write(work / WEIGHTS, written, metadata={"format": "pt"})


def load_peft(
    folder: Path, model: GPT, *, family: str = "auto"
) -> tuple[AdapterConfig, dict[str, Tensor]]:
    """The settings and the weights of PEFT's LoRA in ``folder``, for ``model``
    (:func:`gpt.model.adapter.adapt`).

    ``UsageError`` for settings that are not supported, and for layers that the model lacks.
    """
    settings = read_object(folder / CONFIG, "the adapter's settings")
    for name, usual in {"peft_type": "LORA", **SUPPORTED}.items():
        value = settings.get(name, usual)
        if value != usual and value not in (None, []):
            raise UsageError(
                f"{foreign(folder / CONFIG)} has {name} {quoted(value)}, and must have {usual!r}"
            )
    begun = settings.get("init_lora_weights")
    if isinstance(begun, str) and begun.lower().startswith(OTHER_BASE):
        raise UsageError(
            f"{foreign(folder / CONFIG)} has init_lora_weights {quoted(begun)}, which changes the "
            "model under the adapter; convert it to plain LoRA with PEFT first"
        )
    rank, alpha, dropout = (
        _number(settings, n, folder) for n in ("r", "lora_alpha", "lora_dropout")
    )
    found = tensors.load(folder / WEIGHTS)
    modules = _modules(model, family)
    pairs: dict[str, list[tuple[list[Rows], Tensor, Tensor]]] = {}
    for name in [n for n in found if n.endswith(".lora_A.weight")]:
        theirs = name.removeprefix(PREFIX).removesuffix(".lora_A.weight")
        a, b = found.pop(name), found.pop(name.replace(".lora_A.", ".lora_B."), None)
        held = modules.get(theirs)
        if held is None or b is None or len({rows.parameter for rows in held}) != 1:
            raise UsageError(f"{foreign(folder)} adapts {foreign(theirs)}, which the model lacks")
        is_pair = a.ndim == b.ndim == 2 and len(a) == b.shape[1] == rank
        if not (is_pair and a.isfinite().all() and b.isfinite().all()):
            raise UsageError(
                f"{foreign(folder)} has {[*b.shape]} x {[*a.shape]} for {foreign(theirs)}, and "
                f"must have finite matrices of rank {rank:g}"
            )
        pairs.setdefault(held[0].parameter.removesuffix(".weight"), []).append((held, a, b))
    if found or not pairs:
        odd = min(found, default="nothing")
        raise UsageError(f"{foreign(folder)} has {foreign(odd)}, and must have pairs of LoRA alone")
    weights: dict[str, Tensor] = {}
    for layer, adapted in pairs.items():
        rows, columns = model.get_parameter(f"{layer}.weight").shape
        together = torch.zeros(rows, sum(len(a) for _, a, _ in adapted))
        start = 0
        for held, a, b in adapted:
            end = start + len(a)
            needs = max(part.theirs.stop for part in held)
            if a.shape[1] != columns or b.shape != (needs, len(a)):
                raise UsageError(
                    f"{foreign(folder)} has {[*b.shape]} x {[*a.shape]} for {layer}, whose weight "
                    f"is {[rows, columns]}"
                )
            for part in held:
                together[part.ours, start:end] = b[part.theirs].float()
            start = end
        weights[f"{layer}.{A}"] = torch.cat([a.float() for _, a, _ in adapted])
        weights[f"{layer}.{B}"] = together
    config = AdapterConfig(
        kind="lora",
        rank=int(rank),
        alpha=alpha,
        dropout=dropout,
        targets=tuple(pairs),
        rank_stabilised=bool(settings.get("use_rslora")),
    )
    return config, weights


def _number(settings: dict[str, Any], name: str, folder: Path) -> float:
    """A number among PEFT's settings, of which the dropout may be absent."""
    value = settings.get(name)
    if value is None and name == "lora_dropout":
        return 0.0
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise UsageError(
            f"{foreign(folder / CONFIG)} has {name} {quoted(value)}, and must have a number"
        )
    return float(value)
