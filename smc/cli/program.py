"""The program itself: its commands, and what becomes of an error: one line on standard error, and an exit code."""

from __future__ import annotations

import importlib
import os
import sys
import traceback
from typing import Any

import click
from click.shell_completion import CompletionItem

from smc.cli import say
from smc.errors import SmcError

EPILOG = """\b
Exit codes:
  0    done
  1    failed
  2    wrong usage
  3    there is no such thing
  4    not allowed, or not proved who you are
  5    the control plane cannot be reached, or cannot do it now
  6    it is written, and proxies lack it (--wait)
  7    failed, where 1 is an answer (smc diff, smc explain)
  130  Ctrl-C ended a --watch
`smc proxy run` has codes of its own from 10 on.

\b
Where settings come from:
  your credential     --credential, SMC_CREDENTIAL, ~/.smc: in this order
  the control plane   --server, or config.json beside the credential
  a replica           its flags, or the environment: SMC_<FLAG>
  colour              none with NO_COLOR, or if the output is no terminal
"""

SECTIONS = {
    "Begin": {
        "demo": ("smc.demo:demo", "Run a whole mesh on this machine: etcd, three replicas, Envoys and an application."),
        "init": ("smc.cli.replica:init", "Make a new mesh in etcd, with its authority and a first operator."),
        "login": ("smc.cli.credentials:login", "Become an operator or viewer with a token."),
        "recover": ("smc.cli.replica:recover_command", "Become an operator again, with the key-encryption key."),
    },
    "Run": {
        "serve": ("smc.cli.replica:serve", "Run a replica of the control plane."),
        "proxy": ("smc.cli.proxy:proxy", "Run a proxy, and see what the proxies have."),
        "token": ("smc.cli.credentials:token", "Let somebody else join: make a token."),
    },
    "Change": {
        "apply": ("smc.cli.apply:apply", "Create or change manifests from files."),
        "delete": ("smc.cli.apply:delete", "Delete manifests."),
        "validate": ("smc.cli.validate:validate", "Check manifests in files, without a control plane."),
        "diff": ("smc.cli.diff:diff", "Show what applying manifests would change at which proxies."),
    },
    "Look": {
        "get": ("smc.cli.get:get", "List manifests, or show one."),
        "describe": ("smc.cli.describe:describe", "Show a manifest with its problems, and which proxies it reached."),
        "explain": (
            "smc.cli.explain:explain",
            "Say whether a request would be allowed, by what, and where it would go.",
        ),
        "check": ("smc.cli.check:check", "Say whether the mesh is well, and what mends it."),
    },
    "Certificates": {
        "cert": ("smc.cli.cert:cert", "See certificates, revoke whoever has lost one, and rotate who signs."),
    },
    "The program itself": {
        "completion": ("smc.cli.completion:completion", "Print the script that completes smc's words in your shell."),
        "version": ("smc.cli.credentials:version", "Print the version."),
    },
}
"""Purpose -> name -> (module:attribute, one line of help). A command is imported when it is run, or asked for help."""

COMMANDS = {name: entry for section in SECTIONS.values() for name, entry in section.items()}


ANSWERS = frozenset({"diff", "explain"})
"""Commands whose exit code 1 is an answer, so that failing has another one."""


class Program(click.Group):
    """A group that imports its commands late, and that ends with an exit code whatever happens."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        module, _, attribute = COMMANDS[cmd_name][0].partition(":")
        command: click.Command = getattr(importlib.import_module(module), attribute)
        return command

    def shell_complete(self, ctx: click.Context, incomplete: str) -> list[CompletionItem]:
        """As a group does by importing every command for its help, but from the table."""
        commands = [CompletionItem(n, help=help_) for n, (_, help_) in COMMANDS.items() if n.startswith(incomplete)]
        return [*commands, *click.Command.shell_complete(self, ctx, incomplete)]

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        for purpose, commands in SECTIONS.items():
            with formatter.section(purpose):
                formatter.write_dl([(f"{name:<10}", help_) for name, (_, help_) in commands.items()])

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except SmcError as e:
            if ctx.params.get("debug"):
                traceback.print_exc()
            say.error(e)
            code = say.exit_code(e)
            ctx.exit(_failed(ctx) if code == say.FAILED and not isinstance(e, say.Reported) else code)
        except BrokenPipeError:
            # Whoever read us has seen enough. Python would complain once more when it flushes at exit.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            ctx.exit(0)
        except (click.exceptions.Exit, click.ClickException, click.Abort, KeyboardInterrupt):
            raise
        except Exception as e:  # noqa: BLE001 - the last place where it can be said in one line
            if ctx.params.get("debug"):
                traceback.print_exc()
            text = " ".join(str(e).split())[:500]
            say.finding(
                f"smc failed in a way that nobody foresaw: {type(e).__name__}: {text}",
                "run it again as `smc --debug …` and report what that prints",
            )
            ctx.exit(_failed(ctx))


def _failed(ctx: click.Context) -> int:
    return say.UNANSWERED if ctx.invoked_subcommand in ANSWERS else say.FAILED


@click.group(
    cls=Program,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    epilog=EPILOG,
)
@click.option("--debug", is_flag=True, envvar="SMC_DEBUG", help="Print the traceback of an error as well.")
def program(debug: bool) -> None:
    """SMC, the Service Mesh Controller.

    Start with `smc demo`; for real, with `smc init`, `smc serve`, `smc apply` and `smc proxy run`. Each command has a
    page with examples: `smc apply --help`.
    """
