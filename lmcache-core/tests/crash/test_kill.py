"""kill -9 during offload: the next process hits whole chunks or misses, never wrong."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from support import CHUNK, Content, open_test_engine

HERE = Path(__file__).parent


@pytest.mark.slow
def test_twenty_kills_lose_nothing_whole_and_serve_nothing_wrong(tmp_path: Path) -> None:
    directory = tmp_path / "kv"
    rng = random.Random(7)
    hits = 0
    for seed in range(20):
        env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(HERE), *sys.path])}
        writer = subprocess.Popen(
            [sys.executable, str(HERE / "writer.py"), str(directory), str(seed)],
            stdout=subprocess.PIPE,
            env=env,
        )
        assert writer.stdout is not None and writer.stdout.readline() == b"ready\n"
        time.sleep(rng.uniform(0.02, 0.25))
        writer.send_signal(signal.SIGKILL)
        writer.wait()
        writer.stdout.close()

        engine = open_test_engine(str(directory))
        tier = engine.tiers.readable[0]
        whole = [p for p in directory.rglob("*") if p.is_file()]
        assert not [p for p in whole if p.parent.name == "tmp"], "a temporary file was left"
        assert tier.used_bytes == sum(p.stat().st_size for p in whole)
        for number in range(40):
            content = Content(seed * 1000 + number)
            hits += engine.retrieve(content.tokens, content) // CHUNK
            assert content.wrong == 0
        assert engine.close()
    assert hits > 20, "the writer must get something to disk before it dies"
