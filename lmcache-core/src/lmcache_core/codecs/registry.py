"""Codecs by name: found through entry points, made once, prepared in the background."""

from __future__ import annotations

import difflib
import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from importlib import metadata

from lmcache_core.sdk import CODEC_API_VERSION, CODEC_GROUP, Codec, CodecInfo, ConfigError

EntryPoints = Callable[[], Iterable[metadata.EntryPoint]]
MAX_NAME_BYTES = 32


def _entry_points() -> Iterable[metadata.EntryPoint]:
    return metadata.entry_points(group=CODEC_GROUP)


@dataclass(slots=True)
class _Held:
    """A codec, and how far its preparation is."""

    codec: Codec
    started: bool = False
    ready: threading.Event = field(default_factory=threading.Event)
    error: str = ""


class Codecs:
    """The installed codecs.  Thread-safe; nothing is imported before it is asked for."""

    def __init__(self, entry_points: EntryPoints = _entry_points) -> None:
        self._entry_points = entry_points
        self._held: dict[str, _Held | ConfigError] = {}
        self._lock = threading.Lock()

    def names(self) -> list[str]:
        """Of every installed codec, sorted; loads nothing."""
        return sorted({entry.name for entry in self._entry_points()})

    def get(self, name: str) -> Codec:
        """The codec, which may not be prepared yet.

        Raises:
            ConfigError: not installed, broken, made for another core, or something that it needs
                is missing; the hint is the fix.  The answer is remembered.
        """
        return self._find(name).codec

    def prepare(self, name: str) -> None:
        """Start preparing ``name`` on a thread of its own, once; returns at once.

        Raises:
            ConfigError: see `get`.
        """
        held = self._find(name)
        with self._lock:
            if held.started:
                return
            held.started = True

        def work() -> None:
            try:
                held.codec.prepare()
            except Exception as error:  # the boundary to foreign code; told by `ready`
                held.error = str(error) or repr(error)
            held.ready.set()

        threading.Thread(target=work, name=f"lmc-codec-{name}", daemon=True).start()

    def ready(self, name: str, timeout_s: float) -> Codec | None:
        """The codec once it is prepared; None when that takes longer.

        Raises:
            ConfigError: see `get`, or its preparation failed.
        """
        self.prepare(name)
        held = self._find(name)
        if not held.ready.wait(max(0.0, timeout_s)):
            return None
        if held.error:
            raise ConfigError(
                f"codec {name} can't be used: {held.error}",
                op="codec",
                hint="lmc codec list shows what it needs",
            )
        return held.codec

    def _find(self, name: str) -> _Held:
        with self._lock:
            held = self._held.get(name)
            if held is None:
                try:
                    held = _Held(self._load(name))
                except ConfigError as error:
                    held = error
                self._held[name] = held
        if isinstance(held, ConfigError):
            raise held
        return held

    def _load(self, name: str) -> Codec:
        entries = [entry for entry in self._entry_points() if entry.name == name]
        if not entries:
            near = difflib.get_close_matches(name, self.names(), 1)
            hint = f"did you mean {near[0]!r}?" if near else f"installed are {self.names()}"
            raise ConfigError(f"no codec is named {name!r}", op="codec", hint=hint)
        owners = sorted({entry.dist.name if entry.dist else "unknown" for entry in entries})
        if len(owners) > 1:
            raise ConfigError(
                f"codec {name!r} is claimed by {' and by '.join(owners)}",
                op="codec",
                hint=f"uninstall one: pip uninstall {owners[-1]}",
            )
        try:
            codec = entries[0].load()()
        except ConfigError:
            raise
        except Exception as error:
            raise _broken(name, owners[0], repr(error)) from error
        if not isinstance(codec, Codec) or not isinstance(getattr(codec, "info", None), CodecInfo):
            raise _broken(name, owners[0], f"it gave {type(codec).__name__}, not a Codec")
        _check_info(name, owners[0], codec.info)
        return codec


def _check_info(name: str, owner: str, info: CodecInfo) -> None:
    if info.name != name or not name.isascii() or len(name) > MAX_NAME_BYTES:
        raise _broken(name, owner, f"its entry point is {name!r}, it calls itself {info.name!r}")
    if info.default_level not in info.levels:
        raise _broken(name, owner, "its default level is none of its levels")
    if not info.lossless and set(info.max_error) != set(info.levels):
        raise _broken(name, owner, "a lossy codec declares a bound for every level")
    if info.api_min[0] != CODEC_API_VERSION[0] or tuple(info.api_min) > CODEC_API_VERSION:
        raise ConfigError(
            f"codec {name!r} of {owner} needs contract {'.'.join(map(str, info.api_min))}",
            op="codec",
            hint='pip install -U "lmcache-core"',
        )


def _broken(name: str, owner: str, why: str) -> ConfigError:
    return ConfigError(
        f"codec {name!r} of {owner} can't be used: {why}",
        op="codec",
        hint=f"pip install -U {owner}",
    )
