"""Fetching what users and vendors point at, without being made to fetch anything else.

Only from configured hosts, and not from private addresses, at each redirect anew; the address that was checked is the
one that is connected to, so a name that resolves to another one meanwhile (DNS rebinding) is of no use.
"""

import asyncio
import ipaddress
import socket
import ssl
from collections.abc import Callable
from dataclasses import dataclass

import httpx

from temporal_async_task import NonRetryableError

MAX_REDIRECTS = 3
TIMEOUT = httpx.Timeout(15.0, connect=10.0)
_TLS = ssl.create_default_context()
_PORTS = {"http": 80, "https": 443}
_GONE = {401, 403, 404, 410}
_GLOBAL_UNICAST = ipaddress.ip_network("2000::/3")
_SIX_TO_FOUR = ipaddress.ip_network("2002::/16")


class DownloadRefusedError(NonRetryableError):
    """What is asked for may not be fetched, or is not there."""


@dataclass(frozen=True)
class Downloads:
    """Fetches from some hosts only.

    Args:
        hosts: ``host`` (its default ports), ``host:port``, or ``.domain`` for every host below it.
        private_addresses: Whether these hosts may have private addresses.
    """

    hosts: tuple[str, ...]
    private_addresses: bool = False

    def check(self, url: str | httpx.URL) -> httpx.URL:
        """The address, if it may be asked for.

        Raises:
            DownloadRefusedError: It may not.
        """
        try:
            parsed = httpx.URL(url)
        except (httpx.InvalidURL, TypeError, ValueError):
            raise DownloadRefusedError("This is no address of a picture: it cannot be read.") from None
        if parsed.scheme not in _PORTS or not parsed.host:
            raise DownloadRefusedError("The address must begin with http:// or https:// and a host.")
        if parsed.userinfo:
            raise DownloadRefusedError("The address must not hold a user's name or password.")
        if not self._is_allowed(parsed):
            raise DownloadRefusedError(
                f"Nothing is fetched from {parsed.netloc.decode()}: it is not among the configured hosts "
                f"({', '.join(self.hosts) or 'none'})."
            )
        return parsed

    async def fetch(self, url: str, *, max_bytes: int, deadline: float) -> bytes:
        """What is at an address. See ``download``."""
        data = bytearray()
        await self.download(url, data.extend, max_bytes=max_bytes, deadline=deadline)
        return bytes(data)

    async def download(self, url: str, write: Callable[[bytes], object], *, max_bytes: int, deadline: float) -> None:
        """Write what is at an address, piece by piece.

        Args:
            url: The address.
            write: Called with each piece.
            max_bytes: More is refused as soon as it arrives.
            deadline: Seconds that all of it may take.

        Raises:
            DownloadRefusedError: It may not be fetched, is too large, or is not there.
            TimeoutError: It took too long.
            httpx.HTTPError: The server did not answer, or with an error that may pass.
        """
        try:
            async with asyncio.timeout(deadline):
                await self._download(self.check(url), write, max_bytes)
        except TimeoutError:
            raise TimeoutError(f"{_shown(url)} was not fetched within {deadline:g} s.") from None
        except httpx.TimeoutException as error:  # which has no message
            raise type(error)(f"{_shown(url)} does not answer.", request=error.request) from None

    def _is_allowed(self, url: httpx.URL) -> bool:
        host = url.host.lower()
        if url.port is not None and url.port != _PORTS[url.scheme]:
            return f"{host}:{url.port}" in self.hosts
        return any(host == one or (one.startswith(".") and host.endswith(one)) for one in self.hosts)

    async def _download(self, url: httpx.URL, write: Callable[[bytes], object], max_bytes: int) -> None:
        # No proxies: they would look names up by themselves. No content encodings: a few bytes may hide gigabytes.
        async with httpx.AsyncClient(timeout=TIMEOUT, verify=_TLS, trust_env=False) as client:
            for _ in range(MAX_REDIRECTS + 1):
                response = await self._get(client, url)
                try:
                    if not response.is_redirect:
                        await _write(response, url, write, max_bytes)
                        return
                    url = self.check(_target(url, response))
                finally:
                    await response.aclose()
        raise DownloadRefusedError(f"{_shown(url)} was redirected more than {MAX_REDIRECTS} times.")

    async def _get(self, client: httpx.AsyncClient, url: httpx.URL) -> httpx.Response:
        """Ask one of the host's addresses, after all of them were checked."""
        failed: Exception | None = None
        for address in await self._addresses(url):
            request = client.build_request(
                "GET",
                url.copy_with(host=address),
                headers={"Host": url.netloc.decode(), "Accept-Encoding": "identity", "Accept": "image/*, video/*"},
                extensions={"timeout": TIMEOUT.as_dict(), "sni_hostname": url.host},
            )
            try:
                return await client.send(request, stream=True, follow_redirects=False)
            except (httpx.ConnectError, httpx.ConnectTimeout) as error:
                failed = error
        raise failed or httpx.ConnectError(f"{url.host} has no address")

    async def _addresses(self, url: httpx.URL) -> list[str]:
        loop = asyncio.get_running_loop()
        port = url.port or _PORTS[url.scheme]
        try:
            found = await loop.getaddrinfo(url.host, port, type=socket.SOCK_STREAM)
        except UnicodeError:
            raise DownloadRefusedError(f"{url.host!r:.100} is no name of a host.") from None
        addresses = list(dict.fromkeys(str(info[4][0]) for info in found))
        if not self.private_addresses and not all(map(is_public, addresses)):
            raise DownloadRefusedError(f"Nothing is fetched from {url.host}: it has a private address.")
        return addresses


def is_public(address: str) -> bool:
    """Whether an IP address is one of the internet's, and none that stands for another one."""
    ip = ipaddress.ip_address(address)
    if ip.version == 6:  # noqa: PLR2004
        # Outside of this are mapped IPv4, NAT64, local and multicast addresses; 6to4 is inside.
        return ip in _GLOBAL_UNICAST and ip not in _SIX_TO_FOUR and ip.is_global
    return ip.is_global and not ip.is_multicast


async def _write(response: httpx.Response, url: httpx.URL, write: Callable[[bytes], object], max_bytes: int) -> None:
    if response.status_code in _GONE:
        raise DownloadRefusedError(f"{_shown(url)} answers {response.status_code}: it is not there (any more).")
    if not response.is_success:
        raise httpx.HTTPStatusError(
            f"{_shown(url)} answers {response.status_code}.", request=response.request, response=response
        )
    if response.headers.get("content-encoding", "identity") != "identity":
        raise DownloadRefusedError(f"{_shown(url)} is compressed, though that was not asked for.")
    too_large = DownloadRefusedError(f"{_shown(url)} is over {max_bytes:,} bytes.")
    announced = response.headers.get("content-length", "")
    if announced.isdecimal() and int(announced) > max_bytes:
        raise too_large
    size = 0
    async for chunk in response.aiter_raw():
        size += len(chunk)
        if size > max_bytes:
            raise too_large
        write(chunk)


def _target(url: httpx.URL, response: httpx.Response) -> httpx.URL:
    try:
        return url.join(response.headers["location"])
    except (httpx.InvalidURL, ValueError):
        raise DownloadRefusedError(f"{_shown(url)} is redirected to no address.") from None


def _shown(url: str | httpx.URL) -> str:
    """An address for messages: without its query, which may hold a signature."""
    parsed = httpx.URL(url)
    return f"{parsed.scheme}://{parsed.netloc.decode()}{parsed.path}"[:200]
