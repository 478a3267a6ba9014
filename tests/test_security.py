"""Who may talk to a learner: over real gRPC in one process, with tokens and certificates made for the test."""

import json
import logging
import shutil
import stat
import subprocess
import threading
from pathlib import Path

import grpc
import pytest
from lerobot.transport import services_pb2, services_pb2_grpc

from lerobot_pirl.options import WireConfig
from lerobot_pirl.transport import LearnerClient, LearnerServer, security
from lerobot_pirl.transport.pieces import to_pieces
from lerobot_pirl.transport.security import OPEN, TOKEN_KEY, Security
from lerobot_pirl.wire import Message, encode

WEIGHTS = Message("weights", {"policy_version": 0})


def private(path: Path, content: str) -> str:
    """Write a file that its owner alone can read; return its name."""
    path.write_text(content)
    path.chmod(0o600)
    return str(path)


@pytest.fixture
def token(tmp_path) -> Security:
    return security.read(WireConfig(token_file=private(tmp_path / "token", "0123456789abcdef\n")))


@pytest.fixture
def other_token(tmp_path) -> Security:
    return security.read(WireConfig(token_file=private(tmp_path / "other", "0123456789abcdeg\n")))


def make_certificate(folder: Path, name: str, *arguments: str) -> WireConfig:
    """Make a key and a certificate for loopback; self-signed unless told otherwise."""
    openssl = shutil.which("openssl")
    if openssl is None:
        pytest.skip("there is no openssl to make certificates with")
    cert, key = folder / f"{name}.pem", folder / f"{name}.key"
    subprocess.run(
        [
            *(openssl, "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"),
            *("-keyout", key, "-out", cert, "-days", "2", "-subj", f"/CN={name}"),
            *("-addext", "subjectAltName=IP:127.0.0.1,DNS:localhost", *arguments),
        ],
        check=True,
        capture_output=True,
    )
    key.chmod(0o600)
    return WireConfig(tls_cert=str(cert), tls_key=str(key))


@pytest.fixture(scope="module")
def certificates(tmp_path_factory) -> dict[str, WireConfig]:
    """Return two self-signed certificates, and two of one issuer, each with the issuer's behind it."""
    folder = tmp_path_factory.mktemp("certificates")
    made = {name: make_certificate(folder, name) for name in ("shared", "foreign", "issuer")}
    issuer = made.pop("issuer")
    for name in ("first", "second"):
        wire = make_certificate(folder, name, "-CA", issuer.tls_cert, "-CAkey", issuer.tls_key)
        cert = Path(wire.tls_cert)
        cert.write_text(cert.read_text() + Path(issuer.tls_cert).read_text())
        made[name] = wire
    return made


def stub(server: LearnerServer, secured: Security = OPEN) -> services_pb2_grpc.LearnerServiceStub:
    return services_pb2_grpc.LearnerServiceStub(secured.channel(f"127.0.0.1:{server.port}", []))


def talk(server_side: Security, actor_side: Security, host: str = "127.0.0.1", **options) -> dict:
    """Let an actor connect and take weights; return their header."""
    server = LearnerServer(host, 0, security=server_side)
    client = LearnerClient("127.0.0.1", server.port, 2.0, security=actor_side, **options)
    try:
        server.publish(WEIGHTS)
        client.connect()
        return client.next_message().header
    finally:
        client.close()
        server.close()


def refusal(server_side: Security, actor_side: Security) -> str:
    waits: list[float] = []
    with pytest.raises(ConnectionError) as caught:
        talk(server_side, actor_side, on_wait=waits.append)
    assert "\n" not in str(caught.value)
    # who will never be let in does not wait
    assert waits == []
    return str(caught.value)


# --- the token ----------------------------------------------------------------------------------------------


def test_an_actor_with_the_token_is_served_and_a_refusal_of_it_comes_through(token):
    server = LearnerServer("127.0.0.1", 0, security=token)
    client = LearnerClient("127.0.0.1", server.port, 5.0, security=token)
    server.publish(WEIGHTS)
    client.connect()
    assert client.next_message().header == WEIGHTS.header
    client.send_refusal("gamma differs")
    message = server.receive(timeout=10)
    assert (message.kind, message.header["reason"]) == ("refusal", "gamma differs")
    client.close()
    server.close()


def test_an_actor_without_the_token_or_with_another_ends_with_one_sentence(token, other_token):
    for actor_side in (OPEN, other_token, Security(token.token.upper()), Security(token.token + "0")):
        text = refusal(token, actor_side)
        assert text.startswith("the learner at 127.0.0.1:")
        assert text.endswith(
            "does not have the learner's token; give both the same algorithm.wire.token_file"
        )


def calls(stub: services_pb2_grpc.LearnerServiceStub, metadata: list) -> dict:
    """Return every RPC of the service, ready to be made."""
    rollout = encode(Message("rollout", {"policy_version": 0}))
    refusal = encode(Message("refusal", {"reason": "x"}))
    return {
        "Ready": lambda: stub.Ready(services_pb2.Empty(), timeout=10, metadata=metadata),
        "StreamParameters": lambda: next(
            stub.StreamParameters(services_pb2.Empty(), timeout=10, metadata=metadata)
        ),
        "SendTransitions": lambda: stub.SendTransitions(
            to_pieces([rollout], services_pb2.Transition), timeout=10, metadata=metadata
        ),
        "SendInteractions": lambda: stub.SendInteractions(
            to_pieces([refusal], services_pb2.InteractionMessage), timeout=10, metadata=metadata
        ),
    }


METADATA = {
    "none": [],
    "empty": [(TOKEN_KEY, "")],
    "wrong": [(TOKEN_KEY, "0" * 64)],
    "long": [(TOKEN_KEY, "0" * 4000)],
    "bytes": [(f"{TOKEN_KEY}-bin", b"\xff" * 64)],
    "many": [(TOKEN_KEY, "0"), (TOKEN_KEY, "1")],
}


@pytest.mark.parametrize("metadata", METADATA.values(), ids=METADATA)
def test_every_rpc_is_refused_without_the_token_and_nothing_comes_in(token, metadata):
    server = LearnerServer("127.0.0.1", 0, security=token)
    server.publish(WEIGHTS)
    every = calls(stub(server), metadata)
    assert set(every) == {
        name for name in dir(services_pb2_grpc.LearnerServiceServicer) if not name.startswith("_")
    }
    for name, call in every.items():
        with pytest.raises(grpc.RpcError) as refused:
            call()
        assert refused.value.code() == grpc.StatusCode.UNAUTHENTICATED, name
    assert server.num_actors == 0
    assert server.receive(timeout=0.1) is None
    server.close()


def test_a_refused_call_is_refused_before_its_request_is_read(token):
    """A peer that opens a call and sends nothing must not hold a thread."""
    server = LearnerServer("127.0.0.1", 0, security=token)
    done = threading.Event()

    def silence():
        done.wait(30)
        yield services_pb2.Transition()

    try:
        with pytest.raises(grpc.RpcError) as refused:
            stub(server).SendTransitions(silence(), timeout=20)
        assert refused.value.code() == grpc.StatusCode.UNAUTHENTICATED
    finally:
        done.set()
        server.close()


def test_the_token_is_compared_in_constant_time(token, monkeypatch):
    compared = []

    def compare(one, other):
        compared.append((one, other))
        return one == other

    monkeypatch.setattr("lerobot_pirl.transport.security.hmac.compare_digest", compare)
    assert talk(token, token) == WEIGHTS.header
    assert compared and all(pair == (token.token.encode(),) * 2 for pair in compared)


def test_refused_calls_do_not_fill_the_log(token, caplog):
    server = LearnerServer("127.0.0.1", 0, security=token)
    strangers = stub(server)
    for _ in range(20):
        with pytest.raises(grpc.RpcError):
            strangers.Ready(services_pb2.Empty(), timeout=10)
    server.close()
    lines = [record for record in caplog.records if "without the token" in record.getMessage()]
    assert len(lines) == 1
    assert "refused 1 calls without the token, now of ipv4:127.0.0.1:" in lines[0].getMessage()


def test_a_learner_that_comes_back_with_another_token_ends_its_actor(token, other_token):
    first = LearnerServer("127.0.0.1", 0, security=token)
    client = LearnerClient("127.0.0.1", first.port, 30.0, security=token)
    first.publish(WEIGHTS)
    client.connect()
    client.next_message()
    first.close()
    again = LearnerServer("127.0.0.1", first.port, security=other_token)
    with pytest.raises(ConnectionError, match="does not have the learner's token"):
        client.next_message()
    client.close()
    again.close()


def test_the_token_is_nowhere_but_in_its_file(token, tmp_path, caplog):
    caplog.set_level(logging.DEBUG)
    wire = WireConfig(host="0.0.0.0", token_file=str(tmp_path / "token"))
    LearnerServer(wire.host, 0, security=security.read(wire)).close()
    secret = (tmp_path / "token").read_text().strip()
    assert secret not in caplog.text + repr(token) + json.dumps(wire.__dict__)


# --- certificates -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("learner", "actor"), [("shared", "shared"), ("first", "second")])
def test_certificates_that_trust_each_other_talk(certificates, learner, actor):
    sides = [security.read(certificates[name]) for name in (learner, actor)]
    assert talk(*sides) == WEIGHTS.header
    assert talk(sides[0], sides[1], host="0.0.0.0") == WEIGHTS.header


@pytest.mark.parametrize(
    ("learner", "actor"),
    [("shared", "foreign"), ("first", "foreign"), ("shared", "second"), (None, "shared")],
)
def test_a_certificate_that_is_not_trusted_ends_the_actor_with_one_sentence(certificates, learner, actor):
    sides = [OPEN if name is None else security.read(certificates[name]) for name in (learner, actor)]
    text = refusal(*sides)
    assert "do not trust each other's certificates, or one of them has no TLS" in text
    assert "algorithm.wire.tls_cert and algorithm.wire.tls_key" in text


def test_an_actor_without_a_certificate_is_not_served(certificates):
    """It may know the learner's certificate, which is no secret, and still needs one of its own."""
    secured = security.read(certificates["shared"])
    server = LearnerServer("127.0.0.1", 0, security=secured)
    address = f"127.0.0.1:{server.port}"
    channels = {
        "plain": grpc.insecure_channel(address),
        "no certificate": grpc.secure_channel(address, grpc.ssl_channel_credentials(secured.certificate)),
    }
    for name, channel in channels.items():
        with pytest.raises(grpc.RpcError) as refused:
            services_pb2_grpc.LearnerServiceStub(channel).Ready(services_pb2.Empty(), timeout=10)
        assert refused.value.code() == grpc.StatusCode.UNAVAILABLE, name
    assert server.num_actors == 0
    server.close()


def test_token_and_certificate_are_both_asked_for(certificates, token):
    tls = security.read(certificates["shared"])
    both = Security(token.token, tls.certificate, tls.key)
    assert talk(both, both) == WEIGHTS.header
    assert "does not have the learner's token" in refusal(both, tls)


# --- where a learner listens --------------------------------------------------------------------------------


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "10.0.0.2", "example.org", "127.1", "LOCALHOST"])
def test_an_address_that_others_reach_needs_a_token_or_tls(host):
    with pytest.raises(ValueError, match="is no loopback address") as refused:
        LearnerServer(host, 0)
    assert f"algorithm.wire.host={host!r} " in str(refused.value)
    for word in ("algorithm.wire.token_file", "algorithm.wire.tls_cert", "SSH tunnel", "docs/security.md"):
        assert word in str(refused.value)


def test_a_token_without_encryption_is_warned_of_and_tls_is_not(token, certificates, caplog):
    LearnerServer("127.0.0.1", 0).close()
    LearnerServer("127.0.0.1", 0, security=token).close()
    LearnerServer("0.0.0.0", 0, security=security.read(certificates["shared"])).close()
    assert caplog.records == []
    LearnerServer("0.0.0.0", 0, security=token).close()
    (warning,) = caplog.records
    assert warning.levelname == "WARNING"
    assert "nothing is encrypted: whoever can read the traffic reads the token too" in warning.getMessage()


def test_an_address_of_version_6_is_bracketed():
    assert security.address("::1", 50051) == "[::1]:50051"
    assert security.address("localhost", 1) == "localhost:1"


# --- files --------------------------------------------------------------------------------------------------


def test_the_same_token_is_read_whatever_the_end_of_its_line(token, other_token, tmp_path):
    for content in ("0123456789abcdef", "0123456789abcdef\r\n", "  0123456789abcdef\n\n"):
        assert security.read(WireConfig(token_file=private(tmp_path / "same", content))) == token
    assert token != other_token
    assert len(token.token) == 64
    assert security.read(WireConfig()) == OPEN == Security(None, None, None)


def unreadable(wire: WireConfig) -> str:
    with pytest.raises(ValueError) as refused:
        security.read(wire)
    assert "\n" not in str(refused.value)
    return str(refused.value)


def test_a_file_that_holds_no_token_is_named(tmp_path):
    missing = str(tmp_path / "missing")
    assert unreadable(WireConfig(token_file=missing)) == (
        f"algorithm.wire.token_file={missing!r} cannot be read: there is no such file"
    )
    assert "no such file" in unreadable(WireConfig(token_file=str(tmp_path)))
    short = private(tmp_path / "short", "0123456789abcde\n")
    assert "holds 15 bytes, at least 16 are needed; make one with `openssl rand -hex 32`" in unreadable(
        WireConfig(token_file=short)
    )
    long = private(tmp_path / "long", "x" * (2**20 + 1))
    assert "has more than 1048576 bytes" in unreadable(WireConfig(token_file=long))
    assert "no such file" in unreadable(WireConfig(token_file="/dev/zero"))


def test_files_that_are_no_certificate_and_its_key_are_named(certificates, tmp_path):
    shared, foreign = certificates["shared"], certificates["foreign"]
    garbage = private(tmp_path / "garbage", "garbage")
    locked = tmp_path / "locked.key"
    openssl = ["openssl", "ec", "-in", shared.tls_key, "-out", locked, "-aes128", "-passout", "pass:secret"]
    subprocess.run(openssl, check=True, capture_output=True)
    locked.chmod(0o600)
    for cert, key in (
        (garbage, shared.tls_key),
        (shared.tls_cert, garbage),
        (shared.tls_cert, foreign.tls_key),
        (shared.tls_cert, str(locked)),
    ):
        text = unreadable(WireConfig(tls_cert=cert, tls_key=key))
        assert text.startswith(f"algorithm.wire.tls_cert={cert!r} and algorithm.wire.tls_key={key!r} are no ")
    missing = str(tmp_path / "missing")
    text = unreadable(WireConfig(tls_cert=missing, tls_key=shared.tls_key))
    assert text.startswith(f"algorithm.wire.tls_cert={missing!r} cannot be read")


@pytest.mark.parametrize(("mode", "warned"), [(0o600, False), (0o640, True), (0o604, True)])
def test_a_secret_that_others_can_read_is_warned_of(tmp_path, caplog, mode, warned):
    path = tmp_path / "token"
    path.write_text("x" * 32)
    path.chmod(mode)
    assert stat.S_IMODE(path.stat().st_mode) == mode
    security.read(WireConfig(token_file=str(path)))
    assert [record.levelname for record in caplog.records] == ["WARNING"] * warned
    assert ("chmod 600" in caplog.text) == warned
