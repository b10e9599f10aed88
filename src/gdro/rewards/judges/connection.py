"""HTTP to a judge's server: the environment's proxy and certificates, replies of bounded size, the key masked.

httpx would read the same variables, but raises one of a dozen exceptions for a value it cannot use.
"""

import asyncio
import html
import json
import os
import re
import ssl
import time
import urllib.request
import zlib
from collections.abc import Callable
from email.utils import parsedate_to_datetime
from ipaddress import ip_address
from types import TracebackType
from typing import TYPE_CHECKING, Self
from urllib.parse import urlsplit

from gdro.common.errors import UserError
from gdro.rewards.judges.completions import Reply, Unread, short, stated_status

if TYPE_CHECKING:
    import httpx

LONGEST_REPLY = 4 * 2**20  # bytes, decompressed; a reply of 100,000 tokens has a tenth of that
SHORTEST_SECRET = 4  # characters; a shorter key protects nothing and occurs in ordinary words
PROXIES = ("http", "https", "socks5", "socks5h")
CERTIFICATES = ("SSL_CERT_FILE", "SSL_CERT_DIR", "SSLKEYLOGFILE")  # what OpenSSL's context reads


class Failed(Exception):
    """No complete response came; `reached` says whether a server was there."""

    def __init__(self, reason: str, *, reached: bool) -> None:
        super().__init__(reason)
        self.reached = reached


class Connection:
    """`async with Connection(url, key, 8) as server: await server.send("GET", "/models", None, seconds)`.

    Raises UserError for a proxy or certificates, named in the environment, that cannot be used.
    """

    def __init__(self, url: str, key: str | None, connections: int) -> None:
        import httpx  # slow to import

        self.url = url
        self._mask = masker(key)
        variable, proxy = find_proxy(url)
        self.way = f" (by way of the proxy in {variable})" if variable else ""  # for error messages
        headers = {"Content-Type": "application/json", "Accept-Encoding": "gzip"}
        if key is not None:
            headers["Authorization"] = f"Bearer {key}"
        tls = "https" in (urlsplit(url).scheme, urlsplit(proxy or "").scheme)  # certificates take .1 s to read
        try:
            self._client = httpx.AsyncClient(
                headers=headers,
                limits=httpx.Limits(max_connections=connections, max_keepalive_connections=connections),
                timeout=None,  # httpx has one on every read; `send` has one on the whole request
                verify=_certificates() if tls else False,
                trust_env=False,
                proxy=proxy,
            )
        except (ImportError, ValueError, httpx.InvalidURL) as error:
            raise _unusable_proxy(variable, proxy, error) from None

    async def __aenter__(self) -> Self:
        await self._client.__aenter__()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None
    ) -> None:
        await self._client.__aexit__(kind, error, at)

    async def send(self, method: str, path: str, body: bytes | None, seconds: float) -> Reply:
        """The server's reply. Raises Failed, or Unread for a success that is too long or cannot be decoded."""
        import httpx

        try:
            async with (
                asyncio.timeout(seconds),
                self._client.stream(method, f"{self.url}{path}", content=body) as response,
            ):
                return await self._receive(response)
        except TimeoutError:
            raise Failed(f"no reply in {seconds:g} s{self.way}", reached=False) from None
        except (httpx.RequestError, httpx.InvalidURL, UnicodeError) as error:
            cause = short(self._mask(str(error))) or type(error).__name__
            hint = "".join(f" (certificates of {n})" for n in CERTIFICATES[:2] if "CERTIFICATE" in cause and _set(n))
            reached = not isinstance(error, httpx.ConnectError | httpx.InvalidURL)
            raise Failed(f"connection failed: {cause}{hint}{self.way}", reached=reached) from None

    async def _receive(self, response: "httpx.Response") -> Reply:
        raw = bytearray()
        async for chunk in response.aiter_raw():  # httpx would decompress without a limit
            raw += chunk
            if len(raw) > LONGEST_REPLY:
                break
        encoding = response.headers.get("Content-Encoding", "").strip().lower()
        try:
            body = _decoded(bytes(raw), encoding)
            if len(body) > LONGEST_REPLY:
                raise Unread(f"reply longer than {LONGEST_REPLY >> 20} MiB")
        except Unread as error:
            if response.is_success:
                raise
            body = str(error).encode()
        text = self._mask(body.decode("utf-8-sig", "replace"))
        try:
            said = json.loads(text)
        except (ValueError, RecursionError):
            said = text
        status = response.status_code
        if response.is_success:
            status = stated_status(said) or status
        return Reply(status, text, said, _retry_after(response.headers.get("Retry-After", "0")))


def find_proxy(url: str) -> tuple[str | None, str | None]:
    """(environment variable, its proxy) for a server; (None, None) for a direct connection, as to this machine.

    Raises UserError for a proxy that is not an address.
    """
    parts = urlsplit(url)
    host = parts.hostname or ""
    if is_loopback(host) or any(urllib.request.proxy_bypass(name) for name in (parts.netloc, host)):
        return None, None
    proxies = urllib.request.getproxies()  # also the system's, on macOS and Windows
    for kind in (parts.scheme, "all"):
        proxy = proxies.get(kind)
        if not proxy:
            continue
        variable = next((n for n in (f"{kind}_proxy", f"{kind}_proxy".upper()) if _set(n)), f"{kind}_proxy")
        proxy = proxy if "://" in proxy else f"http://{proxy}"
        try:
            found = urlsplit(proxy)
            usable = found.scheme.lower() in PROXIES and bool(found.hostname) and found.port != 0
        except ValueError:
            usable = False
        if not usable:
            raise _unusable_proxy(variable, proxy, None)
        return variable, proxy
    return None, None


def is_loopback(host: str) -> bool:
    """Whether `host` is this machine: localhost, a loopback address, or 0.0.0.0, which servers report listening on."""
    try:
        address = ip_address(host)
    except ValueError:
        return host == "localhost" or host.endswith(".localhost")
    address = getattr(address, "ipv4_mapped", None) or address
    return address.is_loopback or address.is_unspecified


def masker(key: str | None) -> Callable[[str], str]:
    """A function that replaces the key by ***, even if JSON, URL or HTML escapes it, several levels deep."""
    if key is None or len(key) < SHORTEST_SECRET:
        return lambda text: text
    found = re.compile("".join(map(_spellings, key)))
    return lambda text: found.sub("***", text)


def _spellings(character: str) -> str:
    """A pattern for the character: as is or after backslashes, `\\u0041`, `%41`, `&#65;`, `&#x41;` or its HTML name."""
    code = ord(character)
    forms = [rf"\\{{0,16}}{re.escape(character)}", rf"\\{{1,16}}u00(?i:{code:02x})", f"%(?i:{code:02x})"]
    forms += [f"&#0?{code};", f"(?i:&#x{code:x};)"]
    named = html.escape(character)
    return f"(?:{'|'.join([*forms, *([re.escape(named)] if named != character else [])])})"


def _decoded(raw: bytes, encoding: str) -> bytes:
    """The decompressed bytes; if too long, only slightly more than LONGEST_REPLY."""
    if encoding in ("", "identity"):
        return raw
    if encoding != "gzip":
        raise Unread(f"reply with the Content-Encoding {short(encoding, 40)!r}, which was not asked for")
    try:
        return zlib.decompressobj(zlib.MAX_WBITS | 16).decompress(raw, LONGEST_REPLY + 1)
    except zlib.error as error:
        raise Unread(f"reply that is not gzip ({error})") from None


def _certificates() -> ssl.SSLContext:
    import httpx

    try:
        return httpx.create_ssl_context()
    except (OSError, ValueError) as error:  # ssl.SSLError is an OSError
        given = " ".join(f"{name} is {os.environ[name]};" for name in CERTIFICATES if _set(name))
        raise UserError(
            f"{given} certificates cannot be read ({short(str(error))}); expected files that can, or no such variable"
        ) from None


def _unusable_proxy(variable: str | None, proxy: str | None, error: Exception | None) -> UserError:
    scheme, _, rest = (proxy or "").partition("://")
    shown = short(f"{scheme}://{rest.rpartition('@')[2]}", 100)  # without a password
    cause = "" if error is None else f" ({short(str(error))})"
    return UserError(f"{variable} is {shown}, which cannot be used{cause}; expected a proxy such as http://proxy:3128")


def _set(name: str) -> bool:
    return bool(os.environ.get(name))


def _retry_after(asked: str) -> float:
    """Seconds to wait; the server may give a date instead."""
    try:
        seconds = float(asked) if asked.isdigit() else parsedate_to_datetime(asked).timestamp() - time.time()
    except (ValueError, OverflowError):
        return 0.0
    return max(0.0, seconds)
