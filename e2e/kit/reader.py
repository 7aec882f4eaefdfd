"""Somebody who reads a document and types what it says, block by block.

Addresses alone are put in the place of others: those that are kept for documentation (192.0.2.x) and those of loopback
(127.0.x.y) each become one of this run's own, and are turned back in what is printed.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Protocol

from e2e.kit.namespaces import Host
from smc.demo.processes import Children, Process
from tests.documentation import blocks

DOCUMENTATION = re.compile(r"\b(?:192\.0\.2|127\.0\.\d+)\.\d+\b")
_SET = re.compile(r"(?:export )?\w+=\S*")
_ANY = "…"


def differs(printed: str, expected: str) -> str:
    """The first line that was printed otherwise than expected; "" if there is none.

    How much white space stands between words does not matter. "…" is any text within a line, and a line of it alone
    any number of lines.
    """
    got = [" ".join(line.split()) for line in printed.splitlines()]
    wanted = [" ".join(line.split()) for line in expected.splitlines()]
    anywhere = False
    for want in [line for line in wanted if line]:
        if want == _ANY:
            anywhere = True
            continue
        pattern = re.compile(".*?".join(re.escape(part) for part in want.split(_ANY)))
        while got and (not got[0] or (anywhere and not pattern.fullmatch(got[0]))):
            got.pop(0)
        if not got:
            return f"not printed: {want}"
        if not pattern.fullmatch(got[0]):
            return f"printed: {got[0]}\nexpected: {want}"
        got.pop(0)
        anywhere = False
    left = [line for line in got if line]
    return f"printed as well: {left[0]}" if left and not anywhere else ""


class Places(Protocol):
    def take(self) -> str:
        """An address of this machine that nobody else uses."""
        ...


class Reader:
    """Types in a directory of their own, at machines that are all this one, but for `hosts`."""

    def __init__(
        self,
        children: Children,
        places: Places,
        home: Path,
        *,
        hosts: Mapping[str, Host] | None = None,
        programs: Sequence[Path] = (Path(sys.prefix, "bin"),),
    ) -> None:
        """Begin in `home`, an empty directory.

        Args:
            hosts: machines of their own, by their addresses in the document. Each has a loopback of its own too.
            programs: directories of programs that the reader has beside the system's, SMC's own among them.
        """
        self._children = children
        self._places = places
        self._here: dict[str, str] = {}
        self._set: list[str] = []
        self.home = home
        path = ":".join([*map(str, programs), "/usr/bin", "/bin", "/usr/sbin", "/sbin"])
        self._environment = {"PATH": path, "HOME": str(home), "NO_COLOR": "1"}
        self.hosts = dict(hosts or {})
        self.typed: list[str] = []
        self.background: list[Process] = []

    def at(self, address: str) -> str:
        """Where an address of the document is here."""
        if address in self.hosts:
            return self.hosts[address].address
        if self.hosts and address == "127.0.0.1":
            return address
        if address not in self._here:
            self._here[address] = self._places.take()
        return self._here[address]

    def here(self, text: str) -> str:
        return DOCUMENTATION.sub(lambda found: self.at(found[0]), text)

    def as_documented(self, text: str) -> str:
        """What is printed, with the addresses of the document."""
        known = {here: there for there, here in self._here.items()}
        known |= {host.address: there for there, host in self.hosts.items()}
        return re.sub(r"\d+\.\d+\.\d+\.\d+", lambda found: known.get(found[0], found[0]), text)

    def _shell(self, line: str, machine: str = "") -> list[str]:
        script = "; ".join([f"cd {self.home}", *self._set, self.here(line)])
        argv = ["/bin/bash", "-c", script]
        return self.hosts[machine].command(*argv) if machine else argv

    async def type(self, line: str) -> str:
        """Returns what it prints; it must succeed."""
        self.typed.append(line)
        return await self.try_out(line)

    async def try_out(self, line: str, machine: str = "") -> str:
        """The same for what the document does not say."""
        argv = self._shell(line, machine)
        return await self._children.run(line, argv, env=self._environment, timeout=60)

    async def leave_running(self, line: str, machine: str = "") -> Process:
        """In a terminal of its own."""
        self.typed.append(line)
        name = f"terminal-{len(self.background)}"
        argv = self._shell(f"exec {line}", machine)
        process = self._children.process(name, argv, role=name, env=self._environment)
        self.background.append(process)
        await process.start()
        return process

    async def read(self, document: Path) -> None:
        """Type every block of commands, keep every manifest under its name, and see that what is printed is as said.

        A command that ends in `&` is left running, `$!` is its process, and what is set stays set.

        Raises:
            AssertionError: something else was printed.
            ProcessFailed: a command failed.
        """
        printed = ""
        for block in blocks(document):
            if block.kind == "sh":
                printed = "".join([await self._type(line, block.machine) for line in block.commands])
            elif block.kind == "yaml" and block.file:
                (self.home / block.file).write_text(self.here(block.text))
            elif block.kind == "text":
                wrong = differs(self.as_documented(printed), block.text)
                assert not wrong, f"{document.name}:{block.line}: {wrong}\nof:\n{self.as_documented(printed)}"

    async def _type(self, line: str, machine: str) -> str:
        if line.endswith(" &"):
            await self.leave_running(line.removesuffix(" &"), machine)
            return ""
        if _SET.fullmatch(line):
            self._set.append(line.replace("$!", str(self.background[-1].pid) if self.background else ""))
            return ""
        self.typed.append(line)
        return await self.try_out(f"exec 2>&1; {line}", machine)
