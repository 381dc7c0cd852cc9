"""Disks of machines."""

from __future__ import annotations

from ramet.cli import text
from ramet.cli.base import Json, OptionalName, app, client, own_name, perform
from ramet.units import format_size


@app.command()
def compact(name: OptionalName = "", json: Json = False) -> None:
    """Give back what a machine's disk holds and nobody needs: what was written over, is zero or unchanged. The machine may run meanwhile.

    Snapshots keep what they hold: delete those that are not needed any more first.

    Example: ramet compact shop
    """

    async def work() -> None:
        from ramet.cli.progress import steps

        which = own_name(name)
        async with client() as verbs, steps(verbs, which):
            given = await verbs.compact(which)
        text.as_json({"given_back": given}) if json else text.say(f"{which}: {format_size(given)} given back.")

    perform(work, json=json)
