"""The parts of the example that ask nobody: addresses, pictures, the storage, settings; and its tasks in memory."""

import io
import os
import threading
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

import ark  # noqa: F401 - makes the example importable
from nanobanana2_image import stub_pictures
from nanobanana2_image.downloads import DownloadRefusedError, Downloads, is_public
from nanobanana2_image.pictures import NotAPictureError, PictureInfo, data_url, read_picture
from nanobanana2_image.settings import PromptError, Settings, check_prompt
from nanobanana2_image.storage import NotStoredError, Storage
from nanobanana2_image.tasks import Picture, PictureOrder, StoredPicture, Video, VideoOrder, check_source, create_tasks
from temporal_async_task import PollTimeoutError, StepFailedError
from temporal_async_task.testing import TaskRun

HOSTS = Downloads((".volces.com", "pictures.example", "127.0.0.1:9900"))


@pytest.mark.parametrize(
    "url",
    [
        "https://ark-content.tos-cn-beijing.volces.com/a.jpeg?X-Tos-Signature=1",
        "http://pictures.example/a.png",
        "https://pictures.example:443/a.png",
        "https://PICTURES.example/a.png",
        "http://127.0.0.1:9900/samples/cup.png",
    ],
)
def test_configured_hosts_may_be_asked(url: str) -> None:
    assert HOSTS.check(url).host


@pytest.mark.parametrize(
    "url",
    [
        "https://elsewhere.example/a.png",
        "https://volces.com.elsewhere.example/a.png",
        "https://evilvolces.com/a.png",
        "https://volces.com/a.png",
        "https://pictures.example.elsewhere.example/",
        "https://pictures.example:8443/a.png",
        "https://pictures.example@169.254.169.254/",
        "https://user:password@pictures.example/a.png",
        "http://127.0.0.1/a.png",
        "http://127.0.0.1:9901/a.png",
        "http://2130706433:9900/a.png",
        "http://[::ffff:127.0.0.1]:9900/a.png",
        "http://localhost:9900/a.png",
        "file:///etc/passwd",
        "ftp://pictures.example/a.png",
        "//pictures.example/a.png",
        "pictures.example/a.png",
        "http://",
        "http://pictures.example:99999/",
        "http://pictures.example\x00.elsewhere.example/",
        "http://[pictures.example/",
        "data:image/png;base64,AAAA",
        "",
    ],
)
def test_no_other_address_is_asked(url: str) -> None:
    with pytest.raises(DownloadRefusedError):
        HOSTS.check(url)


@pytest.mark.parametrize(
    "address",
    [
        "127.0.0.1", "10.1.2.3", "172.16.0.1", "192.168.1.1", "169.254.169.254", "100.64.0.1", "0.0.0.0",  # noqa: S104 - to refuse it
        "224.0.0.1",
        "255.255.255.255", "198.18.0.1", "::1", "::", "fe80::1", "fd00::1", "ff02::1", "::ffff:127.0.0.1",
        "::ffff:8.8.8.8", "64:ff9b::7f00:1", "2002:7f00:1::", "2001:0:7f00:1::", "2001:db8::1",
    ],
)  # fmt: skip
def test_addresses_that_are_not_the_internets_are_known(address: str) -> None:
    assert not is_public(address)


def test_addresses_of_the_internet_are_known() -> None:
    assert is_public("8.8.8.8")
    assert is_public("2606:4700::6810:84e5")


def picture(kind: str, size: tuple[int, int] = (30, 20), **options: Any) -> bytes:
    file = io.BytesIO()
    Image.new(options.pop("mode", "RGB"), size, **options).save(file, kind)
    return file.getvalue()


def test_size_and_format_are_read_from_the_picture() -> None:
    assert read_picture(picture("PNG", (30, 20))) == PictureInfo(30, 20, "image/png", ".png")
    assert read_picture(picture("JPEG", (7, 9))) == PictureInfo(7, 9, "image/jpeg", ".jpg")
    assert read_picture(picture("WEBP", (1, 300))) == PictureInfo(1, 300, "image/webp", ".webp")
    assert read_picture(picture("PNG", (5, 5), mode="P")).format == "image/png"


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "no picture"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "no picture"),
        (picture("GIF"), "no picture"),
        (picture("TIFF"), "no picture"),
        (b"\x89PNG\r\n\x1a\n", "no picture|damaged"),
        (stub_pictures.sample("cup")[:-1000], "damaged"),
        (picture("JPEG", (300, 300))[:200], "damaged|no picture"),
        (stub_pictures.huge(), "pixels"),
        (picture("PNG", (6001, 6000), mode="1"), "pixels"),
        (bytes(10 * 1024 * 1024 + 1), "10,485,760 bytes"),
    ],
    ids=["nothing", "svg", "gif", "tiff", "signature", "cut png", "cut jpeg", "bomb", "too many pixels", "too large"],
)
def test_what_is_no_usable_picture_is_refused_with_the_reason(data: bytes, reason: str) -> None:
    with pytest.raises(NotAPictureError, match=reason):
        read_picture(data)


def test_the_vendor_gets_pictures_as_data_urls() -> None:
    assert data_url(b"abc", "image/png") == "data:image/png;base64,YWJj"


def test_what_is_stored_again_replaces_itself(tmp_path: Path) -> None:
    storage = Storage(tmp_path / "media")
    storage.write("a-1.png", b"first")
    storage.write("a-1.png", b"second")
    assert storage.read("a-1.png") == b"second"
    assert os.listdir(tmp_path / "media") == ["a-1.png"]  # noqa: PTH208 - names


def test_a_file_that_was_not_finished_is_not_there(tmp_path: Path) -> None:
    storage = Storage(tmp_path)
    storage.write("a.mp4", b"whole")

    def fail() -> None:
        with storage.writing("a.mp4") as file:
            file.write(b"ha")
            raise ConnectionError

    with pytest.raises(ConnectionError):
        fail()
    assert storage.read("a.mp4") == b"whole"
    assert [path.name for path in tmp_path.iterdir()] == ["a.mp4"]


def test_readers_see_a_whole_file_or_the_one_before(tmp_path: Path) -> None:
    storage = Storage(tmp_path)
    versions = [bytes([n]) * 200_000 for n in range(40)]
    storage.write("a.png", versions[0])
    writer = threading.Thread(target=lambda: [storage.write("a.png", one) for one in versions])
    writer.start()
    while writer.is_alive():
        assert storage.read("a.png") in versions
    writer.join()


@pytest.mark.parametrize("name", ["", "../a.png", "a/b.png", "/etc/passwd", ".a.png", "a.html", "A.png", "a.png\n"])
def test_a_name_cannot_leave_the_folder(tmp_path: Path, name: str) -> None:
    (tmp_path / "a.png").write_bytes(b"outside")
    with pytest.raises(NotStoredError):
        Storage(tmp_path / "media").read(name)
    with pytest.raises(NotStoredError):
        Storage(tmp_path / "media").write(name, b"")


def test_settings_come_from_the_environment() -> None:
    settings = Settings.from_env(
        {
            "ARK_API_KEY": " secret ",
            "PICTURE_HOSTS": "a.example, B.example:8080,",
            "PRIVATE_ADDRESSES": "1",
            "MEDIA_DIR": "/srv/media",
            "VIDEO_POLL_EVERY": "2.5",
            "DATABASE_URL": "",
            "UNRELATED": "x",
        }
    )
    assert settings == Settings(
        ark_api_key="secret",
        picture_hosts=("a.example", "b.example:8080"),
        private_addresses=True,
        media_dir=Path("/srv/media"),
        video_poll_every=2.5,
    )
    assert "secret" not in repr(settings)


@pytest.mark.parametrize("text", ["soon", "0", "-1", "nan", "inf"])
def test_a_number_that_is_none_is_told_with_the_variables_name(text: str) -> None:
    with pytest.raises(ValueError, match="VIDEO_POLL_EVERY must be a number of seconds over 0"):
        Settings.from_env({"VIDEO_POLL_EVERY": text})


@pytest.mark.parametrize("prompt", ["", " \n", "a\0b", "a\ud800b", "x" * 4001])
def test_a_prompt_that_no_picture_can_be_made_of_is_refused(prompt: str) -> None:
    with pytest.raises(PromptError):
        check_prompt(prompt)
    assert check_prompt(" 猫在杯子里 🐈 ") == "猫在杯子里 🐈"


# The tasks, in memory: their calls are scripted.

ORDER = PictureOrder("http://a.example/1.png", "http://a.example/2.png", "a cup on a chair")
STORED = StoredPicture("source-1.png", 30, 20, "image/png")
RESULT = Picture("/media/picture-1.png", 768, 512, "image/png")


def picture_run() -> TaskRun[Picture]:
    run = TaskRun(create_tasks(Settings())[0], ORDER)
    run.on("fetch source image").returns(STORED)
    run.on("fetch uploaded image").returns(STORED)
    run.on("generate").returns("https://x.volces.com/1.png")
    run.on("store").returns(RESULT)
    return run


@pytest.mark.parametrize("when", ["before", "saved"])
@pytest.mark.parametrize("step", ["fetch source image", "fetch uploaded image", "store"])
def test_a_worker_that_is_lost_outside_of_the_paid_call_costs_nothing(step: str, when: Any) -> None:
    run = picture_run()
    run.on(step).loses_worker(when=when)
    assert run.execute() == RESULT
    assert run.calls_of("generate") == 1


def test_a_worker_that_is_lost_in_the_paid_call_has_it_made_again() -> None:
    run = picture_run()
    run.on("generate").loses_worker(when="after")
    assert run.execute() == RESULT
    assert run.calls_of("generate") == 2
    assert run.calls_of("fetch source image") == 1


def test_nothing_is_paid_for_if_a_source_is_refused() -> None:
    run = picture_run()
    run.on("fetch uploaded image").raises(NotAPictureError("This is no picture"))
    with pytest.raises(StepFailedError, match=r"'fetch uploaded image' failed after 1 attempt: .*no picture"):
        run.execute()
    assert run.calls_of("generate") == 0


def video_run(order: VideoOrder, ready_after: int) -> TaskRun[Video]:
    run = TaskRun(create_tasks(Settings())[1], order)
    answers = iter([None] * ready_after)
    run.on("create job").returns("cgt-1")
    run.on("render").returns(lambda: next(answers, True))
    run.on("store").returns(Video("/media/video-1.mp4", 10, "video/mp4"))
    return run


def test_a_video_is_asked_for_every_ten_seconds_and_the_job_is_made_once() -> None:
    run = video_run(VideoOrder("a fox"), ready_after=12)
    run.on("render").loses_worker()
    assert run.execute() == Video("/media/video-1.mp4", 10, "video/mp4")
    assert run.calls_of("create job") == 1
    assert 120 <= run.elapsed < 150  # virtual seconds


def test_a_video_that_is_not_ready_in_half_an_hour_is_given_up() -> None:
    run = video_run(VideoOrder("a fox"), ready_after=1_000_000)
    with pytest.raises(PollTimeoutError):
        run.execute()
    assert 170 <= run.calls_of("render") <= 181
    assert run.calls_of("store") == 0


def test_a_source_is_checked_before_it_is_ordered(tmp_path: Path) -> None:
    settings = Settings(picture_hosts=("a.example",), media_dir=tmp_path)
    check_source("https://a.example/1.png", settings)
    check_source("/media/" + Storage(tmp_path).write("source-1.png", b""), settings)
    for missing in ("/media/source-2.png", "/media/../source-1.png", "/media/\0", "/media/"):
        with pytest.raises(NotStoredError):
            check_source(missing, settings)
    with pytest.raises(DownloadRefusedError, match="not among the configured hosts"):
        check_source("http://169.254.169.254/latest/meta-data", settings)
