"""The whole network on the GPU at hand: the compiled engine beside torch.compile with CUDA graphs and eager PyTorch.

    python -m perf.gpu_model [--small] [--profile] [--seed SEED]

Random networks, heads scaled to logits of standard deviation 1: no trained checkpoint of these sizes exists, and time
does not depend on weights.
"""

from __future__ import annotations

import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from export.fp8 import fp8_in_pytorch
from export.graphs import rank_graph
from export.precision import typed
from export.rows import random_rows
from mtgr.checkpoint import Checkpoint, save_checkpoint
from mtgr.config import ModelConfig, preset
from mtgr.engines.compiled import CompiledEngine
from mtgr.schema import TYPE_COLUMN, TokenType
from perf.gpu_measure import (
    DEVICE,
    Ceilings,
    Figure,
    interleaved,
    largest_difference,
    print_section,
    section_options,
)
from perf.synthetic import synthetic_checkpoint

PRECISIONS = ("fp16", "bf16", "fp8")
COMPILED = "torch.compile bf16, graphs"
EAGER = "baseline eager fp32"

Network = Callable[..., Tensor]

_ITEMS = 20_000
_ROUNDS = 30
_COMPILE_SECONDS = 150


@dataclass(frozen=True)
class Work:
    """What must be computed for a batch whose users all have the same lengths.

    Attributes:
        linear: Operations of the products with weights.
        attention: Operations over pairs of tokens that see each other.
        weights: Numbers of those weights.
    """

    linear: float
    attention: float
    weights: float

    def floor_ms(self, ceilings: Ceilings, precision: str) -> float:
        """Least milliseconds; FP8 makes the linear layers faster, not the attention, which stays in FP16."""
        half = "fp32" if precision == "fp32" else "bf16"
        operations = ceilings.floor_ms(self.linear, 0, precision) + ceilings.floor_ms(self.attention, 0, half)
        size = {"fp32": 4, "fp8": 1}.get(precision, 2)
        return max(operations, ceilings.floor_ms(0, self.weights * size, precision))


def work_of(config: ModelConfig, users: int, static: int, context: int, candidates: int) -> Work:
    """Work of ranking: of the last block only candidates, and keys and values of all; without embeddings and heads.

    Args:
        config: The network.
        users: Batch size.
        static: Leading context tokens that all of the context sees.
        context: Tokens of a context, n.
        candidates: Of a user, k.
    """
    tokens, width, d = context + candidates, config.num_heads * config.dqk, config.d_model
    blocks, matrix = config.num_layers - 1, width * d
    among = candidates * (context + 1)
    later = context * (context + 1) - static * (static + 1)
    pairs = static * static + later / 2 + among
    linear = 2.0 * 5 * matrix * tokens * blocks + 2.0 * matrix * (2 * tokens + 3 * candidates)
    return Work(users * linear, users * 4.0 * width * (pairs * blocks + among), 5.0 * matrix * config.num_layers)


def model(ceilings: Ceilings, is_small: bool, seed: int) -> Iterator[Figure]:
    """Preset ``large``, 1,100 + 256 tokens, batch 1 and 8: what the GPU does, and whole calls from host to host."""
    made, context, candidates = _problem(is_small, seed)
    with tempfile.TemporaryDirectory() as folder:
        save_checkpoint(made, Path(folder))
        engines = {name: CompiledEngine(Path(folder), str(DEVICE), name) for name in PRECISIONS}  # type: ignore[arg-type]
    reference = made.model.to(DEVICE).eval()
    native = {name: typed(rank_graph(reference), name) for name in ("fp16", "bf16")}  # type: ignore[arg-type]
    native["fp8"] = typed(fp8_in_pytorch(reference, spares_last=True), "fp16")
    for batch in (8, 1):
        rows = (context[:batch].contiguous(), candidates[:batch].contiguous())
        on_device = tuple(part.to(DEVICE) for part in rows)
        with torch.no_grad():
            exact = reference(*on_device)
            allowed = {name: 2 * largest_difference(module(*on_device), exact) for name, module in native.items()}
        compiled, note = _torch_compiled(native["bf16"], on_device)
        yield from _on_device(made, engines, compiled, note, on_device, exact, allowed, ceilings)
        yield from _whole_calls(engines, compiled, rows, exact, allowed)


def _problem(is_small: bool, seed: int) -> tuple[Checkpoint, Tensor, Tensor]:
    """A network and eight users of full length: INT32 [8, n, W] and [8, k, W]."""
    name, n, k = ("tiny", 40, 12) if is_small else ("large", 1100, 256)
    made = synthetic_checkpoint(preset(name), 200 if is_small else _ITEMS, seed)
    generator = np.random.default_rng(seed)
    users = [random_rows(made.schema, made.catalog, 1, n, k, generator) for _ in range(8)]
    context, candidates = (torch.cat(parts) for parts in zip(*users, strict=True))
    heads: Any = made.model.task_heads
    last = heads.tower if hasattr(heads, "tower") else heads.towers.weight
    with torch.no_grad():
        spread = made.model(context[:2, :256], candidates[:2, :64]).logit().std(dim=1).mean()
        last.mul_(1 / spread)
    return made, context, candidates


def _on_device(
    made: Checkpoint,
    engines: dict[str, CompiledEngine],
    compiled: Network | None,
    note: str,
    rows: tuple[Tensor, ...],
    exact: Tensor,
    allowed: dict[str, float],
    ceilings: Ceilings,
) -> Iterator[Figure]:
    """Time of the device alone, of exact lengths, all paths in turn."""
    batch, n, k = *rows[0].shape[:2], rows[1].shape[1]
    types = rows[0][0, :, TYPE_COLUMN]
    static = int(((types == TokenType.PROFILE) | (types == TokenType.HISTORY)).sum())
    config = made.model.config
    work = work_of(config, batch, static, n, k)
    shape = f"device, B {batch}, {n} + {k}"
    figures: dict[str, Figure] = {}
    runs: dict[str, Callable[[], object]] = {}

    def add(name: str, precision: str, run: Callable[[], Tensor], limit: float | None, note: str = "") -> None:
        floor, flops = work.floor_ms(ceilings, precision), work.linear + work.attention
        try:
            with torch.no_grad():  # inference mode would have PyTorch's compiler begin anew
                error = largest_difference(run(), exact)
        except Exception as failed:  # noqa: BLE001 - what fails in one precision must not take the others along
            figures[name] = Figure("model", name, shape, note=f"failed: {str(failed).splitlines()[0][:90]}")
            return
        figures[name] = Figure(
            "model", name, shape, [], floor, flops, ceilings.flops[precision], error, limit, note=note
        )
        runs[name] = run

    for name, engine in engines.items():
        network = engine.network
        network.tune(batch, n, k)
        add(f"compiled {name}", name, lambda network=network: network.rank(*rows), allowed[name])
    if compiled is not None:
        add(COMPILED, "bf16", lambda: compiled(*rows), allowed["bf16"], note)
    add(EAGER, "fp32", lambda: made.model(*rows), None)
    with torch.no_grad():
        ready = {name: run if name == EAGER else _captured(run)[0] for name, run in runs.items()}
        samples = interleaved(ready, captured=False, replays=_ROUNDS)
    for name, times in samples.items():
        figures[name].samples_ms = times
    yield from _compared(figures)
    if compiled is None:
        yield Figure("model", COMPILED, shape, note=note)


def _whole_calls(
    engines: dict[str, CompiledEngine],
    compiled: Network | None,
    rows: tuple[Tensor, ...],
    exact: Tensor,
    allowed: dict[str, float],
) -> Iterator[Figure]:
    """Time from arrays of the host to arrays of the host by its own clock: checks, padding, copies, and the device."""
    arrays = {"context": rows[0].numpy(), "candidates": rows[1].numpy()}
    shape = f"call, B {len(rows[0])}, {rows[0].shape[1]} + {rows[1].shape[1]}"
    calls: dict[str, Callable[[], Any]] = {
        f"compiled {name}": lambda engine=engine: engine.infer(arrays)["task_scores"]
        for name, engine in engines.items()
    }
    if compiled is not None:
        calls[COMPILED] = _graph_call(compiled, rows)
    samples: dict[str, list[float]] = {name: [] for name in calls}
    found: dict[str, Any] = {}
    for index in range(-3, _ROUNDS if DEVICE.type == "cuda" else 1):
        for name, call in calls.items():
            start = time.perf_counter()
            found[name] = call()
            if index >= 0:
                samples[name].append(1e3 * (time.perf_counter() - start))
    figures = {}
    for name, times in samples.items():
        error = largest_difference(torch.from_numpy(found[name]), exact.cpu())
        limit = allowed["bf16"] if name == COMPILED else allowed[name.removeprefix("compiled ")]
        figures[name] = Figure("model", name, shape, times, error=error, allowed=limit)
    yield from _compared(figures)


def _compared(figures: dict[str, Figure]) -> Iterator[Figure]:
    """Figures with their ratios to PyTorch's."""
    for name, figure in figures.items():
        for other in (COMPILED, EAGER):
            reference = figures[other].p50 if other in figures and other != name else None
            if reference and figure.p50:
                figure.versus[other] = reference / figure.p50
        yield figure


def _torch_compiled(module: nn.Module, rows: tuple[Tensor, ...]) -> tuple[Network | None, str]:
    """A module under torch.compile for one shape and how long that took, or what went wrong."""
    backend = "inductor" if DEVICE.type == "cuda" else "eager"
    start = time.perf_counter()
    try:
        with _time_limit(_COMPILE_SECONDS), torch.no_grad():
            # Dynamo takes a comparison with an enumeration's member for a plain bool; an exported graph has none.
            exported = torch.export.export(module, rows).module()
            compiled = torch.compile(exported, backend=backend, dynamic=False)
            compiled(*rows)
    except Exception as error:  # noqa: BLE001 - whatever stops the other path must not stop ours
        return None, f"not here: {type(error).__name__}: {str(error).splitlines()[0][:80]}"

    def run(*inputs: Tensor) -> Tensor:
        with torch.no_grad():
            found: Tensor = compiled(*inputs)
        return found

    return run, f"compiled in {time.perf_counter() - start:.0f} s"


def _graph_call(compiled: Network, rows: tuple[Tensor, ...]) -> Callable[[], Any]:
    """torch.compile with a CUDA graph from pinned arrays to an array: the least that a caller of it can do."""
    if DEVICE.type == "cpu":
        return lambda: compiled(*rows).float().numpy()
    pinned = [part.pin_memory() for part in rows]
    static = [part.to(DEVICE) for part in rows]
    replay, out = _captured(lambda: compiled(*static))

    def call() -> Any:
        for target, part in zip(static, pinned, strict=True):
            target.copy_(part, non_blocking=True)
        replay()
        return out.float().cpu().numpy()

    return call


def _captured(run: Callable[[], Any]) -> tuple[Callable[[], object], Any]:
    """What replays a CUDA graph of one run, and where its result lies; on the CPU the run itself."""
    if DEVICE.type == "cpu":
        return run, None
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = run()
    return graph.replay, out


@contextmanager
def _time_limit(seconds: int) -> Iterator[None]:
    def stop(*_: object) -> None:
        raise TimeoutError(f"longer than {seconds} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def profile(is_small: bool, seed: int) -> None:
    """Print what each kernel of one batch of eight takes on the GPU, in every precision."""
    made, context, candidates = _problem(is_small, seed)
    rows = (context.to(DEVICE), candidates.to(DEVICE))
    with tempfile.TemporaryDirectory() as folder:
        save_checkpoint(made, Path(folder))
        for precision in PRECISIONS:
            network = CompiledEngine(Path(folder), str(DEVICE), precision).network  # type: ignore[arg-type]
            network.tune(*context.shape[:2], candidates.shape[1])
            for _ in range(3):
                network.rank(*rows)
            activities = [torch.profiler.ProfilerActivity.CPU]
            if DEVICE.type == "cuda":
                activities.append(torch.profiler.ProfilerActivity.CUDA)
            with torch.profiler.profile(activities=activities) as found:
                network.rank(*rows)
                if DEVICE.type == "cuda":
                    torch.cuda.synchronize()
            kind = "self_device_time_total" if DEVICE.type == "cuda" else "self_cpu_time_total"
            events = sorted(found.key_averages(), key=lambda event, kind=kind: -getattr(event, kind))
            total = sum(getattr(event, kind) for event in events)
            print(f"== {precision}: {total / 1e3:.3f} ms in all")
            for event in events[:18]:
                taken = getattr(event, kind)
                print(f"   {taken / 1e3:8.3f} ms {event.count:5d} x {taken / event.count:9.1f} us  {event.key[:110]}")


def main(arguments: list[str] | None = None) -> int:
    """Print the figures."""
    options = section_options("perf.gpu_model", __doc__, arguments, profile="time by kernel instead")
    if options.profile:
        profile(options.small, options.seed)
    else:
        print_section(model, options)
    return 0


if __name__ == "__main__":
    sys.exit(main())
