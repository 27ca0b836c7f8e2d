"""What an operator may choose. Everything is read once, at start, from the environment with the prefix `ANOMALY_`."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Literal

from pydantic import Field, ValidationError, field_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

PREFIX = "ANOMALY_"
OF_THE_COMMAND = frozenset(("ANOMALY_URL", "ANOMALY_KEY", "ANOMALY_KEY_FILE", "ANOMALY_DATA_DIR"))
"""Variables of the command `anomaly` and of training, which can be set in the shell that starts the service."""
_SERVICE_LINK = re.compile(
    rf"{PREFIX}(\w+_)?(SERVICE_HOST|SERVICE_PORT(_\w+)?|PORT_\d+_(TCP|UDP|SCTP)(_(ADDR|PORT|PROTO))?)", re.ASCII
)
_SERVICE_LINK_PORT = re.compile(rf"{PREFIX}(\w+_)?PORT", re.ASCII)
_SERVICE_LINK_ADDRESS = re.compile(r"(tcp|udp|sctp)://")

PUBLIC_PATHS = frozenset(("/", "/livez", "/readyz", "/metrics", "/docs", "/openapi.json", "/problems"))
"""Paths that need no API key: probes, metrics, and the files that a browser loads before it can send a key."""
PUBLIC_FOLDERS = ("/page/", "/problems/")
"""Prefixes of further paths that need no API key."""
PROTECTED_PATHS = frozenset(("/score", "/reconstruction", "/models"))
"""Paths, and prefixes of paths, that need an API key if the operator has set a file of API keys."""
_FIRST_SEGMENTS = frozenset(path.split("/")[1] for path in (*PUBLIC_PATHS, *PUBLIC_FOLDERS, *PROTECTED_PATHS)) - {""}


_ORIGIN = re.compile(r"\*|[a-z][a-z0-9+.-]*://([a-z0-9._-]+|\[[0-9a-f:.]+\])(:[0-9]{1,5})?")


class SettingsError(Exception):
    """The environment asks for something that does not exist or makes no sense."""


class Settings(BaseSettings):
    """The service's settings; `docs/configuration.md` explains when to change which."""

    model_config = SettingsConfigDict(
        env_prefix=PREFIX, frozen=True, extra="forbid", protected_namespaces=(), allow_inf_nan=False
    )

    host: str = Field("127.0.0.1", min_length=1)
    """Address to listen on; `0.0.0.0` is every IPv4 address, `::` every IPv6 and IPv4 address, `localhost` both
    loopback addresses (with one worker)."""
    port: int = Field(8000, ge=0, le=65535)
    """Port to listen on; 0 lets the system choose one."""
    workers: int = Field(1, ge=1, le=64)
    """Processes that share the port, the store and the model store."""
    root_path: str = Field("", pattern=r"^(/[A-Za-z0-9._~-]+)*$")
    """Path prefix that a gateway takes away before it passes a request on."""

    model_store: Path = Path("model_store")
    """Folder of the model versions; only ever read."""
    allow_empty: bool = False
    """Whether the service starts although the model store is missing or contains no model. It serves models that arrive
    later."""
    default_model: str = Field("zero", pattern=r"^[a-z0-9][a-z0-9-]{0,62}$")
    """The model that answers when a request names none."""
    device: str = "auto"
    """`auto`, `cpu`, `cuda` or `cuda:n`."""
    watch_seconds: float = Field(2.0, gt=0)
    """How often the model store is looked at for a new current version."""
    max_extra_versions: int = Field(4, ge=1)
    """Maximum number of versions besides the current ones that stay loaded after a request for `name@version`."""

    microbatch_max_size: int = Field(32, ge=1, le=4096)
    """Most images scored in one forward pass."""
    microbatch_max_delay_ms: float = Field(0.0, ge=0)
    """How long a batch waits for company; 0 takes what is there."""
    queue_max_images: int = Field(1024, ge=1)
    """Most images that may wait for the model; one more is answered 503."""
    deadline_ms: float = Field(2000.0, gt=0)
    """Longest time from accepting an image to its score; beyond it the answer is 504. Fitting has as long before."""

    max_body_bytes: int = Field(64 * 1024, ge=1024)
    """Largest body of `POST /score`."""
    fit_max_body_bytes: int = Field(2 * 1024 * 1024, ge=1024)
    """Largest body of `POST /score?fit=mnist`."""
    fit_max_pixels: int = Field(4 * 1024 * 1024, ge=28 * 28, le=4096 * 4096)
    """Most pixels of an image that `fit=mnist` takes; they are decoded one image at a time."""
    fit_max_waiting: int = Field(16, ge=1)
    """Most requests with `fit=mnist` at once; one more is answered 503."""
    body_timeout_ms: float = Field(5000.0, gt=0)
    """Longest time that a request body may take to arrive; of `POST /score/batch`, that each piece of it may."""

    batch_max_body_bytes: int = Field(128 * 1024 * 1024, ge=1024)
    """Largest body of `POST /score/batch`; an array of 100,000 images has 78,400,128 bytes."""
    batch_max_files: int = Field(10_000, ge=1)
    """Most files of a form of `POST /score/batch`; one more is answered 413."""
    batch_min_bytes_per_second: float = Field(64 * 1024, gt=0)
    """Bytes a second that a client of `POST /score/batch` must send, and take of its reply, on average."""
    batch_max_requests: int = Field(2, ge=1)
    """Most requests of `POST /score/batch` that are answered at a time; one more is answered 503."""
    batch_chunk_images: int = Field(64, ge=1, le=4096)
    """Images of a batch request in one forward pass: what a single score waits for at most."""

    store_url: str = "sqlite:///var/reconstructions.db"
    """Where reconstructions are kept: `sqlite:///path` or `redis://host:port/database`."""
    store_password_file: Path | None = None
    """File with the password of the Redis server; a URL must not hold one."""
    store_ttl_seconds: float = Field(3600.0, gt=0, le=10 * 366 * 86400)
    """How long a reconstruction can be fetched."""
    store_max_bytes: int = Field(256 * 1024 * 1024, ge=64 * 1024)
    """Most bytes of reconstructions in a SQLite store; the oldest go first. A Redis server has its own bound,
    `maxmemory`."""
    store_timeout_ms: float = Field(500.0, gt=0)
    """Longest time that a score waits for its reconstruction to be kept; beyond it the id is null. A Redis server
    has as long to connect and for each answer; a lock on the SQLite file is waited for as long."""

    api_keys_file: Path | None = None
    """File with the hashes of the API keys; none: all may ask. `deploy/secrets key NAME` adds one."""

    cors_origins: str = ""
    """Origins whose web pages may call the service from a browser, separated by commas: `https://example.org`. `*`
    allows all origins. Default: none."""

    keep_alive_seconds: int = Field(75, ge=1, le=3600)
    """Number of seconds that an idle connection stays open. It must be longer than the idle time-out of a proxy before
    the service."""
    drain_seconds: float = Field(0.0, ge=0, le=86400)
    """After SIGTERM: how long `/readyz` says 503 while requests are still served."""
    log_requests: bool = True
    """One JSON line on standard output for each request, but for probes that went well."""
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    """Least severe event that is logged."""
    log_format: Literal["auto", "json", "text"] = "auto"
    """Format of the log: `json`, `text`, or `auto`, which is `text` on a terminal and `json` elsewhere."""

    @field_validator("model_store")
    @classmethod
    def _named(cls, path: Path) -> Path:
        if path == Path():
            raise ValueError("names no folder")
        return path

    @field_validator("cors_origins")
    @classmethod
    def _origins(cls, text: str) -> str:
        origins = [part.strip().lower() for part in text.split(",") if part.strip()]
        for origin in origins:
            if not _ORIGIN.fullmatch(origin):
                raise ValueError(f"{origin!r} is not an origin; write scheme, host and port alone: https://example.org")
        return ",".join(origins)

    @field_validator("root_path")
    @classmethod
    def _not_a_path_of_the_service(cls, prefix: str) -> str:
        # The framework takes the prefix away from every path, also from one that did not get it.
        if not _FIRST_SEGMENTS.isdisjoint(prefix.split("/")[1:2]):
            raise ValueError("begins as a path of the service itself does")
        return prefix


def service_links() -> list[str]:
    """Return the names of the variables that Kubernetes sets in each pod for Services whose name begins with `anomaly`.

    `ANOMALY_PORT` is one of them if its value is an address like `tcp://10.0.0.1:8000`.
    """
    return sorted(name for name, value in os.environ.items() if _is_service_link(name.upper(), value))


def _is_service_link(name: str, value: str) -> bool:
    if _SERVICE_LINK_PORT.fullmatch(name) and _SERVICE_LINK_ADDRESS.match(value):
        return True
    return _SERVICE_LINK.fullmatch(name) is not None


def from_environment() -> Settings:
    """Read the settings. Variables that Kubernetes sets for Services are ignored.

    Raises:
        SettingsError: a variable with the prefix is unknown, or a value does not fit. The message names it.
    """
    known = {f"{PREFIX}{name}".upper() for name in Settings.model_fields} | OF_THE_COMMAND
    ignored = {name.upper() for name in service_links()}
    given = {name for name in os.environ if name.upper().startswith(PREFIX)}
    unknown = sorted(name for name in given if name.upper() not in known | ignored)
    if unknown:
        raise SettingsError(f"unknown setting {', '.join(unknown)}; docs/configuration.md lists the known ones")
    try:
        if f"{PREFIX}PORT" in ignored:
            return Settings(port=Settings.model_fields["port"].default)
        return Settings()
    except ValidationError as error:
        first = error.errors()[0]
        words = first["msg"].removeprefix("Value error, ")
        raise SettingsError(f"{PREFIX}{str(first['loc'][0]).upper()}: {words}") from error
