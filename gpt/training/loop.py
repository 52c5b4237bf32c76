"""The training loop.

:meth:`Trainer.run` is the loop, and :meth:`Trainer.update` is one step. A step depends only on the
weights, the optimizers' state, the loss scale, and the step's number.
"""

import contextlib
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributed.fsdp import FSDPModule

from gpt import checkpoint as checkpoints
from gpt import training_kernels
from gpt.checkpoint import Checkpoint, State
from gpt.config import TrainConfig, UsageError
from gpt.data import tokenizer as tokenizers
from gpt.data.instructions import Instructions
from gpt.data.mixture import Mixture
from gpt.data.prepared import Prepared
from gpt.data.prompts import Records
from gpt.device import choose_device, choose_precision, peak_flops
from gpt.model.adapter import fingerprint
from gpt.model.gpt import GPT, Read, parameter_count
from gpt.model.moe import auxiliary_loss
from gpt.training import build, experts, nonfinite, setup, state
from gpt.training.averaging import Average
from gpt.training.compilation import uncompiled
from gpt.training.distillation import Distillation
from gpt.training.interrupt import Interrupt
from gpt.training.metrics import Reporter, Silent
from gpt.training.optimizer import (
    clip_gradients,
    gradient_norm,
    make_optimizers,
    set_learning_rate,
)
from gpt.training.parallel import Strategy, World, choose_strategy, only_here
from gpt.training.precision import autocast, common_precision, loss_scaler
from gpt.training.saving import Saver
from gpt.training.schedule import learning_rate_factor, window_limit
from gpt.training.scheduled import ScheduledSampling, scheduled
from gpt.training.source import Learnable, Objective, ShuffledWindows, Source, next_token
from gpt.training.stopwatch import Forecast, Stopwatch, Trace
from gpt.training.task import Evaluation, Task
from gpt.training.validation import score_all


class Shown(NamedTuple):
    """What the model writes for an evaluation."""

    text: str
    figures: Mapping[str, float] = MappingProxyType({})
    """Further figures for the evaluation's record."""


Data = Prepared | Instructions | Mixture | Records
Sample = Callable[[GPT, Data], Shown]
"""Writes what is shown with an evaluation."""


@dataclass(frozen=True)
class Result:
    """The state of a run at its end."""

    step: int
    best_loss: float
    signal: int | None
    """The number of the signal that stopped the run, if one did."""


class Gradients(NamedTuple):
    """The results of a step's backward passes, besides the parameters' ``grad``."""

    loss: float
    """The mean over the step's targets, in nats per token."""
    norm: float
    """The norm of all gradients together, before clipping."""
    norm_on_device: Tensor


class Trainer:
    """A model in training, with everything that a step needs."""

    def __init__(
        self,
        config: TrainConfig,
        data: Data,
        *,
        world: World | None = None,
        source: Source | None = None,
        objective: Objective = next_token,
        task: Task | None = None,
        model: GPT | None = None,
        base: Mapping[str, Any] | None = None,
        teachers: Sequence[GPT] = (),
    ) -> None:
        """Build a run at step 0. ``source`` gives the batches (default: ``data``'s windows in a new
        order each epoch) and ``objective`` their loss; a ``task`` has both, and an evaluation. The
        weights are those of ``model``, or new; with ``teachers`` it learns what they predict.
        ``base`` describes the model under an adapter; each checkpoint records it.
        """
        torch.manual_seed(config.training.seed)
        self.config, self.data, self.world = config, data, world or World()
        self.device = choose_device(config.training.device)
        # The machines may differ, but all must compute in the same dtype.
        fast = common_precision(choose_precision("auto", self.device), self.world)
        auto = config.training.precision == "auto"
        self.dtype = fast if auto else choose_precision(config.training.precision, self.device)
        self.autocast = autocast(self.device, self.dtype)
        self.scaler = loss_scaler(self.device, self.dtype)
        torch.set_float32_matmul_precision("high" if config.training.tf32 else "highest")

        self.base = dict(base or {})
        self.task, self.objective = task, objective
        self.source: Source
        if task is not None:
            self.source, self.objective = task, task.objective
        else:
            assert not isinstance(data, Records), "records need a task"
            self.source = source or self._windows(data)
            self.validation = data.windows("validation", config.model.context_length)
            if config.training.scheduled_sampling and objective is next_token:
                self.source = ScheduledSampling(self.source, config.training)
                self.objective = scheduled
        if config.objective.distill and not teachers:
            raise ValueError("objective.distill is set, and the teachers are not given")
        self._teachers = [fingerprint(teacher) for teacher in teachers]
        if teachers:
            self.objective = Distillation(teachers, config.objective, device=self.device)
        self.byte_lengths = tokenizers.byte_lengths(data.tokenizer)
        self._tokenizer = tokenizers.fingerprint(data.tokenizer).hex()
        self.strategy: Strategy = self.world.broadcast(self.choose_strategy)
        self.saves_shards = self.world.broadcast(
            lambda: build.saves_shards(config.checkpoint, config.model, self.strategy)
        )
        self.notes: list[str] = []
        """Choices made here that the user should know."""
        if self.device.type == "cpu" and (problem := training_kernels.problem()):
            self.notes.append(f"{problem}; torch's operators run instead, which is slower")
        if config.checkpoint.format == "sharded" and not self.saves_shards:
            self.notes.append(
                "checkpoint.format is sharded, which only fsdp supports; this run writes full "
                "checkpoints"
            )
        self.model, self.forward = build.build_model(
            model or config.model,
            config.training,
            config.parallel,
            self.world,
            self.strategy,
            device=self.device,
            dtype=self.dtype,
            say=self.notes.append,
            adapter=config.adapter,
        )
        self.optimizers = make_optimizers(self.model, config.optimizer, fast=fast)
        self.average = Average(state.saved_weights(self.model))
        self.stopwatch = Stopwatch(self.device)
        self.stalls: list[float] = []
        """Seconds for which each checkpoint stopped the run."""
        self.reporter: Reporter | Silent = Silent()
        self.step, self.best_loss = 0, math.inf
        self.best: str | None = None
        """The name of the checkpoint with the lowest validation loss."""
        self.least_loss = math.inf
        """The lowest validation loss so far, including the one before training."""
        self.stale = 0
        """Evaluations since the one of the best checkpoint."""
        self.losses: list[float] = []
        """The losses of the steps since the last record."""
        self.skipped = 0
        """Updates that were skipped because their loss or gradient was not finite."""
        self.expert_load: Tensor | None = None
        """In the last step, the busiest expert's share of the tokens over an equal share."""
        self.overflows = 0
        """Updates that were skipped because float16's loss scale was too high."""

        if task is not None:
            task.attach(self)

    def _windows(self, data: Prepared | Instructions | Mixture) -> ShuffledWindows:
        config = self.config
        sequences = setup.sequences_a_step(
            config.training.batch_tokens, config.model.context_length, self.world
        )
        return ShuffledWindows(
            data.windows("train", config.model.context_length),
            sequences=sequences,
            seed=config.training.seed,
            kind=config.data.order,
        )

    def resume(self, checkpoint: Checkpoint) -> list[str]:
        """Load the checkpoint's weights, optimizer state and progress, to continue after its step.

        Returns a sentence for each entry of :meth:`environment` that has changed, and one if the
        teachers have.
        """
        progress = state.restore(
            self.model,
            self.optimizers,
            self.scaler,
            self.average,
            checkpoint,
            self.config.training,
        )
        self.step, self.best, self.losses = checkpoint.step, progress["best"], progress["losses"]
        self.best_loss, self.least_loss = progress["best_loss"], progress["least_loss"]
        self.skipped, self.overflows = progress["skipped"], progress["overflows"]
        self.stale = progress["stale"]
        if self.task is not None and isinstance(told := progress.get("task"), dict):
            self.task.figures.restore(told["figures"])
            self.task.restore(told["state"])
        windows = progress["settings"].get("evaluation.windows")
        if windows not in (None, self.config.evaluation.windows):
            # Losses on other windows are not comparable with the new ones.
            self.best_loss = self.least_loss = math.inf
            self.stale = 0
        if self.best and not (checkpoint.path.parent / self.best).is_dir():
            # A later, better one replaced it, and is damaged now.
            self.best, self.best_loss = None, math.inf
        old = progress["place"]
        changed = [(name, old.get(name, now), now) for name, now in self.environment().items()]
        told = [f"{name} was {was} and is {now}" for name, was, now in changed if was != now]
        if self._teachers and progress.get("teachers", self._teachers) != self._teachers:
            told.append("the teachers have other weights than before")
        return told

    def choose_strategy(self) -> Strategy:
        """The way in which the processes divide the work."""
        n_parameters = parameter_count(self.config.model)
        return choose_strategy(
            self.config.parallel, self.world, n_parameters=n_parameters, device=self.device
        )

    def environment(self) -> dict[str, str | int]:
        """The results of ``auto`` settings and torchrun. A resumed run may have others."""
        return {
            "device": self.device.type,
            "precision": str(self.dtype).removeprefix("torch."),
            "processes": self.world.size,
            "strategy": self.strategy,
        }

    def run(self, reporter: Reporter | Silent, sample: Sample | None) -> Result:
        """Train to ``max_steps``, or to the first Ctrl-C."""
        config, last, started = self.config, self.config.training.max_steps, self.step
        saver = Saver(
            config.run,
            config.checkpoint,
            self.world,
            last=checkpoints.name_of(started) if started else None,
            sharded=self.saves_shards,
            flush=reporter.flush,
            say=reporter.say,
        )
        traced = config.log.profile if self.world.is_main else 0
        trace = Trace(config.run / "trace.json", traced, device=self.device)
        interrupt = Interrupt(patience=1.0 if self.world.size > 1 else 0.0)
        self.reporter = reporter
        stop, timed, seconds = 0, 0, 0.0
        with contextlib.closing(trace), interrupt, saver:
            begun = time.monotonic()
            if self.step == 0:  # a baseline, which also shows wrong settings early
                self.evaluate(sample)
            forecast = Forecast(
                steps=last - self.step,
                evaluations=math.ceil(last / config.evaluation.every)
                - self.step // config.evaluation.every,
                evaluation_seconds=time.monotonic() - begun if self.step == 0 else None,
            )
            while self.step < last and not stop and not self.is_finished_early():
                start = time.monotonic()
                loss, norm, _ = self.update()
                if math.isfinite(loss):
                    self.losses.append(loss)
                stop = self.world.largest(interrupt.signal or 0)
                took = time.monotonic() - start
                timed, seconds = timed + 1, seconds + took
                if told := forecast.add(took):
                    reporter.say(told)

                saver.check()
                if trace.step():
                    reporter.say(f"the trace of {traced} steps is {trace.path}")
                if self.step % config.log.every == 0 or self.step == last:
                    self.record(norm, seconds=seconds / timed, steps=timed)
                    timed, seconds = 0, 0.0
                if self.step % config.evaluation.every == 0 or self.step == last:
                    begun = time.monotonic()
                    self.save(saver, self.evaluate(sample))
                    forecast.evaluated(time.monotonic() - begun)
                elif stop or (config.checkpoint.every and self.step % config.checkpoint.every == 0):
                    self.save(saver)
        self.stalls = saver.stalls
        if self.is_finished_early():
            reporter.say(
                f"the run ends at step {self.step:,}: no new lowest validation loss in "
                f"{self.stale} evaluations (evaluation.patience)"
            )
        return Result(self.step, self.best_loss, (stop or None) if self.step < last else None)

    def is_finished_early(self) -> bool:
        """Whether ``evaluation.patience`` ends the run."""
        patience = self.config.evaluation.patience
        return 0 < patience <= self.stale and self.step < self.config.training.max_steps

    def update(self) -> Gradients:
        """Make one step."""
        gradients = self.gradients()
        self.apply(gradients)
        return gradients

    def gradients(self) -> Gradients:
        """Compute the next step's gradients, in the parameters' ``grad``."""
        config, world = self.config, self.world
        state.seed_step(config.training.seed, self.step, world.rank)
        factor = learning_rate_factor(
            self.step, max_steps=config.training.max_steps, config=config.optimizer
        )
        set_learning_rate(self.optimizers, factor)
        self.model.window_limit = window_limit(
            self.step, config.training, context_length=config.model.context_length
        )
        with self.stopwatch("data"):
            batch = self.source.batch(self.step, self.world)
            n_targets = int(world.sum(torch.tensor(batch.n_targets())))
        if n_targets == 0:
            raise UsageError(
                f"step {self.step + 1} has nothing to learn from: all targets in its windows "
                f"{nonfinite.some(self.source.origin(self.step))} are masked"
            )
        total = self.accumulate(batch, n_targets)
        if self.task is not None:
            self.task.figures.settle(self.world)
        with self.stopwatch("data"):  # while a GPU is busy
            self.source.prepare(self.step + 1, self.world)
        with self.stopwatch("optimizer"):
            for optimizer in self.optimizers:
                self.scaler.unscale_(optimizer)
            norm_here = gradient_norm(self.model)
            loss, norm = torch.stack(
                [total, norm_here]
            ).tolist()  # the only wait for a GPU in a step
        return Gradients(loss, norm, norm_here)

    def apply(self, gradients: Gradients) -> None:
        """Update the weights if the gradients are finite, and count the step."""
        loss, norm, norm_on_device = gradients
        with self.stopwatch("optimizer"):
            is_finite = math.isfinite(loss) and math.isfinite(norm)
            if is_finite:
                clip_gradients(self.model, self.config.training.gradient_clip, norm_on_device)
                for optimizer in self.optimizers:
                    self.scaler.step(optimizer)
            elif math.isfinite(loss) and self.was_scaled_too_far():
                self.overflows += 1
            else:
                self.skip(loss)
            for optimizer in self.optimizers:
                optimizer.zero_grad(set_to_none=True)
            self.scaler.update()
            self.expert_load = experts.take_loads(self.model, self.world, rebalance=is_finite)
        self.step += 1
        if is_finite:
            self.average.update(self.step, self.config.training)

    def accumulate(self, batch: Learnable, n_targets: int) -> Tensor:
        """Accumulate the gradients of the mean loss over the ``n_targets`` of all processes, and
        return that loss.
        """
        total = torch.zeros((), device=self.device)
        micros = list(batch.split(self.config.training.micro_batch_size))
        for number, micro in enumerate(micros, 1):
            micro = micro.to(self.device)
            with only_here(self.forward) if number < len(micros) else contextlib.nullcontext():
                with self.stopwatch("forward"):
                    loss = self.objective(self.logits, micro) / n_targets
                total += loss.detach()
                spread = auxiliary_loss(self.model)
                if spread is not None:
                    loss = loss + spread / (len(micros) * self.world.size)
                with self.stopwatch("backward"):  # the processes average their gradients
                    self.scaler.scale(loss * self.world.size).backward()
        return self.world.sum(total)

    def logits(
        self, tokens: Tensor, documents: Tensor | None = None, read: Read | None = None
    ) -> Tensor:
        """The model's logits in the run's precision, or what ``read`` makes of its features."""
        with self.autocast:
            out: Tensor = self.forward(tokens, documents=documents, read=read)
        return out

    def was_scaled_too_far(self) -> bool:
        """Whether float16's loss scale may be the cause of a non-finite gradient. The scale is then
        reduced and the update skipped.
        """
        return self.scaler.is_enabled() and self.scaler.get_scale() >= 1

    def skip(self, loss: float) -> None:
        """Skip an update; ``UsageError`` if ``training.skip_nonfinite`` allows no more."""
        allowed = self.config.training.skip_nonfinite
        what = nonfinite.report(
            self.config.run,
            step=self.step + 1,
            loss=loss,
            norms=nonfinite.gradient_norms(self.model),
            windows=self.source.origin(self.step),
            write=self.world.is_main,
        )
        if self.skipped >= allowed:
            passed = f" after {self.skipped} skipped updates" if self.skipped else ""
            raise UsageError(
                f"{what}{passed}: training has diverged since the last checkpoint; "
                "try a lower optimizer.learning_rate, or training.skip_nonfinite"
            )
        self.skipped += 1
        self.reporter.skipped(
            {"step": self.step + 1, "skipped": self.skipped},
            f"{what}; the update is skipped, {self.skipped} of {allowed}",
        )

    def record(self, norm: float, *, seconds: float, steps: int) -> None:
        """Report the steps since the last record. ``seconds`` is the mean time of the ``steps``
        since then, or since the run was resumed; ``norm`` is that of the last gradient.
        """
        times = self.stopwatch.take(steps)
        if not self.losses:
            return  # all were skipped, and reported as skipped
        figures = self.task.figures.take() if self.task is not None else {}
        tokens_per_second = figures.pop("tokens", self.config.training.batch_tokens) / seconds
        record = {
            "step": self.step,
            "loss": sum(self.losses) / len(self.losses),
            "learning_rate": self.optimizers[-1].param_groups[0]["lr"],
            "gradient_norm": norm if math.isfinite(norm) else None,
            "tokens": self.step * self.config.training.batch_tokens,
            "tokens_per_second": tokens_per_second,
            **self.source.progress(self.step),
            **times,
            **figures,
        }
        if self.task is not None:
            del record["tokens"]  # texts of different lengths in each step
        if self.scaler.is_enabled():
            record |= {"loss_scale": self.scaler.get_scale(), "overflows": self.overflows}
        if self.expert_load is not None:
            record["expert_load"] = float(self.expert_load)
        peak = peak_flops(self.device) if self.dtype != torch.float32 else None
        if peak is not None:
            flops = tokens_per_second * self.model.flops_per_token()
            record["mfu"] = flops / (peak * self.world.size)
        self.losses = []
        self.reporter.step(record)

    def evaluate(self, sample: Sample | None) -> float:
        """Compute and report the loss on the held-out text, with a sample, of the model with the
        average of its weights, if there is one.
        """
        with self.average.applied():
            loss = self._evaluate(sample)
        if self.step:
            self.stale = 0 if loss < self.least_loss else self.stale + 1
        self.least_loss = min(self.least_loss, loss)
        return loss

    def _evaluate(self, sample: Sample | None) -> float:
        result = self.held_out_loss() if self.task is None else self.task.evaluate()
        if not math.isfinite(result.loss):
            raise UsageError(
                f"the validation loss is {result.loss} at step {self.step}: training has diverged "
                "since the last checkpoint; try a lower optimizer.learning_rate"
            )
        record: dict[str, Any] = {
            "step": self.step,
            "validation_loss": result.loss,
            **result.figures,
        }
        shown = Shown(result.sample)
        if sample and self.task is None:
            shown = self.sample(sample)
        record |= shown.figures
        best = self.step > 0 and result.loss < self.least_loss
        self.reporter.evaluation(record, best=best, sample=shown.text)
        return result.loss

    def held_out_loss(self) -> Evaluation:
        """The model's loss on the windows of the held-out text."""
        result = score_all(
            self.model,
            self.validation,
            self.config.evaluation.windows,
            byte_lengths=self.byte_lengths,
            batch_size=self.config.training.micro_batch_size,
            device=self.device,
            autocast=self.autocast,
            world=self.world,
        )
        if isinstance(self.model, FSDPModule):
            self.model.reshard()  # usually the backward pass does it
        figures: dict[str, Any] = {"bits_per_byte": result.bits_per_byte}
        if result.by_source:
            figures["validation_losses"] = result.by_source
        return Evaluation(result.loss, figures)

    def whole_model(self) -> GPT:
        """The model, or an unsharded copy of it on every process. All processes must call this."""
        if self.strategy != "fsdp":
            return self.model
        whole = build.whole_model(
            self.model,
            self.world,
            device=self.device,
            dtype=torch.float32,
            adapter=self.config.adapter,
            everywhere=True,
        )
        assert whole is not None
        return whole

    def sample(self, make: Sample) -> Shown:
        """What ``make`` writes with the model, on the main process; else nothing."""
        model: GPT | None = self.model
        if self.strategy == "fsdp":
            if self.saves_shards:
                return Shown("")  # the model may not fit into one process's memory
            model = build.whole_model(
                self.model,
                self.world,
                device=self.device,
                dtype=self.dtype,
                adapter=self.config.adapter,
            )
        if model is None or not self.world.is_main:
            return Shown("")
        with uncompiled():  # else each length would be compiled
            return make(model, self.data)

    def save(self, saver: Saver, loss: float | None = None) -> None:
        """Start writing a checkpoint. It becomes the best one if its validation ``loss`` is lowest.

        ``UsageError`` if a weight is not finite: such a model is never saved.
        """
        weights = self.average.weights(state.saved_weights(self.model))
        if self.world.largest(not nonfinite.all_finite(weights)):
            raise UsageError(
                f"a weight is not finite at step {self.step}: training has diverged since the "
                "last checkpoint; try a lower optimizer.learning_rate"
            )
        if loss is not None and loss < self.best_loss:
            self.best_loss, self.best = loss, checkpoints.name_of(self.step)
        saver.save(
            State(
                step=self.step,
                model=self.config.model,
                weights=weights,
                training=state.learned(self.model, self.optimizers) | self.average.state(),
                progress={
                    "best": self.best,
                    "best_loss": self.best_loss if self.best else None,
                    "least_loss": self.least_loss if math.isfinite(self.least_loss) else None,
                    "losses": list(self.losses),
                    "skipped": self.skipped,
                    "overflows": self.overflows,
                    "stale": self.stale,
                    "averaged": self.average.count,
                    "scaler": self.scaler.state_dict(),
                    "settings": setup.settings(self.config, self.data.train),
                    "tokenizer": self._tokenizer,
                    "place": self.environment(),
                    **({"adapter": self.base} if self.base else {}),
                    **({"teachers": self._teachers} if self._teachers else {}),
                    **self.task_state(),
                },
                metrics={} if loss is None else {"validation_loss": loss},
            ),
            best=self.best,
        )

    def task_state(self) -> dict[str, Any]:
        """What a checkpoint stores of the task."""
        if self.task is None:
            return {}
        return {"task": {"figures": self.task.figures.state(), "state": self.task.state()}}
