"""Triton adapter of feature extraction; the logic is in ``mtgr.features``."""

import dataclasses
import json
import time
from pathlib import Path

import numpy as np
import triton_python_backend_utils as pb_utils

from mtgr.bundle import load_bundle
from mtgr.errors import ConfigurationError, InvalidRequestError, UnavailableError
from mtgr.features.cache import CachedStore
from mtgr.features.extract import FeatureExtractor
from mtgr.features.metrics import FeatureMetrics
from mtgr.features.settings import feature_settings
from mtgr.routing.deadline import Deadline, time_limit
from mtgr.routing.policy import policy_file
from mtgr.routing.reload import PolicyFile
from mtgr.tracing import request_name, trace_of
from mtgr.triton_metrics import MetricReporter

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


class TritonPythonModel:
    """Answers every request of a batch by itself, so that a bad one does not touch its neighbours."""

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
            self.reporter = MetricReporter(pb_utils, self._changes)
        except ConfigurationError as error:
            self.problem = str(error)
            pb_utils.Logger.log_warn(self.problem)

    def execute(self, requests):
        """One response per request."""
        return [self._respond(request) for request in requests]

    def finalize(self):
        """Let go of the store."""
        if self.extractor is not None:
            self.reporter.stop()
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
        if not self.policy.current.monitoring:
            return []
        return self.metrics.changes(self.store.statistics())

    def _respond(self, request):
        if self.extractor is None:
            return _error(self.problem, pb_utils.TritonError.UNAVAILABLE)
        tensors = {}
        for name in INPUTS:
            tensor = pb_utils.get_input_tensor_by_name(request, name)
            if tensor is not None:
                tensors[name] = tensor.as_numpy()
        try:
            started = time.perf_counter()
            seconds = time_limit(request.timeout(), self.policy.current.deadline_seconds)
            trace = trace_of(json.loads(request.parameters() or "{}"))
            features = dataclasses.replace(
                self.extractor.extract(tensors),
                deadline_ms=Deadline.after(seconds).unix_ms(),
                request_id=request_name(request.request_id()),
                trace="" if trace is None else trace.header(),
            )
            self.metrics.stage("features", time.perf_counter() - started)
        except InvalidRequestError as error:
            return _error(str(error), pb_utils.TritonError.INVALID_ARG)
        except UnavailableError as error:
            return _error(str(error), pb_utils.TritonError.UNAVAILABLE)
        except Exception as error:  # noqa: BLE001 - one request's trouble must not become its neighbours'
            pb_utils.Logger.log_error(f"features: {type(error).__name__}: {error}")
            return _error("feature extraction failed; see the server's log.", pb_utils.TritonError.INTERNAL)
        self.metrics.count(features.labels)
        return pb_utils.InferenceResponse(
            [
                pb_utils.Tensor("context", features.context[None]),
                pb_utils.Tensor("candidate_state", features.candidate_state[None]),
                pb_utils.Tensor("valid_candidates", features.candidates[None]),
                pb_utils.Tensor("plan", np.array([[features.plan()]], dtype=np.object_)),
            ]
        )


def _error(message, code):
    return pb_utils.InferenceResponse(error=pb_utils.TritonError(message, code))
