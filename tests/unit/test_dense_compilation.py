"""The dense kernels without a GPU: run by Triton's interpreter, and compiled for Ampere, Hopper and Blackwell."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.interpreted import NO_TRITON, run_interpreted

pytest.importorskip("triton", reason=NO_TRITON)

import triton

from mtgr.kernels.compilation import parallel_compilation
from mtgr.kernels.dense_attention import launch_of
from mtgr.kernels.dense_configs import DenseConfig, DenseKey, candidates
from mtgr.kernels.dense_fp8 import QuantisedHeads, aligned_segments
from mtgr.kernels.dense_segments import padded_segments
from mtgr.kernels.launch import Launch
from mtgr.kernels.linear import BLOCK, QuantisedRows, QuantisedWeight
from mtgr.kernels.rows_linear import AMPERE_TILE, HOPPER_TILE
from mtgr.kernels.triton_fp8 import quantise_launch
from mtgr.kernels.triton_linear import fp8_linear_launch, linear_launch, quantise_rows_launch, tiles
from tests.unit.offline import MAX_STACK, SHARED, compile_for, finished, is_serialised, main_loop, stack

INTERPRETED = ("test_dense_attention.py", "test_dense_linear.py")
FP8 = torch.float8_e4m3fn


def test_interpreter() -> None:
    """The tests of the kernels' results, with the kernels in place of PyTorch."""
    assert run_interpreted(*(Path(__file__).with_name(name) for name in INTERPRETED))


@pytest.fixture(params=[80, 90, 100], ids=["sm_80", "sm_90", "sm_100"])
def capability(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory
) -> int:
    compile_for(request.param, monkeypatch, tmp_path_factory.getbasetemp() / "triton")
    return int(request.param)


def heads(
    head_size: int, dtype: torch.dtype, batch: int = 2, context: int = 300, candidate: int = 100
) -> tuple[Any, ...]:
    """q, k and v as columns of one projection, an output, and where the tokens stand; nothing is in them."""
    tokens = batch * (context + candidate)
    merged = torch.empty(tokens, 8 * head_size, dtype=dtype)
    _, v, q, k = (part.unflatten(-1, (2, head_size)) for part in merged.split(2 * head_size, dim=-1))
    segments = padded_segments(torch.zeros(batch, context + candidate, dtype=torch.int32), context)
    return q, k, v, torch.empty(tokens, 2, head_size, dtype=dtype), segments


def empty_fp8(q: Any, segments: Any) -> QuantisedHeads:
    aligned, rows = aligned_segments(segments)
    _, count, size = q.shape
    return QuantisedHeads(
        torch.empty(rows, count, size, dtype=FP8),
        torch.empty(rows, count, size, dtype=FP8),
        torch.empty(count * size, rows, dtype=FP8),
        torch.empty(3, count, rows // 128),
        aligned,
    )


def attention(head_size: int, operands: torch.dtype, config: DenseConfig, **sizes: int) -> Launch:
    arguments = heads(head_size, torch.bfloat16 if operands == FP8 else operands, **sizes)
    quantised = empty_fp8(arguments[0], arguments[-1]) if operands == FP8 else None
    return launch_of(*arguments, scale=0.1, norm_length=7, quantised=quantised, config=config)


def products(capability: int, block_m: int) -> str:
    """The instruction by which a GPU's tensor cores are fed."""
    if block_m < 64 or capability == 80:
        return "mma.sync"
    return {90: "wgmma.mma_async", 100: "tcgen05.mma"}[capability]


# Every precision, sizes from small to large and one that is no power of two; of one case every configuration.
FIRST_CHOICES = [
    (torch.bfloat16, 64),
    (torch.bfloat16, 256),
    (torch.float16, 48),
    (torch.float32, 64),
    (FP8, 128),
    (FP8, 256),
]
EVERY_CHOICE = (torch.bfloat16, 128)


def test_attention_compiles(capability: int) -> None:
    """Whatever may be chosen for a long context; on Ampere, which has no e4m3, all but FP8."""
    compiled: dict[str, Any] = {}
    with parallel_compilation():
        for operands, head_size in [*FIRST_CHOICES, EVERY_CHOICE]:
            if operands == FP8 and capability < 90:
                continue
            choices = candidates(DenseKey(head_size, operands, capability, 4096))
            for config in choices if (operands, head_size) == EVERY_CHOICE else choices[:1]:
                launch = attention(head_size, operands, config)
                compiled[f"{operands} {head_size} {config}"] = (operands, config, launch.compile())
    assert len(compiled) >= {80: 7, 90: 14, 100: 9}[capability]
    for name, (operands, config, future) in compiled.items():
        kernel = finished(future)
        assembly = kernel.asm["ptx"]
        assert stack(kernel) <= MAX_STACK, name
        assert kernel.metadata.shared <= SHARED[capability], name
        if operands == torch.float32:
            assert "tf32" not in assembly, name
            assert "fma.rn" in assembly, name
            assert "tanh.approx" not in assembly, name
            continue
        assert products(capability, config.block_m) in assembly, name
        assert "tanh.approx.f32" in assembly, name
        if config.variant != "pointers":
            assert "cp.async.bulk.tensor" in assembly, name
        else:
            assert re.search(r"cp\.async\.cg[^;]*, 0x10", assembly), name
        if operands == FP8:
            assert "e4m3" in assembly, name


PACKED = [
    (128, DenseConfig("specialised", 128, 128, 4, 4, in_turn=True, packed=True)),
    (128, DenseConfig("specialised", 192, 64, 4, 6, overlaps=True, packed=True)),
    (256, DenseConfig("specialised", 128, 128, 4, 2, overlaps=True, packed=True)),
]


@pytest.mark.parametrize(("head_size", "config"), PACKED, ids=str)
def test_weights_are_rounded_where_they_are_taken(
    head_size: int, config: DenseConfig, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """In the loop over tiles no byte is moved, and products run on while SiLU is computed."""
    compile_for(90, monkeypatch, tmp_path)
    kernel = finished(attention(head_size, FP8, config).compile())
    assert not is_serialised(kernel)
    assert stack(kernel) <= MAX_STACK
    loop = main_loop(kernel)
    weights = 64 * config.block_n // 128  # of a thread
    assert sum("MUFU.TANH" in line for line in loop) == weights
    assert sum("E4M3.F32" in line and "F2FP" in line for line in loop) == weights // 2
    assert not [line for line in loop if "PRMT" in line]
    assert sum("STL" in line for line in loop) <= 2
    if config.overlaps:
        last_wait = max(index for index, line in enumerate(loop) if "WARPGROUP.DEPBAR" in line)
        before = sum("MUFU.TANH" in line for line in loop[:last_wait])
        assert before == weights


@pytest.mark.parametrize(("head_size", "config"), PACKED[:2], ids=str)
def test_every_weight_gets_to_its_byte(
    head_size: int, config: DenseConfig, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Of sixteen logits of a thread, what each register of the second product's operand is made of.

    A thread's results stand in pairs of keys of one query and another, eight keys on the next; its operand takes four
    keys of a query to a register, then four of the other, in the order in which ``dense_fp8`` stores values.
    """
    compile_for(90, monkeypatch, tmp_path)
    kernel = finished(attention(head_size, FP8, config).compile())
    order = [0, 1, 4, 5, 2, 3, 6, 7]
    wanted = [16 * (index // 16) + 8 * (index // 8 % 2) + order[index % 8] for index in range(config.block_n // 2)]
    assert operand_sources(kernel.asm["ptx"]) == wanted


def operand_sources(assembly: str) -> list[int]:
    """Byte by byte, which result of the first product a thread's operand of the second is made of, in the main loop."""
    lines = assembly.splitlines()
    wait = next(index for index, line in enumerate(lines) if "wgmma.wait_group.sync.aligned 1" in line)
    end = next(index for index in range(wait, len(lines)) if lines[index].startswith("$L__BB"))
    products = [re.findall(r"\{(.*?)\}", line) for line in lines[:wait] if "wgmma.mma_async" in line]
    # The last ones take registers besides their results.
    count = next(n for n in range(len(products)) if len(products[-1 - n]) == 1)
    taken = [register for product in products[-count:] for register in re.findall(r"%r\d+", product[1])]
    results = re.findall(r"%r\d+", products[-1 - count][0])
    copied = dict(re.findall(r"mov\.b32 (%r\d+), (%r\d+);", "\n".join(lines[:wait])))
    loop = "\n".join(lines[wait:end])
    rounded = r"low, (%r\d+), (%r\d+);\s+\S+ high, (%r\d+), (%r\d+);\s+mov\.b32 (%r\d+), \{low, high\}"
    made = {found[4]: (found[1], found[0], found[3], found[2]) for found in re.findall(rounded, loop)}
    computed = dict(re.findall(r"(?:mul|fma\.rn|tanh\.approx)\.f32\s+(%r\d+), (.*);", loop))

    def source(register: str) -> int:
        while register not in results:
            # Of a product with a factor that is the same for all, the other number.
            inputs = re.findall(r"%r\d+", computed[register])
            register = next(one for one in inputs if one in computed or one in results)
        return results.index(register)

    return [source(byte) for register in taken for byte in made[copied[register]]]


def test_unaligned_rows_take_plain_loads(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Copies of whole tiles need rows that begin at multiples of 16 bytes."""
    compile_for(90, monkeypatch, tmp_path)
    q, k, v, out, segments = heads(64, torch.bfloat16)
    wide = torch.empty(len(k), 2, 65, dtype=torch.bfloat16)
    config = DenseConfig("specialised", 128, 128, 4, 4)
    aligned = launch_of(q, k, v, out, segments, scale=0.1, norm_length=7, config=config)
    assert aligned.kernel.__name__ == "specialised_attention_kernel"
    launch = launch_of(q, wide[..., :64], v, out, segments, scale=0.1, norm_length=7, config=config)
    assert launch.options["use_descriptors"] is False


def test_other_lengths_need_no_other_kernel(capability: int) -> None:
    """What is compiled at the start serves every batch of a class: no length and no batch is compiled in."""
    dtype = torch.bfloat16
    config = candidates(DenseKey(64, dtype, capability, 1024))[0]
    first = finished(attention(64, dtype, config).compile())
    for batch, context, candidate in ((1, 257, 1), (8, 512, 256), (3, 400, 0)):
        again = finished(attention(64, dtype, config, batch=batch, context=context, candidate=candidate).compile())
        assert again is first, (batch, context, candidate)


def rows_of_wide_layers(dtype: torch.dtype, tile: tuple[int, int, int, int]) -> dict[str, Any]:
    """Products of those tiles alone that somebody reads, of depths that are whole steps and that are not."""
    compiled: dict[str, Any] = {}
    wanted = torch.empty(2304, dtype=torch.bool)
    for depth, is_silu in ((8192, False), (8192, True), (1000, True), (1001, True)):
        x, weight = torch.empty(2304, depth, dtype=dtype), torch.empty(4096, depth, dtype=dtype)
        bias, out = torch.empty(4096, dtype=dtype), torch.empty(2304, 4096, dtype=dtype)
        launch = linear_launch(x, weight, bias, out, is_silu=is_silu, tile=tile, wanted=wanted)
        compiled[f"rows {dtype} {depth} {is_silu}"] = (tile[0], launch.compile())
    return compiled


def test_rounding_and_linear_layers_compile(capability: int) -> None:
    compiled: dict[str, Any] = {}
    with parallel_compilation():
        for dtype in (torch.bfloat16, torch.float16):
            for tokens in (16, 4096):
                x, weight = torch.empty(tokens, 768, dtype=dtype), torch.empty(3072, 768, dtype=dtype)
                bias, out = torch.empty(3072, dtype=dtype), torch.empty(tokens, 3072, dtype=dtype)
                for tile in tiles(tokens, capability >= 90, False):
                    launch = linear_launch(x, weight, bias, out, is_silu=True, tile=tile)
                    compiled[f"linear {dtype} {tokens} {tile}"] = (tile[0], launch.compile())
            compiled |= rows_of_wide_layers(dtype, HOPPER_TILE if capability >= 90 else AMPERE_TILE)
        if capability >= 90:
            for tokens in (16, 4096):
                rows = QuantisedRows(torch.empty(tokens, 768, dtype=FP8), torch.empty(tokens, 768 // BLOCK))
                wide = QuantisedWeight(torch.empty(3072, 768, dtype=FP8), torch.empty(24, 6))
                bias, out = torch.empty(3072).bfloat16(), torch.empty(tokens, 3072).bfloat16()
                for tile in tiles(tokens, True, True):
                    launch = fp8_linear_launch(rows, wide, bias, out, is_silu=True, tile=tile)
                    compiled[f"fp8 {tokens} {tile}"] = (tile[0], launch.compile())
            made = QuantisedRows(torch.empty(99, 768, dtype=FP8), torch.empty(99, 6))
            compiled["rows"] = (0, quantise_rows_launch(torch.empty(99, 700).bfloat16(), made).compile())
            q, k, v, _, segments = heads(128, torch.bfloat16)
            compiled["heads"] = (0, quantise_launch(q, k, v, segments, empty_fp8(q, segments)).compile())
    for name, (block_m, future) in compiled.items():
        kernel = finished(future)
        assert stack(kernel) <= MAX_STACK, name
        assert kernel.metadata.shared <= SHARED[capability], name
        if block_m:
            assert products(capability, block_m) in kernel.asm["ptx"], name


def test_e4m3_is_refused_before_hopper_and_ada(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A GPU without e4m3 says so when it compiles, and computes nothing wrong."""
    compile_for(80, monkeypatch, tmp_path)
    with pytest.raises(triton.compiler.errors.CompilationError, match="fp8e4nv not supported"):
        attention(64, FP8, DenseConfig("descriptors", 128, 64, 4, 2)).compile()
