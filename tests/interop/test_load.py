"""Folders of models as people have them: what asks for too much, what does not fit, what is no
file, and files of any content.
"""

import dataclasses
import errno
import json
import os
import re
import time

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, GPT2LMHeadModel

import gpt
from gpt import checkpoint as checkpoints
from gpt import device
from gpt.checkpoint import State
from gpt.cli import main
from gpt.config import ModelConfig, UsageError
from gpt.data import tokenizer as tokenizers
from gpt.data.tokenizer import ByteTokenizer, CharTokenizer, GPT2Tokenizer
from gpt.interop.export import export_huggingface
from gpt.interop.families import FAMILIES
from gpt.interop.huggingface import load_folder
from gpt.interop.weights import exported
from tests.conftest import make_model

CONFIG = ModelConfig(vocab_size=257, context_length=16, n_layer=2, n_head=2, n_embd=8)


@pytest.fixture
def folder(tmp_path):
    export_huggingface(make_model(CONFIG), ByteTokenizer(), tmp_path / "model")
    return tmp_path / "model"


def edit(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"n_layer": 10**9}, "n_layer is 1,000,000,000, and the weights have 2 layers"),
        ({"vocab_size": 10**12}, "vocab_size and n_embd give wte.weight the shape"),
        ({"n_embd": 300_000}, "vocab_size and n_embd give wte.weight the shape .257, 300000"),
        ({"n_positions": 10**12}, "n_positions and n_embd give wpe.weight the shape"),
        ({"n_inner": 10**12}, "n_inner and n_embd give h.0.mlp.c_fc.weight the shape"),
        ({"n_head": 10**30}, "n_head has 100 bits"),
        ({"vocab_size": 0}, "vocab_size is 0, and must be at least 1"),
        ({"layer_norm_epsilon": 10**400}, "norm_eps"),
    ],
    ids=str,
)
def test_a_configuration_that_asks_for_more_than_the_weights_hold_is_refused_at_once(
    changes, said, folder
):
    edit(folder / "config.json", **changes)
    start = time.perf_counter()
    with pytest.raises(UsageError, match=f"config.json: .*{said}") as error:
        load_folder(folder)
    assert time.perf_counter() - start < 0.5
    assert "\n" not in str(error.value)


def test_a_model_that_its_files_hold_and_the_machine_does_not_is_refused(folder, monkeypatch):
    weights = make_model(CONFIG).parameter_count() * 4
    monkeypatch.setattr(device, "memory", lambda device: weights - 1)
    with pytest.raises(UsageError, match="the weights of .* need 0.0 GB, and this machine has"):
        load_folder(folder)
    load_folder(folder, dtype=torch.bfloat16)


def test_a_view_that_repeats_one_number_is_bounded_by_the_machine(folder):
    tensors = exported(make_model(CONFIG), FAMILIES["gpt2"])
    state = {name.removeprefix("transformer."): tensor for name, tensor in tensors}
    (folder / "model.safetensors").unlink()
    torch.save(
        state | {"wte.weight": torch.zeros(1, 1).expand(10**12, 8)}, folder / "pytorch_model.bin"
    )
    edit(folder / "config.json", vocab_size=10**12)
    with pytest.raises(UsageError, match="the weights of .* need 32,000.0 GB"):
        load_folder(folder)


@pytest.mark.parametrize(
    "prefix", ["module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module."]
)
@pytest.mark.parametrize("inner", ["transformer.", ""])
def test_the_names_of_what_wraps_a_model_do_not_count(prefix, inner, folder):
    path = folder / "model.safetensors"
    before = load_folder(folder)
    state = {prefix + name.replace("transformer.", inner): t for name, t in load_file(path).items()}
    save_file(state, path)
    after = load_folder(folder)
    for name, parameter in before.named_parameters():
        assert torch.equal(after.get_parameter(name), parameter)


def test_the_blocks_of_a_model_may_have_been_compiled_one_by_one(folder):
    path = folder / "model.safetensors"
    state = {re.sub(r"(h\.\d+)\.", r"\1._orig_mod.", n): t for n, t in load_file(path).items()}
    save_file(state, path)
    load_folder(folder)


def test_dropouts_that_differ_are_told_and_that_of_the_residuals_is_taken(folder):
    edit(folder / "config.json", attn_pdrop=0.3, resid_pdrop=0.2, embd_pdrop=0.0)
    said = []
    assert load_folder(folder, say=said.append).config.dropout == 0.2
    [line] = said
    assert "resid_pdrop 0.2, embd_pdrop 0.0, attn_pdrop 0.3" in line
    assert "set to resid_pdrop" in line
    edit(folder / "config.json", attn_pdrop=0.2, embd_pdrop=0.2)
    load_folder(folder, say=said.append)
    assert len(said) == 1


@pytest.mark.parametrize("kind", ["parameters", "float8", "sparse", "meta"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, None])
def test_tensors_of_a_pickle_work_or_are_named(kind, dtype, folder):
    model = make_model(CONFIG)
    state = dict(exported(model, FAMILIES["gpt2"]))
    name = "transformer.wte.weight"
    (folder / "model.safetensors").unlink()
    match kind:
        case "parameters":
            state = {k: torch.nn.Parameter(t) for k, t in state.items()}
        case "float8":
            state[name] = state[name].to(torch.float8_e4m3fn)
        case "sparse":
            state[name] = state[name].to_sparse()
        case "meta":
            state[name] = state[name].to("meta")
    torch.save(state, folder / "pytorch_model.bin")
    if kind == "parameters":
        loaded = load_folder(folder, dtype=dtype)
        assert torch.equal(loaded.embed.weight, model.embed.weight.to(dtype or torch.float32))
    else:
        with pytest.raises(UsageError, match=f"{name} in .*pytorch_model.bin is .*{kind}"):
            load_folder(folder, dtype=dtype)


def test_a_model_without_biases_is_exported_with_zeros_and_has_equal_logits(tmp_path):
    config = dataclasses.replace(CONFIG, bias=False, vocab_size=384)
    ours = make_model(config)
    export_huggingface(ours, ByteTokenizer(), tmp_path / "out")
    theirs, info = GPT2LMHeadModel.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert not theirs.transformer.h[1].attn.c_attn.bias.any()
    tokens = torch.randint(384, (2, 16))
    mine = ours(tokens)
    scale = mine.abs().max().item()
    torch.testing.assert_close(mine, theirs.eval()(tokens).logits, rtol=0, atol=1e-6 * scale)
    torch.testing.assert_close(
        load_folder(tmp_path / "out")(tokens), mine, rtol=0, atol=1e-6 * scale
    )


@pytest.mark.parametrize("error", [
    OSError(errno.ENOSPC, "No space left on device"),
    SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
])  # fmt: skip
def test_a_full_disk_ends_an_export_in_a_sentence_and_leaves_nothing(error, tmp_path, monkeypatch):
    def save(*arguments, **options):
        raise error

    monkeypatch.setattr("gpt.tensors.save_file", save)
    with pytest.raises(UsageError, match="out cannot be written: No space left on device"):
        export_huggingface(make_model(CONFIG), ByteTokenizer(), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


FILES = ["config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"]


@pytest.mark.parametrize("name", [*FILES, "pytorch_model.bin", "model.safetensors.index.json"])
@pytest.mark.parametrize("kind", ["fifo", "folder", "device"])
def test_what_is_no_file_is_told_and_never_waited_for(name, kind, folder):
    if name not in FILES:
        (folder / "model.safetensors").unlink()
    (folder / name).unlink(missing_ok=True)
    match kind:
        case "fifo":
            os.mkfifo(folder / name)
        case "folder":
            (folder / name).mkdir()
        case "device":
            (folder / name).symlink_to("/dev/zero")
    what = "a folder" if kind == "folder" else "a pipe or a device"
    with pytest.raises(UsageError, match=f"{re.escape(name)} is {what}, and must be a file"):
        gpt.load(folder)


@pytest.mark.parametrize("name", ["a\0b", "x" * 5000, "a/" + "b" * 300, "\udcff", 3, None, b"x"])
def test_a_name_that_no_folder_has_is_told(name):
    with pytest.raises(UsageError, match="model is"):
        gpt.load(name)


# tokenizers


@pytest.mark.parametrize("later", [256, None], ids=str)
@pytest.mark.parametrize("ends", [[257, 256], 257, ["a", 257], [1, 257]], ids=str)
def test_a_configuration_may_name_several_ends_of_a_text(ends, later, tmp_path):
    model = make_model(dataclasses.replace(CONFIG, vocab_size=258))
    export_huggingface(model, ByteTokenizer(), tmp_path / "out")
    path = tmp_path / "out" / "tokenizer.json"
    content = json.loads(path.read_text())
    content["added_tokens"].append(content["added_tokens"][0] | {"id": 257, "content": "<|end|>"})
    path.write_text(json.dumps(content))
    edit(tmp_path / "out" / "config.json", eos_token_id=ends)
    edit(tmp_path / "out" / "generation_config.json", eos_token_id=later)
    loaded = gpt.load(tmp_path / "out")
    tokenizer = loaded.tokenizer
    several = {256, 257}  # the tokenizer's own file has 256
    assert tokenizers.ends_of(tokenizer) == several
    for end in several:
        [got] = gpt.generate(loaded, "x", max_new_tokens=4, bias={end: 1e6})
        assert (got.tokens, got.text, got.reason) == ([end], "", "end_of_text")
    saved = tmp_path / "tokenizer.json"
    saved.write_text(tokenizers.to_json(tokenizer))
    assert tokenizers.ends_of(tokenizers.load(saved)) == several
    export_huggingface(loaded.model, tokenizer, tmp_path / "again")
    assert tokenizers.ends_of(gpt.load(tmp_path / "again").tokenizer) == several
    assert tokenizer.end_of_text == 257
    assert tokenizer.decode_bytes([256, 257]) == b""


def own_tokenizers():
    return {
        "byte": ByteTokenizer(),
        "char": CharTokenizer("ROMEO: naïve 東\n don't 123"),
        "gpt2": GPT2Tokenizer.released(),
    }


@pytest.mark.parametrize("kind", ["byte", "char", "gpt2"])
def test_a_tokenizer_that_transformers_wrote_again_is_the_same(kind, tmp_path):
    tokenizer = own_tokenizers()[kind]
    config = dataclasses.replace(CONFIG, vocab_size=tokenizer.vocab_size)
    export_huggingface(make_model(config), tokenizer, tmp_path / "out")
    before = gpt.load(tmp_path / "out").tokenizer
    AutoTokenizer.from_pretrained(tmp_path / "out").save_pretrained(tmp_path / "again")
    content = json.loads((tmp_path / "again" / "tokenizer.json").read_text())
    assert content["post_processor"]["type"] == "TemplateProcessing"  # or it tests nothing
    for path in (tmp_path / "again").iterdir():
        path.replace(tmp_path / "out" / path.name)
    _, again = gpt.load(tmp_path / "out")
    assert tokenizers.fingerprint(again) == tokenizers.fingerprint(before)
    special = {"SpecialToken": {"id": "<|endoftext|>", "type_id": 0}}
    content["post_processor"]["single"].insert(0, special)
    content["post_processor"]["special_tokens"] = {}
    (tmp_path / "out" / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(UsageError, match="SpecialToken.* in its post_processor"):  # without its id
        gpt.load(tmp_path / "out")


def test_a_token_beyond_the_models_rows_does_no_harm_until_it_is_used(folder, tmp_path):
    theirs = AutoTokenizer.from_pretrained(folder)
    theirs.add_special_tokens({"pad_token": "[PAD]"})
    theirs.add_tokens(["<chat>"])
    theirs.save_pretrained(folder)
    assert theirs.convert_tokens_to_ids(["[PAD]", "<chat>"]) == [257, 258]
    model, tokenizer = gpt.load(folder)
    assert (tokenizer.vocab_size, tokenizer.end_of_text) == (257, 256)
    [made] = gpt.generate((model, tokenizer), "a [PAD]", max_new_tokens=3, temperature=0)
    assert len(made.tokens) == 3
    with pytest.raises(
        UsageError, match="the token '<chat>' with the id 258, and the model's last id"
    ):
        gpt.generate((model, tokenizer), "a <chat>")
    (tmp_path / "own.json").write_text(tokenizers.to_json(tokenizer))
    again = tokenizers.load(tmp_path / "own.json")
    with pytest.raises(UsageError, match="'<chat>'"):
        again.encode("<chat>")
    assert again.encode("abc").tolist() == tokenizer.encode("abc").tolist()
    export_huggingface(model, tokenizer, tmp_path / "out")  # with what the model has rows for
    assert len(AutoTokenizer.from_pretrained(tmp_path / "out")) == 257


def test_a_vocabulary_larger_than_the_model_is_refused(folder):
    model = make_model(dataclasses.replace(CONFIG, vocab_size=200))
    save_file(
        dict(exported(model, FAMILIES["gpt2"])),
        folder / "model.safetensors",
        metadata={"format": "pt"},
    )
    edit(folder / "config.json", vocab_size=200)
    with pytest.raises(UsageError, match="no end-of-text token .* the model's 200 rows"):
        gpt.load(folder)


def run_of(path, tokenizer, *, rows=0, progress=True):
    model = make_model(dataclasses.replace(CONFIG, vocab_size=rows or tokenizer.vocab_size))
    path.mkdir()
    (path / "tokenizer.json").write_text(tokenizers.to_json(tokenizer))
    own = {"tokenizer": tokenizers.fingerprint(tokenizer).hex()}
    state = State(
        step=1,
        model=model.config,
        weights=dict(model.named_parameters()),
        training={},
        progress=own if progress else {},
        metrics={},
    )
    checkpoints.save(path, state)
    return path


@pytest.mark.parametrize("knows", [True, False], ids=["fingerprint", "size"])
@pytest.mark.parametrize("words", [
    ["evaluate", "RUN", "--text", "TEXT"],
    ["export", "RUN", "OUT"],
    ["export", "RUN", "OUT", "--to", "packed"],
    ["sample", "--model", "RUN", "--prompt", "a"],
], ids=lambda words: " ".join(words))  # fmt: skip
def test_a_run_with_another_runs_tokenizer_is_refused_by_every_command(
    words, knows, tmp_path, capsys
):
    run = run_of(tmp_path / "run", CharTokenizer("abc"), progress=knows)
    text = tmp_path / "text"
    text.write_text("abc" * 50)
    places = {"RUN": run, "TEXT": text, "OUT": tmp_path / "out"}
    other = CharTokenizer("abd") if knows else CharTokenizer("abcd")  # of a size, or larger
    (run / "tokenizer.json").write_text(tokenizers.to_json(other))
    assert main([str(places.get(word, word)) for word in words]) == 2
    said = capsys.readouterr().err
    assert "was trained with" in said if knows else "belongs to another model" in said
    assert not (tmp_path / "out").exists()
    (run / "tokenizer.json").write_text(tokenizers.to_json(CharTokenizer("abc")))
    assert main([str(places.get(word, word)) for word in words]) == 0


def test_a_run_with_its_own_tokenizer_and_more_rows_is_loaded(tmp_path):
    assert (
        gpt.load(run_of(tmp_path / "run", CharTokenizer("abc"), rows=64)).model.config.vocab_size
        == 64
    )


def test_a_run_remembers_its_tokenizer(text_file, tmp_path):
    run = tmp_path / "run"
    words = f"--data.source {text_file} --run_dir {run} --model.context_length 16 --model.n_layer 1"
    words += " --model.n_head 1 --model.n_embd 8 --training.max_steps 1 --training.batch_tokens 32"
    words += " --training.micro_batch_size 2 --evaluation.windows 2 --evaluation.sample_tokens 0"
    assert main(["train", *words.split(), "--training.device", "cpu"]) == 0
    _, tokenizer = gpt.load(run)
    other = CharTokenizer(tokenizer.characters.replace(tokenizer.characters[-1], "é"))
    assert other.vocab_size == tokenizer.vocab_size
    (run / "tokenizer.json").write_text(tokenizers.to_json(other))
    with pytest.raises(UsageError, match="is another one than the checkpoint .* was trained with"):
        gpt.load(run)


# files of any content


LEAVES = [None, True, False, 10**30, 1e308, 0.5, "", "a", "gpt2", "<|endoftext|>", "0", "../x"]
ODD = st.recursive(
    st.sampled_from([*LEAVES, "\0", "model.safetensors", "é"]) | st.integers(-2, 300),
    lambda some: (
        st.lists(some, max_size=3) | st.dictionaries(st.text(max_size=2), some, max_size=3)
    ),
    max_leaves=5,
)
RAW = [
    b"", b"[", b"{}", b"[]", b"null", b"3", b"\xff", b'{"a": "\xff"}', b"[" * 100_000,
    b'{"n_layer": ' + b"9" * 5000 + b"}", b'{"a": "\\ud800"}', b'{"vocab_size": NaN}',
    b'{"model": {"vocab": {"a": 0, "b": 0}, "merges": [["a", "b"], ["a", "b"]]}}',
]  # fmt: skip
SETTINGS = settings(
    max_examples=120,
    derandomize=True,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


def mutated(data, value):
    """``value`` with one or two of its places changed, left out, or filled with anything."""
    for _ in range(data.draw(st.integers(1, 2))):
        value = json.loads(json.dumps(value))
        holder = value
        while True:
            keys = sorted(holder) if isinstance(holder, dict) else range(len(holder))
            key = data.draw(st.sampled_from(list(keys)[:40] + list(keys)[-3:]))
            inner = holder[key]
            if not (isinstance(inner, dict | list) and inner and data.draw(st.booleans())):
                break
            holder = inner
        match data.draw(st.sampled_from(["change", "change", "leave out", "again"])):
            case "change":
                holder[key] = data.draw(ODD)
            case "leave out":
                del holder[key]
            case "again" if isinstance(holder, list):
                holder.append(inner)
    return value


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A valid folder for each kind of file that is parsed: (folder, file, content)."""
    place = tmp_path_factory.mktemp("folders")
    found = []
    for kind, tokenizer in own_tokenizers().items():
        if kind != "gpt2":
            config = dataclasses.replace(CONFIG, vocab_size=tokenizer.vocab_size)
            export_huggingface(make_model(config), tokenizer, place / kind)
            found += [(place / kind, "tokenizer.json")]
    found += [(place / "byte", "config.json"), (place / "byte", "tokenizer_config.json")]
    export_huggingface(make_model(CONFIG), ByteTokenizer(), place / "pair")
    state = json.loads((place / "pair" / "tokenizer.json").read_text())
    (place / "pair" / "tokenizer.json").unlink()
    (place / "pair" / "vocab.json").write_text(json.dumps(state["model"]["vocab"]))
    (place / "pair" / "merges.txt").write_text("#version: 0.2\n")
    (place / "pair" / "added_tokens.json").write_text("{}")
    more = {"256": {"content": "<|endoftext|>", "special": True}}
    edit(place / "pair" / "tokenizer_config.json", added_tokens_decoder=more)
    found += [(place / "pair", name) for name in ("vocab.json", "tokenizer_config.json")]
    found += [(place / "pair", "added_tokens.json"), (place / "pair", "merges.txt")]
    export_huggingface(make_model(CONFIG), ByteTokenizer(), place / "sharded")
    weights = place / "sharded" / "model.safetensors"
    places = dict.fromkeys(load_file(weights), "part.safetensors")
    weights.rename(weights.with_name("part.safetensors"))
    index = weights.with_name("model.safetensors.index.json")
    index.write_text(json.dumps({"metadata": {}, "weight_map": places}))
    found += [(place / "sharded", index.name)]
    for folder in {folder for folder, _ in found}:
        gpt.load(folder)
    return [(folder, name, (folder / name).read_bytes()) for folder, name in found]


def loads_or_is_told(folder, name, content, original):
    (folder / name).write_bytes(content)
    told = str(folder)
    try:
        gpt.load(folder)
    except UsageError as error:
        told = str(error)
    finally:
        (folder / name).write_bytes(original)
    assert str(folder) in told
    assert len(told) < 900


@SETTINGS
@given(data=st.data())
def test_json_of_any_content_ends_in_a_sentence_that_names_the_file(data, folders):
    folder, name, original = data.draw(st.sampled_from([f for f in folders if "txt" not in f[1]]))
    content = json.loads(original)
    if content:
        loads_or_is_told(folder, name, json.dumps(mutated(data, content)).encode(), original)


@SETTINGS
@given(data=st.data())
def test_bytes_of_any_content_end_in_a_sentence_that_names_the_file(data, folders):
    folder, name, original = data.draw(st.sampled_from(folders))
    content = bytearray(original)
    for _ in range(data.draw(st.integers(0, 2))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    loads_or_is_told(folder, name, bytes(content), original)


def test_content_that_no_parser_expects_ends_in_a_sentence_that_names_the_file(folders):
    for folder, name, original in folders:
        for content in [*RAW, b"\xef\xbb\xbf" + original]:
            loads_or_is_told(folder, name, content, original)


@pytest.mark.parametrize("name", ["tokenizer.json", "config.json"])
def test_one_wrong_byte_does_not_show_the_whole_file(name, folder):
    content = (folder / name).read_bytes()
    (folder / name).write_bytes(content[:-3] + b"\xff" + content[-3:])
    with pytest.raises(UsageError, match=f"{name} is not UTF-8 text: .* at byte") as error:
        gpt.load(folder)
    assert len(str(error.value)) < 400
