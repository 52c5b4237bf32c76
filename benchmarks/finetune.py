"""Tuning beside PEFT's and TRL's: ``python benchmarks/finetune.py [--trl FOLDER]``.

Three tables: LoRA (``lora.py``), how full packed windows are (``data.py packing``), and steps that
raise a reward; ``--rewards`` prints the last one alone. These are steps of REINFORCE with a
leave-one-out baseline on a model of GPT-2's kind with random weights, without a divergence term:
TRL's ``RLOOTrainer`` and this project write as many texts for as many prompts, from models of one
shape on the same tokens, in float32 and in bfloat16. Each contender is a process of its own, and
they run in turns; figures are medians of the steps after the first. TRL comes without its
dependencies: ``pip install --no-deps --target FOLDER trl==1.16.0``; it needs datasets.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from machine import show
from rich.table import Table

from gpt import GPT, ModelConfig
from gpt.config import ObjectiveConfig, TrainConfig, TrainingConfig
from gpt.data.prompts import Records, RecordSet
from gpt.data.tokenizer import ByteTokenizer
from gpt.generation.rollout import write_texts
from gpt.training.loop import Trainer
from gpt.training.rewarded import Rewarded

WIDTH, HEADS = 512, 8
END = ByteTokenizer.end_of_text
Figures = dict[str, list[float]]
"""Per step: tokens that were written, seconds for that, and seconds of the step."""


def prompts(n: int) -> list[str]:
    """Prompts of 16 to 46 bytes."""
    return [f"{i:03d} " + "tell me more " * (1 + i % 3) + ":" for i in range(n)]


def reward(prompt: str, text: str, record: dict[str, Any]) -> float:
    """How often the text has a letter."""
    return float(text.count("e"))


def ours(options: argparse.Namespace) -> Figures:
    """Steps of this project."""
    torch.manual_seed(0)
    shape = ModelConfig(
        vocab_size=257, context_length=256, n_layer=options.layers, n_head=HEADS, n_embd=WIDTH
    )
    config = TrainConfig(
        run_dir=tempfile.mkdtemp(),
        init="random",
        model=shape,
        training=TrainingConfig(
            micro_batch_size=options.prompts * options.samples,
            device="cpu",
            precision="bfloat16" if options.bfloat16 else "float32",
            max_steps=99,
        ),
        objective=ObjectiveConfig(
            kind="reward",
            reward=f"{__file__}:reward",
            records=options.prompts,
            samples=options.samples,
            max_new_tokens=options.tokens,
        ),
    )
    records = RecordSet([{"prompt": text} for text in prompts(64)], b"")
    figures: Figures = {"tokens": [], "writing": [], "step": []}

    def write(*arguments: Any) -> Any:
        start = time.perf_counter()
        written = write_texts(*arguments)
        figures["writing"].append(time.perf_counter() - start)
        figures["tokens"].append(sum(len(text.tokens) for text in written))
        return written

    data = Records(ByteTokenizer(), records, records)
    task = Rewarded(config, data, start=lambda: GPT(shape), write=write)
    trainer = Trainer(config, data, task=task, model=GPT(shape))
    for _ in range(options.steps):
        start = time.perf_counter()
        trainer.update()
        figures["step"].append(time.perf_counter() - start)
    return figures


def trl(options: argparse.Namespace) -> Figures:
    """TRL's steps."""
    import datasets
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import (
        GPT2Config,
        GPT2LMHeadModel,
        PreTrainedTokenizerFast,
        TrainerCallback,
    )
    from trl import RLOOConfig, RLOOTrainer

    torch.manual_seed(0)
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {letter: i for i, letter in enumerate(letters)}
    library = Tokenizer(models.BPE(vocabulary | {"<end>": END}, []))
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=library, eos_token="<end>", pad_token="<end>", padding_side="left"
    )
    model = GPT2LMHeadModel(
        GPT2Config(
            vocab_size=257, n_positions=256, n_layer=options.layers, n_head=HEADS, n_embd=WIDTH,
            bos_token_id=END, eos_token_id=END, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0,
        )
    )  # fmt: skip
    figures: Figures = {"tokens": [], "writing": [], "step": []}
    generate: Callable[..., torch.Tensor] = model.generate

    def timed(*arguments: Any, **more: Any) -> torch.Tensor:
        start = time.perf_counter()
        made = generate(*arguments, **more)
        figures["writing"].append(time.perf_counter() - start)
        new = made[:, more["input_ids"].shape[1] :]
        ended = (new == END).cumsum(1) - (new == END).long()  # ends before a token
        figures["tokens"].append(int((ended == 0).sum()))
        return made

    model.generate = timed

    class Clock(TrainerCallback):
        def on_step_begin(self, *arguments: Any, **more: Any) -> None:
            self.start = time.perf_counter()

        def on_step_end(self, *arguments: Any, **more: Any) -> None:
            figures["step"].append(time.perf_counter() - self.start)

    def letters_e(completions: list[str], **more: Any) -> list[float]:
        return [reward("", text, {}) for text in completions]

    trainer = RLOOTrainer(
        model=model,
        processing_class=tokenizer,
        reward_funcs=letters_e,
        train_dataset=datasets.Dataset.from_list([{"prompt": text} for text in prompts(64)]),
        callbacks=[Clock()],
        args=RLOOConfig(
            output_dir=tempfile.mkdtemp(),
            per_device_train_batch_size=options.prompts * options.samples,
            num_generations=options.samples,
            max_completion_length=options.tokens,
            beta=0.0,
            max_steps=options.steps,
            learning_rate=6e-4,
            use_cpu=True,
            bf16=options.bfloat16,
            report_to=[],
            save_strategy="no",
            logging_strategy="no",
            disable_tqdm=True,
            gradient_checkpointing=False,
        ),
    )
    trainer.train()
    return figures


CONTENDERS = {"ours": ours, "trl": trl}
NAMES = ("ours", "ours, bfloat16", "trl", "trl, bfloat16")


def run(name: str, options: argparse.Namespace) -> Figures:
    """A contender's figures, from a process of its own."""
    which, _, precision = name.partition(", ")
    words = [sys.executable, __file__, "--contender", which]
    words += ["--bfloat16"] if precision else []
    for field in ("layers", "prompts", "samples", "tokens", "steps", "threads"):
        words += [f"--{field}", str(getattr(options, field))]
    environment = os.environ | {"OMP_NUM_THREADS": str(options.threads)}
    if options.trl:
        path = [*os.environ.get("PYTHONPATH", "").split(os.pathsep), str(options.trl.resolve())]
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, path))
    done = subprocess.run(words, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(done.stderr)
    figures: Figures = json.loads(done.stdout.splitlines()[-1])
    return figures


def main() -> None:
    """Measure all contenders in turns, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--trl", type=Path, help="the folder that TRL is in; without it, ours only")
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--samples", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--rewards", action="store_true", help="without the first two tables")
    parser.add_argument("--bfloat16", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--contender", choices=CONTENDERS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.contender:
        figures = CONTENDERS[options.contender](options)
        sys.stdout.write(f"\n{json.dumps(figures)}\n")
        return
    for other in () if options.rewards else ("lora.py", "data.py packing"):
        program, *words = other.split()
        subprocess.run([sys.executable, Path(__file__).with_name(program), *words], check=True)
    names = [name for name in NAMES if options.trl or name.startswith("ours")]
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in names}
    for _ in range(options.rounds):
        for name in names:
            figures = run(name, options)
            rows = zip(figures["tokens"], figures["writing"], figures["step"], strict=True)
            found[name] += [(n / writing, n / step) for n, writing, step in list(rows)[1:]]
    table = Table("tokens/s", "written", "learned, writing included", "over TRL's best")
    medians = {n: [statistics.median(f) for f in zip(*found[n], strict=True)] for n in names}
    for name in names:
        shown = [f"{number:,.0f}" for number in medians[name]]
        theirs = [medians[n] for n in names if n.startswith("trl")]
        best = [max(column) for column in zip(*theirs, strict=True)]
        over = zip(medians[name], best, strict=True) if theirs else []
        table.add_row(name, *shown, ", ".join(f"{a / b:.2f}" for a, b in over))
    show(table)


if __name__ == "__main__":
    main()
