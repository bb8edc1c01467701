# SPDX-FileCopyrightText: The nbdjobs authors
# SPDX-License-Identifier: Apache-2.0
"""Events as clients see them.

What happened is described below this package, as a dataclass under `@event` beside the code
that emits it; here it gets its time and its form.

Source: QEMU docs/interop/qmp-spec.rst, "Asynchronous events".
"""

from __future__ import annotations

from nbdjobs.qapi.model import members_of
from nbdjobs.qapi.types import event_name
from nbdjobs.qapi.visitor import to_qapi


def event_message(event: object, now_ns: int) -> dict[str, object]:
    """The message that tells clients of `event`.

    Args:
        event: An instance of a dataclass declared with `@event`.
        now_ns: When it happened, in nanoseconds since the epoch.
    """
    seconds, nanoseconds = divmod(now_ns, 1_000_000_000)
    message: dict[str, object] = {
        "timestamp": {"seconds": seconds, "microseconds": nanoseconds // 1000},
        "event": event_name(type(event)),
    }
    data: type = type(event)
    if members_of(data):
        message["data"] = to_qapi(event)
    return message
