"""Faults under load on a real server: nothing wrong, nothing lost, and ``auto`` goes on."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import subprocess
import time
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest

from mtgr.client import AsyncMTGRClient, MTGRClient, Recommendation
from mtgr.errors import MTGRError, UnavailableError
from mtgr.serving.server import TritonServer
from tests.conftest import copy_door
from tests.server.test_door import REQUEST_TIME, TOLERANCE

USERS = [str(user) for user in range(1, 41)]
CANDIDATES = list(range(1, 65))
CALLERS = 8


@pytest.fixture
def repository(model_repository: Path, tmp_path: Path) -> Path:
    """A copy: these tests damage it."""
    directory = copy_door(tmp_path / "repository")
    for model in model_repository.iterdir():
        subprocess.run(["cp", "-r", str(model), str(directory)], check=True)
    return directory


@pytest.fixture
def server(repository: Path) -> Iterator[TritonServer]:
    with TritonServer(repository, stop_timeout=10) as running:
        yield running


@pytest.fixture(scope="module")
def expected(model_repository: Path) -> dict[str, Recommendation]:
    """What every user must get, from an undisturbed server."""
    with TritonServer(model_repository) as calm, MTGRClient(calm.grpc_url) as client:
        return {user: client.rank(user, CANDIDATES, strategy="baseline", request_time=REQUEST_TIME) for user in USERS}


@dataclass
class Load:
    """Callers in a closed loop, and what became of every request."""

    url: str
    expected: dict[str, Recommendation]
    strategy: str = "auto"
    sent: int = 0
    answers: list[tuple[float, Recommendation]] = field(default_factory=list)
    errors: list[tuple[float, MTGRError]] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)
    slowest: float = 0.0

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[Load]:
        """Load for as long as the block runs."""
        ended = asyncio.Event()
        async with AsyncMTGRClient(self.url, timeout=10, retries=0) as client:
            callers = [asyncio.create_task(self._call(client, index, ended)) for index in range(CALLERS)]
            try:
                await asyncio.sleep(1.0)
                yield self
            finally:
                ended.set()
                await asyncio.gather(*callers)

    async def _call(self, client: AsyncMTGRClient, index: int, ended: asyncio.Event) -> None:
        generator = np.random.default_rng(index)
        while not ended.is_set():
            user = str(generator.choice(USERS))
            self.sent += 1
            start = time.monotonic()
            try:
                answer = await client.rank(user, CANDIDATES, strategy=self.strategy, request_time=REQUEST_TIME)
            except MTGRError as error:
                self.errors.append((time.monotonic(), error))
                await asyncio.sleep(0.01)
                continue
            self.slowest = max(self.slowest, time.monotonic() - start)
            self.answers.append((time.monotonic(), answer))
            if not same(answer, self.expected[user]):
                self.wrong.append(user)

    def check(self, success: float) -> None:
        """Every request has one right answer or one error, and few have errors."""
        assert self.sent == len(self.answers) + len(self.errors)
        assert not self.wrong
        assert len(self.answers) >= 50
        assert len(self.answers) / self.sent >= success, [str(error) for _, error in self.errors[:3]]

    def strategies(self, since: float) -> set[str]:
        return {answer.strategy for moment, answer in self.answers if moment >= since}


def same(found: Recommendation, wanted: Recommendation) -> bool:
    scores = dict(zip(wanted.items.tolist(), wanted.task_scores, strict=True))
    return sorted(found.items.tolist()) == sorted(scores) and all(
        np.abs(task_scores - scores[item]).max() <= TOLERANCE
        for item, task_scores in zip(found.items.tolist(), found.task_scores, strict=True)
    )


def stub(repository: Path, model: str) -> int:
    found = subprocess.run(
        ["pgrep", "-f", f"triton_python_backend_stub {repository}/{model}/"], capture_output=True, text=True, check=True
    )
    return int(found.stdout.split()[0])


@pytest.mark.parametrize("fault", [signal.SIGKILL, signal.SIGSTOP], ids=["killed", "hangs"])
def test_an_engine_that_is_lost_is_left_alone(
    server: TritonServer, repository: Path, expected: dict[str, Recommendation], fault: signal.Signals
) -> None:
    async def scenario() -> tuple[Load, float]:
        async with Load(server.grpc_url, expected).running() as load:
            # Learn what ONNX usually takes, so that hanging shows.
            async with AsyncMTGRClient(server.grpc_url) as client:
                for user in USERS:
                    await client.rank(user, CANDIDATES, strategy="onnx", request_time=REQUEST_TIME)
            os.kill(process, fault)
            await asyncio.sleep(4.0)
            settled = time.monotonic()
            await asyncio.sleep(3.0)
            return load, settled

    process = stub(repository, "mtgr_onnx_rank")
    # It is not woken up again: Triton 2.51 may die of a stub that it has given up.
    load, settled = asyncio.run(scenario())
    load.check(success=0.999)
    assert load.slowest <= 6.0
    late = [answer for moment, answer in load.answers if moment >= settled]
    assert {answer.strategy for answer in late} == {"baseline"}
    assert not [answer for answer in late if "fallback" in answer.labels]  # nobody waits for it any more
    with MTGRClient(server.grpc_url, retries=0) as client:
        start = time.monotonic()
        with pytest.raises(UnavailableError, match=r"mtgr_onnx_rank is (not called any more|left alone)"):
            client.rank("1", CANDIDATES, strategy="onnx", request_time=REQUEST_TIME)
        assert time.monotonic() - start <= 0.5


def test_a_corrupt_artifact_is_refused_at_reload_and_the_others_serve(
    repository: Path, expected: dict[str, Recommendation]
) -> None:
    (repository / "mtgr_onnx_rank" / "1" / "model.onnx").write_bytes(b"not a graph")
    manifest = repository / "mtgr_onnx_retrieve" / "1" / "manifest.json"
    manifest.write_text(manifest.read_text()[:50])
    with TritonServer(repository) as server:

        async def scenario() -> Load:
            async with Load(server.grpc_url, expected).running() as load:
                await asyncio.sleep(2.0)
                return load

        load = asyncio.run(scenario())
        load.check(success=1.0)
        assert load.strategies(0) == {"baseline"}
        with MTGRClient(server.grpc_url, retries=0) as client:
            for call in (
                lambda: client.rank("1", CANDIDATES, strategy="onnx", request_time=REQUEST_TIME),
                lambda: client.recommend("1", strategy="onnx", request_time=REQUEST_TIME),
            ):
                with pytest.raises(UnavailableError, match="mtgr_onnx"):
                    call()
            assert client.recommend("1", request_time=REQUEST_TIME).strategy == "baseline"


def test_a_full_queue_refuses_at_once(
    model_repository: Path, tmp_path: Path, expected: dict[str, Recommendation]
) -> None:
    policy = tmp_path / "policy.yaml"
    policy.write_text("admission: { max_concurrent: 2, max_queue: 4 }", encoding="utf-8")
    with TritonServer(model_repository, environment={"MTGR_POLICY": str(policy)}) as server:

        async def scenario() -> tuple[list[Recommendation], list[BaseException], list[float]]:
            refusals: list[float] = []

            async def ask(client: AsyncMTGRClient, user: str) -> Recommendation:
                start = time.monotonic()
                try:
                    return await client.rank(user, CANDIDATES, strategy="baseline", request_time=REQUEST_TIME)
                except UnavailableError:
                    refusals.append(time.monotonic() - start)
                    raise

            async with AsyncMTGRClient(server.grpc_url, retries=0, timeout=30) as client:
                await ask(client, "1")
                calls = (ask(client, USERS[index % len(USERS)]) for index in range(200))
                found = await asyncio.gather(*calls, return_exceptions=True)
            answers = [one for one in found if isinstance(one, Recommendation)]
            return answers, [one for one in found if isinstance(one, BaseException)], refusals

        answers, errors, refusals = asyncio.run(scenario())
        assert len(answers) >= 6
        assert len(errors) == len(refusals) >= 50  # every error is a refusal
        assert all("try again later" in str(error) for error in errors)
        with MTGRClient(server.grpc_url) as client:
            found = client.rank("1", CANDIDATES, request_time=REQUEST_TIME)
        assert same(found, expected["1"])


def test_callers_who_hang_up_harm_nobody(
    server: TritonServer, repository: Path, expected: dict[str, Recommendation]
) -> None:
    host, port = server.http_url.split(":")
    body = b"x" * 100_000
    head = (
        b"POST /v2/models/mtgr/infer HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
        b"Content-Length: 1000000\r\n\r\n"
    )

    async def scenario() -> Load:
        async with Load(server.grpc_url, expected).running() as load:
            async with AsyncMTGRClient(server.grpc_url, timeout=30) as client:
                for _ in range(20):
                    with socket.create_connection((host, int(port))) as half:  # a request that never ends
                        half.sendall(head + body)
                    gone = [asyncio.create_task(client.rank(user, CANDIDATES)) for user in USERS[:10]]
                    await asyncio.sleep(0.02)
                    for task in gone:
                        task.cancel()
                    await asyncio.gather(*gone, return_exceptions=True)
            await asyncio.sleep(1.0)
            return load

    asyncio.run(scenario()).check(success=0.999)
    with MTGRClient(server.grpc_url) as client:
        assert same(client.rank("1", CANDIDATES, request_time=REQUEST_TIME), expected["1"])


def test_a_stop_under_load_answers_what_was_accepted(repository: Path, expected: dict[str, Recommendation]) -> None:
    """From the moment of the stop on, an answer or a refusal that says so - and no error of another kind."""
    server = TritonServer(repository)
    server.start()

    async def scenario() -> tuple[Load, float]:
        async with Load(server.grpc_url, expected).running() as load:
            moment = time.monotonic()
            await asyncio.to_thread(server.stop)
            return load, moment

    load, moment = asyncio.run(scenario())
    assert load.sent == len(load.answers) + len(load.errors)
    assert not load.wrong
    assert not [error for when, error in load.errors if when < moment]
    kinds = {type(error) for _, error in load.errors}
    assert kinds <= {UnavailableError}, kinds
    # Until the last request in flight was answered, refusals come from the router, which still answers.
    draining = [str(error) for _, error in load.errors if "about to stop" in str(error)]
    assert draining, [str(error) for _, error in load.errors[:3]]
    failed = [str(error) for _, error in load.errors if "engine" in str(error) or "Server not ready" in str(error)]
    assert not failed, failed[:3]
