"""How callers spell a service's name."""

from __future__ import annotations

from smc.model import Name


def hosts(service: Name, mesh_domain: str, *, same_namespace: bool) -> tuple[str, ...]:
    """The host names that a service answers to, the most specific first, none twice."""
    name, namespace = service.name.lower(), service.namespace.lower()
    found = [
        f"{name}.{namespace}.{mesh_domain.strip('.').lower()}",
        f"{name}.{namespace}.svc.cluster.local",
        f"{name}.{namespace}.svc",
        f"{name}.{namespace}",
    ]
    if same_namespace:
        found.append(name)
    return tuple(dict.fromkeys(found))
