"""T10 to T13 and T18: who may connect."""

from __future__ import annotations

import base64
import secrets
import socket
import threading
import time
from collections.abc import Callable
from functools import partial

from lmcache_conformance.channels.counted import Counted
from lmcache_conformance.channels.recorder import Recorder, Shaken, address_of, shaken
from lmcache_conformance.channels.rig import ChannelRig
from lmcache_conformance.channels.sides import SLACK_S, Side, until, within
from lmcache_conformance.frame import Wrong, check
from lmcache_core.sdk import BackendUnavailable, ConfigError, LMCacheError, PeerRefused
from lmcache_core.sdk.handshake import Introduction, answer, ask

FUZZED, FUZZED_QUICK = 10_000, 500
TRICKLES = 6


@check("T10", fix="prove the token with a MAC over nonces of both sides; never send or log it")
def a_wrong_token(rig: ChannelRig) -> None:
    """A peer with another token is PeerRefused("token"), from either side, and is told nothing;
    a changed byte of the handshake is refused; the token is in no metadata, log, error, repr, nor
    on the wire."""
    server, good = rig.open(), rig.open()
    other = secrets.token_bytes(32)
    stranger = rig.open(secret=other)
    texts: list[str] = []
    with Recorder(server.channel.metadata()) as wire:
        for secret in (other, rig.secret[:-1] + bytes([rig.secret[-1] ^ 1]), rig.secret[:16]):
            wrong = stranger if secret is other else rig.open(secret=secret)
            texts.append(_refused(partial(wrong.connect, wire.metadata), "token"))
        texts.append(_refused(partial(good.connect, stranger), "token"))
        name = good.connect(wire.metadata)
        if server.told or server.lost:
            raise Wrong("core was told of a peer with another token")
        rig.introduce(good, name, server)
        recording = wire.recordings[-1]
        everything = wire.everything()
    for each in (server, good, stranger):
        texts += [*each.texts, repr(each.host), repr(each.channel)]
        texts.append(each.channel.metadata().decode("latin-1"))
    everything += "\n".join(texts).encode("latin-1", "replace")
    for token in (rig.secret, other):
        for form in (token, token.hex().encode(), base64.b64encode(token), repr(token).encode()):
            if form in everything:
                raise Wrong("the token is on the wire, or in a log, an error, a repr or metadata")
    _tampered(rig, server, shaken(recording))


def _refused(connect: Callable[[], str], reason: str) -> str:
    """What the refusal says."""
    try:
        connect()
    except PeerRefused as error:
        if error.reason != reason:
            raise Wrong(f"it was refused for {error.reason!r}, due is {reason!r}") from error
        return f"{error} {error!r} {error.args}"
    except BackendUnavailable as error:
        raise Wrong(f"BackendUnavailable, due is PeerRefused({reason!r}): {error}") from error
    raise Wrong(f"connect succeeded, due is PeerRefused({reason!r})")


def _tampered(rig: ChannelRig, server: Side, good: Shaken) -> None:
    """No byte of a handshake may be changed on its way."""
    client = rig.open()
    told = len(server.told)
    for ours, length in ((True, len(good.sent)), (False, len(good.got))):
        places = {0, 8, 41, 42, length - 33, length - 32, length - 1}
        places |= {int(each) for each in rig.rng.integers(0, length, 8 if rig.quick else 24)}
        for at in sorted(places):
            with Recorder(server.channel.metadata()) as wire:
                wire.flip = (ours, at)
                try:
                    client.connect(wire.metadata, 0.4)
                except (PeerRefused, BackendUnavailable):
                    continue
            side = "client" if ours else "server"
            raise Wrong(f"byte {at} of the {side}'s handshake was changed, and both went on")
    if len(server.told) != told:
        raise Wrong("a peer whose handshake was changed was told of")


@check("T11", fix="a fresh nonce of each side in every MAC, and another label for each side")
def a_replayed_handshake(rig: ChannelRig) -> None:
    """What a good peer sent is worth nothing when it is sent again, nor is what the listening side
    itself sends when it is sent back."""
    server, client = rig.open(), rig.open()
    where = address_of(server.channel.metadata())
    with Recorder(server.channel.metadata()) as wire:
        name = client.connect(wire.metadata)
        client.channel.notify(name, b"only once")
        server.has(b"only once")
        sent = bytes(wire.recordings[0].sent)
        got = bytes(wire.recordings[0].got)
    until(lambda: server.lost, 2.0)
    replies: dict[str, Callable[[bytes], bytes]] = {
        "what a good peer sent": lambda theirs: sent,
        "its own bytes": lambda theirs: theirs,
        "its own opening, and what a good peer sent": lambda theirs: theirs + sent[len(theirs) :],
        "what it sent before": lambda theirs: got,
    }
    for what, reply in replies.items():
        with socket.create_connection(where) as raw:
            raw.settimeout(0.3)
            _send(raw, reply(_receive(raw)))
            back = _receive(raw)
            if back and what == "its own bytes":
                _send(raw, back)
            _must_hang_up(raw, what)
    time.sleep(0.1)
    if [message for _, message in server.told] != [b"only once"]:
        raise Wrong("a replayed connection was taken for a peer")
    rig.join(client, server)


def _send(raw: socket.socket, data: bytes) -> None:
    try:
        raw.sendall(data)
    except OSError:
        pass  # it has hung up already


def _receive(raw: socket.socket) -> bytes:
    try:
        return raw.recv(1 << 16)
    except OSError:
        return b""


def _must_hang_up(raw: socket.socket, what: str) -> None:
    """A client that sends no more gets no answer, and is hung up on."""
    try:
        raw.shutdown(socket.SHUT_WR)
    except OSError:
        return
    raw.settimeout(7.0)
    try:
        while raw.recv(1 << 16):
            pass
    except TimeoutError:
        raise Wrong(f"a connection that sent {what} is held for more than 7 s") from None
    except OSError:
        pass  # hung up, not politely


@check("T12", fix="compare the scheme and the major of what the other side says with your own")
def another_version(rig: ChannelRig) -> None:
    """A peer whose wire protocol has another major is PeerRefused("version"), one of another kind
    of channel PeerRefused("scheme"), whichever side it is; the channel goes on."""
    server, client = rig.open(), rig.open()
    with Recorder(server.channel.metadata()) as wire:
        name = client.connect(wire.metadata)
        rig.introduce(client, name, server)
        major, minor = shaken(wire.recordings[0]).version
    scheme = rig.plugin.scheme
    strangers = {
        "version": Introduction(scheme, (major + 1, minor)),
        "scheme": Introduction(scheme[::-1] + "x", (major, minor)),
    }
    until(lambda: server.lost, 2.0)
    told, lost = len(server.told), len(server.lost)
    for reason, stranger in strangers.items():
        with _listening(rig, stranger) as metadata:
            _refused(partial(client.connect, metadata), reason)
        with socket.create_connection(address_of(server.channel.metadata())) as raw:
            try:
                ask(raw, rig.secret, stranger, deadline_s=time.monotonic() + 3)
                raise Wrong(f"a peer of another {reason} was taken")
            except (PeerRefused, BackendUnavailable):
                pass  # our end saw it
            _must_hang_up(raw, f"another {reason}")
    if len(server.told) != told or len(server.lost) != lost:
        raise Wrong("core was told of a peer of another version or scheme")
    rig.join(rig.open(), server)


class _listening:
    """Somebody who listens, and introduces himself as told; the metadata to reach him."""

    def __init__(self, rig: ChannelRig, ours: Introduction) -> None:
        self._sock = socket.create_server(("127.0.0.1", 0))
        self._metadata = f"{rig.plugin.scheme}://127.0.0.1:{self._sock.getsockname()[1]}".encode()
        self._thread = threading.Thread(target=self._serve, args=(rig.secret, ours), daemon=True)

    def _serve(self, secret: bytes, ours: Introduction) -> None:
        sock, _ = self._sock.accept()
        with sock:
            try:
                answer(sock, secret, ours, deadline_s=time.monotonic() + 3)
            except (PeerRefused, BackendUnavailable):
                pass  # as it should be

    def __enter__(self) -> bytes:
        self._thread.start()
        return self._metadata

    def __exit__(self, *raised: object) -> None:
        self._thread.join(5)
        self._sock.close()


@check("T13", fix="bound every length before you allocate; close what has not proved itself in "
       "time", limit_s=180.0)  # fmt: skip
def damaged_handshakes(rig: ChannelRig) -> None:
    """10,000 damaged, cut, random and slow handshakes: none makes a peer or touches memory, a good
    peer can connect during and after, and files, threads and memory are as before."""
    server, client = rig.open(), rig.open()
    where = address_of(server.channel.metadata())
    with Recorder(server.channel.metadata()) as wire:
        rig.introduce(client, client.connect(wire.metadata), server)
        good = bytes(wire.recordings[0].sent)
    if not until(lambda: server.lost, 3.0):
        raise Wrong("a connection ended, and `lost` was not told")
    told, lost = len(server.told), len(server.lost)
    mine = server.arena.array.copy()
    for _ in range(20):
        _throw(where, rig.rng.bytes(50))
    before = Counted()
    slow = [socket.create_connection(where) for _ in range(TRICKLES)]
    for number in range(FUZZED_QUICK if rig.quick else FUZZED):
        _throw(where, _damage(rig, good))
        if number % 50 == 0:
            for at, each in enumerate(slow):
                _send(each, good[number // 50 + at :][:1])
    pair = rig.join(rig.open(), server)
    grant = server.grant(pair.a_name, (0, 100))
    pair.a.must_move(pair.b_name, grant, 0, 100, 0, 0)
    mine[:100] = server.arena.array[:100]
    told += 1
    rig.close(pair.a)
    for each in slow:
        each.close()
    if len(server.told) != told:
        raise Wrong("a damaged handshake made a peer")
    until(lambda: len(server.lost) > lost, 3.0)
    if len(server.lost) > lost + 1:
        raise Wrong("`lost` was told of a peer that never was")
    wrong = server.arena.changed(mine)
    if wrong:
        raise Wrong(f"during handshakes {wrong}")
    left = before.grown(rss_bytes=32 << 20)
    if left:
        raise Wrong(f"after damaged handshakes: {left}")


def _throw(where: tuple[str, int], data: bytes) -> None:
    """Send it, and wait until it is hung up on."""
    with socket.create_connection(where) as raw:
        raw.settimeout(7.0)
        _send(raw, data)
        _must_hang_up(raw, "a damaged handshake")


def _damage(rig: ChannelRig, good: bytes) -> bytes:
    rng = rig.rng
    kind = int(rng.integers(6))
    data = bytearray(good)
    if kind == 0:
        return bytes(data[: int(rng.integers(len(data)))])
    if kind == 1:
        return bytes(rng.bytes(int(rng.integers(1, 400))))
    if kind == 2:
        data[int(rng.integers(len(data)))] ^= 1 << int(rng.integers(8))
    elif kind == 3:
        at = int(rng.integers(len(data)))
        data[at : at + 4] = b"\xff" * 4
    elif kind == 4:
        at = int(rng.integers(len(data)))
        data[at:at] = rng.bytes(int(rng.integers(1, 64)))
    else:
        at = int(rng.integers(len(data)))
        data[at:] = rng.bytes(len(data) - at)
    return bytes(data)


@check("T18", fix="parse metadata before you dial; hand the time that is left to every step")
def nobody_there(rig: ChannelRig) -> None:
    """Metadata that is none is a ConfigError; where nobody listens, or nobody answers, it is
    BackendUnavailable by the deadline."""
    side = rig.open()
    own = side.channel.metadata()
    none = [b"", b"\xff\xfe\0", b"nonsense", b"other://127.0.0.1:1", own[:3], b"\0" * 5000]
    if b"://" in own:
        scheme = own.partition(b"://")[0]
        none += [scheme + rest for rest in (b"://", b"://127.0.0.1:0", b"://h:99999", b"://h:x")]
    for metadata in none:
        try:
            side.channel.connect(metadata, within(1.0))
        except ConfigError:
            continue
        except LMCacheError as error:
            raise Wrong(f"metadata {metadata[:30]!r}: {error!r}, due is ConfigError") from error
        raise Wrong(f"metadata {metadata[:30]!r} was connected to")
    scheme = own[: -len(own.partition(b"://")[2]) - 3] if address_of(own) else b""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        dead = socket.create_server(("127.0.0.1", 0))
        ports = {"nobody listens": dead.getsockname()[1], "nobody answers": silent.getsockname()[1]}
        dead.close()
        for what, port in ports.items():
            started_s = time.monotonic()
            try:
                side.channel.connect(scheme + b"://127.0.0.1:%d" % port, within(0.5))
                raise Wrong(f"{what}, and connect succeeded")
            except BackendUnavailable:
                pass  # due
            seconds = time.monotonic() - started_s
            if seconds > 0.5 + SLACK_S:
                raise Wrong(f"{what}: a deadline of 0.5 s took {seconds:.1f} s")
    rig.join(side, rig.open())
