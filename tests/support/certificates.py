"""Certificates for servers and clients on loopback: sound ones, and each kind of bad one."""

from __future__ import annotations

import datetime as dt
import ipaddress
import os
from typing import NamedTuple

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

DAY = dt.timedelta(days=1)


class Pair(NamedTuple):
    """A certificate and its key, as PEM files."""

    certificate: str
    key: str


class Authority:
    """A private authority; ``path`` is its certificate, and every file is in ``directory``."""

    def __init__(self, directory: str, name: str = "ca") -> None:
        self.directory = directory
        self.key = ec.generate_private_key(ec.SECP256R1())
        self.name = _name(name)
        made = _builder(self.name, self.name, self.key.public_key(), days=30)
        self.certificate = made.add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True).sign(
            self.key, hashes.SHA256()
        )
        self.path = _write(directory, f"{name}.crt", self.certificate.public_bytes(serialization.Encoding.PEM))

    def issue(self, label: str, *hosts: str, days: int = 30) -> Pair:
        """A certificate for hosts (names or addresses); with negative ``days`` it has expired."""
        key = ec.generate_private_key(ec.SECP256R1())
        builder = _builder(_name(label), self.name, key.public_key(), days=days)
        if hosts:
            builder = builder.add_extension(
                x509.SubjectAlternativeName([_host(host) for host in hosts]), critical=False
            )
        return _pair(self.directory, label, builder.sign(self.key, hashes.SHA256()), key)


def self_signed(directory: str, label: str, *hosts: str) -> Pair:
    key = ec.generate_private_key(ec.SECP256R1())
    builder = _builder(_name(label), _name(label), key.public_key(), days=30)
    builder = builder.add_extension(x509.SubjectAlternativeName([_host(host) for host in hosts]), critical=False)
    return _pair(directory, label, builder.sign(key, hashes.SHA256()), key)


def _builder(
    subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePublicKey, *, days: int
) -> x509.CertificateBuilder:
    now = dt.datetime.now(dt.UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - 60 * DAY)
        .not_valid_after(now + days * DAY)
    )


def _name(text: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, text)])


def _host(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        return x509.DNSName(host)


def _pair(directory: str, label: str, certificate: x509.Certificate, key: ec.EllipticCurvePrivateKey) -> Pair:
    private = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    return Pair(
        _write(directory, f"{label}.cert", certificate.public_bytes(serialization.Encoding.PEM)),
        _write(directory, f"{label}.key", private),
    )


def _write(directory: str, name: str, content: bytes) -> str:
    path = os.path.join(directory, name)
    with open(path, "wb") as file:
        file.write(content)
    return path
