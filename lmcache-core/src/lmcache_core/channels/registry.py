"""Channels by their URL's scheme, found through entry points; nothing loads before it is named."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable
from importlib import metadata

from lmcache_core.sdk import (
    CHANNEL_API_VERSION,
    CHANNEL_GROUP,
    ChannelHost,
    ChannelPlugin,
    ConfigError,
    TransferChannel,
)
from lmcache_core.url import redact, split_options

EntryPoints = Callable[[], Iterable[metadata.EntryPoint]]


def _entry_points() -> Iterable[metadata.EntryPoint]:
    return metadata.entry_points(group=CHANNEL_GROUP)


class Channels:
    """The installed channels.  Thread-safe; keeps nothing."""

    def __init__(self, entry_points: EntryPoints = _entry_points) -> None:
        self._entry_points = entry_points

    def schemes(self) -> list[str]:
        """Of every installed channel, sorted; loads nothing."""
        return sorted({entry.name for entry in self._entry_points()})

    def plugin(self, url: str) -> ChannelPlugin:
        """What serves the scheme of ``url``.

        Raises:
            ConfigError: not installed, claimed twice, broken, or made for another core; the hint
                is the fix.
        """
        scheme = url.partition("://")[0]
        entries = [entry for entry in self._entry_points() if entry.name == scheme]
        if "://" not in url or not entries:
            known = self.schemes()
            near = difflib.get_close_matches(scheme, known, 1)
            hint = f"did you mean {near[0]}://?" if near else f"installed are {', '.join(known)}"
            if scheme.startswith("nixl"):
                hint = "pip install 'lmcache-backend-nixl[cu12]'"
            raise ConfigError(f"no channel serves {redact(url)}", op="channel", hint=hint)
        owners = sorted({entry.dist.name if entry.dist else "unknown" for entry in entries})
        if len(owners) > 1:
            raise ConfigError(
                f"the channel {scheme}:// is claimed by {' and by '.join(owners)}",
                op="channel",
                hint=f"uninstall one: pip uninstall {owners[-1]}",
            )
        try:
            plugin = entries[0].load()
        except Exception as error:
            raise _broken(scheme, owners[0], repr(error)) from error
        if not isinstance(plugin, ChannelPlugin) or plugin.scheme != scheme:
            raise _broken(scheme, owners[0], f"it gave {plugin!r}")
        if plugin.api_min[0] != CHANNEL_API_VERSION[0] or plugin.api_min > CHANNEL_API_VERSION:
            raise ConfigError(
                f"{scheme}:// of {owners[0]} needs contract {'.'.join(map(str, plugin.api_min))}",
                op="channel",
                hint='pip install -U "lmcache-core"',
            )
        return plugin

    def open(self, url: str, host: ChannelHost) -> TransferChannel:
        """The channel that ``url`` names, listening.

        Raises:
            ConfigError: see `plugin`; an unknown option, a wrong address, or something that the
                channel needs is missing.
            BackendUnavailable: the address can't be listened at.
        """
        plugin = self.plugin(url)
        bare, options = split_options(url, plugin.options, plugin.scheme)
        return plugin.open(bare, options, host)


def _broken(scheme: str, owner: str, why: str) -> ConfigError:
    return ConfigError(
        f"the channel {scheme}:// of {owner} can't be used: {why}",
        op="channel",
        hint=f"pip install -U {owner}",
    )
