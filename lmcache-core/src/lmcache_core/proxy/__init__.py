"""The proxy in front of prefill and decode engines: ``lmc pd-proxy``.

A request goes to a prefill engine and a decode engine at the same time.  Both know it by one fresh
transfer id: the prefiller pushes what it computes to the decoder's channel, the decoder takes what
comes until its own deadline and computes the rest.  So nothing here waits for a prefiller, and a
lost one costs time, never an answer.

`pool` and `request` are pure; `upstream`, `exchange` and `app` need the extra ``proxy``.
"""

from __future__ import annotations

from lmcache_core.proxy.config import Engine, ProxyConfig

__all__ = ["Engine", "ProxyConfig"]
