"""The real HTTP clients against a real server: are their errors understood?"""

import http.client
import importlib
import inspect
import io
import shutil
import socket
import ssl
import struct
import subprocess
import threading
import urllib.error
import urllib.request
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, urlsplit

import aiohttp
import httpx
import pytest
import requests
import urllib3

from temporal_async_task import http_errors
from temporal_async_task.retry import RetryDecision, RetryPolicy, decide

EXACT = RetryPolicy(jitter=0)  # after the first failure: 1 s
PATIENT = 10.0  # for requests that are answered; a loaded machine may take its time

SERVER_DATE = "Tue, 01 Jan 2030 12:00:00 GMT"  # the server's clock is far from ours
IN_90_SECONDS = "Tue, 01 Jan 2030 12:01:30 GMT"


# The clients: each makes a GET request, reads the answer and raises the client's own error. ---------------


def httpx_sync(url, wait=PATIENT):
    with httpx.Client(timeout=wait, follow_redirects=True) as client:
        client.get(url).raise_for_status()


async def httpx_async(url, wait=PATIENT):
    async with httpx.AsyncClient(timeout=wait, follow_redirects=True) as client:
        (await client.get(url)).raise_for_status()


def with_requests(url, wait=PATIENT):
    with requests.Session() as session:
        session.get(url, timeout=wait).raise_for_status()


async def with_aiohttp(url, wait=PATIENT):
    async with (
        aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(sock_read=wait)) as session,
        session.get(url, raise_for_status=True) as response,
    ):
        await response.read()


async def with_aiohttp_in_all(url, wait=PATIENT):
    async with (
        aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=wait)) as session,
        session.get(url) as response,
    ):
        response.raise_for_status()
        await response.read()


def with_urllib(url, wait=PATIENT):
    with urllib.request.urlopen(url, timeout=wait) as response:  # noqa: S310 - the URLs are this file's
        response.read()


def with_urllib3(url, wait=PATIENT):
    """urllib3 raises for a status only where it was told to retry it, and has given up."""
    retries = urllib3.Retry(0, status_forcelist=range(400, 600), respect_retry_after_header=False)
    with urllib3.PoolManager(retries=retries, timeout=wait) as pool:
        pool.request("GET", url)


def with_urllib3_unwrapped(url, wait=PATIENT):
    with urllib3.PoolManager(retries=False, timeout=wait) as pool:
        pool.request("GET", url)


RAISING_WITH_HEADERS = [
    httpx_sync,
    httpx_async,
    with_requests,
    with_aiohttp,
    with_aiohttp_in_all,
    with_urllib,
]
RAISING = [*RAISING_WITH_HEADERS, with_urllib3]
ALL = [*RAISING, with_urllib3_unwrapped]


async def failure(client, url, **options):
    """The error that the request ends with."""
    try:
        made = client(url, **options)
        if inspect.isawaitable(made):
            await made
    except Exception as error:
        if isinstance(error, urllib.error.HTTPError):
            error.close()  # it holds the connection
        return error
    pytest.fail("the request succeeded")


async def decision(client, url, **options):
    """What is decided on the error that the request ends with."""
    return decide(await failure(client, url, **options), EXACT, 1)


# The server ----------------------------------------------------------------------------------------------


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self):
        url = urlsplit(self.path)
        query = {name: values[0] for name, values in parse_qs(url.query).items()}
        getattr(self, url.path.strip("/"))(**query)

    def answer(self, status, retry_after=None, date=SERVER_DATE, location=None):
        self.send_response_only(int(status))
        self.send_header("Date", date)
        self.send_header("Content-Length", "0")
        if retry_after:
            self.send_header("Retry-After", retry_after)
        if location:
            self.send_header("Location", location)
        self.end_headers()

    def circle(self):
        self.answer(302, location="/circle")

    def part(self):
        """The beginning of an answer, and then nothing more."""
        self.send_response(200)
        self.send_header("Content-Length", "1000")
        self.end_headers()
        self.wfile.write(b"the beginning")
        self.wfile.flush()
        self.close_connection = True

    def reset(self):
        """The connection is reset in the middle of the body."""
        self.part()
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.connection.close()

    def part_of_chunks(self):
        self.send_response(200)
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        self.wfile.write(b"5\r\nthe b")
        self.close_connection = True

    def nothing(self):
        self.close_connection = True

    def garbage(self):
        self.wfile.write(b"this is not HTTP\r\n\r\n")
        self.close_connection = True

    def silence(self):
        self.server.over.wait(PATIENT)
        self.close_connection = True

    def log_message(self, *args):
        pass


class Server(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.over = threading.Event()

    def handle_error(self, request, client_address):
        pass  # a handler that has closed its own connection, or whose client has gone


def serve(server):
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield server.server_address[1]
    server.over.set()
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture(scope="module")
def port():
    yield from serve(Server())


@pytest.fixture(scope="module")
def base(port):
    return f"http://127.0.0.1:{port}"


@pytest.fixture(autouse=True)
def _no_proxy(monkeypatch):
    monkeypatch.setenv("NO_PROXY", "*")
    monkeypatch.setenv("no_proxy", "*")


# Statuses ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("client", RAISING)
@pytest.mark.parametrize("status", [400, 401, 404, 409])
@pytest.mark.parametrize("retry_after", ["", "7"])
async def test_a_refusal_is_final_whatever_its_retry_after_says(base, client, status, retry_after):
    decided = await decision(client, f"{base}/answer?status={status}&retry_after={retry_after}")
    assert decided == RetryDecision(retry=False, delay=0, reason=f"HTTP {status}")


@pytest.mark.parametrize("client", RAISING)
@pytest.mark.parametrize("status", [408, 425, 429, 500, 502, 503, 504])
async def test_a_temporary_status_is_retried_after_the_backoff(base, client, status):
    decided = await decision(client, f"{base}/answer?status={status}")
    assert decided == RetryDecision(retry=True, delay=1, reason=f"HTTP {status}")


@pytest.mark.parametrize("client", RAISING_WITH_HEADERS)
@pytest.mark.parametrize("status", [408, 425, 429, 500, 502, 503, 504])
async def test_a_temporary_status_is_retried_after_the_seconds_of_its_retry_after(base, client, status):
    decided = await decision(client, f"{base}/answer?status={status}&retry_after=7")
    assert decided == RetryDecision(retry=True, delay=7, reason=f"HTTP {status}")


@pytest.mark.parametrize("client", RAISING_WITH_HEADERS)
@pytest.mark.parametrize("status", [408, 425, 429, 500, 502, 503, 504])
async def test_a_retry_after_date_is_read_by_the_server_s_clock(base, client, status):
    decided = await decision(client, f"{base}/answer?status={status}&retry_after={IN_90_SECONDS.replace(' ', '+')}")
    assert decided == RetryDecision(retry=True, delay=90, reason=f"HTTP {status}")


@pytest.mark.parametrize("client", RAISING_WITH_HEADERS)
@pytest.mark.parametrize("header", ["soon", "0", "-1", "Tue,+01+Jan+2030+11:00:00+GMT"])
async def test_a_retry_after_that_is_malformed_or_past_leaves_the_backoff(base, client, header):
    decided = await decision(client, f"{base}/answer?status=503&retry_after={header}")
    assert decided == RetryDecision(retry=True, delay=1, reason="HTTP 503")


@pytest.mark.parametrize("client", RAISING)
async def test_an_endless_redirect_is_not_tried_again(base, client):
    assert not (await decision(client, f"{base}/circle")).retry


@pytest.mark.parametrize("client", RAISING)
async def test_a_vendor_s_own_error_is_judged_by_the_http_error_it_was_raised_from(base, client):
    class VendorError(Exception):
        pass

    async def reason(status):
        error = VendorError("the vendor failed")
        error.__cause__ = await failure(client, f"{base}/answer?status={status}")
        return decide(error, EXACT, 1).reason

    assert [await reason(404), await reason(503)] == ["HTTP 404", "HTTP 503"]


@pytest.mark.parametrize(("status", "retry"), [(404, False), (503, True)])
def test_an_error_made_by_hand_without_headers_is_understood_too(status, retry):
    errors = [
        aiohttp.ClientResponseError(request_info=None, history=(), status=status),
        urllib.error.HTTPError("http://example.com/", status, "made by hand", None, io.BytesIO()),
        httpx.HTTPStatusError("", request=httpx.Request("GET", "/"), response=httpx.Response(status)),
    ]
    assert [decide(error, EXACT, 1) for error in errors] == [
        RetryDecision(retry=retry, delay=float(retry), reason=f"HTTP {status}")
    ] * 3
    errors[1].close()


async def test_a_good_status_with_a_body_that_is_not_json_is_retried(base):
    async with aiohttp.ClientSession() as session, session.get(f"{base}/answer?status=200") as response:
        with pytest.raises(aiohttp.ContentTypeError) as caught:
            await response.json()
    assert caught.value.status == 200
    assert decide(caught.value, EXACT, 1).retry


# The network ---------------------------------------------------------------------------------------------

NETWORK_ERROR = RetryDecision(retry=True, delay=1, reason="network error")


@pytest.mark.parametrize("client", ALL)
async def test_a_refused_connection_is_retried(client):
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    assert await decision(client, f"http://127.0.0.1:{port}/") == NETWORK_ERROR


@pytest.mark.parametrize("client", ALL)
@pytest.mark.parametrize("path", ["nothing", "part", "part_of_chunks", "reset"])
async def test_a_connection_that_breaks_before_the_answer_is_complete_is_retried(base, client, path):
    assert await decision(client, f"{base}/{path}") == NETWORK_ERROR


@pytest.mark.parametrize("client", ALL)
async def test_a_read_timeout_is_retried(base, client):
    assert await decision(client, f"{base}/silence", wait=0.05) == NETWORK_ERROR


@pytest.mark.parametrize("client", ALL)
async def test_an_answer_that_is_not_http_is_retried_and_not_taken_for_a_400(base, client):
    assert (await decision(client, f"{base}/garbage")).retry


@pytest.mark.parametrize("client", ALL)
async def test_a_host_name_that_does_not_resolve_just_now_is_retried(client, monkeypatch):
    def unresolved(*args, **kwargs):
        raise socket.gaierror(socket.EAI_AGAIN, "Temporary failure in name resolution")

    monkeypatch.setattr(socket, "getaddrinfo", unresolved)
    assert await decision(client, "http://api.example/") == NETWORK_ERROR


@pytest.mark.parametrize(
    "error",
    [
        aiohttp.ServerDisconnectedError(),
        http.client.BadStatusLine("line"),
        httpx.PoolTimeout("no free connection"),
        requests.ConnectionError(),
        requests.Timeout(),
        requests.exceptions.ChunkedEncodingError(),
        socket.herror(),
        urllib.error.URLError("no answer"),
        urllib3.exceptions.IncompleteRead(1, 2),
        urllib3.exceptions.ProtocolError("broken"),
        urllib3.exceptions.ProxyError("broken", OSError()),
        urllib3.exceptions.SSLError("broken"),
        urllib3.exceptions.TimeoutError(),
    ],
    ids=repr,
)
def test_network_errors_that_are_hard_to_provoke_are_retried_too(error):
    assert decide(error, EXACT, 1) == NETWORK_ERROR


# Requests that cannot work -------------------------------------------------------------------------------

CANNOT_WORK = RetryDecision(retry=False, delay=0, reason="request that cannot work")


@pytest.mark.parametrize(
    ("client", "url"),
    [
        *((httpx_sync, url) for url in ("example.com/", "ftp://example.com/", "http://[::1", "http://:99999")),
        *((httpx_async, url) for url in ("example.com/", "ftp://example.com/", "http://[::1", "http://:99999")),
        *((with_requests, url) for url in ("example.com/", "ftp://example.com/", "http://[::1", "http://")),
        *((with_aiohttp, url) for url in ("example.com/", "ftp://example.com/", "http://[::1", "http://")),
        *((with_urllib3, url) for url in ("ftp://example.com/", "http://[::1")),
        (with_urllib, "http://127.0.0.1:port/"),
        (with_urllib, "http://127.0.0.1/a b"),
    ],
)
async def test_a_bad_url_is_not_tried_again(client, url):
    assert await decision(client, url) == CANNOT_WORK


@pytest.mark.parametrize(
    "error",
    [
        aiohttp.ServerFingerprintMismatch(b"expected", b"got", "127.0.0.1", 443),
        httpx.CookieConflict("two of a name"),
        httpx.LocalProtocolError("illegal header"),
        httpx.ResponseNotRead(),
        requests.TooManyRedirects(),
        requests.URLRequired(),
        requests.exceptions.InvalidHeader(),
        requests.exceptions.UnrewindableBodyError(),
        urllib3.exceptions.ProxySchemeUnsupported(),
        urllib3.exceptions.UnrewindableBodyError(),
    ],
    ids=repr,
)
def test_slips_in_the_use_of_a_client_are_not_tried_again(error):
    assert decide(error, EXACT, 1) == CANNOT_WORK


@pytest.fixture(scope="module")
def tls_port(tmp_path_factory):
    openssl = shutil.which("openssl")
    if openssl is None:
        pytest.skip("openssl, which makes the certificate, is not installed")
    folder = tmp_path_factory.mktemp("tls")
    command = [
        openssl,
        "req",
        "-x509",
        "-newkey",
        "rsa:2048",
        "-nodes",
        "-days",
        "1",
        "-subj",
        "/CN=localhost",
    ]
    files = ["-keyout", folder / "key.pem", "-out", folder / "cert.pem"]
    subprocess.run([*command, *files], check=True, capture_output=True)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(folder / "cert.pem", folder / "key.pem")
    server = Server()
    server.socket = context.wrap_socket(server.socket, server_side=True)
    yield from serve(server)


@pytest.mark.parametrize("client", ALL)
async def test_a_certificate_that_does_not_verify_is_not_tried_again(client, tls_port):
    assert await decision(client, f"https://127.0.0.1:{tls_port}/") == CANNOT_WORK


# The tables ----------------------------------------------------------------------------------------------

MODULES = {
    "aiohttp": ["aiohttp", "aiohttp.client_exceptions"],
    "builtins": ["builtins"],
    "http": ["http.client"],
    "httpx": ["httpx"],
    "requests": ["requests.exceptions"],
    "socket": ["socket"],
    "ssl": ["ssl"],
    "urllib": ["urllib.error"],
    "urllib3": ["urllib3.exceptions"],
}


@pytest.mark.parametrize("name", sorted(http_errors._HOPELESS | http_errors._NETWORK | http_errors._HAS_STATUS))
def test_each_name_in_the_tables_is_an_exception_of_the_library_as_installed(name):
    package, _, cls = name.partition(".")
    modules = [importlib.import_module(module) for module in MODULES[package]]
    found = next(getattr(module, cls) for module in modules if hasattr(module, cls))
    assert issubclass(found, Exception)
    assert name in http_errors._kinds(found.__new__(found))
