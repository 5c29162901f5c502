"""The files in deploy/ are what they claim to be, as far as programs on this machine can tell."""

import configparser
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

COMMAND = ["serve", "/models/base", "--engine", "vllm", "--host", "0.0.0.0", "--port", "8000"]


@pytest.fixture(scope="module")
def deploy(root: Path) -> Path:
    """Return the folder."""
    return root / "deploy"


@pytest.fixture(scope="module")
def documents(deploy) -> dict[str, dict]:
    """Return Kubernetes' documents by kind."""
    return {each["kind"]: each for each in yaml.safe_load_all((deploy / "kubernetes.yaml").read_text())}


@pytest.fixture(scope="module")
def compose(deploy) -> dict:
    """Return what compose.yaml says."""
    return yaml.safe_load((deploy / "compose.yaml").read_text())


def test_kubernetes_documents_belong_together(documents):
    pod = documents["Deployment"]["spec"]["template"]
    labels = pod["metadata"]["labels"]
    assert documents["Deployment"]["spec"]["selector"]["matchLabels"] == labels
    assert documents["Service"]["spec"]["selector"] == labels
    assert documents["PodDisruptionBudget"]["spec"]["selector"]["matchLabels"] == labels
    assert documents["NetworkPolicy"]["spec"]["podSelector"]["matchLabels"] == labels
    (container,) = pod["spec"]["containers"]
    names = {port["name"] for port in container["ports"]}
    used = {documents["Service"]["spec"]["ports"][0]["targetPort"], container["readinessProbe"]["httpGet"]["port"]}
    assert used == names == {"api"}
    assert {each["name"] for each in container["volumeMounts"]} == {each["name"] for each in pod["spec"]["volumes"]}


def test_the_gateway_has_the_only_port(documents, compose):
    (container,) = documents["Deployment"]["spec"]["template"]["spec"]["containers"]
    assert [port["containerPort"] for port in container["ports"]] == [8000]
    published = {name: each["ports"] for name, each in compose["services"].items() if "ports" in each}
    assert published == {"front": ["443:443"]}


def test_everywhere_the_same_command(documents, compose, deploy):
    (container,) = documents["Deployment"]["spec"]["template"]["spec"]["containers"]
    assert container["args"] == COMMAND
    assert compose["services"]["gateway-a"]["command"] == COMMAND
    unit = (deploy / "luthier.service").read_text()
    assert "luthier serve /srv/models/base --engine vllm --host" in unit


def test_the_command_is_one_that_luthier_knows():
    from typer.main import get_command

    from luthier.cli.app import app

    serve = get_command(app).commands["serve"]
    parsed = serve.make_context("serve", COMMAND[1:])
    assert (parsed.params["model"], parsed.params["engine"], parsed.params["port"]) == ("/models/base", "vllm", 8000)


def test_compose_gives_the_gateways_the_addresses_that_nginx_knows(compose, deploy):
    given = {compose["services"][name]["networks"]["default"]["ipv4_address"] for name in ("gateway-a", "gateway-b")}
    known = {
        line.split()[1].partition(":")[0] for line in (deploy / "nginx.conf").read_text().splitlines() if " server 10." in line
    }
    assert given == known
    assert set(compose["services"]["front"]["depends_on"]) <= compose["services"].keys()


def test_the_unit_is_one(deploy):
    unit = configparser.ConfigParser(strict=True, interpolation=None)
    unit.optionxform = str
    unit.read(deploy / "luthier.service")
    assert set(unit.sections()) == {"Unit", "Service", "Install"}
    assert unit["Service"]["KillMode"] == "mixed" and "net" in unit["Service"]["RestrictNamespaces"].split()


def test_systemd_takes_the_unit(deploy, tmp_path):
    if shutil.which("systemd-analyze") is None:
        pytest.skip("systemd-analyze is not here")
    unit = (deploy / "luthier.service").read_text().replace("/opt/luthier/bin/luthier", "/bin/true")
    (tmp_path / "luthier.service").write_text(unit.replace("User=luthier\n", ""))
    checked = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", tmp_path / "luthier.service"], capture_output=True, text=True, check=False
    )
    faults = [line for line in checked.stderr.splitlines() if "luthier.service" in line]
    assert faults == [], checked.stderr


def test_nginx_takes_its_configuration(deploy, tmp_path):
    if shutil.which("nginx") is None or shutil.which("openssl") is None:
        pytest.skip("nginx and openssl are not here (Debian: apt-get install nginx-light openssl)")
    key, certificate = tmp_path / "tls.key", tmp_path / "tls.crt"
    made = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "1", "-subj", "/CN=test"]
    subprocess.run([*made, "-keyout", key, "-out", certificate], check=True, capture_output=True)
    text = (deploy / "nginx.conf").read_text().replace("/etc/luthier", str(tmp_path)).replace("/var/log/nginx", str(tmp_path))
    (tmp_path / "nginx.conf").write_text(text.replace("/run/nginx.pid", str(tmp_path / "pid")))
    checked = subprocess.run(
        ["nginx", "-t", "-p", tmp_path, "-c", tmp_path / "nginx.conf"], capture_output=True, text=True, check=False
    )
    assert checked.returncode == 0, checked.stderr
    assert "warn" not in checked.stderr.replace("could not open error log file", "")


def test_the_image_has_both_environments(deploy, root):
    text = (deploy / "Dockerfile").read_text()
    assert "LUTHIER_VLLM_PYTHON=/opt/luthier-vllm/bin/python" in text
    pinned = next(line for line in (root / "constraints-vllm.txt").read_text().splitlines() if line.startswith("vllm"))
    assert pinned.replace("_", "-") in text
