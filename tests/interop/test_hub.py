"""The hub path with the real client, against a server on this machine."""

import hashlib
import json
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import gpt
from gpt.data.tokenizer import ByteTokenizer
from gpt.interop.export import export_huggingface
from tests.conftest import make_model

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub(BaseHTTPRequestHandler):
    """So much of the hub's protocol as a download needs."""

    folder: Path
    requests: list
    cut_off = 0
    flip = False

    def do_HEAD(self):
        self.answer(body=False)

    def do_GET(self):
        self.answer(body=True)

    def answer(self, *, body):
        cls = type(self)
        path = self.path.split("?")[0]
        cls.requests.append((self.command, path))
        names = sorted(p.name for p in cls.folder.iterdir())
        if path.startswith("/api/models/someone/tiny/revision/"):
            if path.rsplit("/", 1)[1] not in ("main", "v1", COMMIT):
                return self.send(404, b"{}", {"X-Error-Code": "RevisionNotFound"}, body)
            siblings = [{"rfilename": name} for name in names]
            info = {"id": "someone/tiny", "sha": COMMIT, "siblings": siblings}
            return self.send(200, json.dumps(info).encode(), {}, body)
        if path.startswith("/api/models/someone/tiny/tree/"):
            tree = [self.entry(name) for name in names]
            return self.send(200, json.dumps(tree).encode(), {}, body)
        if path.startswith("/someone/tiny/resolve/") and path.rsplit("/", 1)[1] in names:
            return self.file(cls.folder / path.rsplit("/", 1)[1], body)
        code = "EntryNotFound" if path.startswith("/someone/tiny/") else "RepoNotFound"
        return self.send(404, b"{}", {"X-Error-Code": code}, body)

    def entry(self, name):
        data = (type(self).folder / name).read_bytes()
        return {
            "type": "file",
            "path": name,
            "size": len(data),
            "oid": hashlib.sha1(data).hexdigest(),
        }

    def file(self, path, body):
        cls = type(self)
        content = path.read_bytes()
        etag = hashlib.sha256(content).hexdigest()
        headers = {"ETag": f'"{etag}"', "X-Repo-Commit": COMMIT, "Accept-Ranges": "bytes"}
        headers["X-Linked-Size"] = str(len(content))
        start = int((self.headers.get("Range") or "bytes=0-").split("=")[1].split("-")[0])
        if body and path.suffix == ".safetensors":
            if cls.cut_off:
                cls.cut_off -= 1
                return self.send(200, content, headers, body, sent=len(content) // 2)
            if cls.flip:
                content = content[:-1] + bytes([content[-1] ^ 1])
        if start:
            headers["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
        return self.send(206 if start else 200, content[start:], headers, body)

    def send(self, status, content, headers, body, sent=None):
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if body:
            self.wfile.write(content[:sent])
        if sent is not None:
            self.close_connection = True

    def log_message(self, *arguments):
        pass


FORKS = """
import json, os, sys
import httpx, gpt.cli, gpt.terminal, gpt.interop.load
assert "huggingface_hub" not in sys.modules
for line in sys.stdin:
    words, environment, folder = json.loads(line)
    if not (process := os.fork()):
        os.environ.update(environment)
        sys.stdin = open(os.devnull)
        for number, name in enumerate(("stdout", "stderr"), 1):
            os.dup2(os.open(f"{folder}/{name}", os.O_CREAT | os.O_TRUNC | os.O_WRONLY), number)
        os._exit(gpt.cli.main(words))
    print(os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]), flush=True)
"""
"""A process that has imported all but the hub's client; it runs each command in a fork."""


@pytest.fixture(scope="module")
def forks():
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen([sys.executable, "-c", FORKS], **pipes) as process:
        yield process
        process.stdin.close()


@pytest.fixture
def hub(tmp_path, forks):
    torch.manual_seed(0)
    config = gpt.ModelConfig(vocab_size=257, context_length=16, n_layer=1, n_head=2, n_embd=8)
    export_huggingface(make_model(config), ByteTokenizer(), tmp_path / "served")
    (tmp_path / "served" / "pytorch_model.bin").write_bytes(b"not needed")
    (tmp_path / "served" / "README.md").write_text("not needed")
    handler = type("ThisHub", (Hub,), {"folder": tmp_path / "served", "requests": []})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.02,))
    thread.start()
    handler.url = f"http://127.0.0.1:{server.server_address[1]}"
    handler.home, handler.forks = tmp_path / "home", forks
    yield handler
    server.shutdown()
    server.server_close()
    thread.join()


def sampled(hub, name, **environment):
    """What a process of its own says: the client reads its settings once, when it is imported."""
    words = ["--prompt", "x", "--temperature", "0", "--max_new_tokens", "5", "--device", "cpu"]
    words = ["sample", "--model", name, *words]
    environment = {"HF_ENDPOINT": hub.url, "HF_HOME": str(hub.home)} | environment
    hub.forks.stdin.write(json.dumps([words, environment, str(hub.folder.parent)]) + "\n")
    hub.forks.stdin.flush()
    status = int(hub.forks.stdout.readline())
    said = [(hub.folder.parent / name).read_text() for name in ("stdout", "stderr")]
    return subprocess.CompletedProcess(words, status, *said)


def test_a_model_is_downloaded_once_and_only_what_is_needed_of_it(hub):
    (hub.folder / "chat_template.jinja").write_text("{{ messages }}")
    first = sampled(hub, "someone/tiny")
    assert first.returncode == 0, first.stderr
    assert first.stdout.startswith("x")
    fetched = {path.rsplit("/", 1)[1] for method, path in hub.requests if method == "GET"}
    assert {"model.safetensors", "generation_config.json", "chat_template.jinja"} <= fetched
    assert not fetched & {"pytorch_model.bin", "README.md"}
    hub.requests.clear()
    assert sampled(hub, "someone/tiny@v1").stdout == first.stdout
    again = [path for method, path in hub.requests if method == "GET" and "/resolve/" in path]
    assert again == []
    hub.requests.clear()
    assert sampled(hub, "someone/tiny", HF_HUB_OFFLINE="1").stdout == first.stdout
    assert hub.requests == []


@pytest.mark.parametrize("kind", ["pickle", "sharded pickle", "sharded safetensors"])
def test_weights_of_any_form_are_downloaded(hub, kind):
    whole = sampled(hub, "someone/tiny")
    (hub.folder / "pytorch_model.bin").unlink()
    path = hub.folder / "model.safetensors"
    state = load_file(path)
    path.unlink()
    if kind == "pickle":
        torch.save(state, hub.folder / "pytorch_model.bin")
    else:
        stem, suffix = ("model", "safetensors") if "safe" in kind else ("pytorch_model", "bin")
        write, names, places = (save_file if "safe" in kind else torch.save), sorted(state), {}
        for i, part in enumerate((names[::2], names[1::2]), 1):
            file = f"{stem}-0000{i}-of-00002.{suffix}"
            write({name: state[name] for name in part}, hub.folder / file)
            places |= dict.fromkeys(part, file)
        index = hub.folder / f"{stem}.{suffix}.index.json"
        index.write_text(json.dumps({"weight_map": places}))
    got = sampled(hub, "someone/tiny", HF_HOME=str(hub.home / "new"))
    assert (got.returncode, got.stdout) == (0, whole.stdout), got.stderr


def test_an_interrupted_transfer_is_taken_up_again(hub):
    hub.cut_off = 1
    done = sampled(hub, "someone/tiny")
    assert done.returncode == 0, done.stderr
    hub.cut_off = 0
    hub.home = hub.home.with_name("other")
    assert sampled(hub, "someone/tiny").stdout == done.stdout


@pytest.mark.parametrize(
    ("name", "environment", "said"),
    [
        ("someone/else", {}, "download from the hub failed (RepositoryNotFoundError"),
        ("someone/tiny@v2", {}, "download from the hub failed (RevisionNotFoundError"),
        ("someone/tiny", {"HF_HUB_OFFLINE": "1"}, "download from the hub failed (LocalEntryNot"),
        ("some one", {}, "and the name is not valid on the Hugging Face hub"),
    ],
)
def test_what_cannot_be_had_is_told_in_a_sentence_with_the_way_out(name, environment, said, hub):
    done = sampled(hub, name, **environment)
    assert done.returncode == 2
    assert said in done.stderr
    assert "Traceback" not in done.stderr
    if "hub failed" in said:
        assert "you can give a folder with config.json, weights and tokenizer files instead" in (
            " ".join(done.stderr.split())
        )


def test_a_file_that_comes_with_a_wrong_hash_is_refused_and_not_kept(hub):
    hub.flip = True
    done = sampled(hub, "someone/tiny")
    assert done.returncode == 2
    assert "model.safetensors of someone/tiny is damaged" in done.stderr
    hub.flip = False
    assert sampled(hub, "someone/tiny").returncode == 0


@pytest.mark.parametrize(
    ("name", "endpoint"), [("someone/tiny", "no address"), ("o/" + "x" * 90, "")]
)
def test_whatever_the_client_says_is_told_in_a_short_sentence(name, endpoint, hub):
    done = sampled(hub, name, **({"HF_ENDPOINT": endpoint} if endpoint else {}))
    assert done.returncode == 2
    assert "download from the hub failed" in done.stderr
    assert "Traceback" not in done.stderr
    assert len(done.stderr) < 1000


def test_a_missing_file_of_the_model_is_told(hub):
    (hub.folder / "config.json").unlink()
    done = sampled(hub, "someone/tiny")
    assert done.returncode == 2
    assert "without a checkpoint or a model" in done.stderr
