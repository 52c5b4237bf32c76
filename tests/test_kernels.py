"""The kernels' file: whose it is, where it lies, what compiles it; and what they refuse to read."""

import dataclasses
import functools
import os
import platform
import pwd
import subprocess
import sys
import tempfile

import pytest
import torch

from gpt import cpp_library, kernels
from gpt.config import ModelConfig, UsageError

NEEDS_A_COMPILER = pytest.mark.skipif(
    kernels.library() is None, reason=f"no kernels: {kernels.problem()}"
)
STUB = 'extern "C" { void gpt_linear() {} void gpt_dense() {} void gpt_blocks() {} }'
SCRIPT = """\
echo "$@" >> {log}
while [ $# -gt 0 ]; do if [ "$1" = -o ]; then out=$2; fi; shift; done
cp {stub} "$out"
"""


@pytest.fixture(scope="module")
def stub(tmp_path_factory):
    """A shared library that has the kernels' names."""
    folder = tmp_path_factory.mktemp("stub")
    (folder / "stub.cpp").write_text(STUB)
    command = ["c++", "-shared", "-fPIC", "-o", folder / "stub.so", folder / "stub.cpp"]
    subprocess.run(command, check=True)
    return folder / "stub.so"


@pytest.fixture
def compiled(stub, monkeypatch, tmp_path):
    """Each call's words of a compiler that is there at once, and gives the stub; home, temporary
    folder and cache are new.
    """
    log, script = tmp_path / "log", tmp_path / "compiler.sh"
    script.write_text(SCRIPT.format(log=log, stub=stub))
    for name in ("home", "temporary", "elsewhere"):
        (tmp_path / name).mkdir()
    monkeypatch.setenv("CXX", f"/bin/sh {script}")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    monkeypatch.setattr(
        kernels, "_library", functools.cache(kernels._library.__wrapped__)
    )  # nothing is loaded yet
    yield lambda: log.read_text().splitlines() if log.exists() else []
    assert not list((tmp_path / "temporary").iterdir())  # nothing stays


def kept_in(folder):
    return sorted((folder / "gpt").iterdir())


@NEEDS_A_COMPILER
def test_the_kernels_are_compiled_once_and_then_found(compiled, tmp_path):
    kernels.load()
    [kept] = kept_in(tmp_path / "home/.cache")
    before = kept.stat().st_mtime_ns
    kernels.load()
    assert [path.stat().st_mtime_ns for path in kept_in(tmp_path / "home/.cache")] == [before]
    assert len(compiled()) == 1


@NEEDS_A_COMPILER
@pytest.mark.parametrize("name", ["", "cache", "./cache"])
def test_a_cache_folder_that_is_not_absolute_counts_as_unset(name, compiled, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path / "elsewhere")
    monkeypatch.setenv("XDG_CACHE_HOME", name)
    kernels.load()
    assert len(kept_in(tmp_path / "home/.cache")) == 1
    assert not list((tmp_path / "elsewhere").iterdir())


@NEEDS_A_COMPILER
def test_whatever_the_umask_nobody_else_can_write_the_kernels(compiled, tmp_path):
    before = os.umask(0)
    try:
        kernels.load()
    finally:
        os.umask(before)
    cache = tmp_path / "home/.cache"
    assert [path.stat().st_mode & 0o777 for path in (cache, cache / "gpt")] == [0o700, 0o700]
    assert [path.stat().st_mode & 0o777 for path in kept_in(cache)] == [0o600]


@NEEDS_A_COMPILER
def test_what_others_could_write_is_emptied_and_closed(compiled, monkeypatch, tmp_path):
    cache = tmp_path / "elsewhere"
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache))
    kernels.load()
    [kept] = kept_in(cache)
    stranger = kept.with_name(kept.name.replace("kernels-", "kernels-0"))
    stranger.write_bytes(kept.read_bytes())
    (cache / "gpt").chmod(0o777)
    kernels.load()
    assert kept_in(cache) == [kept]
    assert (cache / "gpt").stat().st_mode & 0o777 == 0o700
    assert len(compiled()) == 2


def a_link(cache):
    (cache / "real").mkdir(mode=0o700)
    (cache / "gpt").symlink_to(cache / "real")


def a_file(cache):
    (cache / "gpt").write_text("")


def open_above(cache):
    cache.chmod(0o777)


@NEEDS_A_COMPILER
@pytest.mark.parametrize("make", [a_link, a_file, open_above])
def test_a_folder_that_is_not_safe_is_not_used(make, compiled, monkeypatch, tmp_path):
    cache = tmp_path / "elsewhere"
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache))
    make(cache)
    assert kernels.library() is not None
    assert kernels.problem() is None
    assert len(compiled()) == 1
    assert not list(cache.rglob("*.so"))


@NEEDS_A_COMPILER
def test_a_folder_of_another_user_is_not_used(compiled, monkeypatch, tmp_path):
    cache = tmp_path / "elsewhere"
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache))
    kernels.load()
    [kept] = kept_in(cache)
    before = kept.stat()
    monkeypatch.setattr(os, "getuid", lambda: before.st_uid + 1)
    kernels.load()
    assert len(compiled()) == 2
    assert kept.stat().st_ino == before.st_ino  # nothing was written there


@NEEDS_A_COMPILER
def test_a_file_of_another_user_is_not_loaded(compiled, tmp_path):
    kernels.load()
    [kept] = kept_in(tmp_path / "home/.cache")
    assert cpp_library._is_whole(kept)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "getuid", lambda: kept.stat().st_uid + 1)
        assert not cpp_library._is_whole(kept)


def replaced(kept, data):
    kept.unlink()  # this process has the old file in its memory
    kept.write_bytes(data)
    kept.chmod(0o600)


def cut_short(kept):
    replaced(kept, kept.read_bytes()[:1000])


def emptied(kept):
    replaced(kept, b"")


def changed(kept):
    data = bytearray(kept.read_bytes())
    data[len(data) // 2] ^= 1
    replaced(kept, data)


def opened(kept):
    kept.chmod(0o666)


def linked(kept):
    other = kept.parent.parent / "other.so"
    kept.rename(other)
    kept.symlink_to(other)


@NEEDS_A_COMPILER
@pytest.mark.parametrize("damage", [cut_short, emptied, changed, opened, linked])
def test_a_damaged_or_foreign_kernel_is_compiled_anew(damage, compiled, tmp_path):
    kernels.load()
    [kept] = kept_in(tmp_path / "home/.cache")
    data = kept.read_bytes()
    damage(kept)
    kernels.load()
    assert [path.read_bytes() for path in kept_in(tmp_path / "home/.cache")] == [data]
    assert not kept.is_symlink()
    kernels.load()
    assert len(compiled()) == 2


@NEEDS_A_COMPILER
@pytest.mark.parametrize("home", ["unwritable", "unknown", "relative", "full"])
def test_without_a_home_to_keep_them_in_they_are_compiled_once_and_leave_nothing(
    home, compiled, monkeypatch, tmp_path
):
    if home == "unwritable":
        (tmp_path / "home/.cache").write_text("no folder can be made here")
    elif home == "relative":
        monkeypatch.chdir(tmp_path / "elsewhere")
        monkeypatch.setenv("HOME", "home")
    elif home == "unknown":

        def no_entry(uid):
            raise KeyError(uid)

        monkeypatch.delenv("HOME")
        monkeypatch.setattr(pwd, "getpwuid", no_entry)
    else:

        def full(descriptor):
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(os, "fsync", full)
    for _ in range(3):
        assert kernels.library() is not None
        assert kernels.problem() is None
    assert len(compiled()) == 1
    assert not [path for path in tmp_path.rglob("*") if path.suffix in (".so", ".new")]


@NEEDS_A_COMPILER
def test_a_compiler_may_come_with_flags_and_others_make_other_kernels(
    compiled, monkeypatch, tmp_path
):
    first = os.environ["CXX"]
    for words in (first, f"{first} -O1 '-DNAME=a b'", first):
        monkeypatch.setenv("CXX", words)
        kernels.load()
    assert ["-O1 -DNAME=a b -std=c++17" in line for line in compiled()] == [False, True]
    assert len(kept_in(tmp_path / "home/.cache")) == 2


@NEEDS_A_COMPILER
def test_another_header_makes_other_kernels(compiled, monkeypatch, tmp_path):
    kernels.load()
    (tmp_path / "vectors.h").write_text("// changed")
    monkeypatch.setattr(cpp_library, "HEADER", tmp_path / "vectors.h")
    kernels.load()
    assert len(compiled()) == len(kept_in(tmp_path / "home/.cache")) == 2


def test_a_missing_or_broken_compiler_is_said(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    for words, said in {
        "no-such-compiler -O2": "there is no C\\+\\+ compiler 'no-such-compiler'",
        "false": "false cannot compile kernels.cpp: no message",
        "c++ '-O2": 'CXX is "c\\+\\+ \'-O2": No closing quotation',
    }.items():
        monkeypatch.setenv("CXX", words)
        with pytest.raises(UsageError, match=said):
            kernels.load()
        library, problem = kernels._library.__wrapped__()
        assert library is None
        assert problem
    assert not list((tmp_path / "gpt").iterdir())


@pytest.mark.parametrize(
    ("machine", "march"), [("x86_64", "x86-64"), ("AMD64", "x86-64"), ("aarch64", "native")]
)
def test_a_limit_of_x86_is_not_asked_of_another_processors_compiler(
    machine, march, monkeypatch, tmp_path
):
    commands = []

    def run(command, **options):
        commands.append(command)
        return subprocess.CompletedProcess(command, 1, "", "not compiled here")

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("ATEN_CPU_CAPABILITY", "default")
    monkeypatch.setenv("CXX", sys.executable)  # any program: it is not run
    monkeypatch.setattr(platform, "machine", lambda: machine)
    monkeypatch.setattr(cpp_library.subprocess, "run", run)
    with pytest.raises(UsageError, match="not compiled here"):
        kernels.load()
    assert f"-march={march}" in commands[0]


def test_every_field_of_the_models_configuration_is_decided():
    assert {item.name for item in dataclasses.fields(ModelConfig)} == kernels.KNOWN.keys()


def test_a_configuration_with_an_unknown_field_value_or_width_is_not_known():
    later = dataclasses.make_dataclass(
        "Later", [("later", bool, False)], bases=(ModelConfig,), frozen=True, kw_only=True
    )
    assert kernels.knows(ModelConfig())
    assert not kernels.knows(later())
    assert not kernels.knows(ModelConfig(n_head=96))  # 8 numbers a head
    other = ModelConfig()
    object.__setattr__(other, "activation", "swish")
    assert not kernels.knows(other)


MATRIX = {
    "float32": (torch.randn(5, 200), None, None),
    "bfloat16": (torch.randn(5, 200).bfloat16(), None, None),
    "int8": (torch.zeros(5, 256, dtype=torch.uint8), torch.ones(5), None),
    "int4": (
        torch.zeros(5, 128, dtype=torch.uint8),
        torch.ones(5, 8).bfloat16(),
        torch.ones(5, 8).bfloat16(),
    ),
    "int8_gguf": (torch.zeros(5, 224, dtype=torch.uint8), torch.ones(5, 7).half(), None),
    "int4_gguf": (
        torch.zeros(5, 112, dtype=torch.uint8),
        torch.ones(5, 7).half(),
        torch.ones(5, 7).half(),
    ),
}


@pytest.mark.parametrize(
    "spoil",
    [
        lambda t: t.to("meta"),
        lambda t: t.double(),
        lambda t: t[:, :-1] if t.ndim == 2 else t[:-1],
        lambda t: t[:-1],
        lambda t: t.repeat_interleave(2, dim=-1)[..., ::2],
        lambda t: None,
    ],
    ids=["on meta", "another dtype", "narrow", "fewer rows", "in pieces", "none"],
)
@pytest.mark.parametrize("kind", kernels.FORMATS)
def test_a_matrix_that_lies_otherwise_is_refused_before_it_is_read(kind, spoil):
    good = MATRIX[kind]
    kernels.RawMatrix(kind, 200, *good, torch.ones(5))
    for i, tensor in enumerate(good):
        if tensor is None or (i == 0 and spoil(tensor) is None):
            continue
        bad = [*good[:i], spoil(tensor), *good[i + 1 :]]
        if i == 0 and bad[0].shape[0] < 5 and kind in ("float32", "bfloat16"):
            continue  # a matrix of fewer rows
        with pytest.raises(ValueError, match="the kernels take"):
            kernels.RawMatrix(kind, 200, *bad)
    with pytest.raises(ValueError, match="the kernels take torch.float32 \\[5\\] on the CPU"):
        kernels.RawMatrix(kind, 200, *good, torch.ones(4))


def matrix(rows, columns):
    return kernels.RawMatrix("float32", columns, torch.ones(rows, columns), None, None)


def norm(width):
    return kernels.Norm("layernorm", width, torch.ones(width), None, 1e-5)


def layer(width=32, inner=48, *, dtype=torch.float32, **changes):
    keys = torch.zeros(1, 2, 4, 16, dtype=dtype)
    parts = {
        "attn_norm": norm(width), "mlp_norm": norm(width), "qkv": matrix(3 * width, width),
        "out": matrix(width, width), "n_head": 2, "scale": 1.0,
        "experts": [kernels.FeedForward(width, matrix(inner, width), matrix(width, inner))],
        "store": kernels.Store(keys, keys.clone()),
    }  # fmt: skip
    return kernels.Layer(**parts | changes)


SHAPE = {"width": 32, "n_head": 2, "kv_heads": 2, "head_dim": 16, "activation": "gelu"}


@pytest.mark.parametrize(
    "changes",
    [
        lambda: {"layers": []},
        lambda: {"layers": [layer(qkv=matrix(3 * 64, 64))]},
        lambda: {"layers": [layer(out=matrix(32, 64))]},
        lambda: {"layers": [layer(), layer(dtype=torch.bfloat16)]},
        lambda: {"layers": [layer(n_expert=2, router=matrix(3, 32))]},
        lambda: {"rotaries": [kernels.Rotary(torch.ones(9), 1.0, None)]},
        lambda: {"n_head": 4},
        lambda: {"kv_heads": 1},
        lambda: {"head_dim": 32},
        lambda: {"width": 64},
        lambda: {"head_dim": 8, "n_head": 4, "kv_heads": 4},
        lambda: kernels.FeedForward(32, matrix(48, 32), matrix(48, 32)),
        lambda: kernels.FeedForward(32, matrix(48, 32), matrix(32, 48), matrix(40, 32)),
        lambda: kernels.FeedForward(64, matrix(48, 32), matrix(32, 48)),
        lambda: kernels.Norm("rmsnorm", 32, torch.ones(31), None, 1e-5),
        lambda: kernels.Rotary(torch.ones(8), 1.0, torch.ones(7)),
        lambda: layer(slopes=torch.ones(3)),
        lambda: layer(sinks=torch.ones(1)),
    ],
)
def test_blocks_whose_widths_do_not_fit_are_refused_before_they_are_read(changes):
    kernels.Blocks([layer(), layer()], **SHAPE)
    with pytest.raises((ValueError, TypeError)):
        kernels.Blocks(**{"layers": [layer()], **SHAPE, **changes()})


@NEEDS_A_COMPILER
def test_tokens_that_do_not_fit_the_blocks_are_refused_before_they_are_read():
    blocks = kernels.Blocks([layer()], **SHAPE)
    blocks.run(torch.ones(1, 32), [(0, 0)])
    for x in (torch.ones(1, 16), torch.ones(2, 32), torch.ones(1, 32).double()):
        with pytest.raises(ValueError, match="the kernels take"):
            blocks.run(x, [(0, 0)])
    keys = torch.zeros(1, 2, 4, 16)
    for values in (keys[..., :8], keys.double(), keys.to("meta"), keys.bfloat16()):
        with pytest.raises(ValueError, match="the kernels take"):
            kernels.Store(keys, values)


@NEEDS_A_COMPILER
def test_only_packed_numbers_are_unpacked():
    for kind in kernels.FORMATS:
        matrix = kernels.RawMatrix(kind, 200, *MATRIX[kind])
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            if kind in kernels.PACKED and dtype != torch.float16:
                assert kernels.dense(matrix, dtype).dtype == dtype
            else:
                with pytest.raises(
                    ValueError, match="int8 and int4 are converted to float32 or bfloat16"
                ):
                    kernels.dense(matrix, dtype)
