"""The Kubernetes manifests: they render, fit two versions' schemas, and name nothing that the code does not have."""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml

from mtgr.metrics import stage_seconds
from mtgr.routing.policy import load_policy
from mtgr.serving.health import LEAVE, PROBES
from mtgr.serving.server import TritonServer
from tests.conftest import ROOT
from tests.static.deploy_files import (
    KUBERNETES,
    check_python_command,
    containers,
    dockerfile,
    environment_variables,
    kinds,
    one,
    rendered,
    templates,
)

OVERLAYS = ("overlays/cpu", "overlays/gpu", "overlays/prod", "overlays/prod-stateful")
ALL = (*OVERLAYS, "export", "monitoring")
VERSIONS = ("1.31", "1.37")
# Images by name to targets of the Dockerfile.
IMAGES = {"mtgr-cpu": "cpu", "mtgr-gpu": "gpu", "mtgr-models": "models"}
SECRET_KEYS = {"admin-key", "store-url"}
Objects = list[dict[str, Any]]


def argv(container: dict[str, Any], objects: Objects) -> list[str] | None:
    """What a container of ours runs, with variables filled in; None for foreign images."""
    target = IMAGES.get(container["image"].split(":")[0])
    if target is None:
        return None
    stage = dockerfile().stages[target]
    if "command" in container:
        parts = [*container["command"], *container.get("args", [])]
    else:
        parts = [*stage.listed("ENTRYPOINT"), *container.get("args", stage.listed("CMD"))]
    values = variables(container, objects)
    for part in parts:
        for name in re.findall(r"\$\((\w+)\)", part):
            assert name in values, f"{container['name']}: $({name}) is set nowhere"
    return [re.sub(r"\$\((\w+)\)", lambda found: values[found[1]], part) for part in parts]


def variables(container: dict[str, Any], objects: Objects) -> dict[str, str]:
    values: dict[str, str] = {}
    for source in container.get("envFrom", []):
        values |= one(objects, "ConfigMap", source["configMapRef"]["name"])["data"]
    return values | {entry["name"]: entry["value"] for entry in container.get("env", [])}


def check_commands(objects: Objects) -> None:
    """Every command line is one that the code understands, and every variable one that it reads or the line names."""
    for name, template in templates(objects):
        for container in containers(template):
            command = argv(container, objects)
            if command is None:
                continue
            if command[0] == "python":
                check_python_command(command)
            else:
                assert command[0] == "cp", f"{name}: {command[0]} is in no image"
                assert command[-2] == "/opt/mtgr/model_repository", command
            named = set(re.findall(r"\$\((\w+)\)", json.dumps([container.get("command"), container.get("args")])))
            ours = {variable for variable in variables(container, objects) if variable.startswith("MTGR_")}
            shared = {key for source in container.get("envFrom", []) for key in one_map(objects, source)}
            unknown = ours - environment_variables() - named - shared
            assert not unknown, f"{name}/{container['name']}: nothing reads {sorted(unknown)}"
            hook = container.get("lifecycle", {}).get("preStop", {}).get("exec", {}).get("command")
            if hook is not None:
                options = check_python_command(hook)
                assert options is not None
                assert options.what == LEAVE


def one_map(objects: Objects, source: dict[str, Any]) -> list[str]:
    return list(one(objects, "ConfigMap", source["configMapRef"]["name"])["data"])


def server(objects: Objects) -> tuple[dict[str, Any], dict[str, Any]]:
    """Pod template and container of the server."""
    found = [(template, c) for _, template in templates(objects) for c in containers(template) if c["name"] == "mtgr"]
    assert len(found) == 1
    return found[0]


def check_ports(objects: Objects) -> None:
    """Ports are those that the server is told to listen on, and whoever names one finds it."""
    template, container = server(objects)
    command = argv(container, objects)
    assert command is not None
    options = check_python_command(command)
    assert options is not None
    declared = {port["name"]: port["containerPort"] for port in container["ports"]}
    listens = {"http": options.http_port, "grpc": options.grpc_port, "metrics": options.metrics_port}
    assert declared == {**listens, "health": options.health_port}
    assert options.host == "0.0.0.0"
    assert template["metadata"]["annotations"]["prometheus.io/port"] == str(options.metrics_port)
    for probe in PROBES:
        asked = container[{"startup": "startupProbe", "live": "livenessProbe", "ready": "readinessProbe"}[probe]]
        assert asked["httpGet"] == {"path": f"/{probe}", "port": "health"}
    hook = check_python_command(container["lifecycle"]["preStop"]["exec"]["command"])
    assert hook is not None
    assert hook.port == options.health_port
    pods = list(templates(objects))
    for service in kinds(objects, "Service"):
        ends = [
            port
            for _, pod in pods
            if selects(service["spec"]["selector"], pod)
            for c in containers(pod)
            for port in c.get("ports", [])
        ]
        assert ends, f"Service/{service['metadata']['name']} selects no pod"
        for port in service["spec"]["ports"]:
            found = [end for end in ends if port["targetPort"] in (end["name"], end["containerPort"])]
            assert found, f"Service/{service['metadata']['name']}: no pod has the port {port['targetPort']}"
            assert port["port"] in {end["containerPort"] for end in found}
    for policy in kinds(objects, "NetworkPolicy"):
        labels = policy["spec"]["podSelector"].get("matchLabels", {})
        ends = [
            port["containerPort"]
            for _, pod in pods
            if selects(labels, pod)
            for c in containers(pod)
            for port in c.get("ports", [])
        ]
        for rule in policy["spec"].get("ingress", []):
            for port in rule["ports"]:
                assert port["port"] in ends, f"NetworkPolicy/{policy['metadata']['name']} opens {port['port']}"


def selects(labels: dict[str, str], template: dict[str, Any]) -> bool:
    return labels.items() <= template["metadata"]["labels"].items()


def check_hardened(objects: Objects) -> None:
    """No root, no writable root file system, no capabilities; what is written has a volume."""
    for name, template in templates(objects):
        spec = template["spec"]
        assert spec["securityContext"]["runAsNonRoot"] is True, name
        assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}, name
        assert spec["automountServiceAccountToken"] is False, name
        volumes = {volume["name"]: volume for volume in spec.get("volumes", [])}
        for container in containers(template):
            context = container["securityContext"]
            assert context["readOnlyRootFilesystem"] is True, (name, container["name"])
            assert context["allowPrivilegeEscalation"] is False
            assert context["capabilities"] == {"drop": ["ALL"]}
            assert "memory" in container["resources"]["limits"]
            target = IMAGES.get(container["image"].split(":")[0])
            if target is None:
                continue
            stage = dockerfile().stages[target]
            assert (
                stage.last("USER") == f"{spec['securityContext']['runAsUser']}:{spec['securityContext']['runAsGroup']}"
            )
            mounts = {mount["mountPath"]: mount for mount in container["volumeMounts"]}
            assert not mounts["/tmp"].get("readOnly")
            if container["name"] in ("mtgr", "export"):
                shm = volumes[mounts["/dev/shm"]["name"]]["emptyDir"]
                assert shm.get("medium") == "Memory"
                assert quantity(shm["sizeLimit"]) < quantity(container["resources"]["limits"]["memory"])
            for variable in ("HOME", "TRITON_CACHE_DIR", "VLLM_CACHE_ROOT", "HF_HOME"):
                assert Path(stage.environment[variable]).is_relative_to("/tmp"), variable


def quantity(text: str) -> float:
    number, unit = re.fullmatch(r"(\d+)(\w*)", text).groups()
    return int(number) * {"": 1, "Mi": 2**20, "Gi": 2**30}[unit]


def check_files(objects: Objects) -> None:
    """Volumes are declared and used, what they come from exists, and every path lies in one or in the image."""
    claims = {item["metadata"]["name"] for item in (*kinds(objects, "PersistentVolumeClaim"), *shared_claims())}
    for name, template in templates(objects):
        spec = template["spec"]
        volumes = {volume["name"]: volume for volume in spec.get("volumes", [])}
        volumes |= {
            claim["metadata"]["name"]: claim
            for item in objects
            if f"{item['kind']}/{item['metadata']['name']}" == name
            for claim in item["spec"].get("volumeClaimTemplates", [])
        }
        used = {mount["name"] for container in containers(template) for mount in container.get("volumeMounts", [])}
        assert used == set(volumes), f"{name}: {used ^ set(volumes)}"
        for volume in volumes.values():
            if "persistentVolumeClaim" in volume:
                assert volume["persistentVolumeClaim"]["claimName"] in claims
        accounts = {
            item["metadata"]["name"]
            for item in (*kinds(objects, "ServiceAccount"), *kinds(rendered("base"), "ServiceAccount"))
        }
        assert spec["serviceAccountName"] in accounts
        for container in containers(template):
            mounts = {mount["mountPath"]: volumes[mount["name"]] for mount in container.get("volumeMounts", [])}
            paths = list(variables(container, objects).values())
            paths += [part.split("=", 1)[-1] for part in (argv(container, objects) or [])]
            for path in (Path(text) for text in paths if text.startswith("/")):
                folder = next((mount for mount in mounts if path.is_relative_to(mount)), None)
                if folder is None:
                    inside = {"/release", "/opt/mtgr/model_repository"}  # the Dockerfile's test sees to these
                    assert str(path) in inside, f"{name}: {path} is neither mounted nor in the image"
                    continue
                volume = mounts[folder]
                if "configMap" in volume:
                    assert path.name in one(objects, "ConfigMap", volume["configMap"]["name"])["data"], str(path)
                if "secret" in volume:
                    assert path.name in SECRET_KEYS, str(path)
    assert not kinds(objects, "Secret"), "secrets do not belong into git"


def shared_claims() -> Objects:
    return kinds(rendered("base"), "PersistentVolumeClaim")


def check_rollout(objects: Objects) -> None:
    """A new pod serves before an old one leaves, and what leaves has the time that it takes."""
    template, container = server(objects)
    hook = check_python_command(container["lifecycle"]["preStop"]["exec"]["command"])
    assert hook is not None
    stop = inspect.signature(TritonServer).parameters["stop_timeout"].default
    # A quarter of a minute for balancers: DNS and probes are slower than a pod.
    assert hook.wait >= 15
    assert template["spec"]["terminationGracePeriodSeconds"] >= hook.wait + stop + 10
    unready = container["readinessProbe"]["periodSeconds"] * container["readinessProbe"]["failureThreshold"]
    assert hook.wait > unready
    startup = container["startupProbe"]["periodSeconds"] * container["startupProbe"]["failureThreshold"]
    options = check_python_command(argv(container, objects) or [])
    assert options is not None
    assert startup >= options.startup_timeout
    for item in kinds(objects, "Deployment"):
        if item["metadata"]["name"] == "mtgr":
            assert item["spec"]["strategy"]["rollingUpdate"] == {"maxUnavailable": 0, "maxSurge": 1}
            assert "replicas" not in item["spec"], "they are the autoscaler's"
            sources = {source["configMapRef"]["name"] for source in container["envFrom"]}
            assert any(re.fullmatch(r"mtgr-release-\w{10}", source) for source in sources), "a release rolls no pod"
    spread = {entry["topologyKey"] for entry in template["spec"]["topologySpreadConstraints"]}
    assert spread == {"topology.kubernetes.io/zone", "kubernetes.io/hostname"}
    for entry in template["spec"]["topologySpreadConstraints"]:
        assert selects(entry["labelSelector"]["matchLabels"], template)
    budget = one(objects, "PodDisruptionBudget", "mtgr")["spec"]
    assert selects(budget["selector"]["matchLabels"], template)
    assert budget["maxUnavailable"] == 1
    assert one(objects, "Service", "mtgr")["spec"]["trafficDistribution"] == "PreferClose"
    assert one(objects, "Service", "mtgr-pods")["spec"]["clusterIP"] == "None"


def check_scaling(objects: Objects) -> None:
    """The autoscaler finds what it scales and a metric that the adapter makes of metrics that the code has."""
    scaler = one(objects, "HorizontalPodAutoscaler", "mtgr")["spec"]
    one(objects, scaler["scaleTargetRef"]["kind"], scaler["scaleTargetRef"]["name"])
    assert scaler["minReplicas"] >= 2
    names = [rule["name"]["as"] for rule in adapter_rules(rendered("monitoring"))]
    for metric in scaler["metrics"]:
        assert metric["pods"]["metric"]["name"] in names


def adapter_rules(objects: Objects) -> list[dict[str, Any]]:
    text = one(objects, "ConfigMap", "adapter-config")["data"]["config.yaml"]
    rules = yaml.safe_load(text)["rules"]
    assert isinstance(rules, list)
    return rules


def check_adapter(objects: Objects) -> None:
    """Every series of ours in the adapter's rules is one that the router reports."""
    spec = stage_seconds("queue")
    router = (ROOT / "mtgr" / "routing" / "router.py").read_text(encoding="utf-8")
    for rule in adapter_rules(objects):
        for query in (rule["seriesQuery"], rule["metricsQuery"]):
            for series in re.findall(r"\b(?:mtgr|nv)_\w+", query):
                if series.startswith("mtgr_"):  # Triton's own: tests/server/test_health.py
                    assert series in {f"{spec.name}_sum", f"{spec.name}_count"}, f"no model reports {series}"
            for stage in re.findall(r'stage="(\w+)"', query):
                assert f'stage("{stage}"' in router
        assert "<<.LabelMatchers>>" in rule["metricsQuery"]
        assert "<<.GroupBy>>" in rule["metricsQuery"]


def check_policy(objects: Objects, alerting: bool, tmp_path: Path) -> None:
    path = tmp_path / "policy.yaml"
    path.write_text(one(objects, "ConfigMap", "mtgr-policy")["data"]["policy.yaml"], encoding="utf-8")
    policy = load_policy(path)
    assert policy.profile == "prod"
    assert policy.monitoring, "the autoscaler reads what the router reports"
    assert policy.alerting is alerting
    assert policy.timed_run_seconds is None


def gateway_listeners(config: dict[str, Any]) -> dict[str, int]:
    listeners = config["static_resources"]["listeners"]
    return {entry["name"]: entry["address"]["socket_address"]["port_value"] for entry in listeners}


def check_gateway(objects: Objects) -> None:
    """Envoy's own file listens where the manifest says, and looks for servers, and their health, where they are."""
    template = one(objects, "Deployment", "mtgr-gateway")["spec"]["template"]
    (container,) = template["spec"]["containers"]
    name = next(v["configMap"]["name"] for v in template["spec"]["volumes"] if "configMap" in v)
    path = container["args"][container["args"].index("--config-path") + 1]
    config = yaml.safe_load(one(objects, "ConfigMap", name)["data"][Path(path).name])
    assert gateway_listeners(config) == {port["name"]: port["containerPort"] for port in container["ports"]}
    assert template["metadata"]["annotations"]["prometheus.io/port"] == str(gateway_listeners(config)["metrics"])
    ready = container["readinessProbe"]["httpGet"]
    assert ready["port"] == "metrics"
    for route in ("path: ", template["metadata"]["annotations"]["prometheus.io/path"]), ("path: ", ready["path"]):
        assert "".join(route) in one(objects, "ConfigMap", name)["data"][Path(path).name]
    grace = template["spec"]["terminationGracePeriodSeconds"]
    assert container["lifecycle"]["preStop"]["sleep"]["seconds"] + 10 <= grace
    health = {port["name"]: port["containerPort"] for port in server(objects)[1]["ports"]}["health"]
    pods: dict[str, list[str]] = {}
    for cluster in config["static_resources"]["clusters"]:
        for group in cluster["load_assignment"]["endpoints"]:
            for end in group["lb_endpoints"]:
                address = end["endpoint"]["address"]["socket_address"]
                if address["address"] == "127.0.0.1":
                    continue
                pod, _, service = address["address"].rpartition(".")
                pods.setdefault(cluster["name"], []).append(pod)
                ports = [port["port"] for port in one(objects, "Service", service)["spec"]["ports"]]
                assert address["port_value"] in ports
                assert end["endpoint"]["health_check_config"]["port_value"] == health
                asked = [check["http_health_check"]["path"].removeprefix("/") for check in cluster["health_checks"]]
                assert asked == ["ready"]
                rules = one(objects, "NetworkPolicy", "mtgr-gateway")["spec"]["egress"]
                let_out = {port["port"] for rule in rules for port in rule["ports"]}
                policy = one(objects, "NetworkPolicy", "mtgr-server")["spec"]["ingress"][0]
                let_in = {port["port"] for port in policy["ports"]}
                assert {address["port_value"], health} <= let_out & let_in
    for stateful in kinds(objects, "StatefulSet"):
        if stateful["metadata"]["name"] == "mtgr":
            most = one(objects, "HorizontalPodAutoscaler", "mtgr")["spec"]["maxReplicas"]
            assert stateful["spec"]["serviceName"] == service
            assert all(named == [f"mtgr-{number}" for number in range(most)] for named in pods.values()), pods
            break
    else:
        assert set(map(tuple, pods.values())) == {("",)}
    assert sorted(pods) == ["grpc", "http"]


def check_certificates(objects: Objects) -> None:
    """A gateway that speaks TLS finds its files, which its user may read, and says so to callers."""
    template = one(objects, "Deployment", "mtgr-gateway")["spec"]["template"]
    (container,) = template["spec"]["containers"]
    name = next(v["configMap"]["name"] for v in template["spec"]["volumes"] if "configMap" in v)
    (text,) = one(objects, "ConfigMap", name)["data"].values()
    paths = [Path(path) for path in re.findall(r"filename: (\S+)", text)]
    assert bool(paths) == (one(objects, "Service", "mtgr-gateway")["spec"]["ports"][0]["appProtocol"] == "https")
    mounts = {mount["mountPath"]: mount["name"] for mount in container["volumeMounts"]}
    volumes = {volume["name"]: volume for volume in template["spec"]["volumes"]}
    for path in paths:
        assert str(path.parent) in mounts, f"nothing is mounted at {path.parent}"
        secret = volumes[mounts[str(path.parent)]]["secret"]
        assert path.name in ("tls.crt", "tls.key"), "a Secret of type kubernetes.io/tls has no other"
        assert secret["defaultMode"] == 0o440
        assert template["spec"]["securityContext"]["fsGroup"] == template["spec"]["securityContext"]["runAsGroup"]


CHECKS: tuple[Callable[[Objects], None], ...] = (
    check_commands,
    check_ports,
    check_hardened,
    check_files,
    check_rollout,
    check_scaling,
    check_gateway,
    check_certificates,
)


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("name", ALL)
def test_fits_the_schema(name: str, version: str) -> None:
    for item in rendered(name):
        kubernetes_validate.validate(item, version, strict=True)


@pytest.mark.parametrize("name", OVERLAYS)
@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_names_what_there_is(check: Callable[[Objects], None], name: str) -> None:
    check(rendered(name))


@pytest.mark.parametrize("check", [check_commands, check_hardened, check_files], ids=lambda check: check.__name__)
def test_the_export_job_names_what_there_is(check: Callable[[Objects], None]) -> None:
    check(rendered("export"))


def test_the_adapter_reads_metrics_that_exist() -> None:
    check_adapter(rendered("monitoring"))


@pytest.mark.parametrize(
    ("name", "alerting"), [("cpu", False), ("gpu", False), ("prod", True), ("prod-stateful", True)]
)
def test_the_policy_is_valid(name: str, alerting: bool, tmp_path: Path) -> None:
    check_policy(rendered(f"overlays/{name}"), alerting, tmp_path)


def test_the_statefulset_has_the_pods_of_the_deployment() -> None:
    stateful, plain = rendered("overlays/prod-stateful"), rendered("overlays/prod")
    assert [item["metadata"]["name"] for item in kinds(stateful, "Deployment")] == ["mtgr-gateway"]
    copied = one(stateful, "StatefulSet", "mtgr")["spec"]
    assert copied["template"] == one(plain, "Deployment", "mtgr")["spec"]["template"]
    assert copied["serviceName"] == one(stateful, "Service", "mtgr-pods")["metadata"]["name"]
    assert one(stateful, "HorizontalPodAutoscaler", "mtgr")["spec"]["scaleTargetRef"]["kind"] == "StatefulSet"


@pytest.mark.parametrize(
    ("name", "encrypted"), [("cpu", False), ("gpu", False), ("prod", True), ("prod-stateful", True)]
)
def test_callers_speak_tls_in_production(name: str, encrypted: bool) -> None:
    (port,) = one(rendered(f"overlays/{name}"), "Service", "mtgr-gateway")["spec"]["ports"]
    assert (port["appProtocol"] == "https") is encrypted


def test_job_and_server_name_the_same_release() -> None:
    job = next(item["data"] for item in kinds(rendered("export"), "ConfigMap"))
    serving = [item["data"] for item in kinds(rendered("overlays/gpu"), "ConfigMap") if "MTGR_RELEASE" in item["data"]]
    assert [data["MTGR_RELEASE"] for data in serving] == [job["MTGR_RELEASE"]]


def test_nothing_in_the_folder_is_left_out() -> None:
    """A manifest that no kustomization names would be checked by nothing."""
    named: set[Path] = set()
    for file in KUBERNETES.rglob("kustomization.yaml"):
        values = yaml.safe_load(file.read_text(encoding="utf-8"))
        entries = [*values.get("resources", []), *values.get("components", [])]
        entries += [patch["path"] for patch in values.get("patches", []) if "path" in patch]
        entries += [entry for generator in values.get("configMapGenerator", []) for entry in generator.get("files", [])]
        named |= {(file.parent / entry).resolve() for entry in entries} | {file.resolve()}
    assert {path.resolve() for path in KUBERNETES.rglob("*") if path.is_file()} <= named


# ---------------------------------------------------------------- can these tests fail?


def _server(objects: Objects) -> dict[str, Any]:
    return server(objects)[1]


def _set(container: dict[str, Any], **values: Any) -> None:
    container.update(values)


def _flag(objects: Objects, old: str, new: str) -> None:
    container = _server(objects)
    assert any(old in argument for argument in container["args"])
    container["args"] = [argument.replace(old, new) for argument in container["args"]]


def _text(kind: str, name: str, old: str, new: str) -> Callable[[Objects], None]:
    def change(objects: Objects) -> None:
        item = one(objects, kind, name)
        text = json.dumps(item)
        assert old in text, old
        item.clear()
        item.update(json.loads(text.replace(old, new)))

    return change


MUTANTS: Sequence[tuple[str, Callable[[Objects], None], Callable[[Objects], None]]] = [
    ("a flag the server has not", check_commands, lambda o: _flag(o, "--health-port", "--healthy-port")),
    (
        "a module that is not there",
        check_commands,
        _text("Deployment", "mtgr", "mtgr.serving.health", "mtgr.serving.wealth"),
    ),
    ("a misspelt variable", check_commands, _text("Deployment", "mtgr", "MTGR_POLICY", "MTGR_POLICE")),
    ("a variable that is set nowhere", check_commands, lambda o: _flag(o, "$(MTGR_RELEASE)", "$(RELEASE)")),
    ("a command the release tool has not", check_commands, _text("Deployment", "mtgr", '"install"', '"instal"')),
    (
        "a port nobody listens on",
        check_ports,
        _text("Deployment", "mtgr", '"containerPort": 8001', '"containerPort": 8101'),
    ),
    (
        "metrics scraped elsewhere",
        check_ports,
        _text("Deployment", "mtgr", '"prometheus.io/port": "8002"', '"prometheus.io/port": "8003"'),
    ),
    (
        "a service of a port that is not there",
        check_ports,
        _text("Service", "mtgr", '"targetPort": "grpc"', '"targetPort": "rpc"'),
    ),
    ("a service of no pod", check_ports, _text("Service", "mtgr", '"server"', '"sever"')),
    (
        "a policy that opens a wrong port",
        check_ports,
        _text("NetworkPolicy", "mtgr-server", '"port": 8002', '"port": 8003'),
    ),
    ("a probe of an unknown path", check_ports, _text("Deployment", "mtgr", '"/live"', '"/alive"')),
    (
        "a writable root",
        check_hardened,
        _text("Deployment", "mtgr", '"readOnlyRootFilesystem": true', '"readOnlyRootFilesystem": false'),
    ),
    (
        "another user than the image's",
        check_hardened,
        _text("Deployment", "mtgr", '"runAsUser": 10001', '"runAsUser": 1000'),
    ),
    ("shared memory on a disk", check_hardened, _text("Deployment", "mtgr", '"medium": "Memory", ', "")),
    ("a file that its map has not", check_files, _text("Deployment", "mtgr", "policy.yaml", "policies.yaml")),
    (
        "a volume that is not there",
        check_files,
        _text("Deployment", "mtgr", '"mountPath": "/tmp", "name": "tmp"', '"mountPath": "/tmp", "name": "temp"'),
    ),
    ("an unknown claim", check_files, _text("Deployment", "mtgr", '"claimName": "mtgr-store"', '"claimName": "store"')),
    ("a path that is not mounted", check_files, lambda o: _flag(o, "=/store/", "=/stores/")),
    (
        "too little grace",
        check_rollout,
        _text("Deployment", "mtgr", '"terminationGracePeriodSeconds": 75', '"terminationGracePeriodSeconds": 30'),
    ),
    (
        "pods that leave before others come",
        check_rollout,
        _text("Deployment", "mtgr", '"maxUnavailable": 0', '"maxUnavailable": 1'),
    ),
    ("no wait for balancers", check_rollout, _text("Deployment", "mtgr", "--wait=15", "--wait=1")),
    ("a budget of other pods", check_rollout, _text("PodDisruptionBudget", "mtgr", '"server"', '"gateway"')),
    (
        "a gateway that listens elsewhere",
        check_gateway,
        _text("Deployment", "mtgr-gateway", '"containerPort": 8101', '"containerPort": 8100'),
    ),
    (
        "a gateway that may not ask for health",
        check_gateway,
        _text("NetworkPolicy", "mtgr-server", '"port": 8080', '"port": 8088'),
    ),
    (
        "servers under another name than the gateway's",
        check_gateway,
        lambda o: one(o, "Service", "mtgr-pods")["metadata"].update(name="mtgr-all"),
    ),
    (
        "a metric that nobody makes",
        check_scaling,
        _text("HorizontalPodAutoscaler", "mtgr", "mtgr_queue_seconds", "mtgr_wait_seconds"),
    ),
    (
        "the wrong thing scaled",
        check_scaling,
        _text("HorizontalPodAutoscaler", "mtgr", '"kind": "Deployment"', '"kind": "StatefulSet"'),
    ),
]


PRODUCTION_MUTANTS = [
    (
        "more pods than the gateway knows",
        check_gateway,
        lambda o: one(o, "HorizontalPodAutoscaler", "mtgr")["spec"].update(maxReplicas=25),
    ),
    (
        "a key that Envoy may not read",
        check_certificates,
        _text("Deployment", "mtgr-gateway", '"fsGroup": 101', '"fsGroup": 0'),
    ),
    ("a key elsewhere", check_certificates, _text("Deployment", "mtgr-gateway", "/etc/envoy/tls", "/etc/tls")),
    ("callers who are told nothing of TLS", check_certificates, _text("Service", "mtgr-gateway", "https", "http")),
]


@pytest.mark.parametrize(
    ("overlay", "check", "change"),
    [
        pytest.param(overlay, check, change, id=name)
        for overlay, mutants in (("cpu", MUTANTS), ("prod-stateful", PRODUCTION_MUTANTS))
        for name, check, change in mutants
    ],
)
def test_the_checks_find(overlay: str, check: Callable[[Objects], None], change: Callable[[Objects], None]) -> None:
    objects = rendered(f"overlays/{overlay}")
    change(objects)
    with pytest.raises(AssertionError):
        check(objects)


@pytest.mark.parametrize(
    ("old", "new"),
    [("mtgr_stage_seconds_sum", "mtgr_stages_sum"), ('stage="queue"', 'stage="row"'), ("<<.LabelMatchers>>", "")],
)
def test_the_adapter_check_finds(old: str, new: str) -> None:
    objects = rendered("monitoring")
    data = one(objects, "ConfigMap", "adapter-config")["data"]
    assert old in data["config.yaml"]
    data["config.yaml"] = data["config.yaml"].replace(old, new)
    with pytest.raises(AssertionError):
        check_adapter(objects)


@pytest.mark.parametrize("version", VERSIONS)
def test_the_schema_finds(version: str) -> None:
    objects = rendered("overlays/cpu")
    deployment = one(objects, "Deployment", "mtgr")
    deployment["spec"]["template"]["spec"]["containers"][0]["readynessProbe"] = {}
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(deployment, version, strict=True)
