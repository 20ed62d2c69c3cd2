"""The page, as somebody sees it who uses it: in headless Chromium."""

import json
import os
import re
import secrets
import shutil
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Annotated, Any

import pytest
from fastapi import Depends, FastAPI, HTTPException
from fastapi.security import HTTPBasic, HTTPBasicCredentials
from playwright.async_api import Browser, Page, async_playwright, expect

import web
from support import App, status_when
from temporal_async_task import TaskStatus
from temporal_async_task.integrations.fastapi import create_task_router

pytestmark = pytest.mark.services

FLAGS = [
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
]  # fmt: skip
IMAGES = os.environ.get("SAVE_SCREENSHOTS")
"""A directory for the pictures of docs/web.md: `SAVE_SCREENSHOTS=docs/images`."""
PATIENCE = 20_000
"""Milliseconds."""
LOGIN = HTTPBasic()


def user(credentials: Annotated[HTTPBasicCredentials, Depends(LOGIN)]) -> str:
    if not secrets.compare_digest(credentials.password, "open sesame"):
        raise HTTPException(401, headers={"WWW-Authenticate": "Basic"})
    return credentials.username


@pytest.fixture(scope="module")
async def browser() -> AsyncIterator[Browser]:
    chromium = shutil.which("chromium")
    assert chromium, "The tests of the page need Chromium: apt-get install chromium"
    async with async_playwright() as playwright:
        browser = await playwright.chromium.launch(executable_path=chromium, args=FLAGS)
        yield browser
        await browser.close()


class Visit:
    """The page, open in a browser, with all that went wrong in it."""

    def __init__(self, page: Page) -> None:
        self.page = page
        self.wrong: list[str] = []
        page.set_default_timeout(PATIENCE)
        page.on("console", lambda message: self.wrong.append(message.text) if message.type == "error" else None)
        page.on("pageerror", lambda error: self.wrong.append(str(error)))

    async def submit(self, task: str, params: Any, *, picture: str = "") -> None:
        await self.page.get_by_role("button", name="New run").click()
        await self.page.locator("#submit-task").select_option(task)
        await self.page.locator("#params").fill(json.dumps(params, indent=2))
        await self.picture(picture)
        await self.page.get_by_role("button", name="Submit").click()
        await expect(self.page.locator("dialog")).to_be_hidden(timeout=PATIENCE)

    async def shows(self, *texts: str) -> None:
        for text in texts:
            await expect(self.page.locator("#run")).to_contain_text(text, timeout=PATIENCE)

    async def stands(self, status: str) -> None:
        await expect(self.page.locator("#run .head .badge")).to_have_text(status, timeout=PATIENCE)

    async def press(self, name: str) -> None:
        await self.page.locator("#run").get_by_role("button", name=name).click()

    async def picture(self, name: str) -> None:
        if IMAGES and name:
            await self.page.screenshot(path=Path(IMAGES) / f"page-{name}.png")


@pytest.fixture
def tasks() -> list[Any]:
    web.gate.clear()
    return web.picture_tasks()


@pytest.fixture
async def visit(app: App, tasks: list[Any], browser: Browser) -> AsyncIterator[Visit]:
    """The page under a prefix and behind a login."""
    await app.start(*tasks)
    web_app = FastAPI()
    web_app.include_router(create_task_router(tasks, dependencies=[Depends(user)]), prefix="/shop/api")
    async with web.serving(web_app) as address:
        context = await browser.new_context(
            http_credentials={"username": "ada", "password": "open sesame"},
            viewport={"width": 1080, "height": 600},
            locale="en-GB",
        )
        page = await context.new_page()
        visit = Visit(page)
        await page.goto(f"{address}/shop/api/tasks/ui")
        await expect(page.locator("#submit-task option")).to_have_count(len(tasks), timeout=PATIENCE)
        yield visit
        await context.close()


async def test_a_run_is_submitted_and_its_steps_are_seen_as_they_go(visit: Visit):
    await visit.submit("product_shot", {"prompt": "cup", "size": 512}, picture="submit")
    await visit.stands("processing")
    await visit.shows("generate", "Rendering cup")
    await expect(visit.page.locator(".steps li.running")).to_contain_text("generate", timeout=PATIENCE)
    await visit.picture("running")
    await visit.stands("completed")
    await visit.shows("settle", "upload", '"url": "https://images.example/cup"')
    await visit.picture("completed")
    assert await visit.page.locator(".steps li .bar .time").count() == 3
    await expect(visit.page.locator("#runs [aria-current=true] .badge")).to_have_text("completed", timeout=PATIENCE)
    assert visit.wrong == []


async def test_a_run_is_cancelled(visit: Visit, tasks: list[Any]):
    await visit.submit("approval", {"prompt": "cup"})
    await visit.shows("approved")
    await visit.press("Cancel")
    await visit.stands("failed")
    await visit.shows("TaskCancelledError")
    assert visit.wrong == []


async def test_a_failed_run_is_resumed_and_what_it_holds_is_text(visit: Visit):
    """The step's error is HTML, which would change the page's title if it were taken for such."""
    await visit.submit("mended_later", "<script>document.title='broken'</script>")
    await visit.stands("failed")
    await visit.shows("StepFailedError", "<img src=x onerror=document.title='broken'>")
    await visit.page.emulate_media(color_scheme="dark")
    await visit.picture("failed-dark")
    assert await visit.page.locator("#run img, #run script").count() == 0
    web.gate.set()
    await visit.press("Resume")
    await visit.stands("completed")
    await visit.shows('"mended"')
    assert await visit.page.title() == "Tasks"
    assert visit.wrong == []


async def test_a_run_that_is_elsewhere_begun_comes_into_the_list_and_is_reached_by_its_address(
    visit: Visit, tasks: list[Any]
):
    task_id = await tasks[-1].submit({"<b>": "</pre><b>"}, task_id="orders/1 <b>#?")
    await status_when(tasks[-1], task_id, lambda run: run.status is TaskStatus.COMPLETED)
    row = visit.page.locator("#runs button", has_text="orders/1 <b>#?")
    await row.click()
    await visit.shows('"<b>": "</pre><b>"')
    await visit.page.reload()
    await visit.shows('"<b>": "</pre><b>"')
    await visit.page.locator("#status").select_option("failed")
    await expect(row).to_have_count(0, timeout=PATIENCE)
    assert visit.wrong == []


async def test_params_that_do_not_fit_are_told_in_the_form(visit: Visit):
    await visit.page.get_by_role("button", name="New run").click()
    await visit.page.locator("#submit-task").select_option("product_shot")
    assert json.loads(await visit.page.locator("#params").input_value()) == {"prompt": "", "size": 512}
    for params, problem in (("{", "not JSON"), ('{"size": 1}', "/prompt: Field required")):
        await visit.page.locator("#params").fill(params)
        await visit.page.get_by_role("button", name="Submit").click()
        await expect(visit.page.locator("#submit-problem")).to_contain_text(problem, timeout=PATIENCE)


async def test_the_page_loads_nothing_from_elsewhere_and_lets_nothing_else_run(tasks: list[Any]):
    web_app = FastAPI()
    web_app.include_router(create_task_router(tasks, public=True))
    async with web.client_of(web_app) as client:
        page = await client.get("/tasks/ui")
        policy = page.headers["content-security-policy"]
        assert "default-src 'none'" in policy
        assert "unsafe" not in policy
        for name in re.findall(r'(?:src|href)="(ui/[^"]+)"', page.text):
            file = await client.get(f"/tasks/{name}")
            assert file.status_code == 200
            assert not re.search(r"https?://(?!www\.w3\.org/2000/svg)", file.text)
            assert "innerHTML" not in file.text
        assert (await client.get("/tasks/ui/../fastapi.py")).status_code == 404
        assert (await client.get("/tasks/ui/page.html")).status_code == 404
        assert (await client.get("/tasks/ui/", follow_redirects=True)).text == page.text


async def test_the_page_can_be_left_out(tasks: list[Any]):
    web_app = FastAPI()
    web_app.include_router(create_task_router(tasks, public=True, ui=False))
    async with web.client_of(web_app) as client:
        assert (await client.get("/tasks/ui")).status_code == 404
