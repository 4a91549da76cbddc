"""Names and signatures of TensorRT's public Python bindings, for hosts without TensorRT.

``python -m tests.static.tensorrt_bindings OUT.json`` writes ``tests/data/tensorrt-11.4-api.json``. It needs an
environment with the wheel ``tensorrt-cu13-bindings==11.4.0.106`` from PyPI and a C compiler; the libraries that the
bindings load are stand-ins without content, so nothing can be built or run there. Written are names of modules,
classes, attributes, parameters, and result types: no code and no documentation of NVIDIA's.
"""

from __future__ import annotations

import ctypes
import importlib
import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

CLASSES = (
    "Builder", "IBuilderConfig", "ICudaEngine", "IExecutionContext", "IHostMemory", "ILayer", "ILogger",
    "INetworkDefinition", "IOptimizationProfile", "IProgressMonitor", "ITensor", "ITimingCache", "Logger",
    "OnnxParser", "ParserError", "Runtime",
)  # fmt: skip
ENUMS = (
    "BuilderFlag", "DataType", "HardwareCompatibilityLevel", "LayerType", "MemoryPoolType",
    "NetworkDefinitionCreationFlag", "ProfilingVerbosity", "TensorIOMode",
)  # fmt: skip
SYMBOLS = (
    "createInferBuilder_INTERNAL", "createInferRefitter_INTERNAL", "createInferRuntime_INTERNAL",
    "createNvOnnxParserRefitter_INTERNAL", "createNvOnnxParser_INTERNAL", "getBuilderPluginRegistry", "getLogger",
    "getInferLibVersion", "getNvOnnxParserVersion", "getPluginRegistry", "initLibNvInferPlugins",
)  # fmt: skip
LIBRARIES = ("nvinfer", "nvinfer_plugin", "nvonnxparser")


def main(target: Path) -> None:
    """Import the bindings over stand-ins and write what they declare."""
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "stand_in.c"
        source.write_text("".join(f"void *{name}(void) {{ return 0; }}\n" for name in SYMBOLS), encoding="utf-8")
        for name in LIBRARIES:
            library = source.with_name(f"lib{name}.so.11")
            options = ["-shared", "-fPIC", "-w", f"-Wl,-soname,{library.name}"]
            subprocess.run(["cc", *options, "-o", library, source], check=True)
            ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)  # found by its name from now on
        bindings = importlib.import_module("tensorrt_bindings")
    result = {
        "about": "Names and signatures only; made by tests/static/tensorrt_bindings.py.",
        "source": f"tensorrt-cu13-bindings {bindings.__version__} (PyPI), the public Python API of NVIDIA TensorRT",
        "licence": "The bindings' source is published under Apache-2.0 (github.com/NVIDIA/TensorRT, folder python); "
        "the wheel under NVIDIA's licence. Nothing of either is contained here.",
        "version": bindings.__version__,
        "names": sorted(["__version__", *(name for name in dir(bindings) if not name.startswith("_"))]),
        "enums": {name: sorted(getattr(bindings, name).__members__) for name in ENUMS},
        "classes": {name: _members(getattr(bindings, name)) for name in CLASSES},
    }
    target.write_text(json.dumps(result, indent=1, sort_keys=True) + "\n", encoding="utf-8")


def _members(owner: Any) -> dict[str, Any]:
    """Attribute to its overloads, or to None where it is no method."""
    names = [name for name in dir(owner) if not name.startswith("_") or name == "__init__"]
    return {name: _overloads(name, getattr(owner, name)) for name in names}


def _overloads(name: str, member: Any) -> list[dict[str, Any]] | None:
    if not callable(member):
        return None
    found = re.findall(rf"^(?:\d+\. )?{name}\((self: .*)\) -> (.+)$", member.__doc__ or "", flags=re.MULTILINE)
    return [{"parameters": _parameters(text), "returns": result.rsplit(".", 1)[-1]} for text, result in found]


def _parameters(text: str) -> list[list[Any]]:
    """Name and whether it may be left out, of each parameter after self."""
    parts, depth = [""], 0
    for sign in text:
        depth += (sign in "[(<") - (sign in "])>")
        if sign == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += sign
    return [[part.split(":")[0].strip(), "=" in part] for part in parts[1:]]


if __name__ == "__main__":
    main(Path(sys.argv[1]))
