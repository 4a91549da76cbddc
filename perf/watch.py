"""What a server did while a point was measured: Triton's counts, the door's metrics, processes, and GPUs."""

from __future__ import annotations

import csv
import dataclasses
import json
import os
import re
import shutil
import subprocess
import threading
import time
import urllib.request
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from mtgr.serving.server import TritonServer
from perf.processes import ServerProcesses, processor_seconds
from perf.results_format import CacheRatios, Gpu, ModelCounts

_SERIES = re.compile(r"^(\w+)(?:{(.*)})? (\S+)$", re.MULTILINE)
_LABEL = re.compile(r'(\w+)="([^"]*)"')
_INTERVAL_S = 0.25
_REPORTS_S = 1.3  # models report once a second
_COUNTERS = ("mtgr_requests_total", "mtgr_errors_total", "mtgr_stage_seconds_count", "mtgr_vllm_requests_total")
_GPU_QUERY = "index,utilization.gpu,memory.used,memory.total,power.draw"


@dataclass(frozen=True)
class Page:
    """All that a server has counted by some moment.

    Attributes:
        series: Values of the metrics page by name and labels.
        models: Triton's statistics by model, summed over versions.
        cpu_seconds: Processor time of the server's processes.
        moment: Seconds of a steady clock.
    """

    series: Mapping[tuple[str, frozenset[tuple[str, str]]], float]
    models: Mapping[str, Mapping[str, Any]]
    cpu_seconds: float
    moment: float

    def total(self, name: str, **labels: str) -> float:
        """Sum of the series of a name that have these labels."""
        wanted = frozenset(labels.items())
        return sum(value for (other, found), value in self.series.items() if other == name and wanted <= found)

    def by(self, name: str, label: str) -> dict[str, float]:
        """Sums of the series of a name by one of their labels."""
        sums: dict[str, float] = defaultdict(float)
        for (other, labels), value in self.series.items():
            if other == name:
                sums[dict(labels).get(label, "")] += value
        return dict(sums)


@dataclass
class Usage:
    """What processes and GPUs used while they were watched; filled when the watch ends.

    Attributes:
        memory_bytes: Most resident memory at a time.
        gpu: None without one.
        seconds: That they were watched.
    """

    memory_bytes: int = 0
    gpu: Gpu | None = None
    seconds: float = 0.0

    def gpu_under_load(self, seconds: float) -> Gpu | None:
        """GPU figures with the use of the time under load alone, if the GPU had nothing to do in the rest of it.

        perf_analyzer reads its requests for seconds before it sends the first.
        """
        if self.gpu is None or not 0 < seconds < self.seconds:
            return self.gpu
        use = min(1.0, self.gpu.utilization * self.seconds / seconds)
        return dataclasses.replace(self.gpu, utilization=round(use, 4))


def read_page(server: TritonServer) -> Page:
    """Everything as it stands now."""
    text = _get(server.metrics_url)
    series = {(name, frozenset(_LABEL.findall(labels))): float(value) for name, labels, value in _SERIES.findall(text)}
    models: dict[str, dict[str, Any]] = {}
    for entry in json.loads(_get(f"http://{server.http_url}/v2/models/stats"))["model_stats"]:
        mine = models.setdefault(entry["name"], {"batches": defaultdict(int), "stages": defaultdict(lambda: [0, 0])})
        for name in ("inference_count", "execution_count"):
            mine[name] = mine.get(name, 0) + int(entry.get(name, 0))
        for name, stage in entry["inference_stats"].items():
            mine["stages"][name][0] += int(stage.get("count", 0))
            mine["stages"][name][1] += int(stage.get("ns", 0))
        for batch in entry.get("batch_stats", ()):
            mine["batches"][str(batch["batch_size"])] += int(batch["compute_infer"].get("count", 0))
    return Page(series, models, _cpu_seconds(server), time.monotonic())


def triton_version(server: TritonServer) -> str:
    """The server's own word."""
    return str(json.loads(_get(f"http://{server.http_url}/v2"))["version"])


def quiet_page(server: TritonServer, limit: float = 6.0) -> Page:
    """The page when nothing of what happened before is still to be reported."""
    end = time.monotonic() + limit
    page = read_page(server)
    while True:
        before = page
        time.sleep(_REPORTS_S)
        page = read_page(server)
        if all(page.total(name) == before.total(name) for name in _COUNTERS) or time.monotonic() > end:
            return page


def settled_page(server: TritonServer, before: Page, answers: int, errors: int, limit: float = 4.0) -> Page:
    """The page when models have reported what happened until just now, which each of them does once a second.

    Args:
        server: The server.
        before: The page before.
        answers: Requests that the door has answered since.
        errors: Requests that it has not.
        limit: Most seconds to wait.
    """
    end = time.monotonic() + limit
    while True:
        page = read_page(server)

        def grown(name: str, page: Page = page, **labels: str) -> float:
            return page.total(name, **labels) - before.total(name, **labels)

        routed, failed = grown("mtgr_requests_total"), grown("mtgr_errors_total")
        extracted = grown("mtgr_stage_seconds_count", stage="features")
        cached = grown("mtgr_vllm_requests_total") - grown("mtgr_requests_total", strategy="vllm")
        if (routed >= answers <= extracted and failed >= errors and cached >= 0) or time.monotonic() > end:
            return page
        time.sleep(0.1)


def model_counts(before: Page, after: Page) -> dict[str, ModelCounts]:
    """What each model did in between; those that did nothing are left out."""
    found = {}
    for model, now in after.models.items():
        then = before.models.get(model, {"batches": {}, "stages": {}})
        stages = {
            name: [value - base for value, base in zip(pair, then["stages"].get(name, (0, 0)), strict=True)]
            for name, pair in now["stages"].items()
        }
        requests = stages["success"][0]
        batches = {size: count - then["batches"].get(size, 0) for size, count in now["batches"].items()}
        counts = ModelCounts(
            requests=requests,
            inferences=now["inference_count"] - then.get("inference_count", 0),
            executions=now["execution_count"] - then.get("execution_count", 0),
            queue_ms=_mean_ms(stages, "queue"),
            compute_input_ms=_mean_ms(stages, "compute_input"),
            compute_infer_ms=_mean_ms(stages, "compute_infer"),
            compute_output_ms=_mean_ms(stages, "compute_output"),
            batch_sizes={size: count for size, count in batches.items() if count},
            total_ms=_mean_ms(stages, "success"),
        )
        if counts.requests or counts.executions:
            found[model] = counts
    return found


def answered_by(before: Page, after: Page) -> dict[str, int]:
    """Answers by the strategy that served, in the router's count."""
    then = before.by("mtgr_requests_total", "strategy")
    now = after.by("mtgr_requests_total", "strategy")
    counts = {strategy: round(count - then.get(strategy, 0.0)) for strategy, count in now.items()}
    return {strategy: count for strategy, count in sorted(counts.items()) if count}


def stage_means(before: Page, after: Page) -> dict[str, float]:
    """Mean milliseconds of a request in each stage of the door."""
    seconds, counts = (
        {stage: value - before.by(name, "stage").get(stage, 0.0) for stage, value in after.by(name, "stage").items()}
        for name in ("mtgr_stage_seconds_sum", "mtgr_stage_seconds_count")
    )
    return {stage: round(1e3 * seconds[stage] / count, 4) for stage, count in sorted(counts.items()) if count > 0}


def cache_ratios(before: Page, after: Page) -> CacheRatios:
    """Hit ratios of the feature cache, by user, and of vLLM's prefix cache, by context token."""

    def grown(name: str) -> float:
        return after.total(name) - before.total(name)

    # Statistics count what is negative among the hits.
    hits, misses = grown("mtgr_features_cache_hits_total"), grown("mtgr_features_cache_misses_total")
    tokens, cached = grown("mtgr_vllm_context_tokens_total"), grown("mtgr_vllm_prefix_hit_tokens_total")
    return CacheRatios(
        feature_hit_ratio=round(hits / (hits + misses), 5) if hits + misses else None,
        prefix_hit_ratio=round(cached / tokens, 5) if tokens else None,
    )


@contextmanager
def watched(server: TritonServer) -> Iterator[Usage]:
    """Watch processes and GPUs for as long as the block runs."""
    usage, stop = Usage(), threading.Event()
    processes, gpus = ServerProcesses(server.pid), _GpuSamples()

    def look() -> None:
        while True:
            usage.memory_bytes = max(usage.memory_bytes, processes.sample().rss)
            if stop.wait(_INTERVAL_S):
                return

    thread = threading.Thread(target=look, name="watch", daemon=True)
    thread.start()
    before, started = read_page(server), time.monotonic()
    try:
        with gpus:
            yield usage
    finally:
        usage.seconds = time.monotonic() - started
        stop.set()
        thread.join()
        usage.gpu = gpus.usage() or triton_gpu(before, read_page(server))


def triton_gpu(before: Page, after: Page) -> Gpu | None:
    """GPU figures of Triton's own metrics, where nvidia-smi is missing."""
    used = after.total("nv_gpu_memory_used_bytes")
    if not used:
        return None
    devices = max(len(after.by("nv_gpu_utilization", "gpu_uuid")), 1)
    energy = after.total("nv_energy_consumption") - before.total("nv_energy_consumption")
    power = after.total("nv_gpu_power_usage")
    return Gpu(
        utilization=round((before.total("nv_gpu_utilization") + after.total("nv_gpu_utilization")) / 2 / devices, 4),
        memory_used_bytes=int(used),
        memory_total_bytes=int(after.total("nv_gpu_memory_total_bytes")),
        power_watts=power or None,
        energy_joules=energy or None,
    )


@dataclass
class _GpuSamples:
    """Samples of nvidia-smi, where it is there."""

    rows: list[tuple[float, ...]] = field(default_factory=list)
    devices: set[int] = field(default_factory=set)

    def __enter__(self) -> _GpuSamples:
        self._process: subprocess.Popen[str] | None = None
        self._started = time.monotonic()
        if shutil.which("nvidia-smi"):
            command = ["nvidia-smi", f"--query-gpu={_GPU_QUERY}", "--format=csv,noheader,nounits", "-lms", "100"]
            # Of several GPUs those that the server may use: others on this machine have other work.
            if visible := os.environ.get("CUDA_VISIBLE_DEVICES"):
                command += ["-i", visible]
            self._process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
            self._reader = threading.Thread(target=self._read, daemon=True)
            self._reader.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._seconds = time.monotonic() - self._started
        if self._process is not None:
            self._process.terminate()
            self._process.wait()
            self._reader.join()

    def _read(self) -> None:
        assert self._process is not None
        assert self._process.stdout is not None
        for row in csv.reader(self._process.stdout):
            values = [_number(value) for value in row]
            if len(values) == 5 and values[0] is not None and None not in values[1:4]:
                self.rows.append(tuple(float("nan") if value is None else value for value in values))

    def usage(self) -> Gpu | None:
        return gpu_usage(self.rows, self._seconds)


def gpu_usage(rows: list[tuple[float, ...]], seconds: float) -> Gpu | None:
    """Figures out of samples of (index, utilization in percent, MiB used, MiB in all, watts or NaN)."""
    if not rows:
        return None
    devices = sorted({int(row[0]) for row in rows})
    of = {device: [row for row in rows if row[0] == device] for device in devices}
    powers = [sum(row[4] for row in samples) / len(samples) for samples in of.values()]
    power = round(sum(powers), 2) if sum(powers) == sum(powers) else None  # NaN: it is not reported
    return Gpu(
        utilization=round(sum(row[1] for row in rows) / len(rows) / 100, 4),
        memory_used_bytes=int(sum(max(row[2] for row in samples) for samples in of.values())) << 20,
        memory_total_bytes=int(sum(samples[0][3] for samples in of.values())) << 20,
        power_watts=power,
        energy_joules=None if power is None else round(power * seconds, 2),
    )


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


def _mean_ms(stages: Mapping[str, list[int]], name: str) -> float:
    count, nanoseconds = stages.get(name, (0, 0))
    return round(nanoseconds / count / 1e6, 4) if count else 0.0


def _cpu_seconds(server: TritonServer) -> float:
    return sum(processor_seconds(pid) for pid in ServerProcesses(server.pid).processes())


def _get(url: str) -> str:
    with urllib.request.urlopen(url, timeout=10) as response:
        text: str = response.read().decode()
    return text
