"""What every signer must do, whatever holds its keys; a new one inherits the class."""

from __future__ import annotations

import asyncio
from abc import abstractmethod
from pathlib import Path

import pytest
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec

from smc.certificates import making, x509
from smc.certificates.authority import sign
from smc.certificates.signers import Signer
from smc.certificates.signers.local import LocalSigner
from smc.errors import Conflict, Invalid, NotFound
from tests.unit.certificates.authority import NOW, serial


class SignerContract:
    @pytest.fixture
    @abstractmethod
    def signer(self, tmp_path: Path) -> Signer:
        """A signer with keys of its own."""

    @pytest.fixture
    @abstractmethod
    def same(self, signer: Signer, tmp_path: Path) -> Signer:
        """Another instance on the same keys, as another replica has it."""

    @pytest.fixture
    @abstractmethod
    def other(self, tmp_path: Path) -> Signer:
        """A signer of the same kind with other keys."""

    async def test_a_signature_verifies_under_the_public_key(self, signer: Signer) -> None:
        handle = await signer.new_key()
        public = await signer.public_key(handle)
        assert public.curve.name == "secp256r1"
        public.verify(await signer.sign(handle, b"data"), b"data", ec.ECDSA(hashes.SHA256()))
        with pytest.raises(InvalidSignature):
            public.verify(await signer.sign(handle, b"data"), b"other", ec.ECDSA(hashes.SHA256()))

    async def test_each_new_key_is_another_one(self, signer: Signer) -> None:
        keys = [await signer.public_key(await signer.new_key()) for _ in range(3)]
        assert len({x509.fingerprint(key) for key in keys}) == 3

    async def test_a_handle_means_the_same_key_to_every_replica(self, signer: Signer, same: Signer) -> None:
        handle = await signer.new_key()
        assert await same.public_key(handle) == await signer.public_key(handle)
        (await signer.public_key(handle)).verify(await same.sign(handle, b"d"), b"d", ec.ECDSA(hashes.SHA256()))

    async def test_it_signs_a_certificate(self, signer: Signer) -> None:
        handle = await signer.new_key()
        unsigned = making.root(await signer.public_key(handle), "mesh.example", number=1, serial=serial(), now=NOW)
        root = await sign(unsigned, signer, handle, None)
        root.verify_directly_issued_by(root)

    async def test_what_was_wrapped_is_unwrapped_by_every_replica(self, signer: Signer, same: Signer) -> None:
        secret = b"k" * 32
        wrapped = await signer.wrap(secret)
        assert secret not in wrapped
        assert await same.unwrap(wrapped) == secret
        assert same.name == signer.name

    async def test_what_was_altered_is_not_unwrapped(self, signer: Signer) -> None:
        wrapped = await signer.wrap(b"k" * 32)
        for bad in (b"", wrapped[:-1], wrapped[:-1] + bytes([wrapped[-1] ^ 1]), b"\xff" + wrapped[1:]):
            with pytest.raises(Invalid):
                await signer.unwrap(bad)

    async def test_another_signer_does_not_unwrap_it(self, signer: Signer, other: Signer) -> None:
        with pytest.raises(Invalid):
            await other.unwrap(await signer.wrap(b"k" * 32))

    async def test_a_handle_that_is_none_is_refused(self, signer: Signer) -> None:
        for call in (signer.public_key(b"nonsense"), signer.sign(b"nonsense", b"data")):
            with pytest.raises(Invalid):
                await call

    async def test_it_serves_many_at_once(self, signer: Signer) -> None:
        handle = await signer.new_key()
        public = await signer.public_key(handle)
        data = [str(n).encode() for n in range(50)]
        for each, signature in zip(data, await asyncio.gather(*(signer.sign(handle, d) for d in data)), strict=True):
            public.verify(signature, each, ec.ECDSA(hashes.SHA256()))

    async def test_its_text_holds_no_secret(self, signer: Signer) -> None:
        assert "b'" not in repr(signer)
        with pytest.raises(Invalid) as refused:
            await signer.sign(b"a secret handle", b"data")
        assert "secret handle" not in str(refused.value)


class TestLocalSigner(SignerContract):
    @pytest.fixture
    def signer(self, tmp_path: Path) -> Signer:
        return LocalSigner.create(tmp_path / "kek")

    @pytest.fixture
    def same(self, signer: Signer, tmp_path: Path) -> Signer:
        return LocalSigner.open(tmp_path / "kek")

    @pytest.fixture
    def other(self, tmp_path: Path) -> Signer:
        return LocalSigner.create(tmp_path / "other")

    def test_its_file_is_for_its_owner_alone(self, signer: Signer, tmp_path: Path) -> None:
        assert (tmp_path / "kek").stat().st_mode & 0o777 == 0o600

    @pytest.mark.parametrize("mode", [0o640, 0o604, 0o644, 0o620, 0o610, 0o777])
    def test_a_file_that_others_may_use_is_refused(self, signer: Signer, tmp_path: Path, mode: int) -> None:
        (tmp_path / "kek").chmod(mode)
        with pytest.raises(Invalid, match=f"mode {mode:04o}.*chmod 600"):
            LocalSigner.open(tmp_path / "kek")

    def test_a_key_is_never_overwritten(self, signer: Signer, tmp_path: Path) -> None:
        before = (tmp_path / "kek").read_bytes()
        with pytest.raises(Conflict):
            LocalSigner.create(tmp_path / "kek")
        assert (tmp_path / "kek").read_bytes() == before

    def test_a_missing_file_says_where_it_comes_from(self, tmp_path: Path) -> None:
        with pytest.raises(NotFound, match="smc init"):
            LocalSigner.open(tmp_path / "nowhere")

    @pytest.mark.parametrize("text", [b"", b"garbage", b"smc-key-encryption-key-1:c2hvcnQ=\n", b"A" * 44])
    def test_a_file_that_holds_no_key_is_refused_and_not_repeated(self, tmp_path: Path, text: bytes) -> None:
        path = tmp_path / "kek"
        path.write_bytes(text)
        path.chmod(0o600)
        with pytest.raises(Invalid, match="is no key-encryption key") as refused:
            LocalSigner.open(path)
        assert not text or text.decode().strip() not in str(refused.value)
