"""Certificates for TLS in both directions: a small authority to begin with, and checks that name what is wrong."""

from __future__ import annotations

import datetime
import ipaddress
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from keras_efficient.atomic import check_target, replacing
from keras_efficient.errors import FileProblem, MissingDependency, WrongArgument
from keras_efficient.video.transport.chunks import check_camera

__all__ = ["checked", "common_name", "make_authority"]

T = TypeVar("T")
RESERVED = ("authority", "server")


def make_authority(
    folder: str | Path,
    servers: Sequence[str],
    cameras: Sequence[str],
    *,
    days: int = 365,
    overwrite: bool = False,
) -> list[Path]:
    """Makes an authority, a certificate for a server, and one for each camera, whose common name is the camera's.

    Each is `NAME.pem` with its key `NAME.key`, which only the owner may read. Keys are on the curve P-256. Who has
    `authority.key` can be any camera: keep it away from the server.

    Args:
        folder: where; it is made.
        servers: names and addresses under which cameras reach the server.
        cameras: their names.
        days: how long the certificates hold.
        overwrite: whether files of these names are replaced.

    Returns:
        The files of certificates.

    Raises:
        FileProblem: a file exists, or cannot be written.
        WrongArgument: no server, a name that is none, twice the same name, less than a day.
    """
    _crypto()
    from cryptography import x509
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.x509.oid import NameOID

    if not servers or days < 1:
        raise WrongArgument("A name of the server is needed, and at least one day.")
    names = [*RESERVED, *map(check_camera, cameras)]
    if len({name.lower() for name in names}) < len(names):
        raise WrongArgument(f"Cameras need names of their own, other than {' and '.join(RESERVED)}.")
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise FileProblem(folder, f"cannot be made: {error.strerror or error}.") from error
    for name in names:
        for suffix in (".pem", ".key"):
            check_target(folder / f"{name}{suffix}", overwrite=overwrite)
    title = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, f"keras-efficient cameras, {os.urandom(4).hex()}")])
    authority = ec.generate_private_key(ec.SECP256R1())
    extensions: list[tuple[Any, bool]] = [
        (x509.BasicConstraints(ca=True, path_length=0), True),
        (_usage(signs_certificates=True), True),
        (x509.SubjectKeyIdentifier.from_public_key(authority.public_key()), False),
    ]
    _write(folder, RESERVED[0], authority, _signed(title, authority, title, authority, days, extensions), overwrite)
    for name in names[1:]:
        key = ec.generate_private_key(ec.SECP256R1())
        subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
        extensions = _of_one(authority.public_key(), servers if name == RESERVED[1] else ())
        _write(folder, name, key, _signed(subject, key, title, authority, days, extensions), overwrite)
    return [folder / f"{name}.pem" for name in names]


def checked(certificate: str | Path, key: str | Path, authority: str | Path) -> tuple[bytes, bytes, bytes]:
    """The contents of three PEM files, if a handshake with them can succeed: its own error would not say why.

    Args:
        certificate: one's own.
        key: the private key that belongs to it.
        authority: the certificates of those who may sign one's own and the other side's.

    Raises:
        FileProblem: no such file; no PEM; expired or not valid yet; another key; signed by somebody else.
    """
    x509, serialization = _crypto()
    paths = [Path(path) for path in (certificate, key, authority)]
    contents = tuple(_read(path) for path in paths)
    own = _parsed(paths[0], "certificate", lambda: x509.load_pem_x509_certificate(contents[0]))
    private = _parsed(paths[1], "private key", lambda: serialization.load_pem_private_key(contents[1], None))
    signers = _parsed(paths[2], "certificate", lambda: x509.load_pem_x509_certificates(contents[2]))

    owned = _parsed(paths[0], "certificate", own.public_key)
    if owned != _parsed(paths[1], "private key", private.public_key):
        raise FileProblem(paths[1], f"is not the key of {paths[0]}.", hint="Give the two files that belong together.")
    signer = next((signer for signer in signers if _has_signed(signer, own)), None)
    if signer is None:
        raise FileProblem(
            paths[0],
            f"is not signed by {paths[2]}.",
            hint="Take the authority that made it, or have it signed by this.",
        )
    _check_dates(paths[0], own)
    _check_dates(paths[2], signer)
    return contents[0], contents[1], contents[2]


def common_name(certificate: bytes) -> str:
    """Of the first certificate in PEM bytes that `checked` gave; empty where it has none."""
    x509, _ = _crypto()
    found = x509.load_pem_x509_certificate(certificate).subject.get_attributes_for_oid(x509.oid.NameOID.COMMON_NAME)
    return str(found[0].value) if found else ""


def _read(path: Path) -> bytes:
    try:
        with open(path, "rb") as file:
            return file.read(1 << 20)  # certificates take a few thousand bytes
    except FileNotFoundError as error:
        raise FileProblem(path, "no such file.", hint="`keras-efficient video certs` makes certificates.") from error
    except OSError as error:
        raise FileProblem(path, f"cannot be read: {error.strerror or error}.") from error


def _parsed(path: Path, what: str, load: Callable[[], T]) -> T:
    """Whatever the library says about bytes from outside becomes one sentence."""
    try:
        return load()
    except Exception as error:
        hint = "It must be PEM, without a password, of one of the usual kinds."
        raise FileProblem(path, f"holds no {what} that can be read.", hint=hint) from error


def _has_signed(signer: Any, certificate: Any) -> bool:
    try:
        certificate.verify_directly_issued_by(signer)
    except Exception:  # another name, another key, a kind that cannot sign
        return False
    return True


def _check_dates(path: Path, certificate: Any) -> None:
    now = datetime.datetime.now(datetime.UTC)
    if certificate.not_valid_after_utc < now:
        raise FileProblem(
            path, f"expired on {certificate.not_valid_after_utc:%Y-%m-%d %H:%M} UTC.", hint="Have a new one signed."
        )
    if certificate.not_valid_before_utc > now:
        raise FileProblem(
            path,
            f"is not valid before {certificate.not_valid_before_utc:%Y-%m-%d %H:%M} UTC.",
            hint=f"Here it is {now:%Y-%m-%d %H:%M} UTC: set the clock, if that is wrong.",
        )


def _signed(subject: Any, key: Any, issuer: Any, authority: Any, days: int, extensions: list[tuple[Any, bool]]) -> Any:
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes

    now = datetime.datetime.now(datetime.UTC)
    builder = x509.CertificateBuilder(
        issuer_name=issuer,
        subject_name=subject,
        public_key=key.public_key(),
        serial_number=x509.random_serial_number(),
        not_valid_before=now - datetime.timedelta(minutes=5),  # clocks differ
        not_valid_after=now + datetime.timedelta(days=days),
    )
    for extension, critical in extensions:
        builder = builder.add_extension(extension, critical)
    return builder.sign(authority, hashes.SHA256())


def _of_one(authority: Any, hosts: Sequence[str]) -> list[tuple[Any, bool]]:
    """Extensions of a certificate that signs no other; `hosts` are those of a server."""
    from cryptography import x509
    from cryptography.x509.oid import ExtendedKeyUsageOID

    found: list[tuple[Any, bool]] = [
        (x509.BasicConstraints(ca=False, path_length=None), True),
        (_usage(signs_certificates=False), True),
        (x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH]), False),
        (x509.AuthorityKeyIdentifier.from_issuer_public_key(authority), False),
    ]
    if hosts:
        found.append((x509.SubjectAlternativeName([_host(x509, name) for name in hosts]), False))
    return found


def _host(x509: Any, name: str) -> Any:
    try:
        return x509.IPAddress(ipaddress.ip_address(name))
    except ValueError:
        pass
    try:
        return x509.DNSName(name)
    except ValueError as error:
        raise WrongArgument(f"{name!r} is no name of a server.", hint="Write others than ASCII as xn--….") from error


def _usage(*, signs_certificates: bool) -> Any:
    from cryptography import x509

    others = ("content_commitment", "data_encipherment", "key_agreement", "encipher_only", "decipher_only")
    return x509.KeyUsage(
        digital_signature=True,
        key_encipherment=False,
        key_cert_sign=signs_certificates,
        crl_sign=signs_certificates,
        **dict.fromkeys(others, False),
    )


def _write(folder: Path, name: str, key: Any, certificate: Any, overwrite: bool) -> None:
    from cryptography.hazmat.primitives import serialization as form

    private = key.private_bytes(form.Encoding.PEM, form.PrivateFormat.PKCS8, form.NoEncryption())
    for suffix, data, mode in ((".key", private, 0o600), (".pem", certificate.public_bytes(form.Encoding.PEM), 0o644)):
        with replacing(folder / f"{name}{suffix}", overwrite=overwrite) as temporary:
            temporary.touch(mode)
            temporary.write_bytes(data)


def _crypto() -> tuple[Any, Any]:
    """The modules x509 and serialization of `cryptography`.

    Raises:
        MissingDependency: it is not installed.
    """
    try:
        from cryptography import x509
        from cryptography.hazmat.primitives import serialization
    except ImportError as error:
        raise MissingDependency("cryptography", "TLS between cameras and servers", "video") from error
    return x509, serialization
