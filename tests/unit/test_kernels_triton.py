"""The Triton kernels without a GPU: run by Triton's interpreter, and compiled for the GPUs they are for."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.interpreted import NO_TRITON, run_interpreted

pytest.importorskip("triton", reason=NO_TRITON)

from mtgr.kernels.bias import PagedBias
from mtgr.kernels.compilation import parallel_compilation
from mtgr.kernels.configs import TOKEN_CLASSES, LaunchConfig, LaunchKey, candidate_tiles, specialised_tiles
from mtgr.kernels.launch import Launch
from mtgr.kernels.paged_items import new_items
from mtgr.kernels.triton_attention import attention_launches
from mtgr.kernels.triton_items import list_items_launch
from mtgr.kernels.triton_norm import group_norm_launch
from mtgr.kernels.triton_store import (
    activate_and_store_launch,
    clear_padding_launch,
    store_keys_values_launch,
    store_times_launch,
)
from mtgr.kernels.tuning import _step
from tests.unit.offline import MAX_STACK, SHARED, compile_for, finished, is_serialised, stack

INTERPRETED = (
    "test_kernels_attention.py",
    "test_kernels_store.py",
    "test_kernels_norm.py",
    "test_paged_items.py",
)


def test_interpreter() -> None:
    """The tests of the kernels' results, with the kernels in place of PyTorch."""
    assert run_interpreted(*(Path(__file__).with_name(name) for name in INTERPRETED))


@pytest.fixture(params=[90, 80], ids=["sm_90", "sm_80"])
def capability(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory
) -> int:
    compile_for(request.param, monkeypatch, tmp_path_factory.getbasetemp() / "triton")
    return int(request.param)


def step(
    dtype: torch.dtype,
    config: LaunchConfig,
    *,
    head_size: int = 128,
    num_heads: int = 2,
    block_size: int = 16,
    has_bias: bool = False,
    num_tokens: int = 48,
    num_requests: int = 3,
    max_blocks: int = 9,
    shift: int = 0,
) -> list[Launch]:
    """Launches of a step like a server's; ``shift`` moves the small tensors off every alignment."""
    width = num_heads * head_size
    _, v, q, k = (
        part.unflatten(-1, (num_heads, head_size))
        for part in torch.empty(num_tokens, 4 * width, dtype=dtype).split(width, dim=-1)
    )

    def integers(size: int) -> Tensor:
        return torch.zeros(size + shift, dtype=torch.int32)[shift:]

    bias = None
    if has_bias:
        bias = PagedBias(
            position_table=torch.zeros(101 + shift, dtype=dtype),
            time_table=torch.zeros(72, dtype=dtype),
            max_positions=(101 + shift + 1) // 2,
            query_positions=integers(num_tokens),
            query_times=integers(num_tokens),
            key_times=torch.zeros(7, block_size, 2, dtype=torch.int32)[..., 0],
            bucket_edges=torch.zeros(72, dtype=torch.int32),
        )
    return attention_launches(
        q,
        k,
        v,
        torch.empty(7, num_heads, block_size, 2 * head_size, dtype=dtype),
        integers(num_requests * max_blocks).view(num_requests, max_blocks),
        integers(num_requests + 1),
        integers(num_tokens),
        torch.zeros(num_tokens + shift, dtype=torch.bool)[shift:],
        torch.empty(num_tokens, num_heads, head_size),
        scale=1.0 + shift,
        norm_length=1 + shift,
        bias=bias,
        config=config,
        items=new_items(num_tokens, num_requests, config.block_m, q.device) if config.listed else None,
    )


def few_and_many(head_size: int, dtype: torch.dtype, has_bias: bool) -> list[LaunchConfig]:
    """The first choice for few tokens and for many."""
    keys = (LaunchKey(2, head_size, dtype, 16, has_bias, bound) for bound in (TOKEN_CLASSES[0], TOKEN_CLASSES[-1]))
    return [candidate_tiles(key)[0] for key in keys]


CASES = [
    (torch.bfloat16, 256, False),
    (torch.bfloat16, 128, False),
    (torch.bfloat16, 64, True),
    (torch.bfloat16, 48, True),
    (torch.float16, 96, False),
    (torch.float16, 32, True),
    (torch.float32, 256, False),
    (torch.float32, 128, False),
    (torch.float32, 32, True),
]


def test_attention_compiles(capability: int) -> None:
    compiled: dict[str, Any] = {}
    with parallel_compilation():
        for dtype, head_size, has_bias in CASES:
            for block_size in (16, 64):
                for config in few_and_many(head_size, dtype, has_bias):
                    if block_size == 64 and (dtype == torch.float32 or config.block_m == 16 or has_bias):
                        continue
                    launches = step(dtype, config, head_size=head_size, block_size=block_size, has_bias=has_bias)
                    name = f"{dtype} {head_size} {has_bias} {block_size} {config}"
                    compiled[name] = (dtype, config, launches[0].compile())
    assert len(compiled) == 2 * len(CASES) + 3
    for name, (dtype, config, future) in compiled.items():
        kernel = finished(future)
        assembly = kernel.asm["ptx"]
        assert stack(kernel) <= MAX_STACK, name
        if dtype == torch.float32:
            # TF32 would keep ten bits of a product's operands.
            assert "tf32" not in assembly, name
            assert "fma.rn" in assembly, name
        else:
            wide = capability == 90 and config.block_m >= 64
            assert ("wgmma.mma_async" if wide else "mma.sync") in assembly, name
        # Keys and values come in wide pieces: a pointer of unknown alignment would make them two bytes each.
        wide_load = r"cp\.async\.cg[^;]*, 0x10" if config.num_stages > 1 else r"ld\.global[^;]*\.v4\.b32"
        assert re.search(wide_load, assembly), name


@pytest.mark.parametrize(("block_size", "size"), [(16, 128), (128, 64), (64, 256)])
def test_specialised_attention_compiles(
    block_size: int, size: int, monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Every way for Hopper, with keys split up and not; no sequence of steps needs another kernel."""
    compile_for(90, monkeypatch, tmp_path_factory.getbasetemp() / "triton")
    key = LaunchKey(2, size, torch.bfloat16, block_size, False, 4096)
    compiled = {}
    with parallel_compilation():
        for config in specialised_tiles(key):
            for splits in (1, 4):
                launch = step(
                    torch.bfloat16,
                    dataclasses.replace(config, splits=splits),
                    head_size=size,
                    block_size=block_size,
                    num_tokens=300 + splits,
                    num_requests=splits,
                )[0]
                compiled[f"{config} {splits}"] = launch.compile()
    assert len(compiled) >= 8
    for name, future in compiled.items():
        kernel = finished(future)
        assert stack(kernel) <= MAX_STACK, name
        assert kernel.metadata.shared <= SHARED[90], name
        assert "wgmma.mma_async" in kernel.asm["ptx"], name
        assert "cp.async.bulk.tensor" in kernel.asm["ptx"], name
    overlapping = next(future for name, future in compiled.items() if "overlaps=True" in name)
    assert not is_serialised(finished(overlapping))


@pytest.mark.parametrize("has_bias", [False, True])
def test_steps_of_other_sizes_need_no_other_kernel(capability: int, has_bias: bool) -> None:
    """What is compiled at the start serves every later step: nothing that varies is compiled in."""
    config = LaunchConfig(16, 32, 4, 2, splits=2)
    first = [launch.compile() for launch in step(torch.bfloat16, config, head_size=32, has_bias=has_bias)]
    assert len(first) == 2
    for tokens, requests, blocks, shift in ((1, 1, 1, 0), (16, 16, 16, 1), (37, 1, 128, 3)):
        sizes = {"num_tokens": tokens, "num_requests": requests, "max_blocks": blocks, "shift": shift}
        again = [launch.compile() for launch in step(torch.bfloat16, config, head_size=32, has_bias=has_bias, **sizes)]
        assert [id(kernel) for kernel in again] == [id(kernel) for kernel in first], sizes


@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("bound", [TOKEN_CLASSES[0], TOKEN_CLASSES[-1]])
@pytest.mark.usefixtures("capability")
def test_steps_need_what_warm_up_compiled(bound: int, has_bias: bool) -> None:
    """Its made-up step lies in memory as a server's does."""
    config = LaunchConfig(16, 32, 4, 2, splits=2)
    key = LaunchKey(2, 32, torch.bfloat16, 16, has_bias, bound)
    made_up = _step(key, 40, torch.device("cpu"), torch.float32, torch.bfloat16, torch.bool)(config)
    first = [launch.compile() for launch in made_up]
    again = [launch.compile() for launch in step(torch.bfloat16, config, head_size=32, has_bias=has_bias)]
    assert [id(kernel) for kernel in again] == [id(kernel) for kernel in first]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.usefixtures("capability")
def test_stores_and_norms_compile(dtype: torch.dtype) -> None:
    k = torch.empty(5, 4 * 512, dtype=dtype)[:, :512].unflatten(-1, (2, 256))
    slots = torch.zeros(5, dtype=torch.int64)
    cache = torch.empty(3, 2, 16, 512, dtype=dtype)
    few = torch.zeros(4, dtype=torch.int32)
    launches = [
        list_items_launch(few, few, few.bool(), new_items(4, 3, 128, few.device), 128),
        store_keys_values_launch(k, k, cache, slots),
        activate_and_store_launch(k, k, k, cache, slots),
        store_times_launch(slots.to(torch.int32), torch.zeros(3, 16, 2, dtype=torch.int32)[..., 0], slots),
        clear_padding_launch(k.contiguous(), torch.zeros(3, dtype=torch.int32)),
    ]
    types = torch.zeros(5, 8, dtype=torch.int32)[:, 0]
    for width in (96, 512, 8192):
        gain = torch.empty(5, width, dtype=dtype)
        gate = torch.empty(5, 4 * width, dtype=dtype)[:, :width]
        for x_dtype in {dtype, torch.float32}:
            x = torch.empty(5, width, dtype=x_dtype)
            launches.append(group_norm_launch(x, types, gain, gain, 1e-6, None, torch.empty_like(gain)))
            launches.append(group_norm_launch(x, types, gain, gain, 1e-6, gate, torch.empty_like(gain)))
            launches.append(group_norm_launch(x, types, gain, gain, 1e-6, gate, torch.empty_like(gain), activates=True))
            launches.append(
                group_norm_launch(x, types, gain, gain, 1e-6, None, torch.empty_like(gain), gain[0].float())
            )
            total = torch.empty_like(x)
            launches.append(
                group_norm_launch(x, types, gain, gain, 1e-6, None, torch.empty_like(gain), update=x, total=total)
            )
    with parallel_compilation():
        compiled = [launch.compile() for launch in launches]
    for launch, future in zip(launches, compiled, strict=True):
        kernel = finished(future)
        assert stack(kernel) == 0, launch.options
