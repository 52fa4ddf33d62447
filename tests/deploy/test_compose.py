"""docker-compose.yml and Grafana's provisioning: they name files, ports and services that exist."""

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import ROOT
from tools import needs

from memdec.server.launch.vllm_arguments import SHUTDOWN_TIMEOUT

COMPOSE: dict[str, Any] = yaml.safe_load((ROOT / "docker-compose.yml").read_text())
SERVICES: dict[str, Any] = COMPOSE["services"]
GRAFANA = ROOT / "deploy" / "grafana"
DASHBOARD = json.loads((GRAFANA / "dashboards" / "memdec.json").read_text())


def mounts(service: str) -> dict[str, Path]:
    """Bind mounts of a service: target in the container to the file or folder here."""
    parts = [v.split(":") for v in SERVICES[service].get("volumes", [])]
    return {p[1]: ROOT / p[0] for p in parts if p[0].startswith(".")}


def here(service: str, path: str) -> Path:
    """What a path in a service's container is in the repository."""
    (target,) = [t for t in mounts(service) if path.startswith(t)]
    return mounts(service)[target] / path.removeprefix(target).lstrip("/")


def test_services() -> None:
    """Server, Prometheus and Grafana by default, locust when asked; images of others are pinned to a version, ours is a target of the Dockerfile."""
    assert {name for name, s in SERVICES.items() if "profiles" not in s} == {"server", "prometheus", "grafana"}
    assert SERVICES["locust"]["profiles"] == ["load"]
    for name, service in SERVICES.items():
        if "build" in service:
            assert f" AS {service['build']['target']}\n" in (ROOT / "Dockerfile").read_text()
        else:
            assert re.search(r":v?\d+\.\d+\.\d+$", service["image"]), name
        for port in service.get("ports", []):
            assert port.startswith("127.0.0.1:"), port  # none of them asks for a key
    pinned = dict(line.split("==") for line in (ROOT / "requirements" / "dev.txt").read_text().splitlines() if "==" in line)
    assert SERVICES["locust"]["image"].endswith(f":{pinned['locust']}")
    assert int(SERVICES["server"]["stop_grace_period"].removesuffix("s")) > SHUTDOWN_TIMEOUT


def test_what_is_mounted_exists() -> None:
    """Folders, and the files in them that commands and settings name."""
    for name in SERVICES:
        for source in mounts(name).values():
            assert source.is_dir(), source
    command = SERVICES["prometheus"]["command"]
    assert here("prometheus", command[0].partition("=")[2]).is_file()
    assert here("grafana", SERVICES["grafana"]["environment"]["GF_DASHBOARDS_DEFAULT_HOME_DASHBOARD_PATH"]).is_file()
    assert here("locust", SERVICES["locust"]["command"][1]).is_file()


def test_addresses_within_the_network() -> None:
    """Prometheus scrapes the server, Grafana asks Prometheus, locust loads the server: by service name, at the port each listens on."""
    ports = {name: s["ports"][0].split(":")[-1] for name, s in SERVICES.items() if "ports" in s}
    (job,) = yaml.safe_load((ROOT / "deploy" / "prometheus" / "prometheus.yml").read_text())["scrape_configs"]
    assert job["static_configs"][0]["targets"] == [f"server:{ports['server']}"]
    (source,) = yaml.safe_load(next((GRAFANA / "provisioning" / "datasources").iterdir()).read_text())["datasources"]
    assert source["url"] == f"http://prometheus:{ports['prometheus']}"
    assert f"http://server:{ports['server']}" in SERVICES["locust"]["command"]


def test_grafana_finds_dashboard_and_datasource() -> None:
    """The provider's folder is mounted and holds the dashboard, whose queries go to the default datasource, or to one that is provisioned."""
    (provider,) = yaml.safe_load((GRAFANA / "provisioning" / "dashboards" / "memdec.yml").read_text())["providers"]
    assert here("grafana", provider["options"]["path"]) == GRAFANA / "dashboards"
    (source,) = yaml.safe_load((GRAFANA / "provisioning" / "datasources" / "prometheus.yml").read_text())["datasources"]
    assert source["isDefault"] and source["type"] == "prometheus"
    (variable,) = [v for v in DASHBOARD["templating"]["list"] if v["type"] == "datasource"]
    assert variable["query"] == source["type"]
    used = {p["datasource"]["uid"] for p in DASHBOARD["panels"]} | {
        v["datasource"]["uid"] for v in DASHBOARD["templating"]["list"] if "datasource" in v
    }
    assert used <= {f"${{{variable['name']}}}", source["uid"]}


def compose_command() -> list[str] | None:
    """Docker's compose plugin, or the program of that name."""
    plugin = ["docker", "compose"]
    if shutil.which("docker") and subprocess.run([*plugin, "version"], capture_output=True).returncode == 0:
        return plugin
    return ["docker-compose"] if shutil.which("docker-compose") else None


@needs("docker-compose", "Debian: apt install docker-compose", found=" ".join(compose_command() or []))
@pytest.mark.parametrize("files", [["docker-compose.yml"], ["docker-compose.yml", "deploy/compose.cuda.yml"]], ids=["cpu", "cuda"])
def test_compose_accepts_it(files: list[str]) -> None:
    """`docker compose config`, with all profiles."""
    words = [word for file in files for word in ("-f", file)]
    command = compose_command()
    assert command is not None
    done = subprocess.run([*command, *words, "--profile", "load", "config"], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    read = yaml.safe_load(done.stdout)["services"]
    assert read.keys() == SERVICES.keys()
    assert read["server"]["build"]["target"] == ("cuda" if len(files) > 1 else "cpu")
