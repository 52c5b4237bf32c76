"""No matrix product is in a dtype that the processor only emulates."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from gpt import device as devices
from gpt import kernels
from gpt.config import (
    EvaluateConfig,
    GenerationConfig,
    ModelConfig,
)
from gpt.data.prepare import prepare
from gpt.evaluation.report import measure
from gpt.generation.decode import decode
from gpt.generation.inference import prepare_for_inference
from gpt.generation.speculative import DraftModel, Speculator
from gpt.interop.load import load
from gpt.training.loop import Trainer
from tests.conftest import make_model
from tests.test_cli import RUN
from tests.tiny import change, tiny_run

PROCESSORS = {
    "AVX2": {"avx2": True},
    "AVX-512 with bfloat16": {"avx2": True, "avx512_f": True, "avx512_bf16": True},
    "AVX-512 without bfloat16": {"avx2": True, "avx512_f": True},
    "unknown": {},
}
CONFIG = ModelConfig(vocab_size=257, context_length=80, n_layer=2, n_head=2, n_embd=64)


class Products(TorchDispatchMode):
    """Counts the dtypes of the operands of every matrix product and attention, while entered."""

    NAMES = ("mm", "addmm", "bmm", "baddbmm", "matmul", "linear", "mv", "addmv", "dot")

    def __init__(self):
        super().__init__()
        self.dtypes = {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        # torch's products with packed weights take bfloat16, and multiply float32 in registers
        if name in self.NAMES or "attention" in name:
            for argument in [*args, *(kwargs or {}).values()]:
                if isinstance(argument, torch.Tensor) and argument.is_floating_point():
                    self.dtypes[argument.dtype] = self.dtypes.get(argument.dtype, 0) + 1
        return function(*args, **(kwargs or {}))


@pytest.fixture(params=PROCESSORS)
def fast(request, monkeypatch):
    """The dtypes that may be multiplied on a processor, which is simulated."""
    features = PROCESSORS[request.param]
    monkeypatch.delenv("ATEN_CPU_CAPABILITY", raising=False)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: features, raising=False)
    emulates = "avx512_bf16" not in devices.cpu_features()
    return {torch.float32} if emulates else {torch.float32, torch.bfloat16}


@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_training_step_multiplies_in_fast_dtypes(optimizer, dropout, fast, text_file, tmp_path):
    config = tiny_run(
        tmp_path,
        text_file,
        model={"dropout": dropout},
        training={"precision": "auto", "batch_tokens": 64, "micro_batch_size": 2},
        optimizer={"name": optimizer},
    )
    data = prepare(config.data, tmp_path / "data")
    trainer = Trainer(change(config, model={"vocab_size": data.tokenizer.vocab_size}), data)
    with Products() as products:
        trainer.update()
        trainer.evaluate(None)
    assert products.dtypes
    assert products.dtypes.keys() <= fast
    assert max(products.dtypes, key=products.dtypes.get) == min(fast, key=lambda d: d.itemsize)


@pytest.mark.parametrize("compiler", [True, False])
@pytest.mark.parametrize("weights", ["auto", "float32", "bfloat16", "float16", "int8", "int4"])
def test_decoding_multiplies_in_fast_dtypes(weights, compiler, fast, monkeypatch):
    if not compiler:
        monkeypatch.setattr(kernels, "library", lambda: None)
    model = prepare_for_inference(make_model(CONFIG), weights)
    prompt = torch.arange(70).tolist()  # too many for the kernels, and then a token at a time
    with Products() as products:
        list(decode(model, [prompt, prompt[:3]], GenerationConfig(max_new_tokens=5)))
    assert products.dtypes
    assert products.dtypes.keys() <= fast
    if torch.bfloat16 not in fast:
        assert model.new_cache().dtype == torch.float32


def test_speculative_drafts_multiply_in_fast_dtypes(fast):
    model, draft = (
        prepare_for_inference(make_model(CONFIG), kind) for kind in ("auto", "bfloat16")
    )
    config = GenerationConfig(max_new_tokens=8)
    with Products() as products:
        list(Speculator(model, config, DraftModel(draft, config)).decode(list(range(60))))
    assert products.dtypes
    assert products.dtypes.keys() <= fast


@pytest.mark.parametrize("weights", ["auto", "bfloat16", "float16", "int8"])
def test_evaluation_multiplies_in_fast_dtypes(weights, fast, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("".join(load(RUN).tokenizer.characters) * 20, encoding="utf-8")
    config = EvaluateConfig(models=(str(RUN),), text=str(text), weights=weights, device="cpu")
    with Products() as products:
        measure(config, say=lambda text: None)
    assert products.dtypes
    assert products.dtypes.keys() <= fast
