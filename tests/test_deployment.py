"""Deployment on processes: the same experiment, over TLS, by clients that must show a key."""

import ast
import json
import tomllib
from collections.abc import Iterator, Mapping
from itertools import islice
from pathlib import Path

import pytest
from deployed_processes import SITES, Deployment
from PIL import Image
from sklearn.datasets import load_digits

from common.config import Experiment, load_experiment
from common.errors import ConfigError, FedcopraError
from common.installed_code import code_digest, refuse_other_code
from server.deployment.certificates import make_certificates, site_keys
from server.deployment.submission import connected, run_on_deployment, write_bundle
from server.simulation import simulate

ROOT = Path(__file__).parent.parent


SHORT = {
    "partition.clients": 2,
    "federation.rounds": 2,
    "federation.workers": 0,
    "train.local_steps": 3,
}


def short_digits() -> Experiment:
    return load_experiment(ROOT / "experiments" / "digits.toml", SHORT)


def start_nodes(deployment: Deployment) -> None:
    """Start the nodes that no test before has started."""
    for partition, site in enumerate(SITES):
        if site not in deployment.running:
            deployment.start_node(site, partition)


@pytest.fixture(scope="module")
def deployment(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Deployment]:
    """A SuperLink without nodes."""
    deployment = Deployment(tmp_path_factory.mktemp("deployed"))
    try:
        deployment.start_server()
        yield deployment
    finally:
        deployment.stop()


def test_two_sites_over_tls_give_the_digest_of_the_simulation(
    deployment: Deployment, tmp_path: Path
) -> None:
    experiment = short_digits()
    start_nodes(deployment)
    said: list[str] = []
    out = tmp_path / "run"
    run_on_deployment(experiment, deployment.superlink, deployment.results, out, said.append)
    record = json.loads((out / "record.json").read_text(encoding="utf-8"))
    [simulated] = simulate([experiment], lambda *_: None)
    assert record["digest"] == simulated.outcomes.digest
    assert [client["status"] for client in record["rounds"][-1]["clients"]] == ["ok", "ok"]
    assert {file.name for file in out.iterdir()} >= {"report.html", "served.safetensors"}
    assert sum(line.startswith("round ") for line in said) == 2
    assert said[-1] == "finished:completed" or "finished:completed" in said


@pytest.mark.slow
def test_sites_that_train_on_folders_of_their_own_give_the_digest_of_the_simulation(
    deployment: Deployment, tmp_path: Path
) -> None:
    draw_digits(deployment.folder / "data", {"0/train": 60, "1/train": 40, "server/test": 100})

    def at(path: str) -> Experiment:
        sites = {
            "task.path": path,
            "task.labels": list("0123456789"),
            "task.probe_examples": 0,
            "partition.kind": "sites",
            "strategy": {"name": "fedavg"},
        }
        return load_experiment(ROOT / "experiments" / "digits.toml", {**SHORT, **sites})

    start_nodes(deployment)
    out = tmp_path / "run"
    deployed = at("data/{site}")  # below the folder in which each part of the deployment runs
    run_on_deployment(deployed, deployment.superlink, deployment.results, out, lambda _: None)
    record = json.loads((out / "record.json").read_text(encoding="utf-8"))
    [simulated] = simulate([at(f"{deployment.folder}/data/{{site}}")], lambda *_: None)
    assert record["digest"] == simulated.outcomes.digest
    assert [client["num_examples"] for client in record["rounds"][-1]["clients"]] == [60, 40]
    assert record["task"]["sizes"]["test"] == 100


def draw_digits(folder: Path, counts: Mapping[str, int]) -> None:
    """Write scikit-learn's digits as pictures, so many to each split."""
    digits = load_digits()
    rows = iter(zip(digits.images, digits.target, strict=True))
    for split, count in counts.items():
        for number, (pixels, label) in enumerate(islice(rows, count)):
            place = folder / split / str(label)
            place.mkdir(parents=True, exist_ok=True)
            picture = Image.fromarray((pixels * 15).astype("uint8")).resize((28, 28))
            picture.save(place / f"{number}.png")


@pytest.mark.parametrize("stranger", ["a key that nobody registered", "another CA", "no key"])
def test_who_has_no_key_or_another_ca_is_not_let_in(
    deployment: Deployment, tmp_path: Path, stranger: str
) -> None:
    foreign = tmp_path / "foreign"
    make_certificates(foreign, [], ["stranger"])
    node = {
        "a key that nobody registered": {"key": site_keys(foreign, "stranger").private},
        "another CA": {"ca": foreign / "ca.crt"},
        "no key": {"has_key": False},
    }[stranger]
    process = deployment.start_node("site-1", 0, **node, name=stranger)
    assert process.wait(timeout=120) != 0
    said = deployment.log(stranger)
    assert "Exit Code: 305" in said
    reason = {
        "a key that nobody registered": "[code: 2004]",
        "another CA": "CERTIFICATE_VERIFY_FAILED",
        "no key": "[code: 2001]",
    }[stranger]
    assert reason in said


def test_the_bundle_is_imports_and_the_experiment_as_text(tmp_path: Path) -> None:
    experiment = short_digits()
    write_bundle(experiment, tmp_path)
    app = tomllib.loads((tmp_path / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["flwr"]
    config = app["app"]["config"]
    assert Experiment.model_validate_json(config["experiment"]) == experiment
    assert config["code"] == code_digest()
    for component in app["app"]["components"].values():
        module, name = component.split(":")
        tree = ast.parse((tmp_path / f"{module}.py").read_text(encoding="utf-8"))
        assert name in [
            target.id
            for node in tree.body
            if isinstance(node, ast.Assign)
            for target in node.targets
            if isinstance(target, ast.Name)
        ]
    assert sum(file.stat().st_size for file in tmp_path.iterdir()) < 20_000


def test_other_code_is_refused_by_name() -> None:
    refuse_other_code(code_digest(), "here")
    with pytest.raises(FedcopraError, match=r"this site has .*submitted with 0123"):
        refuse_other_code("0123", "this site")


def test_without_a_ca_nothing_is_submitted(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="make certs"):
        connected("127.0.0.1:8000", tmp_path, insecure=False)
    assert connected("127.0.0.1:8000", tmp_path, insecure=True).ca is None
