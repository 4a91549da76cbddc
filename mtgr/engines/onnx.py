"""The ``onnx`` engine in process: one exported graph, run by ONNX Runtime."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy.typing as npt
import onnxruntime
from onnxruntime.capi import onnxruntime_pybind11_state as ort_errors

from mtgr.errors import ConfigurationError

Arrays = dict[str, npt.NDArray[Any]]

# They share no base class but Exception.
_LOAD_ERRORS = (
    ort_errors.Fail,
    ort_errors.InvalidArgument,
    ort_errors.InvalidGraph,
    ort_errors.InvalidProtobuf,
    ort_errors.NotImplemented,
    ort_errors.RuntimeException,
)


class OnnxEngine:
    """Runs a graph exported by ``export.onnx``.

    Args:
        path: The ``model.onnx``.
        threads: Threads within an operator.

    Raises:
        ConfigurationError: If the file is missing or ONNX Runtime refuses it.
    """

    def __init__(self, path: Path, threads: int = 1) -> None:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.log_severity_level = 3
        # Idle threads that spin would take the cores from whoever shares them.
        options.add_session_config_entry("session.force_spinning_stop", "1")
        try:
            self._session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        except ort_errors.NoSuchFile as error:
            raise ConfigurationError(f"there is no graph at {path}; run `make export`.") from error
        except _LOAD_ERRORS as error:
            raise ConfigurationError(f"ONNX Runtime cannot load {path}: {error}") from error

    def infer(self, inputs: Mapping[str, npt.NDArray[Any]], outputs: Sequence[str]) -> Arrays:
        """Run one batch.

        Args:
            inputs: ``context`` INT32 [B, n, W] and, for ranking graphs, ``candidates`` INT32 [B, k, W].
            outputs: Names of the outputs to return.
        """
        return dict(zip(outputs, self._session.run(list(outputs), dict(inputs)), strict=True))
