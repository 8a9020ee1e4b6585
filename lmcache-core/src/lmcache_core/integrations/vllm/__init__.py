"""vLLM connector, found by name ``LMCacheCoreConnector`` through vLLM's plugin group."""

from __future__ import annotations

CONNECTOR_NAME = "LMCacheCoreConnector"
_MODULE = "lmcache_core.integrations.vllm.connector"


def register() -> None:
    """Make the connector known to vLLM; vLLM calls this several times per process."""
    from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory

    if CONNECTOR_NAME not in KVConnectorFactory._registry:
        KVConnectorFactory.register_connector(CONNECTOR_NAME, _MODULE, CONNECTOR_NAME)
