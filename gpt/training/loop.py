"""The training loop.

:meth:`Trainer.run` is the loop, :meth:`Trainer.update` one step of it. All that a step depends on
is the weights, the optimizers' state, the random state, and the step's number.
"""

import dataclasses
import math
import shlex
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from rich.console import Console
from torch import Tensor

from gpt import checkpoint as checkpoints
from gpt.checkpoint import Checkpoint
from gpt.config import TrainConfig, UsageError
from gpt.data import tokenizer as tokenizers
from gpt.data.batches import Order, Windows
from gpt.data.prepare import Prepared, prepare
from gpt.data.tokenizer import Tokenizer
from gpt.device import choose_device, choose_precision, peak_flops
from gpt.model.gpt import GPT
from gpt.training import state
from gpt.training.compilation import compiled
from gpt.training.curve import draw_curve
from gpt.training.interrupt import Interrupt
from gpt.training.loss import summed_loss
from gpt.training.metrics import Record, Reporter, as_settings
from gpt.training.optimizer import clip_gradients, make_optimizers, set_learning_rate
from gpt.training.precision import autocast, loss_scaler
from gpt.training.schedule import learning_rate_factor
from gpt.training.setup import (
    checkpoint_to_resume,
    identity,
    resolve,
    take_initial_model,
    write_run_files,
)
from gpt.training.validation import score

Sample = Callable[[GPT, Tokenizer], str]
"""Makes the text that is shown with an evaluation."""


@dataclass(frozen=True)
class Result:
    """How a run ended."""

    step: int
    best_loss: float
    interrupted: bool


def train(config: TrainConfig, *, console: Console, sample: Sample | None = None) -> Result:
    """Train the model that ``config`` describes, from its start or from the run's last checkpoint.

    Raises :class:`UsageError` for what cannot be trained; nothing that the run's folder holds is
    lost.
    """

    def say(text: str) -> None:
        console.print(text, highlight=False, markup=False, soft_wrap=True)

    checkpoint = checkpoint_to_resume(config, say)
    config, initial = take_initial_model(config, checkpoint, say)
    with console.status("preparing the text") as status:
        data = prepare(
            config.data,
            config.cache_dir,
            tokenizer=initial.tokenizer if initial else None,
            progress=lambda share: status.update(f"preparing {config.data.source}: {share:.0%}"),
        )
    config = resolve(config, data, checkpoint)
    model = initial.model if initial else None
    trainer = Trainer(config, data, checkpoint=checkpoint, model=model, say=say)
    write_run_files(config, data.tokenizer)
    for line in trainer.describe():
        say(line)
    with Reporter(
        config.run,
        config.log,
        console=console,
        first_step=trainer.step,
        max_steps=config.training.max_steps,
        settings=as_settings(config),
    ) as reporter:
        result = trainer.run(reporter, sample)
    if result.interrupted:
        say(
            f"stopped at step {result.step:,}, which is saved; go on with: "
            f"python train.py {shlex.quote(str(config.run / 'config.toml'))} --resume"
        )
    else:
        say(draw_curve(config.run / "metrics.jsonl"))
    return result


class Trainer:
    """A model in training, with all that a step needs."""

    def __init__(
        self,
        config: TrainConfig,
        data: Prepared,
        *,
        checkpoint: Checkpoint | None = None,
        model: GPT | None = None,
        say: Callable[[str], None] = lambda text: None,
    ) -> None:
        torch.manual_seed(config.training.seed)
        self.config, self.data = config, data
        self.device = choose_device(config.training.device)
        self.dtype = choose_precision(config.training.precision, self.device)
        self.autocast = autocast(self.device, self.dtype)
        self.scaler = loss_scaler(self.device, self.dtype)

        self.windows = Windows(data.train, config.model.context_length)
        self.validation = Windows(data.validation, config.model.context_length)
        self.byte_lengths = tokenizers.byte_lengths(data.tokenizer)
        batch_size = config.training.batch_tokens // config.model.context_length
        self.order = Order(len(self.windows), batch_size=batch_size, seed=config.training.seed)

        if checkpoint is None:
            self.model = (model or GPT(config.model)).to(self.device)
        else:
            self.model = checkpoints.load_model(
                dataclasses.replace(checkpoint, model=config.model), device=self.device
            )
        self.model.train()
        self.optimizers = make_optimizers(self.model, config.optimizer)
        self.forward = compiled(self.model, config.training.compile, device=self.device, say=say)
        self.step, self.best_loss = 0, math.inf
        if checkpoint is not None:
            learned = checkpoints.load_training(checkpoint)
            state.restore(
                learned, self.optimizers, self.scaler, identity=identity(config, data.train)
            )
            self.step, self.best_loss = checkpoint.step, learned["best_loss"]

    def run(self, reporter: Reporter, sample: Sample | None) -> Result:
        """Train to ``max_steps``, or to the first Ctrl-C."""
        config, last = self.config, self.config.training.max_steps
        losses: list[Tensor] = []
        with Interrupt() as interrupt:
            if (
                self.step == 0
            ):  # what is learned is seen against it, and wrong settings come to light
                self.evaluate(reporter, sample)
            clock = time.monotonic()
            while self.step < last and not interrupt.requested:
                step_loss, norm = self.update()
                losses.append(step_loss)

                if self.step % config.log.every == 0 or self.step == last:
                    mean_loss = torch.stack(losses).mean().item()
                    tokens = len(losses) * config.training.batch_tokens
                    reporter.step(self.record(mean_loss, norm, tokens / (time.monotonic() - clock)))
                    losses, clock = [], time.monotonic()

                paused = time.monotonic()
                if interrupt.requested or self.is_saved_at(self.step):
                    self.check_finite(step_loss, norm)
                if self.step % config.evaluation.every == 0 or self.step == last:
                    loss = self.evaluate(reporter, sample)
                    best = loss < self.best_loss
                    self.best_loss = min(loss, self.best_loss)
                    self.save(best=best, metrics={"validation_loss": loss})
                elif config.checkpoint.every and self.step % config.checkpoint.every == 0:
                    self.save()
                clock += time.monotonic() - paused
            if interrupt.requested and self.step < last:
                self.save()
        return Result(self.step, self.best_loss, interrupted=self.step < last)

    def update(self) -> tuple[Tensor, Tensor]:
        """One step: its mean loss in nats per token, and the gradient's norm before clipping."""
        config = self.config
        factor = learning_rate_factor(
            self.step, max_steps=config.training.max_steps, config=config.optimizer
        )
        set_learning_rate(self.optimizers, factor)
        batch = self.windows.batch(self.order.step(self.step))
        total = torch.zeros((), device=self.device)
        for micro in batch.split(config.training.micro_batch_size):
            micro = micro.to(self.device)
            with self.autocast:
                logits = self.forward(micro.tokens)
            loss = summed_loss(logits, micro.targets) / config.training.batch_tokens
            self.scaler.scale(loss).backward()
            total += loss.detach()

        for optimizer in self.optimizers:
            self.scaler.unscale_(optimizer)
        norm = clip_gradients(self.model, config.training.gradient_clip)
        for optimizer in self.optimizers:
            self.scaler.step(optimizer)
            optimizer.zero_grad(set_to_none=True)
        self.scaler.update()
        self.step += 1
        return total, norm

    def record(self, loss: float, norm: Tensor, tokens_per_second: float) -> Record:
        """What is logged of the steps since the last record."""
        self.check_finite(torch.tensor(loss), norm)
        record = {
            "step": self.step,
            "loss": loss,
            "learning_rate": self.optimizers[-1].param_groups[0]["lr"],
            "gradient_norm": norm.item(),
            "tokens": self.step * self.config.training.batch_tokens,
            "tokens_per_second": tokens_per_second,
        }
        peak = peak_flops(self.device) if self.dtype != torch.float32 else None
        if peak is not None:
            record["mfu"] = tokens_per_second * self.model.flops_per_token() / peak
        return record

    def is_saved_at(self, step: int) -> bool:
        """Whether a checkpoint is due after ``step`` steps."""
        every = (self.config.evaluation.every, self.config.checkpoint.every)
        return step == self.config.training.max_steps or any(n and step % n == 0 for n in every)

    def check_finite(self, loss: Tensor, norm: Tensor) -> None:
        """Raise ``UsageError`` if training has diverged: what is not a number is never saved."""
        if not (math.isfinite(loss.item()) and math.isfinite(norm.item())):
            raise UsageError(
                f"the loss is {loss.item()} and the gradient's norm {norm.item()} at step "
                f"{self.step}: training has diverged, and the checkpoints are from before it; try "
                "a lower optimizer.learning_rate"
            )

    def evaluate(self, reporter: Reporter, sample: Sample | None) -> float:
        """The model's loss on the held-out text, reported with a sample of its own."""
        result = score(
            self.forward,
            self.validation,
            self.validation.spread(self.config.evaluation.windows),
            byte_lengths=self.byte_lengths,
            batch_size=self.config.training.micro_batch_size,
            device=self.device,
            autocast=self.autocast,
        )
        self.check_finite(torch.tensor(result.loss), torch.zeros(()))
        record = {
            "step": self.step,
            "validation_loss": result.loss,
            "bits_per_byte": result.bits_per_byte,
        }
        text = sample(self.model, self.data.tokenizer) if sample else ""
        reporter.evaluation(
            record, best=self.step > 0 and result.loss < self.best_loss, sample=text
        )
        return result.loss

    def save(self, *, best: bool = False, metrics: Record | None = None) -> None:
        """Write a checkpoint, let ``last`` (and ``best``) name it, and delete those that are not
        kept.
        """
        run = self.config.run
        path = checkpoints.save(
            run,
            self.step,
            model=self.model,
            training=state.capture(
                self.optimizers,
                self.scaler,
                best_loss=self.best_loss,
                identity=identity(self.config, self.data.train),
            ),
            metrics=metrics or {},
        )
        checkpoints.point(run, "last", path)
        if best:
            checkpoints.point(run, "best", path)
        checkpoints.prune(run, keep=self.config.checkpoint.keep)

    def describe(self) -> list[str]:
        """The run in a few lines, for the person who starts it."""
        config, model = self.config, self.config.model
        tokens = config.training.batch_tokens
        micro = config.training.micro_batch_size * model.context_length
        return [
            f"run      {config.run}" + (f", going on from step {self.step:,}" if self.step else ""),
            f"text     {config.data.source}: {len(self.data.train):,} training and "
            f"{len(self.data.validation):,} validation tokens, "
            f"{self.data.tokenizer.kind} tokenizer",
            f"model    {self.model.parameter_count():,} parameters "
            f"({self.model.parameter_count(embeddings=False):,} without embeddings): "
            f"{model.n_layer} layers, {model.n_head} heads, {model.n_embd} wide, "
            f"context {model.context_length}",
            f"training {config.training.max_steps:,} steps of {tokens:,} tokens "
            f"({tokens // micro} x {config.training.micro_batch_size} x {model.context_length}), "
            f"{tokens * config.training.max_steps / len(self.data.train):.2f} epochs, "
            f"{config.optimizer.name}, {self.device.type}, "
            f"{str(self.dtype).removeprefix('torch.')}",
        ]
