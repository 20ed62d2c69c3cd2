"""As much of PNG as a picture needs: to make one, and to check that a file is one (https://www.w3.org/TR/png-3/)."""

import hashlib
import struct
import zlib

SIGNATURE = b"\x89PNG\r\n\x1a\n"
SIZE = 192
"""Width and height of the pictures, in pixels."""


def gradient(prompt: str) -> bytes:
    """A picture whose colours depend on the prompt."""
    digest = hashlib.sha256(prompt.encode()).digest()
    one, other = digest[:3], digest[3:6]
    rows = bytearray()
    for y in range(SIZE):
        rows.append(0)  # each row begins with its filter; 0 is none
        for x in range(SIZE):
            share = (x + y) / (2 * SIZE)
            rows.extend(round(a + (b - a) * share) for a, b in zip(one, other, strict=True))
    header = struct.pack(">IIBBBBB", SIZE, SIZE, 8, 2, 0, 0, 0)  # 8 bits a channel, RGB, not interlaced
    chunks = (_chunk(b"IHDR", header), _chunk(b"IDAT", zlib.compress(rows)), _chunk(b"IEND", b""))
    return SIGNATURE + b"".join(chunks)


def check(data: bytes) -> None:
    """Decode a picture as made by ``gradient``.

    Raises:
        ValueError: It is not a whole and correct PNG.
    """
    if not data.startswith(SIGNATURE):
        raise ValueError("it does not begin as a PNG")
    chunks: dict[bytes, bytes] = {}
    at = len(SIGNATURE)
    while at < len(data):
        try:
            (length,) = struct.unpack_from(">I", data, at)
            (checksum,) = struct.unpack_from(">I", data, at + 8 + length)
        except struct.error:
            raise ValueError("it ends within a chunk") from None
        kind, content = data[at + 4 : at + 8], data[at + 8 : at + 8 + length]
        if zlib.crc32(kind + content) != checksum:
            raise ValueError(f"its chunk {kind!r} is damaged")
        chunks[kind] = content
        at += 12 + length
    if chunks.keys() != {b"IHDR", b"IDAT", b"IEND"}:
        raise ValueError(f"its chunks are {sorted(chunks)}")
    width, height = struct.unpack_from(">II", chunks[b"IHDR"])
    try:
        pixels = zlib.decompress(chunks[b"IDAT"])
    except zlib.error as error:
        raise ValueError(f"its pixels cannot be read: {error}") from error
    if len(pixels) != height * (1 + 3 * width):
        raise ValueError(f"it has {len(pixels)} bytes of pixels, which is not {width} x {height}")


def _chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))
