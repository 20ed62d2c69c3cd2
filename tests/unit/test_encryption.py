"""The encrypting codec: what it stores, what it refuses, and that it never shows a key."""

import base64
import dataclasses
import os
import subprocess
import sys

import pytest
from temporalio.api.common.v1 import Payload
from temporalio.api.failure.v1 import Failure
from temporalio.converter import DataConverter

from temporal_async_task import ConfigError, DecryptionError
from temporal_async_task.encryption import KEYS_VARIABLE, AESGCMCodec, encrypted_data_converter, generate_key

CANARY = "canary-7f3a"
PLAIN = Payload(metadata={"encoding": b"json/plain", "note": CANARY.encode()}, data=CANARY.encode())
KEYS = {"old": generate_key(), "new": generate_key()}


async def encrypt(codec: AESGCMCodec, payload: Payload = PLAIN) -> Payload:
    [encrypted] = await codec.encode([payload])
    return encrypted


async def test_a_payload_comes_back_with_its_metadata_and_shows_only_its_keys_id():
    codec = AESGCMCodec({"2026-11": generate_key()})
    encrypted = await encrypt(codec)
    assert await codec.decode([encrypted]) == [PLAIN]
    assert CANARY.encode() not in encrypted.SerializeToString()
    assert dict(encrypted.metadata) == {
        "encoding": b"binary/encrypted",
        "encryption-cipher": b"AES-256-GCM/HKDF-SHA256",
        "encryption-key-id": b"2026-11",
    }


async def test_the_same_value_is_never_stored_the_same_way_twice():
    codec = AESGCMCodec(KEYS, active="new")
    stored = {(await encrypt(codec)).data for _ in range(1000)}
    assert len(stored) == 1000
    assert len({data[:28] for data in stored}) == 1000  # salt and nonce


async def test_each_key_decrypts_and_the_active_one_encrypts():
    before = await encrypt(AESGCMCodec({"old": KEYS["old"]}))
    both = AESGCMCodec(KEYS, active="new")
    after = await encrypt(both)
    assert after.metadata["encryption-key-id"] == b"new"
    assert await both.decode([before, after]) == [PLAIN, PLAIN]


async def test_a_payload_of_a_key_that_is_not_known_is_refused_by_its_name():
    encrypted = await encrypt(AESGCMCodec({"old": KEYS["old"]}))
    with pytest.raises(DecryptionError, match="the key 'old', which is not known here; known are 'new'"):
        await AESGCMCodec({"new": KEYS["new"]}).decode([encrypted])


async def test_another_key_of_the_same_name_is_told():
    encrypted = await encrypt(AESGCMCodec({"key": KEYS["old"]}))
    with pytest.raises(DecryptionError, match="another key that is named 'key'"):
        await AESGCMCodec({"key": KEYS["new"]}).decode([encrypted])


async def test_a_payload_that_was_changed_anywhere_is_refused():
    codec = AESGCMCodec(KEYS, active="new")
    encrypted = await encrypt(codec)
    for place in range(len(encrypted.data)):
        changed = bytearray(encrypted.data)
        changed[place] ^= 1
        with pytest.raises(DecryptionError, match="is damaged"):
            await codec.decode([Payload(metadata=encrypted.metadata, data=bytes(changed))])
    for length in range(len(encrypted.data)):
        with pytest.raises(DecryptionError, match=r"is damaged|is cut off"):
            await codec.decode([Payload(metadata=encrypted.metadata, data=encrypted.data[:length])])


async def test_a_payload_under_the_name_of_another_key_is_refused():
    codec = AESGCMCodec({"a": KEYS["new"], "b": KEYS["new"]}, active="a")
    encrypted = await encrypt(codec)
    encrypted.metadata["encryption-key-id"] = b"b"
    with pytest.raises(DecryptionError):
        await codec.decode([encrypted])


async def test_what_is_not_encrypted_or_by_another_codec_is_refused():
    codec = AESGCMCodec(KEYS, active="new")
    with pytest.raises(DecryptionError, match=r"not encrypted.*accept_unencrypted=True"):
        await codec.decode([PLAIN])
    other = Payload(metadata={"encoding": b"binary/encrypted", "encryption-key-id": b"new"}, data=b"x" * 100)
    with pytest.raises(DecryptionError, match="another codec"):
        await codec.decode([other])
    assert await AESGCMCodec(KEYS, active="new", accept_unencrypted=True).decode([PLAIN]) == [PLAIN]


async def test_keys_may_be_bytes_or_base64_of_either_alphabet():
    key = b"\xfb\xff" * 16  # of which base64 has - and _, or + and /
    encrypted = await encrypt(AESGCMCodec({"key": key}))
    for text in (base64.b64encode(key).decode(), base64.urlsafe_b64encode(key).decode(), bytearray(key)):
        assert await AESGCMCodec({"key": text}).decode([encrypted]) == [PLAIN]


@pytest.mark.parametrize(
    ("keys", "active", "says"),
    [
        ({}, None, "at least one key"),
        ({"a": b"x" * 16}, None, "The key 'a' has 16 bytes; AES-256 takes 32"),
        ({"a": base64.b64encode(b"x" * 31).decode()}, None, "The key 'a' has 31 bytes"),
        ({"a": "not base64!"}, None, "The key 'a' is not base64"),
        (KEYS, None, "Which of the keys 'old', 'new' is to encrypt"),
        (KEYS, "newer", "active key 'newer' is not among the keys: 'old', 'new'"),
        ({"a b": b"x" * 32}, None, "key id 'a b' must be"),
        ({"": b"x" * 32}, None, "key id '' must be"),
        ({"a" * 65: b"x" * 32}, None, "key id of 65 characters must be"),
    ],
)
def test_keys_that_cannot_be_used_are_refused_with_the_reason(keys, active, says):
    with pytest.raises(ConfigError, match=says):
        AESGCMCodec(keys, active=active)


async def test_the_environment_holds_the_keys_and_the_first_encrypts(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv(KEYS_VARIABLE, f"new:{KEYS['new']} old:{KEYS['old']}")
    codec = AESGCMCodec.from_env()
    assert repr(codec) == "AESGCMCodec(keys='new', 'old', active='new')"
    before = await encrypt(AESGCMCodec({"old": KEYS["old"]}))
    assert await codec.decode([before]) == [PLAIN]
    comma = AESGCMCodec.from_env("OTHER", env={"OTHER": f"new:{KEYS['new']},old:{KEYS['old']}"})
    assert repr(comma) == repr(codec)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "ASYNC_TASK_ENCRYPTION_KEYS is not set"),
        (KEYS["new"], r"Entry 1 of ASYNC_TASK_ENCRYPTION_KEYS has no ':'"),
        (f"a:{KEYS['new']} a:{KEYS['old']}", "names the key 'a' twice"),
        ("a:short", "The key 'a' (is not base64|has 3 bytes)"),
    ],
    ids=["not set", "no colon", "twice", "no key"],  # the keys are made anew by each process
)
def test_an_environment_that_cannot_be_used_is_refused_without_showing_a_key(text, says):
    with pytest.raises(ConfigError, match=says) as refused:
        AESGCMCodec.from_env(env={KEYS_VARIABLE: text})
    assert not [key for key in KEYS.values() if key in str(refused.value)]


def test_no_key_is_shown_by_the_codec_or_its_converter():
    converter = encrypted_data_converter(AESGCMCodec(KEYS, active="new"))
    for shown in (repr(converter), str(converter.payload_codec)):
        assert not [key for key in KEYS.values() if key in shown]
        assert not [key for key in KEYS.values() if repr(base64.b64decode(key)) in shown]


async def test_the_converter_encrypts_values_and_what_failures_say():
    converter = encrypted_data_converter(AESGCMCodec(KEYS, active="new"))
    [payload] = await converter.encode([{"prompt": CANARY}])
    assert CANARY.encode() not in payload.SerializeToString()
    assert await converter.decode([payload]) == [{"prompt": CANARY}]
    failure = Failure()
    await converter.encode_failure(ValueError(CANARY), failure)
    assert CANARY.encode() not in failure.SerializeToString()
    assert str(await converter.decode_failure(failure)).endswith(CANARY)


def test_the_converter_keeps_what_the_application_has_chosen():
    class Own(DataConverter.default.payload_converter_class):  # type: ignore[misc,name-defined]
        pass

    own = dataclasses.replace(DataConverter.default, payload_converter_class=Own)
    assert encrypted_data_converter(AESGCMCodec(KEYS, active="new"), converter=own).payload_converter_class is Own


def test_without_the_extra_it_says_how_to_install_it_and_the_library_works():
    code = (
        "import sys; sys.modules['cryptography'] = None\n"
        "import temporal_async_task\n"
        "try:\n    import temporal_async_task.encryption\n"
        "except ImportError as error:\n    print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], env=os.environ, capture_output=True, text=True, check=True)
    assert "pip install 'temporal-async-task[encryption]'" in done.stdout
