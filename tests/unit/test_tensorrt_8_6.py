"""TensorRT 8.6: precision that it does not see in a graph, and the ways to a plan where it refuses one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from export.tensorrt import build_tensorrt_engine
from export.tensorrt_options import BuildOptions
from export.tensorrt_ways import PLAIN, WAYS, Way, build_first, ways_to
from mtgr.errors import ConfigurationError
from mtgr.manifest import Manifest
from tests.unit.fake_tensorrt import Layer, Tensor, failed_build, fake_tensorrt, install, write_graph


@pytest.fixture
def legacy(monkeypatch: pytest.MonkeyPatch) -> Any:
    return install(fake_tensorrt("8.6.0"), monkeypatch)


@pytest.fixture
def graph(tmp_path: Path) -> Path:
    return write_graph(tmp_path)


def test_8_6_is_weakly_typed_and_keeps_fp32_parts(legacy: Any, graph: Path, tmp_path: Path) -> None:
    """A network as 8.6 parses it: all floats claim to be fp32; weights and casts know better."""
    kinds, float32, float16 = legacy.LayerType, legacy.DataType.FLOAT, legacy.DataType.HALF

    def tensor(name: str, dtype: Any = float32) -> Tensor:
        return Tensor(name, dtype, (-1,))

    index, table, time, weight = (
        tensor("index", legacy.DataType.INT32),
        tensor("table"),
        tensor("time"),
        tensor("w"),
    )
    norm, narrow, product, silu, wide, scores = map(tensor, ("norm", "narrow", "product", "silu", "wide", "scores"))
    pinned = [
        Layer(kinds.ELEMENTWISE, norm, inputs=(time, time)),
        Layer(kinds.GATHER, tensor("bias"), inputs=(table, index)),  # by position
        Layer(kinds.TOPK, tensor("best"), tensor("places", legacy.DataType.INT32), inputs=(norm,)),
    ]
    to_half, back = Layer(kinds.CAST, narrow, inputs=(norm,)), Layer(kinds.CAST, wide, inputs=(silu,))
    to_half.to_type, back.to_type = float16, float32
    wide_table, half = Layer(kinds.CONSTANT, table), Layer(kinds.CONSTANT, weight)
    wide_table.weights, half.weights = np.zeros(1, np.float32), np.zeros(1, np.float16)
    embedded = Layer(kinds.GATHER, tensor("token"), inputs=(weight, index))
    free = [
        wide_table,
        half,
        embedded,
        to_half,
        Layer(kinds.MATRIX_MULTIPLY, product, inputs=(narrow, weight)),
        Layer(kinds.ACTIVATION, silu, inputs=(product,)),
        back,
        Layer(kinds.GATHER, tensor("row", legacy.DataType.INT32), inputs=(index, index)),
    ]
    last = Layer(kinds.ACTIVATION, scores, inputs=(wide,))
    legacy.shared.layers = [*free[:3], *pinned, *free[3:], last]
    manifest = build_tensorrt_engine(graph, tmp_path / "model.plan", options=BuildOptions(blas=False))
    shared = legacy.shared
    assert shared.network_flags == 1 << int(legacy.NetworkDefinitionCreationFlag.EXPLICIT_BATCH)
    assert shared.config.set == {"FP16", "OBEY_PRECISION_CONSTRAINTS"}
    assert shared.config.tactics == 1 << 3 | 1 << 4  # neither cuBLAS nor cuDNN
    assert [(layer.precision, layer.types) for layer in (*pinned, last)] == [(float32, {0: float32})] * 4
    assert [(layer.precision, layer.types) for layer in free] == [(None, {})] * 8
    assert manifest.details["constraints"] == "obeyed"


def test_8_6_without_kernels_that_obey(legacy: Any, graph: Path, tmp_path: Path) -> None:
    shared = legacy.shared
    shared.refuses = lambda config: "OBEY_PRECISION_CONSTRAINTS" in config.set
    manifest = build_tensorrt_engine(graph, tmp_path / "model.plan")
    assert shared.config.set == {"FP16", "PREFER_PRECISION_CONSTRAINTS"}
    assert manifest.details["constraints"] == "preferred"
    assert (shared.layers[0].precision, shared.layers[0].types) == (legacy.float32, {0: legacy.float32})
    shared.refuses = lambda config: shared.layers[0].precision is not None
    manifest = build_tensorrt_engine(graph, tmp_path / "model.plan")
    assert shared.config.set == {"FP16"}
    assert manifest.details["constraints"] == "dropped"
    assert (shared.layers[0].precision, shared.layers[0].types) == (None, {})
    legacy.shared.plan = None
    assert "cannot build" in failed_build(graph, tmp_path)


def test_8_6_pins_nothing_where_the_graph_tells_nothing(legacy: Any, graph: Path, tmp_path: Path) -> None:
    narrow = Layer(legacy.LayerType.CAST, Tensor("narrow", legacy.DataType.FLOAT, (-1,)))
    narrow.to_type = legacy.DataType.FLOAT
    wide = Layer(legacy.LayerType.ELEMENTWISE, Tensor("wide", legacy.DataType.FLOAT, (-1,)))
    legacy.shared.layers = [wide, narrow]
    # Else it would be an fp32 plan under another name.
    assert build_tensorrt_engine(graph, tmp_path / "model.plan").details["constraints"] == "none"
    assert (legacy.shared.config.set, wide.precision) == ({"FP16"}, None)
    narrow.to_type = legacy.DataType.HALF
    assert build_tensorrt_engine(graph, tmp_path / "model.plan").details["constraints"] == "obeyed"
    # As older parsers say it.
    narrow.type, narrow.types = legacy.LayerType.IDENTITY, {0: legacy.DataType.HALF}
    assert build_tensorrt_engine(graph, tmp_path / "model.plan").details["constraints"] == "obeyed"
    assert wide.precision == legacy.float32


def test_8_6_may_be_free_to_use_16_bits(legacy: Any, graph: Path, tmp_path: Path) -> None:
    free = BuildOptions(free=True)
    assert build_tensorrt_engine(graph, tmp_path / "model.plan", options=free).details["constraints"] == "none"
    assert (legacy.shared.config.set, legacy.shared.layers[0].precision) == ({"FP16"}, None)
    legacy.shared.layers.append(Layer(legacy.LayerType.QUANTIZE))
    build_tensorrt_engine(graph, tmp_path / "model.plan", "int8", free)
    assert legacy.shared.config.set == {"FP16", "INT8"}


def test_8_6_int8_and_what_it_lacks(legacy: Any, graph: Path, tmp_path: Path) -> None:
    assert "has no bf16" in failed_build(graph, tmp_path, "bf16")
    assert "knows no same_compute_capability" in failed_build(graph, tmp_path, hardware="same_compute_capability")
    legacy.shared.layers.append(Layer(legacy.LayerType.QUANTIZE))
    build_tensorrt_engine(graph, tmp_path / "model.plan", "int8")
    # No FP16: what is not quantised stays fp32.
    assert legacy.shared.config.set == {"INT8"}
    assert legacy.shared.layers[0].precision is None


def manifest_of(way: Way) -> Manifest:
    return Manifest("m", "c", "s", "fp16", {}, {}, {}, {"last": way.last})


def test_the_first_way_that_leads_to_a_plan_is_taken() -> None:
    ways = ways_to("retrieve", legacy=True)
    tried = []

    def build(way: Way) -> Manifest:
        tried.append(way)
        if way.last != "products":
            raise ConfigurationError(f"no kernels {len(tried)}.")
        return manifest_of(way)

    found = build_first(ways, build)
    assert tried == list(ways)
    assert found.details == {
        "last": "products",
        "way": "batch 1 alone",
        "left": {way.name: f"no kernels {index}." for index, way in enumerate(ways[:-1], 1)},
    }
    assert build_first(ways, manifest_of).details["left"] == {}

    def never(way: Way) -> Manifest:
        raise ConfigurationError("no kernels.")

    with pytest.raises(
        ConfigurationError, match=r"^no kernels \(tried: last token by sums, two profiles; .*alone\)\.$"
    ):
        build_first(ways, never)
    with pytest.raises(ConfigurationError, match=r"^no kernels\.$"):
        build_first(ways_to("retrieve", legacy=False), never)


def test_ways_ask_the_builder_for_less() -> None:
    wanted = BuildOptions(max_batch=16, workspace_gib=2.0)
    assert [(way.options(wanted).split, way.options(wanted).max_batch) for way in ways_to("retrieve", legacy=True)] == [
        (True, 16), (True, 16), (True, 16), (False, 16), (True, 1),
    ]  # fmt: skip
    assert {way.options(wanted).workspace_gib for way in ways_to("rank", legacy=True)} == {2.0}
    assert len({way.name for way in ways_to("retrieve", legacy=True)}) == 5
    assert all(WAYS[way.name] is way for way in ways_to("retrieve", legacy=True, precision="fp16"))


def test_an_fp16_plan_may_be_built_of_the_graph_in_fp32() -> None:
    free, *_, typed, _ = ways_to("rank", legacy=True, precision="fp16")
    assert (typed.source("fp16"), free.source("fp16"), free.source("int8")) == ("fp16", "fp32", "int8")
    assert (typed.options(BuildOptions()).free, free.options(BuildOptions()).free) == (False, True)
    for precision in ("fp16", "int8"):
        assert any(way.free for way in ways_to("rank", legacy=True, precision=precision))
    assert not any(way.free for way in ways_to("rank", legacy=True))
    assert ways_to("rank", legacy=False, precision="fp16") == (PLAIN,)
