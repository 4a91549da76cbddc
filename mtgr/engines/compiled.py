"""The ``compiled`` engine: ``baseline``'s fast twin, on the project's kernels and, on a GPU, CUDA graphs by bucket."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from threading import Lock
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch

from mtgr.checkpoint import load_checkpoint
from mtgr.engines.checks import check_batch, check_order
from mtgr.engines.compiled_graphs import BucketGraphs, Shape
from mtgr.engines.compiled_network import CompiledNetwork, CompiledPrecision
from mtgr.engines.compiled_pauses import Pauses
from mtgr.engines.pending import Arrays, Done, Pending
from mtgr.engines.rows import RowChecker
from mtgr.errors import ConfigurationError
from mtgr.model import MTGR
from mtgr.routing.buckets import CONTEXT_BUCKETS, bucket

_LOG = logging.getLogger(__name__)

Operation = Literal["rank", "retrieve"]


def require_gpu(precision: CompiledPrecision, device: str) -> None:
    """Refuse what a CPU is slower at than at FP32.

    Raises:
        ConfigurationError: If a low precision is to be computed on a CPU.
    """
    if precision != "fp32" and torch.device(device).type == "cpu":
        raise ConfigurationError(
            f"the compiled engine computes in {precision} on a GPU only and this host has none; export --compiled fp32."
        )


def _contexts(max_context: int) -> list[int]:
    """Padded lengths of contexts, the longest first."""
    longest = bucket(max_context, CONTEXT_BUCKETS)
    return sorted({longest, *(one for one in CONTEXT_BUCKETS if one < longest)}, reverse=True)


def frequent_shapes(max_context: int) -> Iterator[tuple[Operation, int, int, int]]:
    """What a busy server meets, most frequent first: batches of every size that the router makes by default."""
    contexts = _contexts(max_context)
    for batch in (1, 8, 4, 2, 6, 5, 3):
        for candidates in (256, 512, 1024, 128, 64, 16):
            for context in contexts:
                yield "rank", batch, context, candidates


def usual_shapes(max_context: int) -> list[tuple[Operation, int, int, int]]:
    """What a server meets first, for ``CompiledEngine.warm_up``: lone and merged requests of every context bucket."""
    contexts = _contexts(max_context)
    ranked: list[tuple[Operation, int, int, int]] = [("rank", batch, n, 256) for n in contexts for batch in (8, 1)]
    return [*ranked, *(("retrieve", 1, n, 0) for n in contexts)]


class CompiledEngine:
    """Ranks or retrieves batches of rows.

    Args:
        checkpoint: Directory of the checkpoint.
        device: PyTorch device, such as ``cpu`` or ``cuda:1``.
        precision: Of the computation; ``fp8`` rounds the blocks' linear layers.
        max_graphs: CUDA graphs kept at most; further shapes replace the one that was used longest ago.
        log: Takes what an operator should read: captures of graphs after the start.

    Raises:
        ConfigurationError: If the checkpoint is missing, damaged or of another network than MTGR, or the device is not
            there.
    """

    def __init__(
        self,
        checkpoint: Path,
        device: str = "cpu",
        precision: CompiledPrecision = "fp32",
        max_graphs: int = 768,
        log: Callable[[str], object] = _LOG.info,
    ) -> None:
        loaded = load_checkpoint(checkpoint)
        if not isinstance(loaded.model, MTGR):
            raise ConfigurationError(
                f"the checkpoint in {checkpoint} holds {type(loaded.model).__name__}; the compiled engine runs MTGR "
                "alone, use baseline."
            )
        self.schema = loaded.schema
        self.device = torch.device(device)
        self._checker = RowChecker(loaded.schema, loaded.config.max_positions)
        try:
            self.network = CompiledNetwork(loaded.model, precision, self.device)
        except (RuntimeError, AssertionError) as error:
            raise ConfigurationError(f"the model cannot be placed on {device}: {error}") from error
        self._graphs = (
            BucketGraphs(self.network, self.schema.width, self.device, max_graphs, log)
            if self.device.type == "cuda"
            else None
        )
        self._lock = Lock()
        self._pauses = None if self._graphs is None else Pauses(self._graphs, self._lock)

    def warm_up(
        self,
        shapes: Iterable[tuple[Operation, int, int, int]],
        *,
        measure: bool = True,
        seconds: float = math.inf,
    ) -> None:
        """Find the fastest kernels for some shapes and capture their graphs, so that no request waits for it.

        Args:
            shapes: Operation, batch, padded context and padded candidates; nothing is done for them on the CPU.
            measure: Whether to try several ways of computing attention and products, or to take the usual ones.
            seconds: After which the rest is left to the requests that need it.
        """
        if self._graphs is None:
            return
        begin = time.monotonic()
        for operation, batch, context, candidates in shapes:
            if time.monotonic() - begin > seconds:
                return
            if measure:
                self.network.tune(batch, context, candidates)
            with self._lock:
                self._graphs.captured(Shape.of(operation, batch, context, candidates))

    def infer(self, inputs: Mapping[str, npt.NDArray[Any]]) -> Arrays:
        """Run one batch.

        Args:
            inputs: ``context`` INT32 [B, n, W] and, to rank, ``candidates`` INT32 [B, k, W].

        Returns:
            ``task_scores`` FP32 [B, k, T] with candidates, those of padding without a meaning; ``items`` INT32 [B, m]
            and ``scores`` FP32 [B, m] without.

        Raises:
            InvalidRequestError: If the rows have another width than the schema's, an id is out of range, rows stand in
                another order than the schema's builders give them, or there is no context.
        """
        return self.submit(inputs).wait()

    def submit(self, inputs: Mapping[str, npt.NDArray[Any]]) -> Pending:
        """Hand a batch over: on a GPU it is computed behind those ahead of it, while the caller goes on.

        Waits where two batches are not answered. Arguments and errors are those of ``infer``.
        """
        check_batch(inputs, self._checker)
        check_order(inputs, self.network.model.config.max_positions)
        if self._graphs is None:
            return Done(self._computed(inputs))
        if self._pauses is not None:
            self._pauses.put_off()
        with self._lock:
            return self._graphs.launch(inputs)

    def close(self) -> None:
        """Capture no more graphs in pauses; batches are answered as before."""
        if self._pauses is not None:
            self._pauses.close()

    def _computed(self, inputs: Mapping[str, npt.NDArray[Any]]) -> Arrays:
        context = _tensor(inputs["context"])
        if "candidates" in inputs:
            return {"task_scores": self.network.rank(context, _tensor(inputs["candidates"])).numpy()}
        items, scores = self.network.retrieve(context)
        return {"items": items.numpy(), "scores": scores.numpy()}


def _tensor(rows: npt.NDArray[Any]) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(rows, dtype=np.int32))
