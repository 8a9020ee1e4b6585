"""Stores chunks into a file tier until it is killed.  argv: directory, seed."""

from __future__ import annotations

import sys

from support import Content, open_test_engine


def main() -> None:
    directory, seed = sys.argv[1], int(sys.argv[2])
    engine = open_test_engine(directory)
    print("ready", flush=True)
    number = 0
    while True:
        content = Content(seed * 1000 + number % 40)
        engine.store(content.tokens, content)
        engine.poll()
        engine.runtime.wait(0.002)
        number += 1


if __name__ == "__main__":
    main()
