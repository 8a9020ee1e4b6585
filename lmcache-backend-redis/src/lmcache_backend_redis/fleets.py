"""Throw-away fleets for tests: a cluster, and a master with its replica behind sentinels.

Every server listens on loopback only.
"""

from __future__ import annotations

import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any

import redis

from lmcache_backend_redis.server import RedisServer
from lmcache_conformance.throwaway import free_port

START_LIMIT_S = 20.0
SLOTS = 16384


class RedisCluster:
    """``masters`` nodes that share the slots, and a replica of the first.

    Args:
        masters: nodes with slots.
        replica: whether node 0 has one.
        arguments: further ones of every server.

    Attributes:
        nodes: the servers, masters first.

    Raises:
        RuntimeError: no server program, or it does not come together.
    """

    def __init__(
        self, *, masters: int = 3, replica: bool = True, arguments: tuple[str, ...] = ()
    ) -> None:
        self.nodes: list[RedisServer] = []
        self._buses: list[int] = []
        self._masters = masters
        try:
            for _ in range(masters + replica):
                self._buses.append(free_port())
                self.nodes.append(
                    RedisServer(
                        arguments=(
                            "--cluster-enabled", "yes", "--cluster-node-timeout", "1000",
                            "--cluster-port", str(self._buses[-1]),
                            "--cluster-replica-validity-factor", "0",
                            "--cluster-require-full-coverage", "no", *arguments,
                        )
                    )
                )  # fmt: skip
            self._join(replica)
        except BaseException:
            self.close()
            raise

    @property
    def url(self) -> str:
        """Of every node."""
        places = ",".join(f"127.0.0.1:{node.port}" for node in self.nodes)
        return f"redis+cluster://{places}"

    def client(self, node: int) -> Any:
        """A plain client of one node; redis-py does not type its commands."""
        return redis.Redis(port=self.nodes[node].port)

    def master_of(self, slot: int) -> int:
        """Index of the node that has ``slot``."""
        for row in self.client(self._alive()).execute_command("CLUSTER SLOTS"):
            if row[0] <= slot <= row[1]:
                return next(i for i, node in enumerate(self.nodes) if node.port == row[2][1])
        raise LookupError(slot)

    def begin_move(self, slot: int, target: int) -> int:
        """Put ``slot`` on its way to node ``target``; the node that it leaves."""
        source = self.master_of(slot)
        names = [self._id(node) for node in (source, target)]
        self.client(target).execute_command("CLUSTER SETSLOT", slot, "IMPORTING", names[0])
        self.client(source).execute_command("CLUSTER SETSLOT", slot, "MIGRATING", names[1])
        return source

    def move_keys(self, slot: int, source: int, target: int, most: int = 1 << 30) -> int:
        """Take at most ``most`` keys of ``slot`` over; how many went."""
        client, moved = self.client(source), 0
        while moved < most:
            count = min(100, most - moved)
            names = client.execute_command("CLUSTER GETKEYSINSLOT", slot, count)
            if not names:
                break
            to = ("127.0.0.1", self.nodes[target].port, "", 0, 5000)
            client.execute_command("MIGRATE", *to, "KEYS", *names)
            moved += len(names)
        return moved

    def end_move(self, slot: int, source: int, target: int) -> None:
        """``slot`` is ``target``'s from now on."""
        name = self._id(target)
        for node in (target, source):
            self.client(node).execute_command("CLUSTER SETSLOT", slot, "NODE", name)

    def wait_until_well(self) -> None:
        """Until every node says that the cluster is ok.

        Raises:
            RuntimeError: that takes too long.
        """
        _until(lambda: all(self._is_well(node) for node in range(len(self.nodes))))

    def close(self) -> None:
        """Kill every node."""
        for node in self.nodes:
            node.close()

    def __enter__(self) -> RedisCluster:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _join(self, replica: bool) -> None:
        first = self.client(0)
        for node in range(1, len(self.nodes)):
            first.execute_command(
                "CLUSTER MEET", "127.0.0.1", self.nodes[node].port, self._buses[node]
            )
        step = -(-SLOTS // self._masters)
        for node in range(self._masters):
            last = min((node + 1) * step, SLOTS) - 1
            self.client(node).execute_command("CLUSTER ADDSLOTSRANGE", node * step, last)
        everybody = range(len(self.nodes))
        _until(lambda: all(self._known(node) == len(self.nodes) for node in everybody))
        if replica:
            of_first = self._id(0)
            self.client(self._masters).execute_command("CLUSTER REPLICATE", of_first)
            _until(lambda: self.client(0).info("replication")["connected_slaves"] == 1)
            _until(lambda: all(self._knows_replica(node) for node in everybody))
        self.wait_until_well()

    def _is_well(self, node: int) -> bool:
        try:
            return self._info(node)["cluster_state"] == "ok"
        except redis.exceptions.RedisError:
            return False

    def _knows_replica(self, node: int) -> bool:
        rows = self.client(node).execute_command("CLUSTER SLOTS")
        return any(len(row) > 3 for row in rows)

    def _known(self, node: int) -> int:
        return int(self._info(node)["cluster_known_nodes"])

    def _info(self, node: int) -> dict[str, str]:
        found: dict[str, str] = self.client(node).execute_command("CLUSTER INFO")
        return found

    def _id(self, node: int) -> str:
        found = self.client(node).execute_command("CLUSTER MYID")
        return found.decode() if isinstance(found, bytes) else str(found)

    def _alive(self) -> int:
        return next(i for i, node in enumerate(self.nodes) if node.runs)


class RedisSentinels:
    """A master, its replica and three sentinels that agree by two.

    Attributes:
        servers: the master of the beginning, and its replica.
    """

    def __init__(self, *, arguments: tuple[str, ...] = ()) -> None:
        self.servers: list[RedisServer] = []
        self._sentinels: list[subprocess.Popen[bytes]] = []
        self._folder = Path(tempfile.mkdtemp(prefix="lmc-sentinel-"))
        self.ports: list[int] = []
        try:
            self.servers.append(RedisServer(arguments=arguments))
            follow = ("--replicaof", "127.0.0.1", str(self.servers[0].port))
            self.servers.append(RedisServer(arguments=(*arguments, *follow)))
            for _ in range(3):
                self._start_sentinel()
            _until(lambda: all(self._ready(port) for port in self.ports))
            _until(self.replicated)
        except BaseException:
            self.close()
            raise

    @property
    def url(self) -> str:
        """Of every sentinel."""
        places = ",".join(f"127.0.0.1:{port}" for port in self.ports)
        return f"redis+sentinel://{places}/kv"

    def master(self) -> int:
        """Index of the server that the first sentinel calls master."""
        answer = self.sentinel().execute_command("SENTINEL GET-MASTER-ADDR-BY-NAME", "kv")
        return next(i for i, server in enumerate(self.servers) if server.port == int(answer[1]))

    def replicated(self) -> bool:
        """Whether the replica has all that the master of the beginning has."""
        client: Any = redis.Redis(port=self.servers[0].port)
        return bool(client.wait(1, 1000) == 1)

    def sentinel(self, number: int = 0) -> Any:
        """A client of one sentinel."""
        return redis.Redis(port=self.ports[number])

    def kill_sentinels(self) -> None:
        """SIGKILL to each."""
        for process in self._sentinels:
            process.kill()
            process.wait()
        self._sentinels = []

    def close(self) -> None:
        """Kill sentinels and servers."""
        self.kill_sentinels()
        for server in self.servers:
            server.close()
        shutil.rmtree(self._folder, ignore_errors=True)

    def __enter__(self) -> RedisSentinels:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _start_sentinel(self) -> None:
        port = free_port()
        config = self._folder / f"{port}.conf"
        config.write_text(
            f"bind 127.0.0.1\nport {port}\ndir {self._folder}\nprotected-mode yes\n"
            f"sentinel monitor kv 127.0.0.1 {self.servers[0].port} 2\n"
            "sentinel down-after-milliseconds kv 600\nsentinel failover-timeout kv 3000\n"
        )
        with (self._folder / f"{port}.log").open("ab") as log:
            command = [self.servers[0].program, str(config), "--sentinel"]
            self._sentinels.append(subprocess.Popen(command, stdout=log, stderr=log))
        self.ports.append(port)

    def _ready(self, port: int) -> bool:
        try:
            client: Any = redis.Redis(port=port)
            state = client.execute_command("SENTINEL MASTER", "kv")
        except redis.exceptions.RedisError:
            return False
        return int(state["num-slaves"]) == 1 and int(state["num-other-sentinels"]) == 2


def _until(holds: Callable[[], bool]) -> None:
    end_s = time.monotonic() + START_LIMIT_S
    while not holds():
        if time.monotonic() > end_s:
            raise RuntimeError(f"the servers did not come together within {START_LIMIT_S:.0f} s")
        time.sleep(0.05)
