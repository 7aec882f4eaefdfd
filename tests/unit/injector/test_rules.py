"""Both texts of interception word for word, and what a real kernel says of them."""

from __future__ import annotations

import os
import shutil
import subprocess
from dataclasses import replace
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from smc.injector import rules
from smc.injector.rules import Interception

GOLDEN = Path(__file__).parents[2] / "golden" / "interception"
PLAIN = Interception(
    address=IPv4Address("10.0.0.5"), outbound_port=15001, inbound_port=15003, dns_port=15053, proxy_id=1337
)
EVERYTHING = replace(
    PLAIN,
    inbound_ports=(15010, 9100, 22),
    outbound_ports=(5432, 53),
    networks=(
        IPv4Network("10.1.2.0/24"),
        IPv4Network("10.1.0.0/16"),
        IPv4Network("192.0.2.7/32"),
        IPv6Network("2001:db8::/32"),
    ),
    users=(1000, 0),
    control_plane=(
        (IPv4Address("10.0.0.2"), 15129),
        (IPv4Address("10.0.0.2"), 15128),
        (IPv6Address("2001:db8:1::2"), 15128),
    ),
    dns_servers=(IPv4Address("127.0.0.53"), IPv6Address("::1")),
)
INTERCEPTIONS = [pytest.param(PLAIN, id="plain"), pytest.param(EVERYTHING, id="everything")]


@pytest.mark.parametrize("interception", INTERCEPTIONS)
@pytest.mark.parametrize("form", ["nft", "iptables", "ip6tables"])
def test_the_text_is_the_golden_one(interception: Interception, form: str) -> None:
    name = "plain" if interception is PLAIN else "everything"
    text = rules.nft(interception) if form == "nft" else getattr(rules, form)(interception, "")
    path = GOLDEN / f"{name}.{form}"
    if os.environ.get("UPDATE_GOLDEN"):
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
    assert text == path.read_text(), "if that is meant: UPDATE_GOLDEN=1 writes it, and the diff shows what changed"


def test_networks_that_overlap_are_one() -> None:
    both = replace(PLAIN, networks=(IPv4Network("10.1.2.0/24"), IPv4Network("10.0.0.0/8"), IPv4Network("10.1.2.0/24")))
    assert rules.nft(both) == rules.nft(replace(PLAIN, networks=(IPv4Network("10.0.0.0/8"),)))


def test_the_order_in_which_things_are_given_changes_nothing() -> None:
    turned = replace(
        EVERYTHING,
        **{
            name: tuple(reversed(getattr(EVERYTHING, name)))
            for name in ("inbound_ports", "outbound_ports", "networks", "users", "control_plane", "dns_servers")
        },
    )
    assert rules.nft(turned) == rules.nft(EVERYTHING)
    assert rules.iptables(turned, "") == rules.iptables(EVERYTHING, "")
    assert rules.ip6tables(turned, "") == rules.ip6tables(EVERYTHING, "")


def test_a_resolver_on_the_host_is_the_only_one_whose_questions_are_redirected() -> None:
    here = replace(PLAIN, dns_servers=(IPv4Address("127.0.0.53"),))
    assert "ip daddr { 127.0.0.53 } udp dport 53 redirect to :15053" in rules.nft(here)
    assert "udp dport 53 reject" not in rules.nft(here), "what it asks itself over IPv6 has to get through"


# -------------------------------------------------------------------------------------------------------- in a kernel


def kernel(script: str, *inputs: str) -> str:
    """Run a shell script in a network namespace of its own; `$1`, `$2` … are files with `inputs`.

    Raises:
        subprocess.CalledProcessError: it failed; its output tells why.
    """
    needed = ("unshare", "nft", "iptables-restore")
    missing = [f"the program {name}" for name in needed if shutil.which(name) is None]
    if os.geteuid() != 0:
        missing.append("root, who may make network namespaces")
    if missing:
        refuse = pytest.fail if os.environ.get("CI") else pytest.skip
        refuse(f"this needs {', '.join(missing)}")
    files = [os.memfd_create("input") for _ in inputs]
    try:
        for descriptor, text in zip(files, inputs, strict=True):
            os.write(descriptor, text.encode())
        done = subprocess.run(
            ["unshare", "--net", "bash", "-euc", script, "sh", *(f"/dev/fd/{descriptor}" for descriptor in files)],
            capture_output=True, text=True, timeout=30, pass_fds=files, check=False,
        )  # fmt: skip
    finally:
        for descriptor in files:
            os.close(descriptor)
    assert done.returncode == 0, f"{done.stderr}\n{done.stdout}"
    return done.stdout


OTHERS_NFT = "table ip theirs {\n\tchain c {\n\t\ttype nat hook output priority -100; policy accept;\n\t}\n}\n"


@pytest.mark.parametrize("interception", INTERCEPTIONS)
def test_nft_takes_it_twice_as_once_and_gives_back_what_was_there(interception: Interception) -> None:
    show = "nft list ruleset; echo ---;"
    out = kernel(
        f'nft -f "$3"; {show} nft -c -f "$1"; {show} nft -f "$1"; {show} nft -f "$1"; {show}'
        f'nft -f "$2"; {show} nft -f "$2"; {show}',
        rules.nft(interception), rules.NFT_REMOVAL, OTHERS_NFT,
    )  # fmt: skip
    before, checked, once, twice, removed, removed_twice, _ = out.split("---\n")
    assert before == checked == removed == removed_twice
    assert once == twice != before
    assert before in once, "what others wrote is left alone"


@pytest.mark.parametrize("interception", INTERCEPTIONS)
@pytest.mark.parametrize("variant", ["nft", "legacy"])
@pytest.mark.parametrize(
    ("form", "command", "table"), [("iptables", "iptables", "nat"), ("ip6tables", "ip6tables", "filter")]
)
def test_iptables_takes_it_twice_as_once_and_gives_back_what_was_there(
    interception: Interception, variant: str, form: str, command: str, table: str
) -> None:
    tool = f"{command}-{variant}"
    theirs = f"{tool} -t {table} -A OUTPUT -p tcp --dport 81 -j ACCEPT"
    text = getattr(rules, form)
    first = text(interception, "")
    saved = kernel(
        f'{theirs}; {tool}-restore -w 5 --noflush --test "$1"; {tool}-restore -w 5 --noflush "$1"; '
        f"{tool}-save -t {table}",
        first,
    )
    # It was there already, and somebody has put a second jump to it.
    doubled = saved.replace("-A OUTPUT -j SMC_OUTBOUND\n", "-A OUTPUT -j SMC_OUTBOUND\n-A OUTPUT -j SMC_OUTBOUND\n")
    assert doubled != saved
    show = f"{tool}-save -t {table} | grep -v '^#'; echo ---;"
    out = kernel(
        f'{theirs}; {show} {tool}-restore --noflush "$1"; {show} {tool}-restore --noflush "$2"; {show} '
        f'{tool} -t {table} -A OUTPUT -j SMC_OUTBOUND; {tool}-restore --noflush "$3"; {show} '
        f'{tool}-restore --noflush "$4"; {show}',
        first, text(interception, saved), text(interception, doubled), rules.iptables_removal(table, saved),
    )  # fmt: skip
    before, once, twice, mended, removed, _ = out.split("---\n")
    assert once == twice == mended != before
    assert removed == before
    assert once.index("-j SMC_OUTBOUND") < once.index("--dport 81"), "nobody's rule comes before ours"


def test_there_is_nothing_to_take_out_of_tables_that_have_nothing_of_ours() -> None:
    assert rules.iptables_removal("nat", "*nat\n:OUTPUT ACCEPT [0:0]\n-A OUTPUT -j THEIRS\nCOMMIT\n") == ""


networks = st.one_of(
    st.tuples(st.integers(0, 2**32 - 1), st.integers(1, 32)).map(lambda t: IPv4Network(t, strict=False)),
    st.tuples(st.integers(0, 2**128 - 1), st.integers(1, 128)).map(lambda t: IPv6Network(t, strict=False)),
)
addresses = st.one_of(st.ip_addresses(v=4), st.ip_addresses(v=6))
ports = st.lists(st.integers(1, 65535), max_size=6).map(tuple)
interceptions = st.builds(
    Interception,
    address=st.ip_addresses(v=4),
    outbound_port=st.integers(1, 65535),
    inbound_port=st.integers(1, 65535),
    dns_port=st.integers(1, 65535),
    proxy_id=st.integers(1, 2**32 - 2),
    inbound_ports=ports,
    outbound_ports=ports,
    networks=st.lists(networks, max_size=6).map(tuple),
    users=st.lists(st.integers(0, 2**32 - 2), max_size=4).map(tuple),
    control_plane=st.lists(st.tuples(addresses, st.integers(1, 65535)), max_size=6).map(tuple),
    dns_servers=st.lists(addresses, max_size=3).map(tuple),
)


@given(interceptions)
@settings(max_examples=30, deadline=None)
def test_a_kernel_takes_whatever_was_chosen(interception: Interception) -> None:
    kernel(
        'nft -c -f "$1"; iptables-restore --noflush --test "$2"; ip6tables-restore --noflush --test "$3"',
        rules.nft(interception), rules.iptables(interception, ""), rules.ip6tables(interception, ""),
    )  # fmt: skip
