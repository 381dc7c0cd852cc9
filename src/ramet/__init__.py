"""Ramet: self-hosted virtual development environments and sandboxes that fork."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from ramet.aio import AsyncHost as AsyncHost
    from ramet.aio import AsyncMachine as AsyncMachine
    from ramet.sdk import Host as Host
    from ramet.sdk import Machine as Machine

_FACES = {"Machine": "ramet.sdk", "Host": "ramet.sdk", "AsyncMachine": "ramet.aio", "AsyncHost": "ramet.aio"}


def __getattr__(name: str) -> Any:
    """The SDK's faces, imported when first asked for, so that `import ramet.errors` costs nothing."""
    if name in _FACES:
        return getattr(importlib.import_module(_FACES[name]), name)
    raise AttributeError(name)
