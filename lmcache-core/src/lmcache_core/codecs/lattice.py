"""Kernels between a payload's elements and small integers.

A *plane* is one layer of one tensor, seen as ``[tokens, channels]`` with ``channel = head *
head_size + index``.  Each channel has a step; a value is rounded to a multiple of it, and what is
coded is the difference of that integer to a guess from the token before:
``guess = centre + (gain * (before - centre) + 4 >> 3)``.  Integers, so that a decoder rebuilds on
every machine what the encoder measured.

A token that much attention falls on has small values (an attention sink's are a fifth of the
usual size), and an error of the usual size does much harm there.  Such *quiet* tokens have finer
steps, by a power of two, in a layer's keys as in its values.

Imported at a codec's first use: importing compiles.
"""

# mypy: allow-untyped-defs, allow-untyped-calls

from __future__ import annotations

import math

import numpy as np

from lmcache_core.codecs.jit import compiled, inlined

BF16, FP16, FP32 = 0, 1, 2
CLASSES = 40
"""Classes of channels by the mean size of what is coded, three to an octave from 2**-7."""
FINEST = 3
"""Shift of a quiet token: its steps are 2**-shift of its channels'; of others it is 0."""
SPREAD = 2
"""Classes by which a token's own size moves it, up or down."""
TABLES = CLASSES + 3 * FINEST + 2 * SPREAD
"""A symbol's table is its channel's class + its token's move (+ SPREAD) + 3 * its shift."""
ZERO = 128
"""Symbol of the difference 0; a symbol is 1 to 255, differences beyond are patches."""
_CENTRES = 16000.0
"""A centre is at most about so many steps, so that it fits 16 bits."""
_LARGEST = 1 << 21
"""Most steps of a value; exact in float32, and its products are exact in 32 bits."""
_FAINT = 2.0**-60
"""Sum of squares of a plane below which nothing is said of its error."""
NOT_FINITE, TOO_MANY_PATCHES = -1, -2
_TILE = 16
_WORDS = "Array(u2, 1, 'C', readonly=True)"


@inlined
def _widen(low, high, kind):
    """float32 of a 16-bit element, or of both halves of a 32-bit one."""
    word = np.uint32(low)
    bits = np.uint32(word << 16)
    if kind == FP32:
        bits = np.uint32(word | np.uint32(np.uint32(high) << 16))
    elif kind == FP16:
        scaled = np.uint32((word & 0x7FFF) << 13).view(np.float32) * np.float32(2.0**112)
        bits = np.float32(scaled).view(np.uint32)
        if (word & 0x7C00) == 0x7C00:
            bits = np.uint32(0x7F800000)
        bits = np.uint32(bits | np.uint32((word & 0x8000) << 16))
    return np.uint32(bits).view(np.float32)


@inlined
def _nearest(value, kind):
    """Bits of the element nearest to a finite float32, ties to even."""
    bits = np.float32(value).view(np.uint32)
    if kind == BF16:
        bits = np.uint32(np.uint32(bits + 0x7FFF + ((bits >> 16) & 1)) >> 16)
    elif kind == FP16:
        size = min(abs(value), np.float32(65504.0)) * np.float32(2.0**-112)
        half = np.float32(size).view(np.uint32)
        half = np.uint32(np.uint32(half + 0xFFF + ((half >> 13) & 1)) >> 13)
        bits = np.uint32(((bits >> 16) & 0x8000) | half)
    return bits


@inlined
def _widen_bits(value, kind):
    """What a float32 is after it was an element."""
    bits = _nearest(value, kind)
    return _widen(bits & 0xFFFF, bits >> 16, kind)


@inlined
def _store(words, at, value, kind):
    bits = _nearest(value, kind)
    words[at] = np.uint16(bits)
    if kind == FP32:
        words[at + 1] = np.uint16(bits >> 16)


@inlined
def _guess(centre, gain, before):
    return np.int32(centre + np.int32(np.int32(gain * np.int32(before - centre) + 4) >> 3))


@compiled(f"void({_WORDS}, i8[::1], i8, i8, f4[:, ::1])")
def _gather(words, geometry, layer, kind, plane):
    """One layer of a tensor into ``plane``."""
    blocks, inner, heads, size = geometry[2], geometry[3], geometry[4], geometry[5]
    block_step, token_step, head_step, step = geometry[7], geometry[8], geometry[9], geometry[10]
    half = 1 if kind == FP32 else 0
    start = geometry[0] + layer * geometry[6]
    for block in range(blocks):
        for first in range(0, inner, _TILE):
            last = min(first + _TILE, inner)
            for head in range(heads):
                base = start + block * block_step + head * head_step
                channel = head * size
                if step <= token_step:
                    for token in range(first, last):
                        at = base + token * token_step
                        row = plane[block * inner + token]
                        for i in range(size):
                            w = at + i * step
                            row[channel + i] = _widen(words[w], words[w + half], kind)
                else:
                    for i in range(size):
                        for token in range(first, last):
                            w = base + i * step + token * token_step
                            plane[block * inner + token, channel + i] = _widen(
                                words[w], words[w + half], kind
                            )


@compiled("void(u2[::1], i8[::1], i8, i8, f4[:, ::1])")
def _scatter(words, geometry, layer, kind, plane):
    """``plane`` into one layer of a tensor, as elements."""
    blocks, inner, heads, size = geometry[2], geometry[3], geometry[4], geometry[5]
    block_step, token_step, head_step, step = geometry[7], geometry[8], geometry[9], geometry[10]
    start = geometry[0] + layer * geometry[6]
    for block in range(blocks):
        for first in range(0, inner, _TILE):
            last = min(first + _TILE, inner)
            for head in range(heads):
                base = start + block * block_step + head * head_step
                channel = head * size
                if step <= token_step:
                    for token in range(first, last):
                        at = base + token * token_step
                        row = plane[block * inner + token]
                        for i in range(size):
                            _store(words, at + i * step, row[channel + i], kind)
                else:
                    for i in range(size):
                        for token in range(first, last):
                            at = base + i * step + token * token_step
                            _store(words, at, plane[block * inner + token, channel + i], kind)


@compiled("void(f4[:, ::1], f4[::1], f4[::1], f4[::1])")
def _moments(plane, mean, deviation, likeness):
    """Of each channel: mean, standard deviation, correlation with the token before."""
    tokens, channels = plane.shape
    product = np.zeros(channels, np.float32)
    mean[:] = np.float32(0)
    deviation[:] = np.float32(0)
    first = plane[0]
    before = np.zeros(channels, np.float32)
    for token in range(1, tokens):
        row = plane[token]
        for c in range(channels):
            value = row[c] - first[c]
            mean[c] += value
            deviation[c] += value * value
            product[c] += value * before[c]
            before[c] = value
    share = np.float32(1.0 / tokens)
    for c in range(channels):
        middle = mean[c] * share
        variance = deviation[c] * share - middle * middle
        along = product[c] * share - middle * middle
        mean[c] = first[c] + middle
        deviation[c] = np.float32(0) if variance <= 0 else np.sqrt(variance)  # keeps a NaN
        likeness[c] = along / variance if variance > 0 else np.float32(0)


@compiled("f8(f4[::1], f4[::1], f4[::1], f8, f8, f4[::1], u1[::1], i2[::1], u1[::1])")
def _choose(mean, deviation, likeness, coarse, power, steps, step, centre, gain):
    """Step (index into ``steps``), centre and gain of each channel; < 0 if not finite."""
    channels = mean.size
    total = 0.0
    for c in range(channels):
        total += float(deviation[c]) ** 2
    common = math.sqrt(total / channels)
    if not math.isfinite(common):
        return -1.0
    for c in range(channels):
        wide = float(deviation[c])
        wanted = coarse * common
        if power != 0.0:
            wanted = coarse * wide**power * common ** (1.0 - power)
        wanted = max(wanted, abs(float(mean[c])) / _CENTRES)
        index = 128
        if wanted > 0.0:
            index = math.floor(4.0 * math.log2(wanted) + 128.5)
        index = min(max(index, 0), 255)
        step[c] = index
        middle = float(mean[c]) / float(steps[index])
        centre[c] = round(min(max(middle, -2.0 * _CENTRES), 2.0 * _CENTRES))
        gain[c] = int(min(max(8.0 * float(likeness[c]), 0.0), 7.0))
    return common


@compiled("void(f4[:, ::1], u1[::1])")
def _find_quiet(plane, shift):
    """FINEST for each token whose square sum is below a quarter of the median one, else 0."""
    tokens, channels = plane.shape
    power = np.empty(tokens, np.float32)
    part = np.empty(_TILE, np.float32)
    whole = channels - channels % _TILE
    for token in range(tokens):
        row = plane[token]
        part[:] = np.float32(0)
        for first in range(0, whole, _TILE):
            for i in range(_TILE):
                part[i] += row[first + i] * row[first + i]
        for c in range(whole, channels):
            part[0] += row[c] * row[c]
        power[token] = part.sum()
    limit = np.sort(power)[tokens // 2] * np.float32(0.25)
    for token in range(tokens):
        shift[token] = FINEST if power[token] < limit else 0


@compiled(
    "i8(f4[:, ::1], i8, f4[::1], u1[::1], i2[::1], u1[::1], u1[::1], u1[:, ::1], i4[::1],"
    " i8, i4[:, ::1], i8, f8[::1])"
)
def _round(plane, kind, steps, step, centre, gain, shift, symbols, sizes, at, patches, count, sums):
    """Symbols of a plane, what they lose, and how large they are in each channel.

    Args:
        at: index of the plane's first element among the payload's; patches say theirs.
        patches: ``[most, 2]``: index, difference; ``count`` are there.
        sums: filled with the sum of squares of the errors, and of the values.

    Returns:
        Patches that are there now, or TOO_MANY_PATCHES.
    """
    tokens, channels = plane.shape
    width = np.empty(channels, np.float32)
    inverse = np.empty(channels, np.float32)
    middle = np.empty(channels, np.int32)
    slope = np.empty(channels, np.int32)
    before = np.empty(channels, np.int32)
    lost = np.zeros(channels, np.float32)
    power = np.zeros(channels, np.float32)
    rest = np.empty(channels, np.int32)
    for c in range(channels):
        width[c] = steps[step[c]]
        inverse[c] = np.float32(1) / width[c]
        middle[c] = centre[c]
        before[c] = centre[c]
        slope[c] = gain[c]
        sizes[c] = 0
    limit = np.float32(_LARGEST)
    for token in range(tokens):
        row = plane[token]
        out = symbols[token]
        fine = np.int32(shift[token])
        more = np.float32(1 << fine)
        less = np.float32(1) / more
        half = np.int32((1 << fine) >> 1)
        largest = np.int32(0)
        for c in range(channels):
            value = row[c]
            whole = np.int32(np.rint(max(min(value * (inverse[c] * more), limit), -limit)))
            back = _widen_bits(np.float32(whole) * (width[c] * less), kind)
            wrong = value - back
            lost[c] += wrong * wrong
            power[c] += value * value
            guess = _guess(middle[c], slope[c], before[c])
            before[c] = np.int32(np.int32(whole + half) >> fine)
            left = np.int32(whole - np.int32(guess << fine))
            rest[c] = left
            large = np.int32(abs(left))
            sizes[c] = np.int32(sizes[c] + min(np.int32(large >> fine), np.int32(1 << 14)))
            largest = max(largest, large)
            out[c] = np.uint8(np.int32(min(max(left, np.int32(-127)), np.int32(127)) + ZERO))
        if largest > 127:
            for c in range(channels):
                if abs(rest[c]) > 127:
                    if count == patches.shape[0]:
                        return TOO_MANY_PATCHES
                    patches[count, 0] = at + token * channels + c
                    patches[count, 1] = rest[c]
                    count += 1
    sums[0] = 0.0
    sums[1] = 0.0
    for c in range(channels):
        sums[0] += float(lost[c])
        sums[1] += float(power[c])
    if sums[1] < _FAINT and plane.any():
        sums[0] = sums[1] = 1.0  # squares that may have become zero: all is lost
    return count


@compiled("void(u1[:, ::1], i4[::1], u1[::1], u1[::1], u1[::1], i8[:, ::1])")
def _sort(symbols, sizes, shift, classes, move, histogram):
    """The class of each channel, the move of each token, and the symbols that each table has."""
    tokens, channels = symbols.shape
    weight = np.empty(channels, np.int32)
    for c in range(channels):
        mean = float(sizes[c]) / tokens
        index = math.floor(3.0 * math.log2(mean) + 21.5) if mean > 0.0 else 0
        classes[c] = min(max(index, 0), CLASSES - 1)
        weight[c] = np.int32(4096.0 / max(mean + 0.05, 0.0625))
    for token in range(tokens):
        row = symbols[token]
        total = np.int64(0)
        for c in range(channels):
            total += np.int64(np.int32(abs(np.int32(row[c]) - ZERO)) * weight[c])
        share = float(total) / (4096.0 * channels * (1 << shift[token]))
        index = math.floor(3.0 * math.log2(share) + 0.5) if share > 0.0 else -SPREAD
        move[token] = min(max(index, -SPREAD), SPREAD) + SPREAD
        first = move[token] + 3 * shift[token]
        for c in range(channels):
            histogram[first + classes[c], row[c]] += 1


@compiled(
    f"i8({_WORDS}, i8[::1], i8, f8[::1], f8, b1, f4[::1], u1[:, :, ::1], u1[:, ::1], i2[:, ::1],"
    " u1[:, ::1], u1[:, ::1], u1[:, ::1], u1[:, ::1], i8[:, ::1], i8, i4[:, ::1], i8, f8[:, ::1],"
    " f4[:, ::1])"
)
def to_symbols(
    words, geometry, kind, coarse, power, quiet, steps, symbols, step, centre, gain, classes,
    shift, move, histogram, at, patches, count, sums, plane,
):  # fmt: skip
    """All layers of one tensor as symbols.

    Args:
        words: the payload.
        geometry: offset, five sizes, five strides, in words of 16 bits.
        coarse: ``[layers]`` step of a channel as a multiple of its scale.
        power: scale of a channel is deviation**power * common deviation**(1 - power).
        quiet: ``shift`` is found here; else it is given.
        symbols: out, ``[layers, tokens, channels]``.
        step, centre, gain, classes: out, ``[layers, channels]``.
        shift, move: out, ``[layers, tokens]``.
        histogram: ``[TABLES or more, 256]``, added to.
        sums: out, ``[layers, 2]``: squares of errors, of values.
        plane: scratch, ``[tokens, channels]``.

    Returns:
        Patches that are there now, or NOT_FINITE or TOO_MANY_PATCHES.
    """
    layers, tokens, channels = symbols.shape
    mean = np.empty(channels, np.float32)
    deviation = np.empty(channels, np.float32)
    likeness = np.empty(channels, np.float32)
    sizes = np.empty(channels, np.int32)
    for layer in range(layers):
        _gather(words, geometry, layer, kind, plane)
        _moments(plane, mean, deviation, likeness)
        scale = _choose(
            mean, deviation, likeness, coarse[layer], power, steps,
            step[layer], centre[layer], gain[layer],
        )  # fmt: skip
        if scale < 0.0:
            return NOT_FINITE
        if quiet:
            _find_quiet(plane, shift[layer])
        count = _round(
            plane, kind, steps, step[layer], centre[layer], gain[layer], shift[layer],
            symbols[layer], sizes, at + layer * tokens * channels, patches, count, sums[layer],
        )  # fmt: skip
        if count < 0:
            return count
        _sort(symbols[layer], sizes, shift[layer], classes[layer], move[layer], histogram)
    return count


@compiled(
    "void(u2[::1], i8[::1], i8, f4[::1], u1[:, :, ::1], u1[:, ::1], i2[:, ::1], u1[:, ::1],"
    " u1[:, ::1], i8, i8[:, ::1], f4[:, ::1])"
)
def from_symbols(
    words, geometry, kind, steps, symbols, step, centre, gain, shift, at, patches, plane
):
    """All layers of one tensor out of symbols; the reverse of `to_symbols`.

    ``patches`` are all of the payload's, by rising index; those of other tensors are left out.
    """
    layers, tokens, channels = symbols.shape
    width = np.empty(channels, np.float32)
    before = np.empty(channels, np.int32)
    middle = np.empty(channels, np.int32)
    slope = np.empty(channels, np.int32)
    rest = np.empty(channels, np.int32)
    patch = 0
    while patch < patches.shape[0] and patches[patch, 0] < at:
        patch += 1
    for layer in range(layers):
        for c in range(channels):
            width[c] = steps[step[layer, c]]
            middle[c] = centre[layer, c]
            before[c] = centre[layer, c]
            slope[c] = gain[layer, c]
        for token in range(tokens):
            row = symbols[layer, token]
            for c in range(channels):
                rest[c] = np.int32(np.int32(row[c]) - ZERO)
            first = at + (layer * tokens + token) * channels
            while patch < patches.shape[0] and patches[patch, 0] < first + channels:
                rest[patches[patch, 0] - first] = np.int32(patches[patch, 1])
                patch += 1
            out = plane[token]
            fine = np.int32(shift[layer, token])
            less = np.float32(1) / np.float32(1 << fine)
            half = np.int32((1 << fine) >> 1)
            for c in range(channels):  # wraps for a damaged stream
                guess = _guess(middle[c], slope[c], before[c])
                whole = np.int32(rest[c] + np.int32(guess << fine))
                before[c] = np.int32(np.int32(whole + half) >> fine)
                out[c] = np.float32(whole) * (width[c] * less)
        _scatter(words, geometry, layer, kind, plane)
