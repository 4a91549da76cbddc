"""``python -m perf.soak --minutes 30``: mixed good and bad traffic for a long time; whatever grows is a leak.

Callers in a closed loop draw from rankings and recommendations with stored and own histories by every dense strategy,
over gRPC and HTTP; requests that must be refused; and calls that the caller gives up. Memory, file handles, threads
and shared memory of all the server's processes are sampled, and compared by their medians in the second fifth of the
time, after warm-up, and in the last one.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import statistics
import sys
import tempfile
import urllib.request
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import tritonclient.grpc
import tritonclient.grpc.aio
from tqdm import tqdm
from tritonclient.utils import InferenceServerException, np_to_triton_dtype

from mtgr.client import AsyncMTGRClient, History, RecommendationRequest
from mtgr.errors import MTGRError
from mtgr.serving.server import TritonServer
from perf.load import MAX_IN_FLIGHT
from perf.processes import ServerProcesses, Usage, columns
from perf.record import ROOT, describe, store
from perf.repository import CONFIG, ranking_requests, synthetic_repository

CONTEXT, CANDIDATES, USERS = 256, 64, 256
TIME_LIMIT = 30.0
_BAD, _GIVEN_UP = 0.3, 0.05  # parts of the requests
_MEGABYTE = 1 << 20

Tensors = dict[str, npt.NDArray[Any]]

# What the last fifth may hold beyond the second: a part of it, and a constant. Allocators round up, pools fill late.
# Without pss, which is stored only: it also rises when a process outside ends that had the same libraries mapped.
SLACK: Mapping[str, tuple[float, float]] = {
    "rss": (0.02, 8 * _MEGABYTE),
    "handles": (0.0, 8),
    "threads": (0.0, 8),
    "shared_files": (0.0, 0),
    "shared_bytes": (0.0, 2 * _MEGABYTE),
    "processes": (0.0, 0),
}


def bad_requests(user: str) -> dict[str, Tensors]:
    """Requests that must be refused as invalid, by what is wrong with them."""
    text = {
        name: np.array([[value]], dtype=np.object_)
        for name, value in {
            "user": user.encode(),
            "empty": b"",
            "long": b"x" * 20_000,
            "not UTF-8": b"\xff\xfe",
            "not JSON": b'{"age": ',
        }.items()
    }
    good: Tensors = {"user_id": text["user"], "candidates": np.array([[1, 2, 3]])}
    one = np.ones((1, 1), dtype=np.int64)
    return {
        "no user": {"candidates": good["candidates"]},
        "empty user": good | {"user_id": text["empty"]},
        "long user": good | {"user_id": text["long"]},
        "user not UTF-8": good | {"user_id": text["not UTF-8"]},
        "negative candidate": good | {"candidates": -one},
        "too many candidates": good | {"candidates": np.arange(20_000)[None]},
        "candidates of another type": good | {"candidates": np.ones((1, 3), dtype=np.float32)},
        "history without times": good | {"history_items": one, "history_actions": one.astype(np.int32)},
        "profile not JSON": good | {"profile": text["not JSON"]},
        "long profile": good | {"profile": text["long"]},
        "unknown strategy": good | {"strategy": text["user"]},
        "top_k of 0": good | {"top_k": np.zeros((1, 1), dtype=np.int32)},
        "time in milliseconds": good | {"request_time": one * 1_700_000_000_000},
        "unknown tensor": good | {"user_name": text["user"]},
    }


@dataclass
class Soak:
    """Traffic and what became of it.

    Args:
        server: A running server.
        requests: Good requests to vary.
        seed: Of the draws.

    Attributes:
        counts: Requests by what became of them.
        wrong: The first few that did not end as they had to.
    """

    server: TritonServer
    requests: Sequence[RecommendationRequest]
    seed: int = 0
    counts: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)

    async def run(self, seconds: float, callers: int, interval: float, warm_up: int = 0) -> list[Usage]:
        """Send, and sample the server's processes.

        Args:
            seconds: How long, after the warm-up.
            callers: How many send at a time.
            interval: Seconds between two samples.
            warm_up: Requests before the first sample. Pools fill and allocators settle with requests, not with time: a
                short run on a busy machine would take the end of that for growth.
        """
        ended = asyncio.Event()
        url = self.server.grpc_url
        async with (
            AsyncMTGRClient(url, timeout=TIME_LIMIT, retries=0) as grpc,
            AsyncMTGRClient(self.server.http_url, protocol="http", timeout=TIME_LIMIT, retries=0) as http,
            tritonclient.grpc.aio.InferenceServerClient(url) as raw,
        ):
            tasks = [asyncio.create_task(self._call(index, (grpc, http), raw, ended)) for index in range(callers)]
            try:
                while self.counts.total() < warm_up:
                    await asyncio.sleep(0.1)
                async with ServerProcesses(self.server.pid, pss=True).watched(interval) as usages:
                    for _ in tqdm(range(round(seconds / interval)), desc="soak", leave=False, disable=None):
                        await asyncio.sleep(interval)
                        await asyncio.to_thread(self._scrape)
            finally:
                ended.set()
                await asyncio.gather(*tasks)
        return usages

    async def _call(
        self,
        index: int,
        clients: Sequence[AsyncMTGRClient],
        raw: tritonclient.grpc.aio.InferenceServerClient,
        ended: asyncio.Event,
    ) -> None:
        generator = np.random.default_rng([self.seed, index])
        bad = bad_requests(self.requests[0].user_id)
        while not ended.is_set():
            client = clients[int(generator.random() < 0.25)]
            draw = generator.random()
            if draw < _BAD:
                name = str(generator.choice(list(bad)))
                await self._send_bad(raw, name, bad[name])
            elif draw < _BAD + _GIVEN_UP:
                with contextlib.suppress(TimeoutError, MTGRError):
                    async with asyncio.timeout(generator.uniform(0.001, 0.02)):
                        await clients[0].infer(self._good(generator))
                self.counts["given up"] += 1
            else:
                await self._send_good(client, self._good(generator))

    def _good(self, generator: np.random.Generator) -> RecommendationRequest:
        """A request of its own: other candidates, perhaps another history, perhaps none of them."""
        base = self.requests[generator.integers(len(self.requests))]
        assert base.candidates is not None
        assert base.request_time is not None
        items = np.asarray(base.candidates)
        history, kind = None, generator.random()
        if kind < 0.25:
            events = int(generator.integers(0, len(items)))
            times = np.sort(base.request_time - generator.integers(0, 10_000, events))
            history = History(items[:events], generator.integers(0, 5, events), times)
        return RecommendationRequest(
            base.user_id if generator.random() < 0.9 else f"nobody-{generator.integers(1 << 40)}",
            history,
            None if kind > 0.85 else items[: generator.integers(1, len(items) + 1)],
            request_time=base.request_time,
            strategy=(None, "baseline", "onnx")[generator.choice(3, p=(0.6, 0.1, 0.3))],
            top_k=10 if kind > 0.85 else None,
        )

    async def _send_good(self, client: AsyncMTGRClient, request: RecommendationRequest) -> None:
        try:
            answer = await client.infer(request)
        except MTGRError as error:
            self._note(f"a good request failed: {error}")
            return
        wanted = 10 if request.candidates is None else len(request.candidates)
        if len(answer) == wanted:
            self.counts["answered"] += 1
        else:
            self._note(f"{len(answer)} items instead of {wanted}")

    async def _send_bad(
        self, raw: tritonclient.grpc.aio.InferenceServerClient, name: str, tensors: Mapping[str, npt.NDArray[Any]]
    ) -> None:
        inputs = []
        for tensor, array in tensors.items():
            one = tritonclient.grpc.InferInput(tensor, list(array.shape), np_to_triton_dtype(array.dtype))
            inputs.append(one.set_data_from_numpy(array))
        try:
            await raw.infer("mtgr", inputs, client_timeout=TIME_LIMIT)
        except InferenceServerException as error:
            if str(error.status()) == "StatusCode.INVALID_ARGUMENT":
                self.counts["refused as invalid"] += 1
            else:
                self._note(f"{name}: {error.status()} {error.message()}")
        else:
            self._note(f"{name}: answered")

    def _note(self, sentence: str) -> None:
        self.counts["wrong"] += 1
        if len(self.wrong) < 20:
            self.wrong.append(sentence)

    def _scrape(self) -> None:
        """As a monitoring system does."""
        try:
            with urllib.request.urlopen(self.server.metrics_url, timeout=30) as response:
                response.read()
        except OSError:
            self.server.wait(1.0)  # says how it ended, if it has
            raise


@dataclass(frozen=True)
class Growth:
    """One measure in the second and in the last fifth of the time.

    Attributes:
        name: Of the measure.
        early: Median of the second fifth.
        late: Median of the last one.
        allowed: Most that the last one may be.
    """

    name: str
    early: float
    late: float
    allowed: float

    @property
    def good(self) -> bool:
        """Whether it stayed within its slack."""
        return self.late <= self.allowed


def growth(usages: Sequence[Usage]) -> list[Growth]:
    """Verdicts, one a measure; needs five samples at least."""
    fifth = len(usages) // 5
    found = []
    for name, (part, constant) in SLACK.items():
        early = statistics.median(getattr(usage, name) for usage in usages[fifth : 2 * fifth])
        late = statistics.median(getattr(usage, name) for usage in usages[-fifth:])
        found.append(Growth(name, early, late, early * (1 + part) + constant))
    return found


def table(found: Sequence[Growth]) -> str:
    """For readers; bytes as megabytes."""
    lines = [f"{'':16}{'2nd fifth':>12}{'last fifth':>12}{'allowed':>12}"]
    for one in found:
        unit = _MEGABYTE if one.name in ("rss", "shared_bytes") else 1
        values = "".join(f"{value / unit:12.1f}" for value in (one.early, one.late, one.allowed))
        lines.append(f"{one.name + (' MB' if unit > 1 else ''):16}{values}{'' if one.good else '  GREW'}")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    """Soak; 0 if nothing grew and every request ended as it had to, 1 if not."""
    parser = argparse.ArgumentParser(prog="python -m perf.soak", description=__doc__)
    parser.add_argument("--model-repository", type=Path, help="an exported one; by default a random network's")
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--callers", type=int, default=4)
    parser.add_argument("--interval", type=float, default=5.0, help="seconds between two samples")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--name", default="soak-cpu", help="file name in perf/results")
    options = parser.parse_args(arguments)
    if not 1 <= options.callers <= MAX_IN_FLIGHT or options.minutes * 60 < 10 * options.interval:
        parser.error("there must be a caller at least, and time for ten samples")
    with tempfile.TemporaryDirectory() as folder:
        repository = options.model_repository or synthetic_repository(Path(folder), USERS, CONTEXT, options.seed)
        requests = ranking_requests(repository, 1024, CANDIDATES, options.seed)
        with TritonServer(repository) as server:
            soak = Soak(server, requests, options.seed)
            usages = asyncio.run(soak.run(options.minutes * 60, options.callers, options.interval))
    found = growth(usages)
    print(table(found))
    print(", ".join(f"{count} {name}" for name, count in sorted(soak.counts.items())))
    for sentence in soak.wrong:
        print(f"WRONG: {sentence}")
    result = describe(options.seed) | {
        "network": str(options.model_repository) if options.model_repository else CONFIG.to_dict(),
        "minutes": options.minutes,
        "callers": options.callers,
        "counts": dict(soak.counts),
        "wrong": soak.wrong,
        "grew": [one.name for one in found if not one.good],
        "processes": columns(usages),
    }
    print(f"raw samples: {store(options.name, result).relative_to(ROOT)}")
    return 0 if all(one.good for one in found) and not soak.wrong else 1


if __name__ == "__main__":
    sys.exit(main())
