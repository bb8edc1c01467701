# SPDX-FileCopyrightText: The nbdjobs authors
# SPDX-License-Identifier: Apache-2.0
"""All kinds of images, few enough to be made: every two choices that go together come together."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import combinations, product
from pathlib import Path

from nbdjobs.nodes.preallocation import Preallocation
from nbdjobs.nodes.qcow2.constants import CompressionType
from nbdjobs.nodes.qcow2.create import CreateOptions

_Pair = tuple[str, object, str, object]

CHOICES: dict[str, tuple[object, ...]] = {
    "version": (2, 3),
    "cluster_size": (512, 4096, 16384, 65536, 2 << 20),
    "refcount_bits": (1, 2, 4, 8, 16, 32, 64),
    "compression": ("none", "zlib", "zstd"),
    "is_extended": (False, True),
    "data_file": ("none", "external", "raw"),
    "chain": (1, 2, 3, 5),
    "is_lazy": (False, True),
    "preallocation": ("off", "metadata", "falloc", "full"),
}


@dataclass(frozen=True, slots=True)
class Variant:
    """One kind of image; `chain` counts it and the images below it."""

    version: int
    cluster_size: int
    refcount_bits: int
    compression: str
    is_extended: bool
    data_file: str
    chain: int
    is_lazy: bool
    preallocation: str

    @property
    def is_valid(self) -> bool:
        """Whether there are such images."""
        has_data_file, has_backing = self.data_file != "none", self.chain > 1
        needs_3 = (
            self.refcount_bits != 16
            or self.compression == "zstd"
            or self.is_extended
            or has_data_file
            or self.is_lazy
        )
        return not (
            (self.version == 2 and needs_3)
            or (self.is_extended and self.cluster_size < 16384)
            or (has_data_file and self.compression != "none")
            or (self.data_file == "raw" and has_backing)
            or (self.preallocation != "off" and has_backing)
            or (self.preallocation in ("falloc", "full") and self.cluster_size == 512)
        )

    def __str__(self) -> str:
        words = [f"v{self.version}", f"{self.cluster_size}", f"r{self.refcount_bits}"]
        words += [word for word in (self.compression,) if word != "none"]
        words += ["sub"] * self.is_extended + ["lazy"] * self.is_lazy
        words += [f"data-{self.data_file}"] * (self.data_file != "none")
        words += [f"chain{self.chain}"] * (self.chain > 1)
        words += [self.preallocation] * (self.preallocation != "off")
        return "-".join(words)

    def create_options(
        self, size: int, backing: Path | None, data_file: Path | None
    ) -> CreateOptions:
        """What our own `create` takes for it."""
        is_zstd = self.compression == "zstd"
        return CreateOptions(
            size=size,
            version=self.version,
            cluster_size=self.cluster_size,
            refcount_bits=self.refcount_bits,
            backing_file=None if backing is None else backing.name,
            backing_format=None if backing is None else "qcow2",
            preallocation=Preallocation(self.preallocation),
            is_lazy=self.is_lazy,
            is_extended=self.is_extended,
            data_file=None if data_file is None else str(data_file),
            is_data_file_raw=self.data_file == "raw",
            compression=CompressionType.ZSTD if is_zstd else CompressionType.ZLIB,
        )

    def qemu_options(self, backing: Path | None, data_file: Path | None) -> list[str]:
        """What `qemu-img create` takes for it."""
        options = [
            f"compat={'0.10' if self.version == 2 else '1.1'}",
            f"cluster_size={self.cluster_size}",
        ]
        if self.version > 2:
            options += [
                f"refcount_bits={self.refcount_bits}",
                f"extended_l2={'on' if self.is_extended else 'off'}",
                f"lazy_refcounts={'on' if self.is_lazy else 'off'}",
            ]
        if self.compression == "zstd":
            options.append("compression_type=zstd")
        if data_file is not None:
            raw = "on" if self.data_file == "raw" else "off"
            options += [f"data_file={data_file}", f"data_file_raw={raw}"]
        if self.preallocation != "off":
            options.append(f"preallocation={self.preallocation}")
        below = [] if backing is None else ["-b", backing.name, "-F", "qcow2"]
        return ["-o", ",".join(options), *below]


def pairwise() -> list[Variant]:
    """Few variants in which every two choices that go together do."""
    found: dict[_Pair, list[tuple[Variant, frozenset[_Pair]]]] = {}
    for variant in _all():
        if variant.is_valid:
            pairs = _pairs(variant)
            for pair in pairs:
                found.setdefault(pair, []).append((variant, pairs))
    missing = set(found)
    chosen = []
    for pair in found:
        if pair in missing:
            # A part of them is enough to find a good one.
            variants = found[pair][:: 1 + len(found[pair]) // 50]
            best, pairs = max(variants, key=lambda each: len(missing & each[1]))
            chosen.append(best)
            missing -= pairs
    return chosen


def _all() -> Iterator[Variant]:
    for values in product(*CHOICES.values()):
        yield Variant(*values)  # type: ignore[arg-type]  # in the order of the fields


def _pairs(variant: Variant) -> frozenset[_Pair]:
    named = [(name, getattr(variant, name)) for name in CHOICES]
    return frozenset((*one, *other) for one, other in combinations(named, 2))
