"""The vllm strategy behind the door: equal to baseline on real users, cached, cancelled, and back after a crash."""

from __future__ import annotations

import asyncio
import re
import shutil
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from os import kill
from pathlib import Path

import numpy as np
import pytest
import tritonclient.grpc as grpc
from numpy.random import Generator

pytest.importorskip("vllm", reason="vLLM is not installed; `make vllm` installs it where it can")

from mtgr.bundle import load_bundle
from mtgr.client import AsyncMTGRClient, History, MTGRClient, Recommendation
from mtgr.errors import UnavailableError
from mtgr.features.context import context_rows
from mtgr.serving.server import TritonServer
from tests.conftest import ROOT
from tests.server.test_door import REQUEST_TIME, TOLERANCE, assert_same, mixed_requests, users_of


@pytest.fixture(scope="module")
def repository(model_repository: Path, checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every engine; vLLM's steps take one long request at a time, so that a crowd has to wait."""
    directory = tmp_path_factory.mktemp("vllm") / "repository"
    shutil.copytree(model_repository, directory)
    command = [sys.executable, "-m", "export", "--checkpoint", str(checkpoint), "--model-repository", str(directory)]
    command += ["--engine", "vllm", "--vllm", "max_num_batched_tokens=3026"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    assert re.search(r"vllm +mtgr_vllm +fp32 .* installed", done.stdout), done.stdout
    return directory


@pytest.fixture(scope="module")
def server(repository: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[TritonServer]:
    """Whoever overtakes does so in front of vLLM: this door admits a crowd before it knows how long that takes."""
    policy = tmp_path_factory.mktemp("policy") / "policy.yaml"
    policy.write_text("admission: { initial_limit: 64 }", encoding="utf-8")
    environment = {"MTGR_POLICY": str(policy)}
    with TritonServer(repository, environment=environment, stop_timeout=10) as running:
        yield running


@pytest.fixture
def client(server: TritonServer) -> Iterator[MTGRClient]:
    with MTGRClient(server.grpc_url) as client:
        yield client


@pytest.fixture
def rng() -> Generator:
    return np.random.default_rng(20261123)


def metric(server: TritonServer, name: str, wait: float = 1.2) -> float:
    """Value of a series, once the reporter has been by."""
    time.sleep(wait)
    with urllib.request.urlopen(server.metrics_url) as response:
        text = response.read().decode()
    found = re.search(rf"^{name}(?:{{[^}}]*}})? ([-+.e\d]+)$", text, flags=re.MULTILINE)
    assert found, f"{name} is not on the metrics page"
    return float(found[1])


def long_history(generator: Generator, items: np.ndarray, events: int = 1900) -> History:
    return History(
        generator.choice(items, events),
        generator.integers(0, 5, events).astype(np.int32),
        np.sort(generator.integers(880_000_000, REQUEST_TIME, events)),
    )


def test_a_hundred_real_users_get_what_baseline_gives(
    client: MTGRClient, server: TritonServer, repository: Path, rng: Generator
) -> None:
    bundle = load_bundle(repository)
    before = metric(server, "mtgr_vllm_prefix_hit_tokens_total")
    spreads = []
    for user in rng.choice(users_of(repository), 100, replace=False).tolist():
        candidates = rng.choice(bundle.catalog.raw_ids, 64, replace=False)
        wanted = client.rank(user, candidates, strategy="baseline", request_time=REQUEST_TIME)
        for _ in range(2):  # the second finds its context in the cache
            found = client.rank(user, candidates, strategy="vllm", request_time=REQUEST_TIME)
            assert found.strategy == "vllm"
            assert_same(wanted, found)
        spreads.append(wanted.task_scores[:, 0].std())
    assert np.mean(spreads) >= 0.05
    assert metric(server, "mtgr_vllm_prefix_hit_tokens_total") - before > 100 * 16


def test_recommendations_agree(client: MTGRClient, repository: Path, rng: Generator) -> None:
    for user in [*rng.choice(users_of(repository), 20, replace=False).tolist(), "nobody-knows-me"]:
        answers = [
            client.recommend(user, strategy=strategy, top_k=10, request_time=REQUEST_TIME)
            for strategy in ("baseline", "vllm")
        ]
        assert_same(*answers, tolerance=2e-5)
        assert len(answers[1]) == 10


def test_the_whole_catalogue_is_ranked(client: MTGRClient, repository: Path) -> None:
    """More candidates than one call of vLLM takes."""
    everything = load_bundle(repository).catalog.raw_ids
    assert len(everything) > 1024
    wanted, found = (
        client.rank("22", everything, strategy=strategy, request_time=REQUEST_TIME) for strategy in ("baseline", "vllm")
    )
    assert_same(wanted, found)


def test_concurrent_requests_equal_single_ones(server: TritonServer, client: MTGRClient, repository: Path) -> None:
    # The same requests twice: singles by the reference, the crowd by vLLM.
    singles = [client.infer(request) for request in mixed_requests(repository, np.random.default_rng(7), "baseline")]
    requests = mixed_requests(repository, np.random.default_rng(7), "vllm")

    async def together() -> list[Recommendation]:
        async with AsyncMTGRClient(server.grpc_url, timeout=60) as concurrent:
            return await asyncio.gather(*(concurrent.infer(request) for request in requests))

    for found, wanted in zip(asyncio.run(together()), singles, strict=True):
        assert found.strategy == "vllm"
        assert found.labels == wanted.labels
        assert_same(wanted, found, tolerance=2e-5)


def test_a_cached_user_overtakes_a_crowd(server: TritonServer, repository: Path, rng: Generator) -> None:
    items = load_bundle(repository).catalog.raw_ids
    candidates = items[:64]
    order: list[str] = []

    async def ask(client: AsyncMTGRClient, user: str, history: History | None) -> None:
        await client.rank(user, candidates, history=history, strategy="vllm", request_time=REQUEST_TIME)
        order.append(user)

    async def together() -> None:
        async with AsyncMTGRClient(server.grpc_url, timeout=60) as client:
            await ask(client, "196", None)
            crowd = [asyncio.create_task(ask(client, f"new-{i}", long_history(rng, items))) for i in range(24)]
            await asyncio.sleep(0.03)
            await asyncio.gather(ask(client, "196", None), *crowd)

    asyncio.run(together())
    assert len(order) == 26
    assert order[1:].index("196") <= 16, order


def rows_for(repository: Path, rng: Generator, events: int) -> tuple[np.ndarray, np.ndarray]:
    """Context INT32 [1, n, W], and candidates INT32 [1, 1024, W] that nothing but their ids makes valid."""
    schema = load_bundle(repository).schema
    items = rng.integers(2, schema.num_items, events)
    times = np.sort(rng.integers(schema.epoch, schema.epoch + 10**7, events))
    context = context_rows(schema, {}, items, np.zeros(events, dtype=np.int32), times)
    candidates = np.zeros((1024, schema.width), dtype=np.int32)
    candidates[:, 0] = 4
    candidates[:, 1] = len(context) + np.arange(1024)
    return context[None], candidates[None]


def tensors(**arrays: np.ndarray) -> list[grpc.InferInput]:
    inputs = []
    for name, array in arrays.items():
        tensor = grpc.InferInput(name, list(array.shape), "INT32")
        tensor.set_data_from_numpy(array)
        inputs.append(tensor)
    return inputs


def test_a_caller_who_gives_up_frees_the_engine(server: TritonServer, repository: Path, rng: Generator) -> None:
    aborted = metric(server, "mtgr_vllm_aborted_total")
    calls = []
    with grpc.InferenceServerClient(server.grpc_url) as direct:
        for _ in range(12):
            context, candidates = rows_for(repository, rng, 1900)
            done = lambda result, error: None  # noqa: E731
            calls.append(
                direct.async_infer("mtgr_vllm", tensors(context=context, candidates=candidates), callback=done)
            )
        time.sleep(0.1)
        for call in calls:
            call.cancel()
        time.sleep(1.5)
    assert metric(server, "mtgr_vllm_aborted_total") - aborted >= 4
    assert metric(server, "mtgr_vllm_running_requests") == metric(server, "mtgr_vllm_waiting_requests", 0) == 0


def test_bad_rows_are_refused_and_their_neighbours_answered(
    server: TritonServer, repository: Path, rng: Generator
) -> None:
    context, candidates = rows_for(repository, rng, 40)
    strange = context.copy()
    strange[0, 5, 2] = 1 << 20
    narrow = context[..., :4].copy()
    wrong = (
        ({"context": strange, "candidates": candidates}, "id out of range in column 2"),
        ({"context": narrow, "candidates": candidates}, "must be"),
        ({"context": context[:, :0], "candidates": candidates}, "slots 0, 1, 2"),
        ({"context": context, "candidates": context}, "candidate rows"),
    )
    with grpc.InferenceServerClient(server.grpc_url) as direct:
        wanted = direct.infer("mtgr_vllm", tensors(context=context, candidates=candidates)).as_numpy("task_scores")
        pending = []
        for arrays, words in wrong:
            pending.append((direct.async_infer("mtgr_vllm", tensors(**arrays), callback=keep(box := [])), box, words))
            good = tensors(context=context, candidates=candidates)
            pending.append((direct.async_infer("mtgr_vllm", good, callback=keep(box := [])), box, None))
        for _, box, words in pending:
            deadline = time.monotonic() + 20
            while not box and time.monotonic() < deadline:
                time.sleep(0.01)
            result, error = box[0]
            if words is None:
                np.testing.assert_allclose(result.as_numpy("task_scores"), wanted, rtol=0, atol=TOLERANCE)
            else:
                assert words in str(error)
                assert "INVALID_ARGUMENT" in str(error.status())


def keep(box: list[object]):  # type: ignore[no-untyped-def]
    return lambda result, error: box.append((result, error))


def test_a_batch_of_users_at_once(server: TritonServer, repository: Path, rng: Generator) -> None:
    """Padded contexts of several users in one request, as the dense engines take them."""
    first, candidates = rows_for(repository, rng, 40)
    second, _ = rows_for(repository, rng, 25)
    padded = np.zeros_like(first)
    padded[:, : second.shape[1]] = second
    other = candidates.copy()
    other[..., 1] += second.shape[1] - first.shape[1]
    with grpc.InferenceServerClient(server.grpc_url) as direct:

        def scores(context: np.ndarray, rows: np.ndarray) -> np.ndarray:
            return direct.infer("mtgr_vllm", tensors(context=context, candidates=rows)).as_numpy("task_scores")

        both = scores(np.concatenate([first, padded]), np.concatenate([candidates, other]))
        np.testing.assert_allclose(both[0], scores(first, candidates)[0], rtol=0, atol=TOLERANCE)
        np.testing.assert_allclose(both[1], scores(second, other)[0], rtol=0, atol=TOLERANCE)
        items = direct.infer("mtgr_vllm", tensors(context=np.concatenate([first, padded]))).as_numpy("items")
        assert items[1].tolist() == direct.infer("mtgr_vllm", tensors(context=second)).as_numpy("items")[0].tolist()


def engine_process(repository: Path) -> int:
    """The engine's one process, a child of the model's stub."""

    def pgrep(*options: str) -> list[str]:
        return subprocess.run(["pgrep", *options], capture_output=True, text=True, check=False).stdout.split()

    stub, *_ = pgrep("-f", f"triton_python_backend_stub {repository}/mtgr_vllm/")
    (core,) = (pid for pid in pgrep("-P", stub) if b"spawn_main" in Path(f"/proc/{pid}/cmdline").read_bytes())
    assert pgrep("-P", core) == []
    return int(core)


def test_an_engine_that_dies_is_named_and_comes_back(
    server: TritonServer, client: MTGRClient, repository: Path
) -> None:
    restarts = metric(server, "mtgr_vllm_restarts_total")
    kill(engine_process(repository), signal.SIGKILL)
    reasons: list[str] = []
    deadline = time.monotonic() + 90
    while True:
        # `auto` never shows it.
        answer = client.recommend("196", request_time=REQUEST_TIME)
        assert len(answer) == 10
        try:
            with MTGRClient(server.grpc_url, retries=0) as hasty:
                found = hasty.recommend("196", strategy="vllm", request_time=REQUEST_TIME)
            if reasons:
                break
        except UnavailableError as error:
            reasons.append(str(error))
            if len(reasons) == 3:
                assert metric(server, "mtgr_vllm_up") == 0
        assert time.monotonic() < deadline, "it did not come back"
        time.sleep(0.2)
    assert all("vLLM's engine has ended" in reason or "mtgr_vllm is left alone" in reason for reason in reasons)
    assert any("vLLM's engine has ended" in reason for reason in reasons)
    assert_same(client.recommend("196", strategy="baseline", request_time=REQUEST_TIME), found, tolerance=2e-5)
    assert metric(server, "mtgr_vllm_restarts_total") == restarts + 1
    assert metric(server, "mtgr_vllm_up") == 1


def test_nothing_is_left_when_the_stub_is_killed(server: TritonServer, client: MTGRClient, repository: Path) -> None:
    """Last: this server has no vllm afterwards."""
    process = engine_process(repository)
    subprocess.run(["pkill", "-9", "-f", f"triton_python_backend_stub {repository}/mtgr_vllm/"], check=True)
    deadline = time.monotonic() + 10
    while Path(f"/proc/{process}").exists():
        assert time.monotonic() < deadline, "vLLM's process outlived the model that started it"
        time.sleep(0.1)
    answer = client.recommend("196", request_time=REQUEST_TIME)
    assert answer.strategy in ("onnx", "baseline")
