"""This host's network: ports, interfaces and addresses."""

from __future__ import annotations

import ipaddress
import socket


def free_port(address: str = "127.0.0.1") -> int:
    """Return a TCP port of this host that is free at the moment."""
    with socket.socket() as probe:
        probe.bind((address, 0))
        return int(probe.getsockname()[1])


def port_holder(port: int) -> str:
    """Return the process that listens on a port of this host, such as ``python, process 4711``; "" if unknown."""
    import psutil

    try:  # the system may hide connections and processes
        for connection in psutil.net_connections("tcp"):
            if connection.laddr and connection.laddr.port == port and connection.status == psutil.CONN_LISTEN:
                if connection.pid is None:  # the system hides other users' processes
                    return "a process of another user"
                return f"{psutil.Process(connection.pid).name()}, process {connection.pid}"
    except (psutil.Error, OSError):
        pass
    return ""


def interface_towards(host: str) -> str:
    """Return the name of the network interface through which this host reaches ``host``; "" if unknown."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect((host, 9))  # a datagram socket sends nothing here
        except OSError:
            return ""
        own = probe.getsockname()[0]
    return next((name for name, address, _ in _ipv4_addresses() if address == own), "")


def own_networks() -> list[str]:
    """Return this host's IPv4 addresses with their networks, such as ``10.0.0.3/24``, without the loopback."""
    return [f"{address}/{mask}" for _, address, mask in _ipv4_addresses() if not address.startswith("127.")]


def _ipv4_addresses() -> list[tuple[str, str, str]]:
    """Return interface, address and netmask of each IPv4 address of this host; [] if the system hides them."""
    import psutil

    try:
        return [
            (name, address.address, address.netmask or "255.255.255.255")
            for name, addresses in psutil.net_if_addrs().items()
            for address in addresses
            if address.family == socket.AF_INET
        ]
    except (psutil.Error, OSError):
        return []


def common_address(networks: list[list[str]]) -> str:
    """Return the address at which all hosts can reach the first one.

    It is the first host's address in a network that all other hosts share; if there is none, its first address; if
    there is only one host, the loopback.

    Args:
        networks: `own_networks` of each host, the first rank's host first.
    """
    first = [ipaddress.ip_interface(text) for text in networks[0]]
    others = [[ipaddress.ip_interface(text) for text in texts] for texts in networks[1:] if texts != networks[0]]
    for own in first if others else []:
        if all(any(other.ip in own.network for other in host) for host in others):
            return str(own.ip)
    return str(first[0].ip) if others and first else "127.0.0.1"
