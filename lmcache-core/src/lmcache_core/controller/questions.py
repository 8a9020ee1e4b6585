"""What is asked of instances, and answered with their next sync."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from lmcache_core.agent import wire
from lmcache_core.controller.problem import Refusal
from lmcache_core.controller.registry import Record

MAX_OPEN = 64
"""Questions to one instance at a time."""
_AGAIN_S = 2.0


@dataclass(frozen=True, slots=True)
class _Open:
    question: wire.Question
    answer: asyncio.Future[wire.Answer]


class Questions:
    """Belongs to one event loop."""

    def __init__(self, *, timeout_s: float, now_s: Callable[[], float]) -> None:
        self._timeout_s = timeout_s
        self._now_s = now_s
        self._open: dict[str, dict[str, _Open]] = {}

    async def tokenize(self, record: Record, text: str) -> list[int]:
        """Token ids of ``text``.

        Raises:
            Refusal: no answer in time, or the instance can't.
        """
        answer = await self._ask(record, wire.Tokenize(id=_new_id(), text=text))
        return answer.tokens

    async def explain(
        self, records: Sequence[Record], request_id: str
    ) -> tuple[str, list[wire.MissRow]] | None:
        """Name and misses of the first instance that knows the request; None when none does.

        Raises:
            Refusal: nobody answered in time.
        """
        asked = {
            asyncio.create_task(
                self._ask(record, wire.Explain(id=_new_id(), request_id=request_id))
            ): record
            for record in records
        }
        refusal: Refusal | None = None
        try:
            waiting = set(asked)
            while waiting:
                done, waiting = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
                for task in done:
                    error = task.exception()
                    if isinstance(error, Refusal):
                        refusal = error
                    elif error is not None:
                        raise error
                    elif task.result().found:
                        return asked[task].name, task.result().misses
        finally:
            for task in asked:
                task.cancel()
            await asyncio.gather(*asked, return_exceptions=True)
        if refusal is not None:
            raise refusal
        return None

    def due(self, record: Record) -> list[wire.Question]:
        """What the instance is to be asked now; again after a while, as an answer may be lost."""
        now_s = self._now_s()
        found = []
        for id, held in self._open.get(record.name, {}).items():
            if now_s - record.told.get(id, float("-inf")) >= _AGAIN_S:
                record.told[id] = now_s
                found.append(held.question)
        return found

    def answered(self, record: Record, answers: Sequence[wire.Answer]) -> None:
        """Take answers; those to nobody's question are ignored."""
        held = self._open.get(record.name, {})
        for answer in answers:
            found = held.get(answer.id)
            if found is not None and not found.answer.done():
                found.answer.set_result(answer)

    async def _ask(self, record: Record, question: wire.Question) -> wire.Answer:
        held = self._open.setdefault(record.name, {})
        if len(held) >= MAX_OPEN:
            raise Refusal(
                503, "busy", f"instance {record.name!r} is asked too much", retry_after_s=1
            )
        future: asyncio.Future[wire.Answer] = asyncio.get_running_loop().create_future()
        held[question.id] = _Open(question, future)
        record.wake.set()
        try:
            answer = await asyncio.wait_for(future, self._timeout_s)
        except (asyncio.TimeoutError, TimeoutError):
            raise Refusal(
                504,
                "no_answer",
                f"instance {record.name!r} did not answer within {self._timeout_s:g} s",
                hint="is it alive?  GET /v1/instances tells",
            ) from None
        finally:
            del held[question.id]
            record.told.pop(question.id, None)
            if not held:
                self._open.pop(record.name, None)
        if answer.error:
            raise Refusal(409, "not_answered", f"instance {record.name!r}: {answer.error}")
        return answer


def _new_id() -> str:
    return "q-" + secrets.token_hex(8)
