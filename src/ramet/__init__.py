"""Ramet: self-hosted virtual development environments and sandboxes that fork."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from ramet.aio import AsyncMachine as AsyncMachine
    from ramet.sdk import Machine as Machine


def __getattr__(name: str) -> Any:
    """The SDK's faces, imported when first asked for, so that `import ramet.errors` costs nothing."""
    if name == "Machine":
        from ramet.sdk import Machine

        return Machine
    if name == "AsyncMachine":
        from ramet.aio import AsyncMachine

        return AsyncMachine
    raise AttributeError(name)
