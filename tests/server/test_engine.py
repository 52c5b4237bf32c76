"""The batch that requests join: each text is what it is alone, and what nobody wants ends."""

import dataclasses
import queue
import threading

import pytest

import gpt
from gpt.config import GenerationConfig, ModelConfig, UsageError
from gpt.server import engine as engines
from gpt.server.engine import PART, Engine, Failure, FullError, Job, rows_that_fit
from tests.conftest import make_model
from tests.generation.test_chat import model_of, tokenizer_of
from tests.server.conftest import until


def settings(**changes):
    base = {"max_new_tokens": 12, "seed": 3, "past_context": "stop", "temperature": 0.9}
    return GenerationConfig(**base | changes)


class Asked:
    """A job, and the events that it got."""

    def __init__(self, engine, prompts, config, **options):
        self.events = queue.Queue()
        self.job = Job(prompts, config, self.events.put, **options)
        engine.submit(self.job)

    def pieces(self, n=None):
        """The events up to the end of ``n`` completions (all of them unless given)."""
        left = self.job.left if n is None else n
        while left:
            event = self.events.get(timeout=20)
            yield event
            if isinstance(event, Failure):
                return
            left -= event.ended

    def texts(self):
        made = {}
        for piece in self.pieces(len(self.job.prompts) * self.job.config.num_samples):
            assert not isinstance(piece, Failure), piece
            key = piece.completion.prompt, piece.completion.sample
            made[key] = made.get(key, "") + piece.text
            assert made[key] == piece.completion.text or not piece.ended
        return [made[key] for key in sorted(made)]


@pytest.fixture
def engine(model):
    engine = Engine(model, batch_size=4)
    engine.start()
    yield engine
    engine.stop()


VARIED = [
    {},
    {"temperature": 0},
    {"seed": 4, "temperature": 1.4, "top_k": 9},
    {"top_p": 0.7, "min_p": 0.02},
    {"presence_penalty": 1.5, "frequency_penalty": 0.4},
    {"repetition_penalty": 1.8, "max_new_tokens": 20},
    {"bias": {40: 5.0, 41: -5.0}},
    {"stop": ("e", "a"), "max_new_tokens": 40},
    {"logprobs": 2},
    {"min_new_tokens": 5, "num_samples": 3},
]


def ids(tokenizer, text):
    return tokenizer.encode(text).tolist()


def expected(model, prompt, config):
    names = [field.name for field in dataclasses.fields(config)]
    given = {name: getattr(config, name) for name in names}
    return [each.text for each in gpt.generate(model, [prompt], **given)]


@pytest.mark.parametrize("changes", VARIED, ids=str)
def test_a_text_is_that_of_generate(model, engine, changes):
    prompt, config = ids(model[1], "Once upon a time"), settings(**changes)
    assert Asked(engine, [prompt], config).texts() == expected(model, prompt, config)


def test_a_text_among_32_others_of_other_settings_is_that_of_generate(model):
    engine = Engine(model, batch_size=33, say=print)
    engine.start()
    jobs = []
    for number in range(33):
        config = settings(**{"seed": number, **VARIED[number % len(VARIED)]})
        prompt = ids(model[1], "Once upon a time there was a number"[: 5 + number % 30])
        jobs.append((prompt, config, Asked(engine, [prompt], config)))
    for prompt, config, asked in jobs:
        assert asked.texts() == expected(model, prompt, config)
    engine.stop()


@pytest.mark.parametrize(
    "changes",
    [{"window": 8}, {"position": "rotary", "n_kv_head": 1}, {"position": "alibi"}],
    ids=str,
)
def test_turns_that_go_on_from_the_prefix_cache_are_those_of_generate(changes):
    config = ModelConfig(
        vocab_size=259, context_length=128, n_layer=2, n_head=2, n_embd=32,
        **changes,
    )  # fmt: skip
    model = make_model(config), tokenizer_of()
    engine = Engine(model, batch_size=2)
    engine.start()
    prompt = ids(model[1], "It was a dark and stormy night")
    for turn in range(3):
        [text] = Asked(engine, [prompt], settings(seed=turn)).texts()
        assert [text] == expected(model, prompt, settings(seed=turn))
        prompt = prompt + ids(model[1], text + " And then")
    engine.stop()


def counted(network, monkeypatch):
    """The positions that go through the model from now on, by forward pass."""
    read, features = [], network.features

    def counting(tokens, **options):
        read.append(tokens.numel())
        return features(tokens, **options)

    monkeypatch.setattr(network, "features", counting)
    return read


def test_a_second_turn_reads_only_what_is_new(engine, model, monkeypatch):
    prompt = ids(model[1], "A system prompt that is long enough to be worth it. ")
    asked = Asked(engine, [prompt], settings(temperature=0))
    list(asked.pieces())
    answer = expected_tokens(model, prompt)
    read = counted(model[0], monkeypatch)
    asked = Asked(engine, [[*prompt, *answer, 65, 66]], settings(max_new_tokens=1))
    list(asked.pieces())
    assert read == [3]  # the answer's last token, which was not read before, and the two new ones
    assert asked.job.cached_tokens == len(prompt) + len(answer) - 1


def expected_tokens(model, prompt):
    made = gpt.generate(model, [prompt], temperature=0, max_new_tokens=12, past_context="stop")
    return made[0].tokens


def test_a_system_prompt_that_requests_share_is_read_once(engine, model, monkeypatch):
    system = ids(model[1], "You are a helpful assistant. ")
    list(Asked(engine, [[*system, 65, 65]], settings(max_new_tokens=1)).pieces())
    read = counted(model[0], monkeypatch)
    list(Asked(engine, [[*system, 66, 67]], settings(max_new_tokens=1)).pieces())
    assert read == [2]


def test_the_prefix_cache_keeps_what_was_used_last_and_within_its_bound(model):
    one = model[0].new_cache(1, capacity=40).nbytes
    engine = Engine(model, prefix_bytes=int(2.5 * one))
    engine.start()
    prompts = [ids(model[1], letter * 40) for letter in "ABC"]
    for prompt in (*prompts[:2], prompts[0], prompts[2]):
        list(Asked(engine, [prompt], settings(max_new_tokens=1)).pieces())
    assert [engine.prefixes.known(prompt) for prompt in prompts] == [39, 0, 39]
    assert engine.prefixes.nbytes <= 2.5 * one
    engine.stop()


def test_what_a_client_that_left_had_read_is_kept(engine, model, monkeypatch):
    prompt = ids(model[1], "A prompt that is long enough to be worth it. ")
    left = Asked(engine, [prompt], settings(max_new_tokens=200, bias={258: -100.0}))
    pieces = left.pieces()
    made = [next(pieces) for _ in range(5)]
    engine.cancel(left.job)
    until(lambda: engine.running == 0)
    tokens = made[0].completion.tokens
    assert 5 <= len(tokens) < 200
    read = counted(model[0], monkeypatch)
    fork = [*prompt, *tokens[:2], 65]
    list(Asked(engine, [fork], settings(max_new_tokens=1)).pieces())
    assert read == [1]


@pytest.mark.parametrize("most", [0, 1000])
def test_a_long_prompt_that_cannot_be_kept_is_read_once(most, monkeypatch):
    model = model_of(context=8 * PART)
    engine = Engine(model, batch_size=2, prefix_bytes=most)
    engine.start()
    prompt = ids(model[1], "To be or not to be. " * 70)
    assert len(prompt) > engines.PART_ALONE
    read = counted(model[0], monkeypatch)
    asked = Asked(engine, [prompt], settings(max_new_tokens=1))
    list(asked.pieces())
    assert read == [len(prompt)]
    engine.stop()


def test_the_prefix_caches_memory_is_that_of_its_entries(model):
    engine = Engine(model, prefix_bytes=3 * model[0].new_cache(1, capacity=60).nbytes)
    engine.start()
    for number in range(12):  # more than there is room for
        prompt = ids(model[1], f"{number} was a number " * (1 + number % 3))
        list(Asked(engine, [prompt], settings(max_new_tokens=1 + number)).pieces())
    engine.stop()
    caches = [entry.cache for entry in engine.prefixes._entries.values()]
    assert len(caches) < 12
    assert engine.prefixes.nbytes == sum(cache.nbytes for cache in caches) > 0


def test_without_a_prefix_cache_nothing_is_kept(model):
    engine = Engine(model, prefix_bytes=0)
    engine.start()
    prompt = ids(model[1], "A" * 40)
    list(Asked(engine, [prompt], settings(max_new_tokens=1)).pieces())
    assert engine.prefixes.nbytes == 0
    engine.stop()


def test_a_request_joins_while_another_runs(engine, model):
    long = Asked(engine, [ids(model[1], "A")], settings(max_new_tokens=200))
    next(long.pieces())
    short = Asked(engine, [ids(model[1], "B")], settings(max_new_tokens=3))
    list(short.pieces())
    assert engine.running == 1
    engine.cancel(long.job)


def test_a_long_prompt_is_read_in_parts_between_the_steps_of_others():
    model = model_of(context=4 * PART)
    engine = Engine(model, batch_size=4)
    engine.start()
    running = Asked(engine, [ids(model[1], "A")], settings(max_new_tokens=500))
    next(running.pieces())
    prompt = ids(model[1], "To be or not to be. " * 40)
    assert len(prompt) > 3 * PART
    joined = Asked(engine, [prompt], settings())
    assert joined.texts() == expected(model, prompt, settings())
    assert engine.prefixes.tokens_read >= 2 * PART
    assert joined.job.cached_tokens == 0
    engine.cancel(running.job)
    engine.stop()


def test_a_sequence_that_is_cancelled_ends_at_once(engine, model):
    asked = Asked(engine, [ids(model[1], "A")], settings(max_new_tokens=200, num_samples=3))
    next(asked.pieces())
    engine.cancel(asked.job)
    until(lambda: engine.running == 0)
    assert engine.metrics.generated_tokens < 3 * 200


def test_a_job_that_waits_is_cancelled_too(model):
    engine = Engine(model, batch_size=1)
    engine.start()
    first = Asked(engine, [ids(model[1], "A")], settings(max_new_tokens=200))
    next(first.pieces())
    second = Asked(engine, [ids(model[1], "B")], settings())
    engine.cancel(second.job)
    until(lambda: engine.waiting == 0)
    engine.cancel(first.job)
    engine.stop()


def test_a_full_queue_refuses_and_says_when_to_come_back(model):
    engine = Engine(model, batch_size=1, queue=1)
    engine.start()
    running = Asked(engine, [ids(model[1], "A")], settings(max_new_tokens=200))
    next(running.pieces())
    Asked(engine, [ids(model[1], "B")], settings())
    with pytest.raises(FullError, match="try again in") as full:
        Asked(engine, [ids(model[1], "C")], settings())
    assert full.value.seconds >= 1
    engine.stop()


def test_a_job_that_takes_too_long_ends_with_a_sentence(engine, model):
    asked = Asked(engine, [ids(model[1], "A")], settings(max_new_tokens=200), seconds=0.0)
    *_, last = asked.pieces()
    assert last.kind == "timeout"
    until(lambda: engine.running == 0)


def test_a_step_that_fails_ends_its_requests_and_not_the_server(engine, model, monkeypatch):
    def broken(*args, **options):
        raise RuntimeError("no memory")

    with monkeypatch.context() as patched:
        patched.setattr(model[0], "features", broken)
        *_, last = Asked(engine, [ids(model[1], "A")], settings()).pieces()
    assert last.kind == "failed"
    prompt = ids(model[1], "A")
    assert Asked(engine, [prompt], settings()).texts() == expected(model, prompt, settings())


def test_a_prompt_that_the_model_cannot_continue_is_refused(engine):
    with pytest.raises(UsageError, match="token id 1000000"):
        Asked(engine, [[65], [10**6]], settings())
    assert engine.waiting == 0


def test_settings_that_only_the_decoder_refuses_end_their_request_alone(engine, model):
    good = Asked(engine, [ids(model[1], "A")], settings(max_new_tokens=50))
    *_, last = Asked(engine, [ids(model[1], "B")], settings(bias={10**6: 1.0})).pieces()
    assert last.kind == "invalid"
    assert len(list(good.pieces())) > 1


def test_threads_of_the_caller_end_before_the_models_thread_begins(model, monkeypatch):
    seen = []
    engine = Engine(model)
    monkeypatch.setattr(engines, "end_idle_threads", lambda: seen.append(engine.is_alive))
    engine.start()
    engine.stop()
    assert seen == [False]


def test_stopping_ends_what_waits_with_a_sentence(model):
    engine = Engine(model, batch_size=1)
    engine.start()
    running = Asked(engine, [ids(model[1], "A")], settings(max_new_tokens=200))
    next(running.pieces())
    waiting = Asked(engine, [ids(model[1], "B")], settings())
    engine.stop()
    *_, last = waiting.pieces()
    assert "shutting down" in last.message
    assert not any(thread.name == "model" for thread in threading.enumerate())


def test_the_cache_of_a_large_batch_is_given_back_when_nothing_runs(model, monkeypatch):
    monkeypatch.setattr("gpt.server.engine.KEPT_IDLE", 0)
    engine = Engine(model, batch_size=4)
    engine.start()
    list(Asked(engine, [ids(model[1], "A")], settings(num_samples=4)).pieces())
    until(lambda: engine.cache_bytes == 0)
    prompt = ids(model[1], "A")
    assert Asked(engine, [prompt], settings()).texts() == expected(model, prompt, settings())
    engine.stop()


def test_the_number_of_rows_follows_the_memory(model, monkeypatch):
    assert rows_that_fit(model[0], 0, 256) == 16
    assert rows_that_fit(model[0], 5, 256) == 5
    memory = 10 * (model[0].new_cache(1).nbytes + 6 * 4 * 259)
    monkeypatch.setattr("gpt.device.memory", lambda device: memory)
    assert rows_that_fit(model[0], 0, 256) == 5
    with pytest.raises(UsageError, match="smaller batch_size"):
        rows_that_fit(model[0], 40, 256)
