"""The webhook's certificates: pure, with a clock that the test sets, and by TLS itself."""

from __future__ import annotations

import base64
import ssl
import tempfile
from dataclasses import replace
from datetime import UTC, datetime, timedelta

import pytest
from cryptography import x509

from kvkern.operator.webhook.certificates import Keys, Lifetimes, Pair, issue, turn

NAMES = ("hook.system.svc", "hook.system.svc.cluster.local")
NOW = datetime(2026, 1, 1, tzinfo=UTC)
LIFETIMES = Lifetimes(timedelta(hours=9), timedelta(hours=6), timedelta(hours=1))


def handshake(pair: Pair, bundle: bytes, name: str = NAMES[0]) -> None:
    """Connect a client that trusts `bundle` with a server that has `pair`, in memory. Raises ssl.SSLError."""
    serving = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    with tempfile.NamedTemporaryFile() as file:
        file.write(pair.certificate + pair.key)
        file.flush()
        serving.load_cert_chain(file.name)
    trusting = ssl.create_default_context(cadata=bundle.decode())
    trusting.verify_flags |= ssl.VERIFY_X509_STRICT
    one, two = ssl.MemoryBIO(), ssl.MemoryBIO()
    client = trusting.wrap_bio(one, two, server_hostname=name)
    server = serving.wrap_bio(two, one, server_side=True)
    for _ in range(4):
        for side in (client, server):
            try:
                side.do_handshake()
            except ssl.SSLWantReadError:
                continue
    assert client.version() in ("TLSv1.2", "TLSv1.3")


def test_tls_accepts_it_by_its_names_and_its_own_ca() -> None:
    now = datetime.now(UTC)
    pair, other = (issue(NAMES, now, timedelta(hours=1)) for _ in range(2))
    for name in NAMES:
        handshake(pair, pair.authority, name)
        handshake(pair, other.authority + pair.authority, name)
    for bundle, name in ((other.authority, NAMES[0]), (pair.authority, "other.system.svc")):
        with pytest.raises(ssl.SSLCertVerificationError):
            handshake(pair, bundle, name)
    with pytest.raises(ssl.SSLCertVerificationError, match="expired"):
        handshake(old := issue(NAMES, now - timedelta(hours=3), timedelta(hours=1)), old.authority)


def test_a_certificate_cannot_sign_another() -> None:
    certificate = issue(NAMES, NOW, timedelta(hours=1)).read
    assert not certificate.extensions.get_extension_for_class(x509.BasicConstraints).value.ca
    assert certificate.not_valid_before_utc == NOW - timedelta(hours=1)
    assert certificate.not_valid_after_utc == NOW + timedelta(hours=1)


def test_a_life_in_turns() -> None:
    """Whoever serves any certificate of the last overlap is trusted at any time: no call fails."""
    keys, first = Keys(), None
    seen: list[tuple[int, bytes]] = []
    bundle, trusted_at = b"", NOW
    for minute in range(0, 60 * 24 * 2, 10):
        now = NOW + timedelta(minutes=minute)
        trusted = keys.next is not None and keys.next.authority in bundle
        before, keys = keys, turn(keys, NAMES, now, trusted, LIFETIMES)
        assert keys.current is not None
        if keys.current is not before.current:
            seen.append((minute, keys.current.certificate))
            if before.current is not None:
                assert keys.current is before.next
                assert keys.current.authority in bundle  # the API server knew it before it was used
                assert now - trusted_at >= LIFETIMES.overlap
        if keys.next is not None and before.next is None:
            trusted_at = now
        bundle = keys.bundle(now)
        assert keys.current.authority in bundle
        assert not before.current or before.current.authority in bundle  # a replica that has not seen the change
        assert keys.current.serves(NAMES, now)
        first = first or keys.current
    assert [minute for minute, _ in seen] == [0, 420, 780, 1140, 1500, 1860, 2220, 2580]
    assert first is not None
    assert first.authority not in bundle
    assert bundle.count(b"BEGIN") <= 3


def test_the_next_one_waits_until_it_is_trusted() -> None:
    """A registration that cannot be written does not end the calls before the certificate does."""
    keys = Keys(issue(NAMES, NOW, LIFETIMES.validity))
    keys = turn(keys, NAMES, NOW + timedelta(hours=6), False, LIFETIMES)
    assert keys.next is not None
    for hours in (7, 8):
        assert turn(keys, NAMES, NOW + timedelta(hours=hours), False, LIFETIMES) is keys
    ended = turn(keys, NAMES, NOW + timedelta(hours=9), False, LIFETIMES)
    assert (ended.current, ended.next) == (keys.next, None)


@pytest.mark.parametrize("days", [-30, 30])
def test_one_that_is_over_or_not_yet_good_is_replaced_at_once(days: int) -> None:
    old = issue(NAMES, NOW + timedelta(days=days), LIFETIMES.validity)
    keys = turn(Keys(old), NAMES, NOW, False, LIFETIMES)
    assert keys.current is not None
    assert keys.current.serves(NAMES, NOW)
    assert keys.bundle(NOW).count(b"BEGIN") == (1 if days < 0 else 2)


def test_another_service_gets_another_certificate() -> None:
    old = Keys(issue(NAMES, NOW, LIFETIMES.validity))
    keys = turn(old, ("new.system.svc",), NOW, False, LIFETIMES)
    assert keys.current is not None
    assert keys.current.serves(("new.system.svc",), NOW)
    assert keys.bundle(NOW).count(b"BEGIN") == 2
    stale = replace(old, next=issue(("other.svc",), NOW, LIFETIMES.validity))
    assert turn(stale, NAMES, NOW, True, LIFETIMES) == old


def test_a_secret_keeps_them() -> None:
    one, two, three = (issue(NAMES, NOW, LIFETIMES.validity) for _ in range(3))
    for keys in (Keys(), Keys(one), Keys(one, two), Keys(one, two, three.authority)):
        assert Keys.from_data(keys.to_data()) == keys
    assert b"CERTIFICATE" in base64.b64decode(Keys(one).to_data()["tls.crt"])


@pytest.mark.parametrize("name", ["tls.crt", "tls.key", "ca.crt"])
@pytest.mark.parametrize("value", ["", "?", "YQ==", "other", None])
def test_a_spoilt_secret_counts_as_empty(name: str, value: str | None) -> None:
    data = Keys(issue(NAMES, NOW, LIFETIMES.validity)).to_data()
    if value is None:
        del data[name]
    else:
        other = Keys(issue(NAMES, NOW, LIFETIMES.validity)).to_data()[name]
        data[name] = other if value == "other" else value
    assert Keys.from_data(data).current is None
    assert Keys.from_data({"former-ca.crt": "YQ=="}) == Keys()
