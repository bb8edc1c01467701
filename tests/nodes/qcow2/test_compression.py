# SPDX-FileCopyrightText: The nbdjobs authors
# SPDX-License-Identifier: Apache-2.0
"""Compressed clusters: what was compressed comes back, and damage is an error."""

from __future__ import annotations

import contextlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nbdjobs.errors import NodeError
from nbdjobs.nodes.qcow2.compression import compress, decompress
from nbdjobs.nodes.qcow2.constants import CompressionType

CLUSTER = 4096
kinds = st.sampled_from(list(CompressionType))


@given(kinds, st.binary(min_size=1, max_size=64), st.binary(max_size=600))
def test_what_was_compressed_comes_back_whatever_follows_it(
    kind: CompressionType, pattern: bytes, behind: bytes
) -> None:
    cluster = (pattern * CLUSTER)[:CLUSTER]
    packed = compress(kind, cluster)
    assert packed is not None
    assert decompress(kind, packed + behind, CLUSTER) == cluster


@given(kinds, st.binary(max_size=600))
def test_damaged_data_is_an_error_or_a_whole_cluster(kind: CompressionType, junk: bytes) -> None:
    with contextlib.suppress(NodeError):
        assert len(decompress(kind, junk, CLUSTER)) == CLUSTER


@pytest.mark.parametrize("kind", list(CompressionType))
def test_a_stream_of_more_than_a_cluster_takes_no_more_memory(kind: CompressionType) -> None:
    packed = compress(kind, bytes(64 * CLUSTER))
    assert packed is not None
    assert decompress(kind, packed, CLUSTER) == bytes(CLUSTER)


@pytest.mark.parametrize("kind", list(CompressionType))
def test_what_ends_early_is_damaged(kind: CompressionType) -> None:
    packed = compress(kind, bytes(CLUSTER // 2))
    assert packed is not None
    with pytest.raises(NodeError, match="too short"):
        decompress(kind, packed, CLUSTER)


@pytest.mark.parametrize("kind", list(CompressionType))
def test_what_does_not_get_smaller_is_not_compressed(kind: CompressionType) -> None:
    assert compress(kind, bytes(range(256))) is None
