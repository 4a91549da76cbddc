"""Triton adapter of the PyTorch engines; the logic is in ``mtgr.engines.baseline`` and ``mtgr.engines.compiled``."""

import json
from pathlib import Path

import numpy as np
import torch
import triton_python_backend_utils as pb_utils

from mtgr.engines.baseline import BaselineEngine
from mtgr.engines.compiled import CompiledEngine, require_gpu, usual_shapes
from mtgr.errors import InvalidRequestError

INPUTS = ("context", "candidates")


class TritonPythonModel:
    """One forward pass for each set of requests of equal shape, which is what the batcher hands over."""

    def initialize(self, args):
        """Load the checkpoint that lies beside this file."""
        configured = json.loads(args["model_config"]).get("parameters", {})
        parameters = {name: value.get("string_value", "") for name, value in configured.items()}
        torch.set_num_threads(int(parameters.get("threads", "1")))
        on_gpu = args["model_instance_kind"] == "GPU"
        device = f"cuda:{args['model_instance_device_id']}" if on_gpu else "cpu"
        checkpoint = Path(args["model_repository"]) / args["model_version"]
        if parameters.get("engine") == "compiled":
            require_gpu(parameters["precision"], device)
            self.engine = CompiledEngine(checkpoint, device, parameters["precision"])
            self.engine.warm_up(usual_shapes(self.engine.schema.max_context))
        else:
            self.engine = BaselineEngine(checkpoint, device)

    def execute(self, requests):
        """Responses in the order of the requests."""
        responses = [None] * len(requests)
        groups = {}
        for index, request in enumerate(requests):
            if request.is_cancelled():
                responses[index] = _error("the request was cancelled.", pb_utils.TritonError.CANCELLED)
                continue
            tensors = {}
            for name in INPUTS:
                tensor = pb_utils.get_input_tensor_by_name(request, name)
                if tensor is not None:
                    tensors[name] = tensor.as_numpy()
            key = tuple((name, array.shape[1:]) for name, array in tensors.items())
            groups.setdefault(key, []).append((index, tensors))
        for members in groups.values():
            for index, response in zip((i for i, _ in members), self._run([t for _, t in members]), strict=True):
                responses[index] = response
        return responses

    def _run(self, batch):
        names = batch[0].keys()
        merged = {
            name: batch[0][name] if len(batch) == 1 else np.concatenate([t[name] for t in batch]) for name in names
        }
        try:
            answer = self.engine.infer(merged)
        except InvalidRequestError as error:
            if len(batch) > 1:  # find the one that is wrong; the others are answered
                return [response for tensors in batch for response in self._run([tensors])]
            return [_error(str(error), pb_utils.TritonError.INVALID_ARG)]
        except RuntimeError as error:  # PyTorch's, such as out of memory: these requests fail, the next may not
            return [_error(f"the network failed: {error}", pb_utils.TritonError.INTERNAL) for _ in batch]
        ends = np.cumsum([len(tensors["context"]) for tensors in batch])[:-1]
        parts = {name: np.split(array, ends) for name, array in answer.items()}
        return [
            pb_utils.InferenceResponse([pb_utils.Tensor(name, arrays[index]) for name, arrays in parts.items()])
            for index in range(len(batch))
        ]


def _error(message, code):
    return pb_utils.InferenceResponse(error=pb_utils.TritonError(message, code))
