"""The compose files: what is promised of every service, read from the files themselves."""

import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from server.deployment.certificates import make_certificates
from server.deployment.site_folder import write_site_folder

ROOT = Path(__file__).parent.parent


@pytest.fixture(params=["docker-compose.yml", "a site's"])
def composed(request: pytest.FixtureRequest, tmp_path: Path) -> dict[str, Any]:
    """The deployment's file, and the one that a site elsewhere is given."""
    file = ROOT / request.param
    if request.param == "a site's":
        deployment, keys = tmp_path / "deployed", tmp_path / "deployed" / "certificates"
        make_certificates(keys, [], [])
        write_site_folder(deployment, keys, "far", "host:8443", "1000:1000", tmp_path / "far")
        file = tmp_path / "far" / "docker-compose.yml"
    found: dict[str, Any] = yaml.safe_load(file.read_text(encoding="utf-8"))
    return found


def test_no_service_can_write_its_system_or_gain_rights(composed: dict[str, Any]) -> None:
    assert composed["services"]
    for name, service in composed["services"].items():
        assert service["read_only"] is True, name
        assert service["cap_drop"] == ["ALL"], name
        assert service["security_opt"] == ["no-new-privileges:true"], name
        assert "FEDCOPRA_USER" in service["user"], name
        assert not service.get("privileged"), name


def test_secrets_are_files_and_nothing_of_them_is_in_the_environment(
    composed: dict[str, Any],
) -> None:
    assert all(set(secret) == {"file"} for secret in composed["secrets"].values())
    for name, service in composed["services"].items():
        assert not [
            key for key in service.get("environment", {}) if "KEY" in key or "SECRET" in key
        ]
        for secret in service.get("secrets", []):
            assert secret in composed["secrets"], name


def test_the_control_port_is_published_on_loopback_and_only_the_gateway_beyond() -> None:
    services = yaml.safe_load((ROOT / "docker-compose.yml").read_text(encoding="utf-8"))["services"]
    published = {name: service["ports"] for name, service in services.items() if "ports" in service}
    assert set(published) == {"superlink", "gateway"}
    assert all(port.startswith("127.0.0.1:") for port in published["superlink"])


def test_a_site_opens_no_port_and_its_clientapp_meets_its_supernode_alone(
    composed: dict[str, Any],
) -> None:
    services = composed["services"]
    clients = {name: service for name, service in services.items() if "clientapp" in name}
    assert clients
    for name, client in clients.items():
        [network] = client["networks"]
        assert composed["networks"][network] == {"internal": True}
        there = {other for other, it in services.items() if network in it["networks"]}
        assert there == {name, name.replace("clientapp", "supernode")}
        assert "ports" not in client
        assert all(volume.endswith(":ro") for volume in client["volumes"])


def test_a_site_s_rows_are_where_its_number_says(composed: dict[str, Any]) -> None:
    for name, client in composed["services"].items():
        if "clientapp" not in name:
            continue
        node = composed["services"][name.replace("clientapp", "supernode")]
        [number] = [c.rpartition("=")[2] for c in node["command"] if "partition-id" in c]
        assert [v.split(":")[1] for v in client["volumes"]] == [f"/app/data/{number}"]


def test_compose_of_the_first_generation_takes_the_files_too() -> None:
    if shutil.which("docker-compose") is None:
        pytest.skip("there is no docker-compose here")
    for files in (["docker-compose.yml"], ["docker-compose.yml", "docker-compose.gpu.yml"]):
        chosen = [part for file in files for part in ("-f", file)]
        done = subprocess.run(
            ["docker-compose", *chosen, "config", "--quiet"],
            cwd=ROOT,
            env={"PATH": "/usr/bin:/bin:/usr/local/bin", "FEDCOPRA_USER": "1000:1000"},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr


def test_the_gpu_overlay_is_of_the_services_that_train() -> None:
    overlay = yaml.safe_load((ROOT / "docker-compose.gpu.yml").read_text(encoding="utf-8"))
    services = yaml.safe_load((ROOT / "docker-compose.yml").read_text(encoding="utf-8"))["services"]
    assert set(overlay["services"]) == {name for name in services if "clientapp" in name}
    for service in overlay["services"].values():
        [device] = service["deploy"]["resources"]["reservations"]["devices"]
        assert device == {"driver": "nvidia", "count": 1, "capabilities": ["gpu"]}
