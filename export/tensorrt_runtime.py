"""The runner of plans that also serves them where Triton has no TensorRT backend of its own. Needs no PyTorch."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

from mtgr.errors import ConfigurationError

_NAME = "tensorrt_plan"
_SOURCE = Path(__file__).resolve().parent.parent / "backends" / "tensorrt" / f"{_NAME}.py"


def plan_runtime() -> Any:
    """The module ``backends/tensorrt/tensorrt_plan.py``, with ``Plan``: what is compared and timed is what serves.

    Raises:
        ConfigurationError: If it is not there.
    """
    if _NAME not in sys.modules:
        spec = importlib.util.spec_from_file_location(_NAME, _SOURCE)
        if spec is None or spec.loader is None or not _SOURCE.is_file():
            raise ConfigurationError(f"{_SOURCE} is missing; plans are checked with it, so work in a whole checkout.")
        sys.modules[_NAME] = module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    return sys.modules[_NAME]
