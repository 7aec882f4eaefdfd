"""`Join`: a token and a public key in, a credential out."""

from __future__ import annotations

from dataclasses import dataclass

from smc.api.backends import Backends
from smc.api.credentials import answer
from smc.certificates import tokens, x509
from smc.certificates.tokens import Token
from smc.v1 import smc_pb2 as pb


@dataclass(frozen=True, slots=True)
class JoinService:
    backends: Backends

    async def join(self, request: pb.JoinRequest, peer: str) -> pb.Credential:
        """Whoever holds the token is who it says; the same key may ask again until the token expires."""
        b = self.backends
        token = Token.parse(request.token)
        key = x509.requested_key(request.csr)
        path, chain = await tokens.redeem(b.kv, b.keys, b.keyring, token, key, now=b.now())
        return await answer(b, path, chain)
