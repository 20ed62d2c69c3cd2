"""The pictures of the stub: real ones to choose from, what the model "paints", and some that are none."""

import hashlib
import io
import struct
import zlib
from collections.abc import Sequence

from PIL import Image, ImageDraw

SAMPLES = ("cup", "lamp", "chair", "fox")
SIZE = (768, 512)
"""Of what the model paints."""


def sample(name: str) -> bytes:
    """A source picture."""
    return _png(_painted(name, (480, 360)))


def painted(prompt: str, images: Sequence[bytes]) -> bytes:
    """What the "model" makes of images and a prompt: the images side by side, the prompt below.

    Raises:
        OSError: One of the images is none.
    """
    picture = _painted(prompt, SIZE)
    width = SIZE[0] // max(len(images), 1)
    for place, data in enumerate(images):
        with Image.open(io.BytesIO(data)) as image:
            picture.paste(image.convert("RGB").resize((width - 24, SIZE[1] - 120)), (place * width + 12, 12))
    _write(picture, (16, SIZE[1] - 60), prompt)
    return _png(picture)


def huge() -> bytes:
    """A few hundred bytes that say of themselves that they have 60000 x 60000 pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 0, 0, 0, 0)
    rows = zlib.compress(bytes(60_001))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


def _painted(text: str, size: tuple[int, int]) -> Image.Image:
    digest = hashlib.sha256(text.encode()).digest()
    gradient = Image.linear_gradient("L").resize(size)
    bands = [
        gradient.point(lambda value, low=low, high=high: low + (high - low) * value // 255)
        for low, high in zip(digest[:3], digest[3:6], strict=True)
    ]
    picture = Image.merge("RGB", bands)
    _write(picture, (16, 16), text)
    return picture


def _write(picture: Image.Image, place: tuple[int, int], text: str) -> None:
    ImageDraw.Draw(picture).text(place, text[:90].encode("latin-1", "replace").decode("latin-1"))


def _png(picture: Image.Image) -> bytes:
    file = io.BytesIO()
    picture.save(file, "PNG")
    return file.getvalue()
