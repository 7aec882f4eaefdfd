"""SMI manifests as the tests write them, and what they compile to."""

from __future__ import annotations

from dataclasses import replace
from textwrap import dedent, indent

from smc import smi
from smc.manifests import InvalidManifest, Manifest, Rules, read
from smc.model import Problem

NAMESPACE = "shop"


def manifest(text: str, *, created: float = 0.0, mod_revision: int = 1) -> Manifest:
    """One manifest, in the namespace `shop` unless it says another."""
    text = dedent(text)
    if "namespace:" not in text.split("metadata:")[1].splitlines()[0]:
        text = text.replace("metadata: {", f"metadata: {{namespace: {NAMESPACE}, ", 1)
    record = read(text, smi.KINDS, file="policy.yaml")
    return Manifest(replace(record, created=created), mod_revision)


def compiled(*manifests: Manifest) -> Rules:
    return smi.compile(NAMESPACE, manifests)


def refused(text: str) -> str:
    """Why a manifest is refused, without the places: one line a finding, `field: reason (hint)`."""
    try:
        manifest(text)
    except InvalidManifest as e:
        return "\n".join(f"{f.field}: {f.reason}" + (f" ({f.hint})" if f.hint else "") for f in e.findings)
    raise AssertionError("it was not refused")


def reasons(rules: Rules) -> list[tuple[str, str]]:
    """(name of the manifest, reason) of every Problem."""
    return [(problem.manifest.rpartition("/")[-1], problem.reason) for problem in rules.problems]


def problem(rules: Rules) -> Problem:
    (only,) = rules.problems
    return only


def split(
    service: str = "store",
    backends: str = "[{service: store-v1, weight: 1}]",
    *,
    name: str = "store",
    version: str = "v1alpha4",
    more: str = "",
    created: float = 0.0,
    mod_revision: int = 1,
) -> Manifest:
    return manifest(
        split_text(service, backends, name=name, version=version, more=more),
        created=created,
        mod_revision=mod_revision,
    )


def split_text(
    service: str = "store",
    backends: str = "[{service: store-v1, weight: 1}]",
    *,
    name: str = "store",
    version: str = "v1alpha4",
    more: str = "",
) -> str:
    return f"""\
apiVersion: split.smi-spec.io/{version}
kind: TrafficSplit
metadata: {{name: {name}}}
spec:
  service: {service}
  backends: {backends}
{indent(more, "  ")}"""


def target(
    rules: str = "[{kind: HTTPRouteGroup, name: routes}]",
    *,
    name: str = "buyers",
    destination: str = "{kind: ServiceAccount, name: store}",
    sources: str = "[{kind: ServiceAccount, name: buyer, namespace: buyers}]",
    namespace: str = NAMESPACE,
    version: str = "v1alpha3",
) -> str:
    first = version == "v1alpha1"
    fields = f"destination: {destination}\n{'specs' if first else 'rules'}: {rules}\nsources: {sources}\n"
    return f"""\
apiVersion: access.smi-spec.io/{version}
kind: TrafficTarget
metadata: {{name: {name}, namespace: {namespace}}}
{fields if first else "spec:" + chr(10) + indent(fields, "  ")}"""


def ports(*numbers: int, kind: str = "TCPRoute", name: str = "ports") -> str:
    return f"""\
apiVersion: specs.smi-spec.io/v1alpha4
kind: {kind}
metadata: {{name: {name}}}
spec: {{matches: {{ports: [{", ".join(map(str, numbers))}]}}}}
"""


def group(
    matches: str = "[{name: all, pathRegex: /.*, methods: ['*']}]", *, name: str = "routes", version: str = "v1alpha4"
) -> str:
    spec = f"matches: {matches}\n"
    if version > "v1alpha2":
        spec = f"spec:\n  {spec}"
    return f"""\
apiVersion: specs.smi-spec.io/{version}
kind: HTTPRouteGroup
metadata: {{name: {name}}}
{spec}"""
