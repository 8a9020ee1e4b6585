"""What NIXL's S3 plugin does not do, through boto3: delete, list, and ask whether the store lives.

One try each, with short time-outs: callers run it on a worker and have a deadline of their own.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from lmcache_backend_nixl.frame import HEADER_BYTES
from lmcache_core.sdk import BackendUnavailable, ConfigError, ScanEntry

_CONNECT_S, _READ_S = 2.0, 10.0


class Bucket:
    """One bucket; thread-safe.

    Args:
        name: of the bucket.
        options: validated, of the URL.

    Attributes:
        parameters: of NIXL's plugin for the same bucket and login.

    Raises:
        ConfigError: boto3 or credentials are missing.
    """

    def __init__(self, name: str, options: Mapping[str, Any]) -> None:
        try:
            import boto3
            from botocore.config import Config
        except ImportError as error:
            raise ConfigError(
                f"boto3 can't be imported: {error}",
                backend="nixl",
                op="open",
                hint="pip install 'lmcache-backend-nixl[obj]'",
            ) from error
        self._name = name
        self._prefix: str = options["prefix"]
        endpoint: str = options["endpoint"]
        session = boto3.Session(
            aws_access_key_id=options["access_key"] or None,
            aws_secret_access_key=options["secret_key"] or None,
            region_name=options["region"],
        )
        login = session.get_credentials()
        if login is None:
            raise ConfigError(
                "no S3 credentials",
                backend="nixl",
                op="open",
                hint="set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or give both as options",
            )
        style = "virtual" if options["virtual_addressing"] else "path"
        self._client: Any = session.client(
            "s3",
            endpoint_url=endpoint or None,
            config=Config(
                connect_timeout=_CONNECT_S,
                read_timeout=_READ_S,
                retries={"total_max_attempts": 1},
                s3={"addressing_style": style},
            ),
        )
        frozen = login.get_frozen_credentials()
        self.parameters = {
            "bucket": name,
            "access_key": frozen.access_key,
            "secret_key": frozen.secret_key,
            "region": options["region"],
            "scheme": "http" if endpoint.startswith("http://") else "https",
            "use_virtual_addressing": str(bool(options["virtual_addressing"])).lower(),
            **({"endpoint_override": endpoint} if endpoint else {}),
            **({"session_token": frozen.token} if frozen.token else {}),
        }

    def object_of(self, key: bytes) -> str:
        """The name of the object that holds ``key``."""
        return self._prefix + key.hex()

    def check(self) -> None:
        """The bucket is there and answers.

        Raises:
            ConfigError: it is not there, or the login is refused.
            BackendUnavailable: nobody answers.
        """
        self._ask("head_bucket", Bucket=self._name)

    def delete(self, keys: Sequence[bytes]) -> list[bool]:
        """Remove objects, absent or not; whether each is gone.

        Raises:
            ConfigError, BackendUnavailable: see `check`.
        """
        names = [self.object_of(key) for key in keys]
        rows = [{"Key": name} for name in names]
        answer = self._ask(
            "delete_objects", Bucket=self._name, Delete={"Objects": rows, "Quiet": True}
        )
        kept = {row.get("Key") for row in answer.get("Errors", ())}
        return [name not in kept for name in names]

    def scan(self, prefix: bytes) -> Iterator[ScanEntry]:
        """Every object that is long enough to be a value, and whose name is a key."""
        more: dict[str, str] = {}
        while True:
            page = self._ask(
                "list_objects_v2", Bucket=self._name, Prefix=self._prefix + prefix.hex(), **more
            )
            for row in page.get("Contents", ()):
                key = _key_of(row["Key"][len(self._prefix) :])
                if key is not None and row["Size"] >= HEADER_BYTES:
                    used_at_s = row["LastModified"].timestamp()
                    yield ScanEntry(key, row["Size"] - HEADER_BYTES, used_at_s)
            if not page.get("IsTruncated"):
                return
            more = {"ContinuationToken": page["NextContinuationToken"]}

    def close(self) -> None:
        """Close idle connections."""
        self._client.close()

    def _ask(self, method: str, **arguments: Any) -> Any:
        from botocore.exceptions import BotoCoreError, ClientError

        try:
            return getattr(self._client, method)(**arguments)
        except ClientError as error:
            code = str(error.response.get("Error", {}).get("Code", ""))
            status = int(error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))
            if status in (401, 403, 404):
                raise ConfigError(
                    f"the bucket {self._name!r} can't be used: {code}",
                    backend="nixl",
                    op=method,
                    hint="is the bucket there, and may this login read, write, delete and list?",
                ) from error
            raise _away(f"{code or status}", method) from error
        except BotoCoreError as error:
            raise _away(type(error).__name__, method) from error


def _away(why: str, op: str) -> BackendUnavailable:
    return BackendUnavailable(
        f"the S3 service does not answer: {why}",
        backend="nixl",
        op=op,
        hint="check endpoint, network and the service's log",
    )


def _key_of(text: str) -> bytes | None:
    try:
        key = bytes.fromhex(text)
    except ValueError:
        return None
    return key if 1 <= len(key) <= 64 and key.hex() == text else None
