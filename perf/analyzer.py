"""NVIDIA's perf_analyzer: found or unpacked, run on one level of load, and its raw samples read.

It is in Triton's SDK image, and in wheels of tritonclient for as long as they carried it; PyPI's own ``perf-analyzer``
is a placeholder. Each run sends a fixed number of requests, so that each step of the input is sent once and the
server's counts can be compared with the client's; versions that send more at a rate say so in ``exact_rates``.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from mtgr.errors import ConfigurationError, UnavailableError
from perf.record import ROOT

WHEEL = "tritonclient==2.51.0"
VARIABLE = "MTGR_PERF_ANALYZER"
CACHE = ROOT / "build" / "perf_analyzer"
_SYNC_CALLERS = 64  # more would be as many threads


class StalledError(UnavailableError):
    """perf_analyzer did not end, or left requests out of its report."""


@dataclass(frozen=True)
class Samples:
    """What one run of perf_analyzer saw.

    Attributes:
        command: Its command line.
        seconds: From the first request to the last answer.
        latencies_ms: Of each request, in the order of sending.
        distinct: How many different payloads it sent.
    """

    command: list[str]
    seconds: float
    latencies_ms: list[float]
    distinct: int


class Analyzer:
    """An installed perf_analyzer.

    Args:
        binary: The executable.
        libraries: Directory of shared libraries that it needs besides the system's.

    Attributes:
        version: What it says of itself.
        exact_rates: Whether at a rate it sends just as many requests as it is asked for.

    Raises:
        ConfigurationError: If it does not start.
    """

    def __init__(self, binary: Path, libraries: Path | None = None) -> None:
        self._binary = binary
        self._environment = dict(os.environ)
        if libraries is not None:
            paths = [str(libraries), *filter(None, [os.environ.get("LD_LIBRARY_PATH")])]
            self._environment["LD_LIBRARY_PATH"] = os.pathsep.join(paths)
        # One that does not know --version prints it with its usage.
        done = subprocess.run(
            [binary, "--version"], env=self._environment, capture_output=True, text=True, check=False, timeout=30
        )
        found = re.search(r"[Vv]ersion:? (\S+)", done.stdout + done.stderr)
        if found is None:
            raise ConfigurationError(_start_failure(binary, done.stdout + done.stderr))
        self.version = found[1]
        self.exact_rates = exact_at_rates(self.version)

    def run(
        self,
        url: str,
        model: str,
        data: Path,
        requests: int,
        *,
        concurrency: int | None = None,
        rate: float | None = None,
        timeout: float = 180.0,
    ) -> Samples:
        """Send each of the first ``requests`` steps of an input file once.

        Args:
            url: ``host:port`` of the server's gRPC.
            model: Which model.
            data: Input in perf_analyzer's JSON form.
            requests: How many, no more than there are steps, and no fewer than callers or than a second's.
            concurrency: Callers that wait for their answers; this or ``rate`` is given.
            rate: Requests a second at random moments (Poisson).
            timeout: Seconds until it is given up. Now and then 2.51 waits for ever when all is answered.

        Raises:
            ConfigurationError: If it does not know these arguments.
            StalledError: If it does not end in time, or reports other than ``requests`` requests.
            UnavailableError: If a request fails, at which perf_analyzer stops.
        """
        if (concurrency is None) == (rate is None):
            raise ConfigurationError("give either a concurrency or a rate.")
        load = (
            # Asynchronous: otherwise a few threads wait for answers, and the rate is not kept.
            [f"--request-rate-range={rate:g}", "--request-distribution=poisson", "--async"]
            if concurrency is None
            else [f"--concurrency-range={concurrency}"]
        )
        if concurrency is not None and concurrency > _SYNC_CALLERS:
            load += ["--async", "--max-threads=16"]
        with tempfile.TemporaryDirectory() as folder:
            export = Path(folder) / "profile.json"
            command = [
                str(self._binary),
                *("-m", model, "-u", url, "-i", "grpc", f"--input-data={data}", f"--request-count={requests}"),
                *load,
                f"--profile-export-file={export}",
            ]
            try:
                done = subprocess.run(
                    command, env=self._environment, capture_output=True, text=True, check=False, timeout=timeout
                )
            except subprocess.TimeoutExpired as error:
                raise StalledError(f"perf_analyzer did not end within {timeout:.0f} s.") from error
            output = done.stdout + done.stderr
            if "\nUsage: " in output:
                raise ConfigurationError(f"perf_analyzer does not take its arguments: {output.splitlines()[0]}")
            if done.returncode or not export.is_file():
                raise UnavailableError(f"perf_analyzer failed: {_last_line(output)}")
            samples = read_profile(export, command)
            if len(samples.latencies_ms) != requests:
                raise StalledError(f"perf_analyzer reports {len(samples.latencies_ms)} of {requests} requests.")
            return samples


def exact_at_rates(version: str) -> bool:
    """Whether a version sends as many requests at a rate as ``--request-count`` says.

    2.51 does. 2.57 sends them all twice and reports one of the two passes, whatever the distribution, the warm-up, or
    the number of threads: caches know every payload from the other pass. At a concurrency both send them once.
    Versions in between have not been tried, and count as the later one.
    """
    parts = re.match(r"(\d+)\.(\d+)", version)
    return parts is not None and (int(parts[1]), int(parts[2])) <= (2, 51)


def read_profile(path: Path, command: Sequence[str]) -> Samples:
    """Raw samples of a profile that perf_analyzer exported.

    Raises:
        UnavailableError: If it has no samples.
    """
    experiments = json.loads(path.read_text(encoding="utf-8"))["experiments"]
    requests = experiments[0]["requests"] if experiments else []
    answered = sorted(
        (request["timestamp"], request["response_timestamps"][-1])
        for request in requests
        if request["response_timestamps"]
    )
    if not answered:
        raise UnavailableError("perf_analyzer exported no requests; look at its output.")
    seconds = (max(end for _, end in answered) - answered[0][0]) / 1e9
    latencies = [round((end - start) / 1e6, 3) for start, end in answered]
    distinct = {json.dumps(request["request_inputs"], sort_keys=True) for request in requests}
    return Samples(list(command), seconds, latencies, len(distinct))


def find_analyzer(explicit: Path | None = None, environ: Mapping[str, str] = os.environ) -> Analyzer:
    """The perf_analyzer asked for, else the one on PATH, else that of tritonclient's wheel, which is downloaded once.

    Args:
        explicit: The executable; wins over ``MTGR_PERF_ANALYZER``.
        environ: Environment to search.

    Raises:
        ConfigurationError: If there is none, or it does not start.
    """
    if explicit is None and environ.get(VARIABLE):
        explicit = Path(environ[VARIABLE])
    if explicit is not None:
        if not os.access(explicit, os.X_OK):
            raise ConfigurationError(f"{explicit} is not an executable file; give the path of perf_analyzer.")
        return Analyzer(explicit, CACHE)
    on_path = shutil.which("perf_analyzer", path=environ.get("PATH"))
    if on_path is not None:
        return Analyzer(Path(on_path))
    return Analyzer(_unpacked(), CACHE)


def _unpacked() -> Path:
    """The wheel's executable in ``build/``, with the CUDA runtime it is linked against beside it."""
    binary = CACHE / "perf_analyzer"
    if not binary.is_file():
        CACHE.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=CACHE) as folder:
            command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
            done = subprocess.run([*command, "--dest", folder, WHEEL], capture_output=True, text=True, check=False)
            wheels = list(Path(folder).glob("*.whl"))
            if done.returncode or not wheels:
                raise ConfigurationError(
                    f"perf_analyzer is not on PATH, and {WHEEL}, which carries it, cannot be downloaded "
                    f"({_last_line(done.stderr)}): work in Triton's SDK image, or set {VARIABLE} to its path."
                )
            with zipfile.ZipFile(wheels[0]) as wheel:
                name = next(name for name in wheel.namelist() if name.endswith("/bin/perf_analyzer"))
                extracted = Path(wheel.extract(name, folder))
            extracted.chmod(0o755)
            os.replace(extracted, binary)
    _link_cuda_runtime()
    return binary


def _link_cuda_runtime() -> None:
    """Under its plain name: the server's wheel carries it under another."""
    link = CACHE / "libcudart.so.12"
    if link.exists():
        return
    link.unlink(missing_ok=True)  # it may point nowhere
    for package in ("nvidia-pytriton", "nvidia-cuda-runtime-cu12"):
        try:
            files = metadata.files(package) or ()
        except metadata.PackageNotFoundError:
            continue
        for file in files:
            if re.match(r"libcudart(-\w+)?\.so\.12", file.name):
                link.symlink_to(file.locate())
                return


def _start_failure(binary: Path, output: str) -> str:
    missing = re.search(r"(\S+): cannot open shared object file", output)
    if missing is None:
        return f"{binary} does not start: {_last_line(output)}"
    hints = {
        "libb64.so.0d": "apt-get install libb64-0d",
        "libcudart.so.12": "pip install nvidia-pytriton==0.7.0, or nvidia-cuda-runtime-cu12",
    }
    hint = hints.get(missing[1], "install the package that has it")
    return f"{binary} does not start without {missing[1]}: {hint}."


def _last_line(output: str) -> str:
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    return lines[-1] if lines else "it says nothing"
