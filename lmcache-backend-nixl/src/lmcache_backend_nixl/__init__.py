"""NVIDIA NIXL as a backend of lmcache-core; see `plugin`."""
