"""Certificates of the webhook: a CA of its own for each serving certificate, and when which is used. Needs cryptography.

    issued                   current
    2/3 of its life are over  current, next     the API server is told to trust both CAs
    an hour after that        next is current   the CA of the one before is trusted until it ends

A CA signs one certificate, and its key is thrown away. So a Secret that somebody reads signs nothing new.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from functools import cached_property

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

SKEW = timedelta(hours=1)  # that clocks may differ


@dataclass(frozen=True, slots=True)
class Lifetimes:
    """How long a certificate is good, and when the next one is made and used."""

    validity: timedelta = timedelta(days=90)
    renewal: timedelta = timedelta(days=60)  # age at which the next one is made
    overlap: timedelta = timedelta(hours=1)  # that the next one's CA is trusted before it is used


@dataclass(frozen=True)
class Pair:
    """A serving certificate with its key and its CA, as PEM. Raises ValueError when it is read, if it is none."""

    certificate: bytes
    key: bytes
    authority: bytes

    @cached_property
    def read(self) -> x509.Certificate:
        """The certificate."""
        return x509.load_pem_x509_certificate(self.certificate)

    @property
    def made(self) -> datetime:
        """When it was issued."""
        return self.read.not_valid_before_utc + SKEW

    def serves(self, names: Sequence[str], now: datetime) -> bool:
        """Return True if clients that look for these DNS names accept it now."""
        alternative = self.read.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        known = set(alternative.get_values_for_type(x509.DNSName))
        return self.read.not_valid_before_utc <= now < self.read.not_valid_after_utc and known.issuperset(names)


@dataclass(frozen=True, slots=True)
class Keys:
    """What the Secret holds."""

    current: Pair | None = None
    next: Pair | None = None
    former: bytes = b""  # CA of the certificate that served before

    def bundle(self, now: datetime) -> bytes:
        """Return the CAs to trust."""
        found = [self.former] if self.former and _ends(self.former) > now else []
        found += [pair.authority for pair in (self.current, self.next) if pair is not None]
        return b"".join(dict.fromkeys(found))

    def to_data(self) -> dict[str, str]:
        """Return the data of the Secret."""
        files = {"former-ca.crt": self.former} if self.former else {}
        for pair, (certificate, key, authority) in zip((self.current, self.next), _FILES, strict=True):
            if pair is not None:
                files |= {certificate: pair.certificate, key: pair.key, authority: pair.authority}
        return {name: base64.b64encode(content).decode() for name, content in files.items()}

    @classmethod
    def from_data(cls, data: Mapping[str, str]) -> Keys:
        """Return what a Secret holds; what is spoilt is left out."""
        files: dict[str, bytes] = {}
        for name, text in data.items():
            try:
                files[name] = base64.b64decode(text, validate=True)
            except (binascii.Error, ValueError):
                continue
        current, after = (_checked(Pair(*(files.get(name, b"") for name in names))) for names in _FILES)
        former = files.get("former-ca.crt", b"")
        return cls(current, after, former if _is_certificate(former) else b"")


_FILES = (("tls.crt", "tls.key", "ca.crt"), ("next.crt", "next.key", "next-ca.crt"))


def turn(
    keys: Keys,
    names: Sequence[str],  # DNS names of the service
    now: datetime,
    trusted: bool,  # the API server has been told of the CA of `keys.next`
    lifetimes: Lifetimes,
) -> Keys:
    """Return the keys to use from now on; `keys` itself if nothing is due."""
    current, after = keys.current, keys.next
    former = b"" if current is None else current.authority
    fits = current is not None and current.serves(names, now)
    if after is not None and not after.serves(names, now):
        after = None
    if after is not None and (not fits or (trusted and now - after.made >= lifetimes.overlap)):
        return Keys(after, None, former)
    if not fits or current is None:
        return Keys(issue(names, now, lifetimes.validity), None, former)
    if after is None and now - current.made >= lifetimes.renewal:
        return replace(keys, next=issue(names, now, lifetimes.validity))
    return keys if after is keys.next else replace(keys, next=after)


def issue(names: Sequence[str], now: datetime, validity: timedelta) -> Pair:
    """Return a new certificate for DNS names, signed by a new CA."""
    key, ca_key = ec.generate_private_key(ec.SECP256R1()), ec.generate_private_key(ec.SECP256R1())
    serial = x509.random_serial_number()
    # A name of its own: clients find the CA of a certificate by name, among all that they trust.
    ca_name = _name(f"kvkern webhook CA {serial:x}"[:64])
    ca_id = x509.SubjectKeyIdentifier.from_public_key(ca_key.public_key())
    ca = (
        _builder(ca_name, ca_name, ca_key, now, validity)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_usage(signs=True), critical=True)
        .add_extension(ca_id, critical=False)
        .sign(ca_key, hashes.SHA256())
    )
    certificate = (
        _builder(_name(names[0][:64]), ca_name, key, now, validity)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_usage(signs=False), critical=True)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
        .add_extension(x509.SubjectAlternativeName([x509.DNSName(each) for each in names]), critical=False)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_subject_key_identifier(ca_id), critical=False)
        .sign(ca_key, hashes.SHA256())
    )
    encoding = serialization.Encoding.PEM
    private = key.private_bytes(encoding, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    return Pair(certificate.public_bytes(encoding), private, ca.public_bytes(encoding))


def _builder(
    subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePrivateKey, now: datetime, validity: timedelta
) -> x509.CertificateBuilder:
    return x509.CertificateBuilder(
        issuer, subject, key.public_key(), x509.random_serial_number(), now - SKEW, now + validity
    )


def _name(text: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, text)])


def _usage(signs: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not signs, content_commitment=False, key_encipherment=False, data_encipherment=False,
        key_agreement=False, key_cert_sign=signs, crl_sign=signs, encipher_only=False, decipher_only=False,
    )  # fmt: skip


def _ends(certificate: bytes) -> datetime:
    return x509.load_pem_x509_certificate(certificate).not_valid_after_utc


def _is_certificate(content: bytes) -> bool:
    try:
        x509.load_pem_x509_certificate(content)
    except ValueError:
        return False
    return True


def _checked(pair: Pair) -> Pair | None:
    """Return a pair whose parts belong together, or None."""
    try:
        certificate, authority = pair.read, x509.load_pem_x509_certificate(pair.authority)
        key = serialization.load_pem_private_key(pair.key, None)
        certificate.verify_directly_issued_by(authority)
        certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName)
    except (ValueError, TypeError, InvalidSignature, UnsupportedAlgorithm, x509.ExtensionNotFound):
        return None
    return pair if key.public_key() == certificate.public_key() else None
