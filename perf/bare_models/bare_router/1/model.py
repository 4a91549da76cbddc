"""Has the engine score the next of some ready rows, and answers with what it says."""

import itertools
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import triton_python_backend_utils as pb_utils

FINAL = pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL
ENGINE = "mtgr_onnx_rank"
CALLS = 64


class TritonPythonModel:
    """Calls of the engine overlap, as those of the real router do, but are not merged."""

    def initialize(self, args):
        """Load the rows."""
        with np.load(Path(args["model_repository"]) / "ready.npz") as ready:
            count = sum(name.startswith("context/") for name in ready.files)
            rows = [(ready[f"context/{index}"][None], ready[f"candidates/{index}"][None]) for index in range(count)]
        self.ready = itertools.cycle(rows)
        self.calls = ThreadPoolExecutor(CALLS)

    def execute(self, requests):
        """Hand each request to a thread and return at once."""
        for request in requests:
            request.inputs()[0].as_numpy()
            self.calls.submit(self._answer, request.get_response_sender(), *next(self.ready))

    def finalize(self):
        """Let calls end."""
        self.calls.shutdown()

    def _answer(self, sender, context, candidates):
        request = pb_utils.InferenceRequest(
            model_name=ENGINE,
            requested_output_names=["task_scores"],
            inputs=[pb_utils.Tensor("context", context), pb_utils.Tensor("candidates", candidates)],
            preferred_memory=pb_utils.PreferredMemory(pb_utils.TRITONSERVER_MEMORY_CPU, 0),
        )
        response = request.exec()
        if response.has_error():
            sender.send(pb_utils.InferenceResponse(error=response.error()), flags=FINAL)
            return
        scores = pb_utils.get_output_tensor_by_name(response, "task_scores").as_numpy()
        outputs = [
            pb_utils.Tensor("items", np.zeros((1, scores.shape[1]), np.int64)),
            pb_utils.Tensor("scores", scores[:, :, 0].copy()),
            pb_utils.Tensor("task_scores", scores),
        ]
        text = np.array([[b"onnx"]], dtype=np.object_)
        outputs += [pb_utils.Tensor(name, text) for name in ("strategy", "arm", "labels", "explanation")]
        sender.send(pb_utils.InferenceResponse(outputs), flags=FINAL)
