"""How a machine reaches the network: the QEMU arguments, the words on the guest's kernel command line, and what the host cannot enforce this way.

Every machine sees the same addresses inside, so that a fork will need no new ones.
"""

from __future__ import annotations

from dataclasses import dataclass

# QEMU's user-mode network (https://www.qemu.org/docs/master/system/devices/net.html#using-the-user-mode-network-stack): its defaults, spelled out.
ADDRESS, PREFIX, GATEWAY, DNS, NETWORK = "10.0.2.15", 24, "10.0.2.2", "10.0.2.3", "10.0.2.0/24"
MAC = "52:54:00:72:61:6d"


@dataclass(frozen=True, kw_only=True)
class Network:
    """name: as users see it. netdev: QEMU's backend (`-netdev`). limits: what is not enforced, for `ramet info`."""

    name: str
    netdev: str
    limits: tuple[str, ...]


# The user-mode network needs no privilege and no clean-up: it lives and dies with QEMU. The guest reaches what this host's user reaches;
# nothing outside reaches the guest but through the agent.
USER = Network(
    name="user-mode",
    netdev=f"user,id=net,net={NETWORK},host={GATEWAY},dns={DNS},dhcpstart={ADDRESS},ipv6=off",
    limits=(
        "network: user-mode (no root needed): the guest reaches what this host's user reaches, services on this host's loopback too (as 10.0.2.2); "
        "no rate limit, no filter by address or name",
    ),
)


def kernel_words() -> list[str]:
    """What the agent is told of the network on the kernel command line."""
    return [f"ramet.ip={ADDRESS}/{PREFIX},{GATEWAY}", f"ramet.dns={DNS}"]
