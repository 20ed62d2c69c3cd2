"""Where the server is and how many tasks a worker takes: from arguments, the environment, then files.

``temporalio.envconfig`` reads Temporal's own variables and TOML profiles; this module adds the task queue and
the application's ``config/deploy.*.json``.
"""

from __future__ import annotations

import difflib
import ipaddress
import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self, TypeAlias, cast, get_args

from temporalio.contrib.pydantic import pydantic_data_converter
from temporalio.converter import DataConverter
from temporalio.envconfig import ClientConfig, ClientConfigProfile, ClientConfigTLS
from temporalio.service import TLSConfig

from temporal_async_task.checks import check_text, seconds
from temporal_async_task.errors import ConfigError, InvalidKeyError
from temporal_async_task.task import DEFAULT_TASK_QUEUE, Execution

if TYPE_CHECKING:
    from collections.abc import Callable

_Settings: TypeAlias = dict[str, tuple[Any, str]]
"""Values by field, each with the source that it comes from."""


@dataclass(frozen=True, kw_only=True)
class AsyncTaskComponentConfig:
    """What a component needs to know. Credentials are in no ``repr``, and in no message of an error.

    Attributes:
        temporal_address: ``host:port`` of the Temporal server, IPv6 as ``[::1]:7233``.
        namespace: Temporal's namespace.
        task_queue: The queue of the tasks that name none of their own.
        execution: What carries the runs of the tasks that do not say it themselves: ``"workflow"`` or ``"activity"``
            (see docs/execution.md). The same in all processes: it tells where a run is looked for.
        max_concurrent_tasks: How many tasks a process runs at once, on each task queue; and how many threads it has for
            sync functions.
        target_cpu: With ``target_memory``: take tasks by resource use instead of by a fixed number, up to
            this fraction of the CPU (over 0, up to 1).
        target_memory: The same of the memory. Both or neither.
        event_loop_per_run: Give each run an event loop of its own, and not one to all async code. Code that blocks then
            holds up no other run, but a client (``httpx.AsyncClient``, say) must not be shared by runs.
        graceful_shutdown_timeout: How long running steps may take to finish when the worker stops; seconds,
            or a ``timedelta``, which is kept as seconds.
        data_converter: Turns params and results into payloads and back.
        tls: ``True``, ``False``, or certificates. ``None`` is Temporal's default: on if there is an API key.
        api_key: Temporal's API key.
        rpc_metadata: gRPC headers that go with every call.
        identity: How this process is named in Temporal's UI; ``None`` for process id and host name.
        sources: Where ``load`` found each value, by field, for people to read. Empty without ``load``.

    Raises:
        ConfigError: A value that cannot be used. The message names the field.
    """

    temporal_address: str = "localhost:7233"
    namespace: str = "default"
    task_queue: str = DEFAULT_TASK_QUEUE
    execution: Execution = "workflow"
    max_concurrent_tasks: int = 200
    target_cpu: float | None = None
    target_memory: float | None = None
    event_loop_per_run: bool = False
    graceful_shutdown_timeout: float | timedelta = 30.0
    data_converter: DataConverter = field(default=pydantic_data_converter, repr=False)
    tls: bool | TLSConfig | None = field(default=None, repr=False)
    api_key: str | None = field(default=None, repr=False)
    rpc_metadata: Mapping[str, str] = field(default_factory=dict[str, str], repr=False)
    identity: str | None = None
    sources: Mapping[str, str] = field(default_factory=dict[str, str], init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        for name in _RULES:
            _check(name, getattr(self, name))
        if (self.target_cpu is None) != (self.target_memory is None):
            raise ConfigError(
                f"target_cpu is {self.target_cpu!r} and target_memory is {self.target_memory!r}. "
                "Give both, to take tasks by resource use, or neither."
            )
        object.__setattr__(self, "graceful_shutdown_timeout", seconds(self.graceful_shutdown_timeout))
        object.__setattr__(self, "rpc_metadata", dict(self.rpc_metadata))

    @classmethod
    def load(
        cls,
        *,
        file: str | os.PathLike[str] | None = None,
        profile: str | None = None,
        env: Mapping[str, str] | None = None,
        **overrides: Any,
    ) -> Self:
        """The configuration, each value from the first of: arguments, environment, deploy file, TOML profile.

        The variables are Temporal's (``TEMPORAL_ADDRESS``, ``TEMPORAL_NAMESPACE``, ``TEMPORAL_API_KEY``,
        ``TEMPORAL_TLS...``, ``TEMPORAL_GRPC_META_...``, ``TEMPORAL_PROFILE``, ``TEMPORAL_CONFIG_FILE``; see
        https://docs.temporal.io/develop/environment-configuration), ``TEMPORAL_TASK_QUEUE`` and
        ``ASYNC_TASK_EXECUTION``. An empty one counts as unset. A TOML file that ``TEMPORAL_CONFIG_FILE`` names may
        have no unknown key. The one in Temporal's default place may: the ``temporal`` command keeps data of its own
        there.

        A deploy file (``config/deploy.*.json``) is read only where ``file`` or the variable
        ``ASYNC_TASK_CONFIG`` names it; none is looked for. Its block ``components.asyncTask`` may give
        ``execution``, ``maxConcurrentTasks``, ``targetCpu``, ``targetMemory``, ``eventLoopPerRun`` and
        ``gracefulShutdownTimeout`` (seconds);
        ``middlewareDependencies.temporal`` in it may give ``endpoint``, ``config.namespace`` and
        ``config.taskQueue``. Next to a deploy file, the TOML file in the default place is read only if a
        profile is named, so that a developer's own credentials do not go to the deploy file's server.

        Args:
            file: The deploy file.
            profile: The TOML file's profile, instead of ``TEMPORAL_PROFILE``.
            env: The variables, instead of the process's.
            **overrides: Fields of this class. ``None`` stands for not given.

        Raises:
            ConfigError: A file or a value that cannot be used. The message says which, and whose.
        """
        if unknown := overrides.keys() - _RULES.keys():
            raise TypeError(f"load() got an unexpected keyword argument {min(unknown)!r}")
        variables = _variables(os.environ if env is None else env)
        deploy_file = file or variables.get("ASYNC_TASK_CONFIG")
        from_deploy = _deploy_settings(Path(deploy_file)) if deploy_file else {}
        from_profile, from_env = _temporal_settings(profile, variables, use_default_file=not deploy_file)
        arguments: _Settings = {name: (value, "argument") for name, value in overrides.items() if value is not None}
        settings = from_profile | from_deploy | from_env | arguments  # the last one wins
        values: dict[str, Any] = {}
        for name, (value, source) in settings.items():
            values[name] = _read_certificates(value, source) if isinstance(value, ClientConfigTLS) else value
            _check(name, values[name], source)
        config = cls(**values)
        sources = {name: settings[name][1] if name in settings else "default" for name in _RULES}
        object.__setattr__(config, "sources", sources)
        return config

    def with_arguments(self, origin: str, **arguments: Any) -> Self:
        """A copy in which arguments come before what this configuration says.

        Args:
            origin: Where this configuration is from, for ``sources``, if ``load`` did not make it.
            **arguments: Fields of this class. ``None`` stands for not given.

        Raises:
            ConfigError: A value that cannot be used.
        """
        given = {name: value for name, value in arguments.items() if value is not None}
        copy = replace(self, **given)
        defaults = type(self)()
        known = {
            name: "default" if getattr(self, name) == getattr(defaults, name) else origin for name in _RULES
        } | dict(self.sources)
        object.__setattr__(copy, "sources", known | dict.fromkeys(given, "argument"))
        return copy

    def shown(self, name: str) -> str:
        """A field's value for people to read: of a credential, only whether there is one."""
        value = getattr(self, name)
        if name == "data_converter":
            return f"{value.payload_converter_class.__name__}{', with a codec' if value.payload_codec else ''}"
        if name in _SECRET and not isinstance(value, bool | None):
            return "set, not shown" if value else "none"
        return "none" if value is None else str(value)

    def connect_options(self) -> dict[str, Any]:
        """The arguments for ``temporalio.client.Client.connect``, credentials included: not for logs."""
        return {
            "target_host": self.temporal_address,
            "namespace": self.namespace,
            "data_converter": self.data_converter,
            "tls": self.tls,
            "api_key": self.api_key,
            "rpc_metadata": self.rpc_metadata,
            "identity": self.identity,
        }


# Files and variables.

_DEFAULT_TOML = "Temporal's default configuration file"
_TEMPORAL_FIELDS = {
    # ours: (envconfig's, the variables)
    "temporal_address": ("address", "TEMPORAL_ADDRESS"),
    "namespace": ("namespace", "TEMPORAL_NAMESPACE"),
    "api_key": ("api_key", "TEMPORAL_API_KEY"),
    "tls": ("tls", "TEMPORAL_TLS..."),
    "rpc_metadata": ("grpc_meta", "TEMPORAL_GRPC_META_..."),
}


def _variables(env: Mapping[str, str]) -> dict[str, str]:
    """The variables that matter here, without the empty ones."""
    # To envconfig an empty value is a value; in a compose file it is a variable that nobody has set. It stays
    # for headers, where it takes away the profile's.
    return {
        name: value
        for name, value in env.items()
        if (name.startswith("TEMPORAL_") or name in _OUR_OWN) and (value or name.startswith("TEMPORAL_GRPC_META_"))
    }


def misspelt_variables(env: Mapping[str, str]) -> dict[str, str]:
    """Variables that nothing here reads and that look like one that is read, which each stands by."""
    known = (*_OUR_OWN, *_TEMPORALS_OWN)
    found: dict[str, str] = {}
    for name in env:
        if name in known or name.startswith("TEMPORAL_GRPC_META_") or not name.startswith(("TEMPORAL", "ASYNC_TASK")):
            continue
        if near := difflib.get_close_matches(name, known, n=1, cutoff=0.85):
            found[name] = near[0]
    return found


_OUR_OWN = (
    "TEMPORAL_TASK_QUEUE",
    "ASYNC_TASK_APP",
    "ASYNC_TASK_CONFIG",
    "ASYNC_TASK_DEBUG",
    "ASYNC_TASK_ENCRYPTION_KEYS",
    "ASYNC_TASK_EXECUTION",
)
_TEMPORALS_OWN = (
    "TEMPORAL_ADDRESS",
    "TEMPORAL_NAMESPACE",
    "TEMPORAL_API_KEY",
    "TEMPORAL_PROFILE",
    "TEMPORAL_CONFIG_FILE",
    "TEMPORAL_TLS",
    "TEMPORAL_TLS_CLIENT_CERT_PATH",
    "TEMPORAL_TLS_CLIENT_CERT_DATA",
    "TEMPORAL_TLS_CLIENT_KEY_PATH",
    "TEMPORAL_TLS_CLIENT_KEY_DATA",
    "TEMPORAL_TLS_SERVER_CA_CERT_PATH",
    "TEMPORAL_TLS_SERVER_CA_CERT_DATA",
    "TEMPORAL_TLS_SERVER_NAME",
    "TEMPORAL_TLS_DISABLE_HOST_VERIFICATION",
)


def _temporal_settings(
    profile: str | None, env: Mapping[str, str], *, use_default_file: bool
) -> tuple[_Settings, _Settings]:
    """What the TOML profile says, and what the environment says."""
    switch = env.get("TEMPORAL_TLS", "true")
    if switch.lower() not in ("true", "false", "1", "0"):
        # envconfig would switch TLS on, whatever it says.
        raise ConfigError(f"Environment variable TEMPORAL_TLS is {switch!r}. Give 'true' or 'false'.")
    path = env.get("TEMPORAL_CONFIG_FILE")
    # Read here because envconfig takes a missing file for an empty one.
    toml = _read(Path(path), "the file that TEMPORAL_CONFIG_FILE names") if path else None
    profile = profile or env.get("TEMPORAL_PROFILE")
    profiles: Mapping[str, ClientConfigProfile] = {}
    try:
        if path or profile or use_default_file:
            profiles = ClientConfig.load(
                config_source=toml, config_file_strict=toml is not None, override_env_vars=env
            ).profiles
        if profile and profile not in profiles:
            raise ConfigError(
                f"Profile {profile!r} is not in {path or _DEFAULT_TOML}, which has "
                f"{', '.join(map(repr, sorted(profiles))) or 'none'}. Name another profile, or another file "
                "with TEMPORAL_CONFIG_FILE."
            )
        merged = ClientConfigProfile.load(profile, config_source=toml, disable_file=not profiles, override_env_vars=env)
        alone = ClientConfigProfile.load(disable_file=True, override_env_vars=env)
    except (RuntimeError, UnicodeError) as exc:
        # Not "from exc": envconfig quotes the line in question, and the API key with it.
        raise ConfigError(_toml_problem(str(exc), path or _DEFAULT_TOML)) from None
    stored = profiles.get(profile or "default", ClientConfigProfile())
    from_profile: _Settings = {}
    from_env: _Settings = {}
    for name, (attribute, variable) in _TEMPORAL_FIELDS.items():
        value, in_env, in_file = (getattr(each, attribute) for each in (merged, alone, stored))
        source = f"profile {profile or 'default'!r} in {path or _DEFAULT_TOML}"
        if in_env not in (None, {}):
            also = "" if value == in_env else f" and {source}"  # TLS and headers are merged key by key
            from_env[name] = (value, f"environment variable {variable}{also}")
        elif in_file not in (None, {}):
            from_profile[name] = (value, source)
    if queue := env.get("TEMPORAL_TASK_QUEUE"):
        from_env["task_queue"] = (queue, "environment variable TEMPORAL_TASK_QUEUE")
    if execution := env.get("ASYNC_TASK_EXECUTION"):
        from_env["execution"] = (execution, "environment variable ASYNC_TASK_EXECUTION")
    return from_profile, from_env


def _toml_problem(message: str, path: str) -> str:
    """The message without what it quotes of the file's values."""
    place = re.search(r"TOML parse error at (line \d+, column \d+)", message)
    if not place:
        return f"Temporal's configuration cannot be used: {message}."
    reason = message.strip().splitlines()[-1]
    if unknown := re.match(r"unknown field `(.+?)`, expected (?:one of )?(.+)", reason):
        near = difflib.get_close_matches(unknown[1], re.findall(r"`(.+?)`", unknown[2]), n=1)
        reason += f". Did you mean {near[0]!r}?" if near else ""
    else:
        _, known, expected = reason.rpartition(", expected ")
        reason = f"expected {re.sub(r'struct [A-Za-z]+', 'a table', expected)}" if known else "not valid TOML"
    return f"{path}, {place[1]}: {reason.removesuffix('?')}{'?' if reason.endswith('?') else '.'}"


def _read_certificates(tls: ClientConfigTLS, source: str) -> bool | TLSConfig:
    try:
        return tls.to_connect_tls_config()
    except (OSError, ValueError) as exc:
        raise ConfigError(f"Cannot read a certificate or key for TLS ({source}): {exc}.") from exc


def _read(path: Path, what: str) -> bytes:
    try:
        return path.read_bytes()
    except (OSError, ValueError) as exc:
        raise ConfigError(f"Cannot read {what}: {exc}.") from exc


_DEPLOY_BLOCKS: dict[str, tuple[dict[str, str], set[str]]] = {
    # block: (keys for our fields, keys that are for others to read)
    "components.asyncTask": (
        {
            "execution": "execution",
            "maxConcurrentTasks": "max_concurrent_tasks",
            "targetCpu": "target_cpu",
            "targetMemory": "target_memory",
            "eventLoopPerRun": "event_loop_per_run",
            "gracefulShutdownTimeout": "graceful_shutdown_timeout",
        },
        {"deploymentType", "replicas", "host", "middlewareDependencies"},
    ),
    "components.asyncTask.middlewareDependencies.temporal": (
        {"endpoint": "temporal_address"},
        {"deploymentType", "use", "version", "replicas", "config"},
    ),
    "components.asyncTask.middlewareDependencies.temporal.config": (
        {"namespace": "namespace", "taskQueue": "task_queue"},
        {"webUIPort"},
    ),
}


def _deploy_settings(path: Path) -> _Settings:
    """What the ``components.asyncTask`` block of a deploy file says."""
    data = _read(path, "the deploy file")
    try:
        document = json.loads(data.decode("utf-8-sig"))
    except ValueError as exc:
        hint = " Name a TOML file with TEMPORAL_CONFIG_FILE." if path.suffix == ".toml" else ""
        raise ConfigError(f"{path} is not valid JSON: {exc}.{hint}") from exc
    settings: _Settings = {}
    for place, (ours, others) in _DEPLOY_BLOCKS.items():
        block = _deploy_block(document, place, path)
        if block is None and place == "components.asyncTask":
            raise ConfigError(f"{path} has no block {place}. Add it, or name another file.")
        for key, value in (block or {}).items():
            if key not in ours.keys() | others:
                raise _unknown_key(path, f"{place}.{key}", sorted(ours.keys() | others))
            if key in ours and value is not None:
                settings[ours[key]] = (value, f"file {path} ({place}.{key})")
    return settings


def _deploy_block(document: Any, place: str, path: Path) -> dict[str, Any] | None:
    """The object at a dotted place of the document; ``None`` if there is none."""
    block, above = _object(document, "The document", path), ""
    for name in place.split("."):
        if block.get(name) is None:
            # The blocks above ours may hold anything, but what is almost our name is meant for us.
            if name not in block and (near := difflib.get_close_matches(name, block, cutoff=0.85)):
                raise _unknown_key(path, above + near[0], [name])
            return None
        block, above = _object(block[name], above + name, path), f"{above}{name}."
    return block


def _object(value: Any, place: str, path: Path) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ConfigError(f"{path}: {place} must be a JSON object.")
    return cast("dict[str, Any]", value)


def _unknown_key(path: Path, key: str, known: list[str]) -> ConfigError:
    near = difflib.get_close_matches(key.rpartition(".")[2], known, n=1)
    hint = f"Did you mean {near[0]!r}?" if near else f"Known keys there: {', '.join(known)}."
    return ConfigError(f"{path}: unknown key {key}. {hint}")


# What the values must be.


def _is_address(value: object) -> bool:
    found = isinstance(value, str) and re.fullmatch(r"(?:[\w.-]+|\[([0-9a-fA-F:.]+)\]):([0-9]{1,5})", value)
    if not found or not 1 <= int(found[2]) <= 65535:  # noqa: PLR2004 - TCP's ports
        return False
    try:
        return found[1] is None or bool(ipaddress.IPv6Address(found[1]))
    except ValueError:
        return False


def _is_text(value: object) -> bool:
    try:
        check_text(value, "")
    except InvalidKeyError:
        return False
    return True


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_flag(value: Any) -> bool:
    return isinstance(value, bool)


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and _is_number(value) and value >= 1


def _is_fraction(value: Any) -> bool:
    return _is_number(value) and 0 < value <= 1


def _is_duration(value: Any) -> bool:
    number = value.total_seconds() if isinstance(value, timedelta) else value
    return _is_number(number) and 0 < number <= timedelta.max.total_seconds()


def _is_converter(value: object) -> bool:
    return isinstance(value, DataConverter)


def _is_tls(value: object) -> bool:
    if isinstance(value, TLSConfig):
        return (value.client_cert is None) == (value.client_private_key is None)
    return isinstance(value, bool)


def _is_header(value: object) -> bool:
    return isinstance(value, str) and value.isascii() and value.isprintable()


def _is_api_key(value: Any) -> bool:
    return _is_header(value) and value != "" and " " not in value


def _is_metadata(value: object) -> bool:
    return isinstance(value, Mapping) and all(
        isinstance(name, str) and re.fullmatch(r"[0-9a-zA-Z_.-]+", name) and _is_header(text)
        for name, text in cast("Mapping[object, object]", value).items()
    )


_TEXT = (_is_text, "a text of up to 255 bytes, without control characters")
_FRACTION = (_is_fraction, "a fraction over 0 and up to 1, as in 0.8")
_RULES: dict[str, tuple[Callable[[Any], bool], str]] = {
    "temporal_address": (
        _is_address,
        (
            "'host:port' without scheme and path, as in 'localhost:7233' or '[::1]:7233' "
            "(TLS is switched on by tls=True or TEMPORAL_TLS=true)"
        ),
    ),
    "namespace": _TEXT,
    "task_queue": _TEXT,
    "execution": (lambda value: value in get_args(Execution), "'workflow' or 'activity'"),
    "max_concurrent_tasks": (_is_count, "a whole number from 1 on"),
    "target_cpu": _FRACTION,
    "target_memory": _FRACTION,
    "event_loop_per_run": (_is_flag, "True or False"),
    "graceful_shutdown_timeout": (_is_duration, "a time over 0, in seconds or as a timedelta"),
    "data_converter": (_is_converter, "a temporalio.converter.DataConverter"),
    "tls": (
        _is_tls,
        "True, False, or a temporalio.service.TLSConfig (client_cert and client_private_key: both or none)",
    ),
    "api_key": (_is_api_key, "the key as one line of ASCII without spaces"),
    "rpc_metadata": (_is_metadata, "a mapping of header names to values, both of printable ASCII"),
    "identity": _TEXT,
}
_OPTIONAL = {"target_cpu", "target_memory", "tls", "api_key", "identity"}
_SECRET = {"tls", "api_key", "rpc_metadata"}


def _check(name: str, value: Any, source: str = "") -> None:
    is_usable, wanted = _RULES[name]
    if is_usable(value) or (value is None and name in _OPTIONAL):
        return
    shown = "not usable, and not shown" if name in _SECRET else f"{value!r:.100}"
    raise ConfigError(f"{name} is {shown}{f' ({source})' if source else ''}. Give {wanted}.")
