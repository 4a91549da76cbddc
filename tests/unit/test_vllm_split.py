"""Tensor parallelism's parts: weights of a rank, GroupLN over the columns of several, graphs, and settings.

The tests of GroupLN run on whichever implementation serves: PyTorch, and the kernels under Triton's interpreter.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from mtgr.engines.vllm_settings import SETTINGS_FILE, VLLMSettings, kv_token_bytes
from mtgr.errors import ConfigurationError
from mtgr.kernels.linear import dequantise_rows
from mtgr.model import MTGR
from mtgr.schema import TokenType
from mtgr.vllm_plugin import graphs
from mtgr.vllm_plugin.parallel import Ranks, WeightSplit, check_ranks, rank_config
from mtgr.vllm_plugin.split_norm import fp8_split_group_norm, own_statistics, split_group_norm
from mtgr.vllm_plugin.step import StepMetadata
from tests.interpreted import NO_TRITON, run_interpreted
from tests.unit.models import small_config, small_schema

EPSILON = 1e-6
TOKENS = 13

# --- weights -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 2, 3, 6])
def test_ranks_weights_together_are_the_checkpoints(size: int) -> None:
    """Every tensor of a rank has the shape of its network's, and heads stand where they stood."""
    config = small_config(num_heads=6, dqk=5, dv=7, relative_bias=True)
    whole = MTGR(config, small_schema(), 4).state_dict()
    torch.manual_seed(0)
    whole = {name: torch.randn(tensor.shape) for name, tensor in whole.items()}
    parts: list[dict[str, Tensor]] = []
    for rank in range(size):
        split = WeightSplit(config, Ranks(rank, size))
        own = MTGR(rank_config(config, size), small_schema(), 4).state_dict()
        assert {name: split.whole_shape(name, tensor.shape) for name, tensor in own.items()} == {
            name: tensor.shape for name, tensor in whole.items()
        }
        parts.append({name: split.part(name, tensor) for name, tensor in whole.items()})
        assert all(parts[rank][name].shape == tensor.shape for name, tensor in own.items())
    for name, tensor in whole.items():
        mine = [part[name] for part in parts]
        kind = name.split(".", 2)[-1] if name.startswith("blocks.") else ""
        if kind.startswith("uvqk"):
            by_kind = zip(*(one.split([6 * 7 // size] * 2 + [6 * 5 // size] * 2) for one in mine), strict=True)
            assert torch.equal(torch.cat([column for group in by_kind for column in group]), tensor)
        elif kind in ("output.weight", "output_norm.gain", "output_norm.bias"):
            assert torch.equal(torch.cat(mine, dim=1), tensor)
        elif kind == "output.bias":
            assert torch.equal(torch.stack(mine).sum(dim=0), tensor)
        else:
            assert all(torch.equal(one, tensor) for one in mine)


def test_a_rank_reads_its_own_part_of_a_file(tmp_path: Path) -> None:
    """Of weights that lie in a file, by vLLM's way of opening it, a rank's pages alone come into memory."""
    config = small_config(num_layers=1, d_model=4096, num_heads=16)
    name = "blocks.0.uvqk.weight"
    save_file({name: torch.zeros(4 * 4096, 4096)}, tmp_path / "model.safetensors")  # 256 MiB
    split = WeightSplit(config, Ranks(1, 4))
    before = mapped_bytes(tmp_path)
    with safe_open(tmp_path / "model.safetensors", framework="pt") as file:
        tensor = file.get_tensor(name)
        part = split.part(name, tensor)
        read = mapped_bytes(tmp_path) - before
    assert part.shape == (4096, 4096)
    assert part.nbytes <= read <= 1.25 * part.nbytes


def mapped_bytes(directory: Path) -> int:
    """Bytes of files of a directory that this process's mappings hold in memory."""
    total, counts = 0, False
    for line in Path("/proc/self/smaps").read_text(encoding="utf-8").splitlines():
        if line.startswith("Rss:") and counts:
            total += int(line.split()[1]) << 10
        elif "-" in line.split(" ", 1)[0]:
            counts = str(directory) in line
    return total


# --- GroupLN -------------------------------------------------------------------------------------------------------


class Case:
    """Rows of all scales around a mean far from 0, divided among ranks; a gate as a part of wider rows."""

    def __init__(self, width: int, size: int, dtype: torch.dtype, mean: float = 3.0) -> None:
        torch.manual_seed(width)
        self.size, self.width = size, width
        self.x = torch.randn(TOKENS, size * width) * torch.logspace(-2, 1, TOKENS)[:, None] + mean
        self.types = torch.randint(len(TokenType), (TOKENS, 8), dtype=torch.int32)[:, 0]
        self.gain = torch.randn(len(TokenType), size * width).to(dtype)
        self.bias = torch.randn(len(TokenType), size * width).to(dtype)
        self.gate = torch.randn(TOKENS, 3 * size * width).to(dtype)

    def arguments(self, rank: int) -> tuple[Any, ...]:
        x, gain, bias, gate = (
            part[:, rank * self.width : (rank + 1) * self.width] for part in (self.x, self.gain, self.bias, self.gate)
        )
        total = sum(
            own_statistics(self.x.chunk(self.size, dim=1)[other].contiguous(), Ranks(other, self.size))
            for other in range(self.size)
        )

        def reduce(own: Tensor) -> Tensor:
            assert torch.equal(own[:, rank], total[:, rank])
            return total

        return x.contiguous(), self.types, gain, bias, EPSILON, gate, Ranks(rank, self.size, reduce)

    def expected(self) -> npt.NDArray[np.float64]:
        x, gain, bias, gate = (tensor.double().numpy() for tensor in (self.x, self.gain, self.bias, self.gate))
        normal = (x - x.mean(axis=1, keepdims=True)) / np.sqrt(x.var(axis=1, keepdims=True) + EPSILON)
        kinds = self.types.numpy()
        result: npt.NDArray[np.float64] = (normal * gain[kinds] + bias[kinds]) * gate[:, : self.size * self.width]
        return result


@pytest.mark.parametrize(("width", "size"), [(1, 3), (24, 2), (96, 3), (500, 4), (4096, 2)])
def test_single_precision(width: int, size: int) -> None:
    case = Case(width, size, torch.float32)
    got = torch.cat([split_group_norm(*case.arguments(rank)) for rank in range(size)], dim=1)
    assert got.dtype == torch.float32
    # Rows stand at 3 with deviations from 0.01: FP32 keeps five digits of the smallest.
    np.testing.assert_allclose(got.numpy(), case.expected(), rtol=0, atol=8e-4)


def test_small_deviations_around_a_large_mean_survive() -> None:
    """Sums of squares would lose them: of 1,000 ** 2, FP32 keeps no digit after the point."""
    case = Case(64, 2, torch.float32, mean=1000.0)
    case.x = case.x.clamp(999, 1001)
    got = torch.cat([split_group_norm(*case.arguments(rank)) for rank in range(2)], dim=1)
    wanted = case.expected()
    assert np.abs(got.numpy() - wanted).max() <= 0.02 * wanted.std()
    squares = case.x.square().mean(dim=1) - case.x.mean(dim=1).square()
    assert (squares - case.x.double().var(dim=1, correction=0)).abs().max() > 0.01


def test_ranks_of_different_means_and_deviations() -> None:
    case = Case(32, 2, torch.float32)
    case.x[:, :32] = case.x[:, :32] * 50 - 7
    got = torch.cat([split_group_norm(*case.arguments(rank)) for rank in range(2)], dim=1)
    np.testing.assert_allclose(got.numpy(), case.expected(), rtol=0, atol=1e-4)


def test_precision_of_a_gate_as_the_product_left_it() -> None:
    case = Case(96, 2, torch.float32)
    got = torch.cat([split_group_norm(*case.arguments(rank), activates=True) for rank in range(2)], dim=1)
    case.gate = torch.nn.functional.silu(case.gate)
    np.testing.assert_allclose(got.numpy(), case.expected(), rtol=0, atol=8e-4)


def test_half_precision() -> None:
    case = Case(256, 2, torch.bfloat16)
    got = torch.cat([split_group_norm(*case.arguments(rank)) for rank in range(2)], dim=1)
    assert got.dtype == torch.bfloat16
    wanted = case.expected()
    assert np.abs(got.double().numpy() - wanted).max() <= 2**-7 * np.abs(wanted).max()


@pytest.mark.parametrize("width", [128, 200, 1024])
def test_fp8(width: int) -> None:
    case = Case(width, 2, torch.float32)
    rows = [fp8_split_group_norm(*case.arguments(rank)) for rank in range(2)]
    assert rows[0].data.shape == (TOKENS, -(-width // 128) * 128)
    assert not rows[0].data[:, width:].float().any()
    got = torch.cat([dequantise_rows(row)[:, :width] for row in rows], dim=1).numpy()
    exact = torch.cat([split_group_norm(*case.arguments(rank)) for rank in range(2)], dim=1).numpy()
    scales = torch.cat([row.scales.repeat_interleave(128, dim=1)[:, :width] for row in rows], dim=1).numpy()
    # Three bits behind the point, and below the smallest normal number steps of 2 ** -9.
    assert (np.abs(got - exact) <= np.maximum(np.abs(exact) * 2**-4, scales * 2**-10) * 1.01 + 1e-6).all()


def test_no_tokens() -> None:
    case = Case(32, 2, torch.float32)
    case.x, case.types, case.gate = case.x[:0], case.types[:0], case.gate[:0]
    assert split_group_norm(*case.arguments(1)).shape == (0, 32)
    assert fp8_split_group_norm(*case.arguments(1)).data.shape == (0, 128)


GROUP_NORM = "precision or survive or different or fp8 or no_tokens"


def test_interpreter() -> None:
    pytest.importorskip("triton", reason=NO_TRITON)
    assert run_interpreted(Path(__file__), "-k", GROUP_NORM) == 13


@pytest.mark.parametrize("capability", [80, 90, 100])
def test_kernels_compile(
    capability: int, monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory
) -> None:
    pytest.importorskip("triton", reason=NO_TRITON)
    from mtgr.vllm_plugin.triton_split_norm import apply_launch, statistics_launch
    from tests.unit.offline import compile_for, stack

    compile_for(capability, monkeypatch, tmp_path_factory.getbasetemp() / "triton")
    tokens, width = 64, 4096  # of 8b, each of two ranks
    x, statistics = torch.empty(tokens, width), torch.empty(tokens, 2, 2)
    types = torch.empty(tokens, 8, dtype=torch.int32)[:, 0]
    table = torch.empty(len(TokenType), width, dtype=torch.bfloat16)
    gate, out = (torch.empty(tokens, width, dtype=torch.bfloat16) for _ in range(2))
    fp8, scales = torch.empty(tokens, width, dtype=torch.float8_e4m3fn), torch.empty(tokens, width // 128)
    launches = [statistics_launch(x, 1, statistics)]
    arguments = (x, statistics, types, table, table, EPSILON, gate)
    launches.append(apply_launch(*arguments, out))
    if capability >= 90:
        launches.append(apply_launch(*arguments, fp8, scales))
    for launch in launches:
        assert stack(launch.compile()) == 0


# --- graphs --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("is_shared", [False, True])
def test_graphs_of_ranks_are_captured_together(monkeypatch: pytest.MonkeyPatch, is_shared: bool) -> None:
    """All in the one context in which vLLM's sums note their buffers, and none is replayed before that is left."""
    events: list[str] = []

    @contextmanager
    def capturing(device: torch.device) -> Iterator[None]:
        events.append("begin")
        yield
        events.append("end")

    class Replayed:
        def replay(self) -> None:
            events.append("replay")

    def capture(compute: graphs.Compute, embeds: Tensor, step: StepMetadata, pool: Any) -> graphs.Captured:
        events.append(f"capture {len(embeds)}")
        return graphs.Captured(Replayed(), *compute(embeds, step))  # type: ignore[arg-type]

    monkeypatch.setattr(graphs, "capturing", capturing)
    monkeypatch.setattr(graphs, "capture", capture)
    monkeypatch.setattr(graphs, "new_pool", lambda: None)
    steps = graphs.StepGraphs(lambda embeds, step: (embeds, embeds), 32, is_shared)
    metadata = StepMetadata(
        9, torch.tensor([0, 9], dtype=torch.int32), torch.zeros(1, 4, dtype=torch.int32), torch.arange(9)
    )
    for _ in range(2):
        steps.run(torch.zeros(9, 4), metadata)
    captures = ["capture 32", "capture 16"]
    assert events == (["begin", *captures, "end"] if is_shared else captures) + ["replay", "replay"]


# --- settings ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [0, -1, True, 2.0, "2", None])
def test_ranks_are_a_positive_integer(value: Any) -> None:
    with pytest.raises(ConfigurationError, match=r"tensor_parallel_size is .*; it must be a positive integer"):
        VLLMSettings(1024, 1024, tensor_parallel_size=value)


def test_a_thread_has_no_ranks() -> None:
    with pytest.raises(ConfigurationError, match="in_process is true, but with tensor_parallel_size 2"):
        VLLMSettings(1024, 1024, tensor_parallel_size=2, in_process=True)
    assert VLLMSettings(1024, 1024, tensor_parallel_size=1, in_process=True).in_process


@pytest.mark.parametrize("size", [4, 5, 12])
def test_ranks_must_divide_the_heads(size: int) -> None:
    config = small_config(num_heads=6)
    with pytest.raises(
        ConfigurationError,
        match=f"model.json: tensor_parallel_size is {size}, which does not divide the network's 6 heads; set it to one "
        "of 1, 2, 3, 6",
    ):
        check_ranks(size, config, SETTINGS_FILE)
    check_ranks(3, config, SETTINGS_FILE)


def test_bytes_of_a_tokens_keys_and_values() -> None:
    config = small_config(num_layers=24, d_model=8192, num_heads=64)
    assert kv_token_bytes(config, 2) == 24 * 8192 * 2 * 2
    assert kv_token_bytes(config, 2, 2) * 2 == kv_token_bytes(config, 2)
    with_times = small_config(relative_bias=True)
    assert kv_token_bytes(with_times, 4, 2) == 2 * 24 * 4 + 8
