"""What a picture is: read from its bytes, not from what its sender says."""

import base64
import io
import warnings
from dataclasses import dataclass

from PIL import Image, UnidentifiedImageError

from temporal_async_task import NonRetryableError

MAX_BYTES = 10 * 1024 * 1024
"""Of one picture. The vendor takes no more, either."""
MAX_PIXELS = 6000 * 6000
_KINDS = {"PNG": ("image/png", ".png"), "JPEG": ("image/jpeg", ".jpg"), "WEBP": ("image/webp", ".webp")}

# As Pillow's documentation advises, a picture of suspicious size is an error. It is refused below anyhow.
warnings.simplefilter("error", Image.DecompressionBombWarning)


class NotAPictureError(NonRetryableError):
    """The data is no picture that can be used."""


@dataclass(frozen=True)
class PictureInfo:
    """What a picture's bytes say of it."""

    width: int
    height: int
    format: str
    """Its MIME type."""
    suffix: str
    """For a file's name."""


def read_picture(data: bytes) -> PictureInfo:
    """What a picture is. It is decoded as a whole, so that a damaged one is noticed. Takes a while: use a thread.

    Raises:
        NotAPictureError: It is none, is damaged, or is too large.
    """
    if len(data) > MAX_BYTES:
        raise NotAPictureError(f"The picture is over {MAX_BYTES:,} bytes.")
    try:
        with Image.open(io.BytesIO(data), formats=tuple(_KINDS)) as picture:
            width, height = picture.size
            if fits := width * height <= MAX_PIXELS:  # known from the header, before anything is decoded
                picture.load()
            mime, suffix = _KINDS[picture.format or ""]
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        fits = False
    except UnidentifiedImageError:
        raise NotAPictureError(f"This is no picture: not one of {', '.join(_KINDS)}.") from None
    except Exception as error:  # what decoders raise at damaged data is of many kinds
        raise NotAPictureError(f"The picture is damaged: {error}") from None
    if not fits:
        raise NotAPictureError(f"The picture has more than {MAX_PIXELS:,} pixels.")
    return PictureInfo(width, height, mime, suffix)


def data_url(data: bytes, mime: str) -> str:
    """The picture as the vendor takes it."""
    return f"data:{mime};base64,{base64.b64encode(data).decode()}"
