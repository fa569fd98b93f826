"""The certificate under which a node serves HTTPS, read again when its files change; connections go on meanwhile.

A new pair of files that cannot be used changes nothing: what is in use stays, and the log says why.
"""

from __future__ import annotations

import logging
import os
import ssl
from datetime import datetime
from pathlib import Path
from typing import Literal

import trio
from cryptography import x509

from nodes.config import ConfigInvalid, NodeConfig
from nodes.iso_time import iso_time

logger = logging.getLogger(__name__)

# How often the files are looked at.
WATCH_INTERVAL_S = 1.0
FILE_BYTES_MAX = 1_048_576  # a chain of certificates has some 10 KB
ALPN_PROTOCOLS = ["h2", "http/1.1"]
# Of TLS 1.2; those of 1.3 are fixed. HTTP/2 takes no others (RFC 9113, 9.2.2).
CIPHERS = "ECDHE+AESGCM:ECDHE+CHACHA20"

TlsVersion = Literal["1.2", "1.3"]
_MINIMUM = {"1.2": ssl.TLSVersion.TLSv1_2, "1.3": ssl.TLSVersion.TLSv1_3}


class CertificateInvalid(Exception):
    """Files that no server can use. One line: which, why, and the fix."""


def configured_certificate(config: NodeConfig) -> Certificate | None:
    """None for plain HTTP. Raises ConfigInvalid."""
    cert_file, key_file = config.tls_cert_file, config.tls_key_file
    if (cert_file is None) != (key_file is None):
        raise ConfigInvalid("tls_cert_file and tls_key_file belong together; give both for HTTPS, or neither")
    if cert_file is None or key_file is None:
        return None
    return Certificate(cert_file, key_file, config.tls_min)


class Certificate:
    """context: for new connections. expires_at: seconds since 1970, of the server's own certificate."""

    def __init__(self, cert_file: Path, key_file: Path, minimum: TlsVersion) -> None:
        """Raises ConfigInvalid."""
        self._files = (cert_file, key_file)
        self._minimum: TlsVersion = minimum
        self._stamp = self._look()
        try:
            self.context, self.expires_at = self._load()
        except CertificateInvalid as exc:
            raise ConfigInvalid(str(exc)) from exc

    async def watch(self) -> None:
        """Read the files again once both have stayed as they are for WATCH_INTERVAL_S after a change: whoever renews a
        certificate writes two files."""
        seen = self._stamp
        while True:
            await trio.sleep(WATCH_INTERVAL_S)
            stamp = await trio.to_thread.run_sync(self._look)
            if stamp != self._stamp and stamp == seen:
                self._stamp = stamp
                await self._renew()
            seen = stamp

    async def _renew(self) -> None:
        try:
            self.context, self.expires_at = await trio.to_thread.run_sync(self._load)
        except CertificateInvalid as exc:
            logger.error(
                "the new certificate cannot be used; the former one stays in use", extra={"error.message": str(exc)}
            )
        else:
            logger.info(
                "took a new certificate", extra={"file": str(self._files[0]), "expires_at": iso_time(self.expires_at)}
            )

    # In a worker thread.

    def _look(self) -> tuple[tuple[int, int, int] | None, ...]:
        """What changes when the files do, also behind links."""
        found: list[tuple[int, int, int] | None] = []
        for file in self._files:
            try:
                stat = os.stat(file)
            except OSError:
                found.append(None)
            else:
                found.append((stat.st_ino, stat.st_size, stat.st_mtime_ns))
        return tuple(found)

    def _load(self) -> tuple[ssl.SSLContext, float]:
        """Raises CertificateInvalid."""
        cert_file, key_file = self._files
        for name, file in (("tls_cert_file", cert_file), ("tls_key_file", key_file)):
            try:
                with open(file, "rb") as opened:
                    if len(opened.read(FILE_BYTES_MAX + 1)) > FILE_BYTES_MAX:
                        raise CertificateInvalid(f"{name} {file}: larger than {FILE_BYTES_MAX} bytes, so it is no PEM")
            except OSError as exc:
                raise CertificateInvalid(f"{name} {file}: {exc.strerror}") from exc
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.minimum_version = _MINIMUM[self._minimum]
        context.options |= ssl.OP_NO_RENEGOTIATION
        context.set_ciphers(CIPHERS)
        context.set_alpn_protocols(ALPN_PROTOCOLS)
        try:
            # A password would be asked for on the terminal; none at all makes it an error.
            context.load_cert_chain(cert_file, key_file, password="")
            certificate = x509.load_pem_x509_certificate(cert_file.read_bytes())
        except (OSError, ValueError) as exc:  # an SSLError is an OSError
            raise CertificateInvalid(
                f"tls_cert_file {cert_file} and tls_key_file {key_file} cannot be used ({exc}); give PEM files: the "
                "server's certificate with its chain behind it, and its key without a password"
            ) from exc
        expires: datetime = certificate.not_valid_after_utc
        return context, expires.timestamp()
