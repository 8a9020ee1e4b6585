"""Wrong clients: mutants of the Redis connector, behind the fault proxy."""

from __future__ import annotations

import os
import time
from dataclasses import replace

from lmcache_backend_redis.connector import RedisConnector
from lmcache_backend_redis.layout import Head, head_name
from lmcache_backend_redis.wire import command
from lmcache_core.sdk import BackendUnavailable, Durability, GetResult, Status
from mutants.catalogue import mutant

Base = RedisConnector


@mutant("H1")
class RawErrors(Base):
    """A refused connection escapes as it is."""

    def exists(self, keys, ctx):
        try:
            return super().exists(keys, ctx)
        except BackendUnavailable as error:
            raise ConnectionRefusedError(str(error)) from error


@mutant("H1")
class GoneIsMiss(Base):
    """A store that is gone is a miss."""

    def get_into(self, keys, targets, ctx):
        try:
            return super().get_into(keys, targets, ctx)
        except BackendUnavailable:
            return [GetResult(Status.MISS)] * len(keys)


@mutant("H2")
class OkWhenCut(Base):
    """A get that was cut is OK with what came."""

    def get_into(self, keys, targets, ctx):
        try:
            return super().get_into(keys, targets, ctx)
        except BackendUnavailable:
            return [GetResult(Status.OK, target.nbytes) for target in targets]


@mutant("F2")
class HeadFirst(Base):
    """The head is published before its pieces."""

    def put_one(self, key, source, timeout_s):
        deadline_s = time.monotonic() + timeout_s
        head = Head.new(len(source), 2 << 20)

        def put(session):
            session.send([command(b"SET", head_name(key), head.encode())], deadline_s)
            session.reply(deadline_s)
            for name, (start, end) in zip(head.names(key), head.spans()):
                piece = bytes(source[start:end])
                session.send([command(b"SET", name, piece)], deadline_s)
                session.reply(deadline_s)

        self._change(put, deadline_s)


@mutant("H3")
class OkBeforeTheReply(Base):
    """A put whose connection broke is OK."""

    def put_one(self, key, source, timeout_s):
        try:
            super().put_one(key, source, timeout_s)
        except BackendUnavailable:
            pass


@mutant("H4")
class TenSeconds(Base):
    """It waits ten seconds, whatever the deadline."""

    def exists(self, keys, ctx):
        if ctx.remaining_s() <= 0:
            return super().exists(keys, ctx)
        later = type(ctx)(deadline_s=time.monotonic() + 10)
        return super().exists(keys, later)


@mutant("H5")
class TakesTheLastReply(Base):
    """After a lost reply the connection is used again."""

    def __init__(self, sessions, facts, **options):
        super().__init__(sessions, facts, **options)
        self._drop, sessions.drop_idle = sessions.drop_idle, lambda: None
        sessions._use = self._reuse(sessions)

    def _reuse(self, sessions):
        plain = type(sessions)._use

        def use(session, op):
            hang_up, session.close = session.close, lambda: None
            try:
                found = plain(sessions, session, op)
            except TimeoutError:
                sessions._idle.append(session)
                raise
            except BaseException:
                hang_up()
                raise
            session.close = hang_up
            return found

        return use

    def close_resources(self):
        self._drop()


@mutant("H6")
class CountsMilliseconds(Base):
    """Whatever takes more than 8 ms has timed out."""

    def get_into(self, keys, targets, ctx):
        started_s = time.monotonic()
        found = super().get_into(keys, targets, ctx)
        late = time.monotonic() - started_s > 0.008
        return [GetResult(Status.TIMED_OUT)] * len(keys) if late else found


@mutant("H10")
class NeverConnectsAgain(Base):
    """Once the server was gone, every call fails until it is opened again."""

    _gone = False

    def put_one(self, key, source, timeout_s):
        if self._gone:
            raise BackendUnavailable("it was gone", hint="open it again")
        super().put_one(key, source, timeout_s)

    def get_into(self, keys, targets, ctx):
        try:
            return super().get_into(keys, targets, ctx)
        except BackendUnavailable:
            self._gone = True
            raise


@mutant("H12")
class OneDamagesAll(Base):
    """A damaged value makes the whole batch CORRUPT."""

    def get_into(self, keys, targets, ctx):
        found = super().get_into(keys, targets, ctx)
        damaged = any(each.status is Status.CORRUPT for each in found)
        return [GetResult(Status.CORRUPT)] * len(keys) if damaged else found


@mutant("H12")
class LeavesTornHeads(Base):
    """A value whose pieces are gone is MISS for get, and there for exists."""

    def _drop_torn(self, read, deadline_s):
        return None


@mutant("H13")
class RefusedIsMiss(Base):
    """A server that refuses to read has nothing."""

    def exists(self, keys, ctx):
        try:
            return super().exists(keys, ctx)
        except BackendUnavailable as error:
            if "NOPERM" in str(error):
                return [Status.MISS] * len(keys)
            raise


@mutant("K2")
class LosesDeletesWhenCut(Base):
    """A delete that was cut is OK."""

    def delete_one(self, key, timeout_s):
        try:
            super().delete_one(key, timeout_s)
        except BackendUnavailable:
            pass


@mutant("I4")
class ClaimsServer(Base):
    """It claims that values survive the server, which keeps them in memory."""

    arguments = ()

    def __init__(self, sessions, facts, **options):
        super().__init__(sessions, facts, **options)
        self.capabilities = replace(self.capabilities, durability=Durability.SERVER)


@mutant("L3")
class LeaksBrokenConnections(Base):
    """It keeps a copy of every connection that broke."""

    def get_into(self, keys, targets, ctx):
        try:
            return super().get_into(keys, targets, ctx)
        except BackendUnavailable:
            os.dup(2)
            raise
