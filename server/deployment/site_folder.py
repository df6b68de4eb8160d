"""The folder that a site elsewhere is given: what it runs, its key, and the CA it trusts."""

import json
import shutil
from pathlib import Path

from common.errors import ConfigError
from server.deployment.certificates import CA_CERTIFICATE, make_certificates, site_keys

_SITES = "sites.json"
_COMPOSE = """\
# Site {site} of a fedcopra federation; it trains on ./data, which it never sends.
#   docker compose up -d
x-service: &service
  image: ${{FEDCOPRA_IMAGE:-fedcopra:cpu}}
  # Who owns the key here and may read ./data, as .env says; never root.
  user: ${{FEDCOPRA_USER:?}}
  init: true
  read_only: true
  tmpfs: [/tmp]
  cap_drop: [ALL]
  security_opt: ["no-new-privileges:true"]
  restart: unless-stopped
  environment:
    FLWR_HOME: /tmp/flwr
    FLWR_SUPEREXEC_TASK_POLL_INTERVAL: "0.2"

services:
  supernode:
    <<: *service
    entrypoint: [flower-supernode]
    command:
      - --superlink={server}
      - --root-certificates=/run/secrets/ca.crt
      - --auth-supernode-private-key=/run/secrets/key
      - --host=0.0.0.0
      - --port=9094
      - --isolation=process
      - --superexec-auth-secret-file=/run/secrets/superexec-secret
      - --node-config=partition-id={partition}
    networks: [fleet, site]
    secrets: [ca.crt, key, superexec-secret]

  clientapp:
    <<: *service
    entrypoint: [flower-superexec]
    command:
      - --insecure # a network of its own, with its SuperNode alone
      - --runtime-api-address=supernode:9094
      - --superexec-auth-secret-file=/run/secrets/superexec-secret
    networks: [site]
    volumes: ["./data:/app/data/{partition}:ro"]
    secrets: [superexec-secret]
    depends_on: [supernode]

networks:
  fleet: {{}}
  site: {{internal: true}}

secrets:
  ca.crt: {{file: ./ca.crt}}
  key: {{file: ./key}}
  superexec-secret: {{file: ./superexec-secret}}
"""


def known_sites(deployment: Path) -> list[str]:
    """Return the sites of a deployment; the position of each is its partition."""
    file = deployment / _SITES
    return list(json.loads(file.read_text(encoding="utf-8"))) if file.is_file() else []


def remember_sites(deployment: Path, names: list[str]) -> list[str]:
    """Add new names to the sites of a deployment; return all, each in its place."""
    known = known_sites(deployment)
    known += [name for name in names if name not in known]
    (deployment / _SITES).write_text(json.dumps(known) + "\n", encoding="utf-8")
    return known


def write_site_folder(
    deployment: Path, keys: Path, site: str, server: str, user: str, out: Path
) -> int:
    """Make the keys of a new site and write what its host needs into `out`; return its partition.

    `server` is the gateway as the site reaches it, host and port; `user` is `uid:gid` of whom the
    site's containers run as.

    Raises:
        ConfigError: no proper name or server, or the deployment has no CA yet, or knows the site.
    """
    host, colon, port = server.rpartition(":")
    if not colon or not host or not port.isdigit():
        raise ConfigError(f"--server {server}: write HOST:PORT, as in fed.example.org:8443")
    files = site_keys(keys, site)
    if not (keys / CA_CERTIFICATE).is_file():
        raise ConfigError(f"{keys / CA_CERTIFICATE} is missing: make certs makes it")
    if site in known_sites(deployment):
        raise ConfigError(f"site {site} is known already; its key is {files.private}")
    make_certificates(keys, [host], [site])
    partition = remember_sites(deployment, [site]).index(site)
    out.mkdir(parents=True)
    out.chmod(0o700)
    (out / "data").mkdir()
    for source in (keys / CA_CERTIFICATE, files.private, files.secret):
        shutil.copy(source, out / source.name)
    compose = _COMPOSE.format(site=site, server=server, partition=partition)
    (out / "docker-compose.yml").write_text(compose, encoding="utf-8")
    (out / ".env").write_text(f"FEDCOPRA_USER={user}\n", encoding="utf-8")
    return partition
