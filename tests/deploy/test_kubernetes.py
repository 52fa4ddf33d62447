"""The Kubernetes manifests: what kustomize makes of them is valid, consistent, and starts a server that exists."""

import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import httpx
import kubernetes_validate
import pytest
import yaml
from conftest import ROOT, Server
from tools import needs

from memdec.server.launch.options import parse
from memdec.server.launch.vllm_arguments import parse_vllm

MANIFESTS = ROOT / "deploy" / "kubernetes"
PROMETHEUS = ROOT / "deploy" / "prometheus"
FORMS = ["base", "overlays/cpu", "overlays/gpu", "overlays/data-parallel"]
COMPONENTS = ["decoders-image", "decoders-volume", "decoders-hub", "api-key"]
VERSIONS = ["1.31", kubernetes_validate.latest_version()]
MODELS = "/models/"  # where the images have the embedded ones

pytestmark = [pytest.mark.engine, needs("kubectl", "Debian: apt install kubernetes-client")]


def build(folder: Path) -> list[dict[str, Any]]:
    """What `kubectl apply -k` would send."""
    done = subprocess.run(["kubectl", "kustomize", str(folder)], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return list(yaml.safe_load_all(done.stdout))


@pytest.fixture(scope="module", params=[*FORMS, *COMPONENTS])
def objects(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """The objects of each form, and of the gpu overlay with each component in its place."""
    if request.param in FORMS:
        return build(MANIFESTS / request.param)
    copy = tmp_path_factory.mktemp("manifests") / "kubernetes"
    shutil.copytree(MANIFESTS, copy)
    overlay = copy / "overlays" / "gpu" / "kustomization.yaml"
    overlay.write_text(re.sub(r"components: .*", f"components: [../../components/{request.param}]", overlay.read_text()))
    return build(overlay.parent)


def one(objects: list[dict[str, Any]], kind: str) -> dict[str, Any]:
    """The only object of a kind."""
    (found,) = [o for o in objects if o["kind"] == kind]
    return found


def pod(objects: list[dict[str, Any]]) -> dict[str, Any]:
    """The pods' spec."""
    spec: dict[str, Any] = one(objects, "Deployment")["spec"]["template"]["spec"]
    return spec


def container(objects: list[dict[str, Any]]) -> dict[str, Any]:
    """The server's container."""
    (server,) = pod(objects)["containers"]
    found: dict[str, Any] = server
    return found


def test_every_object_is_valid(objects: list[dict[str, Any]]) -> None:
    """Against Kubernetes' own schemas, with no field that they don't know."""
    assert [o["kind"] for o in objects] == ["Service", "Deployment", "PodDisruptionBudget", "HorizontalPodAutoscaler"]
    for version in VERSIONS:
        for thing in objects:
            kubernetes_validate.validate(thing, version, strict=True)


def test_selectors_find_the_pods(objects: list[dict[str, Any]]) -> None:
    """A disruption budget without a selector guards nothing; an autoscaler names its target."""
    labels = one(objects, "Deployment")["spec"]["template"]["metadata"]["labels"].items()
    assert one(objects, "Service")["spec"]["selector"].items() <= labels
    for kind in ("Deployment", "PodDisruptionBudget"):
        selected = one(objects, kind)["spec"]["selector"]["matchLabels"]
        assert selected and selected.items() <= labels
    target = one(objects, "HorizontalPodAutoscaler")["spec"]["scaleTargetRef"]
    assert (target["kind"], target["name"]) == ("Deployment", one(objects, "Deployment")["metadata"]["name"])
    assert "replicas" not in one(objects, "Deployment")["spec"]  # or each apply would undo the autoscaler's work


def test_the_server_accepts_its_arguments(objects: list[dict[str, Any]], tmp_path: Path) -> None:
    """Parsed by the server's own parser; ports, probes, drain and models agree with what it says."""
    server, spec = container(objects), pod(objects)
    line = parse(list(server["args"]))
    args = parse_vllm(line.words)
    (port,) = server["ports"]
    assert (args.host, args.port, port["name"]) == ("0.0.0.0", port["containerPort"], "http")
    assert one(objects, "Service")["spec"]["ports"][0]["targetPort"] == "http"
    for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
        path = "/live" if probe == "livenessProbe" else "/health"  # a server that drains isn't ready, and isn't to be killed
        assert server[probe]["httpGet"] == {"path": path, "port": "http"}
    pause = int(server["lifecycle"]["preStop"]["exec"]["command"][1])
    assert spec["terminationGracePeriodSeconds"] > pause + args.shutdown_timeout
    # Fewer failures than the drain is long would have the kubelet kill a server that is only finishing its work.
    assert server["livenessProbe"]["failureThreshold"] * server["livenessProbe"]["periodSeconds"] > args.shutdown_timeout

    mounts = [m["mountPath"] for m in server["volumeMounts"]]
    for path in (args.model, *(d.partition("=")[2] for d in line.options.decoder)):
        if path.startswith(MODELS):
            assert (ROOT / "decoders" / "zoo" / path.removeprefix(MODELS) / "config.json").is_file(), path
        elif path.startswith("/"):
            assert any(path.startswith(f"{m}/") for m in mounts), path
        else:
            assert path.count("/") == 1, path  # an id of the hub, which must not be switched off
            assert {"name": "HF_HUB_OFFLINE", "value": "0"} in server["env"]
    gpus = int(server.get("resources", {}).get("limits", {}).get("nvidia.com/gpu", 0))
    assert gpus in (0, args.data_parallel_size * args.tensor_parallel_size)


def test_pods_have_no_rights(objects: list[dict[str, Any]]) -> None:
    """Not root, nothing to write to but volumes, no token, none of the variables that Services would leave."""
    spec = pod(objects)
    assert spec["enableServiceLinks"] is False and spec["automountServiceAccountToken"] is False
    assert spec["securityContext"]["runAsNonRoot"] is True
    assert f"USER {spec['securityContext']['runAsUser']}:" in (ROOT / "Dockerfile").read_text()
    for each in [*spec["containers"], *spec.get("initContainers", [])]:
        assert each["securityContext"] == {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        }
    volumes = {v["name"] for v in spec["volumes"]}
    for each in [*spec["containers"], *spec.get("initContainers", [])]:
        assert {m["name"] for m in each["volumeMounts"]} <= volumes
    assert {"/tmp", "/home/memdec", "/dev/shm"} <= {m["mountPath"] for m in container(objects)["volumeMounts"]}


def test_the_autoscaler_asks_for_what_the_adapter_offers(objects: list[dict[str, Any]]) -> None:
    """One name in both files."""
    (rule,) = yaml.safe_load((MANIFESTS / "prometheus-adapter.yaml").read_text())["rules"]["custom"]
    (metric,) = one(objects, "HorizontalPodAutoscaler")["spec"]["metrics"]
    assert metric["pods"]["metric"]["name"] == rule["name"]["as"]


def test_the_adapters_rule_reads_a_metric_of_the_server(server: Server) -> None:
    """The series it looks for is on the page, a gauge."""
    (rule,) = yaml.safe_load((MANIFESTS / "prometheus-adapter.yaml").read_text())["rules"]["custom"]
    series = rule["seriesQuery"].partition("{")[0]
    page = httpx.get(f"{server.url}/metrics").text
    assert f"# TYPE {series} gauge" in page and re.search(rf"^{series}{{.*}} [\d.]+$", page, re.MULTILINE)
    assert re.fullmatch(rule["name"]["matches"], series)


@needs("promtool", "Debian: apt install prometheus")
def test_the_adapters_query_adds_up_a_pods_engines(tmp_path: Path) -> None:
    """Filled in as prometheus-adapter does, run by promtool; and the scrape configuration beside it is valid, but for its discovery."""
    (rule,) = yaml.safe_load((MANIFESTS / "prometheus-adapter.yaml").read_text())["rules"]["custom"]
    series = rule["seriesQuery"].partition("{")[0]
    filled = {"<<.Series>>": series, "<<.LabelMatchers>>": 'namespace="n",pod=~"a|b"', "<<.GroupBy>>": "pod"}
    query = rule["metricsQuery"]
    for placeholder, value in filled.items():
        query = query.replace(placeholder, value)
    assert "<<" not in query
    values = {("a", "0"): 3, ("a", "1"): 5, ("b", "0"): 1, ("c", "0"): 9}
    test = {
        "evaluation_interval": "15s",
        "tests": [
            {
                "interval": "15s",
                "input_series": [
                    {"series": f'{series}{{namespace="n",pod="{p}",engine="{e}"}}', "values": f"{v}x20"} for (p, e), v in values.items()
                ],
                "promql_expr_test": [
                    {
                        "expr": query,
                        "eval_time": "3m",
                        "exp_samples": [{"labels": '{pod="a"}', "value": 8}, {"labels": '{pod="b"}', "value": 1}],
                    }
                ],
            }
        ],
    }
    (tmp_path / "test.yml").write_text(yaml.safe_dump(test))
    # Debian builds Prometheus without the discovery of Kubernetes' pods, so that one line is another here.
    discovery, config = "kubernetes_sd_configs: [{role: pod}]", (PROMETHEUS / "kubernetes.yml").read_text()
    assert discovery in config
    (tmp_path / "prometheus.yml").write_text(config.replace(discovery, "static_configs: [{targets: [localhost]}]"))
    shutil.copy(PROMETHEUS / "rules.yml", tmp_path)
    for arguments in (["test", "rules", str(tmp_path / "test.yml")], ["check", "config", str(tmp_path / "prometheus.yml")]):
        done = subprocess.run(["promtool", *arguments], capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stdout + done.stderr


def test_prometheus_finds_the_pods() -> None:
    """Its selector and port name are the manifests' own, and the labels that the adapter needs are put on."""
    (job,) = yaml.safe_load((PROMETHEUS / "kubernetes.yml").read_text())["scrape_configs"]
    rules = job["relabel_configs"]
    objects = build(MANIFESTS / "base")
    labels = one(objects, "Deployment")["spec"]["template"]["metadata"]["labels"]
    kept = {r["source_labels"][0]: r["regex"] for r in rules if r.get("action") == "keep"}
    assert kept == {
        "__meta_kubernetes_pod_label_app_kubernetes_io_name": labels["app.kubernetes.io/name"],
        "__meta_kubernetes_pod_container_port_name": container(objects)["ports"][0]["name"],
    }
    assert {r["target_label"] for r in rules if "target_label" in r} == {"namespace", "pod"}


def test_the_page_names_what_is_there() -> None:
    """Overlays, components and files in the commands and tables of docs/deploy.md."""
    page = (ROOT / "docs" / "deploy.md").read_text()
    for path in re.findall(r"(?:-k |-f |=)(deploy/\S+)", page):
        assert (ROOT / path).exists(), path
    assert set(re.findall(r"`(decoders-\w+|api-key)`", page)) == set(COMPONENTS) == {p.name for p in (MANIFESTS / "components").iterdir()}
    assert (
        set(re.findall(r"kubernetes/(overlays/\S+)", page))
        == set(FORMS) - {"base"}
        == {f"overlays/{p.name}" for p in (MANIFESTS / "overlays").iterdir()}
    )
