"""Triton adapter of feature extraction; the logic is in ``mtgr.features``."""

from pathlib import Path

import numpy as np
import triton_python_backend_utils as pb_utils

from mtgr.bundle import load_bundle
from mtgr.errors import ConfigurationError, InvalidRequestError, UnavailableError
from mtgr.features.extract import FeatureExtractor

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
        try:
            bundle = load_bundle(Path(args["model_repository"]).parent)
            self.extractor = FeatureExtractor(bundle.schema, bundle.catalog, bundle.store())
        except ConfigurationError as error:
            self.problem = str(error)
            pb_utils.Logger.log_warn(self.problem)

    def execute(self, requests):
        """One response per request."""
        return [self._respond(request) for request in requests]

    def _respond(self, request):
        if self.extractor is None:
            return _error(self.problem, pb_utils.TritonError.UNAVAILABLE)
        tensors = {}
        for name in INPUTS:
            tensor = pb_utils.get_input_tensor_by_name(request, name)
            if tensor is not None:
                tensors[name] = tensor.as_numpy()
        try:
            features = self.extractor.extract(tensors)
        except InvalidRequestError as error:
            return _error(str(error), pb_utils.TritonError.INVALID_ARG)
        except UnavailableError as error:
            return _error(str(error), pb_utils.TritonError.UNAVAILABLE)
        except Exception as error:  # noqa: BLE001 - one request's trouble must not become its neighbours'
            pb_utils.Logger.log_error(f"features: {type(error).__name__}: {error}")
            return _error("feature extraction failed; see the server's log.", pb_utils.TritonError.INTERNAL)
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
