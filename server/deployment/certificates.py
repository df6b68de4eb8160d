"""Certificates and keys of a deployment: one CA, one server certificate, one key a site.

What is there stays: making them again adds what is missing and renews what has expired, so that
sites that are in use never lose their key. A renewed server certificate is of the same key, holds
all the names of the one before, and is written into the same file: a gateway in a container, which
holds that file, serves it from the next connection on. Secrets are readable by their owner alone.
"""

import datetime
import ipaddress
import secrets
import socket
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    load_pem_private_key,
)
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from common.errors import ConfigError

CA_CERTIFICATE, CA_KEY = "ca.crt", "ca.key"
SERVER_CERTIFICATE, SERVER_KEY = "server.pem", "server.key"
SERVER_SECRET = "superexec-server"
REGISTERED = "registered"  # the folder of public keys
# Names by which the server is reached in a compose network and on its own host.
HOSTS = ("superlink", "gateway", "localhost", "127.0.0.1", "::1")

_CA_DAYS, _SERVER_DAYS, _RENEWED_BEFORE = 3650, 397, 30
_SITE_CHARACTERS = frozenset("abcdefghijklmnopqrstuvwxyz0123456789-")


@dataclass(frozen=True)
class SiteKeys:
    """The files of one site: its private key, the public half, and the secret of its client app."""

    private: Path
    public: Path
    secret: Path


def site_keys(folder: Path, site: str) -> SiteKeys:
    """Return where a site's files are.

    Raises:
        ConfigError: no name for a site: small letters, digits and hyphens make one.
    """
    if not site or set(site) - _SITE_CHARACTERS or site[0] == "-" or len(site) > 40:
        raise ConfigError(
            f"site {site!r}: a name is made of small letters, digits and hyphens, as in hospital-3"
        )
    private = folder / "sites" / site
    public = folder / REGISTERED / f"{site}.pub"
    return SiteKeys(private / "key", public, private / "superexec-secret")


def make_certificates(folder: Path, hosts: Sequence[str], sites: Sequence[str]) -> list[Path]:
    """Make what is missing or about to expire; return the files that were written, in order.

    `hosts` are the names and addresses, beside `HOSTS`, by which sites reach the server.

    Raises:
        ConfigError: a site without a proper name.
    """
    # Names are checked before anything is written.
    keys = [site_keys(folder, site) for site in sites]
    folder.mkdir(parents=True, exist_ok=True)
    folder.chmod(0o700)
    written = _make_ca(folder)
    names = [_general(name) for name in (*HOSTS, *hosts)]
    if written or not _is_current(folder / SERVER_CERTIFICATE, names):
        names += [name for name in _named_before(folder / SERVER_CERTIFICATE) if name not in names]
        written += _make_server(folder, list(dict.fromkeys(names)))
    written += _make_secret(folder / SERVER_SECRET)
    for site in keys:
        written += _make_site(site)
    return written


def host_of_gateway(folder: Path) -> str:
    """Return the name by which sites reach the server: the first of its own, or this machine's."""
    here = {_general(name) for name in HOSTS}
    own = [name for name in _named_before(folder / SERVER_CERTIFICATE) if name not in here]
    return str(own[0].value) if own else socket.getfqdn()


def _make_ca(folder: Path) -> list[Path]:
    certificate, key_file = folder / CA_CERTIFICATE, folder / CA_KEY
    if certificate.exists() and key_file.exists():
        return []
    key = ec.generate_private_key(ec.SECP384R1())
    name = _named("fedcopra CA")
    built = (
        _certificate(name, name, key.public_key(), _CA_DAYS)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_usage(signs_certificates=True), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .sign(key, hashes.SHA256())
    )
    _write_secret(key_file, _pem(key))
    certificate.write_bytes(built.public_bytes(Encoding.PEM))
    return [certificate, key_file]


def _make_server(folder: Path, names: Sequence[x509.GeneralName]) -> list[Path]:
    ca = x509.load_pem_x509_certificate((folder / CA_CERTIFICATE).read_bytes())
    ca_key = _load_key(folder / CA_KEY)
    certificate, key_file = folder / SERVER_CERTIFICATE, folder / SERVER_KEY
    written = [certificate]
    if not key_file.exists():
        _write_secret(key_file, _pem(ec.generate_private_key(ec.SECP384R1())))
        written += [key_file]
    public = _load_key(key_file).public_key()
    built = (
        _certificate(_named("superlink"), ca.subject, public, _SERVER_DAYS)
        .add_extension(x509.SubjectAlternativeName(names), critical=False)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_usage(signs_certificates=False), critical=True)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
        .add_extension(
            x509.AuthorityKeyIdentifier.from_issuer_public_key(ca_key.public_key()), critical=False
        )
        .sign(ca_key, hashes.SHA256())
    )
    certificate.write_bytes(built.public_bytes(Encoding.PEM))
    return written


def _load_key(file: Path) -> ec.EllipticCurvePrivateKey:
    key = load_pem_private_key(file.read_bytes(), password=None)
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise ConfigError(f"{file} is no key on an elliptic curve; remove it to have one made")
    return key


def _make_site(site: SiteKeys) -> list[Path]:
    for file in (site.private, site.public):
        file.parent.mkdir(parents=True, exist_ok=True)
    written = _make_secret(site.secret)
    if not site.private.exists():
        # Flower reads OpenSSH keys on a NIST curve.
        key = ec.generate_private_key(ec.SECP384R1())
        _write_secret(
            site.private, key.private_bytes(Encoding.PEM, PrivateFormat.OpenSSH, NoEncryption())
        )
        site.public.write_bytes(
            key.public_key().public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH) + b"\n"
        )
        written += [site.private, site.public]
    return written


def _make_secret(file: Path) -> list[Path]:
    if file.exists():
        return []
    _write_secret(file, secrets.token_hex(32).encode())
    return [file]


def _is_current(certificate: Path, names: Sequence[x509.GeneralName]) -> bool:
    """Say whether a certificate is there, names all hosts, and lasts for some weeks."""
    if not certificate.exists():
        return False
    found = x509.load_pem_x509_certificate(certificate.read_bytes())
    left = found.not_valid_after_utc - datetime.datetime.now(datetime.UTC)
    return left.days > _RENEWED_BEFORE and set(names) <= set(_named_before(certificate))


def _named_before(certificate: Path) -> list[x509.GeneralName]:
    """Return the names in a certificate; none if there is none."""
    if not certificate.exists():
        return []
    found = x509.load_pem_x509_certificate(certificate.read_bytes())
    return list(found.extensions.get_extension_for_class(x509.SubjectAlternativeName).value)


def _certificate(
    subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePublicKey, days: int
) -> x509.CertificateBuilder:
    now = datetime.datetime.now(datetime.UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(minutes=5))  # clocks differ a little
        .not_valid_after(now + datetime.timedelta(days=days))
    )


def _usage(*, signs_certificates: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not signs_certificates,
        key_cert_sign=signs_certificates,
        crl_sign=signs_certificates,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )


def _named(common_name: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common_name)])


def _general(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        return x509.DNSName(host)


def _pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())


def _write_secret(file: Path, content: bytes) -> None:
    file.unlink(missing_ok=True)
    file.touch(mode=0o600, exist_ok=False)
    file.write_bytes(content)
