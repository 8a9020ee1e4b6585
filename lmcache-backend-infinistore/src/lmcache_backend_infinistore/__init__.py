"""InfiniStore backend of lmcache-core; see README.md."""
