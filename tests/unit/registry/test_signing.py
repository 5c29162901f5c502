"""Signatures: the vectors of RFC 8032 and DSSE, and every way in which an envelope may be false."""

import base64
import copy
import os
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ec import SECP256R1, generate_private_key
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat
from hypothesis import given
from hypothesis import strategies as st

from luthier.core.errors import SignatureError
from luthier.registry.signing import key_id, make_key, pre_authentication, public_path, read_key, sign, trusted_keys, verify

KIND = "application/vnd.luthier.test+json"

# RFC 8032, section 7.1, test 2.
SECRET = bytes.fromhex("4ccd089b28ff96da9db6c346ec114e0f5b8a319f35aba624da8cf6ed4fb8a6fb")
PUBLIC = bytes.fromhex("3d4017c3e843895a92b70aa74d1b7ebc9c982ccf2ec4968cc0cd55f12af4660c")


def test_the_signed_bytes_are_those_of_the_dsse_document() -> None:
    signed = pre_authentication("http://example.com/HelloWorld", b"hello world")
    assert signed == b"DSSEv1 29 http://example.com/HelloWorld 11 hello world"


def test_keys_are_those_of_rfc_8032() -> None:
    key = Ed25519PrivateKey.from_private_bytes(SECRET)
    assert key.public_key().public_bytes(Encoding.Raw, PublicFormat.Raw) == PUBLIC
    envelope = sign(b"{}", KIND, key)
    signature = base64.b64decode(envelope["signatures"][0]["sig"])
    key.public_key().verify(signature, b"DSSEv1 33 " + KIND.encode() + b" 2 {}")


@given(st.binary(max_size=200), st.text(max_size=30))
def test_what_was_signed_is_what_is_read_back(payload: bytes, kind: str) -> None:
    key = Ed25519PrivateKey.from_private_bytes(SECRET)
    trusted = {key_id(key.public_key()): key.public_key()}
    signed = verify(sign(payload, kind, key), trusted)
    assert (signed.payload, signed.payload_type, signed.key_id) == (payload, kind, *trusted)


@pytest.mark.parametrize("part", ["payload", "payloadType", "sig"])
def test_a_changed_envelope_is_refused(part: str) -> None:
    key = Ed25519PrivateKey.from_private_bytes(SECRET)
    envelope = sign(b'{"manifest": "00"}', KIND, key)
    false = copy.deepcopy(envelope)
    if part == "payload":
        false["payload"] = base64.b64encode(b'{"manifest": "01"}').decode()
    elif part == "payloadType":
        false["payloadType"] = KIND.replace("test", "rest")
    else:
        signature = bytearray(base64.b64decode(false["signatures"][0]["sig"]))
        signature[5] ^= 1
        false["signatures"][0]["sig"] = base64.b64encode(signature).decode()
    trusted = {key_id(key.public_key()): key.public_key()}
    assert verify(envelope, trusted).payload == b'{"manifest": "00"}'
    with pytest.raises(SignatureError, match="does not fit"):
        verify(false, trusted)


def test_the_name_in_an_envelope_gives_no_trust() -> None:
    good, bad = Ed25519PrivateKey.from_private_bytes(SECRET), Ed25519PrivateKey.generate()
    trusted = {key_id(good.public_key()): good.public_key()}
    envelope = sign(b"{}", KIND, bad)
    with pytest.raises(SignatureError, match="not among the 1 trusted"):
        verify(envelope, trusted)
    envelope["signatures"][0]["keyid"] = next(iter(trusted))
    with pytest.raises(SignatureError, match="does not fit"):
        verify(envelope, trusted)
    del envelope["signatures"][0]["keyid"]
    with pytest.raises(SignatureError):
        verify(envelope, trusted)
    with pytest.raises(SignatureError, match="no key is trusted"):
        verify(envelope, {})


def test_one_trusted_signature_of_several_is_enough() -> None:
    good, other = Ed25519PrivateKey.from_private_bytes(SECRET), Ed25519PrivateKey.generate()
    envelope = sign(b"{}", KIND, other)
    envelope["signatures"] += sign(b"{}", KIND, good)["signatures"]
    assert verify(envelope, {key_id(good.public_key()): good.public_key()}).key_id == key_id(good.public_key())


@pytest.mark.parametrize(
    "envelope",
    [{}, {"payloadType": KIND, "payload": "", "signatures": []}, {"payloadType": KIND, "payload": "*", "signatures": [{}]}],
)
def test_what_is_no_envelope_is_said_to_be_none(envelope: dict[str, object]) -> None:
    with pytest.raises(SignatureError, match=r"no DSSE envelope|not base64"):
        verify(envelope, {})


def test_a_new_key_is_for_its_owner_only_and_never_overwritten(tmp_path: Path) -> None:
    path = tmp_path / "keys" / "release"
    name = make_key(path)
    assert path.stat().st_mode & 0o777 == 0o600
    assert trusted_keys(path.parent).keys() == {name}
    assert verify(sign(b"x", KIND, read_key(path)), trusted_keys(path.parent)).key_id == name
    before = path.read_bytes(), public_path(path).read_bytes()
    with pytest.raises(SignatureError, match="not overwriting"):
        make_key(path)
    assert (path.read_bytes(), public_path(path).read_bytes()) == before


def test_a_key_that_others_can_read_is_not_used(tmp_path: Path) -> None:
    make_key(tmp_path / "release")
    os.chmod(tmp_path / "release", 0o640)
    with pytest.raises(SignatureError, match="chmod 600"):
        read_key(tmp_path / "release")


def test_what_is_no_ed25519_key_is_refused(tmp_path: Path) -> None:
    other = generate_private_key(SECP256R1())
    path = tmp_path / "other"
    path.write_bytes(other.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    path.chmod(0o600)
    with pytest.raises(SignatureError, match="Ed25519"):
        read_key(path)
    with pytest.raises(SignatureError, match="cannot read"):
        read_key(tmp_path / "none")
    (tmp_path / "other.pub").write_text("nothing")
    with pytest.raises(SignatureError, match="no public key"):
        trusted_keys(tmp_path)
    assert trusted_keys(tmp_path / "no-such-folder") == {}
