# SPDX-FileCopyrightText: The nbdjobs authors
# SPDX-License-Identifier: Apache-2.0
"""Changes to images as they are: the passwords of encrypted ones.

Source: QEMU qapi/block-core.json (BlockdevAmendOptions), and the behaviour of its storage daemon.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

from nbdjobs.errors import CommandError
from nbdjobs.nodes.crypto.amend import LuksAmendOptions
from nbdjobs.nodes.graph import Graph
from nbdjobs.nodes.luks import LuksNode
from nbdjobs.nodes.node import Node
from nbdjobs.nodes.qcow2.node import Qcow2Node
from nbdjobs.qapi.types import flat_union


def _branches() -> Mapping[str, type]:
    # Drivers import what this module imports, so their table can be read only once it is used.
    from nbdjobs.nodes.drivers import DRIVERS

    own: Mapping[str, type] = {
        "luks": BlockdevAmendOptionsLUKS,
        "qcow2": BlockdevAmendOptionsQcow2,
    }
    return {name: own.get(name, BlockdevAmendOptions) for name in DRIVERS}


@flat_union("driver", _branches)
@dataclass(frozen=True, kw_only=True)
class BlockdevAmendOptions:
    """What is to be changed (QAPI `BlockdevAmendOptions`)."""

    driver: str


@dataclass(frozen=True, kw_only=True)
class BlockdevAmendOptionsLUKS(BlockdevAmendOptions, LuksAmendOptions):
    """The passwords of a LUKS volume."""


@flat_union(
    "format",
    lambda: {"luks": QCryptoBlockAmendOptionsLUKS, "qcow": QCryptoBlockAmendOptions},
)
@dataclass(frozen=True, kw_only=True)
class QCryptoBlockAmendOptions:
    """The encryption of an image."""

    format: str


@dataclass(frozen=True, kw_only=True)
class QCryptoBlockAmendOptionsLUKS(QCryptoBlockAmendOptions, LuksAmendOptions):
    """The passwords of one that is encrypted as LUKS volumes are."""


@dataclass(frozen=True, kw_only=True)
class BlockdevAmendOptionsQcow2(BlockdevAmendOptions):
    """What is to be changed of a qcow2 image."""

    encrypt: QCryptoBlockAmendOptions | None = None


Amendable = LuksNode | Qcow2Node


def find_to_amend(graph: Graph, name: str, options: BlockdevAmendOptions) -> Amendable:
    """The node of that name; `CommandError` if there is none, or it cannot be changed so."""
    node: Node | None = graph.nodes.get(name)
    if node is None:
        raise CommandError(f"Cannot find device='' nor node-name='{name}'")
    if node.driver != options.driver:
        raise CommandError("x-blockdev-amend doesn't support changing the block driver")
    if not isinstance(node, LuksNode | Qcow2Node):
        raise CommandError("Driver does not support x-blockdev-amend")
    return node


def hold_image(graph: Graph, node: Amendable) -> AbstractContextManager[None]:
    """What has to be held while the image is changed; entering it may raise `CommandError`."""
    # Nobody else ever uses the file of a qcow2 image.
    return node.changing_keys(graph) if isinstance(node, LuksNode) else nullcontext()


async def amend_image(
    graph: Graph, node: Amendable, options: BlockdevAmendOptions, *, is_forced: bool
) -> None:
    """Do the change, while the image is held.

    Raises:
        CommandError: It does not fit, in QEMU's words; or the storage failed.
    """
    match node, options:
        case LuksNode(), BlockdevAmendOptionsLUKS():
            await node.amend(options, graph.secrets, is_forced=is_forced)
        case Qcow2Node(), BlockdevAmendOptionsQcow2(encrypt=encrypt) if encrypt is not None:
            if not isinstance(encrypt, QCryptoBlockAmendOptionsLUKS):
                raise CommandError("Amend can't be used to change the qcow2 encryption format")
            await node.amend_keys(encrypt, graph.secrets, is_forced=is_forced)
