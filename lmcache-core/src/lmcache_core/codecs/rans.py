"""Kernels of the entropy coder: interleaved rANS with tables of 12 bits.

Duda, arXiv:1311.2540, in the form of Giesen's ``ryg_rans`` (states of 32 bits that keep to 31,
words of 16), `LANES` states in turn over the channels of a token, so that a core works on many
symbols at once.  What it writes and reads is the same on every machine: integers only.

Imported at a codec's first use: importing compiles.
"""

# mypy: allow-untyped-defs, allow-untyped-calls

from __future__ import annotations

import numpy as np

from lmcache_core.codecs.jit import compiled

LANES = 16
BITS = 12
TOTAL = 1 << BITS
_LOW = 1 << 15
"""A state between symbols is in [2**15, 2**31)."""
NO_ROOM, DAMAGED = -1, -2


@compiled("void(i8[:, ::1], u2[:, ::1])")
def frequencies(histogram, table):
    """Counts of each class to frequencies that add up to TOTAL, at least 1 where a count is;
    a class without counts has zeros."""
    classes, symbols = histogram.shape
    for k in range(classes):
        total = 0
        for s in range(symbols):
            total += histogram[k, s]
        left = TOTAL
        best = 0
        for s in range(symbols):
            count = histogram[k, s]
            share = 0
            if count > 0:
                share = max(1, (count * TOTAL + total // 2) // total)
            table[k, s] = share
            left -= share
            if share > table[k, best]:
                best = s
        if total == 0:
            continue
        while left < 0:  # take from the largest, one each time
            most = 0
            for s in range(symbols):
                if table[k, s] > table[k, most]:
                    most = s
            taken = min(-left, max(1, table[k, most] // 64))
            table[k, most] -= taken
            left += taken
        table[k, best] += left


@compiled("void(u2[:, ::1], u8[::1], u4[::1])")
def encoder_tables(table, factor, entry):
    """Of each ``class * 256 + symbol``: ``ceil(2**44 / frequency)``, by which a state below
    ``frequency << 19`` is divided exactly, and ``frequency << 16 | start``."""
    classes, symbols = table.shape
    for k in range(classes):
        start = 0
        for s in range(symbols):
            share = int(table[k, s])
            i = k * symbols + s
            factor[i] = 0
            entry[i] = 0
            if share:
                factor[i] = ((1 << 44) + share - 1) // share
                entry[i] = (share << 16) | start
            start += share


@compiled("void(u2[:, ::1], u4[::1])")
def decoder_tables(table, entry):
    """Of each ``class * TOTAL + slot``: ``symbol << 24 | (frequency - 1) << 12 | slot - start``;
    the rows of ``table`` add up to TOTAL or to 0."""
    classes, symbols = table.shape
    for k in range(classes):
        slot = k * TOTAL
        for s in range(symbols):
            share = int(table[k, s])
            for i in range(share):
                entry[slot + i] = (s << 24) | ((share - 1) << 12) | i
            slot += share
        for i in range(slot, (k + 1) * TOTAL):
            entry[i] = 0


@compiled("i8(u1[:, ::1], u1[::1], u1[::1], u8[::1], u4[::1], u2[::1], i8)")
def _encode_plane(symbols, classes, moves, factor, entry, words, end):
    """Words of a plane, last one before ``end``; returns where the first is, or NO_ROOM."""
    tokens, channels = symbols.shape
    states = np.full(LANES, _LOW, np.uint32)
    at = end
    for token in range(tokens - 1, -1, -1):
        row = symbols[token]
        if at < channels + 2 * LANES:
            return NO_ROOM
        first = np.int64(moves[token])
        for c in range(channels - 1, -1, -1):
            lane = c & (LANES - 1)
            i = ((first + np.int64(classes[c])) << 8) + row[c]
            packed = entry[i]
            share = np.uint32(packed >> 16)
            state = states[lane]
            words[at - 1] = np.uint16(state)
            full = np.uint32(state >> 19) >= share
            at = at - 1 if full else at
            state = np.uint32(state >> 16) if full else state
            quotient = np.uint32((np.uint64(state) * factor[i]) >> np.uint64(44))
            states[lane] = np.uint32(
                state + np.uint32(packed & 0xFFFF) + np.uint32(quotient * np.uint32(TOTAL - share))
            )
    for lane in range(LANES - 1, -1, -1):
        at -= 2
        words[at] = np.uint16(states[lane])
        words[at + 1] = np.uint16(states[lane] >> 16)
    return at


@compiled("i8(u1[:, :, ::1], u1[:, ::1], u1[:, ::1], u8[::1], u4[::1], u2[::1], i8, i8[::1])")
def encode(symbols, classes, moves, factor, entry, words, end, starts):
    """Words of planes ``[planes, tokens, channels]``, one behind the other, before ``end``.

    Args:
        classes, moves: ``[planes, channels]`` and ``[planes, tokens]``; a symbol's table is the
            sum of its two.
        starts: out, where each plane's words begin.

    Returns:
        Where the first one's are, or NO_ROOM.
    """
    for plane in range(symbols.shape[0] - 1, -1, -1):
        end = _encode_plane(symbols[plane], classes[plane], moves[plane], factor, entry, words, end)
        if end < 0:
            return end
        starts[plane] = end
    return end


@compiled("i8(u2[::1], i8, i8, u1[::1], u1[::1], u4[::1], u1[:, ::1])")
def _decode_plane(words, at, end, classes, moves, entry, symbols):
    tokens, channels = symbols.shape
    if end - at < 2 * LANES:
        return DAMAGED
    states = np.empty(LANES, np.uint32)
    for lane in range(LANES):
        states[lane] = np.uint32(words[at]) | np.uint32(np.uint32(words[at + 1]) << 16)
        at += 2
    for token in range(tokens):
        row = symbols[token]
        table = np.int64(moves[token])
        for first in range(0, channels, LANES):
            if at > end:
                return DAMAGED
            for c in range(first, min(first + LANES, channels)):
                lane = c & (LANES - 1)
                state = states[lane]
                packed = entry[
                    ((table + np.int64(classes[c])) << BITS) + np.int64(state & (TOTAL - 1))
                ]
                row[c] = np.uint8(packed >> 24)
                share = np.uint32(((packed >> 12) & (TOTAL - 1)) + 1)
                state = np.uint32(
                    np.uint32(share * np.uint32(state >> BITS)) + np.uint32(packed & (TOTAL - 1))
                )
                low = state < _LOW
                more = np.uint32(np.uint32(state << 16) | words[at])
                state = more if low else state
                at = at + 1 if low else at
                states[lane] = state
    for lane in range(LANES):
        if states[lane] != _LOW:
            return DAMAGED
    return 0 if at == end else DAMAGED


@compiled("i8(u2[::1], i8[::1], u1[:, ::1], u1[:, ::1], u4[::1], u1[:, :, ::1])")
def decode(words, starts, classes, moves, entry, symbols):
    """Planes ``[planes, tokens, channels]`` out of their words.

    Args:
        words: with LANES more behind the last one, for reading ahead.
        starts: ``[planes + 1]`` where each begins, rising, and the end of the last.
        classes, moves: ``[planes, channels]`` and ``[planes, tokens]``, each sum one of the
            tables that ``entry`` has.

    Returns:
        0, or DAMAGED.
    """
    for plane in range(symbols.shape[0]):
        done = _decode_plane(
            words, starts[plane], starts[plane + 1], classes[plane], moves[plane], entry,
            symbols[plane],
        )  # fmt: skip
        if done < 0:
            return done
    return 0
