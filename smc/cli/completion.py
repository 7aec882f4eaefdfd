"""`smc completion`, and what it completes beside options and commands: words for kinds, and names that there are.

Names are asked of the control plane. Whoever presses the tabulator waits a second at most, and is told of no failure.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import click
from click.shell_completion import CompletionItem, get_completion_class

from smc.cli import say
from smc.cli.kinds import known, namespace_of, resolve, split_name
from smc.cli.pages import examples
from smc.cli.session import Config, Session
from smc.errors import SmcError

if TYPE_CHECKING:
    from smc.manifests import Kind

SHELLS = ("bash", "zsh", "fish")
PATIENCE = 1.0
"""Seconds, for all replicas together."""

COMPLETION_HELP = """Print the script that completes smc's words in your shell.

\b
bash (4.4 or newer), in ~/.bashrc:   eval "$(smc completion bash)"
zsh, in ~/.zshrc, after compinit:    eval "$(smc completion zsh)"
fish:  smc completion fish > ~/.config/fish/completions/smc.fish
"""


@click.command(help=COMPLETION_HELP, epilog=examples('eval "$(smc completion bash)"'))
@click.argument("shell", type=click.Choice(SHELLS))
@click.pass_context
def completion(ctx: click.Context, shell: str) -> None:
    script = get_completion_class(shell)
    assert script is not None  # noqa: S101 - the three that are offered are known
    say.out(script(ctx.find_root().command, {}, "smc", "_SMC_COMPLETE").source().strip())


def complete_kind(ctx: click.Context, _param: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """What a kind may be called; behind `KIND/` the names of its manifests."""
    word, slash, begun = incomplete.partition("/")
    if slash:
        return [CompletionItem(f"{word}/{name}") for name in _names(ctx, word) if name.startswith(begun)]
    kinds = [
        CompletionItem(called, help=f"{kind.group} {kind.name}")
        for kind in known()
        for called in kind.words
        # A dot is for those who have to say the group.
        if called.startswith(incomplete.lower()) and ("." in incomplete or "." not in called)
    ]
    counted = ctx.info_name == "get" and "denials".startswith(incomplete.lower())
    return [*kinds, CompletionItem("denials", help="what policy has denied")] if counted else kinds


def complete_name(ctx: click.Context, _param: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """The names of the manifests of the KIND before it, in the namespace that was given so far."""
    word = ctx.params.get("kind") or ""
    if not word or "/" in word:
        return []
    return [CompletionItem(name) for name in _names(ctx, word) if name.startswith(incomplete)]


def complete_proxy(ctx: click.Context, _param: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """The proxies that are connected."""
    from smc.v1 import smc_pb2 as pb

    answer = _ask(ctx, "Proxies", pb.ProxiesRequest())
    names = sorted({p.name for p in answer.proxies}) if answer is not None else []
    return [CompletionItem(name) for name in names if name.startswith(incomplete)]


def complete_identity(ctx: click.Context, _param: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """The identities that have a certificate."""
    from smc.v1 import smc_pb2 as pb

    answer = _ask(ctx, "Certificates", pb.CertificatesRequest())
    names = sorted({c.identity for c in answer.certificates}) if answer is not None else []
    return [CompletionItem(name) for name in names if name.startswith(incomplete)]


def _names(ctx: click.Context, word: str) -> Iterable[str]:
    from smc.v1 import smc_pb2 as pb

    try:
        kind: Kind = resolve(split_name(word, None)[0])
    except click.UsageError:
        return []
    namespace = namespace_of(kind, ctx.params.get("namespace") or "") if kind.namespaced else ""
    answer = _ask(ctx, "List", pb.ListRequest(group=kind.group, kind=kind.name, namespace=namespace))
    return sorted({o.name for o in answer.objects}) if answer is not None else []


def _ask(ctx: click.Context, method: str, request: Any) -> Any:
    """The answer; None if there is none within PATIENCE, whatever the reason: this is no place to tell it."""
    directory = ctx.params["credential"]
    session = None
    try:
        servers = ctx.params.get("server") or Config.read(directory).servers
        session = Session(directory, servers)
        return session.call(method, request, timeout=PATIENCE / max(1, len(servers)))
    except (SmcError, OSError):
        return None
    finally:
        if session is not None:
            session.close()
