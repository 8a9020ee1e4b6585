"""Why a request is not done."""

from __future__ import annotations

import msgspec

from lmcache_core.controller.messages import ErrorBody, Problem


class Refusal(Exception):
    """An answer that is no success.

    Args:
        status: of HTTP.
        code: for programs.
        message, hint: for people; without tokens, salts and token ids.
        retry_after_s: for the header ``Retry-After``; 0 leaves it out.
        allow: methods, for 405.
    """

    def __init__(
        self,
        status: int,
        code: str,
        message: str,
        *,
        hint: str = "",
        retry_after_s: int = 0,
        allow: str = "",
    ) -> None:
        super().__init__(message)
        self.status = status
        self.code = code
        self.message = message
        self.hint = hint
        self.headers: dict[str, str] = {}
        if retry_after_s:
            self.headers["retry-after"] = str(retry_after_s)
        if allow:
            self.headers["allow"] = allow
        if status == 401:
            self.headers["www-authenticate"] = "Bearer"

    @property
    def body(self) -> bytes:
        """A `Problem` as JSON."""
        error = ErrorBody(code=self.code, message=self.message, hint=self.hint)
        return msgspec.json.encode(Problem(error=error))


def not_found(what: str, name: str, *, hint: str = "") -> Refusal:
    """404 for ``name``, which is cut to a sane length."""
    shown = name if len(name) <= 64 else name[:61] + "..."
    return Refusal(404, "not_found", f"there is no {what} {shown!r}", hint=hint)
