"""Answers every request with the next of some ready feature tensors."""

import itertools
from pathlib import Path

import numpy as np
import triton_python_backend_utils as pb_utils


class TritonPythonModel:
    """In the way that costs Triton least: a response returned by ``execute``, in its own thread."""

    def initialize(self, args):
        """Load the tensors."""
        with np.load(Path(args["model_repository"]) / "ready.npz") as ready:
            count = sum(name.startswith("features/") for name in ready.files)
            self.ready = itertools.cycle([ready[f"features/{index}"][None] for index in range(count)])

    def execute(self, requests):
        """Read what the real model reads, and answer."""
        responses = []
        for request in requests:
            for tensor in request.inputs():
                tensor.as_numpy()
            responses.append(pb_utils.InferenceResponse([pb_utils.Tensor("features", next(self.ready))]))
        return responses
