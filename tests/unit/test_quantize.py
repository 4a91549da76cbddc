"""INT8 graphs: which products are integers, and that they err as rounded PyTorch does."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch

from export.agreement import check_graph
from export.onnx import calibration_inputs
from export.onnx_graphs import graph_of
from export.quantize import int8_in_pytorch, quantize_for_cpu, quantize_for_tensorrt, weight_products
from export.requests import RealRequests
from export.rows import random_rows
from export.trace import save_graph
from tests.unit.test_export import one_thread
from tests.unit.test_precision import CATALOG, CHECKPOINT, SCHEMA, SHAPES

__all__ = ["one_thread"]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("quantize") / "model.onnx"
    graph = graph_of(CHECKPOINT, "mtgr_onnx_rank")
    save_graph(graph.module, path, random_rows(SCHEMA, CATALOG, 2, 40, 12, np.random.default_rng(0)), graph)
    return path


def operators(path: Path) -> list[str]:
    return [node.op_type for node in onnx.load(path).graph.node]


def test_graphs_for_a_cpu_err_as_rounded_pytorch_does(source: Path, tmp_path: Path) -> None:
    target = tmp_path / "model.onnx"
    count = quantize_for_cpu(source, target)
    assert operators(target).count("MatMulInteger") == count >= 10
    agreement = check_graph(graph_of(CHECKPOINT, "mtgr_onnx_rank", "int8"), target, CHECKPOINT, SHAPES, 1)
    assert agreement.problem("int8") is None
    assert agreement.error > 1e-5, "nothing was rounded"
    assert target.stat().st_size < source.stat().st_size


def test_graphs_for_tensorrt_are_symmetric_pairs_around_weight_products(source: Path, tmp_path: Path) -> None:
    target = tmp_path / "model.onnx"
    count = quantize_for_tensorrt(source, target, calibration_inputs(CHECKPOINT, RealRequests(), 0))
    model = onnx.load(target)
    made_by = {name: node for node in model.graph.node for name in node.output}
    tensors = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    pairs = 0
    for node in model.graph.node:
        if node.op_type != "MatMul":
            continue
        sources = [made_by.get(name) for name in node.input]
        quantised = [maker is not None and maker.op_type == "DequantizeLinear" for maker in sources]
        assert len(set(quantised)) == 1, "an activation is rounded and what it is multiplied with is not"
        if quantised[0]:
            pairs += 1
            for maker in sources:
                assert maker is not None
                assert not tensors[maker.input[2]].any(), "TensorRT wants zero points of 0"
            weight = sources[1]
            assert weight is not None
            assert tensors[weight.input[1]].ndim == 1, "weights have one scale per output channel"
            rounder = made_by[weight.input[0]]
            assert rounder.op_type == "QuantizeLinear", "TensorRT 8.6 wants to round weights itself"
            assert tensors[rounder.input[0]].dtype == np.float32
    assert pairs == count >= 8
    agreement = check_graph(graph_of(CHECKPOINT, "mtgr_onnx_rank", "int8"), target, CHECKPOINT, SHAPES, 1)
    assert agreement.error < 0.2


def test_the_output_projections_alone_are_gated(source: Path, tmp_path: Path) -> None:
    folded = tmp_path / "model.onnx"
    folded.write_bytes(source.read_bytes())
    gated = set(weight_products(folded)) - set(weight_products(folded, gated=False))
    assert len(gated) == CHECKPOINT.config.num_layers


def test_rounded_pytorch_leaves_the_reference_alone() -> None:
    before = {name: tensor.clone() for name, tensor in CHECKPOINT.model.state_dict().items()}
    rounded = int8_in_pytorch(CHECKPOINT.model)
    for name, tensor in CHECKPOINT.model.state_dict().items():
        assert torch.equal(tensor, before[name]), name
    weight = rounded.blocks[0].uvqk.weight.detach()
    assert all(len(row.unique()) <= 255 for row in weight)
    assert not torch.equal(weight, CHECKPOINT.model.blocks[0].uvqk.weight)
