# SPDX-FileCopyrightText: The nbdjobs authors
# SPDX-License-Identifier: Apache-2.0
"""User-created objects: what `--object` makes and other options refer to by id."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any, Final

from nbdjobs.daemon import secret_loading, throttle_limits
from nbdjobs.daemon.object_options import (
    IothreadProperties,
    ObjectOptions,
    SecretProperties,
    ThrottleGroupProperties,
)
from nbdjobs.daemon.throttle_limits import ThrottleLimits
from nbdjobs.errors import CommandError
from nbdjobs.nodes.graph import Graph, is_well_formed_id
from nbdjobs.nodes.leaky_bucket import ThrottleConfig
from nbdjobs.nodes.throttle_group import ThrottleGroup

_UNLIMITED: Final = ThrottleConfig()


class Objects:
    """All user-created objects by id.

    Args:
        graph: Gets the throttle groups and the secrets, where nodes look for them.
    """

    def __init__(self, graph: Graph) -> None:
        self._objects: dict[str, ObjectOptions] = {}
        self._secrets = graph.secrets
        self._groups = graph.throttle_groups

    def __iter__(self) -> Iterator[ObjectOptions]:
        """The properties of all objects, oldest first."""
        return iter(self._objects.values())

    def find(self, name: str) -> ObjectOptions | None:
        """The properties of an object."""
        return self._objects.get(name)

    def add(self, options: ObjectOptions) -> None:
        """Create an object; `CommandError` when its id or a property is wrong."""
        if not is_well_formed_id(options.id):
            raise CommandError("Parameter 'id' expects an identifier")
        if options.id in self._objects:
            raise CommandError(
                f"attempt to add duplicate property '{options.id}' to object (type 'container')"
            )
        content = None
        match options:
            case SecretProperties():
                content = secret_loading.load(options, self._secrets)
            case ThrottleGroupProperties():
                if options.id in self._groups:  # some device has it, without an object
                    raise CommandError("A group with this name already exists")
                self._groups[options.id] = ThrottleGroup(_initial_config(options))
            case IothreadProperties():
                options.check()
        self._secrets.add(options.id, content)
        self._objects[options.id] = options

    def delete(self, name: str) -> None:
        """Remove an object.

        Raises:
            CommandError: There is none, or nodes use it, in QEMU's words.
        """
        if name not in self._objects:
            raise CommandError(f"object '{name}' not found")
        # A group of that name may be there without the object being one.
        is_group = isinstance(self._objects[name], ThrottleGroupProperties)
        if is_group and self._groups[name].is_used:
            raise CommandError(f"object '{name}' is in use, can not be deleted")
        del self._objects[name]
        self._secrets.remove(name)
        if is_group:
            del self._groups[name]

    def change(self, name: str, **properties: Any) -> None:
        """Change properties that are plain values, already of the right type.

        Raises:
            CommandError: They do not go together, in QEMU's words; nothing has changed.
        """
        changed = replace(self._objects[name], **properties)
        if isinstance(changed, IothreadProperties):
            changed.check()
        self._objects[name] = changed

    def check_iothread(self, name: str) -> None:
        """Raise `CommandError` unless an iothread of that id exists."""
        if not isinstance(self._objects.get(name), IothreadProperties):
            raise CommandError(f'iothread "{name}" not found')

    def limits(self, name: str) -> ThrottleConfig:
        """The limits of a throttle group that exists."""
        return self._groups[name].config

    def set_limits(self, name: str, limits: ThrottleLimits) -> None:
        """Change the limits of a throttle group that exists, at once.

        Raises:
            CommandError: They do not go together, in QEMU's words; the old ones stay in force.
        """
        config = throttle_limits.with_limits(self._groups[name].config, limits)
        config.check()
        self._groups[name].set_config(config)


def _initial_config(options: ThrottleGroupProperties) -> ThrottleConfig:
    config = throttle_limits.with_properties(_UNLIMITED, options)
    if options.limits is not None:
        config = throttle_limits.with_limits(config, options.limits)
    config.check()
    return config
