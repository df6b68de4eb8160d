"""The command line of deployments: `certs`, `site new` and `run`."""

import os
from pathlib import Path
from typing import Annotated

import typer

from common.config import load_experiment, parse_assignments
from common.errors import ConfigError
from server.commands.console import console
from server.folders import refuse_existing

site = typer.Typer(help="Sites of a deployment.", no_args_is_help=True)

Deployment = Annotated[
    Path, typer.Option("--deployment", help="The folder of keys, state and results.")
]
_FOLDER = Path("deployed")
_SITES = "site-1,site-2"
_SUPERLINK, _CONTROL = "127.0.0.1:8000", "Host and port of the SuperLink's control API."
# Of the image's user, for when a deployment is set up by root, as nobody should be in a container.
_IMAGE_USER = 49999


def certs(
    sites: Annotated[str, typer.Option(help="Names of sites, with commas.")] = _SITES,
    hosts: Annotated[
        str, typer.Option(help="Names and addresses by which sites reach the server, with commas.")
    ] = "",
    deployment: Deployment = _FOLDER,
) -> None:
    """Make the CA, the server's certificate and a key for each site; what is there stays.

    Also writes .env, which says as whom the containers run.

    Example: fedcopra certs --sites hospital-1,hospital-2 --hosts fed.example.org
    """
    from server.deployment.certificates import make_certificates
    from server.deployment.site_folder import remember_sites
    from server.deployment.submission import CERTIFICATES, RESULTS

    named = [name.strip() for name in sites.split(",") if name.strip()]
    reached = [host.strip() for host in hosts.split(",") if host.strip()]
    written = make_certificates(deployment / CERTIFICATES, reached, named)
    for folder in (RESULTS, "state", "data/server", *(f"data/{name}" for name in named)):
        (deployment / folder).mkdir(parents=True, exist_ok=True)
    remember_sites(deployment, named)
    _give_to_container_user(deployment)
    user, group = _container_user()
    Path(".env").write_text(f"FEDCOPRA_USER={user}:{group}\n", encoding="utf-8")
    for file in written:
        console.print(str(file), soft_wrap=True)
    console.print("nothing was missing" if not written else f"{len(written)} files written")


@site.command("new")
def new_site(
    name: Annotated[str, typer.Argument(help="Small letters, digits and hyphens: hospital-3.")],
    server: Annotated[
        str,
        typer.Option(help="The gateway as the site reaches it: HOST:PORT; else as certs knows it."),
    ] = "",
    out: Annotated[Path | None, typer.Option("--out", help="The folder to write.")] = None,
    deployment: Deployment = _FOLDER,
    superlink: Annotated[str, typer.Option(help=_CONTROL)] = _SUPERLINK,
) -> None:
    """Make a folder that lets a site elsewhere join, and put its key on the SuperLink's list.

    The folder has the site's services, its key, and the CA it trusts.

    Example: fedcopra site new hospital-3 --server fed.example.org:8443
    """
    folder = out or Path(name)
    refuse_existing(folder)
    from server.deployment.certificates import REGISTERED, host_of_gateway
    from server.deployment.flower_cli import UnreachableError
    from server.deployment.registration import register
    from server.deployment.site_folder import write_site_folder
    from server.deployment.submission import CERTIFICATES, connected

    keys, user = deployment / CERTIFICATES, "{}:{}".format(*_container_user())
    reached = server or f"{host_of_gateway(keys)}:8443"
    partition = write_site_folder(deployment, keys, name, reached, user, folder)
    _give_to_container_user(deployment, folder)
    console.print(f"{folder} is for {name}, client {partition}: bring it there on a safe way")
    console.print(
        f"there, with the image and the site's rows in {folder}/data: docker compose up -d; "
        f"it will call {reached}",
        soft_wrap=True,
    )
    try:
        register(connected(superlink, deployment, insecure=False), keys / REGISTERED)
        console.print(f"its key is registered at {superlink}")
    except UnreachableError:
        console.print(f"no SuperLink at {superlink}; docker compose up -d will register its key")


def _give_to_container_user(*folders: Path) -> None:
    """Let the containers' user read its keys, where root has made them."""
    if os.geteuid() == 0:
        user, group = _container_user()
        for folder in folders:
            for place in (folder, *folder.rglob("*")):
                os.chown(place, user, group)


def _container_user() -> tuple[int, int]:
    """Return the owner of keys and results: who runs this, but never root."""
    if os.geteuid() == 0:
        return _IMAGE_USER, _IMAGE_USER
    return os.geteuid(), os.getegid()


def run(
    file: Annotated[Path, typer.Argument(help="An experiment file, as in experiments/.")],
    on: Annotated[str, typer.Option("--on", help="Where clients are: deployment.")],
    assignments: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Override a key; may be repeated."),
    ] = None,
    out: Annotated[
        Path | None, typer.Option("--out", help="The folder to write; it must not exist.")
    ] = None,
    deployment: Deployment = _FOLDER,
    superlink: Annotated[str, typer.Option(help=_CONTROL)] = _SUPERLINK,
    results: Annotated[
        Path | None,
        typer.Option(help="Where the ServerApp writes, as seen from here: DEPLOYMENT/results."),
    ] = None,
    insecure: Annotated[
        bool, typer.Option("--insecure", help="Plain HTTP: for tests on one machine only.")
    ] = False,
) -> None:
    """Submit an experiment to a deployment, follow it, and fetch its record, model and report.

    Example: fedcopra run experiments/digits.toml --on deployment --set partition.clients=2
    """
    if on != "deployment":
        raise ConfigError(f"--on {on}: choose deployment; fedcopra simulate runs on this machine")
    experiment = load_experiment(file, parse_assignments(assignments or []))
    folder = out or Path("runs") / f"{file.stem}-{experiment.strategy_name}-deployed"
    refuse_existing(folder)
    if insecure:
        console.print("warning: plain HTTP; anyone on the way can read and change what is sent")
    from server.deployment.submission import RESULTS, connected, run_on_deployment
    from server.folders import REPORT

    link = connected(superlink, deployment, insecure=insecure)

    def say(line: str) -> None:
        console.print(line, soft_wrap=True)

    run_on_deployment(experiment, link, results or deployment / RESULTS, folder, say)
    console.print(f"record and report: {folder / REPORT}", soft_wrap=True)
