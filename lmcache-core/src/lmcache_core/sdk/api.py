"""Version of the backend contract.

The major is carried by the entry-point group ``lmcache.backends.v1``; `API_VERSION`
is what `BackendInfo.api_min` is compared with.  0.9 is provisional: it becomes 1.0
when channels and codecs have used it.
"""

API_VERSION: tuple[int, int] = (0, 9)
"""Version of the contract of backends; see `BackendInfo.api_min`."""
BACKEND_GROUP = "lmcache.backends.v1"
"""Entry-point group of backends; the entry's name is the URL scheme it serves."""
