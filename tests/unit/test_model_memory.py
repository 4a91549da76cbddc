"""Memory by model, of processes like those of a server."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from perf.model_memory import SERVER, model_memory

BLOCK = 48 << 20
# A model that holds a block, and starts a process that holds two.
MODEL = """
import os, subprocess, sys
size = {size}
block = bytearray(os.urandom(1 << 20)) * (size >> 20)
if size < {last}:
    code = "import os, sys; block = bytearray(os.urandom(1 << 20)) * {double}; print(flush=True); sys.stdin.read()"
    subprocess.Popen([{python!r}, "-c", code], stdin=sys.stdin, stdout=sys.stdout)
else:
    print(flush=True)
sys.stdin.read()
"""


# A server that starts a stub for each model, and says their process numbers when each holds what it should.
SERVING = """
import json, subprocess, sys
models = [
    subprocess.Popen(
        ["/opt/triton/triton_python_backend_stub", path, "shm"],
        executable=sys.executable, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
    )
    for path in sys.argv[1:]
]
for model in models:
    model.stdout.readline()
print(json.dumps([model.pid for model in models]), flush=True)
sys.stdin.read()
for model in models:
    model.communicate()
"""


@dataclass(frozen=True)
class Server:
    """Process numbers of a server and of its models' stubs."""

    pid: int
    stubs: dict[str, int]


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    """Processes named as Triton's are, one stub with a child and one without, apart from what other tests started."""
    paths = {}
    for name, size in (("mtgr_vllm", BLOCK), ("mtgr_onnx_rank", 2 * BLOCK)):
        paths[name] = path = tmp_path / name / "1" / "model.py"
        path.parent.mkdir(parents=True)
        path.write_text(MODEL.format(size=size, last=2 * BLOCK, double=2 * BLOCK >> 20, python=sys.executable))
    process = subprocess.Popen(
        [sys.executable, "-c", SERVING, *map(str, paths.values())], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert process.stdout is not None
    yield Server(process.pid, dict(zip(paths, json.loads(process.stdout.readline()), strict=True)))
    process.communicate()


def test_what_a_stub_starts_is_its_models(server: Server) -> None:
    found = model_memory(server.pid)
    assert set(found) == {SERVER, *server.stubs}
    assert 3 * BLOCK < found["mtgr_vllm"].host_bytes < 4 * BLOCK
    assert 2 * BLOCK < found["mtgr_onnx_rank"].host_bytes < 3 * BLOCK


def test_gpu_memory_is_the_drivers(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert model_memory(server.pid)["mtgr_vllm"].gpu_bytes is None  # no driver
    driver = tmp_path / "nvidia-smi"

    def answer(*lines: str) -> None:
        driver.write_text("#!/bin/sh\n" + "".join(f"echo '{line}'\n" for line in lines))
        driver.chmod(0o755)

    pid = server.stubs["mtgr_vllm"]
    answer(f"{pid}, 300", f"{pid}, 200", "1, 5000", f"{server.pid}, [N/A]")  # on two GPUs; another's; not known
    found = model_memory(server.pid)
    assert {name: one.gpu_bytes for name, one in found.items()} == {
        SERVER: 0,
        "mtgr_onnx_rank": 0,
        "mtgr_vllm": 500 << 20,
    }
    answer("1, 5000")  # as in a container, whose processes have other numbers outside
    assert {one.gpu_bytes for one in model_memory(server.pid).values()} == {None}
