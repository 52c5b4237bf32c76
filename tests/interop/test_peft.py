import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from gpt.config import AdapterConfig, UsageError
from gpt.interop.huggingface import load_folder
from gpt.interop.peft import load_peft, save_peft
from gpt.model.adapter import adapt, adapter_weights, merge

peft = pytest.importorskip("peft", reason="needs peft")
transformers = pytest.importorskip("transformers", reason="needs transformers")
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated")


def gpt2():
    config = transformers.GPT2Config(vocab_size=50, n_positions=16, n_embd=32, n_layer=2, n_head=2)
    return transformers.GPT2LMHeadModel(config)


def llama():
    config = transformers.LlamaConfig(
        vocab_size=50, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=16,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config)


def neox():
    config = transformers.GPTNeoXConfig(
        vocab_size=50, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, max_position_embeddings=16,
    )  # fmt: skip
    return transformers.GPTNeoXForCausalLM(config)


MODELS = {
    "gpt2": (gpt2, ["c_attn", "c_proj", "c_fc"]),
    "llama": (llama, ["q_proj", "k_proj", "v_proj", "o_proj", "up_proj"]),
    "gpt_neox": (neox, ["query_key_value", "dense"]),
}


@pytest.fixture(params=MODELS)
def pair(request, tmp_path):
    """A model of transformers, the same one here, and names of its layers."""
    torch.manual_seed(1)
    make, names = MODELS[request.param]
    theirs = make().eval()
    theirs.save_pretrained(tmp_path / "base")
    ours = load_folder(tmp_path / "base", device="cpu", dtype=torch.float32, say=print)
    return theirs, ours, names


def learn(parameters):
    with torch.no_grad():
        for p in parameters:
            p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(3)) * 0.1)


def tokens():
    return torch.arange(32).view(2, 16) % 50


@pytest.mark.parametrize("stabilised", [False, True])
def test_peft_gives_the_logits_of_an_adapter_that_is_saved_here(pair, tmp_path, stabilised):
    theirs, ours, _ = pair
    targets = ("attn.*", "mlp.*")
    config = AdapterConfig(kind="lora", rank=3, targets=targets, rank_stabilised=stabilised)
    plain = ours(tokens())
    adapt(ours, config)
    learn(adapter_weights(ours).values())
    save_peft(ours, config, str(tmp_path / "base"), tmp_path / "adapter")
    loaded = peft.PeftModel.from_pretrained(theirs, tmp_path / "adapter").eval()
    logits = loaded(tokens()).logits
    assert (logits - plain).abs().max() > 1e-2
    assert (ours(tokens()) - logits).abs().max() < 1e-5


@pytest.mark.parametrize("stabilised", [False, True])
def test_an_adapter_of_peft_gives_its_logits_here(pair, tmp_path, stabilised):
    theirs, ours, names = pair
    settings = peft.LoraConfig(
        r=3,
        lora_alpha=5,
        target_modules=names,
        use_rslora=stabilised,
        fan_in_fan_out="c_attn" in names,
        task_type="CAUSAL_LM",
    )
    adapted = peft.get_peft_model(theirs, settings).eval()
    learn(p for name, p in adapted.named_parameters() if "lora_" in name)
    adapted.save_pretrained(tmp_path / "adapter")
    logits = adapted(tokens()).logits
    config, weights = load_peft(tmp_path / "adapter", ours)
    adapt(ours, config, weights)
    assert (ours(tokens()) - logits).abs().max() < 1e-5
    merge(ours)
    assert (ours(tokens()) - logits).abs().max() < 1e-5


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("use_dora", True),
        ("bias", "all"),
        ("rank_pattern", {"q": 2}),
        ("r", "x"),
        ("r", True),
        ("lora_dropout", "x"),
        ("lora_alpha", None),
        ("init_lora_weights", "pissa_niter_4"),
        ("alora_invocation_tokens", [1, 2]),
        ("layer_replication", [[0, 2], [1, 2]]),
    ],
)
def test_settings_of_peft_that_are_not_supported_are_named(field, value, pair, tmp_path):
    _, ours, _ = pair
    config = AdapterConfig(kind="lora")
    adapt(ours, config)
    save_peft(ours, config, "base", tmp_path / "adapter")
    path = tmp_path / "adapter" / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {field: value}))
    with pytest.raises(UsageError, match=rf"adapter_config.json.*\b{field}\b"):
        load_peft(tmp_path / "adapter", ours)


CHANGES = {
    "another rank": lambda a, b: (a[:-1], b[:, :-1]),
    "another number of columns": lambda a, b: (a, b[:, :-1]),
    "a vector": lambda a, b: (a[0], b),
    "a number that is none": lambda a, b: (a * torch.nan, b),
}


@pytest.mark.parametrize("change", CHANGES)
def test_matrices_that_do_not_fit_the_settings_are_refused(change, pair, tmp_path):
    _, ours, _ = pair
    config = AdapterConfig(kind="lora", rank=3)
    adapt(ours, config)
    save_peft(ours, config, "base", tmp_path / "adapter")
    path = tmp_path / "adapter" / "adapter_model.safetensors"
    tensors = load_file(path)
    name = min(n for n in tensors if ".lora_A." in n)
    other = name.replace(".lora_A.", ".lora_B.")
    a, b = CHANGES[change](tensors[name], tensors[other])
    save_file(tensors | {name: a.contiguous(), other: b.contiguous()}, path)
    with pytest.raises(UsageError, match="must have finite matrices of rank 3"):
        load_peft(tmp_path / "adapter", ours)


def test_a_bottleneck_has_no_form_in_peft(pair, tmp_path):
    _, ours, _ = pair
    config = AdapterConfig(kind="bottleneck")
    adapt(ours, config)
    with pytest.raises(UsageError, match="PEFT's format holds lora alone"):
        save_peft(ours, config, "base", tmp_path / "adapter")
