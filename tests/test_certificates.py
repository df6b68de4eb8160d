"""Keys and certificates: what is made is valid, secret, and never made twice."""

import datetime
import stat
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import (
    load_pem_private_key,
    load_ssh_private_key,
    load_ssh_public_key,
)
from cryptography.x509.verification import PolicyBuilder, Store, VerificationError

from common.errors import ConfigError
from server.deployment import certificates
from server.deployment.certificates import make_certificates, site_keys

SITES = ("site-1", "site-2")


@pytest.fixture
def made(tmp_path: Path) -> Path:
    make_certificates(tmp_path / "keys", ["fed.example.org", "192.0.2.7"], SITES)
    return tmp_path / "keys"


def server_certificate(folder: Path) -> x509.Certificate:
    return x509.load_pem_x509_certificate((folder / "server.pem").read_bytes())


def verify(folder: Path, ca: Path, host: str) -> None:
    """As a TLS client does: chain, dates, purpose and name."""
    roots = Store([x509.load_pem_x509_certificate((ca / "ca.crt").read_bytes())])
    name = x509.DNSName(host)
    PolicyBuilder().store(roots).build_server_verifier(name).verify(server_certificate(folder), [])


@pytest.mark.parametrize("host", ["superlink", "gateway", "localhost", "fed.example.org"])
def test_the_server_is_trusted_under_each_of_its_names(made: Path, host: str) -> None:
    verify(made, made, host)


def test_it_is_not_trusted_under_another_name_or_by_another_ca(made: Path, tmp_path: Path) -> None:
    with pytest.raises(VerificationError):
        verify(made, made, "elsewhere.example.org")
    make_certificates(tmp_path / "foreign", [], [])
    with pytest.raises(VerificationError):
        verify(made, tmp_path / "foreign", "superlink")


def test_addresses_are_named_as_addresses(made: Path) -> None:
    named = server_certificate(made).extensions.get_extension_for_class(x509.SubjectAlternativeName)
    found = {str(address) for address in named.value.get_values_for_type(x509.IPAddress)}
    assert found == {"127.0.0.1", "::1", "192.0.2.7"}


def test_a_site_s_public_key_is_that_of_its_private_one_on_the_curve_that_flower_reads(
    made: Path,
) -> None:
    keys = site_keys(made, "site-1")
    private = load_ssh_private_key(keys.private.read_bytes(), password=None)
    assert isinstance(private, ec.EllipticCurvePrivateKey)
    assert private.curve.name == "secp384r1"
    assert load_ssh_public_key(keys.public.read_bytes()) == private.public_key()
    assert keys.secret.read_bytes() != site_keys(made, "site-2").secret.read_bytes()


def test_only_the_owner_reads_secrets(made: Path) -> None:
    secret = [made / "ca.key", made / "server.key", made / "superexec-server"]
    for site in SITES:
        secret += [site_keys(made, site).private, site_keys(made, site).secret]
    for file in secret:
        assert stat.S_IMODE(file.stat().st_mode) == 0o600, file
    assert stat.S_IMODE(made.stat().st_mode) == 0o700


def test_made_again_nothing_changes_and_a_new_site_is_all_that_is_added(made: Path) -> None:
    before = {file: file.read_bytes() for file in made.rglob("*") if file.is_file()}
    assert make_certificates(made, ["fed.example.org", "192.0.2.7"], SITES) == []
    written = make_certificates(made, ["fed.example.org"], [*SITES, "site-3"])
    keys = site_keys(made, "site-3")
    assert set(written) == {keys.private, keys.public, keys.secret}
    assert {file: file.read_bytes() for file in before} == before


def test_a_new_host_needs_a_new_server_certificate_of_the_same_ca(made: Path) -> None:
    ca = (made / "ca.crt").read_bytes()
    key, file = (made / "server.key").read_bytes(), (made / "server.pem").stat().st_ino
    written = make_certificates(made, ["other.example.org"], SITES)
    assert {file.name for file in written} == {"server.pem"}
    assert (made / "ca.crt").read_bytes() == ca
    verify(made, made, "other.example.org")
    verify(made, made, "fed.example.org")  # sites that know the server by this name stay
    # A gateway in a container holds the file, not its name, and the key beside it.
    assert (made / "server.pem").stat().st_ino == file
    assert (made / "server.key").read_bytes() == key


def test_what_is_about_to_expire_is_renewed(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    left = server_certificate(made).not_valid_after_utc - datetime.datetime.now(datetime.UTC)
    monkeypatch.setattr(certificates, "_RENEWED_BEFORE", left.days + 1)
    written = make_certificates(made, [], SITES)
    assert {file.name for file in written} == {"server.pem"}
    key = load_pem_private_key((made / "server.key").read_bytes(), password=None)
    assert server_certificate(made).public_key() == key.public_key()


@pytest.mark.parametrize("name", ["", "../up", "Site", "a b", "-x", "a" * 41])
def test_a_name_that_is_none_is_refused_before_anything_is_written(
    tmp_path: Path, name: str
) -> None:
    with pytest.raises(ConfigError, match="hospital-3"):
        make_certificates(tmp_path / "keys", [], ["site-1", name])
    assert not (tmp_path / "keys").exists()
