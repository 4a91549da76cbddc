"""Whatever the code asks of TensorRT stands in the 11.4 bindings: names, parameters, members of enumerations."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import ROOT

API = json.loads((ROOT / "tests" / "data" / "tensorrt-11.4-api.json").read_text(encoding="utf-8"))
BUILDER = ROOT / "export" / "tensorrt.py"
LOG = ROOT / "export" / "tensorrt_log.py"
STAND_IN = ROOT / "backends" / "tensorrt"
RUNNER = STAND_IN / "tensorrt_plan.py"

# What variables hold, by file. export/tensorrt_compat.py is for 8.6 alone: 11.4 is not asked about it.
VARIABLES = {
    BUILDER: {
        "builder": "Builder",
        "network": "INetworkDefinition",
        "parser": "OnnxParser",
        "config": "IBuilderConfig",
        "profile": "IOptimizationProfile",
        "layer": "ILayer",
        "tensor": "ITensor",
    },
    LOG: {},
    RUNNER: {
        "engine": "ICudaEngine",
        "self._engine": "ICudaEngine",
        "context": "IExecutionContext",
        "self._runtime": "Runtime",
    },
}
RETURNED = {"nvonnxparser::IParserError": "ParserError"}


class Uses(ast.NodeVisitor):
    """Every use of TensorRT in a file, each with what is wrong about it or None."""

    def __init__(self, variables: dict[str, str]) -> None:
        self.variables = variables
        self.found: list[tuple[str, str | None]] = []

    def visit_Attribute(self, node: ast.Attribute) -> None:
        problem = self.problem(node)
        if problem is not False:
            self.found.append((ast.unparse(node), problem))
        self.generic_visit(node)

    def visit_Call(self, node: ast.Call) -> None:
        overloads = self.overloads(node.func)
        if overloads is not None:
            given = [keyword.arg for keyword in node.keywords]
            fits = any(accepts(entry["parameters"], len(node.args), given) for entry in overloads)
            self.found.append((ast.unparse(node), None if fits else f"no overload takes that: {overloads}"))
        self.generic_visit(node)

    def visit_ClassDef(self, node: ast.ClassDef) -> None:
        for base in node.bases:
            if self.is_module(getattr(base, "value", base)):
                methods = API["classes"][base.attr]
                for method in (entry for entry in node.body if isinstance(entry, ast.FunctionDef)):
                    if method.name.startswith("_"):
                        continue
                    own = [[argument.arg, False] for argument in method.args.args[1:]]
                    known = [overload["parameters"] for overload in methods.get(method.name) or []]
                    problem = None if own in known else f"{base.attr}.{method.name} is called with {known}"
                    self.found.append((f"def {method.name}", problem))
        self.generic_visit(node)

    def problem(self, node: ast.Attribute) -> str | bool | None:
        """What is wrong with an attribute; False if it is none of TensorRT's."""
        if self.is_module(node.value):
            return None if node.attr in API["names"] else "not in the module"
        owner = node.value
        if isinstance(owner, ast.Attribute) and self.is_module(owner.value):
            if owner.attr in API["enums"]:
                return None if node.attr in API["enums"][owner.attr] else f"not a member of {owner.attr}"
            if owner.attr == "Logger":  # severities, which the class has as attributes
                return None if node.attr in API["classes"]["Logger"] else "not in Logger"
            return None if node.attr in API["classes"].get(owner.attr, {}) else f"not in {owner.attr}"
        kind = self.kind(owner)
        if kind is None:
            return False
        return None if node.attr in API["classes"][kind] else f"not in {kind}"

    def kind(self, node: ast.AST) -> str | None:
        """TensorRT's class of an expression: a variable's, or what a method returns."""
        if isinstance(node, ast.Call):
            overloads = self.overloads(node.func) or []
            returned = {RETURNED.get(entry["returns"], entry["returns"]) for entry in overloads} & set(API["classes"])
            return returned.pop() if len(returned) == 1 else None
        return self.variables.get(ast.unparse(node)) if isinstance(node, (ast.Name, ast.Attribute)) else None

    def overloads(self, function: ast.AST) -> list[dict[str, Any]] | None:
        if not isinstance(function, ast.Attribute):
            return None
        if self.is_module(function.value):
            return API["classes"].get(function.attr, {}).get("__init__")
        kind = self.kind(function.value)
        return API["classes"][kind].get(function.attr) if kind else None

    @staticmethod
    def is_module(node: ast.AST) -> bool:
        return ast.unparse(node) in ("trt", "self._trt")


def accepts(parameters: list[list[Any]], positional: int, keywords: list[str | None]) -> bool:
    names = [name for name, _ in parameters]
    given = {*names[:positional], *keywords}
    required = {name for name, optional in parameters if not optional}
    return positional <= len(names) and set(keywords) <= set(names[positional:]) and required <= given


def uses(source: str, variables: dict[str, str]) -> list[tuple[str, str | None]]:
    visitor = Uses(variables)
    visitor.visit(ast.parse(source))
    return visitor.found


@pytest.mark.parametrize(("path", "least"), [(BUILDER, 50), (LOG, 8), (RUNNER, 20)], ids=["builder", "log", "runner"])
def test_every_use_stands_in_the_bindings(path: Path, least: int) -> None:
    found = uses(path.read_text(encoding="utf-8"), VARIABLES[path])
    assert len(found) >= least, "the walk no longer sees what the code uses"
    assert not [(text, problem) for text, problem in found if problem]


@pytest.mark.parametrize("path", VARIABLES, ids=["builder", "log", "runner"])
def test_every_variable_is_known_to_the_walk(path: Path) -> None:
    """A method of TensorRT's on a variable that the table leaves out would go unchecked."""
    methods = {
        name
        for kind in API["classes"].values()
        for name, overloads in kind.items()
        if overloads and "_" in name and name != "__init__"
    }
    tree = ast.parse(path.read_text(encoding="utf-8"))
    visitor = Uses(VARIABLES[path])

    def unchecked() -> Iterator[str]:
        calls = (node for node in ast.walk(tree) if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute))
        for node in calls:
            if node.func.attr in methods and visitor.overloads(node.func) is None:
                yield ast.unparse(node)

    assert not list(unchecked())


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ("trt.BuilderFlag.FP16", "not a member of BuilderFlag"),  # gone since 11
        ("trt.NetworkDefinitionCreationFlag.EXPLICIT_BATCH", "not a member"),
        ("trt.Nothing", "not in the module"),
        ("builder.max_batch_size", "not in Builder"),
        ("config.max_workspace_size = 1", "not in IBuilderConfig"),
        ("builder.build_serialized_network(network)", "no overload"),
        ("config.set_timing_cache(1, True, False)", "no overload"),
        ("config.set_timing_cache(1, mismatch=True)", "no overload"),
        ("parser.get_error(0).text()", "not in ParserError"),
        ("class P(trt.IProgressMonitor):\n def step_complete(self, phase): ...", "is called with"),
    ],
)
def test_the_walk_sees_what_is_wrong(line: str, problem: str) -> None:
    assert [text for _, text in uses(line, VARIABLES[BUILDER]) if text and problem in text]


def test_the_file_of_names_says_where_it_is_from() -> None:
    assert API["version"].startswith("11.4.")
    assert "tensorrt-cu13-bindings" in API["source"]
    assert "Apache-2.0" in API["licence"]


@pytest.mark.parametrize("path", sorted(STAND_IN.glob("*.py")), ids=lambda path: path.name)
def test_the_stand_in_is_python_3_10_and_needs_nothing_of_this_project(path: Path) -> None:
    source = path.read_text(encoding="utf-8")
    tree = ast.parse(source, feature_version=(3, 10))
    allowed = set(sys.stdlib_module_names) | {"numpy", "tensorrt_plan", "triton_python_backend_utils"}
    for node in ast.walk(tree):
        names = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        assert {name.split(".")[0] for name in names} <= allowed
        # New in the standard library since 3.10, and in use elsewhere in this project.
        if isinstance(node, ast.Attribute):
            assert ast.unparse(node) not in ("asyncio.TaskGroup", "typing.Self", "datetime.UTC", "enum.StrEnum")
        if isinstance(node, ast.ImportFrom) and node.module == "typing":
            assert not {alias.name for alias in node.names} & {"Self", "assert_never", "Never", "override"}


@pytest.mark.parametrize("name", ["tensorrt", "tensorrt_compat", "tensorrt_device", "tensorrt_profiles"])
def test_building_needs_no_torch_and_no_onnx(name: str) -> None:
    """Plans are built where TensorRT is, and that may be an environment without them."""
    script = f"import sys, export.{name}; print([m for m in ('torch', 'onnx', 'tensorrt') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
