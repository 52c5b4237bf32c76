"""The task of a run that learns from preferences (:mod:`gpt.training.dpo`).

A record has a prompt, a chosen and a rejected text. The start model's log-probabilities are
computed once, with the model itself before the first step, and are stored in the run's folder:
there is never a second copy of the weights. With ``objective.chosen_weight``, the cross-entropy of
the chosen text is added to the loss (Pang et al., 2024, arXiv:2404.19733).
"""

import hashlib
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gpt import tensors
from gpt.config import GenerationConfig, TrainConfig, UsageError, foreign
from gpt.data import tokenizer as tokenizers
from gpt.data.batches import IGNORED, spread
from gpt.data.completions import Completed, encode_completion, encode_prompt_of, padded
from gpt.data.prompts import Records, RecordSet
from gpt.data.records import Record
from gpt.model.gpt import GPT
from gpt.training.dpo import Pairs, dpo_loss
from gpt.training.loop import Data, Shown, Trainer
from gpt.training.parallel import World
from gpt.training.records import RecordOrder, StartLogits, StartModel, Write, summed_logprobs
from gpt.training.source import Forward
from gpt.training.task import Evaluation, Figures, text_logprobs

FIELDS = ("chosen", "rejected")
"""Of a record, besides its prompt."""


class Preferences:
    """The task of a run with ``objective.kind`` dpo."""

    def __init__(
        self, config: TrainConfig, data: Records, *, start: StartModel, write: Write | None = None
    ) -> None:
        """``write`` shows a text with each evaluation. ``UsageError`` for a prompt that fills the
        context. Texts that do not fit behind their prompt are cut at their end.
        """
        self.config, self.data, self._start, self._write = config, data, start, write
        self.cut = self.equal = 0
        """Texts that were cut, and records that were left out: both texts are equal."""
        self.train = self._encoded(data.train)
        self.validation = self._encoded(data.validation)
        if not self.train or not self.validation:
            raise UsageError(
                f"the chosen and rejected texts of {foreign(config.data.source)} are all equal"
            )
        objective = config.objective
        self.sequences = 2 * objective.records
        self.order = RecordOrder(
            len(self.train), records=objective.records, seed=config.training.seed
        )
        self.figures = Figures()
        self._reference: tuple[Tensor, Tensor] | None = None  # [N, 2]: training, held out

    def _encoded(self, records: RecordSet) -> list[tuple[Completed, Completed]]:
        pairs, length = [], self.config.model.context_length
        for item in records.items:
            if item["chosen"] == item["rejected"]:
                self.equal += 1
                continue
            prompt = encode_prompt_of(
                self.data.tokenizer, item["prompt"], context_length=length, what=_named(item)
            )
            both = [self._completed(prompt, item[name], item) for name in FIELDS]
            pairs.append((both[0], both[1]))
        return pairs

    def _completed(self, prompt: list[int], text: str, item: Record) -> Completed:
        ids = encode_completion(self.data.tokenizer, text, what=_named(item))
        room = self.config.model.context_length + 1 - len(prompt)
        self.cut += len(ids) > room
        return Completed(prompt, ids[:room])

    def attach(self, trainer: Trainer) -> None:
        """As in :class:`gpt.training.task.Task`."""
        self.order.check(trainer.world)
        self.trainer = trainer

    def reference(self) -> tuple[Tensor, Tensor]:
        """The start model's log-probabilities of the training and the held-out pairs, ``[N, 2]``.

        Before the first step, the model computes them. A resumed run reads them from its folder;
        without the file, the start model computes them again (:class:`StartLogits`).
        """
        if self._reference is None:
            trainer, path = self.trainer, self._path()
            file = path.with_name(f"{path.name}.safetensors")
            there = trainer.step > 0 and trainer.world.broadcast(file.exists)
            self._reference = self._read(path) if there else self._compute(trainer)
            if trainer.world.is_main and not there:
                path.parent.mkdir(parents=True, exist_ok=True)
                tensors.write(path, dict(zip(("train", "held_out"), self._reference, strict=True)))
        return self._reference

    def _path(self) -> Path:
        key = hashlib.sha256(self.data.train.corpus)
        key.update(tokenizers.fingerprint(self.data.tokenizer))
        key.update(
            f"{self.config.init} {self.config.model.context_length} "
            f"{len(self.train)} {len(self.validation)}".encode()
        )
        return self.config.run / f"reference-{key.hexdigest()[:12]}"

    def _read(self, path: Path) -> tuple[Tensor, Tensor]:
        found = {
            "train": torch.empty(len(self.train), 2, dtype=torch.float64),
            "held_out": torch.empty(len(self.validation), 2, dtype=torch.float64),
        }
        tensors.read(path, found)
        return found["train"], found["held_out"]

    def _compute(self, trainer: Trainer) -> tuple[Tensor, Tensor]:
        forward = trainer.logits if trainer.step == 0 else StartLogits(trainer, self._start)
        every = [text for pair in (*self.train, *self.validation) for text in pair]
        found = summed_logprobs(trainer, every, forward).view(-1, 2)
        return found[: len(self.train)], found[len(self.train) :]

    def batch(self, step: int, world: World) -> Pairs:
        """As in :class:`gpt.training.source.Source`."""
        chosen = world.split(self.order.step(step)).tolist()
        texts = padded([text for i in chosen for text in self.train[i]])
        return Pairs(texts, self.reference()[0][chosen].float())

    def prepare(self, step: int, world: World) -> None:
        """As in :class:`gpt.training.source.Source`: a no-op, because a batch is quickly made."""

    def origin(self, step: int) -> list[int]:
        """As in :class:`gpt.training.source.Source`: the numbers of the records."""
        records: list[int] = self.order.step(step).tolist()
        return records

    def objective(self, forward: Forward, batch: Pairs) -> Tensor:
        """The loss of the pairs, summed."""
        texts = batch.texts
        policy = text_logprobs(forward, texts).sum(1).view(-1, 2)
        lengths = (texts.targets != IGNORED).sum(1).view(-1, 2)
        losses, rewards = self._loss(policy, batch.reference, lengths)
        self.figures.add(**_figures(rewards))
        self.figures.add(tokens=batch.n_tokens())
        return losses.sum()

    def _loss(self, policy: Tensor, reference: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """The losses and rewards of :func:`dpo_loss`, with the weight of the chosen texts, whose
        ``lengths`` ``[P, 2]`` are in tokens.
        """
        objective = self.config.objective
        losses, rewards = dpo_loss(
            policy, reference, beta=objective.beta, label_smoothing=objective.label_smoothing
        )
        if objective.chosen_weight:
            losses = losses - objective.chosen_weight * policy[:, 0] / lengths[:, 0]
        return losses, rewards

    def evaluate(self) -> Evaluation:
        """The loss, the margin and the accuracy on held-out pairs, and a text after the first
        prompt.
        """
        trainer, config = self.trainer, self.config
        chosen = spread(config.evaluation.windows, len(self.validation)).tolist()
        rows = [text for i in chosen for text in self.validation[i]]
        reference = self.reference()[1][chosen]
        policy = summed_logprobs(trainer, rows, trainer.logits).view(-1, 2)
        lengths = torch.tensor([len(row.completion) for row in rows]).view(-1, 2)
        losses, rewards = self._loss(policy, reference, lengths)
        figures = {name: number.mean().item() for name, number in _figures(rewards).items()}
        sample = ""
        if self._write is not None and config.evaluation.sample_tokens:
            sample = trainer.sample(self._sample).text
        return Evaluation(losses.mean().item(), figures, sample)

    def _sample(self, model: GPT, data: Data) -> Shown:
        assert self._write is not None
        first = self.data.validation.items[0]["prompt"]
        settings = GenerationConfig(
            max_new_tokens=self.config.evaluation.sample_tokens, seed=0, past_context="stop"
        )
        prompt = self.validation[0][0].prompt
        [(_, text)] = self._write(
            model, data.tokenizer, [prompt], [0], settings, self.trainer.dtype
        )
        return Shown(f"{first}{text}")

    def progress(self, step: int) -> dict[str, Any]:
        """As in :class:`gpt.training.source.Source`: the epoch."""
        return {"epoch": step * self.config.objective.records / len(self.train)}

    def describe(self) -> list[str]:
        """As in :class:`gpt.training.task.Task`."""
        records = self.config.objective.records
        left = f", {self.equal:,} with equal texts left out" if self.equal else ""
        cut = f", {self.cut:,} texts cut at their end to fit the context" if self.cut else ""
        return [
            f"text     {self.config.data.source}: {len(self.train):,} training and "
            f"{len(self.validation):,} held-out pairs{left}{cut}",
            f"training {self.config.training.max_steps:,} steps of {records:,} pairs, "
            f"{self.config.training.max_steps * records / len(self.train):.2f} epochs",
        ]

    def state(self) -> dict[str, Any]:
        """As in :class:`gpt.training.task.Task`: nothing."""
        return {}

    def restore(self, state: dict[str, Any]) -> None:
        """As in :class:`gpt.training.task.Task`."""


def _figures(rewards: Tensor) -> dict[str, Tensor]:
    """What is logged of the rewards ``[P, 2]``."""
    margins = rewards[:, 0] - rewards[:, 1]
    accuracy = (margins > 0).float()
    names = ("chosen_reward", "rejected_reward", "margin", "accuracy")
    return dict(zip(names, (*rewards.T, margins, accuracy), strict=True))


def _named(item: Record) -> str:
    return f"the record of the prompt {foreign(repr(item['prompt'][:40]))}"
