"""Triton adapter of the PyTorch engines; the logic is in ``mtgr.engines.baseline`` and ``mtgr.engines.compiled``."""

import functools
import json
from pathlib import Path

import numpy as np
import torch
import triton_python_backend_utils as pb_utils

from mtgr.collector import settle
from mtgr.engines.baseline import BaselineEngine
from mtgr.engines.compiled import CompiledEngine, frequent_shapes, require_gpu, usual_shapes
from mtgr.errors import InvalidRequestError
from mtgr.routing.outbox import Outbox

INPUTS = ("context", "candidates")
CAPTURE_SECONDS = 30  # of the start; what is not captured then goes through larger graphs until traffic pauses
FINAL = pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL


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
            self.engine = CompiledEngine(checkpoint, device, parameters["precision"], log=pb_utils.Logger.log_info)
            longest = self.engine.schema.max_context
            self.engine.warm_up(usual_shapes(longest))
            self.engine.warm_up(frequent_shapes(longest), measure=False, seconds=CAPTURE_SECONDS)
        else:
            self.engine = BaselineEngine(checkpoint, device)

        settle()
        self.outbox = Outbox(lambda error: pb_utils.Logger.log_error(f"baseline: an answer was not sent: {error}"))

    def execute(self, requests):
        """Hand the requests over and return: answers are sent while the next batch is computed."""
        groups = {}
        for request in requests:
            sender = request.get_response_sender()
            if request.is_cancelled():
                sender.send(_error("the request was cancelled.", pb_utils.TritonError.CANCELLED), flags=FINAL)
                continue
            tensors = {}
            for name in INPUTS:
                tensor = pb_utils.get_input_tensor_by_name(request, name)
                if tensor is not None:
                    tensors[name] = tensor.as_numpy()
            key = tuple((name, array.shape[1:]) for name, array in tensors.items())
            groups.setdefault(key, []).append((sender, tensors))
        for members in groups.values():
            self._serve(members)

    def finalize(self):
        """Let batches under way end."""
        self.outbox.stop()
        if isinstance(self.engine, CompiledEngine):
            self.engine.close()

    def _serve(self, members):
        batch = [tensors for _, tensors in members]
        merged = {
            name: batch[0][name] if len(batch) == 1 else np.concatenate([t[name] for t in batch]) for name in batch[0]
        }
        try:
            # Rows are taken over here: Triton takes their memory back when execute returns.
            pending = self.engine.submit(merged)
        except InvalidRequestError as error:
            if len(members) > 1:  # find the one that is wrong; the others are answered
                for member in members:
                    self._serve([member])
            else:
                members[0][0].send(_error(str(error), pb_utils.TritonError.INVALID_ARG), flags=FINAL)
        except RuntimeError as error:
            _fail(members, error)
        else:
            members = [(sender, len(tensors["context"])) for sender, tensors in members]
            # What the GPU computes is waited for where answers are sent.
            self.outbox.put(functools.partial(_answer, pending, members), at_once=pending.ready)


def _answer(pending, members):
    try:
        outputs = pending.wait()
    except RuntimeError as error:
        _fail(members, error)
        return
    first = 0
    for sender, users in members:
        parts = [pb_utils.Tensor(name, array[first : first + users]) for name, array in outputs.items()]
        sender.send(pb_utils.InferenceResponse(parts), flags=FINAL)
        first += users


def _fail(members, error):
    """PyTorch's errors, such as out of memory: these requests fail, the next may not."""
    for sender, _ in members:
        sender.send(_error(f"the network failed: {error}", pb_utils.TritonError.INTERNAL), flags=FINAL)


def _error(message, code):
    return pb_utils.InferenceResponse(error=pb_utils.TritonError(message, code))
