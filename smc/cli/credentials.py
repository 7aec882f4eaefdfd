"""Who one is: joining as an operator, and making the tokens by which others join."""

from __future__ import annotations

import asyncio
import json
import re
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

import click

from smc.cli import logs, say
from smc.cli.pages import examples
from smc.cli.session import Config, Session, connected, credential_option, with_port
from smc.errors import Denied, Invalid, Unavailable

if TYPE_CHECKING:
    from smc.certificates.credential import Credential

JOIN_PORT = 15130


class Ttl(click.ParamType[int]):
    """Seconds, from `90`, `90s`, `10m` or `1h`."""

    name = "duration"

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> int:
        match = re.fullmatch(r"(\d{1,6})([smh]?)", str(value))
        if match is None:
            self.fail(f"{value!r} is no duration such as 90s or 10m", param, ctx)
        return int(match[1]) * {"": 1, "s": 1, "m": 60, "h": 3600}[match[2]]


@click.group()
def token() -> None:
    """Join tokens. A token is good for one credential and one key, for at most 10 minutes."""


@token.command(
    "create",
    epilog=examples("smc token create proxy/shop/buyer", "smc token create viewer/ann --ttl 2m -o json"),
)
@click.argument("credential_path", metavar="proxy/NAMESPACE/WORKLOAD|operator/NAME|viewer/NAME")
@click.option("--ttl", type=Ttl(), default="10m", show_default=True, help="How long it may be used.")
@click.option("-o", "--output", type=click.Choice(["text", "json"]), default="text", show_default=True)
@connected
def create(session: Session, credential_path: str, ttl: int, output: str) -> None:
    """Make a token. It is printed once, on standard output, and kept nowhere."""
    from smc.v1 import smc_pb2 as pb

    if ttl < 1:
        raise click.BadParameter("a token lives for at least one second", param_hint="--ttl")
    made = session.call("CreateToken", pb.CreateTokenRequest(credential=credential_path, ttl_seconds=ttl))
    if output == "json":
        say.out(json.dumps({"token": made.token, "expires": made.expires, "credential": credential_path}))
        return
    say.out(made.token)
    joins = "smc proxy run" if credential_path.startswith("proxy/") else "smc login"
    left = max(0, round(made.expires - time.time()))
    say.note(f"good for {left} s; use it with: SMC_TOKEN=<token> {joins} --join <host>:{JOIN_PORT}")


@click.command(epilog=examples("smc login --join 192.0.2.1 --token -", "SMC_TOKEN=<token> smc login --join 192.0.2.1"))
@click.option("--join", "addresses", multiple=True, metavar="HOST[:PORT]", help="A replica's join port.")
@click.option("--token", "text", envvar="SMC_TOKEN", default="", help="The token, or - to read it [SMC_TOKEN].")
@credential_option
def login(addresses: tuple[str, ...], text: str, credential: Path) -> None:
    """Turn a token into a credential in the credential directory. Another operator makes it: smc token create."""
    if not addresses:
        raise click.UsageError(
            f"--join is missing: the address of a replica's join port, such as 192.0.2.1:{JOIN_PORT}"
        )
    if text == "-":
        text = sys.stdin.readline()
    if not text.strip():
        raise click.UsageError("--token is missing (or SMC_TOKEN): another operator makes one with smc token create")
    logs.to_stderr()
    made, config = asyncio.run(_join(text, tuple(join_port(a) for a in addresses)))
    keep(credential, made, config)
    say.out(f"{made.uri}")
    say.note(f"the credential is in {credential} and renews itself while you use it")


def keep(directory: Path, credential: Credential, config: Config) -> None:
    """Write a credential with where to use it.

    Raises:
        Invalid: the directory cannot be written.
    """
    from smc.certificates import credential as credentials

    try:
        credentials.write(directory, credential)
        config.write(directory)
    except OSError as e:
        raise Invalid(f"{directory} cannot be written: {e.strerror}", hint="name another by --credential") from None


async def _join(text: str, addresses: tuple[str, ...]) -> tuple[Credential, Config]:
    """The first address that answers decides.

    Raises:
        SmcError: no credential was had.
    """
    from smc.certificates import x509
    from smc.certificates.credential import Credential
    from smc.certificates.tokens import Token
    from smc.proxy.join import Unreachable, ask
    from smc.proxy.settings import Exit, ProxyFailed

    parsed = Token.parse(text)
    key = x509.new_key()
    reasons: list[str] = []
    for address in addresses:
        try:
            answer = await ask(address, parsed, key, time.time)
        except Unreachable as e:
            reasons.append(f"{address}: {e.reason}")
            continue
        except ProxyFailed as e:
            refused = e.exit in (Exit.NO_SUCH_TOKEN, Exit.TOKEN_USED, Exit.TOKEN_EXPIRED, Exit.WRONG_PIN)
            raise (Denied if refused else Invalid)(e.message, hint=e.hint) from None
        uri = x509.uri(x509.load(answer.chain)[0])
        x509.check_answer(answer.chain, key.public_key(), uri, tuple(answer.roots), time.time())
        made = Credential(uri, answer.chain, x509.private_pem(key).decode(), tuple(answer.roots))
        if made.path.startswith("proxy/"):
            raise Invalid(f"the token is for {made.path}", hint="a proxy joins with smc proxy run")
        return made, Config(tuple(answer.api_addresses), answer.mesh)
    raise Unavailable("; ".join(reasons), hint="check the addresses and the network; the token is still good")


def join_port(address: str) -> str:
    given = with_port(address)
    return given if given == address else f"{given.rpartition(':')[0]}:{JOIN_PORT}"


@click.command(epilog=examples("smc version", "smc version -o json"))
@click.option("-o", "--output", type=click.Choice(["text", "json"]), default="text", show_default=True)
def version(output: str) -> None:
    """Print the version of this program."""
    from importlib.metadata import PackageNotFoundError
    from importlib.metadata import version as installed

    try:
        number = installed("smc")
    except PackageNotFoundError:
        number = "0+source"
    say.out(json.dumps({"version": number}) if output == "json" else f"smc {number}")
