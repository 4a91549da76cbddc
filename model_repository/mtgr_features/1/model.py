"""Triton adapter of feature extraction; the logic is in ``mtgr.features``."""

import functools
import json
import time
from dataclasses import dataclass, field
from pathlib import Path

import numpy.typing as npt
import triton_python_backend_utils as pb_utils

from mtgr.bundle import load_bundle
from mtgr.collector import settle
from mtgr.errors import ConfigurationError, InvalidRequestError, RequestTimeoutError, UnavailableError
from mtgr.features.cache import CachedStore
from mtgr.features.extract import FeatureExtractor
from mtgr.features.intake import Intake
from mtgr.features.metrics import FeatureMetrics
from mtgr.features.pace import Pace
from mtgr.features.packing import pack
from mtgr.features.settings import feature_settings
from mtgr.logs import EventLog
from mtgr.routing.board import server_board
from mtgr.routing.deadline import Deadline, time_limit
from mtgr.routing.gate import Gate
from mtgr.routing.outbox import Outbox
from mtgr.routing.policy import policy_file
from mtgr.routing.reasons import RefusedError, reason_of
from mtgr.routing.reload import PolicyFile
from mtgr.tracing import request_name, trace_of
from mtgr.triton_metrics import MetricReporter

FINAL = pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL
INPUTS = (
    "user_id",
    "history_items",
    "history_actions",
    "history_times",
    "candidates",
    "request_time",
    "profile",
    "strategy",
    "top_k",
)


@dataclass
class Arrival:
    """A request as it came."""

    deadline: Deadline
    request_id: str
    tensors: dict[str, npt.NDArray] = field(default_factory=dict)
    trace: str = ""
    came: float = field(default_factory=time.perf_counter)
    sender: object = None

    def read(self, request):
        """Look at what is to be worked on."""
        found = {tensor.name(): tensor for tensor in request.inputs()}
        # In this order: of several that are wrong, the first one is named.
        self.tensors = {name: found[name].as_numpy() for name in INPUTS if name in found}
        parameters = request.parameters()
        trace = trace_of(json.loads(parameters)) if parameters else None
        self.trace = "" if trace is None else trace.header()

    def keep(self, sender):
        """Take it over: Triton takes the memory back when ``execute`` returns."""
        self.tensors = {name: array.copy() for name, array in self.tensors.items()}
        self.sender = sender


class TritonPythonModel:
    """Answers requests as they come, or lets them stand in line, where waiting counts and is bounded."""

    def initialize(self, args):
        """Load the installed bundle; without one the model is up and says what to run."""
        self.extractor = None
        self.metrics = FeatureMetrics()
        parameters = json.loads(args["model_config"]).get("parameters", {})
        values = {name: value["string_value"] for name, value in parameters.items()}
        self.policy = PolicyFile(
            policy_file({name: values.pop(name) for name in ("policy", "profile") if name in values})
        )
        settings = feature_settings(values)
        try:
            bundle = load_bundle(Path(args["model_repository"]).parent)
            self.store = CachedStore(bundle.open_store(settings), settings.cache)
            self.extractor = FeatureExtractor(bundle.schema, bundle.catalog, self.store)
            self.extractor.arm = self.policy.current.arm
            self.store_problem = None
            self.log = event_log(self.policy.current)
            self.gate = Gate(server_board(), self.policy.current.admission.max_queue)
            self.outbox = Outbox(lambda error: pb_utils.Logger.log_error(f"features: not sent: {error}"))
            self.intake = Intake(self._answer, self._failed)
            self.pace = Pace()
            self.reporter = MetricReporter(pb_utils, self._changes)
            settle()
        except ConfigurationError as error:
            self.problem = str(error)
            pb_utils.Logger.log_warn(self.problem)

    def execute(self, requests):
        """The answers, or None for those that stand in line, which are sent when their turn comes."""
        if self.extractor is None:
            return [_error(self.problem, pb_utils.TritonError.UNAVAILABLE) for _ in requests]
        self.pace.begin()
        responses = [self._take(request) for request in requests]
        self.pace.end()
        return responses

    def finalize(self):
        """Answer what is here, and let go of the store."""
        if self.extractor is not None:
            self.intake.stop()
            self.outbox.stop()
            self.reporter.stop()
            self.gate.close()
            self.store.close()

    def _changes(self):
        """What to report, once a second; the store's troubles go to the log at the same pace, not once per request."""
        problem = self.store.problem
        if (problem is None) != (self.store_problem is None):
            message = "the feature store answers again." if problem is None else str(problem)
            pb_utils.Logger.log_warn(f"features: {message}")
        self.store_problem = problem
        if self.policy.poll():
            self.extractor.arm = self.policy.current.arm
            self.gate.max_queue = self.policy.current.admission.max_queue
            self.log = event_log(self.policy.current)
        self.gate.refresh()
        self.log.flush()
        if not self.policy.current.monitoring:
            return []
        return self.metrics.changes(self.store.statistics())

    def _take(self, request):
        deadline = Deadline.after(time_limit(request.timeout(), self.policy.current.deadline_seconds))
        arrival = Arrival(deadline, request_name(request.request_id()))
        waiting = self.intake.waiting
        try:
            self.gate.arrive(deadline, waiting)
            arrival.read(request)
            if not waiting and not self.pace.hurried:
                return self._response(arrival)
            arrival.keep(request.get_response_sender())
            self.intake.put(arrival)
        except Exception as error:  # noqa: BLE001 - one request's trouble must not become its neighbours'
            return self._refusal(arrival, error)
        return None

    def _response(self, arrival):
        started = time.perf_counter()
        self.metrics.stage("intake", started - arrival.came)
        features = self.extractor.extract(
            arrival.tensors, arrival.deadline.unix_ms(), arrival.request_id, arrival.trace
        )
        packed = pack(features)
        self.metrics.stage("features", time.perf_counter() - started)
        self.metrics.count(features.labels)
        return pb_utils.InferenceResponse([pb_utils.Tensor("features", packed[None])])

    def _answer(self, arrival):
        self.gate.proceed(arrival.deadline)
        response = self._response(arrival)
        self.outbox.put(functools.partial(arrival.sender.send, response, flags=FINAL), at_once=not self.intake.waiting)

    def _failed(self, arrival, error):
        arrival.sender.send(self._refusal(arrival, error), flags=FINAL)

    def _refusal(self, arrival, error):
        message, code = str(error), pb_utils.TritonError.UNAVAILABLE
        if isinstance(error, InvalidRequestError):
            code = pb_utils.TritonError.INVALID_ARG
        elif isinstance(error, (RefusedError, RequestTimeoutError)):
            reason = reason_of(error)
            self.metrics.refused(reason)
            self.log.warning("not_answered", request_id=arrival.request_id, reason=reason.value, error=message)
        elif not isinstance(error, UnavailableError):
            pb_utils.Logger.log_error(f"features: {type(error).__name__}: {error}")
            message, code = "feature extraction failed; see the server's log.", pb_utils.TritonError.INTERNAL
        return _error(message, code)


def event_log(policy):
    """The log that a policy wants."""
    return EventLog(policy.log.level, policy.log.json)


def _error(message, code):
    return pb_utils.InferenceResponse(error=pb_utils.TritonError(message, code))
