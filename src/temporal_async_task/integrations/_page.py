"""The page that shows the runs: three files, served as they are, under the router's own dependencies."""

from __future__ import annotations

from importlib import resources

from starlette.requests import Request
from starlette.responses import RedirectResponse, Response

_FILES = {
    "tasks.css": "text/css; charset=utf-8",
    "tasks.js": "text/javascript; charset=utf-8",
}
# Nothing but these files runs or is loaded, whatever a run's data holds; and no other site may frame the buttons.
_HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src data:; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'; require-trusted-types-for 'script'"
    ),
    "Cache-Control": "no-cache",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}


def page() -> Response:
    """The page itself. All of its links are relative, so it works under any prefix."""
    return _file("page.html", "text/html; charset=utf-8")


def page_file(name: str) -> Response | None:
    """One of its files; None for a name that is none of them."""
    media_type = _FILES.get(name)
    return None if media_type is None else _file(name, media_type)


def to_page(request: Request) -> Response:
    """From the page's address with a slash at its end, where relative links would lead astray."""
    query = f"?{request.url.query}" if request.url.query else ""
    return RedirectResponse(f"../ui{query}")


def _file(name: str, media_type: str) -> Response:
    content = (resources.files("temporal_async_task.integrations") / "page" / name).read_bytes()
    return Response(content, media_type=media_type, headers=_HEADERS)
