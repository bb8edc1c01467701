# SPDX-FileCopyrightText: The nbdjobs authors
# SPDX-License-Identifier: Apache-2.0
"""XTS: each block is mixed, before and after the cipher, with a tweak of its own.

    encrypted[n] = AES(key 1, plain[n] ^ tweak[n]) ^ tweak[n]
    tweak[0]     = AES(key 2, vector of the sector)
    tweak[n + 1] = tweak[n] doubled, as a polynomial modulo x^128 + x^7 + x^2 + x + 1

The library has XTS for one sector at a time, which is some 40 MB/s. Blocks do not depend on each
other, though: with the tweaks of many sectors at hand one call encrypts them all. And tweaks can be
doubled many at a time, as strings of bits:

    all sectors' tweak 0                                  times x   gives their tweak 1
    all sectors' tweak 0, all sectors' tweak 1            times x^2 gives tweaks 2 and 3
    ... and so on, up to                                  times x^16

Source: IEEE Std 1619, also NIST SP 800-38E.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Final, NamedTuple

from bitarray import bitarray

from nbdjobs.nodes.crypto.block_cipher import BLOCK, SECTOR, Aes, BlockCipher, xor_into
from nbdjobs.nodes.crypto.ivgen import IvGenerator

_BLOCKS: Final = SECTOR // BLOCK
_WIDTH: Final = 8 * BLOCK
_STRIDE: Final = SECTOR // 8
"""Words of 64 bits in a sector."""


class Xts(BlockCipher):
    """AES in XTS mode; the first half of the key is for the content, the second for tweaks."""

    def __init__(self, key: bytes, ivs: IvGenerator):
        super().__init__(ivs)
        half = len(key) // 2
        self._aes = Aes(key[:half])
        self._tweak_aes = Aes(key[half:])

    def _encrypt(self, ivs: bytes, buffer: memoryview) -> None:
        tweaks = self._tweaks(ivs)
        xor_into(buffer, tweaks)
        self._aes.encrypt(buffer)
        xor_into(buffer, tweaks)

    def _decrypt(self, ivs: bytes, buffer: memoryview) -> None:
        tweaks = self._tweaks(ivs)
        xor_into(buffer, tweaks)
        self._aes.decrypt(buffer)
        xor_into(buffer, tweaks)

    def _tweaks(self, ivs: bytes) -> bytearray:
        first = bytearray(ivs)
        self._tweak_aes.encrypt(memoryview(first))
        return all_tweaks(first)


def all_tweaks(first: bytearray) -> bytearray:
    """The tweaks of all blocks of some sectors, given those of each sector's first block."""
    count = len(first) // BLOCK
    tweaks = bitarray(endian="little")
    tweaks.frombytes(first)
    for step in _steps(count):
        tweaks += step.multiply(tweaks)
    return _by_sector(memoryview(tweaks), count)


class _Step(NamedTuple):
    """Multiplies many polynomials of 128 bits, one after the other, by x to the power of n."""

    power: int
    low: bitarray
    high: bitarray

    def multiply(self, tweaks: bitarray) -> bitarray:
        """The products; bits are in ascending order, so that ">>" is towards higher powers."""
        over = tweaks << (_WIDTH - self.power)
        over &= self.low
        product = tweaks >> self.power
        product &= self.high
        product ^= over
        for shift in (1, 1, 5):  # x^128 is x^7 + x^2 + x + 1
            over >>= shift
            product ^= over
        return product


@lru_cache(maxsize=16)
def _steps(count: int) -> tuple[_Step, ...]:
    """The steps for some number of sectors, with masks for their bits below n, and the others."""
    steps = []
    lanes = count
    while lanes < count * _BLOCKS:
        power = lanes // count
        low = (1 << power) - 1
        steps.append(_Step(power, _repeat(low, lanes), _repeat((1 << _WIDTH) - 1 - low, lanes)))
        lanes *= 2
    return tuple(steps)


def _repeat(number: int, count: int) -> bitarray:
    bits = bitarray(endian="little")
    bits.frombytes(number.to_bytes(BLOCK, "little") * count)
    return bits


def _by_sector(tweaks: memoryview, count: int) -> bytearray:
    """Bring what is ordered by block and then by sector in the order of the content."""
    ordered = bytearray(SECTOR * count)
    source, target = tweaks.cast("Q"), memoryview(ordered).cast("Q")
    for half in (0, 1):
        # The shorter way round.
        if count < _BLOCKS:
            for sector in range(count):
                begin = _STRIDE * sector
                block = source[2 * sector + half :: 2 * count]
                target[begin + half : begin + _STRIDE : 2] = block
        else:
            for number in range(_BLOCKS):
                begin = 2 * count * number
                block = source[begin + half : begin + 2 * count : 2]
                target[2 * number + half :: _STRIDE] = block
    return ordered
