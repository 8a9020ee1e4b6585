"""Importing the contract costs little and changes nothing."""

from __future__ import annotations

import json
import subprocess
import sys

CODE = """
import json, os, sys, threading
import pluggy
before, environ = set(sys.modules), dict(os.environ)
import lmcache_core.sdk
new = {name.partition(".")[0] for name in set(sys.modules) - before}
print(json.dumps([sorted(new), threading.active_count(), environ == dict(os.environ)]))
"""


def test_the_contract_imports_the_standard_library_and_pluggy_only() -> None:
    done = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, check=True)
    new, threads, same_environment = json.loads(done.stdout)
    assert set(new) - set(sys.stdlib_module_names) == {"lmcache_core"}
    assert threads == 1
    assert same_environment
