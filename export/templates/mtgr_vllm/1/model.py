"""Triton adapter of the vllm engine; the logic is in ``mtgr.engines.vllm_service``."""

import functools
import json
import locale
import threading
from pathlib import Path

import triton_python_backend_utils as pb_utils

from mtgr.collector import settle
from mtgr.engines.vllm_metrics import VLLMMetrics
from mtgr.engines.vllm_service import Call, CancelledRequestError, ServiceConfig, VLLMService
from mtgr.errors import InvalidRequestError, UnavailableError
from mtgr.routing.outbox import Outbox
from mtgr.triton_metrics import MetricReporter

FINAL = pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL


class TritonPythonModel:
    """Answers each request through its response sender as soon as it is done, whoever came before it."""

    def initialize(self, args):
        """Start the engine that lies beside this file."""
        # The stub embeds Python in the C locale, in which vLLM cannot read its own files.
        locale.setlocale(locale.LC_ALL, "C.UTF-8")
        parameters = json.loads(args["model_config"]).get("parameters", {})
        values = {name: value["string_value"] for name, value in parameters.items()}
        version = Path(args["model_repository"]) / args["model_version"]
        self.outbox = Outbox(lambda error: pb_utils.Logger.log_error(f"vllm: an answer was not sent: {error}"))
        self.service = VLLMService(version, ServiceConfig.from_parameters(values), pb_utils.Logger.log_error)
        settle()
        metrics = VLLMMetrics(self.service)
        self.reporter = MetricReporter(pb_utils, metrics.changes)

    def execute(self, requests):
        """Hand the requests over: nothing of them is read after that, for Triton takes their memory back."""
        for request in requests:
            sender = request.get_response_sender()
            limit = request.timeout() / 1e6
            inputs = {tensor.name(): tensor.as_numpy() for tensor in request.inputs()}
            reply = Reply(sender)
            self.service.submit(Call(inputs, functools.partial(self._respond, reply), reply.cancelled, limit or None))

    def finalize(self):
        """Let requests in flight end, then end the engine."""
        self.reporter.stop()
        self.service.close()
        self.outbox.stop()

    def _respond(self, reply, answer):
        # A lone request is answered right here: nobody is held up.
        self.outbox.put(functools.partial(reply.send, answer), at_once=not self.service.in_flight)


class Reply:
    """A response sender that is asked nothing more once it has sent: Triton 2.51 ends at such a question."""

    def __init__(self, sender):
        self.sender = sender
        self.sent = False
        self.lock = threading.Lock()

    def cancelled(self):
        """Whether the caller gave up."""
        with self.lock:
            return not self.sent and self.sender.is_cancelled()

    def send(self, answer):
        """Send an answer or an error to whoever asked."""
        if isinstance(answer, Exception):
            response = pb_utils.InferenceResponse(error=triton_error(answer))
        else:
            response = pb_utils.InferenceResponse([pb_utils.Tensor(name, array) for name, array in answer.items()])
        with self.lock:
            self.sent = True
            self.sender.send(response, flags=FINAL)


def triton_error(error):
    """The error with Triton's code for it."""
    codes = {
        InvalidRequestError: pb_utils.TritonError.INVALID_ARG,
        UnavailableError: pb_utils.TritonError.UNAVAILABLE,
        CancelledRequestError: pb_utils.TritonError.CANCELLED,
    }
    if type(error) in codes:
        return pb_utils.TritonError(str(error), codes[type(error)])
    pb_utils.Logger.log_error(f"vllm: {type(error).__name__}: {error}")
    return pb_utils.TritonError("the vllm engine failed; see the server's log.", pb_utils.TritonError.INTERNAL)
