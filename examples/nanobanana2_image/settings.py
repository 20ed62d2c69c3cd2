"""What the application is told from outside: environment variables, read once, in one place."""

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from temporal_async_task import NonRetryableError

MAX_PROMPT = 4000
"""Characters. The vendor asks for a few hundred words."""
MAX_URL = 2048
"""Characters."""


class PromptError(NonRetryableError):
    """A prompt that no picture can be made of."""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Each field is the environment variable of its name, in capitals."""

    ark_base_url: str = "https://ark.cn-beijing.volces.com/api/v3"
    ark_api_key: str = field(default="", repr=False)
    """Needed by workers only."""
    ark_image_model: str = "doubao-seedream-4-0-250828"
    ark_video_model: str = "doubao-seedance-1-0-pro-250528"
    picture_hosts: tuple[str, ...] = (".volces.com", ".volccdn.com")
    """From where pictures and videos may be fetched, comma-separated: ``host``, ``host:port``, or ``.domain`` for all
    below it. Nothing else is ever asked for."""
    private_addresses: bool = False
    """Whether these hosts may have private addresses (``1``): for development only."""
    media_dir: Path = Path("data/media")
    """Where pictures and videos are kept. Web process and workers share it."""
    database_url: str = "sqlite+aiosqlite:///data/app.db"
    """Or ``postgresql+asyncpg://user:password@host/name``. Only the web process uses it."""
    callback_url: str = "http://127.0.0.1:8000/integrations/reports"
    """Where workers tell the web process what has become of a task."""
    callback_secret: str = field(default="", repr=False)
    """What they sign it with; the same in all processes, 16 bytes or more."""
    web_hosts: tuple[str, ...] = ("127.0.0.1", "localhost")
    """The names under which the web process is called, comma-separated."""
    video_poll_every: float = 10.0
    """Seconds between two questions for a video."""
    video_timeout: float = 1800.0
    """Seconds after which a video that is not ready is given up."""
    worker_lost_after: float = 15.0
    """Seconds of silence after which a worker is taken for dead, and its tasks go to others."""

    @classmethod
    def from_env(cls, env: Mapping[str, str] = os.environ) -> "Settings":
        """The settings. An empty variable counts as unset.

        Raises:
            ValueError: A variable that should be a number of seconds is none.
        """
        found = {name: env[name.upper()].strip() for name in cls.__dataclass_fields__ if env.get(name.upper())}
        values: dict[str, object] = dict(found)
        for name in ("picture_hosts", "web_hosts"):
            if name in found:
                values[name] = tuple(host.strip().lower() for host in found[name].split(",") if host.strip())
        for name in ("video_poll_every", "video_timeout", "worker_lost_after"):
            if name in found:
                values[name] = _seconds(name.upper(), found[name])
        if "private_addresses" in found:
            values["private_addresses"] = found["private_addresses"] == "1"
        if "media_dir" in found:
            values["media_dir"] = Path(found["media_dir"])
        return cls(**values)  # type: ignore[arg-type]


def _seconds(variable: str, text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = math.nan
    if not 0 < seconds < math.inf:
        raise ValueError(f"{variable} must be a number of seconds over 0, not {text!r}.")
    return seconds


def check_prompt(prompt: str) -> str:
    """The prompt, without the white space around it.

    Raises:
        PromptError: It is empty, too long, or no text.
    """
    prompt = prompt.strip()
    if "\0" in prompt or any("\ud800" <= letter <= "\udfff" for letter in prompt):
        raise PromptError("The prompt holds what is no character: databases and vendors would refuse it.")
    if not prompt:
        raise PromptError("The prompt is empty: say what the picture shall show.")
    if len(prompt) > MAX_PROMPT:
        raise PromptError(f"The prompt has {len(prompt):,} characters; the limit is {MAX_PROMPT:,}.")
    return prompt
