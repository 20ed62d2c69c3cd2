"""The folder of large values: whole files, none outside of it, and clear words when one is gone."""

import asyncio
import os
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest
from temporalio.api.common.v1 import Payload
from temporalio.converter import StorageDriverClaim, StorageDriverRetrieveContext, StorageDriverStoreContext

from temporal_async_task import ConfigError, PayloadTooLargeError, StorageError, StoredValueLostError
from temporal_async_task.storage import FolderStorageDriver


def payload(data: bytes = b"x" * 1000) -> Payload:
    return Payload(metadata={"encoding": b"binary/plain"}, data=data)


async def store(driver: FolderStorageDriver, *payloads: Payload) -> list[StorageDriverClaim]:
    return await driver.store(StorageDriverStoreContext(), payloads)


async def retrieve(driver: FolderStorageDriver, *claims: StorageDriverClaim) -> list[Payload]:
    return await driver.retrieve(StorageDriverRetrieveContext(), claims)


def files(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file()]


async def test_values_come_back_in_order_and_by_another_driver_of_the_same_folder(tmp_path: Path):
    values = [payload(os.urandom(size)) for size in (0, 1, 100_000)]
    claims = await store(FolderStorageDriver(tmp_path), *values)
    assert await retrieve(FolderStorageDriver(tmp_path), *reversed(claims)) == values[::-1]


async def test_the_same_value_is_stored_once_and_counts_as_new(tmp_path: Path):
    driver = FolderStorageDriver(tmp_path)
    [first] = await store(driver, payload())
    [file] = files(tmp_path)
    os.utime(file, (0, 0))
    [second] = await store(driver, payload())
    assert (first, files(tmp_path)) == (second, [file])
    assert file.stat().st_mtime > 0  # who deletes by age leaves it


async def test_only_the_owner_reads_unless_it_is_shared(tmp_path: Path):
    await store(FolderStorageDriver(tmp_path), payload())
    [file] = files(tmp_path)
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    shared = tmp_path / "shared"
    shared.mkdir()
    await store(FolderStorageDriver(shared, mode=0o660), payload())
    [file] = files(shared)
    assert (stat.S_IMODE(file.stat().st_mode), stat.S_IMODE(file.parent.stat().st_mode)) == (0o660, 0o770)


@pytest.mark.parametrize(
    "digest",
    ["", "..", "../../etc/passwd", "/etc/passwd", "a" * 63, "A" * 64, "a" * 64 + "\n", "aa/" + "a" * 61, "\0" * 64],
)
async def test_a_reference_that_is_no_digest_reads_no_file(tmp_path: Path, digest: str):
    with pytest.raises(StoredValueLostError, match="names no digest"):
        await retrieve(FolderStorageDriver(tmp_path), StorageDriverClaim({"sha256": digest}))
    with pytest.raises(StoredValueLostError, match="names no digest"):
        await retrieve(FolderStorageDriver(tmp_path), StorageDriverClaim({"path": "/etc/passwd"}))


async def test_a_file_that_is_gone_or_damaged_is_told_by_its_path(tmp_path: Path):
    driver = FolderStorageDriver(tmp_path)
    [claim] = await store(driver, payload())
    [file] = files(tmp_path)
    file.write_bytes(file.read_bytes()[:-1] + b"y")
    with pytest.raises(StoredValueLostError, match=f"{file}' is damaged"):
        await retrieve(driver, claim)
    file.unlink()
    with pytest.raises(StoredValueLostError, match=f"{file}' was deleted"):
        await retrieve(driver, claim)


async def test_a_file_that_was_cut_off_is_written_anew(tmp_path: Path):
    driver = FolderStorageDriver(tmp_path)
    [claim] = await store(driver, payload())
    files(tmp_path)[0].write_bytes(b"cut")
    assert await store(driver, payload()) == [claim]
    assert await retrieve(driver, claim) == [payload()]


async def test_a_folder_that_is_not_there_is_no_lost_value_and_is_not_made(tmp_path: Path):
    folder = tmp_path / "mount" / "values"
    with pytest.raises(ConfigError, match=f"no folder '{folder}'"):
        FolderStorageDriver(folder)
    folder.mkdir(parents=True)
    driver = FolderStorageDriver(folder)
    [claim] = await store(driver, payload())
    folder.rename(tmp_path / "away")
    with pytest.raises(StorageError, match="Is it mounted"):
        await retrieve(driver, claim)
    with pytest.raises(StorageError, match="cannot be stored"):
        await store(driver, payload())
    assert not folder.exists()


async def test_a_value_over_the_size_is_refused_and_leaves_nothing(tmp_path: Path):
    driver = FolderStorageDriver(tmp_path, max_size=500)
    with pytest.raises(PayloadTooLargeError, match=r"1,0\d\d bytes is over the 500"):
        await store(driver, payload())
    assert files(tmp_path) == []


async def test_a_relative_folder_stays_the_same_when_the_process_goes_elsewhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    (tmp_path / "values").mkdir()
    monkeypatch.chdir(tmp_path)
    driver = FolderStorageDriver("values")
    monkeypatch.chdir("/")
    [claim] = await store(driver, payload())
    assert await retrieve(driver, claim) == [payload()]


WRITER = """
import asyncio, sys
from temporalio.api.common.v1 import Payload
from temporalio.converter import StorageDriverStoreContext
from temporal_async_task.storage import FolderStorageDriver

async def main():
    driver = FolderStorageDriver(sys.argv[1])
    for number in range(10_000):
        data = number.to_bytes(4, "big") * 50_000
        await driver.store(StorageDriverStoreContext(), [Payload(data=data)])
        print("stored", flush=True)

asyncio.run(main())
"""


def write_and_be_killed(folder: Path) -> None:
    with subprocess.Popen([sys.executable, "-c", WRITER, folder], stdout=subprocess.PIPE) as writer:
        assert writer.stdout is not None
        for _ in range(3):
            writer.stdout.readline()
        time.sleep(0.003)  # into the middle of the next
        writer.kill()


async def test_a_writer_that_is_killed_leaves_only_whole_values(tmp_path: Path):
    for _ in range(5):
        await asyncio.to_thread(write_and_be_killed, tmp_path)
    whole = [path for path in files(tmp_path) if not path.name.startswith(".")]
    assert len(whole) >= 3
    claims = [StorageDriverClaim({"sha256": path.name}) for path in whole]
    assert len(await retrieve(FolderStorageDriver(tmp_path), *claims)) == len(whole)
