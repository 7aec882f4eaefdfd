"""What runs a control plane: making a mesh once, and being one of its replicas."""

from __future__ import annotations

import asyncio
import importlib
import os
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import MISSING, fields
from functools import reduce
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from smc.cli import logs, say
from smc.cli.credentials import keep
from smc.cli.pages import examples
from smc.cli.session import API_PORT, Config, credential_option, with_port
from smc.config import PREFIX, Settings
from smc.errors import Conflict, NotFound

if TYPE_CHECKING:
    from cluster.kv import KV
    from smc.certificates.credential import Credential


F = TypeVar("F", bound=Callable[..., Any])


def _store_options(kek_file: str) -> Callable[[F], F]:
    """Where etcd is, which mesh in it, and what opens the mesh; `kek_file` is the help for that."""
    options = (
        click.option(
            "--etcd", required=True, envvar="SMC_ETCD", metavar="HOST:PORT,…", help="etcd's client endpoints."
        ),
        click.option(
            "--mesh", default="default", show_default=True, envvar="SMC_MESH", help="The mesh's name in etcd."
        ),
        click.option(
            "--kek-file", required=True, type=click.Path(dir_okay=False), envvar="SMC_KEK_FILE", help=kek_file
        ),
        click.option("--etcd-ca", type=click.Path(), envvar="SMC_ETCD_CA", help="PEM: whom to trust as etcd."),
        click.option("--etcd-certificate", type=click.Path(), envvar="SMC_ETCD_CERTIFICATE", help="PEM."),
        click.option("--etcd-key", type=click.Path(), envvar="SMC_ETCD_KEY", help="PEM."),
    )
    return lambda f: reduce(lambda made, option: option(made), reversed(options), f)


def _store_settings(command: str, flags: Mapping[str, str | None]) -> Settings:
    """The flags of `_store_options`, read like a replica's, so that what is wrong is said in the same words."""
    return Settings.read({}, name=command, address="127.0.0.1", **flags)


@click.command(
    epilog=examples(
        "smc init --etcd 127.0.0.1:2379 --trust-domain mesh.example.com --kek-file /etc/smc/kek",
        "smc init --etcd 192.0.2.7:2379 --trust-domain mesh.example.com --kek-file kek --out ./admin",
    )
)
@click.option("--trust-domain", required=True, metavar="NAME", help="Ends up in every identity: mesh.example.com.")
@_store_options("The key-encryption key: made if it is not there. Every replica needs it; whoever has it has the mesh.")
@click.option(
    "--out",
    type=click.Path(path_type=Path, file_okay=False),
    default=lambda: Path.home() / ".smc",
    show_default="~/.smc",
    help="Where the first operator's credential goes.",
)
@click.option("--operator", default="admin", show_default=True, help="The first operator's name.")
@click.option(
    "--server", multiple=True, metavar="HOST[:PORT]", help="Where the replicas' API will be, for `smc apply`."
)
def init(trust_domain: str, out: Path, operator: str, server: tuple[str, ...], **store: str | None) -> None:
    """Make a new mesh: its authority, sealed in etcd, and a credential for the first operator.

    All of it is one transaction. A mesh that exists is left as it is.
    """
    settings = _store_settings("init", store)
    mesh, kek_file = settings.mesh, settings.kek_file
    if (out / "key.pem").exists():
        raise Conflict(f"there is a credential in {out}", hint="name another directory by --out, or move it away")
    logs.to_stderr()
    credential = asyncio.run(_init(settings, trust_domain, operator))
    servers = tuple(with_port(s) for s in server) or (f"127.0.0.1:{API_PORT}",)
    keep(out, credential, Config(servers, mesh))
    say.out(f"mesh {mesh} made for the trust domain {trust_domain}")
    say.out(f"  key-encryption key   {kek_file}   copy it to every replica, and keep a copy beside your backups")
    say.out(f"  credential           {out}   {credential.uri}")
    say.note(
        "what to do next:\n"
        f"  smc serve --name replica-1 --address <IP address> --etcd {store['etcd']} --kek-file {kek_file}"
        + (f" --mesh {mesh}" if mesh != "default" else "")
        + f"\n  smc apply -f <file> --credential {out} --server <IP address>"
        + f"\n  smc token create proxy/<namespace>/<workload> --credential {out} --server <IP address>"
    )


async def _init(settings: Settings, trust_domain: str, operator: str) -> Credential:
    from smc.certificates.authority import load_mesh
    from smc.certificates.initialise import initialise
    from smc.certificates.signers.local import LocalSigner
    from smc.keys import Keys

    keys = Keys(settings.mesh)
    kv = _store(settings)
    try:
        try:
            # Before a key is made that no mesh will ever need.
            existing = await load_mesh(kv, keys)
        except NotFound:
            pass
        else:
            raise Conflict(
                f"the mesh {settings.mesh!r} exists already, for the trust domain {existing.trust_domain!r}",
                hint="give another name by --mesh to make a second one beside it",
            )
        try:
            signer = LocalSigner.open(settings.kek_file)
        except NotFound:
            settings.kek_file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            signer = LocalSigner.create(settings.kek_file)
        return await initialise(kv, keys, signer, trust_domain, time.time(), operator=operator)
    finally:
        await kv.close()


async def recover(kv: KV, mesh: str, kek_file: Path, operator: str) -> Credential:
    """A new credential for an operator, by the key-encryption key alone: a replica's way. The mesh needs a leader.

    Raises:
        SmcError: it cannot be had; the text says why.
    """
    from smc.certificates import x509
    from smc.certificates.authority import load_keyring, load_mesh, load_roots
    from smc.certificates.credential import Credential
    from smc.certificates.requests import request_credential
    from smc.certificates.signers.local import LocalSigner
    from smc.keys import Keys

    keys = Keys(mesh)
    uri = x509.credential_uri((await load_mesh(kv, keys)).trust_domain, f"operator/{operator}")
    keyring = await load_keyring(kv, keys, LocalSigner.open(kek_file))
    key = x509.new_key()
    chain = await request_credential(kv, keys, keyring, f"operator/{operator}", key.public_key(), "key-encryption key")
    roots = await load_roots(kv, keys)
    x509.check_answer(chain, key.public_key(), uri, roots, time.time())
    return Credential(uri, chain, x509.private_pem(key).decode(), roots)


@click.command(
    "recover", epilog=examples("smc recover --etcd 127.0.0.1:2379 --kek-file /etc/smc/kek --server 192.0.2.1")
)
@_store_options("The key-encryption key, as the replicas have it.")
@click.option("--operator", default="admin", show_default=True, help="The operator's name.")
@click.option("--server", multiple=True, metavar="HOST[:PORT]", help="Where the replicas' API is.")
@credential_option
def recover_command(operator: str, server: tuple[str, ...], credential: Path, **store: str | None) -> None:
    """Become an operator again when no operator's credential is left: with etcd and the key-encryption key."""
    logs.to_stderr()
    settings = _store_settings("recover", store)

    async def run() -> Credential:
        kv = _store(settings)
        try:
            return await recover(kv, settings.mesh, settings.kek_file, operator)
        finally:
            await kv.close()

    made = asyncio.run(run())
    servers = tuple(with_port(s) for s in server) or Config.read(credential).servers or (f"127.0.0.1:{API_PORT}",)
    keep(credential, made, Config(servers, settings.mesh))
    say.out(made.uri)


def _store(settings: Settings) -> KV:
    # By name, as every plugin.
    kv: KV = importlib.import_module("smc.plugins").store(settings)
    return kv


def _settings(f: Any) -> Any:
    """A flag for every setting of a replica."""
    for setting in reversed(fields(Settings)):
        default = "" if setting.default is None else f" (default {_text(setting.default)})"
        if setting.default is MISSING:
            default = " (required)"
        f = click.option(
            f"--{setting.name.replace('_', '-')}",
            setting.name,
            metavar="TEXT",
            help=f"{setting.metadata['help']}{default} [{PREFIX}{setting.name.upper()}]",
        )(f)
    return f


def _text(value: Any) -> str:
    from datetime import timedelta

    return f"{value.total_seconds():g}s" if isinstance(value, timedelta) else str(value).lower()


@click.command(
    epilog=examples(
        "smc serve --name replica-1 --address 192.0.2.1 --etcd 127.0.0.1:2379 --kek-file /etc/smc/kek",
        "SMC_ETCD=127.0.0.1:2379 SMC_KEK_FILE=/etc/smc/kek smc serve --name replica-1 --address 192.0.2.1",
    )
)
@_settings
def serve(**flags: str | None) -> None:
    """Run one replica until SIGTERM. Every flag may also come from the environment, as SMC_<FLAG>."""
    settings = Settings.read(os.environ, **flags)
    # By name: nobody else pays for all that a replica imports.
    sys.exit(importlib.import_module("smc.serve").main(settings))
