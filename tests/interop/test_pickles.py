"""Pickles of tensors: what they may hold, and that nothing else is run or takes memory."""

import os
import pickle
import struct
import time
import tracemalloc
import zipfile

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gpt.config import UsageError
from gpt.interop.pickles import load_tensors


class Calls:
    """Pickled as a call of what it is given."""

    def __init__(self, *call):
        self.call = call

    def __reduce__(self):
        return self.call


def write_zip(path, pickled, records=(), compression=zipfile.ZIP_STORED):
    """An archive as torch.save makes it, around a pickle of one's own."""
    with zipfile.ZipFile(path, "w", compression) as archive:
        archive.writestr("archive/data.pkl", pickled)
        archive.writestr("archive/version", "3\n")
        archive.writestr("archive/byteorder", "little")
        for name, content in records:
            archive.writestr(f"archive/data/{name}", content)


BOMBS = {
    "bytearray": lambda: {"a": Calls(bytearray, (2**36,))},
    "a tensor of any size": lambda: {"a": Calls(torch.Tensor, (2**36,))},
    "a storage of any size": lambda: {"a": Calls(torch.FloatStorage, (2**36,))},
    "a program": lambda: {"a": Calls(os.system, ("true",))},
    "an attribute": lambda: {"a": Calls(getattr, ("text", "upper"))},
}


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
@pytest.mark.parametrize("bomb", BOMBS.values(), ids=BOMBS)
def test_a_pickle_that_calls_anything_is_refused_before_it_takes_memory(bomb, legacy, tmp_path):
    path = tmp_path / "pytorch_model.bin"
    if legacy:
        torch.save(bomb(), path, _use_new_zipfile_serialization=False)
    else:
        write_zip(path, pickle.dumps(bomb(), protocol=2))
    start = time.perf_counter()
    tracemalloc.start()
    with pytest.raises(UsageError, match="pytorch_model.bin (is refused: .*GLOBAL|.*not callable)"):
        load_tensors(path)
    assert tracemalloc.get_traced_memory()[1] < 2**22
    tracemalloc.stop()
    assert time.perf_counter() - start < 1


def test_a_storage_has_no_more_numbers_than_the_file_has_bytes(tmp_path):
    path = tmp_path / "pytorch_model.bin"
    large = b"\x8a\x05" + (2**36).to_bytes(5, "little")
    torch.save({"a": torch.zeros(2)}, path)
    with zipfile.ZipFile(path) as archive:
        content = archive.read("pytorch_model/data.pkl")
    write_zip(path, content, [("0", bytes(8))])
    assert load_tensors(path)["a"].tolist() == [0.0, 0.0]
    assert content.count(b"K\x02t") == 1  # the storage's size
    write_zip(path, content.replace(b"K\x02t", large + b"t"), [("0", bytes(8))])
    with pytest.raises(UsageError, match="is refused: .*a storage of 68719476736 numbers"):
        load_tensors(path)
    torch.save({"a": torch.zeros(2)}, path, _use_new_zipfile_serialization=False)
    content = path.read_bytes()
    assert content.count(b"K\x02Nt") == 1
    path.write_bytes(content.replace(b"K\x02Nt", large + b"Nt"))
    with pytest.raises(UsageError, match="is refused: .*a storage of 68719476736 numbers"):
        load_tensors(path)


@pytest.mark.parametrize(
    "content",
    [
        b"\x80\x05\x96" + struct.pack("<Q", 2**36) + b".",  # BYTEARRAY8
        b"\x80\x02Nr" + struct.pack("<I", 2**32 - 1) + b".",  # LONG_BINPUT
    ],
    ids=["BYTEARRAY8", "LONG_BINPUT"],
)
def test_an_operation_that_takes_memory_itself_is_refused(content, tmp_path):
    path = tmp_path / "pytorch_model.bin"
    write_zip(path, content)
    start = time.perf_counter()
    with pytest.raises(UsageError, match="pytorch_model.bin (is refused|cannot be read)"):
        load_tensors(path)
    assert time.perf_counter() - start < 1


def test_an_archive_that_is_compressed_is_refused(tmp_path):
    path = tmp_path / "pytorch_model.bin"
    write_zip(path, pickle.dumps({"a": "a" * 10**6}, protocol=2), (), zipfile.ZIP_DEFLATED)
    with pytest.raises(UsageError, match="is refused: .*it is compressed"):
        load_tensors(path)


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
def test_tensors_of_every_kind_are_read_and_parameters_are_tensors(legacy, tmp_path):
    path = tmp_path / "pytorch_model.bin"
    shared = torch.arange(6.0)
    state = {
        "parameter": torch.nn.Parameter(torch.ones(2)),
        "one": shared[:4],
        "two": shared[2:].view(2, 2),
        "half": torch.ones(3, dtype=torch.bfloat16),
        "small": torch.ones(3).to(torch.float8_e4m3fn),
        "sparse": torch.eye(2).to_sparse(),
        "meta": torch.empty(2, device="meta"),
    }
    if legacy:
        del state["small"]  # which torch cannot read there
    torch.save(state, path, _use_new_zipfile_serialization=not legacy)
    found = load_tensors(path)
    assert found.keys() == state.keys()
    for name, tensor in state.items():
        assert found[name].shape == tensor.shape
        assert found[name].dtype == tensor.dtype
        assert not found[name].requires_grad
        if name != "meta":
            assert torch.equal(found[name].to_dense().float(), tensor.to_dense().float())
    assert found["one"].data_ptr() + 8 == found["two"].data_ptr()


@pytest.fixture(scope="module")
def valid(tmp_path_factory):
    path = tmp_path_factory.mktemp("valid") / "pytorch_model.bin"
    contents = []
    for new in (True, False):
        state = {"a.weight": torch.ones(2, 3), "b.bias": torch.nn.Parameter(torch.ones(2))}
        torch.save(state, path, _use_new_zipfile_serialization=new)
        contents.append(path.read_bytes())
    return contents


@settings(
    max_examples=150,
    derandomize=True,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(data=st.data())
@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_a_pickle_of_any_content_ends_in_a_sentence(data, valid, tmp_path):
    content = bytearray(data.draw(st.sampled_from(valid)))
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, min(700, len(content) - 1)))
        content[at] = data.draw(st.integers(0, 255))
    path = tmp_path / "pytorch_model.bin"
    path.write_bytes(content[: data.draw(st.sampled_from([len(content), len(content) // 2]))])
    told = path.name
    try:
        load_tensors(path)
    except UsageError as error:
        told = str(error)
    assert path.name in told
    assert len(told) < 900
