"""What llama.cpp makes of a file, in a process of its own."""

import importlib.util
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

IS_MISSING = importlib.util.find_spec("llama_cpp") is None
REASON = "llama_cpp is missing: pip install llama-cpp-python"
PROGRAM = """
import json, sys, numpy, llama_cpp
from llama_cpp.llama_chat_format import Jinja2ChatFormatter
questions, answers = json.load(sys.stdin), {}
model = llama_cpp.Llama(
    sys.argv[1], n_ctx=questions.get("context", 512), n_threads=1, n_threads_batch=1, type_k=0,
    type_v=0, logits_all="logits" in questions, vocab_only="texts" in questions, verbose=False,
)
if "texts" in questions:
    bos = questions["bos"]
    answers["ids"] = [model.tokenize(t.encode(), add_bos=bos) for t in questions["texts"]]
if "messages" in questions:
    template = model.metadata["tokenizer.chat_template"]
    form = Jinja2ChatFormatter(template=template, eos_token="", bos_token="")
    answers["text"] = form(messages=questions["messages"]).prompt
    answers["ids"] = model.tokenize(answers["text"].encode(), add_bos=False, special=True)
if "continue" in questions:
    made = model.generate(questions["continue"], temp=0, repeat_penalty=1.0)
    answers["ids"] = [next(made) for _ in range(questions["tokens"])]
if "logits" in questions:
    model.eval(questions["logits"])
    numpy.save(sys.argv[2], numpy.array(model.scores[: len(questions["logits"])]))
json.dump(answers, sys.stdout)
sys.stdout.flush()
"""


def asked(path: Path, **questions: Any) -> dict[str, Any]:
    """llama.cpp's answers about the model at ``path``: the ``ids`` of ``texts`` (with ``bos`` or
    not), the ``text`` and the ``ids`` of ``messages``, the ``tokens`` likeliest ones after
    ``continue`` (``ids``), and the ``logits`` after each of some ids, ``[T, V]``. Its cache is in
    float32, for ``context`` tokens.
    """
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder, "logits.npy")
        run = subprocess.run(
            [sys.executable, "-c", PROGRAM, str(path), str(out)],
            input=json.dumps(questions),
            capture_output=True,
            text=True,
        )
        assert run.stdout, run.stderr
        answers: dict[str, Any] = json.loads(run.stdout)
        if "logits" in questions:
            answers["logits"] = torch.from_numpy(np.load(out))
    return answers
