"""What goes with a signed certificate: whom to trust, whom to ask, and how a proxy is reached."""

from __future__ import annotations

import asyncio

from smc.api.backends import Backends
from smc.certificates.authority import load_roots
from smc.errors import NotFound, Unavailable
from smc.mesh import Mesh
from smc.model import Name, Workload
from smc.v1 import smc_pb2 as pb

PATIENCE = 2.0
"""Seconds that a proxy's workload is waited for: it may have been applied a moment ago."""
_LOOK = 0.02


async def answer(backends: Backends, path: str, chain: str) -> pb.Credential:
    """The answer to Join and Renew.

    Raises:
        NotFound: a proxy of a workload that the mesh does not have.
        Unavailable: this replica has not read the mesh yet, or the store does not answer.
    """
    kind, _, name = path.partition("/")
    mesh, found = await _settled(backends, Name.parse(name) if kind == "proxy" else None)
    credential = pb.Credential(
        chain=chain,
        roots=await load_roots(backends.kv, backends.keys),
        trust_domain=backends.trust_domain,
        mesh=backends.keys.mesh_name,
        mesh_domain=mesh.config.mesh_domain,
    )
    for member in await backends.members():
        credential.xds_addresses.append(member.xds_address)
        credential.api_addresses.append(member.api_address)
    if found is not None:
        credential.address, credential.app_address = found.address, found.app_address
    return credential


async def check_workload(backends: Backends, name: Name) -> None:
    """Check that the mesh has the workload `name`.

    Raises:
        NotFound, Unavailable: as `answer`.
    """
    await _settled(backends, name)


async def _settled(backends: Backends, name: Name | None) -> tuple[Mesh, Workload | None]:
    """The Mesh, and the workload `name` in it."""
    deadline = asyncio.get_running_loop().time() + PATIENCE
    while True:
        mesh = backends.mesh()
        if mesh is not None and (name is None or name in mesh.proxies):
            return mesh, mesh.proxies[name].workload if name is not None else None
        if asyncio.get_running_loop().time() >= deadline:
            break
        await asyncio.sleep(_LOOK)
    if mesh is None:
        raise Unavailable("this replica has not read the mesh yet", hint="try again, or another replica")
    raise NotFound(
        f"there is no workload {name} in the mesh",
        hint="apply its Workload, or correct the name that the token was made for",
    )
