"""A certificate that a test server makes for itself (X.509, RFC 5280), and the authority that signs it."""

from __future__ import annotations

import datetime as dt
import fcntl
import ipaddress
import os
import tempfile
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, NamedTuple

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

LIFE = dt.timedelta(days=30)
SKEW = dt.timedelta(hours=1)


class Pem(NamedTuple):
    """Files in PEM: the authority to trust, the server's certificate and its key."""

    authority: str
    certificate: str
    key: str


def make(directory: str, hosts: Iterable[str]) -> Pem:
    """An authority of its own and a server certificate for ``hosts`` (names, addresses): files in ``directory``.

    Those that are there already and will do stay: who trusts the authority need not be told again.
    """
    wanted = [_alternative(host) for host in hosts]
    with _locked(directory):
        return _make(directory, wanted)


def _make(directory: str, wanted: list[x509.GeneralName]) -> Pem:
    made = Pem(*(os.path.join(directory, name) for name in ("ca.crt", "server.crt", "server.key")))
    if _will_do(made, wanted):
        return made
    authority_key, server_key = ec.generate_private_key(ec.SECP256R1()), ec.generate_private_key(ec.SECP256R1())
    issuer = _name("containerkit registry authority")
    authority = (
        _builder(issuer, issuer, authority_key.public_key())
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_usage(signs=True), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(authority_key.public_key()), critical=False)
        .sign(authority_key, hashes.SHA256())
    )
    identifier = x509.AuthorityKeyIdentifier.from_issuer_public_key(authority_key.public_key())
    server = (
        _builder(_name("containerkit registry"), issuer, server_key.public_key())
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(x509.SubjectAlternativeName(wanted), critical=False)
        .add_extension(_usage(signs=False), critical=True)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
        .add_extension(identifier, critical=False)
        .sign(authority_key, hashes.SHA256())
    )
    pem = serialization.Encoding.PEM
    with suppress(FileNotFoundError):
        os.unlink(made.certificate)  # an older one does not fit the new key
    _write(made.authority, authority.public_bytes(pem))
    _write(made.key, _private(server_key))
    _write(made.certificate, server.public_bytes(pem))  # last: with it the others are there, and fit
    return made


@contextmanager
def _locked(directory: str) -> Iterator[None]:
    """One process at a time."""
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        yield
    finally:
        os.close(fd)


def _will_do(made: Pem, wanted: list[x509.GeneralName]) -> bool:
    """Whether the files are there, for these names, and good for at least half their life."""
    try:
        with open(made.certificate, "rb") as file:
            certificate = x509.load_pem_x509_certificate(file.read())
        names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except (OSError, ValueError, x509.ExtensionNotFound):
        return False
    fresh = certificate.not_valid_after_utc - dt.datetime.now(dt.UTC) > LIFE / 2
    return fresh and set(wanted) <= set(names) and all(os.path.exists(path) for path in made)


def _builder(subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePublicKey) -> x509.CertificateBuilder:
    now = dt.datetime.now(dt.UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - SKEW)
        .not_valid_after(now + LIFE)
    )


def _usage(*, signs: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not signs,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=signs,
        crl_sign=signs,
        encipher_only=False,
        decipher_only=False,
    )


def _name(common: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common)])


def _alternative(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        return x509.DNSName(host)


def _private(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )


def _write(path: str, content: bytes) -> None:
    fd, temporary = tempfile.mkstemp(dir=os.path.dirname(path))  # its mode is 0600
    with open(fd, "wb") as file:
        file.write(content)
    os.rename(temporary, path)
