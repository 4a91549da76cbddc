"""Small model repositories for the tests of the launcher: trivial doors, tiny ONNX graphs, models that fail."""

from __future__ import annotations

from pathlib import Path

import onnx
from onnx import TensorProto, helper

DOORS = ("mtgr", "mtgr_features", "mtgr_router")

# Without a table row for the index, ONNX Runtime refuses the whole batch.
GATHER_TABLE = [10.0, 11.0, 12.0, 13.0]

_CONFIG = """\
backend: "{backend}"
max_batch_size: {max_batch_size}
input [ {{ name: "x" data_type: {input_type} dims: {input_dims} }} ]
output [ {{ name: "y" data_type: {output_type} dims: {output_dims} }} ]
instance_group [ {{ count: 1 kind: KIND_CPU }} ]
{more}
"""

_ENSEMBLE = """\
platform: "ensemble"
input [ { name: "x" data_type: TYPE_FP32 dims: [ -1 ] } ]
output [ { name: "y" data_type: TYPE_FP32 dims: [ -1 ] } ]
ensemble_scheduling { step [ %s ] }
"""
_STEP = """\
{ model_name: "%s" model_version: -1
  input_map { key: "x" value: "%s" } output_map { key: "y" value: "%s" } }
"""

_IDENTITY = """\
import triton_python_backend_utils as pb_utils


class TritonPythonModel:
    def initialize(self, args):
{initialize}

    def execute(self, requests):
        inputs = [pb_utils.get_input_tensor_by_name(request, "x").as_numpy() for request in requests]
        return [pb_utils.InferenceResponse([pb_utils.Tensor("y", array)]) for array in inputs]
"""


def add_config(
    repository: Path,
    name: str,
    backend: str,
    *,
    max_batch_size: int = 0,
    input_type: str = "TYPE_FP32",
    input_dims: str = "[ -1 ]",
    output_type: str = "TYPE_FP32",
    output_dims: str = "[ -1 ]",
    more: str = "",
) -> Path:
    """Write a config.pbtxt and return the folder of version 1."""
    version = repository / name / "1"
    version.mkdir(parents=True)
    (repository / name / "config.pbtxt").write_text(
        _CONFIG.format(
            backend=backend,
            max_batch_size=max_batch_size,
            input_type=input_type,
            input_dims=input_dims,
            output_type=output_type,
            output_dims=output_dims,
            more=more,
        )
    )
    return version


def add_identity(repository: Path, name: str, initialize: str = "pass") -> None:
    """Add a Python model that returns its input; ``initialize`` is a statement that runs at load."""
    version = add_config(repository, name, "python")
    (version / "model.py").write_text(_IDENTITY.format(initialize=f"        {initialize}"))


def add_doors(repository: Path) -> Path:
    """Add the three models without which a start fails."""
    for name in DOORS:
        add_identity(repository, name)
    return repository


def add_ensemble(repository: Path) -> None:
    """Add the door as an ensemble of its two steps."""
    steps = [_STEP % ("mtgr_features", "x", "rows"), _STEP % ("mtgr_router", "rows", "y")]
    (repository / "mtgr" / "1").mkdir(parents=True)
    (repository / "mtgr" / "config.pbtxt").write_text(_ENSEMBLE % ",".join(steps))


def add_onnx(repository: Path, name: str, kind: str, delay_us: int = 0, **config: object) -> None:
    """Add an ONNX model: ``double`` (y = x + x) or ``gather`` (y = GATHER_TABLE[x]), both over FP32 [batch, width]."""
    if kind == "double":
        input_type, node = TensorProto.FLOAT, helper.make_node("Add", ["x", "x"], ["y"])
        initializers = []
        settings: dict[str, object] = {}
    else:
        input_type, node = TensorProto.INT32, helper.make_node("Gather", ["table", "x"], ["y"])
        initializers = [helper.make_tensor("table", TensorProto.FLOAT, [len(GATHER_TABLE)], GATHER_TABLE)]
        settings = {"input_type": "TYPE_INT32"}
    graph = helper.make_graph(
        [node],
        name,
        [helper.make_tensor_value_info("x", input_type, ["batch", "width"])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", "width"])],
        initializers,
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=10)
    more = 'parameters { key: "intra_op_thread_count" value: { string_value: "1" } }\n'
    if delay_us:
        more += f"dynamic_batching {{ max_queue_delay_microseconds: {delay_us} }}\n"
    settings |= {"max_batch_size": 8, "more": more}
    version = add_config(repository, name, "onnxruntime", **(settings | config))  # type: ignore[arg-type]
    onnx.save(model, version / "model.onnx")
