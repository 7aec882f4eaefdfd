"""What the kernel is told so that an application meets its proxy: one value, written as nft or as iptables.

Both texts say the same, in this order; the first line that fits decides.

What leaves, IPv4:
1. what the proxy and the excluded users send goes its way, and so does what is sent to excluded networks and ports;
2. a question to a DNS server (UDP 53) goes to the proxy;
3. what stays on this host goes its way, and so does what is sent to the cloud's metadata and to the control plane;
4. a TCP connection that begins goes to the proxy.

What arrives, IPv4: a TCP connection that begins at one of this host's addresses goes to the proxy, unless it came by
the loopback interface or its port is excluded.

IPv6 is not carried by the proxy, so it is refused where IPv4 would have been redirected, and never goes round.

Only what *begins* is touched (SYN without ACK): a connection that was open before, such as the operator's own SSH
session, stays as it is.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, collapse_addresses
from typing import Literal

IpAddress = IPv4Address | IPv6Address
IpNetwork = IPv4Network | IPv6Network

TABLE = "smc"
"""The nft table, of the family inet."""
OUTBOUND, INBOUND = "SMC_OUTBOUND", "SMC_INBOUND"
"""The chains in the tables of iptables."""
SSH = 22
METADATA = (IPv4Address("169.254.169.254"), IPv4Address("168.63.129.16"))
"""Where a cloud speaks to its machine over TCP: metadata, and Azure's agent. As DNS servers they are like any other."""

_BEFORE_NAT = -110
"""Right before where destinations are changed (-100), so that nobody else's redirection goes round the proxy."""
_FILTER = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Interception:
    """Whose traffic goes to which port, and whose does not."""

    address: IPv4Address
    """Where the proxy's inbound listener is; outbound and DNS are on 127.0.0.1."""
    outbound_port: int
    inbound_port: int
    dns_port: int
    """UDP"""
    proxy_id: int
    """The proxy's user and group: what either sends is never redirected."""
    inbound_ports: tuple[int, ...] = ()
    """Ports of this host that are reached without the proxy; `SSH` always is."""
    outbound_ports: tuple[int, ...] = ()
    """Ports of others that are reached without the proxy; 53 means DNS too."""
    networks: tuple[IpNetwork, ...] = ()
    """Destinations that are reached without the proxy."""
    users: tuple[int, ...] = ()
    """UIDs that send without the proxy."""
    control_plane: tuple[tuple[IpAddress, int], ...] = ()
    """(address, port) of what the host itself has to reach whatever becomes of its proxy."""
    dns_servers: tuple[IpAddress, ...] = ()
    """Questions to these alone go to the proxy; empty: to any server.

    Where applications ask a resolver on their own host, name that one: its own questions to the servers behind it
    would otherwise come back to the proxy, which asks the resolver, and so on.
    """

    @property
    def senders(self) -> tuple[int, ...]:
        """UIDs that nothing is redirected of; sorted."""
        return tuple(sorted({self.proxy_id, *self.users}))

    @property
    def open_ports(self) -> tuple[int, ...]:
        """Sorted, at least one."""
        return tuple(sorted({SSH, *self.inbound_ports}))

    @property
    def free_ports(self) -> tuple[int, ...]:
        """Sorted."""
        return tuple(sorted(set(self.outbound_ports)))

    def networks_of(self, family: Literal[4, 6]) -> tuple[IpNetwork, ...]:
        """Without overlap, which nft refuses."""
        if family == 4:
            return tuple(collapse_addresses(n for n in self.networks if isinstance(n, IPv4Network)))
        return tuple(collapse_addresses(n for n in self.networks if isinstance(n, IPv6Network)))

    def control_plane_of(self, family: Literal[4, 6]) -> tuple[tuple[IpAddress, int], ...]:
        """Sorted."""
        found = {(address, port) for address, port in self.control_plane if address.version == family}
        return tuple(sorted(found, key=lambda one: (int(one[0]), one[1])))

    def dns_of(self, family: Literal[4, 6]) -> tuple[IpAddress, ...] | None:
        """Whose questions are meant; empty: nobody's; None: everybody's."""
        if not self.dns_servers:
            return None
        return tuple(sorted({a for a in self.dns_servers if a.version == family}, key=int))


# ----------------------------------------------------------------------------------------------------------------- nft

_NFT_SYN = "tcp flags & (fin | syn | rst | ack) == syn"
NFT_REMOVAL = f"add table inet {TABLE}\ndelete table inet {TABLE}\n"
"""Takes the table away, whether it is there or not."""


def nft(interception: Interception) -> str:
    """A script for `nft -f`, which applies it as a whole or not at all, in place of what it applied before."""
    chains = (
        ("outbound", f"nat hook output priority {_BEFORE_NAT}", _nft_outbound(interception)),
        ("inbound", f"nat hook prerouting priority {_BEFORE_NAT}", _nft_inbound(interception)),
        ("outbound6", f"filter hook output priority {_FILTER}", _nft_outbound6(interception)),
        ("inbound6", f"filter hook input priority {_FILTER}", _nft_inbound6(interception)),
    )
    lines = [f"table inet {TABLE} {{"]
    for name, hook, rules in chains:
        lines += [f"\tchain {name} {{", f"\t\ttype {hook}; policy accept;", *(f"\t\t{rule}" for rule in rules), "\t}"]
    return NFT_REMOVAL + "\n".join((*lines, "}", ""))


def _nft_outbound(i: Interception) -> Iterator[str]:
    yield "meta nfproto != ipv4 accept"
    yield from _nft_excluded(i, 4)
    if (asked := i.dns_of(4)) is None:
        yield f"udp dport 53 redirect to :{i.dns_port}"
    elif asked:
        yield f"ip daddr {_set(asked)} udp dport 53 redirect to :{i.dns_port}"
    yield "fib daddr type local accept"
    yield f"ip daddr {_set(METADATA)} accept"
    if replicas := i.control_plane_of(4):
        yield f"ip daddr . tcp dport {_set(f'{address} . {port}' for address, port in replicas)} accept"
    yield f"{_NFT_SYN} redirect to :{i.outbound_port}"


def _nft_inbound(i: Interception) -> Iterator[str]:
    yield "meta nfproto != ipv4 accept"
    yield 'iifname "lo" accept'
    yield "fib daddr type != local accept"
    yield f"tcp dport {_set(i.open_ports)} accept"
    yield f"{_NFT_SYN} dnat ip to {i.address}:{i.inbound_port}"


def _nft_outbound6(i: Interception) -> Iterator[str]:
    yield "meta nfproto != ipv6 accept"
    yield from _nft_excluded(i, 6)
    if (asked := i.dns_of(6)) is None:
        yield "udp dport 53 reject"
    elif asked:
        yield f"ip6 daddr {_set(asked)} udp dport 53 reject"
    yield "fib daddr type local accept"
    if replicas := i.control_plane_of(6):
        yield f"ip6 daddr . tcp dport {_set(f'{address} . {port}' for address, port in replicas)} accept"
    yield f"{_NFT_SYN} reject with tcp reset"


def _nft_inbound6(i: Interception) -> Iterator[str]:
    yield "meta nfproto != ipv6 accept"
    yield 'iifname "lo" accept'
    yield f"tcp dport {_set(i.open_ports)} accept"
    yield f"{_NFT_SYN} reject with tcp reset"


def _nft_excluded(i: Interception, family: Literal[4, 6]) -> Iterator[str]:
    yield f"meta skuid {_set(i.senders)} accept"
    yield f"meta skgid {i.proxy_id} accept"
    if networks := i.networks_of(family):
        yield f"{'ip' if family == 4 else 'ip6'} daddr {_set(networks)} accept"
    if ports := i.free_ports:
        yield f"meta l4proto {{ tcp, udp }} th dport {_set(ports)} accept"


def _set(elements: Iterable[object]) -> str:
    return f"{{ {', '.join(map(str, elements))} }}"


# ------------------------------------------------------------------------------------------------------------ iptables

_SYN = "-p tcp --tcp-flags FIN,SYN,RST,ACK SYN"


def iptables(interception: Interception, saved: str) -> str:
    """What `iptables-restore --noflush` reads; applied as a whole or not at all, in place of what was applied before.

    `saved` is what `iptables-save -t nat` prints.
    """
    chains = {OUTBOUND: _outbound(interception), INBOUND: _inbound(interception)}
    return _restore("nat", saved, chains, {"OUTPUT": OUTBOUND, "PREROUTING": INBOUND})


def ip6tables(interception: Interception, saved: str) -> str:
    """As `iptables`, for `ip6tables-restore` and `ip6tables-save -t filter`."""
    chains = {OUTBOUND: _outbound6(interception), INBOUND: _inbound6(interception)}
    return _restore("filter", saved, chains, {"OUTPUT": OUTBOUND, "INPUT": INBOUND})


def iptables_removal(table: str, saved: str) -> str:
    """What takes all of it out of `table` again; "" if nothing of it is in `saved`."""
    chains = [chain for chain in (OUTBOUND, INBOUND) if f":{chain} " in saved]
    jumps = list(_jumps(saved))
    if not chains and not jumps:
        return ""
    ours = [*(f"-F {chain}" for chain in chains), *(f"-X {chain}" for chain in chains)]
    return "\n".join((f"*{table}", *jumps, *ours, "COMMIT", ""))


def _restore(table: str, saved: str, chains: Mapping[str, Iterable[str]], hooks: Mapping[str, str]) -> str:
    """With --noflush a chain that is named is emptied, and made if it is missing; the jumps are ours to take out."""
    lines = [f"*{table}", *(f":{chain} - [0:0]" for chain in chains), *_jumps(saved)]
    lines += [f"-A {chain} {rule}" for chain, rules in chains.items() for rule in rules]
    # In front of everybody else's, or their redirection would go round the proxy.
    lines += [f"-I {hook} 1 -j {chain}" for hook, chain in hooks.items()]
    return "\n".join((*lines, "COMMIT", ""))


def _jumps(saved: str) -> Iterator[str]:
    """The removal of every jump to our chains, however many there are."""
    for line in saved.splitlines():
        if line.startswith("-A ") and line.endswith((f"-j {OUTBOUND}", f"-j {INBOUND}")):
            yield f"-D {line.removeprefix('-A ')}"


def _outbound(i: Interception) -> Iterator[str]:
    yield from _excluded(i, 4)
    for server in _servers(i.dns_of(4)):
        yield f"{server}-p udp --dport 53 -j REDIRECT --to-ports {i.dns_port}"
    yield "-m addrtype --dst-type LOCAL -j RETURN"
    for address in METADATA:
        yield f"-d {address} -j RETURN"
    for replica, port in i.control_plane_of(4):
        yield f"-d {replica} -p tcp --dport {port} -j RETURN"
    yield f"{_SYN} -j REDIRECT --to-ports {i.outbound_port}"


def _inbound(i: Interception) -> Iterator[str]:
    yield "-i lo -j RETURN"
    yield "-m addrtype ! --dst-type LOCAL -j RETURN"
    for port in i.open_ports:
        yield f"-p tcp --dport {port} -j RETURN"
    yield f"{_SYN} -j DNAT --to-destination {i.address}:{i.inbound_port}"


def _outbound6(i: Interception) -> Iterator[str]:
    yield from _excluded(i, 6)
    for server in _servers(i.dns_of(6)):
        yield f"{server}-p udp --dport 53 -j REJECT --reject-with icmp6-port-unreachable"
    yield "-m addrtype --dst-type LOCAL -j RETURN"
    for replica, port in i.control_plane_of(6):
        yield f"-d {replica} -p tcp --dport {port} -j RETURN"
    yield f"{_SYN} -j REJECT --reject-with tcp-reset"


def _inbound6(i: Interception) -> Iterator[str]:
    yield "-i lo -j RETURN"
    for port in i.open_ports:
        yield f"-p tcp --dport {port} -j RETURN"
    yield f"{_SYN} -j REJECT --reject-with tcp-reset"


def _excluded(i: Interception, family: Literal[4, 6]) -> Iterator[str]:
    for user in i.senders:
        yield f"-m owner --uid-owner {user} -j RETURN"
    yield f"-m owner --gid-owner {i.proxy_id} -j RETURN"
    for network in i.networks_of(family):
        yield f"-d {network} -j RETURN"
    for port in i.free_ports:
        for protocol in ("tcp", "udp"):
            yield f"-p {protocol} --dport {port} -j RETURN"


def _servers(asked: Sequence[IpAddress] | None) -> tuple[str, ...]:
    """How each server is written before the rest of a rule; one of no words is any server."""
    return ("",) if asked is None else tuple(f"-d {server} " for server in asked)
