"""Who may ask: a page of the web must neither start work here nor read an answer, though it runs on this machine.

- ``Host`` must be a name of this server. A page that points its own name at this address (DNS rebinding) sends its own name.
- ``Origin``, which browsers send with what a page asks, must be this server's or one of those allowed, which then get the headers
  of CORS (https://fetch.spec.whatwg.org/#http-cors-protocol).
- A POST must be JSON by its ``Content-Type``, which no page sends elsewhere without asking first (``OPTIONS``).
"""

import ipaddress
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from starlette.responses import JSONResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from mtp_dist.serving.request import RequestError

ANY = "*"
AUTHORITY = re.compile(r"(\[[0-9a-f:.]+\]|[a-z0-9._-]+)(?::(\d{1,5}))?")
ORIGIN = re.compile(r"([a-z][a-z0-9+.-]*)://(\[[0-9a-f:.]+\]|[a-z0-9._-]+)(?::(\d{1,5}))?")
TOKENS = re.compile(r"[A-Za-z0-9!#$%&'*+.^_`|~-]+(?:\s*,\s*[A-Za-z0-9!#$%&'*+.^_`|~-]+)*")
HTTP_PORT = "80"
VERSIONS = ("1.0", "1.1")
PREFLIGHT_SECONDS = 600


@dataclass(frozen=True)
class Access:
    """hosts: names and addresses that count as this server's besides loopback ones and the address that a connection came in at;
    ``*.name`` for all below it. origins: of pages that may ask, as browsers write them. ``*``: any."""

    hosts: tuple[str, ...] = ()
    origins: tuple[str, ...] = ()

    def check_host(self, host: str | None, local: str) -> None:
        """Raises RequestError. None: no such header, which HTTP/1.0 allows and no browser does."""
        if host is None:
            return
        match = AUTHORITY.fullmatch(host.lower())
        if match is None or int(match[2] or 0) > 65535:
            raise RequestError(400, f"the header host={shown(host)} is not a host name with an optional port")
        name = match[1].strip("[]").removesuffix(".")
        if not self._ours(name, local):
            message = f"host={shown(host)} is not served here; start the server with 'hosts=[{shown(name)}]' if it should be"
            raise RequestError(421, message, code="host_not_allowed")

    def allows(self, origin: str, host: str | None) -> bool:
        """Whether its pages may ask: this server's own, and those allowed."""
        if ANY in self.origins or origin.lower() in self.origins:
            return True
        match, ours = ORIGIN.fullmatch(origin.lower()), AUTHORITY.fullmatch((host or "").lower())
        if match is None or ours is None or match[1] != "http":
            return False
        return (match[2], match[3] or HTTP_PORT) == (ours[1], ours[2] or HTTP_PORT)

    def _ours(self, name: str, local: str) -> bool:
        if ANY in self.hosts or name == "localhost" or name in self.hosts:
            return True
        if any(allowed.startswith("*.") and name.endswith(allowed[1:]) for allowed in self.hosts):
            return True
        address = _address(name)
        return address is not None and (address.is_loopback or address == _address(local))


class Gate:
    """Around the application: refuses, and answers browsers that ask whether they may. methods: of each path."""

    def __init__(self, app: ASGIApp, access: Access, methods: Mapping[str, Sequence[str]]) -> None:
        self.app, self.access, self.methods = app, access, methods

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        host, origin = header(scope, b"host"), header(scope, b"origin")
        cors: list[tuple[bytes, bytes]] = []

        async def answer(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message.get("headers", []), *cors]
            await send(message)

        try:
            if scope["http_version"] not in VERSIONS:
                raise RequestError(505, f"HTTP/{scope['http_version']} is not served; use HTTP/1.1")
            self.access.check_host(host, (scope.get("server") or ("", 0))[0])
            if origin is not None:
                if not self.access.allows(origin, host):
                    page = shown(origin)
                    message = f"pages of {page} may not ask here; start the server with 'origins=[{page}]' if they should"
                    raise RequestError(403, message, code="origin_not_allowed")
                cors = [(b"access-control-allow-origin", origin.encode("latin-1")), (b"vary", b"Origin")]
            if scope["method"] == "OPTIONS" and (scope["path"] == ANY or scope["path"] in self.methods):
                await self._options(scope)(scope, receive, answer)
                return
        except RequestError as error:
            headers = {"connection": "close"} if error.status == 505 else None
            await JSONResponse(error.as_dict(), error.status, headers)(scope, receive, answer)
            return
        await self.app(scope, receive, answer)

    def _options(self, scope: Scope) -> Response:
        found = self.methods.get(scope["path"], [method for methods in self.methods.values() for method in methods])
        methods = ", ".join(dict.fromkeys([*found, "OPTIONS"]))
        headers = {"allow": methods}
        if header(scope, b"origin") is not None and header(scope, b"access-control-request-method") is not None:
            headers |= {"access-control-allow-methods": methods, "access-control-max-age": str(PREFLIGHT_SECONDS)}
            wanted = header(scope, b"access-control-request-headers")
            if wanted is not None and TOKENS.fullmatch(wanted):
                headers["access-control-allow-headers"] = wanted
            if header(scope, b"access-control-request-private-network") == "true":
                headers["access-control-allow-private-network"] = "true"
        return Response(status_code=204, headers=headers)


def check_json(scope: Scope) -> None:
    """Raises RequestError unless a body is JSON by its headers."""
    given = header(scope, b"content-type") or ""
    kind, _, parameters = given.partition(";")
    charset = re.sub(r"\s", "", parameters).strip('"').lower().replace('"', "")
    if kind.strip().lower() != "application/json" or charset not in ("", "charset=utf-8", "charset=utf8"):
        said = f"content-type={shown(given)}" if given else "a request without content-type"
        raise RequestError(415, f"{said} is not served; send the header content-type: application/json")
    encoding = (header(scope, b"content-encoding") or "identity").strip().lower()
    if encoding != "identity":
        raise RequestError(415, f"content-encoding={shown(encoding)} is not served; send the body as it is")


def header(scope: Scope, name: bytes) -> str | None:
    """One header's text; several of one name are one with commas."""
    found = [value for key, value in scope["headers"] if key == name]
    return b", ".join(found).decode("latin-1") if found else None


def wrong_host(text: str) -> str | None:
    """What is wrong with an entry of ``hosts``; None for nothing."""
    name = text.removeprefix("*.")
    if text == ANY or _address(name) is not None or (AUTHORITY.fullmatch(name) and ":" not in name):
        return None
    return "is no name or address; give it without http:// and port, or * for any"


def wrong_origin(text: str) -> str | None:
    """What is wrong with an entry of ``origins``; None for nothing."""
    if text in (ANY, "null") or ORIGIN.fullmatch(text.lower()):
        return None
    return "is no origin; give it as a browser writes it, http://localhost:3000, without a path, or * for any"


def names(texts: Iterable[str]) -> tuple[str, ...]:
    """As they are compared."""
    return tuple(text.lower().removesuffix(".") for text in texts)


def shown(text: str) -> str:
    """A client's text in a message: printable, and not long."""
    text = text.encode("ascii", "backslashreplace").decode()
    text = text if text.isprintable() else repr(text)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _address(text: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    try:
        found = ipaddress.ip_address(text.partition("%")[0])
    except ValueError:
        return None
    return getattr(found, "ipv4_mapped", None) or found
