from lmcache_backend_shelf.conformance import ShelfHarness

from lmcache_conformance import ConnectorConformance


class TestShelf(ConnectorConformance):
    harness = ShelfHarness()
