"""The average of the weights over the last steps of a run: often better than the last weights
(stochastic weight averaging, arXiv:1803.05407; LAWA, arXiv:2209.14981).

Training continues from the weights themselves. Evaluations and checkpoints have the average.
"""

import contextlib
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn

from gpt.config import TrainingConfig

RAW = "raw"
"""The name under which a checkpoint has a parameter's weights, beside its average in the model."""


def is_averaged(step: int, config: TrainingConfig) -> bool:
    """Whether the weights after ``step`` updates are taken into the average."""
    return step > round(config.max_steps * (1 - config.average_fraction))


class Average:
    """The average of parameters, which are given by name. At first it is the mean of all weights
    that were taken in, then the newer ones count more.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter]) -> None:
        self._parameters = {name: p for name, p in parameters.items() if p.requires_grad}
        self.values: dict[str, Tensor] = {}
        """By name; empty before the first step of the average."""
        self.count = 0
        """How many weights were taken in."""

    @torch.no_grad()
    def update(self, step: int, config: TrainingConfig) -> None:
        """Take the weights in after ``step`` updates. Before the first step of the average there is
        none, also if a shorter run had one.
        """
        if not is_averaged(step, config):
            self.values, self.count = {}, 0
            return
        self.count += 1
        if self.count == 1:
            self.values = {name: p.detach().clone() for name, p in self._parameters.items()}
        by = max(1 / self.count, 1 - config.average_decay)
        for name, parameter in self._parameters.items():
            self.values[name].lerp_(parameter, by)

    @contextlib.contextmanager
    def applied(self) -> Iterator[None]:
        """A context in which the model has the average, if there is one."""
        raw = {name: self._parameters[name].detach().clone() for name in self.values}
        self._fill(self.values)
        try:
            yield
        finally:
            self._fill(raw)

    def weights(self, all_weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """What a checkpoint has as the model: the average where there is one."""
        return {**all_weights, **self.values}

    def state(self) -> dict[str, Tensor]:
        """What a checkpoint stores beside the model: the weights that training continues from."""
        return {f"{name}/{RAW}": self._parameters[name].detach() for name in self.values}

    def restore(
        self, raw: Mapping[str, Tensor], count: int | None, step: int, config: TrainingConfig
    ) -> None:
        """Continue after :meth:`state` at ``step``. The parameters have the average of ``count``
        weights, and ``raw`` the weights, by the parameters' names; empty if there was no average.
        Without a ``count`` (older checkpoints) every step since the first one was taken in.
        """
        if raw and is_averaged(step, config):
            first = round(config.max_steps * (1 - config.average_fraction))
            self.count = step - first if count is None else count
            self.values = {name: self._parameters[name].detach().clone() for name in raw}
        self._fill(raw)

    @torch.no_grad()
    def _fill(self, values: Mapping[str, Tensor]) -> None:
        for name, value in values.items():
            self._parameters[name].copy_(value)
