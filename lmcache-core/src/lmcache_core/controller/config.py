"""A controller's limits."""

from __future__ import annotations

from dataclasses import dataclass, field

from lmcache_core.sdk import ConfigError

LOOPBACK_NAMES = ("localhost", "127.0.0.1", "::1")
MAX_WAIT_S = 30.0


@dataclass(frozen=True, slots=True, kw_only=True)
class ControllerConfig:
    """What `lmcache_core.controller.app.build` serves.

    Attributes:
        token: of operators: everything.
        instance_token: of instances: ``/v1/sync`` and ``/v1/where``, and ``/metrics`` for who
            collects them; "" is none.
        allowed_hosts: names that a Host header may have, beside those of loopback.
        lease_s: an instance that says nothing for so long is lost.
        forget_s: a lost instance is no longer shown.
        job_timeout_s: what is not done by then has failed.
        job_keep_s, max_jobs: for jobs that have ended.
        max_live_jobs: further ones get 429.
        max_pinned_bytes_per_owner: 0 is no limit.
        max_chunks: that differ, of all instances.
        max_namespaces, max_models: whose names are kept; further ones are counted.
        max_namespaces_per_instance: of one process, the latest, that quotas are told for.
        max_body_bytes: of one request; ``max_held_body_bytes`` of all at a time.
        max_in_flight: requests of operators at a time; further ones get 503.
        question_timeout_s: for an instance to tokenize or explain.
        body_timeout_s: for a request's body to come.
        refresh_s: how often shared state is read again.
        tick_s: how often leases and deadlines are looked at.
        sample_s: between two points of the history.

    Raises:
        ConfigError: a limit out of range.
    """

    token: str = field(repr=False)
    instance_token: str = field(default="", repr=False)
    allowed_hosts: tuple[str, ...] = ()
    lease_s: float = 30.0
    forget_s: float = 3600.0
    job_timeout_s: float = 3600.0
    job_keep_s: float = 7 * 86400.0
    max_jobs: int = 1000
    max_live_jobs: int = 256
    max_pins: int = 10_000
    max_pinned_bytes_per_owner: int = 0
    max_quotas: int = 10_000
    max_instances: int = 1024
    max_chunks_per_instance: int = 1_000_000
    max_chunks: int = 2_000_000
    max_namespaces: int = 100_000
    max_namespaces_per_instance: int = 16_384
    max_models: int = 1000
    idempotency_keep_s: float = 86400.0
    max_idempotency_keys: int = 100_000
    max_body_bytes: int = 16 << 20
    max_held_body_bytes: int = 256 << 20
    max_in_flight: int = 256
    question_timeout_s: float = 10.0
    body_timeout_s: float = 30.0
    refresh_s: float = 0.25
    tick_s: float = 1.0
    sample_s: float = 10.0

    def __post_init__(self) -> None:
        if not self.token or self.token == self.instance_token:
            raise ConfigError(
                "a controller needs a token, and another one for instances if any",
                op="controller",
                hint="lmc token FILE makes one",
            )
        may_be_zero = {"max_pinned_bytes_per_owner"}
        for name in self.__slots__:
            value = getattr(self, name)
            if not isinstance(value, (int, float)):
                continue
            if value < 0 or (value == 0 and name not in may_be_zero):
                raise ConfigError(f"{name} is {value}", op="controller", hint="give more than 0")
            if name.endswith("_s") and not value <= 3650 * 86400:
                raise ConfigError(f"{name} is {value}", op="controller", hint="give less")
