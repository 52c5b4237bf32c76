import contextlib
import threading
import time

import pytest

from gpt.config import ServeConfig
from gpt.server.engine import Engine
from tests.generation.test_chat import model_of

pytest.importorskip("uvicorn", reason="needs the extra serve")


@pytest.fixture(scope="session")
def model():
    """A model with a chat template and a vocabulary of bytes."""
    return model_of(context=256)


@contextlib.contextmanager
def serving(model, *, batch_size=4, config=None, length=None, **options):
    """The address of a server on the loopback, and its engine."""
    from gpt.server import http
    from gpt.server.app import Server

    config = config or ServeConfig(model="tiny", port=0)
    engine = Engine(model, batch_size=batch_size, **options)
    app = Server(engine, model, config, length or model[0].config.context_length).app()
    with http.bind("127.0.0.1", 0) as listening:
        listening.listen()
        server = http.server(app, engine, log_level="critical")
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
        thread.start()
        engine.start()
        try:
            yield f"http://127.0.0.1:{listening.getsockname()[1]}", engine
        finally:
            server.should_exit = True
            thread.join(60)
            assert not thread.is_alive(), "the server does not end"
            engine.stop()


@pytest.fixture(scope="module")
def address(model):
    with serving(model) as (address, _):
        yield address


def until(condition, seconds=20):
    """Wait until something is true that another thread makes true."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not become true"
        time.sleep(0.002)
