"""The launcher against a real tritonserver."""

from __future__ import annotations

import dataclasses
import json
import os
import queue
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import tritonclient.grpc as grpcclient
from tritonclient.utils import InferenceServerException

from mtgr.errors import ConfigurationError, UnavailableError
from mtgr.serving import TritonServer, find_installation
from mtgr.serving.assemble import assemble_backends
from mtgr.serving.command import server_environment
from mtgr.serving.find import find_native
from mtgr.serving.launcher import install_launcher
from mtgr.serving.report import format_reports, strategy_reports
from tests.server.launcher_repository import GATHER_TABLE, add_config, add_doors, add_ensemble, add_identity, add_onnx

CHECKPOINT = "0123456789abcdef" * 4
# Long enough that requests sent together are merged on a busy machine.
MERGE_US = 400_000


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        patch.setenv("OMP_NUM_THREADS", "1")
        patch.delenv("MTGR_TRITONSERVER", raising=False)
        yield


@pytest.fixture
def doors(tmp_path: Path) -> Iterator[Path]:
    repository = tmp_path / "models"
    yield add_doors(repository)
    for pid in processes_of(repository):  # of a test that failed
        os.kill(pid, signal.SIGKILL)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TritonServer]:
    repository = add_doors(tmp_path_factory.mktemp("repository"))
    add_onnx(repository, "mtgr_onnx_rank", "double", delay_us=MERGE_US)
    add_onnx(repository, "mtgr_onnx_retrieve", "gather", delay_us=MERGE_US)
    for name in ("mtgr_onnx_rank", "mtgr_onnx_retrieve"):
        manifest = {"checkpoint": CHECKPOINT, "schema": "s", "precision": "fp32", "parity": {"max_abs_error": 2.5e-7}}
        (repository / name / "1" / "manifest.json").write_text(json.dumps(manifest))
    add_identity(repository, "mtgr_baseline", 'raise ValueError("the checkpoint is not there")')
    add_onnx(repository, "wrong_type", "double", input_type="TYPE_FP16")
    add_onnx(repository, "wrong_rank", "double", output_dims="[ -1, 3 ]")
    add_onnx(repository, "wrong_width", "double", output_dims="[ 3 ]")
    add_onnx(
        repository,
        "wrong_threads",
        "double",
        more='parameters { key: "intra_op_thread_count" value: { string_value: "many" } }',
    )
    add_config(repository, "no_file", "onnxruntime")
    with TritonServer(repository) as running:
        yield running


@pytest.fixture(scope="module")
def client(server: TritonServer) -> Iterator[grpcclient.InferenceServerClient]:
    with grpcclient.InferenceServerClient(server.grpc_url) as connected:
        yield connected


def infer_together(
    client: grpcclient.InferenceServerClient, model: str, arrays: list[np.ndarray]
) -> list[np.ndarray | InferenceServerException]:
    """Send one request per array at the same time; give the outputs, or the errors, in order."""
    done: queue.Queue[tuple[int, object, object]] = queue.Queue()

    def callback(index: int) -> Callable[[object, object], None]:
        return lambda result, error: done.put((index, result, error))

    for index, array in enumerate(arrays):
        tensor = grpcclient.InferInput("x", list(array.shape), "FP32" if array.dtype == np.float32 else "INT32")
        tensor.set_data_from_numpy(array)
        client.async_infer(model, [tensor], callback(index), client_timeout=20)
    answers: dict[int, object] = {}
    for _ in arrays:
        index, result, error = done.get(timeout=20)
        answers[index] = error if error is not None else result.as_numpy("y")
    return [answers[index] for index in range(len(arrays))]


def counts(client: grpcclient.InferenceServerClient, model: str) -> tuple[int, int]:
    statistics = client.get_inference_statistics(model, as_json=True)["model_stats"][0]
    return int(statistics.get("inference_count", 0)), int(statistics.get("execution_count", 0))


def processes_of(repository: Path) -> dict[int, str]:
    """Command lines of servers and stubs that work on ``repository``, by process id."""
    found = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            command = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode()
        except (FileNotFoundError, ProcessLookupError):
            continue
        if str(repository) in command and ("tritonserver" in command or "triton_python_backend_stub" in command):
            found[int(folder.name)] = command
    return found


def segments_of(commands: dict[int, str]) -> list[Path]:
    """Shared-memory segments of the server among ``commands``."""
    prefixes = {
        word.rpartition("=")[2]
        for command in commands.values()
        for word in command.split()
        if "shm-region-prefix" in word
    }
    assert len(prefixes) == 1
    return list(Path("/dev/shm").glob(f"{prefixes.pop()}*"))


def wait_until(condition: Callable[[], bool], seconds: float, what: str) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"not within {seconds} s: {what}"
        time.sleep(0.05)


# --- the stand-in for the ONNX Runtime backend -------------------------------------------------------------------


def test_onnx_model_answers(client: grpcclient.InferenceServerClient) -> None:
    array = np.array([[1.5, -2.0, 3.0]], np.float32)
    np.testing.assert_array_equal(infer_together(client, "mtgr_onnx_rank", [array])[0], array * 2)


def test_requests_of_one_shape_run_as_one_batch(client: grpcclient.InferenceServerClient) -> None:
    arrays = [np.full((1, 4), value, np.float32) for value in (1, 2, 3)]
    inferences, executions = counts(client, "mtgr_onnx_rank")
    answers = infer_together(client, "mtgr_onnx_rank", arrays)
    for array, answer in zip(arrays, answers, strict=True):
        np.testing.assert_array_equal(answer, array * 2)
    inferences_after, executions_after = counts(client, "mtgr_onnx_rank")
    assert inferences_after - inferences == 3
    assert executions_after - executions < 3


def test_bad_request_does_not_fail_its_neighbour(client: grpcclient.InferenceServerClient) -> None:
    good, bad = np.array([[3, 0]], np.int32), np.array([[1, len(GATHER_TABLE)]], np.int32)
    _, executions = counts(client, "mtgr_onnx_retrieve")
    answer, error = infer_together(client, "mtgr_onnx_retrieve", [good, bad])
    assert counts(client, "mtgr_onnx_retrieve")[1] - executions == 1  # they did share a batch
    np.testing.assert_array_equal(answer, [[GATHER_TABLE[3], GATHER_TABLE[0]]])
    assert isinstance(error, InferenceServerException)
    assert error.status() == "StatusCode.INVALID_ARGUMENT"
    assert "out of data bounds" in error.message()


def test_requests_of_different_shapes_are_all_answered(client: grpcclient.InferenceServerClient) -> None:
    arrays = [np.arange(width, dtype=np.int32)[None] for width in (1, 3, 2, 3)]
    for array, answer in zip(arrays, infer_together(client, "mtgr_onnx_retrieve", arrays), strict=True):
        np.testing.assert_array_equal(answer, np.array(GATHER_TABLE)[array])


@pytest.mark.parametrize(
    ("model", "sentence"),
    [
        ("wrong_type", "input 'x' is TYPE_FP16 in config.pbtxt but tensor(float) in the ONNX graph"),
        ("wrong_rank", "output 'y' has shape [-1, -1, 3] by config.pbtxt (with a batch axis) but [-1, -1]"),
        ("wrong_width", "output 'y' has shape [-1, 3] by config.pbtxt (with a batch axis) but [-1, -1]"),
        ("wrong_threads", "parameter intra_op_thread_count is 'many'"),
        ("no_file", "model.onnx does not exist; export the model again"),
    ],
)
def test_config_that_does_not_fit_is_refused(server: TritonServer, model: str, sentence: str) -> None:
    (status,) = [status for status in server.models() if status.name == model]
    assert not status.ready
    assert sentence in status.reason


# --- a running server --------------------------------------------------------------------------------------------


def test_failed_engine_leaves_the_door_up(server: TritonServer, client: grpcclient.InferenceServerClient) -> None:
    assert client.is_server_ready()
    array = np.array([4.0], np.float32)
    np.testing.assert_array_equal(infer_together(client, "mtgr", [array])[0], array)
    reports = {report.name: report for report in strategy_reports(server.model_repository, server.models())}
    assert reports["onnx"].ready
    assert reports["onnx"].models == "mtgr_onnx_rank 1, mtgr_onnx_retrieve 1"
    assert reports["onnx"].precision == "fp32"
    assert reports["onnx"].checkpoint == CHECKPOINT[:12]
    assert reports["onnx"].max_error == "2.5e-07"
    assert not reports["baseline"].ready
    assert reports["baseline"].status == "failed: mtgr_baseline: ValueError: the checkpoint is not there"
    assert reports["vllm"].status == "not exported: run `make vllm export`"
    table = format_reports(list(reports.values())).splitlines()
    assert {line.index(cell) for line, cell in zip(table, ("status", "failed:", "ready"), strict=False)} == {
        table[0].index("status")
    }
    assert table[-1] == "auto: onnx serves first"


def test_listens_on_loopback_only(server: TritonServer) -> None:
    inodes = {os.readlink(link) for link in Path(f"/proc/{server.pid}/fd").iterdir() if link.is_symlink()}
    listening = set()
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        for line in Path(table).read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == "0A" and f"socket:[{fields[9]}]" in inodes:
                listening.add(fields[1].split(":")[0])
    assert listening == {"0100007F", "0000000000000000FFFF00000100007F"}  # 127.0.0.1, also as gRPC writes it in IPv6


def test_port_in_use_is_named(server: TritonServer, doors: Path) -> None:
    port = int(server.http_url.rpartition(":")[2])
    with pytest.raises(ConfigurationError, match=f"port {port} of 127.0.0.1 is in use.*another grpc port"):
        TritonServer(doors, grpc_port=port).start()


def test_stop_leaves_nothing(doors: Path) -> None:
    with TritonServer(doors) as server:
        commands = processes_of(doors)
        assert len(commands) == 4  # the server and one stub per door
        assert len(segments_of(commands)) == 3
        log = server.log_path
    assert processes_of(doors) == {}
    assert segments_of(commands) == []
    assert log is not None
    assert not log.exists()


def test_killed_server_is_reported_and_cleaned_up(doors: Path, tmp_path: Path) -> None:
    server = TritonServer(doors, log=tmp_path / "logs" / "server.log")
    server.start()
    commands = processes_of(doors)
    os.kill(server.pid, signal.SIGKILL)
    with pytest.raises(UnavailableError, match="exit code -9"):
        server.wait()
    assert segments_of(commands) != []
    server.stop()
    assert processes_of(doors) == {}
    assert segments_of(commands) == []
    assert "Started HTTPService" in (tmp_path / "logs" / "server.log").read_text()


# --- starts that fail --------------------------------------------------------------------------------------------


def test_missing_repository(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"model repository .*nowhere does not exist"):
        TritonServer(tmp_path / "nowhere").start()


def test_repository_without_a_door(doors: Path) -> None:
    (doors / "mtgr_router").rename(doors.parent / "elsewhere")
    with pytest.raises(ConfigurationError, match="has no model 'mtgr_router'"):
        TritonServer(doors).start()


def test_door_that_does_not_load(tmp_path: Path) -> None:
    repository = tmp_path / "models"
    add_ensemble(repository)
    add_identity(repository, "mtgr_features", 'raise ValueError("no feature bundle")')
    add_identity(repository, "mtgr_router")
    with pytest.raises(UnavailableError) as caught:
        TritonServer(repository).start()
    first, *rest = str(caught.value).splitlines()
    assert first == "model 'mtgr_features' did not load: ValueError: no feature bundle."
    assert any("mtgr_features/1/model.py(" in line for line in rest)
    assert processes_of(repository) == {}


def test_door_with_a_config_that_cannot_be_read(doors: Path) -> None:
    (doors / "mtgr" / "config.pbtxt").write_text("input [ nonsense")
    with pytest.raises(UnavailableError, match="model 'mtgr' did not load: failed to read text proto"):
        TritonServer(doors).start()


def test_server_that_dies_at_start(doors: Path) -> None:
    with pytest.raises(UnavailableError) as caught:
        TritonServer(doors, extra_args=["--no-such-flag"]).start()
    first, *rest = str(caught.value).splitlines()
    assert first == "tritonserver ended with exit code 1 while it started."
    assert len(rest) == 1  # not its page of usage
    assert "unrecognized option '--no-such-flag'" in rest[0]


def test_start_that_takes_too_long(doors: Path, capsys: pytest.CaptureFixture[str]) -> None:
    add_identity(doors, "slow", "import time; time.sleep(60)")
    with pytest.raises(UnavailableError, match=r"did not finish loading within 3 s \(3 of 4 models\)"):
        TritonServer(doors, startup_timeout=3, stop_timeout=0.5).start()
    assert "tritonserver: 3 of 4 models loaded after 2 s" in capsys.readouterr().err
    assert processes_of(doors) == {}


def test_argument_that_the_launcher_sets(doors: Path) -> None:
    with pytest.raises(ConfigurationError, match="--http-port cannot be passed on"):
        TritonServer(doors, extra_args=["--http-port=8000"]).start()


# --- the command line --------------------------------------------------------------------------------------------


def start_cli(repository: Path) -> subprocess.Popen[str]:
    ports = ["--http-port=0", "--grpc-port=0", "--metrics-port=0"]
    command = [sys.executable, "-m", "mtgr.serving", "--model-repository", str(repository), *ports, "--", "--id=cli"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("auto:"):
            assert line.strip() == "auto: no engine is ready; run `make export`"
            return process
    raise AssertionError(f"no table was printed: {process.communicate()[1]}")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_ended_command_leaves_nothing(doors: Path, number: signal.Signals) -> None:
    process = start_cli(doors)
    commands = processes_of(doors)
    assert any(" --id=cli" in command for command in commands.values())
    process.send_signal(number)
    stdout, stderr = process.communicate(timeout=20)
    if number != signal.SIGKILL:
        assert process.returncode == 0, stdout + stderr
        assert processes_of(doors) == {}
        assert segments_of(commands) == []
    # After SIGKILL the kernel tells the server, which takes a moment to unload.
    wait_until(lambda: not processes_of(doors) and not segments_of(commands), 20, "server and segments gone")


def test_command_fails_when_the_server_dies(doors: Path) -> None:
    process = start_cli(doors)
    commands = processes_of(doors)
    (server,) = [pid for pid, command in commands.items() if " --id=cli" in command and "mtgr.serving" not in command]
    os.kill(server, signal.SIGKILL)
    _, stderr = process.communicate(timeout=20)
    assert process.returncode == 1
    assert "mtgr.serving: tritonserver ended with exit code -9." in stderr
    assert segments_of(commands) == []


def test_installed_launcher_starts_a_plain_tritonserver(doors: Path, tmp_path: Path) -> None:
    script = tmp_path / "bin" / "tritonserver"
    script.parent.mkdir()
    assert "wrote" in install_launcher(script)
    assert "wrote" in install_launcher(script)  # replaces its own
    add_onnx(doors, "mtgr_onnx_rank", "double")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port = taken.getsockname()[1]
    environment = os.environ | {"PATH": f"{script.parent}:{os.environ['PATH']}"}
    arguments = [f"--http-port={port}", "--allow-grpc=false", "--allow-metrics=false", "--http-address=127.0.0.1"]
    process = subprocess.Popen(
        ["tritonserver", "--model-repository", str(doors), *arguments],
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:

        def is_ready() -> bool:
            assert process.poll() is None
            try:
                with socket.create_connection(("127.0.0.1", port), 1) as connection:
                    connection.sendall(b"GET /v2/models/mtgr_onnx_rank/ready HTTP/1.0\r\n\r\n")
                    return b" 200 " in connection.recv(64)
            except OSError:
                return False

        wait_until(is_ready, 30, "the plain server is ready")
    finally:
        process.terminate()
        assert process.wait(20) == 0  # it is tritonserver itself that got the signal and ended well
    assert processes_of(doors) == {}


def test_launcher_imports_nothing_from_the_current_directory(tmp_path: Path) -> None:
    (tmp_path / "mtgr.py").write_text("raise SystemExit(9)\n")
    install_launcher(tmp_path / "tritonserver")
    done = subprocess.run(
        [tmp_path / "tritonserver", "--help"], cwd=tmp_path, capture_output=True, text=True, timeout=20
    )
    assert "Usage: tritonserver" in done.stdout + done.stderr


def test_launcher_does_not_replace_another_program(tmp_path: Path) -> None:
    script = tmp_path / "tritonserver"
    script.write_text("#!/bin/sh\nexit 3\n")
    with pytest.raises(ConfigurationError, match="is not this package's launcher"):
        install_launcher(script)
    assert script.read_text().endswith("exit 3\n")


def test_launcher_is_not_written_beside_a_native_server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    native = native_server(tmp_path)
    monkeypatch.setenv("PATH", str(native.parent), prepend=os.pathsep)
    target = tmp_path / "launcher"
    assert f"{native} is a native tritonserver" in install_launcher(target)
    assert not target.exists()


# --- finding and assembling --------------------------------------------------------------------------------------


def native_server(folder: Path) -> Path:
    """A directory that looks like NVIDIA's image: an executable and the backends that there are stand-ins for."""
    binary = folder / "native" / "bin" / "tritonserver"
    binary.parent.mkdir(parents=True)
    binary.write_text("#!/bin/sh\n")
    binary.chmod(0o755)
    for name in ("onnxruntime", "tensorrt"):
        (folder / "native" / "backends" / name).mkdir(parents=True)
    return binary


def test_native_server_uses_its_own_backends(tmp_path: Path) -> None:
    native = native_server(tmp_path)
    found = find_native({"PATH": f"/nonexistent:{native.parent}"})
    assert found is not None
    assert found.binary == native
    assert assemble_backends(found, cache=tmp_path / "cache") == tmp_path / "native" / "backends"
    assert not (tmp_path / "cache").exists()


def test_native_server_gets_only_the_stand_ins_it_lacks(tmp_path: Path) -> None:
    found = find_installation(native_server(tmp_path), {})
    for name in ("onnxruntime", "other"):
        (tmp_path / "stand_ins" / name).mkdir(parents=True)
        (tmp_path / "stand_ins" / name / "model.py").write_text("# stand-in\n")
    backends = assemble_backends(found, tmp_path / "stand_ins", tmp_path / "cache")
    assert sorted(path.name for path in backends.iterdir()) == ["onnxruntime", "other", "tensorrt"]
    assert (backends / "onnxruntime").resolve() == tmp_path / "native" / "backends" / "onnxruntime"
    assert (backends / "other" / "model.py").read_text() == "# stand-in\n"


def test_own_launcher_is_never_taken_for_a_server(tmp_path: Path) -> None:
    install_launcher(tmp_path / "tritonserver")
    assert find_native({"PATH": str(tmp_path)}) is None
    assert find_installation(tmp_path / "tritonserver").bundled


def test_path_that_is_no_server() -> None:
    with pytest.raises(ConfigurationError, match=r"/nonexistent is not an executable file"):
        find_installation(environ={"MTGR_TRITONSERVER": "/nonexistent"})


def test_no_server_at_all(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mtgr.serving.find.WHEEL", "no-such-distribution")
    with pytest.raises(UnavailableError, match=r"pip install 'mtgr\[serve\]'"):
        find_installation(environ={"PATH": ""})


def test_concurrent_assemblies_give_one_directory(tmp_path: Path) -> None:
    installation = find_installation(environ={"PATH": ""})
    results: list[Path] = []
    threads = [
        threading.Thread(target=lambda: results.append(assemble_backends(installation, cache=tmp_path)))
        for _ in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 8
    assert set(results) == {results[0]}
    assert list(tmp_path.iterdir()) == [results[0]]
    assert os.access(results[0] / "python" / "triton_python_backend_stub", os.X_OK)
    assert (results[0] / "onnxruntime" / "model.py").is_file()


def test_changed_stand_in_is_assembled_anew(tmp_path: Path) -> None:
    installation = find_installation(environ={"PATH": ""})
    source = tmp_path / "stand_ins" / "engine" / "model.py"
    source.parent.mkdir(parents=True)
    source.write_text("first = 1\n")
    before = assemble_backends(installation, tmp_path / "stand_ins", tmp_path / "cache")
    assert assemble_backends(installation, tmp_path / "stand_ins", tmp_path / "cache") == before
    source.write_text("second = 2\n")
    after = assemble_backends(installation, tmp_path / "stand_ins", tmp_path / "cache")
    assert after != before
    assert (before / "engine" / "model.py").read_text() == "first = 1\n"
    assert (after / "engine" / "model.py").read_text() == "second = 2\n"


def test_environment_keeps_what_the_user_set() -> None:
    installation = find_installation(environ={"PATH": ""})
    backends = assemble_backends(installation)
    environ = {"PATH": "/bin", "LD_LIBRARY_PATH": "/mine", "OMP_NUM_THREADS": "7", "LANG": "C", "PYTHONHOME": "/other"}
    env = server_environment(installation, backends, environ)
    first, *rest = env["LD_LIBRARY_PATH"].split(":")
    assert list(Path(first).glob("libpython3.*.so.1.0"))
    assert rest == [str(installation.libraries[0]), "/mine"]
    assert env["PATH"] == f"{Path(sys.executable).parent}:/bin"
    assert env["OMP_NUM_THREADS"] == "7"
    assert env["LC_ALL"] == "C.UTF-8"
    assert "PYTHONHOME" not in env
    bounded = server_environment(installation, backends, {"LANG": "de_DE.utf8"})
    assert 1 <= int(bounded["OMP_NUM_THREADS"]) <= 4
    assert "LC_ALL" not in bounded


def test_interpreter_without_a_stub(tmp_path: Path) -> None:
    stubs = tmp_path / "stubs"
    (stubs / "3.1").mkdir(parents=True)
    installation = dataclasses.replace(find_installation(environ={"PATH": ""}), stubs=stubs)
    with pytest.raises(ConfigurationError, match=r"serves Python 3\.1 but this is Python"):
        assemble_backends(installation, cache=tmp_path / "cache")
    assert not (tmp_path / "cache").exists()
