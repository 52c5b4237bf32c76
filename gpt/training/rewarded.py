"""The task of a run that raises a reward: the model writes texts, and learns from their rewards.

The texts of a step depend on the weights, the seed and the step. Each process writes those of its
own prompts; then all know all of them. With several updates for each batch of texts, a checkpoint
between two of them stores the texts.
"""

import json
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gpt.config import GenerationConfig, TrainConfig, unescaped
from gpt.data.batches import IGNORED, spread
from gpt.data.completions import Completed, encode_prompt_of, padded
from gpt.data.prompts import Records, RecordSet
from gpt.training.compilation import uncompiled
from gpt.training.loop import Trainer
from gpt.training.metrics import drop_later_records
from gpt.training.parallel import World
from gpt.training.policy import advantages, kl_estimate, policy_loss
from gpt.training.records import RecordOrder, StartLogits, StartModel, Write, logprobs_of_rows
from gpt.training.rewards import references, reward_of
from gpt.training.scored import Round, Scored, gathered, spread_out
from gpt.training.source import Forward
from gpt.training.task import Evaluation, Figures, text_logprobs

HELD_OUT_SEED = 0
"""Of the texts in evaluations: they differ only by what the model has learned."""
SHOWN = 40
"""Characters of a prompt that a message shows."""


class Rewarded:
    """The task of a run with ``objective.kind`` reward."""

    def __init__(
        self, config: TrainConfig, data: Records, *, start: StartModel, write: Write
    ) -> None:
        """``UsageError`` for a reward that does not exist, and a prompt that fills the context."""
        self.config, self.data, self._start, self._write = config, data, start, write
        self.settings = objective = config.objective
        self.reward = reward_of(objective)
        if objective.reward == "bleu":
            for record in (*data.train.items, *data.validation.items):
                references(record)  # before the first step
        self.train, self.validation = map(self._encoded, (data.train, data.validation))
        self.sequences = objective.records * objective.samples
        self.order = RecordOrder(
            len(self.train), records=objective.records, seed=config.training.seed
        )
        self.figures = Figures()
        self._round: Round | None = None
        self._batch: Scored | None = None  # of this process, from the round
        self._opened = False

    def _encoded(self, records: RecordSet) -> list[list[int]]:
        length = self.config.model.context_length
        return [
            encode_prompt_of(
                self.data.tokenizer,
                item["prompt"],
                context_length=length,
                what=f"the prompt {item['prompt'][:SHOWN]!r}",
            )
            for item in records.items
        ]

    def attach(self, trainer: Trainer) -> None:
        """As in :class:`gpt.training.task.Task`."""
        self.order.check(trainer.world)
        self.trainer = trainer
        self.start_logits = StartLogits(trainer, self._start)

    def batch(self, step: int, world: World) -> Scored:
        """As in :class:`gpt.training.source.Source`. Every ``updates`` steps, the model writes new
        texts.
        """
        first = step - step % self.settings.updates
        if self._round is None or self._round.step != first:
            self._round, self._batch = self._written(first, world), None
            self._count(self._round, world)
            if world.is_main:
                self._append(self._round)
        if self._batch is None:
            self._batch = self._of_this_process(self._round, world)
        return self._batch

    def prepare(self, step: int, world: World) -> None:
        """As in :class:`gpt.training.source.Source`: a no-op, because texts need the weights."""

    def origin(self, step: int) -> list[int]:
        """As in :class:`gpt.training.source.Source`: the numbers of the records."""
        records: list[int] = self.order.step(step // self.settings.updates).tolist()
        return records

    def _written(self, step: int, world: World) -> Round:
        """Write the texts of ``step``, those of this process's prompts, and gather them all."""
        k, chosen = self.settings.samples, np.array(self.origin(step))
        places = world.split(np.arange(len(chosen) * k))
        records = [int(chosen[place // k]) for place in places]
        rows = [self.train[i] for i in records]
        draws = np.random.SeedSequence((self.config.training.seed, step))
        seed = int(draws.generate_state(1, np.uint64)[0] >> np.uint64(1))
        written = self.write(rows, [int(place) for place in places], seed)
        rewards = []
        for i, (_, text) in zip(records, written, strict=True):
            item = self.data.train.items[i]
            rewards.append(self.reward(item["prompt"], text, item))
        old: list[list[float]] = []
        if self._needs_old:
            completed = [Completed(row, ids) for row, (ids, _) in zip(rows, written, strict=True)]
            old = self._rows_of(completed, self.trainer.logits)
        tokens = gathered([ids for ids, _ in written], world, torch.int64)
        return Round(
            step,
            [[int(i) for i in ids] for ids in tokens],
            [number for [number] in gathered([[r] for r in rewards], world, torch.float64)],
            gathered(old, world, torch.float32) if old else [],
        )

    def write(
        self, rows: Sequence[list[int]], samples: Sequence[int], seed: int
    ) -> Sequence[tuple[list[int], str]]:
        """A text of the model behind each prompt, and its tokens."""
        objective = self.settings
        generation = GenerationConfig(
            temperature=objective.temperature,
            max_new_tokens=objective.max_new_tokens,
            stop=tuple(map(unescaped, objective.stop)),
            seed=seed,
            past_context="stop",
        )
        model = self.trainer.whole_model()
        with uncompiled():  # else each length would be compiled
            return self._write(
                model, self.data.tokenizer, rows, samples, generation, self.trainer.dtype
            )

    @property
    def _needs_old(self) -> bool:
        objective = self.settings
        return objective.updates > 1 or (objective.kl > 0 and objective.kl_in == "reward")

    def _of_this_process(self, made: Round, world: World) -> Scored:
        """The batch of this process's texts."""
        objective, k = self.settings, self.settings.samples
        chosen = self.origin(made.step)
        places = world.split(np.arange(len(made.tokens))).tolist()
        rows = [Completed(self.train[chosen[p // k]], made.tokens[p]) for p in places]
        texts = padded(rows)
        counted = texts.targets != IGNORED
        rewards = torch.tensor([made.rewards[p] for p in places], dtype=torch.float64)
        old = spread_out([made.old[p] for p in places], counted) if made.old else None
        reference = None
        if objective.kl:
            reference = spread_out(self._rows_of(rows, self.start_logits), counted)
            if objective.kl_in == "reward":
                assert old is not None
                rewards = rewards - objective.kl * (old - reference).sum(1).double()
        gains = advantages(rewards.view(-1, k), objective.baseline).flatten().float()
        return Scored(texts, gains, old if objective.updates > 1 else None, reference)

    def _count(self, made: Round, world: World) -> None:
        """Log the texts of this process."""
        places = world.split(np.arange(len(made.tokens))).tolist()
        lengths = [len(made.tokens[p]) for p in places]
        self.figures.add(
            reward=torch.tensor([made.rewards[p] for p in places], dtype=torch.float64),
            length=torch.tensor(lengths),
        )

    def _rows_of(self, rows: Sequence[Completed], forward: Forward) -> list[list[float]]:
        return logprobs_of_rows(
            self.trainer,
            rows,
            forward,
            temperature=self.settings.temperature,
            vocab_size=self.data.tokenizer.vocab_size,
        )

    def objective(self, forward: Forward, batch: Scored) -> Tensor:
        """The loss of the texts, summed."""
        objective, targets = self.settings, batch.texts.targets
        counted = targets != IGNORED
        logprobs = text_logprobs(
            forward,
            batch.texts,
            temperature=objective.temperature,
            vocab_size=self.data.tokenizer.vocab_size,
        )
        here = logprobs.detach()
        self.figures.add(entropy=-here[counted], tokens=counted.sum())
        if batch.reference is not None:
            self.figures.add(kl=kl_estimate(here, batch.reference)[counted])
        return policy_loss(
            logprobs,
            counted,
            batch.advantages,
            old=batch.old,
            reference=batch.reference,
            clip=objective.clip,
            kl=objective.kl if objective.kl_in == "loss" else 0.0,
            by_length=objective.by_length,
        ).sum()

    def evaluate(self) -> Evaluation:
        """The mean reward of a text for each held-out prompt, and the first text. The loss is the
        negative reward.
        """
        world, items = self.trainer.world, self.data.validation.items
        chosen = spread(self.config.evaluation.windows, len(items)).tolist()
        mine = list(range(world.rank, len(chosen), world.size))
        written = self.write([self.validation[chosen[i]] for i in mine], mine, HELD_OUT_SEED)
        rewards = torch.zeros(len(chosen), dtype=torch.float64)
        for i, (_, text) in zip(mine, written, strict=True):
            item = items[chosen[i]]
            rewards[i] = self.reward(item["prompt"], text, item)
        reward = world.sum(rewards).mean().item()
        sample = f"{items[chosen[0]]['prompt']}{written[0][1]}" if world.is_main else ""
        return Evaluation(-reward, {"reward": reward}, sample)

    def _append(self, made: Round) -> None:
        """Add the texts of a round to ``samples.jsonl``. Later ones, which a killed process left
        there, are deleted first.
        """
        path = self.config.run / "samples.jsonl"
        if not self._opened:
            path.parent.mkdir(parents=True, exist_ok=True)
            drop_later_records(path, self.trainer.step)
            self._opened = True
        chosen, k = self.origin(made.step), self.settings.samples
        with path.open("a", encoding="utf-8") as file:
            for place, (ids, reward) in enumerate(zip(made.tokens, made.rewards, strict=True)):
                item = self.data.train.items[chosen[place // k]]
                text = self.data.tokenizer.decode_bytes(ids).decode(errors="replace")
                line = {
                    "step": made.step + 1,
                    "prompt": item["prompt"],
                    "text": text,
                    "reward": reward,
                    "tokens": len(ids),
                }
                file.write(json.dumps(line) + "\n")

    def progress(self, step: int) -> dict[str, Any]:
        """As in :class:`gpt.training.source.Source`: the epoch."""
        return {"epoch": step // self.settings.updates * self.settings.records / len(self.train)}

    def describe(self) -> list[str]:
        """As in :class:`gpt.training.task.Task`."""
        objective, steps = self.settings, self.config.training.max_steps
        rounds = -(-steps // objective.updates)
        again = f", each for {objective.updates} steps" if objective.updates > 1 else ""
        return [
            f"text     {self.config.data.source}: {len(self.train):,} training and "
            f"{len(self.validation):,} held-out prompts",
            f"training {steps:,} steps of {objective.records:,} x {objective.samples:,} texts"
            f"{again}, {rounds * objective.records / len(self.train):.2f} epochs",
            f"reward   {objective.reward}, baseline {objective.baseline}",
        ]

    def state(self) -> dict[str, Any]:
        """The texts of this round, if the next step learns from them too."""
        made = self._round
        if made is None or self.trainer.step % self.settings.updates == 0:
            return {}
        return {"round": [made.step, made.tokens, made.rewards, made.old]}

    def restore(self, state: dict[str, Any]) -> None:
        """As in :class:`gpt.training.task.Task`."""
        self._round, self._batch = (Round(*state["round"]) if state else None), None
