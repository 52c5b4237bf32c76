import dataclasses
import math
import os
import re
from pathlib import Path
from typing import Literal, get_origin

import pytest
import torch

from gpt import config as configs
from gpt.config import (
    EvaluateConfig,
    ExportConfig,
    InspectConfig,
    ModelConfig,
    PrepareConfig,
    ReportConfig,
    SampleConfig,
    SamplingConfig,
    ServeConfig,
    TrainConfig,
    TrainingConfig,
    UsageError,
    parse,
    to_toml,
    unescaped,
    with_present_names,
)
from gpt.config.toml import _check_names
from gpt.model.gpt import GPT, parameter_count

CONFIGS = sorted(Path(__file__).parent.parent.joinpath("configs").rglob("*.toml"))
TECHNIQUES = [path for path in CONFIGS if path.parent.name == "techniques"]
GPT2 = {
    "gpt2": 124_439_808, "gpt2_medium": 354_823_168, "gpt2_large": 774_030_080,
    "gpt2_xl": 1_557_611_200,
}  # fmt: skip
"""Parameters, of the published weights."""
GPT3 = {
    "125m": 125e6, "350m": 350e6, "760m": 760e6, "1.3b": 1.3e9, "2.7b": 2.7e9, "6.7b": 6.7e9,
    "13b": 13e9, "175b": 175e9,
}  # fmt: skip
"""Parameters, of table 2.1 of Brown et al. (2020): 350M is its number for 356 million."""


def test_there_are_configurations():
    assert any(path.name == "shakespeare.toml" for path in CONFIGS)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.name)
def test_every_configuration_of_the_project_parses(path):
    words = ["--init", "model"] if path.name == "finetune.toml" else []
    assert isinstance(parse(TrainConfig, [str(path), *words], prog="train.py"), TrainConfig)


def model_of(path):
    """The model of a configuration, on characters where the text decides the vocabulary."""
    words = ["--init", "model"] if path.name == "finetune.toml" else []
    model = parse(TrainConfig, [str(path), *words], prog="train.py").model
    return dataclasses.replace(
        model, vocab_size=model.vocab_size or 65, context_length=model.context_length or 8
    )


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.name)
def test_every_configuration_of_the_project_builds(path):
    with torch.device("meta"):
        model = GPT(model_of(path))
    assert model.parameter_count() == parameter_count(model.config)


@pytest.mark.parametrize("size", [*GPT2, *GPT3])
def test_a_published_model_has_the_published_number_of_parameters(size):
    folder = CONFIGS[0].parent
    [path] = [p for p in folder.glob("*.toml") if p.stem in (size, f"gpt3_{size}")]
    count = parameter_count(model_of(path))
    assert count == GPT2.get(size) or count == pytest.approx(GPT3.get(size), rel=0.02)


def test_gpt_3_alternates_dense_and_banded_layers():
    paths = [path for path in CONFIGS if path.name.startswith("gpt3_")]
    assert len(paths) == len(GPT3)
    for path in paths:
        model = model_of(path)
        assert model.layer_pattern() == "GL" * (model.n_layer // 2)
        assert model.context_length == 2048 > model.window


@pytest.mark.parametrize("path", TECHNIQUES, ids=lambda p: p.name)
def test_a_technique_changes_the_model_alone(path):
    base, mine = (
        parse(TrainConfig, [str(each)], prog="train.py")
        for each in (path.with_name("gpt2.toml"), path)
    )
    assert (base.model == mine.model) == (path.name == "gpt2.toml")
    precision = mine.training.precision  # float32 for experts
    training = dataclasses.replace(base.training, precision=precision)
    assert dataclasses.replace(base, model=mine.model, training=training) == mine


def test_the_command_line_beats_the_toml_and_the_toml_beats_the_defaults(tmp_path):
    path = tmp_path / "run.toml"
    path.write_text("[model]\nn_layer = 3\nn_embd = 96\n[optimizer]\nname = 'muon'\n")
    config = parse(TrainConfig, [str(path), "--model.n_layer", "5"], prog="train.py")
    assert (config.model.n_layer, config.model.n_embd, config.model.n_head) == (5, 96, 12)
    assert config.optimizer.name == "muon"


def test_hyphens_and_underscores_are_the_same():
    one = parse(TrainConfig, ["--model.n-layer=3", "--training.max-steps", "7"], prog="train.py")
    two = parse(TrainConfig, ["--model.n_layer=3", "--training.max_steps", "7"], prog="train.py")
    assert one == two
    assert one.model.n_layer == 3


@pytest.mark.parametrize(
    "config",
    [
        TrainConfig(),
        TrainConfig(
            run_dir='runs/a "quoted" \\ name\x7f é',
            resume=True,
            model=ModelConfig(bias=False, dropout=0.25, norm_eps=1e-6),
        ),
    ],
)
def test_a_configuration_written_as_toml_is_read_back_equal(config, tmp_path):
    path = tmp_path / "config.toml"
    path.write_text(to_toml(config), encoding="utf-8")
    assert parse(type(config), [str(path)], prog="train.py") == config


def test_lists_in_toml_are_read(tmp_path):
    path = tmp_path / "sample.toml"
    path.write_text('stop = ["a b", "c"]\n')
    assert parse(SampleConfig, [str(path)], prog="sample.py").stop == ("a b", "c")


@pytest.mark.parametrize(
    ("schema", "words", "said"),
    [
        (TrainConfig, ["--model.n_layr=3"], "'--model.n_layr'; did you mean --model.n_layer?"),
        (TrainConfig, ["--model.no-biass"], "'--model.no_biass'; did you mean --model.no_bias?"),
        (TrainConfig, ["--max_steps", "3"], "'--max_steps'; did you mean --training.max_steps?"),
        (SampleConfig, ["--xyzzy\x1b"], "'--xyzzy\\x1b'; --help lists the options"),
        (ExportConfig, ["--model", "m"], "'--model'; --help lists the options"),
    ],
)
def test_a_misspelt_option_gets_the_nearest_right_one(schema, words, said):
    with pytest.raises(UsageError, match=f"^unknown option {re.escape(said)}$"):
        parse(schema, words, prog="gpt")


def test_a_misspelt_field_in_toml_is_told_with_its_file(tmp_path):
    path = tmp_path / "run.toml"
    path.write_text("[model]\nn_layr = 3\n")
    said = f"unknown option '--model.n_layr' in {path}; did you mean --model.n_layer?"
    with pytest.raises(UsageError, match=f"^{re.escape(said)}$"):
        parse(TrainConfig, [str(path)], prog="train.py")


@pytest.mark.parametrize("value", ["--", "-5", "--- x", "---"])
def test_a_value_that_only_looks_like_an_option_is_a_value(value):
    assert parse(SampleConfig, [f"--prompt={value}"], prog="gpt").prompt == value


@pytest.mark.parametrize("schema", [TrainConfig, SampleConfig, PrepareConfig, EvaluateConfig])
def test_every_option_that_the_help_lists_is_known(schema, capsys):
    with pytest.raises(SystemExit):
        parse(schema, ["--help"], prog="gpt")
    listed = re.findall(r"^\W*(--[\w.]+\w)", capsys.readouterr().out, re.MULTILINE)
    assert len(listed) > 5
    _check_names(schema, listed, "")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--training.precision=float8"], "'float16'"),
        (["--model.n_layer=many"], "'many'"),
    ],
)
def test_a_wrong_value_is_told_with_what_is_allowed(words, said, capsys):
    with pytest.raises(SystemExit) as exit_:
        parse(TrainConfig, words, prog="train.py")
    assert exit_.value.code == 2
    assert said in " ".join(re.sub(r"[│╭╮╰╯─]", " ", capsys.readouterr().err).split())


def test_a_value_that_the_configuration_refuses_is_told_by_its_own_sentence(capsys):
    with pytest.raises(UsageError, match="^model.n_layer is 0, and must be at least 1$"):
        parse(TrainConfig, ["--model.n_layer=0"], prog="train.py")
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("text", "said"),
    [("[model", "not valid TOML"), (None, "cannot be read: No such file"), (b"\xff", "not valid")],
)
def test_a_toml_that_cannot_be_read_is_named(text, said, tmp_path):
    path = tmp_path / "run.toml"
    if text is not None:
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(UsageError, match=said) as error:
        parse(TrainConfig, [str(path)], prog="train.py")
    assert str(path) in str(error.value)


@pytest.mark.parametrize(
    ("schema", "values", "field"),
    [
        (ModelConfig, {"n_embd": 10, "n_head": 4}, "model.n_embd"),
        (ModelConfig, {"n_head": 4, "n_embd": 8, "n_kv_head": 3}, "model.n_kv_head"),
        (ModelConfig, {"dropout": 1.0}, "model.dropout"),
        (ModelConfig, {"dropout": float("nan")}, "model.dropout"),
        (ModelConfig, {"norm_eps": 0.0}, "model.norm_eps"),
        (ModelConfig, {"vocab_size": -1}, "model.vocab_size"),
        (ModelConfig, {"context_length": -1}, "model.context_length"),
        (SamplingConfig, {"temperature": -0.1}, "temperature"),
        (SamplingConfig, {"temperature": float("inf")}, "temperature"),
        (SamplingConfig, {"temperature": 1e-40}, "temperature"),
        (SampleConfig, {"seed": 2**64}, "seed"),
        (TrainingConfig, {"seed": 2**64}, "training.seed"),
        (SamplingConfig, {"top_k": -1}, "top_k"),
        (SamplingConfig, {"top_p": 0.0}, "top_p"),
        (SamplingConfig, {"top_p": 1.5}, "top_p"),
        (SampleConfig, {"num_samples": 0}, "num_samples"),
        (SampleConfig, {"max_new_tokens": 0}, "max_new_tokens"),
        (SampleConfig, {"stop": ("",)}, "stop"),
        (SampleConfig, {"prompt": "a", "prompt_file": Path("b")}, "prompt_file"),
    ],
)
def test_an_impossible_value_is_refused_and_its_field_named(schema, values, field):
    with pytest.raises(UsageError, match=field.replace(".", r"\.")):
        schema(**values)


def test_a_pattern_may_be_longer_than_the_model():
    for n, letters in ((1, "G"), (5, "GLGLG")):
        model = ModelConfig(n_layer=n, window=8, sinks=2, window_pattern="GL").resolved()
        assert model.resolved() == model
        assert model.layer_pattern() == letters


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"rotary_base": 500.0}, "rotary_base is 500.0, and has an effect only with"),
        ({"rotary_fraction": 0.5}, "rotary_fraction is 0.5, and has an effect only with"),
        ({"position": "rotary", "rotary_scaling_factor": 8.0}, "only with model.rotary_scaling"),
        ({"position": "rotary", "rotary_base_local": 50.0}, "only with rotary positions and local"),
        ({"sparse_block": 3}, "sparse_block is 3, and has an effect only with sparse layers"),
        ({"moe_renormalise": True}, "moe_renormalise is True, and has an effect only with"),
        ({"moe_score": "sigmoid"}, "moe_score is 'sigmoid', and has an effect only with"),
        ({"moe_shared": 1}, "moe_shared is 1, and has an effect only with model.n_expert"),
        ({"n_expert_active": 2}, "n_expert_active is 2, and model.n_expert is 0"),
        (
            {"position": "rotary", "window": 4, "rotary_base_local": 0.5},
            "rotary_base_local is 0.5, and must be 0 or above 1",
        ),
        (
            {
                "position": "rotary", "rotary_scaling": "llama3", "rotary_scaling_factor": 8.0,
                "rotary_low_frequency": 4.0, "rotary_high_frequency": 4.0,
            },
            "rotary_low_frequency is 4.0, and must be below",
        ),
        (
            {"position": "xpos", "rotary_scaling": "dynamic_ntk", "rotary_scaling_factor": 2.0},
            "'dynamic_ntk' needs model.position 'rotary'",
        ),
        ({"rotary_scaling": "yarn", "rotary_scaling_factor": 2.0}, "'learned' is not rotary"),
        (
            {"position": "rotary", "rotary_scaling": "llama3"},
            "needs a model.rotary_scaling_factor above 1",
        ),
        ({"initial": "zero", "norm_placement": "post"}, "which model.norm_placement 'post' undoes"),
        ({"window_pattern": "LX"}, "must have only the letters G, L, S"),
        ({"window_pattern": "LG"}, "need a model.window of at least 1"),
        ({"window": 4, "window_pattern": "G"}, "no layer of model.window_pattern 'G' is local"),
        ({"sinks": 2}, "only local layers have sinks"),
        ({"norm_weight": False, "norm_bias": "yes"}, "needs model.norm_weight"),
        ({"position": "sinusoidal", "n_embd": 15, "n_head": 3}, "needs an even number"),
        ({"position": "rotary", "n_embd": 15, "n_head": 3}, "needs heads of an even width"),
    ],
    ids=str,
)  # fmt: skip
def test_a_model_that_contradicts_itself_or_sets_what_does_nothing_is_refused(fields, said):
    with pytest.raises(UsageError, match=re.escape(said)):
        ModelConfig(**fields)


def test_batch_tokens_that_do_not_divide_are_refused_with_the_nearest_that_do():
    config = TrainConfig()
    training = dataclasses.replace(config.training, batch_tokens=40_000)
    with pytest.raises(UsageError, match=r"training\.batch_tokens is 40000.*32768 is the nearest"):
        dataclasses.replace(config, training=training)


def test_a_run_is_named_for_its_source():
    config = parse(TrainConfig, ["--data.source", "books/my_book.txt"], prog="train.py")
    assert config.run == Path("runs/my_book")
    assert config.cache_dir == Path("runs/my_book/data")


def test_a_toml_needs_to_make_sense_only_with_the_command_line(tmp_path):
    path = tmp_path / "run.toml"
    path.write_text("[model]\ncontext_length = 100\n")
    config = parse(TrainConfig, [str(path), "--training.batch_tokens=1600"], prog="train.py")
    assert (config.model.context_length, config.training.batch_tokens) == (100, 1600)


GROUPS = [
    cls
    for cls in vars(configs).values()
    if isinstance(cls, type) and dataclasses.is_dataclass(cls) and cls.__name__.endswith("Config")
]
REQUIRED = {
    ExportConfig: {"model": "m", "out": Path("o")},
    EvaluateConfig: {"models": ("m",)},
    PrepareConfig: {"sources": ("s",)},
    InspectConfig: {"path": Path("p")},
    ServeConfig: {"model": "m"},
    ReportConfig: {"runs": ("r",)},
}
REQUIRED[EvaluateConfig]["text"] = "t"
WRONG = {
    int: [1.5, "1", None, True, 10**5000, -(2**63) - 1],
    float: ["1", None, True, math.nan, math.inf],
    bool: [1, "yes", None],
    str: [1, None, b"x", "nul\0", "\ud800"],
    Path: [1, None, Path("nul\0")],
    int | None: [1.5, "1", True],
    str | None: [1, b"x"],
    Path | None: [1],
    tuple[str, ...] | None: [1, "a.html", [1], [[1, 2], [3]]],
}


def fields_of(groups):
    return [
        pytest.param(cls, item, id=f"{cls.__name__}.{item.name}")
        for cls in groups
        for item in dataclasses.fields(cls)
    ]


@pytest.mark.parametrize(("cls", "item"), fields_of(GROUPS))
def test_no_field_takes_a_value_of_another_type(cls, item):
    wrong = WRONG.get(item.type, [])
    if get_origin(item.type) is Literal or dataclasses.is_dataclass(item.type):
        wrong = ["no such choice", 7, None, []]
    for value in wrong:
        with pytest.raises(UsageError, match=rf"^([a-z]+\.)?{item.name} (is|has) .*must be|which"):
            cls(**REQUIRED.get(cls, {}) | {item.name: value})


@pytest.mark.parametrize(
    ("cls", "item"),
    [p for p in fields_of(GROUPS) if p.values[1].type in (int, float, int | None)],
)
def test_each_number_has_bounds_or_any_is_right(cls, item):
    bounds = item.metadata.get("bounds")
    if bounds is None:
        assert item.name in ("presence_penalty", "frequency_penalty", "length_penalty")
        return
    for bound, beyond in (
        (bounds.at_least, bounds.at_least - 1),
        (bounds.at_most, bounds.at_most + 1),
        (bounds.above, bounds.above),
        (bounds.below, bounds.below),
    ):
        if math.isfinite(bound):
            with pytest.raises(UsageError, match=rf"{item.name} is .*, and must be {bounds}"):
                cls(**REQUIRED.get(cls, {}) | {item.name: beyond})


def test_none_is_a_text_where_a_text_is_wanted():
    config = parse(SampleConfig, ["--prompt", "None"], prog="sample.py")
    assert config.prompt == "None"
    config = parse(SampleConfig, ["--prompt_file", "None.jsonl", "--out", "None"], prog="sample.py")
    assert (config.prompt, config.out) == (None, Path("None"))
    assert parse(SampleConfig, ["--explain"], prog="sample.py").explain == ()
    assert parse(SampleConfig, ["--explain", "a.html"], prog="sample.py").explain == ("a.html",)
    config = parse(SampleConfig, ["--seed", "None", "--logprobs", "3"], prog="sample.py")
    assert (config.seed, config.logprobs, config.explain) == (None, 3, None)


def test_escapes_are_those_that_are_documented():
    assert unescaped(r"\n\t\\n\x") == "\n\t\\n\\x"


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("a = " + "[" * 100_000, "nested too deeply|not valid TOML"),
        ("a = " + "[" * 20_000 + "]" * 20_000, "nested too deeply|not valid TOML"),
        ("a." * 5_000 + "a = 1", "nested too deeply|not valid TOML"),
        ("seed = " + "9" * 5000, "not valid TOML: Exceeds the limit"),
        ("seed = 0x" + "f" * 5000, "not valid TOML: Exceeds the limit"),
        ('run_dir = "a\\u0000b"', "run_dir=a.* has a NUL in it"),
        ('[data]\nsource = "a\\u0000b"', "data.source=a.* has a NUL in it"),
        ("FIFO", "is a folder, a pipe or a device, and must be a file"),
        ("FOLDER", "is a folder, a pipe or a device, and must be a file"),
    ],
)
def test_a_strange_toml_is_told_in_a_sentence(content, said, tmp_path):
    path = tmp_path / "run.toml"
    if content == "FIFO":
        os.mkfifo(path)
    elif content == "FOLDER":
        path.mkdir()
    else:
        path.write_text(content)
    with pytest.raises(UsageError, match=said) as error:
        parse(TrainConfig, [str(path)], prog="train.py")
    assert str(path) in str(error.value)
    assert len(str(error.value)) < 900


def test_a_toml_of_windows_is_read(tmp_path):
    path = tmp_path / "run.toml"
    path.write_bytes("\ufeff[model]\r\nn_layer = 3\r\n".encode())
    assert parse(TrainConfig, [str(path)], prog="train.py").model.n_layer == 3


def test_names_of_older_versions_still_mean_the_same(tmp_path):
    (tmp_path / "old.toml").write_text('[model]\nnorm = "layer"\n')
    config = parse(TrainConfig, [str(tmp_path / "old.toml")], prog="train")
    assert config.model.norm == "layernorm"
    old = dataclasses.asdict(ModelConfig()) | {"norm": "layer"}
    assert ModelConfig(**with_present_names(old)) == ModelConfig()
    assert with_present_names({"norm": 3, "n_head": "layer"}) == {"norm": 3, "n_head": "layer"}
