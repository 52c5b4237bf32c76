"""The command ``gpt serve``: where it listens, what it prints, and how it ends."""

import os
import re
import signal
import socket
import subprocess
import sys

import httpx
import pytest

from gpt.cli import main
from gpt.config import ServeConfig, UsageError, parse
from tests.test_cli import RUN


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.5", "example.com", ""])
def test_an_address_that_others_reach_needs_a_key(host):
    with pytest.raises(UsageError, match="needs an API key"):
        ServeConfig(model="m", host=host)
    assert not ServeConfig(model="m", host=host, api_key="k").is_local


@pytest.mark.parametrize("host", ["127.0.0.1", "::1", "localhost", "127.1.2.3"])
def test_this_machines_own_addresses_need_none(host):
    assert ServeConfig(model="m", host=host).is_local


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"api_key": "two words"}, "printable ASCII"),
        ({"api_key": "schlüssel"}, "printable ASCII"),
        ({"allow_origin": ("example.com",)}, "such as https://example.com"),
        ({"allow_origin": ("*",)}, "such as https://example.com"),
        ({"port": 70000}, "port is 70000"),
    ],
)
def test_options_that_cannot_be_are_refused(changes, says):
    with pytest.raises(UsageError, match=says):
        ServeConfig(model="m", **changes)


@pytest.mark.parametrize(
    ("model", "name", "served"),
    [("runs/a/", "", "a"), ("a.gguf", "", "a.gguf"), ("x/y", "z", "z"), ("/", "", "model")],
)
def test_clients_call_the_model_by_its_last_part_or_its_name(model, name, served):
    assert ServeConfig(model=model, name=name).served_name == served


def test_a_port_that_is_taken_is_named(capsys):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert main(["serve", str(RUN), "--port", str(port)]) == 2
    assert re.search(rf"cannot listen on 127.0.0.1 port {port}: .*choose another", read(capsys))


def read(capsys):
    return capsys.readouterr().err


def test_without_its_packages_the_command_says_what_to_install(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    assert main(["serve", str(RUN)]) == 2
    assert "pip install 'gpt[serve]'" in read(capsys)


@pytest.mark.skipif(sys.platform == "win32", reason="sends SIGTERM")
def test_the_command_serves_and_sigterm_ends_it_after_what_runs():
    words = [sys.executable, "-m", "gpt", "serve", str(RUN), "--port", "0", "--device", "cpu"]
    environment = {**os.environ, "GPT_API_KEY": "secret", "OMP_NUM_THREADS": "1"}
    server = subprocess.Popen(words, stderr=subprocess.PIPE, text=True, env=environment)
    try:
        first, curl = server.stderr.readline(), server.stderr.readline()
        address = re.search(r"http://127\.0\.0\.1:\d+", first)[0]
        assert "secret" not in first + curl
        host, port = address.removeprefix("http://").split(":")
        socket.create_connection((host, int(port))).close()  # it listens when it says so
        assert f"curl {address}/v1/completions -H" in curl
        asked = {"prompt": "ROMEO", "max_tokens": 10, "stream": True}
        headers = {"Authorization": "Bearer secret"}
        place = f"{address}/v1/completions"
        with httpx.stream("POST", place, json=asked, headers=headers, timeout=30) as answer:
            assert answer.status_code == 200
            lines = answer.iter_lines()
            next(lines)
            server.send_signal(signal.SIGTERM)
            assert list(lines)[-2:] == ["data: [DONE]", ""]
        assert server.wait(timeout=30) in (-signal.SIGTERM, 128 + signal.SIGTERM)
        assert server.stderr.read() == ""
    finally:
        server.kill()
        server.wait()
        server.stderr.close()


def test_a_typed_key_wins_over_the_environments_and_is_told(monkeypatch, capsys):
    from gpt.commands import serve

    monkeypatch.setenv("GPT_API_KEY", "other")
    keys = []
    monkeypatch.setattr(serve, "parse", lambda *about, prog: keys.append(parse(*about, prog=prog)))
    for word in ("--api_key=mine", "--api-key=mine", "--port=1"):
        with pytest.raises(AttributeError):  # where the command goes on without a configuration
            serve.serve(["m", word], "gpt serve")
    assert [config.api_key for config in keys] == ["mine", "mine", "other"]
    for config in keys[1:]:
        serve._greet(config, "http://127.0.0.1:1", 1, 1, chats=False)
    said = read(capsys)
    assert "-H 'Authorization: Bearer 'KEY " in said
    assert "'Authorization: Bearer '$GPT_API_KEY " in said
