"""Triton adapter of feature extraction; the logic is in ``mtgr.features``."""

import dataclasses
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
    sender: object
    tensors: dict[str, npt.NDArray] = field(default_factory=dict)
    trace: str = ""
    came: float = field(default_factory=time.perf_counter)

    def read(self, request):
        """Take over what is to be worked on; copies, because Triton takes the memory back when ``execute`` returns."""
        found = {tensor.name(): tensor for tensor in request.inputs()}
        # In this order: of several that are wrong, the first one is named.
        self.tensors = {name: found[name].as_numpy().copy() for name in INPUTS if name in found}
        trace = trace_of(json.loads(request.parameters() or "{}"))
        self.trace = "" if trace is None else trace.header()


class TritonPythonModel:
    """Answers each request by itself through its response sender: refused ones at once, the others in turn."""

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
            self.reporter = MetricReporter(pb_utils, self._changes)
            settle()
        except ConfigurationError as error:
            self.problem = str(error)
            pb_utils.Logger.log_warn(self.problem)

    def execute(self, requests):
        """Take the requests in and return at once."""
        for request in requests:
            sender = request.get_response_sender()
            if self.extractor is None:
                sender.send(_error(self.problem, pb_utils.TritonError.UNAVAILABLE), flags=FINAL)
                continue
            deadline = Deadline.after(time_limit(request.timeout(), self.policy.current.deadline_seconds))
            arrival = Arrival(deadline, request_name(request.request_id()), sender)
            try:
                self.gate.arrive(deadline, self.intake.waiting)
                arrival.read(request)
            except Exception as error:  # noqa: BLE001 - one request's trouble must not become its neighbours'
                self._failed(arrival, error)
            else:
                self.intake.put(arrival)

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

    def _answer(self, arrival):
        started = time.perf_counter()
        self.metrics.stage("intake", started - arrival.came)
        self.gate.proceed(arrival.deadline)
        features = dataclasses.replace(
            self.extractor.extract(arrival.tensors),
            deadline_ms=arrival.deadline.unix_ms(),
            request_id=arrival.request_id,
            trace=arrival.trace,
        )
        self.metrics.stage("features", time.perf_counter() - started)
        self.metrics.count(features.labels)
        packed = pack(features)[None]

        def send():
            arrival.sender.send(pb_utils.InferenceResponse([pb_utils.Tensor("features", packed)]), flags=FINAL)

        self.outbox.put(send, at_once=not self.intake.waiting)

    def _failed(self, arrival, error):
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
        arrival.sender.send(_error(message, code), flags=FINAL)


def event_log(policy):
    """The log that a policy wants."""
    return EventLog(policy.log.level, policy.log.json)


def _error(message, code):
    return pb_utils.InferenceResponse(error=pb_utils.TritonError(message, code))
