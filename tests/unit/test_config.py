from __future__ import annotations

import inspect
import json
import os
import traceback
from datetime import timedelta

import pytest
from temporalio.client import Client
from temporalio.contrib.pydantic import pydantic_data_converter
from temporalio.converter import DataConverter
from temporalio.service import ConnectConfig, TLSConfig

from temporal_async_task.config import AsyncTaskComponentConfig
from temporal_async_task.errors import ConfigError

KEY = "s3cr3t-key"
ORIGINAL = {  # section 7.1 of the original design, with an endpoint
    "components": {
        "asyncTask": {
            "deploymentType": "local",
            "replicas": 1,
            "host": "localhost",
            "middlewareDependencies": {
                "temporal": {
                    "deploymentType": "container",
                    "use": "temporal",
                    "version": "1.22.0",
                    "replicas": 1,
                    "endpoint": "deploy:7233",
                    "config": {"namespace": "deploy-ns", "taskQueue": "deploy-queue", "webUIPort": 8080},
                }
            },
        }
    }
}


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    """The developer's own variables and ~/.config/temporalio have no part in these tests."""
    for name in list(os.environ):
        if name.startswith(("TEMPORAL_", "ASYNC_TASK_")):
            monkeypatch.delenv(name)
    for name in ("HOME", "XDG_CONFIG_HOME", "APPDATA"):
        monkeypatch.setenv(name, str(tmp_path / "home"))
    return tmp_path / "home"


@pytest.fixture
def toml(tmp_path):
    """Write a TOML file; return the environment that names it."""

    def write(text):
        path = tmp_path / "temporal.toml"
        path.write_text(text)
        return {"TEMPORAL_CONFIG_FILE": str(path)}

    return write


@pytest.fixture
def deploy(tmp_path):
    """Write a deploy file; return its path."""

    def write(content):
        path = tmp_path / "deploy.dev.json"
        path.write_text(content if isinstance(content, str) else json.dumps(content))
        return path

    return write


def async_task(**block):
    return {"components": {"asyncTask": block}}


def temporal(**block):
    return async_task(middlewareDependencies={"temporal": block})


def load(env=None, **arguments):
    return AsyncTaskComponentConfig.load(env=env or {}, **arguments)


def refused(*parts, env=None, **arguments):
    """Loading fails, the message has all the parts, and the key is nowhere in the traceback."""
    with pytest.raises(ConfigError) as caught:
        load(env, **arguments)
    for part in parts:
        assert part in str(caught.value)
    assert KEY not in "".join(traceback.format_exception(caught.value))


# The values


def test_without_arguments_it_is_a_server_on_this_machine():
    config = AsyncTaskComponentConfig()
    assert (config.temporal_address, config.namespace, config.task_queue) == (
        "localhost:7233",
        "default",
        "async-tasks",
    )
    assert (config.max_concurrent_tasks, config.target_cpu, config.target_memory) == (200, None, None)
    assert (config.graceful_shutdown_timeout, config.tls, config.api_key) == (30.0, None, None)
    assert config.data_converter is pydantic_data_converter


def test_it_cannot_be_changed():
    with pytest.raises(AttributeError):
        AsyncTaskComponentConfig().namespace = "other"


def test_a_mapping_that_is_changed_later_does_not_change_it():
    headers = {"x-team": "images"}
    config = AsyncTaskComponentConfig(rpc_metadata=headers)
    headers["x-team"] = "other"
    assert config.rpc_metadata == {"x-team": "images"}


def test_a_timedelta_is_kept_as_seconds():
    config = AsyncTaskComponentConfig(graceful_shutdown_timeout=timedelta(minutes=2))
    assert config.graceful_shutdown_timeout == 120.0
    assert isinstance(config.graceful_shutdown_timeout, float)


@pytest.mark.parametrize(
    "address",
    ["localhost:1", "10.0.0.1:65535", "[::1]:7233", "temporal_dev:7233", "ns.a2dd6.tmprl.cloud:7233"],
)
def test_an_address_is_host_and_port(address):
    assert AsyncTaskComponentConfig(temporal_address=address).temporal_address == address


@pytest.mark.parametrize(
    "address",
    [
        "",
        "localhost",
        "localhost:",
        ":7233",
        "localhost:0",
        "localhost:65536",
        "localhost:http",
        "localhost:7233\n",
        "local host:7233",
        "localhost:7233/path",
        "http://localhost:7233",
        "::1:7233",
        "[zz::]:7233",
        "[::1]",
        "[::::]:7233",
        "user@localhost:7233",
        b"localhost:7233",
        7233,
        None,
    ],
)
def test_other_addresses_are_refused_with_their_form(address):
    with pytest.raises(ConfigError, match="'host:port'") as caught:
        AsyncTaskComponentConfig(temporal_address=address)
    assert repr(address) in str(caught.value)


def test_an_address_with_a_scheme_is_told_how_to_switch_tls_on():
    with pytest.raises(ConfigError, match=r"without scheme .* tls=True or TEMPORAL_TLS=true"):
        AsyncTaskComponentConfig(temporal_address="https://prod.example:7233")


@pytest.mark.parametrize("field", ["namespace", "task_queue", "identity"])
@pytest.mark.parametrize("text", ["", "  ", "a\0b", "a\nb", "\ud800", "x" * 256, "é" * 128, 5, b"a"])
def test_text_that_temporal_cannot_store_is_refused(field, text):
    with pytest.raises(ConfigError, match=f"^{field} is .*255 bytes"):
        AsyncTaskComponentConfig(**{field: text})


def test_255_bytes_of_text_are_taken():
    assert AsyncTaskComponentConfig(task_queue="é" * 127 + "x").task_queue == "é" * 127 + "x"


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("max_concurrent_tasks", 0),
        ("max_concurrent_tasks", 1.5),
        ("max_concurrent_tasks", True),
        ("max_concurrent_tasks", "200"),
        ("graceful_shutdown_timeout", 0),
        ("graceful_shutdown_timeout", -1.0),
        ("graceful_shutdown_timeout", float("nan")),
        ("graceful_shutdown_timeout", float("inf")),
        ("graceful_shutdown_timeout", 10**400),
        ("graceful_shutdown_timeout", timedelta(0)),
        ("graceful_shutdown_timeout", "30"),
        ("graceful_shutdown_timeout", None),
        ("target_cpu", 0),
        ("target_cpu", 80),
        ("target_memory", -0.1),
        ("data_converter", DataConverter),
        ("tls", "true"),
        ("tls", TLSConfig(client_cert=b"cert")),
        ("rpc_metadata", [("a", "b")]),
        ("rpc_metadata", {"a b": "c"}),
        ("rpc_metadata", {"a": 1}),
        ("rpc_metadata", {"a": "b\n"}),
        ("api_key", b"key"),
    ],
)
def test_values_that_cannot_be_used_are_refused_by_their_field(field, value):
    with pytest.raises(ConfigError, match=rf"^{field} is .* Give "):
        AsyncTaskComponentConfig(**{field: value})


def test_slots_by_resource_use_need_both_targets():
    config = AsyncTaskComponentConfig(target_cpu=0.8, target_memory=1)
    assert (config.target_cpu, config.target_memory) == (0.8, 1)
    with pytest.raises(ConfigError, match="target_memory is None"):
        AsyncTaskComponentConfig(target_cpu=0.8)
    with pytest.raises(ConfigError, match="target_cpu is None"):
        AsyncTaskComponentConfig(target_memory=0.8)


# Credentials


def test_no_credential_is_in_the_repr():
    tls = TLSConfig(client_cert=b"cert", client_private_key=KEY.encode())
    config = AsyncTaskComponentConfig(api_key=KEY, rpc_metadata={"authorization": KEY}, tls=tls)
    assert KEY not in repr(config)
    assert "localhost:7233" in repr(config)


@pytest.mark.parametrize("key", [KEY + "\n", KEY + " " + KEY, KEY + "é", KEY.encode()])
def test_a_key_that_cannot_be_sent_is_refused_without_being_shown(key):
    refused("api_key", "argument", api_key=key)


def test_headers_that_cannot_be_sent_are_refused_without_being_shown():
    refused("rpc_metadata", "argument", rpc_metadata={"authorization": KEY + "\n"})


@pytest.mark.parametrize(
    "line",
    [
        f'api_key = "{KEY}',
        f"api_key = {KEY}",
        f'api_key = "{KEY}" x',
        f'api_key = "a"\napi_key = "{KEY}"',
        f'api_key = """{KEY}\n{KEY}',
        f'tls = "{KEY}"',
        f'grpc_meta = "{KEY}, expected {KEY}"',
        f'api_key = ["{KEY}"]',
        f'apikey = "{KEY}"',
    ],
)
def test_a_broken_toml_file_is_named_by_line_without_being_quoted(toml, line):
    refused("temporal.toml, line ", env=toml(f"[profile.default]\n{line}\n"))


def test_a_toml_error_of_an_unforeseen_kind_is_told_by_its_line_only(toml):
    refused("temporal.toml, line 3, column 1: not valid TOML.", env=toml('[profile.a]\napi_key = "b"\napi_key = "c"\n'))


def test_sources_hold_no_credential():
    config = load({"TEMPORAL_API_KEY": KEY, "TEMPORAL_GRPC_META_AUTHORIZATION": KEY})
    assert KEY not in str(config.sources)
    assert config.api_key == KEY


# Where the values come from


def test_arguments_come_before_environment_before_deploy_file_before_profile_before_defaults(toml, deploy):
    env = toml('[profile.default]\naddress = "profile:1"\nnamespace = "profile-ns"\napi_key = "profile-key"\n')
    env |= {"TEMPORAL_ADDRESS": "env:1", "TEMPORAL_TASK_QUEUE": "env-queue"}
    file = deploy(ORIGINAL)
    config = load(env, file=file, temporal_address="argument:1")
    assert config.temporal_address == "argument:1"
    assert config.task_queue == "env-queue"
    assert config.namespace == "deploy-ns"
    assert config.api_key == "profile-key"
    assert config.max_concurrent_tasks == 200
    assert config.sources == {
        "temporal_address": "argument",
        "event_loop_per_run": "default",
        "task_queue": "environment variable TEMPORAL_TASK_QUEUE",
        "execution": "default",
        "namespace": f"file {file} (components.asyncTask.middlewareDependencies.temporal.config.namespace)",
        "api_key": f"profile 'default' in {env['TEMPORAL_CONFIG_FILE']}",
        "max_concurrent_tasks": "default",
        "target_cpu": "default",
        "target_memory": "default",
        "graceful_shutdown_timeout": "default",
        "data_converter": "default",
        "tls": "default",
        "rpc_metadata": "default",
        "identity": "default",
    }


def test_sources_do_not_make_a_difference():
    assert load({"TEMPORAL_NAMESPACE": "ns"}) == AsyncTaskComponentConfig(namespace="ns")


def test_an_argument_of_none_is_not_given():
    assert load({"TEMPORAL_ADDRESS": "env:1"}, temporal_address=None).temporal_address == "env:1"


def test_a_misspelt_argument_is_refused_as_by_any_function():
    with pytest.raises(TypeError, match="'temporal_adress'"):
        load(temporal_adress="a:1")


def test_the_environment_is_the_process_s_own_unless_given(monkeypatch):
    monkeypatch.setenv("TEMPORAL_ADDRESS", "process:1")
    monkeypatch.setenv("TEMPORAL_TASK_QUEUE", "process-queue")
    config = AsyncTaskComponentConfig.load()
    assert (config.temporal_address, config.task_queue) == ("process:1", "process-queue")
    assert load().temporal_address == "localhost:7233"


def test_an_empty_variable_counts_as_unset(toml):
    env = toml('[profile.default]\naddress = "profile:1"\n')
    names = ("ADDRESS", "NAMESPACE", "API_KEY", "TLS", "PROFILE", "TASK_QUEUE")
    config = load(env | {f"TEMPORAL_{name}": "" for name in names} | {"ASYNC_TASK_CONFIG": ""})
    assert config == AsyncTaskComponentConfig(temporal_address="profile:1")


def test_a_bad_variable_is_named():
    refused(
        "temporal_address is 'localhost'",
        "environment variable TEMPORAL_ADDRESS",
        env={"TEMPORAL_ADDRESS": "localhost"},
    )
    refused("task_queue", "TEMPORAL_TASK_QUEUE", env={"TEMPORAL_TASK_QUEUE": "a\nb"})


def test_a_variable_that_is_not_utf_8_is_refused():
    refused("utf-8", env={"TEMPORAL_API_KEY": KEY + "\udcff"})


# TLS, headers


@pytest.mark.parametrize(
    ("env", "scheme"),
    [
        ({}, "http"),
        ({"TEMPORAL_TLS": "true"}, "https"),
        ({"TEMPORAL_API_KEY": KEY}, "https"),
        ({"TEMPORAL_API_KEY": KEY, "TEMPORAL_TLS": "false"}, "http"),
        ({"TEMPORAL_TLS_SERVER_NAME": "prod.example"}, "https"),
    ],
)
def test_tls_is_on_as_temporal_has_it(env, scheme):
    options = load(env).connect_options()
    connect = ConnectConfig(options["target_host"], api_key=options["api_key"], tls=options["tls"])
    assert connect._to_bridge_config().target_url == f"{scheme}://localhost:7233"


def test_connect_takes_the_options():
    config = AsyncTaskComponentConfig(api_key=KEY, rpc_metadata={"x-team": "images"}, identity="me", tls=True)
    arguments = inspect.signature(Client.connect).bind(**config.connect_options()).arguments
    assert arguments == {
        "target_host": "localhost:7233",
        "namespace": "default",
        "api_key": KEY,
        "tls": True,
        "rpc_metadata": {"x-team": "images"},
        "identity": "me",
        "data_converter": pydantic_data_converter,
    }


@pytest.mark.parametrize("switch", ["no", "off", "maybe"])
def test_a_tls_switch_that_envconfig_would_misread_is_refused(switch):
    refused("TEMPORAL_TLS", repr(switch), env={"TEMPORAL_TLS": switch})


def test_certificates_are_read(tmp_path):
    for name in ("ca", "cert", "key"):
        (tmp_path / name).write_text(f"the {name}")
    config = load(
        {
            "TEMPORAL_TLS_SERVER_CA_CERT_PATH": str(tmp_path / "ca"),
            "TEMPORAL_TLS_CLIENT_CERT_PATH": str(tmp_path / "cert"),
            "TEMPORAL_TLS_CLIENT_KEY_PATH": str(tmp_path / "key"),
        }
    )
    assert config.tls == TLSConfig(
        server_root_ca_cert=b"the ca", client_cert=b"the cert", client_private_key=b"the key"
    )
    assert config.sources["tls"] == "environment variable TEMPORAL_TLS..."


def test_a_missing_certificate_is_named():
    refused("/missing.pem", "TEMPORAL_TLS...", env={"TEMPORAL_TLS_SERVER_CA_CERT_PATH": "/missing.pem"})


def test_a_missing_certificate_does_not_matter_where_an_argument_decides():
    assert load({"TEMPORAL_TLS_SERVER_CA_CERT_PATH": "/missing.pem"}, tls=False).tls is False


def test_a_certificate_without_its_key_is_refused():
    refused("client_private_key", "TEMPORAL_TLS...", env={"TEMPORAL_TLS_CLIENT_CERT_DATA": KEY})


def test_a_certificate_given_twice_is_refused():
    env = {"TEMPORAL_TLS_CLIENT_CERT_DATA": KEY, "TEMPORAL_TLS_CLIENT_CERT_PATH": "/cert.pem"}
    refused("TEMPORAL_TLS_CLIENT_CERT_PATH", "TEMPORAL_TLS_CLIENT_CERT_DATA", env=env)


def test_headers_of_environment_and_profile_are_merged(toml):
    env = toml('[profile.default.grpc_meta]\nx-a = "profile"\nx-b = "profile"\nx-c = "profile"\n')
    config = load(env | {"TEMPORAL_GRPC_META_X_B": "env", "TEMPORAL_GRPC_META_X_C": ""})
    assert config.rpc_metadata == {"x-a": "profile", "x-b": "env"}
    assert "TEMPORAL_GRPC_META" in config.sources["rpc_metadata"]
    assert "temporal.toml" in config.sources["rpc_metadata"]


# TOML profiles

PROFILES = '[profile.default]\naddress = "default:1"\n[profile.prod]\naddress = "prod:1"\n'


def test_the_argument_chooses_the_profile_before_the_variable_does(toml):
    env = toml(PROFILES)
    assert load(env).temporal_address == "default:1"
    assert load(env | {"TEMPORAL_PROFILE": "prod"}).temporal_address == "prod:1"
    assert load(env | {"TEMPORAL_PROFILE": "prod"}, profile="default").temporal_address == "default:1"


def test_an_unknown_profile_is_refused_with_those_that_there_are(toml):
    env = toml(PROFILES)
    refused("'prdo'", "temporal.toml", "'default', 'prod'", env=env, profile="prdo")
    refused("'prdo'", "temporal.toml", "'default', 'prod'", env=env | {"TEMPORAL_PROFILE": "prdo"})


def test_a_profile_without_any_file_is_refused():
    refused("'prod'", "TEMPORAL_CONFIG_FILE", profile="prod")


def test_a_missing_toml_file_is_refused(tmp_path):
    refused("/missing.toml", "TEMPORAL_CONFIG_FILE", env={"TEMPORAL_CONFIG_FILE": "/missing.toml"})
    refused(str(tmp_path), "TEMPORAL_CONFIG_FILE", env={"TEMPORAL_CONFIG_FILE": str(tmp_path)})


def test_a_misspelt_key_in_a_named_toml_file_is_refused_with_those_that_are_known(toml):
    refused("line 2", "`adress`", "`address`", env=toml('[profile.default]\nadress = "a:1"\n'))


@pytest.fixture
def default_toml(home):
    """Write the TOML file in Temporal's default place."""
    if os.name != "posix" or os.uname().sysname == "Darwin":
        pytest.skip("the default place is another one here")

    def write(text):
        (home / "temporalio").mkdir(parents=True)
        (home / "temporalio" / "temporal.toml").write_text(text)

    return write


def test_the_default_toml_file_may_hold_what_other_tools_keep_there(default_toml):
    default_toml(PROFILES + f'[profile.prod.oauth]\ntoken = "{KEY}"\n')
    config = load(profile="prod")
    assert config.temporal_address == "prod:1"
    assert config.sources["temporal_address"] == "profile 'prod' in Temporal's default configuration file"


def test_next_to_a_deploy_file_the_default_toml_file_is_read_only_for_a_named_profile(default_toml, deploy):
    default_toml(f'[profile.default]\napi_key = "{KEY}"\ngrpc_meta = {{ x-a = "{KEY}" }}\n')
    file = deploy(ORIGINAL)
    assert load().api_key == KEY
    assert load(file=file).api_key is None
    assert load(file=file, profile="default").api_key == KEY
    assert load({"TEMPORAL_PROFILE": "default"}, file=file).api_key == KEY
    assert load({"TEMPORAL_GRPC_META_X_B": "b"}, file=file).rpc_metadata == {"x-b": "b"}


# Deploy files


def test_the_original_design_s_deploy_file_is_read(deploy):
    config = load(file=deploy(ORIGINAL))
    assert config == AsyncTaskComponentConfig(
        temporal_address="deploy:7233", namespace="deploy-ns", task_queue="deploy-queue"
    )


def test_a_deploy_file_may_set_what_a_worker_takes_on(deploy):
    block = {
        "execution": "activity",
        "maxConcurrentTasks": 20,
        "targetCpu": 0.5,
        "targetMemory": 0.7,
        "gracefulShutdownTimeout": 90,
    }
    assert load(file=deploy(async_task(**block))) == AsyncTaskComponentConfig(
        execution="activity", max_concurrent_tasks=20, target_cpu=0.5, target_memory=0.7, graceful_shutdown_timeout=90
    )


def test_the_environment_may_say_what_carries_the_runs(deploy):
    file = deploy(async_task(execution="workflow"))
    assert load({"ASYNC_TASK_EXECUTION": "activity"}, file=file).execution == "activity"
    assert load({"ASYNC_TASK_EXECUTION": ""}, file=file).execution == "workflow"
    refused("execution", "'fast'", "ASYNC_TASK_EXECUTION", env={"ASYNC_TASK_EXECUTION": "fast"})


def test_the_environment_may_name_the_deploy_file(deploy):
    env = {"ASYNC_TASK_CONFIG": str(deploy(ORIGINAL))}
    assert load(env).temporal_address == "deploy:7233"


def test_a_deploy_file_that_nobody_names_is_not_read(tmp_path, monkeypatch):
    (tmp_path / "config").mkdir()
    (tmp_path / "config" / "deploy.dev.json").write_text(json.dumps(ORIGINAL))
    monkeypatch.chdir(tmp_path)
    assert load().temporal_address == "localhost:7233"


def test_what_belongs_to_others_in_a_deploy_file_is_left_alone(deploy):
    document = temporal(endpoint="deploy:7233")
    document["version"] = 3
    document["components"]["main"] = {"port": 3000}
    document["components"]["asyncTask"]["middlewareDependencies"]["postgres"] = {"any": "thing"}
    assert load(file=deploy(document)).temporal_address == "deploy:7233"


def test_null_in_a_deploy_file_is_not_given(deploy):
    assert load(file=deploy(temporal(endpoint=None, config=None))) == AsyncTaskComponentConfig()


@pytest.mark.parametrize(
    ("document", "parts"),
    [
        (async_task(maxConcurentTasks=5), ("components.asyncTask.maxConcurentTasks", "'maxConcurrentTasks'")),
        (temporal(endpiont="a:1"), ("asyncTask.middlewareDependencies.temporal.endpiont", "'endpoint'")),
        (temporal(config={"taskqueue": "q"}), ("temporal.config.taskqueue", "'taskQueue'")),
        (async_task(middlewareDependencies={"temporall": {}}), ("temporall", "'temporal'")),
        (async_task(middlewareDependency={}), ("middlewareDependency", "'middlewareDependencies'")),
        ({"components": {"asyncTasks": {}}}, ("components.asyncTasks", "'asyncTask'")),
        ({"component": {"asyncTask": {}}}, ("component.", "'components'")),
        (async_task(zzz=1), ("components.asyncTask.zzz", "maxConcurrentTasks, middlewareDependencies")),
    ],
)
def test_a_misspelt_key_in_a_deploy_file_is_refused_with_the_nearest_one(deploy, document, parts):
    refused("deploy.dev.json", *parts, file=deploy(document))


@pytest.mark.parametrize("document", [{}, {"components": {}}, {"components": {"main": {}}}])
def test_a_deploy_file_without_the_component_s_block_is_refused(deploy, document):
    refused("deploy.dev.json", "components.asyncTask", file=deploy(document))


@pytest.mark.parametrize(
    ("document", "place"),
    [
        ([], "The document"),
        ({"components": 1}, "components"),
        ({"components": {"asyncTask": "x"}}, "components.asyncTask"),
        (temporal(config=[]), "temporal.config"),
    ],
)
def test_a_block_that_is_no_object_is_refused(deploy, document, place):
    refused("deploy.dev.json", f"{place} must be a JSON object", file=deploy(document))


def test_a_bad_value_in_a_deploy_file_is_named_with_its_place(deploy):
    file = deploy(async_task(maxConcurrentTasks="20"))
    refused("'20'", f"{file} (components.asyncTask.maxConcurrentTasks)", file=file)


def test_malformed_json_is_named_by_line_and_column(deploy):
    refused("deploy.dev.json", "line 2 column 16", file=deploy('{\n  "components" }'))


def test_a_deploy_file_that_is_not_utf_8_is_refused(tmp_path):
    (tmp_path / "deploy.json").write_bytes(b'{"\xff": 1}')
    refused("deploy.json", "utf-8", file=tmp_path / "deploy.json")


def test_a_byte_order_mark_is_no_obstacle(tmp_path):
    (tmp_path / "deploy.json").write_text(json.dumps(ORIGINAL), encoding="utf-8-sig")
    assert load(file=str(tmp_path / "deploy.json")).namespace == "deploy-ns"


def test_a_missing_deploy_file_is_named():
    refused("missing.json", file="missing.json")
    refused("missing.json", env={"ASYNC_TASK_CONFIG": "missing.json"})


def test_a_toml_file_in_place_of_a_deploy_file_is_told_where_it_belongs(tmp_path):
    (tmp_path / "temporal.toml").write_text(PROFILES)
    refused("TEMPORAL_CONFIG_FILE", file=tmp_path / "temporal.toml")


def test_a_misspelt_key_of_a_toml_file_is_told_with_what_was_meant(toml):
    refused("unknown field `namespce`", "Did you mean 'namespace'?", env=toml('[profile.default]\nnamespce = "shop"\n'))
