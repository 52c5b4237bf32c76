"""A training step without data: the run's own model, loss and optimizers on random tokens.

``gpt plan`` counts its memory and measures its time.
"""

import dataclasses

import torch
from torch import Tensor

from gpt.config import TrainConfig
from gpt.data.batches import Batch
from gpt.model.adapter import adapt, freeze
from gpt.model.gpt import GPT, Read
from gpt.model.moe import auxiliary_loss
from gpt.training.activations import checkpoint_activations
from gpt.training.optimizer import clip_gradients, gradient_norm, make_optimizers
from gpt.training.precision import autocast
from gpt.training.source import next_token
from gpt.training.state import learned, saved_weights


class Rehearsal:
    """The parts of a step, for a model with ``n_layer`` layers."""

    def __init__(
        self,
        config: TrainConfig,
        *,
        n_layer: int,
        device: torch.device,
        dtype: torch.dtype,
        fast: torch.dtype,
    ) -> None:
        """``dtype`` is that of the forward pass, ``fast`` the one that the device multiplies
        fastest.
        """
        self.config, self.device, self.dtype = config, device, dtype
        with torch.device(device):
            self.model = GPT(dataclasses.replace(config.model, n_layer=n_layer))
        if config.adapter.kind != "none":
            adapt(self.model, config.adapter)
        freeze(self.model, config.training.freeze)
        self.model.train()
        checkpoint_activations(self.model, config.training.activation_checkpointing)
        self.optimizers = make_optimizers(self.model, config.optimizer, fast=fast)

    def forward(self, rows: int, *, head: bool = True) -> Tensor:
        """The loss of ``rows`` sequences; without the ``head``, a number that is computed from the
        features alone.
        """
        shape = rows, self.config.model.context_length
        tokens = torch.randint(self.config.model.vocab_size, shape, device=self.device)
        if not head:
            return self.logits(tokens, read=lambda model, features: features.float().mean())
        loss = next_token(self.logits, Batch(tokens, tokens)) / tokens.numel()
        spread = auxiliary_loss(self.model)
        return loss if spread is None else loss + spread

    def logits(
        self, tokens: Tensor, documents: Tensor | None = None, read: Read | None = None
    ) -> Tensor:
        """The model's logits in the run's precision, or what ``read`` makes of its features."""
        with autocast(self.device, self.dtype):
            out: Tensor = self.model(tokens, documents=documents, read=read)
        return out

    def update(self) -> None:
        """Change the weights by the gradients, and delete these."""
        norm = gradient_norm(self.model)
        clip_gradients(self.model, self.config.training.gradient_clip, norm)
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

    def copied(self, *, checkpoint: bool) -> list[Tensor]:
        """What a run copies beside its steps: the weights, if it averages them, and with
        ``checkpoint`` all that a checkpoint stores.
        """
        weights = saved_weights(self.model)
        on = self.config.training.average_fraction > 0
        averaged = [p.detach() for p in weights.values() if on and p.requires_grad]
        if not checkpoint:
            return averaged
        stored = [p.detach() for p in weights.values()]
        return [*averaged, *averaged, *stored, *learned(self.model, self.optimizers).values()]
