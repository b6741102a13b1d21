"""One thread that owns the engine, and the way between it and the event loop.

    event loop                          thread
    await worker.submit([...])   ──►    engine.submit(...) for each
    async for update in stream   ◄──    engine.step(), again and again while there is work
    stream.cancel()              ──►    request.cancel(): its pages are free before the next step

What a step brings goes to the event loop in one call; each request of a client has a :class:`Stream`, which keeps its
updates until they are read.
"""

import asyncio
import contextlib
import dataclasses
import logging
import queue
import threading
from collections import deque
from collections.abc import AsyncIterator, Callable, Sequence
from typing import NamedTuple

from minillm.errors import UserError
from minillm.serving.api.errors import CLIENT_LEFT, ApiError
from minillm.serving.request import LogProb, Request

MAX_UNREAD = 4096  # updates of each answer; a reader that is so far behind is given up
log = logging.getLogger(__name__)


class Update(NamedTuple):
    """What one answer of a stream gained in one step."""

    index: int
    """Of the request in the stream."""
    text: str
    ids: list[int]
    log_probs: list[LogProb]
    finish_reason: str | None
    """None: it goes on."""


class Stream:
    """The answers to the requests of one client, as they grow. One reader takes each update once."""

    def __init__(self, requests: Sequence[Request]):
        self.requests = requests
        self._n_open = len(requests)
        self._updates: deque[Update] = deque()
        self._failure: ApiError | None = None
        self._news = asyncio.Event()

    @property
    def is_open(self) -> bool:
        """Return whether an answer has not ended yet."""
        return bool(self._n_open) and self._failure is None

    async def updates(self, *, silence_s: float | None = None) -> AsyncIterator[Update | None]:
        """Yield all updates until every answer has ended; None whenever ``silence_s`` seconds bring none.

        Raises:
            ApiError: the engine failed, or the reader was too slow.
        """
        while self.is_open or self._updates:
            if self._updates:
                yield self._updates.popleft()
                continue
            self._news.clear()
            try:
                await asyncio.wait_for(self._news.wait(), silence_s)
            except asyncio.TimeoutError:
                yield None
        if self._failure is not None:
            raise self._failure

    def cancel(self) -> None:
        """End what still runs; called whenever a client's request ends, for whatever reason."""
        for request in self.requests:
            if request.finish_reason is None:
                request.cancel()

    def add(self, update: Update) -> None:
        """Keep an update for the reader."""
        if len(self._updates) >= MAX_UNREAD * len(self.requests):
            self.fail(ApiError(CLIENT_LEFT, f"the client is {MAX_UNREAD} updates behind: its request is cancelled"))
            self.cancel()
        if self._failure is None:
            self._updates.append(update)
        self._n_open -= update.finish_reason is not None
        self._news.set()

    def fail(self, error: ApiError) -> None:
        """End the stream with an error; the reader gets it next."""
        self._failure = error
        self._updates.clear()
        self._news.set()


class EngineWorker:
    """Runs an engine for an event loop.

    Attributes:
        stats: the engine's, as they were after its last step.
        has_failed: a step failed twice in a row; the thread has ended, and all requests are refused.
    """

    def __init__(self, engine):
        self.engine = engine
        self.stats = dataclasses.replace(engine.stats)
        self.has_failed = False
        self._jobs: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._streams: dict[int, tuple[Request, Stream, int]] = {}  # by id(request): all that have not ended
        self._is_ending = self._is_stopped = False
        self._thread = threading.Thread(target=self._work, name="engine", daemon=True)

    @property
    def state(self) -> str:
        """Return ok, ending (no new requests) or failed (the engine cannot go on)."""
        if self.has_failed:
            return "failed"
        return "ending" if self._is_ending else "ok"

    # ---- the event loop's side --------------------------------------------------------------------------------------

    def start(self) -> None:
        """Start the thread; call it in the event loop."""
        self._loop = asyncio.get_running_loop()
        self._thread.start()

    async def submit(self, requests: Sequence[dict]) -> Stream:
        """Return the stream of several requests, each given as the arguments of ``engine.submit``: all or none.

        Raises:
            UserError: of ``engine.submit``.
            ApiError: the server is ending, or the engine has failed.
        """
        self._check_open()
        accepted: asyncio.Future = self._loop.create_future()
        self._jobs.put(lambda: self._submit(requests, accepted))
        try:
            return await asyncio.shield(accepted)
        except asyncio.CancelledError:  # the client left before the thread came to it
            accepted.add_done_callback(lambda done: done.exception() or done.result().cancel())
            raise

    async def drain(self, grace_s: float) -> None:
        """Refuse new requests and wait for the running ones; after ``grace_s`` seconds they end with what they have."""
        self._is_ending = True
        with contextlib.suppress(asyncio.TimeoutError):
            await asyncio.wait_for(self._until_idle(), grace_s)
        for _, stream, _ in list(self._streams.values()):
            stream.cancel()
        self._jobs.put(lambda: None)  # wakes the thread

    async def stop(self) -> None:
        """Cancel everything and end the thread."""
        await self.drain(0)
        self._jobs.put(self._stop)
        if self._thread.is_alive():
            await asyncio.to_thread(self._thread.join)

    def _check_open(self) -> None:
        if self.state == "failed":
            raise ApiError(500, "the engine has failed: the server must be restarted; its log says why")
        if self.state == "ending":
            raise ApiError(503, "the server is ending: try again later", code="shutting_down")

    async def _until_idle(self) -> None:
        while self._streams:
            await asyncio.sleep(0.02)

    def _deliver(self, updates: list[tuple[Stream, Update]], failures: list[tuple[Stream, ApiError]]) -> None:
        for stream, update in updates:
            stream.add(update)
        for stream, error in failures:
            stream.fail(error)

    # ---- the thread's side ------------------------------------------------------------------------------------------

    def _work(self) -> None:
        while not self._is_stopped:
            self._run_jobs(wait=not self.engine.has_work)
            if self.engine.has_work and not self._is_stopped:
                self._step()
        self._run_jobs(wait=False)  # what came too late is refused

    def _run_jobs(self, *, wait: bool) -> None:
        """Run all jobs that are there; ``wait`` for one if there is none."""
        with contextlib.suppress(queue.Empty):
            self._jobs.get(block=wait)()
            while True:
                self._jobs.get_nowait()()

    def _stop(self) -> None:
        self._is_stopped = True

    def _submit(self, requests: Sequence[dict], accepted: asyncio.Future) -> None:
        submitted: list[Request] = []
        try:
            self._check_open()
            for arguments in requests:
                submitted.append(self.engine.submit(**arguments))
        except Exception as error:
            for request in submitted:
                request.cancel()
            if not isinstance(error, (UserError, ApiError)):
                log.exception("a request could not be submitted")
            self._tell(accepted.set_exception, error)
            return
        stream = Stream(submitted)
        for index, request in enumerate(submitted):
            self._streams[id(request)] = request, stream, index
        self._tell(accepted.set_result, stream)

    def _tell(self, call: Callable, *values) -> None:
        """Let the event loop make a call. If a second Ctrl-C has closed it, nobody listens any more."""
        try:
            self._loop.call_soon_threadsafe(call, *values)
        except RuntimeError:
            self._is_stopped = True

    def _step(self) -> None:
        updates, failures = [], []
        try:
            pieces = self.engine.step()
        except Exception as error:
            failures = self._fail(error)
            pieces = []
        self.stats = dataclasses.replace(self.engine.stats)
        for piece in pieces:
            request, stream, index = self._streams.get(id(piece.request), (None, None, 0))
            if request is None:  # of a submission that was refused as a whole
                continue
            updates.append((stream, Update(index, piece.text, piece.ids, piece.log_probs, request.finish_reason)))
            if request.finish_reason is not None:
                del self._streams[id(request)]
            if request.finish_reason == "error":
                failures.append((stream, ApiError(500, request.error or "the model failed", code="model_error")))
        if updates or failures:
            self._tell(self._deliver, updates, failures)

    def _fail(self, error: Exception) -> list[tuple[Stream, ApiError]]:
        """Give up all requests after a step that raised; a second failure in a row ends the engine's work."""
        log.error("a step of the engine failed", exc_info=error)
        message = "the engine failed at this request; the server's log says why"
        failures = [(stream, ApiError(500, message, code="engine_error")) for _, stream, _ in self._streams.values()]
        for request, _, _ in self._streams.values():
            request.cancel()
        self._streams.clear()
        try:
            self.engine.step()  # frees the pages of what was cancelled
        except Exception as second:
            log.error("the engine cannot go on", exc_info=second)
            self.has_failed = self._is_stopped = True
        return failures
