"""The same request with the same key is carried out once."""

from __future__ import annotations

import hashlib
import re
import secrets
from collections.abc import Awaitable, Callable

import msgspec
from msgspec.structs import replace

from lmcache_core.controller.config import ControllerConfig
from lmcache_core.controller.documents import Documents, StoreDown
from lmcache_core.controller.operations import IDEMPOTENCY_KEY, Answer, Call
from lmcache_core.controller.problem import Refusal
from lmcache_core.controller.records import AnswerRecord

_KIND = "answer"
REPLAYED = "idempotency-replayed"


class Idempotency:
    """Keys and the answers to their first requests.

    A request that a crash cut off is carried out again, and makes things of the same ids: what it
    had made already is found, not made twice.
    """

    def __init__(self, config: ControllerConfig, documents: Documents) -> None:
        self._config = config
        self._documents = documents

    async def once(
        self,
        key: str,
        request: bytes,
        call: Call,
        run: Callable[[Call], Awaitable[Answer]],
    ) -> Answer:
        """The answer to the first such request.  Only successes are kept.

        Raises:
            Refusal: the key is none, was another request's, or there are too many; and what
                ``run`` raises.
            StoreDown: see there.
        """
        if not re.fullmatch(IDEMPOTENCY_KEY, key):
            raise Refusal(422, "bad_idempotency_key", "an Idempotency-Key has 1 to 128 characters")
        id = hashlib.sha256(key.encode()).hexdigest()
        digest = hashlib.sha256(request).hexdigest()
        known = await self._find(id)
        if known is None:
            known = await self._claim(id, digest)
        if known.request != digest:
            raise Refusal(
                422,
                "idempotency_key_used",
                "this Idempotency-Key was another request's",
                hint="use a new one for each thing that is to be made",
            )
        if known.status:
            return Answer(body=known.body, status=known.status, headers={REPLAYED: "true"})
        call.seed = known.seed
        answer = await run(call)
        record = replace(known, status=answer.status, body=answer.encoded())
        try:
            await self._put(id, record, new=False)
        except StoreDown:
            pass  # counted; the next request finds what was made
        return Answer(body=record.body, status=answer.status)

    async def _claim(self, id: str, digest: str) -> AnswerRecord:
        if await self._documents.count(_KIND) >= self._config.max_idempotency_keys:
            raise Refusal(
                429,
                "too_many_keys",
                f"{self._config.max_idempotency_keys} idempotency keys are kept",
                hint="send none, or wait until older ones end",
                retry_after_s=60,
            )
        mine = AnswerRecord(request=digest, seed=secrets.token_bytes(16))
        if await self._put(id, mine, new=True):
            return mine
        return await self._find(id) or mine

    async def _find(self, id: str) -> AnswerRecord | None:
        body = await self._documents.get_bytes(_KIND, id)
        return None if body is None else msgspec.msgpack.decode(body, type=AnswerRecord)

    async def _put(self, id: str, record: AnswerRecord, *, new: bool) -> bool:
        return await self._documents.put_bytes(
            _KIND,
            id,
            msgspec.msgpack.encode(record),
            ttl_s=self._config.idempotency_keep_s,
            new=new,
        )
