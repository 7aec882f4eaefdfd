"""Policy manifests compiled to Rules, one namespace of one policy API at a time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from smc.manifests import PolicyApi, Rules
from smc.manifests.own import GROUP
from smc.mesh.problems import Problems
from smc.mesh.reading import Records
from smc.mesh.tables import Index, Table, Tables
from smc.model import Problem

Scope = tuple[int, str]
"""(which of the policy APIs, namespace): what is compiled together."""


@dataclass(slots=True)
class Compiled(Tables):
    members: Index[Scope, str] = field(default_factory=Index)
    """scope -> its manifests"""
    rules: Table[Scope, Rules] = field(default_factory=Table)

    def update(self, records: Records, policies: Sequence[PolicyApi], problems: Problems) -> None:
        options = records.config.policy
        scopes: dict[Scope, None] = {}
        if records.had_other_options:
            scopes.update(dict.fromkeys(sorted(self.rules.rows)))
        for id_ in records.manifests.changed:
            group, _, namespace, _ = id_.split("/")
            there = id_ in records.manifests
            reader = next((index for index, api in enumerate(policies) if group in api.groups), None)
            if reader is not None:
                scope = (reader, namespace)
                if there:
                    self.members.add(scope, id_)
                else:
                    self.members.discard(scope, id_)
                scopes[scope] = None
            if group != GROUP:
                problems.report("group", id_, [_unknown(id_, group)] if there and reader is None else ())
        for scope in scopes:
            index, namespace = scope
            manifests = [records.manifests[id_] for id_ in sorted(self.members.of(scope))]
            rules = policies[index].compile(namespace, manifests, options) if manifests else Rules()
            problems.report("rules", scope, rules.problems)
            self.rules.put(scope, rules if manifests else None)


def _unknown(id_: str, group: str) -> Problem:
    return Problem(id_, "UnknownGroup", f"no policy API of this version reads {group}: the manifest has no effect")
