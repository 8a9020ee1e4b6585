"""What a client may ask, and what each side is sent.  Pure."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

_PARAMS = "kv_transfer_params"


class Refusal(Exception):
    """An error that the client gets, as OpenAI's API words it.

    Args:
        status: of HTTP.
        message: without anything of the request's body.
        code: for programs.
        retry_after_s: for the header ``Retry-After``; 0 leaves it out.
    """

    def __init__(self, status: int, message: str, code: str, *, retry_after_s: int = 0) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.code = code
        self.retry_after_s = retry_after_s

    @property
    def body(self) -> dict[str, Any]:
        """``{"error": {"message", "type", "code"}}``."""
        kind = "invalid_request_error" if self.status < 500 else "server_error"
        if self.status == 429:
            kind = "rate_limit_error"
        return {"error": {"message": self.message, "type": kind, "code": self.code}}


@dataclass(frozen=True, slots=True)
class Asked:
    """A client's request.

    Attributes:
        path: ``/v1/completions`` or ``/v1/chat/completions``.
        body: as it came, a JSON object in UTF-8.
        fields: the same, parsed.
        alone: why the decoder gets it without a transfer; "" when it may have one.
    """

    path: str
    body: bytes
    fields: dict[str, Any]
    alone: str

    @classmethod
    def parse(cls, path: str, body: bytes) -> Asked:
        """The request of a body.

        Raises:
            Refusal: no JSON object, or one that names transfers itself.
        """
        try:
            fields = json.loads(body.decode("utf-8"))
        # RecursionError: a million brackets are JSON as well.
        except (ValueError, RecursionError):
            raise Refusal(400, "the body is not JSON in UTF-8", "invalid_json") from None
        if not isinstance(fields, dict):
            raise Refusal(400, "the body is not a JSON object", "invalid_json")
        extra = fields.get("vllm_xargs")
        # They name what one engine writes into another's memory: the proxy's business alone.
        if _PARAMS in fields or (isinstance(extra, dict) and _PARAMS in extra):
            raise Refusal(400, f"{_PARAMS} can't be given by a client", "forbidden_parameter")
        return cls(path, body, fields, _why_alone(fields))

    def for_decoder(self, transfer_id: str) -> bytes:
        """The client's bytes, and the transfer's parameters before them; ``transfer_id`` "" adds
        none."""
        if not transfer_id:
            return self.body
        added = json.dumps({_PARAMS: {"lmcache": {"role": "decode", "transfer_id": transfer_id}}})
        start = self.body.index(b"{") + 1
        comma = b"," if self.fields else b""
        return added[:-1].encode() + comma + self.body[start:]

    def for_prefiller(self, transfer_id: str, channel: str) -> bytes:
        """The client's request for one token, that is thrown away, and for a transfer of the
        prompt's pages to ``channel``."""
        fields = dict(self.fields)
        fields["max_tokens"] = 1
        for name in ("max_completion_tokens", "n", "best_of"):
            if name in fields:
                fields[name] = 1
        fields["stream"] = False
        fields.pop("stream_options", None)
        fields.pop("min_tokens", None)
        fields[_PARAMS] = {
            "lmcache": {"role": "prefill", "transfer_id": transfer_id, "decoder": channel}
        }
        return json.dumps(fields).encode()


def _why_alone(fields: dict[str, Any]) -> str:
    """A transfer belongs to one sequence: an engine makes several of such a request, all with the
    same transfer id.  One that asks for the prompt's own logits reads no cache at all, and
    embeddings have no identity."""
    prompt = fields.get("prompt")
    if isinstance(prompt, list) and len(prompt) > 1 and isinstance(prompt[0], (str, list)):
        return "several_prompts"
    if any(fields.get(name) not in (None, 1) for name in ("n", "best_of")):
        return "several_answers"
    if fields.get("use_beam_search"):
        return "several_answers"
    if fields.get("prompt_logprobs") is not None:
        return "prompt_logprobs"
    if fields.get("echo") and fields.get("logprobs") is not None:
        return "prompt_logprobs"
    if fields.get("prompt_embeds") is not None:
        return "prompt_embeds"
    return ""
