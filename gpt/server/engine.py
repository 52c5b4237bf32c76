"""The model's thread: requests join the running batch between steps, and leave when they end.

One thread owns the model. A request (:class:`Job`) waits in a queue; its sequences take free rows
of one decoder, each with settings of its own, and its text does not depend on the others. A long
prompt that arrives while others are being continued is read in parts between their steps.
"""

import itertools
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Collection
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, TypeVar

from gpt.config import CacheFormat, GenerationConfig, UsageError
from gpt.data.tokenizer import Tokenizer, ends_of
from gpt.device import end_idle_threads
from gpt.generation.checks import check_cache, check_prompt
from gpt.generation.decode import Decoder, Token
from gpt.generation.logprobs import TokenDetails
from gpt.generation.text import Completion, GrowingText, Writing, begins_text
from gpt.model.gpt import GPT
from gpt.server.metrics import Metrics
from gpt.server.prefix_cache import PrefixCache

T = TypeVar("T")
PART = 256
"""Tokens of a prompt that are read between two steps of other sequences."""
PART_ALONE = 1024
"""The same while nothing else runs: how long a request that comes meanwhile waits."""
RESERVE = 128
"""Tokens that the cache has room for, beyond those of a new sequence."""
KEPT_IDLE = 64 << 20
"""Bytes of the cache that stay allocated while nothing runs."""
MOST_ROWS = 16
"""Sequences at once, where the user names no number."""


class FullError(Exception):
    """The queue is full; ``seconds`` is about how long it will be."""

    def __init__(self, seconds: int) -> None:
        super().__init__(f"the server is busy; try again in {seconds} s")
        self.seconds = seconds


@dataclass(frozen=True)
class Piece:
    """What is new in one completion of a job: text that later tokens cannot change."""

    completion: Completion
    """With everything so far."""
    text: str
    tokens: int
    """The number of tokens that the completion has now."""
    ended: bool


@dataclass(frozen=True)
class Failure:
    """Why a job ends without an answer."""

    message: str
    kind: str
    """``invalid`` (the request cannot be answered), ``timeout``, or ``failed``."""


Event = Piece | Failure


@dataclass(eq=False)
class Job:
    """A request: ``config.num_samples`` completions of each of ``prompts``. ``deliver`` gets its
    events, in the model's thread, and must return at once.
    """

    prompts: list[list[int]]
    config: GenerationConfig
    deliver: Callable[[Event], None]
    ends: Collection[int] = ()
    """Ids that end a text, besides the tokenizer's."""
    describes_prompts: bool = False
    begins: bool | None = None
    """Whether a completion is a text of its own; by default, whether its prompt has no text."""
    streams: bool = True
    """Whether it wants each piece, or only the last one of each completion."""
    seconds: float = 600.0
    arrived: float = field(default_factory=time.monotonic)
    cached_tokens: int = 0
    """Tokens of the prompts that the model did not read again."""
    prompt_details: dict[int, list[TokenDetails]] = field(default_factory=dict)
    left: int = field(init=False)
    """Completions that have not ended."""
    is_over: bool = False

    def __post_init__(self) -> None:
        self.left = len(self.prompts) * self.config.num_samples


@dataclass(eq=False)
class _Sequence:
    job: Job
    prompt: list[int]
    writing: Writing
    known: int | None = None  # tokens of the prompt that were read before it came


class Engine:
    """Runs jobs on a model. ``start``, then ``submit`` from any thread; ``stop`` at the end."""

    def __init__(
        self,
        model: tuple[GPT, Tokenizer],
        *,
        batch_size: int = MOST_ROWS,
        queue: int = 64,
        prefix_bytes: int = 256 << 20,
        cache: CacheFormat = "float",
        say: Callable[[str], None] = lambda text: None,
    ) -> None:
        """``queue`` jobs may wait while ``batch_size`` sequences run. ``prefix_bytes`` is the bound
        of the prefix cache. ``cache`` is the format of keys and values. ``say`` is told about
        steps that failed.
        """
        self.model, self.tokenizer = model
        self.batch_size, self.queue, self._cache = batch_size, queue, cache
        self.metrics, self.say = Metrics(), say
        self.prefixes = PrefixCache(self.model, prefix_bytes, stored_as=cache)
        self._ends = ends_of(self.tokenizer)
        self._decoder = self._new_decoder()
        self._waiting: deque[_Sequence] = deque()
        self._running: dict[int, _Sequence] = {}  # by the decoder's number
        self._changed = threading.Condition()
        self._coming: deque[list[_Sequence]] = deque()  # each a job that the thread has not seen
        self._calls: deque[tuple[Future[Any], Callable[[], Any]]] = deque()
        self._stopping = False
        self._thread = threading.Thread(target=self._run, name="model", daemon=True)

    def _new_decoder(self) -> Decoder:
        return Decoder(
            self.model,
            GenerationConfig(past_context="stop", cache=self._cache),
            batch_size=self.batch_size,
            vocab_size=self.tokenizer.vocab_size,
            end_of_text=self._ends,
            ahead=1,
            prefix=self.prefixes,
            reserve=RESERVE,
        )

    def start(self) -> None:
        """Start the thread. The calling thread should not compute while it runs."""
        end_idle_threads()
        self._thread.start()

    def stop(self) -> None:
        """End what runs and what waits, and the thread. Returns when it has ended."""
        with self._changed:
            self._stopping = True
            self._changed.notify()
        if self._thread.is_alive():
            self._thread.join()

    @property
    def is_alive(self) -> bool:
        """Whether the thread runs."""
        return self._thread.is_alive()

    def check_room(self) -> None:
        """:class:`FullError` if a job would find the queue full."""
        waiting = len({id(each.job) for each in self._waiting.copy()}) + len(self._coming)
        if waiting >= self.queue and self._is_full:
            raise FullError(self.metrics.seconds_per_request(waiting, self.batch_size))

    def submit(self, job: Job) -> None:
        """Queue a job. :class:`FullError` if too many wait, ``UsageError`` for a prompt that the
        model cannot continue.
        """
        for prompt in job.prompts:
            check_prompt(self.model, prompt, job.config, self.tokenizer.vocab_size)
        sequences = self._sequences_of(job)
        with self._changed:
            self.check_room()
            self._coming.append(sequences)
            self._changed.notify()

    def cancel(self, job: Job) -> None:
        """End a job whose client has gone."""
        with self._changed:
            job.is_over = True
            self._changed.notify()

    def call(self, function: Callable[[], T]) -> "Future[T]":
        """Run a function in the model's thread, between two steps. :class:`FullError` if too many
        wait.
        """
        future: Future[T] = Future()
        with self._changed:
            if self._stopping or len(self._calls) >= max(1, self.queue):
                raise FullError(1)
            self._calls.append((future, function))
            self._changed.notify()
        return future

    @property
    def running(self) -> int:
        """Sequences in the batch."""
        return len(self._running)

    @property
    def waiting(self) -> int:
        """Sequences that wait, and requests that were not looked at yet."""
        return len(self._waiting) + len(self._coming)

    @property
    def cache_bytes(self) -> int:
        """Memory of the keys and values of what runs."""
        return self._decoder.cache_bytes

    @property
    def _is_full(self) -> bool:
        return len(self._running) + len(self._waiting) + len(self._coming) >= self.batch_size

    def _run(self) -> None:
        while True:
            with self._changed:
                while not (
                    self._stopping or self._coming or self._waiting or self._running or self._calls
                ):
                    self._changed.wait()
                while self._coming:
                    self._waiting.extend(self._coming.popleft())
                if self._stopping:
                    break
                called = self._calls.popleft() if self._calls else None
            if called is not None:
                _settle(*called)
            if not (self._waiting or self._running):
                continue
            try:
                self._step()
            except Exception as error:  # the thread must outlive every request
                self._fail_all(error)
        for sequence in [*self._waiting, *self._running.values()]:
            self._fail(sequence.job, Failure("the server is shutting down", "failed"))
        for future, _ in self._calls:
            future.cancel()

    def _sequences_of(self, job: Job) -> list[_Sequence]:
        made = []
        for number, prompt in enumerate(job.prompts):
            begins = begins_text(self.tokenizer, prompt) if job.begins is None else job.begins
            for sample in range(job.config.num_samples):
                text = GrowingText(self.tokenizer, job.config.stop, begins=begins)
                made.append(_Sequence(job, prompt, Writing(Completion(number, sample), text)))
        return made

    def _step(self) -> None:
        """Drop what nobody waits for, admit what fits, and make one token of each sequence."""
        self._drop()
        self._admit()
        for token in self._decoder.advance():
            self._handle(token)
        self.metrics.steps += 1
        if not self._running and self._decoder.cache_bytes > KEPT_IDLE:
            self._decoder.release()

    def _drop(self) -> None:
        now = time.monotonic()
        for sequence in [*self._waiting, *self._running.values()]:
            job = sequence.job
            if not job.is_over and now > job.arrived + job.seconds:
                self._fail(job, Failure(f"the answer took more than {job.seconds:g} s", "timeout"))
        for number, sequence in list(self._running.items()):
            if sequence.job.is_over:
                if sequence.writing.completion.sample == 0:
                    self._remember(number)  # another request may go on from here
                self._decoder.end(number)
                del self._running[number]
        self._waiting = deque(each for each in self._waiting if not each.job.is_over)

    def _admit(self) -> None:
        """Give free rows to waiting sequences. While others run, the model reads no more than some
        tokens of them between two steps.
        """
        others, unread = bool(self._running), 0
        while self._waiting and len(self._running) < self.batch_size and unread < PART:
            sequence = self._waiting[0]
            job, prompt = sequence.job, sequence.prompt
            completion = sequence.writing.completion
            describes = job.describes_prompts and completion.sample == 0
            known = 0 if describes else self.prefixes.known(prompt)
            if sequence.known is None:
                sequence.known = known
            new, part = len(prompt) - known, PART if self._running else PART_ALONE
            in_parts = not describes and new > part and self.prefixes.has_room(len(prompt))
            if in_parts and self.prefixes.read_part(prompt, part):
                return  # the rest after the next step
            self._waiting.popleft()
            try:
                number = self._decoder.add(
                    prompt,
                    sample=completion.sample,
                    config=job.config,
                    end_of_text=self._ends.union(job.ends),
                    describes=describes,
                )
            except UsageError as error:
                self._fail(job, Failure(str(error), "invalid"))
                continue
            unread += new if others else 0
            if completion.sample == 0:
                job.cached_tokens += sequence.known
                self.metrics.prompt_tokens += len(prompt)
                self.metrics.cached_tokens += sequence.known
            self._running[number] = sequence

    def _handle(self, token: Token) -> None:
        sequence = self._running[token.sequence]
        job, completion = sequence.job, sequence.writing.completion
        if token.prompt_details is not None:
            job.prompt_details[completion.prompt] = token.prompt_details
        piece = sequence.writing.add(token)
        if len(completion.tokens) == 1:
            self.metrics.first_token.add(time.monotonic() - job.arrived)
        self.metrics.generated_tokens += 1
        ended = completion.reason is not None
        if ended:
            if completion.sample == 0:
                self._remember(token.sequence)
            if not token.ended:  # a stop text
                self._decoder.end(token.sequence)
            del self._running[token.sequence]
            job.left -= 1
        if ended or (piece and job.streams):
            n = len(completion.tokens)
            job.deliver(Piece(completion, piece, n, ended))

    def _remember(self, number: int) -> None:
        read = self._decoder.copy_of(number) if self.prefixes.most_bytes else None
        if read is not None:
            self.prefixes.keep(*read)

    def _fail(self, job: Job, failure: Failure) -> None:
        if not job.is_over:
            job.is_over = True
            job.deliver(failure)

    def _fail_all(self, error: Exception) -> None:
        """After an error in a step, nothing is known about the batch: end all that was in it."""
        message = str(error) if isinstance(error, UsageError) else f"{type(error).__name__}"
        self.say("".join(traceback.format_exception(error)))
        self.metrics.failures += 1
        for sequence in [*self._running.values(), *itertools.islice(self._waiting, 1)]:
            self._fail(sequence.job, Failure(f"the model failed: {message}", "failed"))
        self._running = {}
        self._waiting = deque(each for each in self._waiting if not each.job.is_over)
        self._decoder = self._new_decoder()


def _settle(future: "Future[T]", function: Callable[[], T]) -> None:
    """Give the future the function's result, or its error."""
    if not future.set_running_or_notify_cancel():
        return
    try:
        future.set_result(function())
    except Exception as error:  # the thread must outlive it
        future.set_exception(error)


def rows_that_fit(model: GPT, wanted: int, length: int, cache: CacheFormat = "float") -> int:
    """The number of sequences of ``length`` tokens to continue at once: ``wanted``, or if that is
    0, :data:`MOST_ROWS` or as many as half of the memory has room for. ``UsageError`` if there is
    no memory for that many.
    """
    if wanted:
        check_cache(model, wanted, length, cache)
        return wanted
    for rows in range(MOST_ROWS, 1, -1):
        try:
            check_cache(model, 2 * rows, length, cache)
        except UsageError:
            continue
        return rows
    check_cache(model, 1, length, cache)
    return 1
