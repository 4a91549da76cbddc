"""Precision: what stays fp32 in a typed network, what is refused, and that bf16 is rounded as in PyTorch."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch

from export.agreement import check_graph
from export.fixed import export_fixed
from export.onnx_graphs import graph_of
from export.precision import Agreement, Precision, mean_spearman, rounded_fp32, typed
from export.rows import random_rows
from export.trace import save_graph
from mtgr.checkpoint import Checkpoint
from mtgr.engines.onnx import OnnxEngine
from tests.unit.models import small_catalog, small_config, small_schema, spread_model
from tests.unit.test_export import one_thread

__all__ = ["one_thread"]

# Long enough for the rows that calibrate.
SCHEMA, CATALOG = small_schema(max_history=600), small_catalog()
CONFIG = small_config(relative_bias=True, max_positions=1024)
CHECKPOINT = Checkpoint(spread_model(CONFIG, SCHEMA, CATALOG), CONFIG, SCHEMA, CATALOG)
SHAPES = ((1, 1, 1), (1, 3, 1), (3, 37, 5))


def test_tables_of_biases_and_wide_terms_stay_exact() -> None:
    model = typed(CHECKPOINT.model, "fp16")
    assert model.blocks[0].uvqk.weight.dtype == torch.float16
    for name in ("relative_bias.time_table", "relative_bias.position_table", "wide_terms.table.weight"):
        assert torch.equal(model.get_parameter(name), CHECKPOINT.model.get_parameter(name)), name
    assert CHECKPOINT.model.blocks[0].uvqk.weight.dtype == torch.float32, "the reference itself was converted"


@pytest.mark.parametrize(
    ("agreement", "precision", "reason"),
    [
        (Agreement(9e-6), "fp32", None),
        (Agreement(2e-5), "fp32", "differs from PyTorch by 2.0e-05"),
        (Agreement(float("nan")), "fp16", "no numbers"),
        (Agreement(1.9e-3, 1e-3, 0.9995), "fp16", None),
        (Agreement(2.1e-3, 1e-3, 0.9995), "fp16", "more than twice"),
        (Agreement(1e-3, 1e-3, 0.9985), "bf16", "less than 0.999"),
        (Agreement(1e-3, 1e-3, 0.9985), "int8", None),
        (Agreement(1e-3, 1e-3, 0.9885), "int8", "less than 0.99"),
    ],
)
def test_the_rule(agreement: Agreement, precision: Precision, reason: str | None) -> None:
    problem = agreement.problem(precision)
    assert problem is None if reason is None else reason in str(problem)


def test_rank_correlation_is_the_worst_tasks() -> None:
    scores = np.random.default_rng(0).random((2, 9, 2), dtype=np.float32)
    turned = scores.copy()
    turned[1, :, 1] *= -1
    assert mean_spearman(list(scores), list(scores)) == pytest.approx(1.0)
    assert mean_spearman(list(turned), list(scores)) == pytest.approx(0.0)  # one user of two, one task of two


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_typed_graphs_err_as_pytorch_does(tmp_path: Path, precision: Precision) -> None:
    graph = graph_of(CHECKPOINT, "mtgr_onnx_rank", precision)
    path = tmp_path / "model.onnx"
    example = random_rows(SCHEMA, CATALOG, 2, 40, 12, np.random.default_rng(0))
    save_graph(graph.module, path, example, graph)
    stored = {tensor.data_type for tensor in onnx.load(path).graph.initializer if len(tensor.dims) == 2}
    assert getattr(onnx.TensorProto, {"fp16": "FLOAT16", "bf16": "BFLOAT16"}[precision]) in stored
    agreement = check_graph(graph, path, CHECKPOINT, SHAPES, 1)
    assert agreement.problem(precision) is None
    assert agreement.error > 1e-5, "nothing was rounded"
    if precision == "bf16":
        rounded = tmp_path / "rounded.onnx"
        assert rounded_fp32(path, rounded) > 50
        rows = random_rows(SCHEMA, CATALOG, 2, 30, 20, np.random.default_rng(2))
        inputs = dict(zip(graph.inputs, (row.numpy() for row in rows), strict=True))
        found = OnnxEngine(rounded).infer(inputs, ["task_scores"])["task_scores"]
        with torch.inference_mode():
            native, exact = graph.module(*rows).numpy(), CHECKPOINT.model(*rows).numpy()
        # Rounded at the same places, though in another order.
        assert 0.5 < np.abs(found - exact).mean() / np.abs(native - exact).mean() < 2


def test_a_graph_of_one_shape_computes_no_shape(tmp_path: Path) -> None:
    manifest = export_fixed(CHECKPOINT, "mtgr_onnx_rank", tmp_path / "fixed", (2, 64, 16), opset=17)
    assert (manifest.parity["shapes"], manifest.versions["opset"]) == ([[2, 64, 16]], "17")
    model = onnx.load(tmp_path / "fixed" / "model.onnx")
    assert [[dim.dim_value for dim in value.type.tensor_type.shape.dim] for value in model.graph.input] == [
        [2, 64, SCHEMA.width],
        [2, 16, SCHEMA.width],
    ]
    assert not {node.op_type for node in model.graph.node} & {"Shape", "Range", "ConstantOfShape", "NonZero", "Loop"}
    rows = random_rows(SCHEMA, CATALOG, 2, 64, 16, np.random.default_rng(3))
    inputs = {"context": rows[0].numpy(), "candidates": rows[1].numpy()}
    found = OnnxEngine(tmp_path / "fixed" / "model.onnx").infer(inputs, ["task_scores"])["task_scores"]
    with torch.inference_mode():
        np.testing.assert_allclose(found, CHECKPOINT.model(*rows).numpy(), rtol=0, atol=1e-5)
