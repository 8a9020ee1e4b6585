"""The controllers of a fleet, seen as one: the next is asked when one is away."""

from __future__ import annotations

import ssl
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar
from urllib.parse import urlencode

import msgspec

from lmcache_core.agent.http import Answer, ControllerLink
from lmcache_core.cli.fleet_text import plain
from lmcache_core.controller.messages import Problem
from lmcache_core.sdk import BackendUnavailable, LMCacheError

TIMEOUT_S = 30.0
"""For each step of a request."""
PATIENCE_S = 30.0
"""How long a request is tried again while controllers are busy or away."""
ROUNDS = 2
"""How often each controller that is away is tried."""
PAUSE_S = 0.5
BUSY = (429, 503)
MAX_CONTROLLERS = 16

T = TypeVar("T")
_HINTS = {
    401: "--token-file names the token of that controller",
    403: "this token may not do that: take the operators' one",
    404: "`lmc instances`, `lmc pins` and `lmc jobs` list what there is",
    409: "look at the fleet with `lmc status`, and ask again",
    413: "ask for less at once: fewer tokens or keys",
    421: "start the controller with --allow-host for this name, or use the address it knows",
    504: "no instance answered in time: see `lmc status`",
}


class Refused(LMCacheError):
    """The controller said no: asking again would not help.

    Args:
        status: of the HTTP answer.
        code: the problem's, for programs.
    """

    def __init__(self, message: str, *, status: int, code: str, hint: str) -> None:
        super().__init__(message, op="controller", hint=hint)
        self.status = status
        self.code = code


@dataclass(frozen=True, slots=True)
class Got(Generic[T]):
    """An answer, and how it was written."""

    value: T
    body: bytes


class Fleet:
    """Asks controllers, the one that answered last first.  Not thread-safe.

    A request that makes something has one idempotency key over all tries, so it is done once.

    Args:
        links: at least one.
        sleep: waits for seconds.
        now_s: monotonic seconds.
    """

    def __init__(
        self,
        links: Sequence[ControllerLink],
        *,
        sleep: Callable[[float], None] = time.sleep,
        now_s: Callable[[], float] = time.monotonic,
    ) -> None:
        self._links = list(links)
        self._sleep = sleep
        self._now_s = now_s
        self.unanswered = False
        """Whether something was asked for, and no answer came yet."""

    def get(
        self,
        path: str,
        kind: type[T],
        *,
        query: Mapping[str, str] | None = None,
        timeout_s: float = TIMEOUT_S,
    ) -> Got[T]:
        """What is at ``path``; empty values of ``query`` are left out.

        Raises:
            Refused: the controller said no.
            BackendUnavailable: no controller gave an answer of ``kind``.
        """
        asked = {name: value for name, value in (query or {}).items() if value}
        whole = f"{path}?{urlencode(asked)}" if asked else path
        return self._ask("GET", whole, None, kind, {}, timeout_s)

    def post(
        self, path: str, body: msgspec.Struct | None, kind: type[T], *, makes: bool = True
    ) -> Got[T]:
        """The answer to ``body``; ``makes``: it changes something.  Raises as `get` does."""
        key = {"Idempotency-Key": uuid.uuid4().hex} if makes else {}
        content = None if body is None else msgspec.json.encode(body)
        self.unanswered = makes
        got = self._ask("POST", path, content, kind, key, TIMEOUT_S)
        self.unanswered = False
        return got

    def put(self, path: str, body: msgspec.Struct, kind: type[T]) -> Got[T]:
        """Set what is at ``path``.  Raises as `get` does."""
        return self._ask("PUT", path, msgspec.json.encode(body), kind, {}, TIMEOUT_S)

    def delete(self, path: str, kind: type[T]) -> Got[T]:
        """End what is at ``path``, which is answered by ``kind``.  Raises as `get` does."""
        self.unanswered = True
        got = self._ask("DELETE", path, None, kind, {}, TIMEOUT_S)
        self.unanswered = False
        return got

    def remove(self, path: str) -> None:
        """End what is at ``path``, which has no answer.  Raises as `get` does."""
        self._ask("DELETE", path, None, object, {}, TIMEOUT_S)

    def close(self) -> None:
        """Close the connections."""
        for link in self._links:
            link.close()

    def _ask(
        self,
        method: str,
        path: str,
        body: bytes | None,
        kind: type[T],
        headers: dict[str, str],
        timeout_s: float,
    ) -> Got[T]:
        link, answer = self._answer(method, path, body, headers, timeout_s)
        if not 200 <= answer.status < 300:
            self.unanswered = False
            raise _refusal(link.url, answer)
        content = answer.body if answer.status != 204 else b"null"
        try:
            return Got(msgspec.json.decode(content, type=kind), content)
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            raise BackendUnavailable(
                f"{link.url} gave an answer that is not understood: {plain(str(error))}",
                op="controller",
                hint="is it a controller, and of the same version as this lmc?",
            ) from error

    def _answer(
        self,
        method: str,
        path: str,
        body: bytes | None,
        headers: dict[str, str],
        timeout_s: float,
    ) -> tuple[ControllerLink, Answer]:
        end_s = self._now_s() + PATIENCE_S
        rounds = 0
        while True:
            away: list[BackendUnavailable] = []
            busy: list[tuple[ControllerLink, Answer]] = []
            for link in tuple(self._links):
                try:
                    answer = link.request(method, path, body, timeout_s=timeout_s, headers=headers)
                except BackendUnavailable as error:
                    away.append(error)
                    continue
                if answer.status in BUSY:
                    busy.append((link, answer))
                    continue
                self._links.remove(link)
                self._links.insert(0, link)
                return link, answer
            rounds += 1
            pause_s = min((_retry_after_s(answer) for _, answer in busy), default=PAUSE_S)
            if (not busy and rounds >= ROUNDS) or self._now_s() + pause_s > end_s:
                if busy:
                    return busy[0]
                raise _away(away)
            self._sleep(pause_s)


def _retry_after_s(answer: Answer) -> float:
    """Whole seconds, as controllers write them; anything else is as good as nothing."""
    text = answer.headers.get("retry-after", "")
    return max(float(text), PAUSE_S) if text.isascii() and text.isdigit() else PAUSE_S


def _away(errors: list[BackendUnavailable]) -> BackendUnavailable:
    """Why none answered."""
    first = errors[0]
    hint = first.hint
    if any(isinstance(error.__cause__, ssl.SSLCertVerificationError) for error in errors):
        hint = "--ca-file names the certificate that signed the controller's"
    message = first.message
    if len(errors) > 1:
        message = "no controller answers: " + "; ".join(error.message for error in errors)
    return BackendUnavailable(plain(message), op="controller", hint=hint)


def _refusal(url: str, answer: Answer) -> LMCacheError:
    """What an answer that is no success means."""
    try:
        problem = msgspec.json.decode(answer.body, type=Problem).error
    except (msgspec.DecodeError, UnicodeDecodeError):
        return BackendUnavailable(
            f"{url} answered {answer.status}, without a reason",
            op="controller",
            hint=_HINTS.get(answer.status, "is it a controller, or something in front of one?"),
        )
    message = plain(problem.message or f"{url} answered {answer.status}")
    hint = plain(problem.hint) or _HINTS.get(answer.status, "")
    if answer.status in BUSY:
        wait_s = _retry_after_s(answer)
        hint = hint or f"it is busy: try again in {wait_s:.0f} s"
    if answer.status >= 500 or answer.status in BUSY:
        return BackendUnavailable(message, op="controller", hint=hint)
    return Refused(message, status=answer.status, code=problem.code, hint=hint)
