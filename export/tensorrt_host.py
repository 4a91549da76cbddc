"""Whether this host can build plans: its TensorRT and its GPU."""

from __future__ import annotations

import importlib
import re
from typing import Any

from export import tensorrt_compat as compat
from export.tensorrt_device import Gpu, first_gpu
from export.tensorrt_log import one_line
from mtgr.errors import ConfigurationError

SUPPORTED = (10, 11)


def tensorrt_problem() -> str | None:
    """Why this host cannot build plans, a sentence; None if it can."""
    try:
        load_tensorrt()
        this_gpu()
    except ConfigurationError as error:
        return str(error)
    return None


def tensorrt_version() -> tuple[int, int] | None:
    """Major and minor version of the TensorRT here; None where there is none that plans are built with."""
    try:
        return load_tensorrt()[1]
    except ConfigurationError:
        return None


def installed_tensorrt() -> str | None:
    """Full version of the TensorRT here; None where there is none that plans are built with."""
    try:
        return str(load_tensorrt()[0].__version__)
    except ConfigurationError:
        return None


def gpu_variant() -> str | None:
    """Name of the config variant of this host's GPU; None without one."""
    gpu = first_gpu()
    return None if gpu is None else gpu.variant


def load_tensorrt() -> tuple[Any, tuple[int, int]]:
    """The module ``tensorrt`` and its (major, minor) version.

    Raises:
        ConfigurationError: If it is missing, or one that plans are not built with.
    """
    try:
        trt = importlib.import_module("tensorrt")
    except ImportError as error:  # also where the bindings are there and the libraries are not
        raise ConfigurationError(
            f"TensorRT cannot be imported ({one_line(str(error))}); install tensorrt 10 or 11 from NVIDIA's index, "
            "or export inside NVIDIA's Triton image."
        ) from error
    numbers = re.match(r"(\d+)\.(\d+)", getattr(trt, "__version__", ""))
    version = (int(numbers[1]), int(numbers[2])) if numbers else (0, 0)
    if version[0] not in SUPPORTED and not compat.is_legacy(version):
        raise ConfigurationError(
            f"TensorRT {getattr(trt, '__version__', 'of no version')} is installed; plans are built with 10, 11 or 8.6."
        )
    return trt, version


def this_gpu() -> Gpu:
    """The GPU that plans are built on.

    Raises:
        ConfigurationError: If there is none.
    """
    gpu = first_gpu()
    if gpu is None:
        raise ConfigurationError(
            "there is no NVIDIA GPU on this host; build plans on the kind of GPU that serves them."
        )
    return gpu
