"""Lets pages of other origins read the responses (CORS, part of the Fetch standard).

The middleware of the service adds the CORS headers itself. Starlette's `CORSMiddleware` would have to wrap the
application, and `POST /score` of a wrapped application cannot take the fast path of `app.http.server`. Credentials are
not allowed: the API key is a header that the page sets, not a cookie.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping

_EXPOSED = (
    b"Retry-After, Server-Timing, WWW-Authenticate, "
    b"X-Alpha, X-Error-Limit, X-Error-Peak, X-Model, X-Request-ID, X-Threshold"
)
_METHODS = b"GET, HEAD, POST"
_MAX_AGE = b"7200"
"""Seconds for which a browser may cache the reply to a preflight request; Chromium's maximum."""
_NAMES = re.compile(rb"[!#$%&'*+.^_`|~0-9A-Za-z-]+(?:[ \t]*,[ \t]*[!#$%&'*+.^_`|~0-9A-Za-z-]+)*")

Headers = list[tuple[bytes, bytes]]


class Cors:
    """The origins whose pages may read the responses.

    Args:
        origins: as browsers send them, such as `https://example.org`; `*` means all origins.
    """

    def __init__(self, origins: Collection[str]) -> None:
        self._others: Headers = [] if "*" in origins else [(b"vary", b"Origin")]
        self._by_origin = {origin.encode(): self._allow(origin.encode()) for origin in origins}
        self._all = self._by_origin.get(b"*")

    def headers(self, origin: bytes | None) -> Headers:
        """Return the headers of a response.

        Args:
            origin: the header Origin of the request, if it has one.
        """
        if self._all is not None:
            return self._all
        return self._by_origin.get(origin, self._others) if origin is not None else self._others

    def preflight(self, headers: Mapping[bytes, bytes]) -> Headers | None:
        """Return the headers of the response to an OPTIONS request; None unless it is a preflight of an allowed origin.

        Args:
            headers: of the request, names in lower case.
        """
        origin = headers.get(b"origin", b"")
        if b"access-control-request-method" not in headers or not (self._all or origin in self._by_origin):
            return None
        answer = [(b"access-control-allow-methods", _METHODS), (b"access-control-max-age", _MAX_AGE)]
        requested = headers.get(b"access-control-request-headers", b"")
        if _NAMES.fullmatch(requested):
            answer.append((b"access-control-allow-headers", requested))
        return [*answer, (b"vary", b"Access-Control-Request-Headers")]

    def _allow(self, origin: bytes) -> Headers:
        allowed = [(b"access-control-allow-origin", origin), (b"access-control-expose-headers", _EXPOSED)]
        return [*allowed, *self._others]
