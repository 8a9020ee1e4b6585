"""What the conformance suite needs to judge this backend."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lmcache_backend_nixl.server import BUCKET, LOGIN, S3Server, url_at
from lmcache_conformance import TcpHarness
from lmcache_conformance.builtin import FileHarness


class NixlPosixHarness(FileHarness):
    """Files below the scratch directory, as for ``file://``."""

    name = "nixl"

    def url(self) -> str:
        return f"nixl+posix://{self.scratch}/kv{self.options}"

    def small_url(self, size_bytes: int) -> str:
        return "nixl+posix" + super().small_url(size_bytes).removeprefix("file")

    def bad_urls(self) -> list[str]:
        return ["nixl+posix" + url.removeprefix("file") for url in super().bad_urls()]


class NixlObjHarness(TcpHarness):
    """moto's S3 service, with one bucket; the fault proxy stands before it."""

    name = "nixl-obj"

    def start(self, scratch: Path) -> None:
        self.server = S3Server()
        super().start(scratch)

    def stop(self) -> None:
        super().stop()
        self.server.close()

    def address(self) -> tuple[str, int] | Path:
        return ("127.0.0.1", self.server.port)

    def url_at(self, host: str, port: int) -> str:
        # moto, a Python server, takes minutes for the largest value that S3 takes in one put.
        return url_at(f"http://{host}:{port}") + "&max_value_bytes=16777216"

    def bad_urls(self) -> list[str]:
        here = self.server.url
        return [
            "nixl+obj://",
            here.replace(f"//{BUCKET}", "//other-bucket"),
            here.replace(f":{self.server.port}", ":1"),
            here.replace("endpoint=http://", "endpoint="),
        ]

    def litter(self) -> None:
        for name in ("lmc/README", "lmc/6", "lmc/62", "lmc/A1", "other/61"):
            self._client().put_object(Bucket=BUCKET, Key=name, Body=b"no value")

    def corrupt(self, key: bytes) -> None:
        data = bytearray(self._object(key))
        data[len(data) // 2] ^= 0x10
        self._client().put_object(Bucket=BUCKET, Key=f"lmc/{key.hex()}", Body=bytes(data))

    def truncate(self, key: bytes) -> None:
        data = self._object(key)
        self._client().put_object(Bucket=BUCKET, Key=f"lmc/{key.hex()}", Body=data[:-5])

    def kill(self) -> None:
        self.server.kill()

    def restart(self) -> None:
        self.server.start()

    def server_version(self) -> str:
        from importlib import metadata

        return f"moto {metadata.version('moto')}"

    def _object(self, key: bytes) -> bytes:
        found = self._client().get_object(Bucket=BUCKET, Key=f"lmc/{key.hex()}")
        return bytes(found["Body"].read())

    def _client(self) -> Any:
        import boto3

        return boto3.client(
            "s3",
            endpoint_url=self.server.endpoint,
            aws_access_key_id=LOGIN["access_key"],
            aws_secret_access_key=LOGIN["secret_key"],
            region_name="us-east-1",
        )
