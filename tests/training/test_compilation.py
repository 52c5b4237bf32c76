import dataclasses
import functools
import subprocess

import pytest
import torch

from gpt.training.compilation import compile_blocks
from gpt.training.loss import summed_loss
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
def test_forward_loss_and_backward_are_one_graph_without_a_break(settings, tiny_config):
    model = make_model(dataclasses.replace(tiny_config, **settings)).train()
    generator = torch.Generator().manual_seed(0)
    tokens, targets = (torch.randint(61, (2, 16), generator=generator) for _ in range(2))

    def loss_of():
        return summed_loss(model(tokens), targets)

    found = []
    torch._dynamo.reset()
    for make_loss in (loss_of, torch.compile(loss_of, fullgraph=True, backend="aot_eager")):
        model.zero_grad(set_to_none=True)
        loss = make_loss()
        loss.backward()
        found.append([loss.detach(), *(p.grad.clone() for p in model.parameters())])
    torch._dynamo.reset()
    torch.testing.assert_close(found[1], found[0], rtol=1e-4, atol=1e-5)
