"""docs/controller.md: its examples can be run, its reference is the controller's own."""

from __future__ import annotations

import importlib.util
import json
import re
import shlex
from pathlib import Path
from typing import Any

import msgspec
import pytest
from typer.main import get_command

from lmcache_core.cli.app import app
from lmcache_core.config import EngineConfig
from lmcache_core.controller.operations import Operation
from lmcache_core.controller.table import OPERATIONS

ROOT = Path(__file__).resolve().parents[3]
TEXT = (ROOT / "docs" / "controller.md").read_text(encoding="utf-8")
COMMANDS: Any = get_command(app).commands  # type: ignore[attr-defined]
FLEET = [name for name, command in COMMANDS.items() if "through" in str(command.rich_help_panel)]


def blocks() -> list[str]:
    return re.findall(r"^```\w*\n(.*?)^```", TEXT, re.MULTILINE | re.DOTALL)


def in_docs() -> list[str]:
    lines = [line for block in blocks() for line in block.splitlines()]
    return [line for line in lines if line.startswith("lmc ") and "," not in line.split()[1]]


def in_help() -> list[str]:
    found = []
    for name in FLEET:
        examples = COMMANDS[name].epilog.partition("\n\n")[0].removeprefix("Examples:  ")
        assert examples.startswith("lmc ")
        found += [each for each in re.split(r"   \|   ", examples)]
    return found


def test_there_is_an_example_of_each_command() -> None:
    assert len(FLEET) == 16
    assert set(FLEET) <= {line.split()[1] for line in in_docs()}


@pytest.mark.parametrize("line", [*in_docs(), *in_help()])
def test_an_example_is_a_command_line_that_lmc_understands(line: str) -> None:
    words = shlex.split(line, comments=True)
    words = words[: words.index("|")] if "|" in words else words
    name, *arguments = [word.strip("[]") for word in words[1:]]
    command = COMMANDS[name]
    context = command.make_context(name, arguments, resilient_parsing=False)
    assert context.params and not context.args


def test_each_curl_example_is_what_the_controller_takes() -> None:
    lines = [line for block in blocks() for line in block.splitlines() if line.startswith("curl")]
    shown = set()
    for line in lines:
        words = shlex.split(line)
        [url] = [word for word in words if word.startswith("$API")]
        path = url.replace("$API", "/v1").partition("?")[0]
        given = words[words.index("-d") + 1] if "-d" in words else ""
        method = words[words.index("-X") + 1] if "-X" in words else "POST" if given else "GET"
        operation = named(method, path)
        shown.add(operation.name)
        if operation.body is not None:
            msgspec.json.decode(given, type=operation.body)
        assert not url.partition("?")[2] or operation.query
    every = {one.name for one in OPERATIONS if one.path.startswith("/v1/")}
    assert shown == every - {"sync", "where"}


def named(method: str, path: str) -> Operation:
    for one in OPERATIONS:
        pattern = re.sub(r"\{[^}]+\}", "[^/]+", one.path)
        if one.method == method and re.fullmatch(pattern, path):
            return one
    raise AssertionError(f"there is no {method} {path}")


def test_the_reference_is_the_controllers_own() -> None:
    file = ROOT / "tools" / "controller_reference.py"
    spec = importlib.util.spec_from_file_location("controller_reference", file)
    assert spec is not None and spec.loader is not None
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)
    assert tool.renewed(TEXT) == TEXT, "python tools/controller_reference.py --write"


def test_the_options_and_settings_that_it_names_are_there() -> None:
    given = {
        option
        for command in COMMANDS.values()
        for parameter in getattr(command, "params", ())
        for option in (*parameter.opts, *parameter.secondary_opts)
    }
    named = set(re.findall(r"`(--[a-z][a-z-]*)", TEXT)) - {"--write"}
    assert named <= given and len(named) > 20
    [yaml] = [block for block in blocks() if block.startswith("controllers: [http://127.0.0.1")]
    keys = {line.partition(":")[0] for line in yaml.splitlines()}
    assert keys <= set(EngineConfig.__struct_fields__)


def test_examples_of_answers_are_json() -> None:
    for line in re.findall(r"-d '([^']*)'", TEXT):
        json.loads(line)
