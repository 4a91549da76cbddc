"""No code out of data, no secret in a config, and a page on security that names tests and bounds as they are."""

from __future__ import annotations

import ast
import dataclasses
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from google.protobuf import text_format
from tritonclient.grpc import model_config_pb2 as pb

from mtgr.engines.vllm_settings import VLLMSettings
from mtgr.errors import ConfigurationError
from mtgr.features.request import MAX_CANDIDATES, MAX_EVENTS, MAX_PROFILE_BYTES, MAX_TOP_K, MAX_USER_ID_BYTES
from mtgr.features.settings import feature_settings
from mtgr.routing.policy import Policy, load_policy, policy_file
from mtgr.serving.management import HTTP_HEADER, RESTRICTED
from tests.conftest import ROOT

FOLDERS = ("mtgr", "export", "clients", "model_repository", "backends", "perf")

# fmt: off
UNPICKLERS = frozenset({
    "pickle", "cPickle", "_pickle", "dill", "cloudpickle", "shelve", "marshal", "joblib", "jsonpickle", "torch.package",
})
FORBIDDEN = frozenset({
    "eval", "exec", "compile", "__import__", "os.system", "os.popen", "subprocess.getoutput",
    "subprocess.getstatusoutput", "torch.hub.load", "pandas.read_pickle", "yaml.unsafe_load", "yaml.unsafe_load_all",
    "yaml.full_load", "yaml.full_load_all", "yaml.load_all",
})
# fmt: on
SAFE_LOADERS = frozenset({"yaml.SafeLoader", "yaml.CSafeLoader", "yaml.BaseLoader"})
BY_NAME = frozenset({"importlib.import_module", "runpy.run_path", "runpy.run_module"})


def findings(source: str) -> Iterator[str]:
    """What in a file could run code or a command that comes with data; line and name."""
    tree = ast.parse(source)
    names = {}  # what a name of the file stands for
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name in UNPICKLERS:
                    yield f"{node.lineno}: import {alias.name}"
                names[alias.asname or alias.name.split(".")[0]] = (
                    alias.name if alias.asname else alias.name.split(".")[0]
                )
        elif isinstance(node, ast.ImportFrom):
            for alias in node.names:
                full = f"{node.module}.{alias.name}"
                if node.module in UNPICKLERS or full in UNPICKLERS:
                    yield f"{node.lineno}: import {full}"
                names[alias.asname or alias.name] = full

    def dotted(node: ast.AST | None) -> str:
        if isinstance(node, ast.Name):
            return names.get(node.id, node.id)
        if isinstance(node, ast.Attribute):
            return f"{dotted(node.value)}.{node.attr}"
        return ""

    safe = SAFE_LOADERS | {
        node.name
        for node in ast.walk(tree)
        if isinstance(node, ast.ClassDef) and {dotted(base) for base in node.bases} & SAFE_LOADERS
    }
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        name = dotted(node.func).removeprefix("builtins.")
        given = {keyword.arg: keyword.value for keyword in node.keywords}

        def is_constant(argument: str, value: bool, given: dict[str | None, ast.expr] = given) -> bool:
            found = given.get(argument)
            return isinstance(found, ast.Constant) and found.value is value

        wrong = (
            name in FORBIDDEN
            or (name == "torch.load" and not is_constant("weights_only", True))
            or (name == "numpy.load" and "allow_pickle" in given and not is_constant("allow_pickle", False))
            or (
                name == "yaml.load" and dotted(given.get("Loader", node.args[1] if node.args[1:] else None)) not in safe
            )
            or (name in BY_NAME and not (node.args and isinstance(node.args[0], ast.Constant)))
            or ("shell" in given and not is_constant("shell", False))
            or ("trust_remote_code" in given and not is_constant("trust_remote_code", False))
        )
        if wrong:
            yield f"{node.lineno}: {name or 'a call'}"


@pytest.mark.parametrize("folder", FOLDERS)
def test_no_code_comes_out_of_data(folder: str) -> None:
    files = sorted((ROOT / folder).rglob("*.py"))
    assert files
    found = [
        f"{path.relative_to(ROOT)}:{line}" for path in files for line in findings(path.read_text(encoding="utf-8"))
    ]
    assert found == []


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "from pickle import loads",
        "import cloudpickle as c",
        "from torch import package",
        "import torch\ntorch.load('f')",
        "from torch import load as fetch\nfetch('f', map_location='cpu')",
        "import torch as t\nt.load('f', weights_only=False)",
        "import numpy as np\nnp.load('f', allow_pickle=True)",
        "import yaml\nyaml.load(text, Loader=yaml.Loader)",
        "import yaml\nyaml.load(text, yaml.FullLoader)",
        "import yaml\nyaml.load(text)",
        "from yaml import unsafe_load\nunsafe_load(text)",
        "import yaml\nclass L(yaml.Loader): pass\nyaml.load(text, Loader=L)",
        "eval(text)",
        "import builtins\nbuiltins.exec(text)",
        "__import__(name)",
        "from importlib import import_module\nimport_module(name)",
        "import subprocess\nsubprocess.run(command, shell=True)",
        "import subprocess as s\ns.Popen(command, shell=flag)",
        "import os\nos.system(command)",
        "AutoConfig.from_pretrained(folder, trust_remote_code=True)",
    ],
)
def test_the_search_finds(source: str) -> None:
    assert len(list(findings(source))) == 1


@pytest.mark.parametrize(
    "source",
    [
        "model.eval()",
        "import re\nre.compile(pattern)",
        "import torch\ntorch.load('f', weights_only=True)",
        "import numpy as np\nnp.load('f')",
        "import yaml\nclass Strict(yaml.SafeLoader): pass\nyaml.load(text, Loader=Strict)",
        "import importlib\nimportlib.import_module('vllm')",
        "import subprocess\nsubprocess.run(['ls'])",
    ],
)
def test_the_search_lets_pass(source: str) -> None:
    assert list(findings(source)) == []


# --- secrets ---------------------------------------------------------------------------------------------------------

CONFIGS = sorted([*ROOT.glob("model_repository/*/config.pbtxt"), *ROOT.glob("export/templates/*/config.pbtxt")])
SECRET = "hunter2"


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.parent.name)
def test_no_config_has_a_place_for_a_secret(path: Path) -> None:
    """Placeholders of templates are dimensions; numbers take their place."""
    config = text_format.Parse(re.sub(r"\$\{\w+\}", "1", path.read_text(encoding="utf-8")), pb.ModelConfig())
    for name, value in config.parameters.items():
        assert not re.search("passw|secret|token|credential|key", name, re.IGNORECASE)
        assert "@" not in value.string_value


@pytest.mark.parametrize(
    "parameters",
    [
        {"store_url": f"redis://:{SECRET}@host/0"},
        {"store_url": f"rediss://user:{SECRET}@host:6380/0"},
        {"store_url": f"redis://host/0?password={SECRET}"},
        {"store_url": f"unix:///socket?db=1&password={SECRET}"},
        {"store_password": SECRET},
        {"redis_password": SECRET},
    ],
)
def test_a_password_in_a_config_is_refused_and_not_repeated(parameters: dict[str, str]) -> None:
    with pytest.raises(ConfigurationError) as caught:
        feature_settings(parameters, {})
    assert SECRET not in str(caught.value)
    assert feature_settings({}, {"MTGR_STORE_URL": f"redis://:{SECRET}@host/0"}).store_url.startswith("redis://:")


def texts(kind: type, path: str = "") -> set[str]:
    """Settings, by dotted name, that hold free text."""
    found = set()
    for field in dataclasses.fields(kind):
        text = str(field.type)
        name = f"{path}{field.name}"
        section = next(
            (one for one in SECTIONS if re.search(rf"\b{one.__name__}\b", text)),
            None,
        )
        if section is not None:
            found |= texts(section, f"{name}.")
        elif "str" in text:
            found.add(name)
    return found


def _sections() -> tuple[type, ...]:
    from mtgr.routing import policy

    return tuple(
        value
        for name in dir(policy)
        if dataclasses.is_dataclass(value := getattr(policy, name)) and isinstance(value, type) and value is not Policy
    )


SECTIONS = _sections()


def test_a_policy_cannot_say_a_password(tmp_path: Path) -> None:
    # Each of these is a name that is compared with known ones, or the name of an experiment or arm.
    assert texts(Policy) == {
        "profile",
        "log.level",
        "auto.order",
        "routing.task_weights",
        "experiment.name",
        "experiment.arms.name",
        "experiment.arms.strategy",
        "shadow.strategy",
    }
    path = tmp_path / "policy.yaml"
    for line in (f"password: {SECRET}", f"store_url: redis://:{SECRET}@host", f"routing: {{ admin_key: {SECRET} }}"):
        path.write_text(f"extends: prod\n{line}\n", encoding="utf-8")
        with pytest.raises(ConfigurationError, match="is not a setting") as caught:
            load_policy(path)
        assert SECRET not in str(caught.value)
    with pytest.raises(ConfigurationError, match="unknown parameter 'admin_key'"):
        policy_file({"admin_key": SECRET}, {})


@pytest.mark.parametrize("tag", ["!!python/object/apply:os.system ['true']", "!!python/name:os.system", "!include x"])
def test_a_policy_cannot_name_code(tmp_path: Path, tag: str) -> None:
    path = tmp_path / "policy.yaml"
    path.write_text(f"extends: prod\ndeadline_seconds: {tag}\n", encoding="utf-8")
    with pytest.raises(ConfigurationError, match="tags are not allowed"):
        load_policy(path)


@pytest.mark.parametrize(
    "name", ["worker_cls", "trust_remote_code", "hf_token", "logits_processors", "worker_extension_cls", "load_format"]
)
def test_engine_settings_cannot_name_code(name: str) -> None:
    values = {"max_model_len": 64, "max_num_batched_tokens": 512}
    assert VLLMSettings.from_dict(values).max_model_len == 64
    with pytest.raises(ConfigurationError, match=f"'{name}' is not a key of it"):
        VLLMSettings.from_dict({**values, name: "x"})


# --- the page --------------------------------------------------------------------------------------------------------

PAGE = ROOT / "docs" / "security.md"


def test_every_test_that_the_page_names_is_there() -> None:
    text = PAGE.read_text(encoding="utf-8")
    named = set(re.findall(r"`(test_\w+)`", text))
    defined = {
        node.name
        for path in (ROOT / "tests").rglob("test_*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.FunctionDef)
    }
    assert len(named) > 20
    assert named - defined == set()
    assert len(text.splitlines()) <= 150


def test_the_page_says_the_bounds_of_the_code() -> None:
    rows = dict(re.findall(r"^\| (`.+?) \| ([^|]+) \|", PAGE.read_text(encoding="utf-8"), re.MULTILINE))
    bounds = {
        "`user_id`": MAX_USER_ID_BYTES,
        "`history_items`, `history_actions`, `history_times`": MAX_EVENTS,
        "`candidates`": MAX_CANDIDATES,
        "`profile`": MAX_PROFILE_BYTES,
        "`top_k`": MAX_TOP_K,
    }
    for name, bound in bounds.items():
        assert rows[name].split()[0] == f"{bound:,}", name
    assert f"={','.join(RESTRICTED)}:{HTTP_HEADER}=KEY" in PAGE.read_text(encoding="utf-8")
