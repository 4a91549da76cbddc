"""A checkpoint of each public format, written as its trainer does, behind the door of a running server."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch

from export.__main__ import main
from mtgr.client import History, MTGRClient
from mtgr.errors import InvalidRequestError
from mtgr.serving.server import TritonServer
from tests.conftest import copy_door
from tests.unit.foreign import Case, Visitor, nvidia_case, random_visitor, research_case, stu_case, write_native

TOLERANCE = 1e-5

CASES: dict[str, Callable[[], Case]] = {
    "research": lambda: research_case(layers=1),
    "dlrmv3": lambda: stu_case(layers=1),
    "easy_rec": lambda: stu_case(layers=1, easy_rec=True),
    "nvidia": lambda: nvidia_case(layers=1, fused=False),
}


def export(name: str, folder: Path) -> Path:
    """A model repository, by the command that users run; one format also through PyTorch in the server."""
    torch.set_num_threads(1)
    case = CASES[name]()
    source = write_native(case, folder / "source")
    repository = copy_door(folder / "repository")
    arguments = ["--checkpoint", str(source), "--model-repository", str(repository)]
    arguments += ["--converted", str(folder / "converted"), "--engine", "onnx"]
    assert main([*arguments, *(["--engine", "baseline"] if case.format == "meta-dlrmv3" else [])]) == 0
    return repository


@pytest.fixture(scope="module")
def repositories(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One for each format; the exports run side by side."""
    folders = {name: tmp_path_factory.mktemp(name) for name in CASES}
    with ProcessPoolExecutor(2, multiprocessing.get_context("spawn")) as pool:
        exported = list(pool.map(export, folders.keys(), folders.values()))
    return dict(zip(folders, exported, strict=True))


@contextmanager
def serving(repository: Path) -> Iterator[MTGRClient]:
    """A server on a repository, and a client of it."""
    with TritonServer(repository, stop_timeout=5) as server, MTGRClient(server.grpc_url) as client:
        yield client


def history_of(visitor: Visitor) -> History:
    return History(
        np.array(visitor.items, dtype=np.int64),
        np.array(visitor.actions, dtype=np.int32),
        np.array(visitor.times, dtype=np.int64),
    )


@pytest.mark.parametrize("name", CASES)
def test_the_door_answers_as_the_oracle(name: str, repositories: dict[str, Path]) -> None:
    case = CASES[name]()
    generator = np.random.default_rng(11)
    with serving(repositories[name]) as client:
        for events, candidates in ((30, 20), (60, 5), (0, 4), (3, 1)):
            visitor = random_visitor(case, generator, events, candidates)
            expected = dict(zip(visitor.candidates, case.scores(visitor), strict=True))
            for strategy in ("onnx", "baseline") if case.format == "meta-dlrmv3" else ("onnx",):
                answer = client.rank(
                    "someone",
                    list(visitor.candidates),
                    history=history_of(visitor),
                    profile=visitor.profile,
                    request_time=visitor.request_time,
                    strategy=strategy,
                )
                assert answer.strategy == strategy
                assert sorted(answer.items.tolist()) == sorted(expected)
                for item, scores in zip(answer.items.tolist(), answer.task_scores, strict=True):
                    np.testing.assert_allclose(scores, expected[item], rtol=0, atol=TOLERANCE)
                assert (np.diff(answer.scores) <= 0).all()

        visitor = random_visitor(case, generator, 12, 1)
        asked = {"history": history_of(visitor), "profile": visitor.profile, "request_time": visitor.request_time}
        if case.similarities is None:
            refused = "ranks items and cannot retrieve any, so send candidates"
            for strategy in ("onnx", "auto"):
                with pytest.raises(InvalidRequestError, match=refused):
                    client.recommend("someone", strategy=strategy, **asked)
            return
        answer = client.recommend("someone", strategy="onnx", top_k=5, **asked)
        assert len(answer) == 5
        assert not set(answer.items.tolist()) & set(visitor.items)
        # Of the items that it may recommend, these are the best by the oracle: retrieved by their similarity on the
        # context alone, then ranked by that at the moment of the request.
        first, count = case.items
        retrieved = np.argsort(-case.similarities(visitor), kind="stable")[: case.options["retrieve_count"]] + first
        fresh = [item for item in retrieved.tolist() if item not in visitor.items]
        everything = Visitor(
            visitor.items, visitor.actions, visitor.times, tuple(range(first, first + count)), visitor.request_time,
            visitor.profile,
        )  # fmt: skip
        scores = case.scores(everything)[:, 0]
        best = sorted(fresh, key=lambda item: (-scores[item - first], item))[:5]
        assert answer.items.tolist() == best
        np.testing.assert_allclose(answer.task_scores[:, 0], scores[np.array(best) - first], rtol=0, atol=TOLERANCE)
