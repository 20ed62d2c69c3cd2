"""What ``module:attribute`` leads to, and what is said where it leads nowhere."""

import itertools
import sys
from textwrap import dedent

import pytest

from temporal_async_task.cli.exits import AppError
from temporal_async_task.cli.reference import load_application

_NUMBER = itertools.count()

SHOP = """
    from temporal_async_task import AsyncTaskComponent, async_task

    @async_task
    async def picture(prompt: str) -> str:
        return prompt

    @async_task
    async def report() -> None: ...

    def helper(): ...

    class Integration:
        def create_async_tasks(self):
            return [picture, report]

    class Broken:
        def create_async_tasks(self):
            raise LookupError("no database")

    component = AsyncTaskComponent()
    component.register(picture)
    bare = AsyncTaskComponent()
    tasks = [picture, report]
    integration = Integration()
    broken = Broken()
    nothing = []
    mixed = [picture, helper]
"""


@pytest.fixture
def module(tmp_path, monkeypatch):
    """Writes a module into the current directory, and gives its name, which is new each time."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    before = set(sys.modules)

    def write(text: str = SHOP, name: str = "") -> str:
        name = name or f"shop_{next(_NUMBER)}"
        path = tmp_path / f"{name.replace('.', '/')}.py"
        path.parent.mkdir(exist_ok=True)
        path.write_text(dedent(text))
        return name

    yield write
    for name in set(sys.modules) - before:
        del sys.modules[name]


def refused(reference: str) -> str:
    with pytest.raises(AppError) as caught:
        load_application(reference)
    return str(caught.value)


@pytest.mark.parametrize(
    ("attribute", "names"),
    [
        ("component", ["picture"]),
        ("picture", ["picture"]),
        ("tasks", ["picture", "report"]),
        ("integration", ["picture", "report"]),
    ],
)
def test_a_reference_names_a_component_a_task_a_list_or_an_integration(module, attribute, names):
    app = load_application(f"{module()}:{attribute}")
    assert [task.name for task in app.tasks] == names


def test_a_reference_may_lead_into_a_package_and_an_object(module):
    module("", "package_a.__init__")
    name = module("class holder:\n    import package_a.inner as inner\n", "package_a.outer")
    module(SHOP, "package_a.inner")
    assert [task.name for task in load_application(f"{name}:holder.inner.component").tasks] == ["picture"]


def test_arguments_come_before_what_a_component_says_and_the_rest_stays(module):
    name = module("""
        from temporal_async_task import AsyncTaskComponent, AsyncTaskComponentConfig, async_task

        @async_task
        async def picture(): ...

        component = AsyncTaskComponent(AsyncTaskComponentConfig(namespace="shop", temporal_address="a:1"))
        component.register(picture)
    """)
    config = load_application(f"{name}:component", temporal_address="b:2", namespace=None).component.config
    assert (config.temporal_address, config.namespace) == ("b:2", "shop")
    assert config.sources["temporal_address"] == "argument"
    assert config.sources["namespace"] == f"component {name}:component"
    assert config.sources["task_queue"] == "default"


def test_sources_of_a_component_that_loads_its_configuration_stay(module, monkeypatch):
    monkeypatch.setenv("TEMPORAL_NAMESPACE", "shop")
    name = module("""
        from temporal_async_task import AsyncTaskComponent, AsyncTaskComponentConfig, async_task

        @async_task
        async def picture(): ...

        component = AsyncTaskComponent(AsyncTaskComponentConfig.load())
        component.register(picture)
    """)
    config = load_application(f"{name}:component", temporal_address="b:2").component.config
    assert config.sources["namespace"] == "environment variable TEMPORAL_NAMESPACE"
    assert config.sources["temporal_address"] == "argument"


def test_a_module_that_is_not_there_is_named_with_its_near_miss(module):
    name = module()
    said = refused(f"{name}x:component")
    assert f"There is no module '{name}x' in " in said
    assert f"Did you mean {name}?" in said


def test_a_module_that_is_missing_from_a_package_is_named(module):
    module("", "package_b.__init__")
    module(SHOP, "package_b.tasks")
    assert refused("package_b.task:component") == (
        "There is no module 'package_b.task' in package 'package_b'. Did you mean package_b.tasks?"
    )
    name = module()
    assert f"no module '{name}.tasks' in '{name}', which is a module and no package" in refused(f"{name}.tasks:x")


def test_an_attribute_that_is_not_there_is_named_with_what_is(module):
    name = module()
    said = refused(f"{name}:compnent")
    assert "has no attribute 'compnent'. Did you mean 'component'?" in said
    assert f"{name}:picture (a task)" in said
    assert f"{name}:component (a component)" in said
    assert f"{name}:tasks (tasks)" in said
    assert f"{name}:integration (an Integration)" in said
    assert f"{name}:helper" not in said


def test_a_module_alone_is_told_what_could_be_named(module):
    name = module()
    said = refused(name)
    assert said.startswith(f"'{name}' names a module, and no attribute of it.")
    assert f"{name}:component (a component)" in said


@pytest.mark.parametrize(
    ("attribute", "said"),
    [
        ("helper", "is a function."),
        ("Integration", "is the class Integration."),
        ("nothing", "has no task in it."),
        ("mixed", "has a function in it, which is not a task: decorate it with @async_task."),
        ("bare", "has no task: register one with component.register(task)."),
    ],
)
def test_what_has_no_tasks_is_told_as_what_it_is(module, attribute, said):
    assert said in refused(f"{module()}:{attribute}")


@pytest.mark.parametrize("reference", ["shop.py:component", "./shop.py:component"])
def test_a_path_is_not_a_module(reference):
    assert "Name the module, as in shop:component." in refused(reference)


@pytest.mark.parametrize("reference", [":component", "a b:c", "shop-1:component", "..:x", "1:2"])
def test_what_is_no_reference_at_all_is_refused(reference):
    assert "is not module:attribute, as in shop:component." in refused(reference)


def test_the_application_s_own_error_is_told_by_its_last_line_in_the_application(module):
    helper = module("""
        import json

        def read(text):
            return json.loads(text)
    """)
    name = module(f"from {helper} import read\nsettings = read('[')\n")
    said = refused(f"{name}:component")
    assert said.startswith(f"Module '{name}' cannot be imported: it raises\n")
    assert f'{helper}.py", line 5, in read\n    return json.loads(text)\n' in said
    assert "JSONDecodeError" in said
    assert "temporal_async_task" not in said


def test_an_error_of_this_library_is_told_by_the_line_that_called_it(module):
    name = module("""
        from temporal_async_task import async_task

        @async_task(timeout=-1)
        async def picture(): ...
    """)
    said = refused(f"{name}:picture")
    assert f'{name}.py", line 4, in <module>\n    @async_task(timeout=-1)\n' in said
    assert "timeout of task 'picture' must be over 0 seconds, not -1." in said


def test_a_module_that_the_application_misses_is_its_own_error(module):
    name = module("import no_such_library\n")
    said = refused(f"{name}:component")
    assert "line 1, in <module>\n    import no_such_library\n" in said
    assert "No module named 'no_such_library'" in said


def test_a_syntax_error_is_told_with_its_place(module):
    said = refused(f"{module('def picture(:')}:picture")
    assert "line 1" in said
    assert "SyntaxError" in said


def test_a_module_that_exits_is_not_the_end_of_the_command(module):
    assert "it exits by itself" in refused(f"{module('raise SystemExit(3)')}:component")


def test_an_integration_that_fails_is_told_by_its_line(module):
    name = module()
    said = refused(f"{name}:broken")
    assert said.startswith(f"The integration {name}:broken cannot create its tasks: it raises\n")
    assert "LookupError: no database" in said


def test_two_tasks_with_one_name_are_refused(module):
    name = module("""
        from temporal_async_task import async_task

        def make():
            @async_task(name="same")
            async def one(): ...
            return one

        tasks = [make(), make()]
    """)
    assert f"{name}:tasks cannot be used: Two tasks are named 'same'" in refused(f"{name}:tasks")
