import os
from pathlib import Path

os.environ["WANDB_MODE"] = "offline"
os.environ["XDG_STATE_HOME"] = os.devnull  # no history of lines is kept
os.environ["OMP_NUM_THREADS"] = "1"  # of the programs that tests start, as of the tests: see below

import pytest
import torch
from torch import Tensor

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # Triton reads it when it is imported

from gpt.config import ModelConfig
from gpt.model.gpt import GPT

torch.set_num_threads(1)  # tiny tensors: more threads only wait for each other

LINES = [
    "FIRST CITIZEN:\nBefore we proceed any further, hear me speak.\n\n",
    "ALL:\nSpeak, speak.\n\n",
    "MENENIUS:\nWhat work's, my countrymen, in hand? where go you\nWith bats and clubs?\n\n",
    "VOLUMNIA:\nI pray you, daughter, sing; or express yourself in a more comfortable sort.\n\n",
]


LONGEST = (
    "training/test_torchrun.py", "training/test_parallel.py", "generation/test_inference.py",
    "training/test_faults.py", "test_readme.py", "test_triton_kernels.py", "test_cli.py",
    "test_output.py", "training/test_loop.py", "fuzz/test_share.py",
)  # fmt: skip
"""Files of half a minute and more, or of few tests that are slow."""


def pytest_collection_modifyitems(items):
    """The longest files come first, so that at the end no process waits for another one's."""
    places = {Path(__file__).parent / name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: places.get(item.path, len(LONGEST)))


@pytest.fixture
def text_file(tmp_path):
    """A corpus of some 10,000 characters."""
    path = tmp_path / "text.txt"
    path.write_text("".join(LINES[i % 3 + (i % 7 == 0)] for i in range(160)), encoding="utf-8")
    return path


@pytest.fixture
def tiny_config():
    return ModelConfig(vocab_size=61, context_length=16, n_layer=2, n_head=4, n_embd=32)


def make_model(config: ModelConfig, *, seed: int = 0, dtype: torch.dtype = torch.float32) -> GPT:
    """A model in evaluation mode with every weight, biases and norms too, far from its default."""
    torch.manual_seed(seed)
    model = GPT(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.3).add_(0.1 if parameter.ndim == 1 else 0)
    return model.to(dtype).eval()


def hugging_face_greedy(model, prompt: Tensor, n: int) -> list[int]:
    """The ``n`` likeliest tokens after ``prompt`` ``[1, T]``, by a model of transformers."""
    made = model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=n,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
    )
    return made[0, prompt.shape[1] :].tolist()


@pytest.fixture
def tiny_model(tiny_config):
    return make_model(tiny_config)
