import dataclasses
import functools
import subprocess

import pytest
import torch

from gpt.config import ParallelConfig, TrainingConfig, UsageError
from gpt.data.batches import Batch
from gpt.training.build import build_model
from gpt.training.compilation import compile_blocks
from gpt.training.parallel import World
from gpt.training.source import next_token
from tests.conftest import make_model


@pytest.mark.filterwarnings("ignore")  # the compiler's own
@pytest.mark.parametrize(
    "settings",
    [{}, {"scale_attention_by_layer": True}, {"scale_attention": False}],
    ids=["gpt2", "scaled by layer", "unscaled"],
)
def test_one_graph_serves_all_blocks(settings, tiny_config):
    model = make_model(dataclasses.replace(tiny_config, n_layer=10, **settings)).train()
    tokens = torch.arange(12).view(1, 12)
    expected = model(tokens)
    torch._dynamo.reset()
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    for block in model.blocks:
        block.compile(backend=backend, fullgraph=True)
    compiled = model(tokens)
    torch._dynamo.reset()
    assert len(graphs) == 1
    torch.testing.assert_close(compiled, expected, rtol=0, atol=1e-5 * float(expected.abs().max()))


def test_training_continues_if_a_kernel_cannot_be_built(monkeypatch, tiny_model):
    def broken(what):
        raise subprocess.CalledProcessError(1, ["gcc", "main.c"])  # as Triton does

    monkeypatch.setattr(torch, "compile", broken)
    said = []
    compile_blocks(tiny_model, "auto", device=torch.device("cuda"), say=said.append)
    assert len(said) == 1
    assert "Command '['gcc', 'main.c']' returned non-zero exit status 1" in said[0]
    assert tiny_model.blocks[0]._compiled_call_impl is None


@pytest.mark.filterwarnings("ignore")  # the compiler's own
def test_experts_run_eagerly_in_a_compiled_block(monkeypatch, tiny_config):
    experts = dataclasses.replace(tiny_config, n_expert=4, n_expert_active=2)
    model = make_model(experts).eval()
    tokens = torch.arange(12).view(1, 12)
    expected, graphs = model(tokens), []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=backend))
    torch._dynamo.reset()
    compile_blocks(model, "on", device=torch.device("cpu"), say=print)
    compiled = model(tokens)
    torch._dynamo.reset()
    assert graphs
    assert not any("argsort" in graph.code for graph in graphs)
    torch.testing.assert_close(compiled, expected, rtol=0, atol=1e-5 * float(expected.abs().max()))


MODERN = {
    "position": "rotary", "norm": "rmsnorm", "norm_weight": False, "qk_norm": True, "bias": False,
    "activation": "relu_squared", "initial": "zero", "tie_embeddings": False,
    "logit_softcap": 15.0, "logit_softcap_form": "root", "value_embeddings": 2,
    "skip_embedding": True, "skip_layers": True, "window": 5, "window_pattern": "LG",
}  # fmt: skip


@pytest.mark.filterwarnings("ignore")  # the compiler's own
@pytest.mark.parametrize("settings", [{}, MODERN], ids=["gpt2", "modern"])
def test_a_whole_model_and_its_loss_are_one_graph_without_a_break(
    settings, tiny_config, monkeypatch
):
    config = dataclasses.replace(tiny_config, **settings)
    generator = torch.Generator().manual_seed(0)
    batches = [
        Batch(*(torch.randint(61, (2, 16), generator=generator) for _ in range(2)))
        for _ in range(2)
    ]
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return aot_eager(graph, inputs)

    monkeypatch.setattr(
        torch, "compile", functools.partial(torch.compile, fullgraph=True, backend=backend)
    )
    torch._dynamo.reset()
    aot_eager, found = torch._dynamo.lookup_backend("aot_eager"), []
    for mode in ("off", "whole"):
        model = make_model(config).train()
        compile_blocks(model, mode, device=torch.device("cpu"), say=print)
        graphs.clear()
        for batch in batches:
            model.zero_grad(set_to_none=True)
            loss = next_token(model, batch)
            loss.backward()
            found.append([loss.detach(), *(p.grad.clone() for p in model.parameters())])
    torch._dynamo.reset()
    assert len(graphs) == 1
    for one, other in zip(found[:2], found[2:], strict=True):
        torch.testing.assert_close(other, one, rtol=1e-3, atol=1e-4)


def test_a_sharded_model_is_not_compiled_whole(tiny_config):
    options = {"device": torch.device("cpu"), "dtype": torch.float32, "say": print}
    groups = (tiny_config, TrainingConfig(compile="whole"), ParallelConfig())
    with pytest.raises(
        UsageError, match="training.compile is whole, and parallel.strategy is fsdp"
    ):
        build_model(*groups, World(), "fsdp", **options)
