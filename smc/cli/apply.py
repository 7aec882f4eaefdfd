"""`smc apply` and `smc delete -f`: every document on its own, so that one bad one holds up no other."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import click

from smc.cli import say, tracing
from smc.cli.completion import complete_kind, complete_name
from smc.cli.documents import Document, read_all
from smc.cli.kinds import identify, namespace_of, resolve, split_name
from smc.cli.pages import examples
from smc.cli.say import LAGGING
from smc.cli.session import F, InvalidDocument, Session, connected
from smc.cli.waiting import Waits, wait, wait_option
from smc.errors import Denied, Expired, SmcError, Unauthenticated, Unavailable

if TYPE_CHECKING:
    from smc.manifests import Kind

HOPELESS = (Denied, Unauthenticated, Expired, Unavailable)
"""What would happen to every other document as well."""


def file_options(f: F) -> F:
    """-f and -n, as every command has them that reads manifests."""
    namespace = click.option(
        "-n", "--namespace", default="", help="The namespace of what names none. Default: default."
    )
    files = click.option(
        "-f",
        "--filename",
        "files",
        multiple=True,
        metavar="FILE|DIR|-",
        help="Manifests, YAML or JSON; may be repeated.",
    )
    return files(namespace(f))


@click.command(
    cls=Waits,
    epilog=examples(
        "smc apply -f shop.yaml",
        "smc apply -f shop/ -f policy/ -n shop --wait",
        "kustomize build . | smc apply -f - --wait=2m",
        exits={LAGGING: "it is written, and after the time some proxies lack it, or have refused it"},
    ),
)
@file_options
@wait_option
@click.option("--dry-run", is_flag=True, help="Let the control plane check everything, and write nothing.")
@click.option(
    "--resource-version", type=click.IntRange(min=1), default=None, help="Only over this version; one manifest."
)
@connected
def apply(
    session: Session,
    files: tuple[str, ...],
    namespace: str,
    patience: float | None,
    dry_run: bool,
    resource_version: int | None,
) -> None:
    """Create or change manifests.

    Every document is applied on its own, in the order given. All findings of all documents are printed, and the exit
    code is 1 if any was refused. A refused one changes nothing: what was live before stays live.

    What is applied is in etcd when this returns, and reaches the proxies within moments. With --wait it returns once
    every connected proxy has ACKed it, whichever replica serves it, also while replicas die. The exit code is 6 if some
    have not after TIMEOUT (default 30s), or have refused it: they are named, and why. What is written stays written.
    A proxy that is connected to no replica for 3 s is told, and not waited for. If a document was refused, nothing is.
    """
    from smc.v1 import smc_pb2 as pb

    documents = read_all(files)
    if resource_version is not None and len(documents) != 1:
        raise click.UsageError(f"--resource-version is for one manifest, and {len(documents)} were given")
    if dry_run and patience is not None:
        raise click.UsageError("a dry run writes nothing that could be waited for: leave out --wait or --dry-run")
    suffix = " (dry run)" if dry_run else ""
    tally = _Tally()
    versions: list[int] = []
    with tracing.span("smc apply") as metadata:
        for document in documents:
            with tally.attempt(document):
                request = pb.ApplyRequest(
                    document=document.text,
                    file=document.file,
                    line=document.line,
                    resource_version=resource_version or 0,
                    dry_run=dry_run,
                    namespace=namespace,
                )
                response = session.call("Apply", request, metadata=metadata)
                versions.append(response.object.resource_version)
                outcome = pb.ApplyResponse.Outcome.Name(response.outcome).lower()
                say.out(f"{_named(response.object)} {outcome}{suffix}")
                for problem in response.object.problems:
                    if problem.reason == "NotBuiltYet":
                        continue  # Nothing is known yet: that is no news.
                    at = f"{document.file}:{response.object.line}"
                    say.warning(f"{at}: {problem.field + ': ' if problem.field else ''}{problem.message}")
    tally.finish()
    if patience is not None:
        wait(session, versions, patience)


@click.command(
    cls=Waits,
    epilog=examples(
        "smc delete trafficsplit bookstore -n shop",
        "smc delete -f shop.yaml --wait",
        exits={LAGGING: "it is written, and after the time some proxies still go by it"},
    ),
)
@click.argument("kind", required=False, shell_complete=complete_kind)
@click.argument("name", required=False, shell_complete=complete_name)
@file_options
@wait_option
@click.option("--resource-version", type=click.IntRange(min=1), default=None, help="Only this version.")
@connected
def delete(
    session: Session,
    kind: str | None,
    name: str | None,
    files: tuple[str, ...],
    namespace: str,
    patience: float | None,
    resource_version: int | None,
) -> None:
    """Delete one manifest by KIND and NAME, or all that are in files.

    With --wait it returns once every connected proxy goes without it, as `smc apply --wait` does.
    """
    from smc.v1 import smc_pb2 as pb

    if bool(kind) == bool(files):
        raise click.UsageError("name a KIND and a NAME, or files by -f")

    versions: list[int] = []

    def remove(known: Kind, of_namespace: str, called: str) -> None:
        request = pb.DeleteRequest(
            group=known.group,
            kind=known.name,
            namespace=namespace_of(known, of_namespace),
            name=called,
            resource_version=resource_version or 0,
        )
        versions.append(session.call("Delete", request).resource_version)
        say.out(f"{known.name.lower()}/{called} deleted")

    if kind:
        kind, name = split_name(kind, name)
        if not name:
            raise click.UsageError("NAME is missing: everything of a kind is never deleted at once")
        remove(resolve(kind), namespace, name)
    else:
        tally = _Tally()
        for document in read_all(files):
            with tally.attempt(document):
                found, of_namespace, called = identify(document)
                remove(found, of_namespace or namespace, called)
        tally.finish()
    if patience is not None:
        wait(session, versions, patience)


def say_findings(error: InvalidDocument) -> None:
    """Each at its place."""
    for f in error.findings:
        place = ":".join(str(part) for part in (f.file, f.line, f.column) if part)
        say.finding(f"{place}: {f.field + ': ' if f.field else ''}{f.message}", f.hint)
    if error.more:
        say.finding(f"and {error.more} more")


def _named(object_: Any) -> str:
    return f"{object_.kind.lower()}/{object_.name}"


class _Tally:
    """Goes on after a document that fails, and fails at the end."""

    def __init__(self) -> None:
        self._failed = False

    @contextmanager
    def attempt(self, document: Document) -> Iterator[None]:
        try:
            yield
        except SmcError as e:
            self._failed = True
            self._say(document, e)
            if isinstance(e, HOPELESS):
                raise say.Reported(say.exit_code(e)) from None

    def finish(self) -> None:
        if self._failed:
            raise say.Reported

    @staticmethod
    def _say(document: Document, error: SmcError) -> None:
        if isinstance(error, InvalidDocument):
            say_findings(error)
        else:
            where = f"{document.file}:{document.line}: "
            say.error(error, where="" if error.message.startswith(f"{document.file}:") else where)
