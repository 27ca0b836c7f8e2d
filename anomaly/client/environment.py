"""Read the client's environment variables: address, API key, proxies, certificate authorities.

Every error names the variable that it comes from.
"""

from __future__ import annotations

import codecs
import ipaddress
import os
import re
import ssl
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from urllib.request import getproxies

import httpx

URL = "ANOMALY_URL"
KEY = "ANOMALY_KEY"
KEY_FILE = "ANOMALY_KEY_FILE"
DEFAULT_URL = "http://127.0.0.1:8000"

_UTF16 = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
_NO_PROXY_ENTRY = re.compile(r"(?:(?P<scheme>[a-z]+)://)?(?P<host>\[[^]]*\](?:/\d+)?|[^:]*)(?::(?P<port>\d+))?")


def parse_url(url: str | None) -> httpx.URL:
    """Return the address of the service; `None` means `ANOMALY_URL`, or this machine if that variable is not set.

    Raises:
        ValueError: the text is not an HTTP URL.
    """
    text = url if url is not None else os.environ.get(URL) or DEFAULT_URL
    source = "not the URL of a service" if url is not None else f"{URL} is not the URL of a service"
    try:
        parsed = httpx.URL(text)
        parsed.raw_host.decode("ascii").encode("idna")  # connecting does the same and rejects labels that are too long
    except (httpx.InvalidURL, UnicodeError) as error:
        raise ValueError(f"{source}: {text!r}: {error}") from error
    if parsed.scheme not in ("http", "https") or not parsed.host:
        raise ValueError(f"{source}: {text!r}; write it as {DEFAULT_URL}")
    return parsed


def clean_key(key: str, source: str = "the API key") -> str:
    """Return an API key without the white space around it.

    Raises:
        ValueError: the key is empty, or an HTTP header cannot carry it.
    """
    stripped = key.strip()
    if not stripped:
        raise ValueError(f"{source} is empty; an API key is one line of printable ASCII characters")
    if not stripped.isascii() or not stripped.isprintable():
        raise ValueError(f"{source} is not an API key: it must be one line of printable ASCII characters")
    return stripped


def api_key(file: Path | None = None) -> str | None:
    """Return the API key from a file, from the file that `ANOMALY_KEY_FILE` names, or from `ANOMALY_KEY`.

    Raises:
        ValueError: the file cannot be read, or the key is not valid.
    """
    source = f"the key file {file}"
    if file is None and (named := os.environ.get(KEY_FILE)):
        file, source = Path(named), f"{KEY_FILE}={named}"
    if file is None:
        key = os.environ.get(KEY)
        return clean_key(key, KEY) if key else None
    try:
        content = file.read_bytes()
        # Editors and PowerShell on Windows write byte order marks, and UTF-16.
        text = content.decode("utf-16" if content.startswith(_UTF16) else "utf-8-sig")
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or "neither UTF-8 nor UTF-16 text"
        raise ValueError(f"{source} cannot be read: {reason}") from error
    return clean_key(text, source)


def proxy_of(url: httpx.URL) -> httpx.Proxy | None:
    """Return the proxy that the environment names for one address.

    httpx rejects IPv6 addresses and ranges in `NO_PROXY`, so the variables are read here.

    Raises:
        ValueError: the variable does not contain the URL of a proxy, or a SOCKS proxy cannot be used.
    """
    variables = getproxies()
    if _bypasses_proxy(variables.get("no", ""), url):
        return None
    name = url.scheme if variables.get(url.scheme) else "all"
    value = variables.get(name)
    if not value:
        return None
    try:
        proxy = httpx.Proxy(value if "://" in value else f"http://{value}")
    except (httpx.InvalidURL, ValueError) as error:
        # The value may contain a password.
        raise ValueError(f"{name.upper()}_PROXY is not the URL of a proxy: {error}") from error
    if proxy.url.scheme.startswith("socks") and find_spec("socksio") is None:
        raise ValueError(
            f"{name.upper()}_PROXY names a SOCKS proxy, which needs the package socksio; install it, or add the host "
            "to NO_PROXY"
        )
    return proxy


def _bypasses_proxy(entries: str, url: httpx.URL) -> bool:
    host = url.host.lower().rstrip(".")
    port = url.port or {"http": 80, "https": 443}[url.scheme]
    for entry in entries.lower().split(","):
        text = entry.strip()
        with suppress(ValueError):
            # A bare IPv6 address has colons that are not a port.
            if ipaddress.ip_address(host) in ipaddress.ip_network(text, strict=False):
                return True
        found = _NO_PROXY_ENTRY.fullmatch(text)
        if not text or found is None:
            continue
        if found["scheme"] not in (None, "all", url.scheme) or found["port"] not in (None, str(port)):
            continue
        if _matches(host, found["host"]):
            return True
    return False


def _matches(host: str, pattern: str) -> bool:
    if pattern == "*":
        return True
    with suppress(ValueError):
        network = ipaddress.ip_network(pattern.replace("[", "").replace("]", ""), strict=False)
        return ipaddress.ip_address(host) in network
    name = pattern.removeprefix("*").strip(".")
    return bool(name) and (host == name or host.endswith(f".{name}"))


def tls_context(url: httpx.URL) -> ssl.SSLContext:
    """Return the certificate authorities to trust; for a plain HTTP address, none.

    Raises:
        ValueError: `SSL_CERT_FILE` or `SSL_CERT_DIR` names something that cannot be read.
    """
    if url.scheme != "https":
        # Loading the authorities takes longer than twenty scores.
        return ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    name = next((each for each in ("SSL_CERT_FILE", "SSL_CERT_DIR") if os.environ.get(each)), "")
    value = os.environ.get(name, "")
    if name == "SSL_CERT_DIR" and not Path(value).is_dir():
        raise ValueError(f"SSL_CERT_DIR={value}: there is no such folder of certificate authorities")
    try:
        return httpx.create_ssl_context()
    except OSError as error:
        reason = error.strerror or str(error)
        raise ValueError(f"{name}={value}: the certificate authorities cannot be read: {reason}") from error
