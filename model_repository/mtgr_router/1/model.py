"""Triton adapter of the router; the logic is in ``mtgr.routing``."""

import asyncio
import contextlib
import functools
import json
import os
import threading
import time
from collections import deque
from pathlib import Path

import numpy as np
import triton_python_backend_utils as pb_utils
import uvloop

from mtgr.bundle import load_bundle
from mtgr.collector import settle
from mtgr.errors import ConfigurationError, RequestTimeoutError, UnavailableError
from mtgr.features.packing import unpack
from mtgr.logs import EventLog
from mtgr.metrics import MetricRegistry
from mtgr.routing.board import server_board
from mtgr.routing.calls import CallThreads
from mtgr.routing.drain import DRAIN_VARIABLE, DrainWatch
from mtgr.routing.journal import Journal
from mtgr.routing.outbox import Outbox
from mtgr.routing.policy import policy_file
from mtgr.routing.ranker import Ranker
from mtgr.routing.readiness import artifact_problem, largest_batch, split_version
from mtgr.routing.reasons import EngineLostError
from mtgr.routing.reload import PolicyFile
from mtgr.routing.router import Router
from mtgr.routing.strategies import STRATEGIES
from mtgr.triton_metrics import MetricReporter

FINAL = pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL
CALLS = 512  # of engines at a time, over all requests
LOST = "is not healthy"  # what Triton says of a stub that died, after a second of waiting for it
READINESS_SECONDS = 1.0  # how long a model's readiness is taken to hold


class TritonPythonModel:
    """Answers each request through its response sender as soon as it is done, whoever came before it."""

    def initialize(self, args):
        """Load the installed bundle; without one the model is up, and ``mtgr_features`` says what to run."""
        self.router = None
        self.problem = ""
        repository = Path(args["model_repository"]).parent
        parameters = json.loads(args["model_config"]).get("parameters", {})
        path = policy_file({name: value["string_value"] for name, value in parameters.items()})
        self.policy = PolicyFile(path)
        self.loop = uvloop.new_event_loop()  # a wake-up from another thread costs half of asyncio's own
        self.arrivals = deque()
        self.woken = False  # whether the loop is told already that somebody has come
        self.tasks = set()
        self.outbox = Outbox(lambda error: pb_utils.Logger.log_error(f"router: an answer was not sent: {error}"))
        self.thread = threading.Thread(target=self.loop.run_forever, name="router", daemon=True)
        self.thread.start()
        try:
            bundle = load_bundle(repository)
            engines = BLSEngines(repository, bundle.schema.hash)
            self.metrics = Journal(MetricRegistry(), bundle.schema.item_column, event_log(self.policy.current))
            self.policy.check = lambda policy: Ranker(bundle.schema, bundle.catalog, policy.routing)
            self.board = server_board()
            self.router = Router(
                bundle.schema,
                bundle.catalog,
                engines,
                self.policy.current,
                self.metrics,
                board=self.board,
                largest=engines.largest.get,
            )
            self.reporter = MetricReporter(pb_utils, self._changes)
            settle()
        except ConfigurationError as error:
            self.problem = str(error)
        path = os.environ.get(DRAIN_VARIABLE)
        self.drain_watch = DrainWatch(Path(path), self._drain, self._idle) if path else None

    def execute(self, requests):
        """Schedule the requests and return at once."""
        for request in requests:
            sender = request.get_response_sender()
            try:
                self._take(request, sender)
            except Exception as error:  # noqa: BLE001 - one request's trouble must not become its neighbours'
                failure = _failed(error)
                with contextlib.suppress(Exception):  # the caller may be gone
                    sender.send(_error(*failure), flags=FINAL)
        if self.arrivals and not self.woken:
            self.woken = True
            self.loop.call_soon_threadsafe(self._start)

    def _take(self, request, sender):
        if self.router is None:
            sender.send(_error(self.problem, pb_utils.TritonError.UNAVAILABLE), flags=FINAL)
        elif self.router.admission.waiting and request.is_cancelled():
            # Asking takes a message to the server: worth it where this would keep others waiting.
            sender.send(_error("the request was cancelled.", pb_utils.TritonError.CANCELLED), flags=FINAL)
        else:
            # A copy: Triton takes inputs' memory back when execute returns. The rest is for the loop's thread, for two
            # that want the interpreter's lock at a time hinder each other.
            packed = [tensor.as_numpy().copy() for tensor in request.inputs()]
            self.arrivals.append((packed, sender))

    def _start(self):
        """In the loop: begin with whatever has come."""
        self.woken = False
        while self.arrivals:
            task = self.loop.create_task(self._answer(*self.arrivals.popleft()))
            self.tasks.add(task)  # the loop itself holds tasks weakly
            task.add_done_callback(self.tasks.discard)

    def _drain(self):
        """Refuse what comes from now on: the server is about to stop."""
        if self.router is not None:
            self.loop.call_soon_threadsafe(self.router.admission.drain)

    def _idle(self):
        if self.router is None:
            return True
        return self.router.admission.draining and self.router.admission.idle and self.outbox.idle

    def _changes(self):
        """Once a second: take a changed policy over, and give what is to be reported."""
        if self.policy.poll():
            pb_utils.Logger.log_warn(f"router: {self.policy.problem or f'{self.policy.path} is in force.'}")
            if self.policy.problem is None:
                self.metrics.log = event_log(self.policy.current)
                self.loop.call_soon_threadsafe(self.router.update, self.policy.current)
        if self.board is not None:
            self.board.refresh()
        self.metrics.report(self.policy.current, self.router.admission, self.policy.reloads, self.policy.refusals)
        self.metrics.log.flush()
        changes = self.metrics.registry.changes()
        return changes if self.policy.current.monitoring else []

    async def _answer(self, packed, sender):
        answered = False

        def deliver(ranking):
            nonlocal answered
            answered = True
            self._send(sender, ranking)

        try:
            await self.router.route(_features(packed), deliver)
            return
        except NotFeaturesError:
            message = "this model takes what mtgr_features gives; send requests to the model mtgr."
            failure = (message, pb_utils.TritonError.INVALID_ARG)
        except (UnavailableError, RequestTimeoutError) as error:
            failure = (str(error), pb_utils.TritonError.UNAVAILABLE)
        except Exception as error:  # noqa: BLE001 - whatever happens, a request must get its answer
            failure = _failed(error)
        if answered:  # it went wrong behind the answer
            return
        self.outbox.put(lambda: sender.send(_error(*failure), flags=FINAL), at_once=self.router.admission.idle)

    def _send(self, sender, ranking):
        # A lone request is answered right here: nobody is held up.
        send = functools.partial(_send_ranking, sender, ranking)
        self.outbox.put(send, at_once=self.router.admission.alone)

    def finalize(self):
        """Let requests in flight end, then stop the loop."""

        async def drain():
            self._start()
            rest = asyncio.all_tasks() - {asyncio.current_task()}
            if rest:
                await asyncio.wait(rest, timeout=10)

        if self.drain_watch is not None:
            self.drain_watch.stop()
        if self.router is not None:
            self.reporter.stop()
            if self.board is not None:
                self.board.close()
        asyncio.run_coroutine_threadsafe(drain(), self.loop).result()
        self.outbox.stop()
        self.loop.call_soon_threadsafe(self.loop.stop)
        self.thread.join()
        if self.router is not None:
            self.router.engines.calls.stop()
        self.loop.close()
        _kept_text.cache_clear()  # they lie in memory that goes before the interpreter does


class NotFeaturesError(Exception):
    """A request that did not come from ``mtgr_features``."""


class BLSEngines:
    """Engines as models of the same server."""

    def __init__(self, repository, schema_hash):
        # Judged once, as the server loads: what is exported later is not what runs, until a restart.
        models = [model for strategy in STRATEGIES.values() for model in strategy.models]
        versions = [
            f"{model}@{path.name}"
            for model in models
            for path in (repository / model).glob("*")
            if path.name.isdigit() and path.is_dir()
        ]
        self.problems = {model: artifact_problem(repository, model, schema_hash) for model in (*models, *versions)}
        self.largest = {model: largest_batch(repository, model) for model in self.problems}
        self.known = {}
        # Each call of an engine holds one of these threads until it is answered.
        self.calls = CallThreads(CALLS, "bls")
        self.memory = pb_utils.PreferredMemory(pb_utils.TRITONSERVER_MEMORY_CPU, 0)

    def unready_reason(self, model):
        """None if the model is loaded and fits the schema; asked of the server at most once a second."""
        checked, reason = self.known.get(model, (float("-inf"), None))
        now = time.monotonic()
        if now - checked > READINESS_SECONDS:
            reason = self.problems.get(model, f"{model} was not there when the server started")
            name, version = split_version(model)
            if reason is None and not pb_utils.is_model_ready(name, "" if version is None else str(version)):
                reason = f"{model} is installed but not loaded (restart the server, and see its log)"
            self.known[model] = (now, reason)
        return reason

    async def infer(self, model, inputs, outputs):
        """Call the model; its answer as NumPy arrays."""
        name, version = split_version(model)
        request = pb_utils.InferenceRequest(
            model_name=name,
            model_version=-1 if version is None else version,
            requested_output_names=list(outputs),
            inputs=[pb_utils.Tensor(name, array) for name, array in inputs.items()],
            preferred_memory=self.memory,
        )
        response = await self.calls.run(request.exec)
        if response.has_error():
            message = response.error().message().rstrip(".")
            kind = EngineLostError if LOST in message else UnavailableError
            raise kind(f"{model} failed: {message}")
        return {tensor.name(): tensor.as_numpy() for tensor in response.output_tensors()}


def event_log(policy):
    """The log that a policy wants."""
    return EventLog(policy.log.level, policy.log.json)


def _features(packed):
    try:
        (one,) = packed
        return unpack(one[0])
    except (AttributeError, IndexError, TypeError, ValueError) as error:
        raise NotFeaturesError from error


def _send_ranking(sender, ranking):
    try:
        response = _response(ranking)
    except Exception as error:  # noqa: BLE001 - such as shared memory that is full: the caller must hear something
        response = _error(*_failed(error))
    sender.send(response, flags=FINAL)


def _response(ranking):
    return pb_utils.InferenceResponse(
        [
            pb_utils.Tensor("items", ranking.items[None]),
            pb_utils.Tensor("scores", ranking.scores[None]),
            pb_utils.Tensor("task_scores", ranking.task_scores[None]),
            _text("strategy", ranking.strategy),
            _text("arm", ranking.arm),
            _text("labels", ",".join(ranking.labels)),
            _text("explanation", ranking.explanation),
        ]
    )


def _text(name, value):
    """Kept, for most answers say the same: Triton encodes texts in Python, one by one."""
    # By thread: two that send a tensor for the first time would both give it its shared memory.
    return _kept_text(name, value, threading.get_ident())


@functools.lru_cache(maxsize=1024)
def _kept_text(name, value, thread):
    return pb_utils.Tensor(name, np.array([[value.encode()]], dtype=np.object_))


def _failed(error):
    """Write down what nobody foresaw; what the caller is told of it."""
    pb_utils.Logger.log_error(f"router: {type(error).__name__}: {error}")
    return "the router failed; see the server's log.", pb_utils.TritonError.INTERNAL


def _error(message, code):
    return pb_utils.InferenceResponse(error=pb_utils.TritonError(message, code))
