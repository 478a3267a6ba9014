"""Who may talk to a learner: loopback alone, or who has the shared token, or who has a certificate."""

import hashlib
import hmac
import logging
import ssl
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc

from lerobot_pirl import rules
from lerobot_pirl.options import UNPROTECTED, WireConfig

logger = logging.getLogger(__name__)

TOKEN_KEY = "lerobot-pirl-token"
MIN_TOKEN_BYTES, MAX_FILE_BYTES = 16, 2**20
REPORT_EVERY_S = 10.0


@dataclass(frozen=True)
class Security:
    """What both ends of a connection hold; nothing of it leaves them but the token's digest.

    Attributes:
        token: SHA-256 of the shared token as hexadecimal digits, None without one.
        certificate: PEM of this process's certificate and, behind it, of its issuer; both are trusted. None without TLS.
        key: PEM of the certificate's private key.
    """

    token: str | None = None
    certificate: bytes | None = None
    key: bytes | None = None

    def check_host(self, host: str) -> None:
        """Raise ValueError where a learner would listen to strangers; warn where they could listen in."""
        if rules.is_loopback(host):
            return
        if self.certificate is None and self.token is None:
            raise ValueError(f"algorithm.wire.host={host!r} {UNPROTECTED}")
        if self.certificate is None:
            logger.warning(
                "algorithm.wire.host=%r is reached over a network and nothing is encrypted: whoever can read the traffic "
                "reads the token too; add algorithm.wire.tls_cert and algorithm.wire.tls_key (docs/security.md)",
                host,
            )

    @property
    def metadata(self) -> list[tuple[str, str]]:
        """What an actor sends along with every RPC."""
        return [] if self.token is None else [(TOKEN_KEY, self.token)]

    def interceptors(self) -> list[grpc.ServerInterceptor]:
        """Return what stands before every RPC of a server."""
        return [] if self.token is None else [_TokenCheck(self.token)]

    def bind(self, server: grpc.Server, address: str) -> int:
        """Let a server listen; returns its port, 0 when it is not to be had."""
        try:
            if self.certificate is None:
                return server.add_insecure_port(address)
            credentials = grpc.ssl_server_credentials(
                [(self.key, self.certificate)], self.certificate, require_client_auth=True
            )
            return server.add_secure_port(address, credentials)
        except RuntimeError:
            return 0

    def channel(self, address: str, options: list[tuple[str, Any]]) -> grpc.Channel:
        """Return a channel to a learner."""
        if self.certificate is None:
            return grpc.insecure_channel(address, options=options)
        credentials = grpc.ssl_channel_credentials(self.certificate, self.key, self.certificate)
        return grpc.secure_channel(address, credentials, options=options)

    def explain(self, error: grpc.RpcError, address: str) -> None:
        """Raise ConnectionError when a learner is there and will never talk to this actor; waiting is of no use."""
        details = " ".join((error.details() or "").split())
        if error.code() == grpc.StatusCode.UNAUTHENTICATED:
            raise ConnectionError(f"the learner at {address} refused this actor: {details}") from error
        if "handshake failed" in details.lower():
            raise ConnectionError(
                f"the learner at {address} and this actor do not trust each other's certificates, or one of them has no "
                "TLS; give both algorithm.wire.tls_cert and algorithm.wire.tls_key that belong together, valid for this "
                f"host ({rules.shown(details)})"
            ) from error


# without a token and TLS
OPEN = Security()


def address(host: str, port: int) -> str:
    """Return what gRPC calls an address."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def read(wire: WireConfig) -> Security:
    """Return what the files of a wire config hold.

    Raises:
        ValueError: one sentence that names the option, when a file cannot be read or does not hold what it should.
    """
    token = certificate = key = None
    if wire.token_file is not None:
        secret = _content("token_file", wire.token_file, private=True).strip()
        if len(secret) < MIN_TOKEN_BYTES:
            raise ValueError(
                f"algorithm.wire.token_file={wire.token_file!r} holds {len(secret)} bytes, at least {MIN_TOKEN_BYTES} are "
                "needed; make one with `openssl rand -hex 32`"
            )
        # a digest has one length and nothing that a header could not hold
        token = hashlib.sha256(secret).hexdigest()
    if wire.tls_cert is not None:
        certificate = _content("tls_cert", wire.tls_cert)
        key = _content("tls_key", wire.tls_key, private=True)
        try:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            # an encrypted key would ask for its password on the terminal
            context.load_cert_chain(wire.tls_cert, wire.tls_key, password=lambda: "")
        except (ssl.SSLError, OSError, ValueError) as error:
            raise ValueError(
                f"algorithm.wire.tls_cert={wire.tls_cert!r} and algorithm.wire.tls_key={wire.tls_key!r} are no certificate "
                f"and its unencrypted key in PEM ({' '.join(str(error).split())})"
            ) from error
    return Security(token, certificate, key)


def _content(option: str, name: str, private: bool = False) -> bytes:
    path = Path(name)
    try:
        if not path.is_file():
            raise FileNotFoundError("there is no such file")
        if private and path.stat().st_mode & 0o077:
            logger.warning("others on this machine can read algorithm.wire.%s=%r; chmod 600 it", option, name)
        with path.open("rb") as file:
            content = file.read(MAX_FILE_BYTES + 1)
    except (OSError, ValueError) as error:
        raise ValueError(f"algorithm.wire.{option}={rules.shown(name)} cannot be read: {error}") from error
    if len(content) > MAX_FILE_BYTES:
        raise ValueError(
            f"algorithm.wire.{option}={name!r} has more than {MAX_FILE_BYTES} bytes; name another file"
        )
    return content


class _TokenCheck(grpc.ServerInterceptor):
    """Lets an RPC through that brings the token."""

    def __init__(self, token: str) -> None:
        self._token = token.encode()
        self._lock = threading.Lock()
        self._refused, self._report_at = 0, 0.0

    def intercept_service(self, continuation, details):
        """Return the RPC's handler, or one that refuses it before a byte of its request is read."""
        given = str(dict(details.invocation_metadata).get(TOKEN_KEY, ""))
        if hmac.compare_digest(given.encode(), self._token):
            return continuation(details)
        return grpc.stream_unary_rpc_method_handler(self._refuse)

    def _refuse(self, pieces, context):
        with self._lock:
            self._refused += 1
            # whoever may not talk to the learner shall not fill its log either
            if time.monotonic() >= self._report_at:
                logger.error("refused %d calls without the token, now of %s", self._refused, context.peer())
                self._refused, self._report_at = 0, time.monotonic() + REPORT_EVERY_S
        context.abort(
            grpc.StatusCode.UNAUTHENTICATED,
            "it does not have the learner's token; give both the same algorithm.wire.token_file",
        )
