"""Redis and Valkey as a tier of lmcache-core."""
