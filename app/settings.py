"""The settings of the service, read once at start from environment variables with the prefix `ANOMALY_`."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, ValidationError, ValidationInfo, field_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

PREFIX = "ANOMALY_"
OF_THE_COMMAND = frozenset(("ANOMALY_URL", "ANOMALY_KEY", "ANOMALY_KEY_FILE", "ANOMALY_DATA_DIR"))
"""Variables of the command `anomaly` and of training, which can be set in the shell that starts the service."""
_SERVICE_LINK = re.compile(
    rf"{PREFIX}(\w+_)?(SERVICE_HOST|SERVICE_PORT(_\w+)?|PORT_\d+_(TCP|UDP|SCTP)(_(ADDR|PORT|PROTO))?)", re.ASCII
)
_SERVICE_LINK_PORT = re.compile(rf"{PREFIX}(\w+_)?PORT", re.ASCII)
_SERVICE_LINK_ADDRESS = re.compile(r"(tcp|udp|sctp)://")

PUBLIC_PATHS = frozenset(
    ("/", "/livez", "/readyz", "/v2/health/live", "/v2/health/ready", "/metrics", "/docs", "/openapi.json", "/problems")
)
"""Paths that need no API key: probes, metrics, and the files that a browser loads before it can send a key."""
PUBLIC_FOLDERS = ("/page/", "/problems/")
"""Prefixes of further paths that need no API key."""
PROTECTED_PATHS = frozenset(("/score", "/reconstruction", "/models", "/v1", "/v2"))
"""Paths, and prefixes of paths, that need an API key if the operator has set a file of API keys."""
_FIRST_SEGMENTS = frozenset(path.split("/")[1] for path in (*PUBLIC_PATHS, *PUBLIC_FOLDERS, *PROTECTED_PATHS)) - {""}


_ORIGIN = re.compile(r"\*|[a-z][a-z0-9+.-]*://([a-z0-9._-]+|\[[0-9a-f:.]+\])(:[0-9]{1,5})?")
_HOST_NAME = re.compile(r"\*|[a-z0-9_]([a-z0-9._-]*[a-z0-9_])?")


_MAX_SHOWN = 40
"""Maximum number of characters of an invalid value in a message."""


class SettingsError(Exception):
    """A variable is unknown, or its value is invalid."""


class Settings(BaseSettings):
    """The settings of the service. `docs/configuration.md` describes when to change them."""

    model_config = SettingsConfigDict(
        env_prefix=PREFIX, frozen=True, extra="forbid", protected_namespaces=(), allow_inf_nan=False
    )

    host: str = Field("127.0.0.1", min_length=1)
    """Address to listen on; `0.0.0.0` is every IPv4 address, `::` every IPv6 and IPv4 address, `localhost` both
    loopback addresses (with one worker)."""
    port: int = Field(8000, ge=0, le=65535)
    """Port to listen on. With 0, the operating system selects a free port."""
    probe_port: int | None = Field(None, ge=1, le=65535)
    """Second port, which answers only `/livez`, `/readyz` and `/metrics`. Its connections do not wait behind those of
    clients, however many there are. Default: probes use the other port."""
    workers: int = Field(1, ge=1, le=64)
    """Number of worker processes. They share the port, the reconstruction store and the model store; each loads its own
    copy of the models."""
    root_path: str = Field("", pattern=r"^(/[A-Za-z0-9._~-]+)*$")
    """Path prefix that a gateway removes before it forwards a request. Paths in replies begin with the prefix."""

    model_store: Path = Path("model_store")
    """Folder of the model store. The service only reads it."""
    model_signature: Literal["require", "warn", "off"] = "off"
    """Whether a model version needs a valid signature: `require` rejects a version without one, `warn` logs a warning,
    `off` does not check signatures. `anomaly sign` signs a version."""
    model_public_key_file: Path | None = None
    """PEM file with the public key of signatures, of the curve P-256. `require` and `warn` need it."""
    model_digests_file: Path | None = None
    """File with the SHA-256 of the manifest of each accepted version, as `sha256sum` writes it. Other versions are
    rejected. Default: all versions are accepted."""
    allow_empty: bool = False
    """Whether the service starts although the model store is missing or contains no model. It serves models that arrive
    later."""
    default_model: str = Field("zero", pattern=r"^[a-z0-9][a-z0-9-]{0,62}$")
    """Name of the model for requests without the parameter `model`. Readiness depends on this model only."""
    device: str = "auto"
    """Device for forward passes: `auto`, `cpu`, `cuda` or `cuda:n`. `auto` selects `cuda:0` if CUDA is available, else
    the CPU."""
    watch_seconds: float = Field(2.0, gt=0)
    """Seconds between two polls of the model store for a new current version."""
    max_extra_versions: int = Field(4, ge=1)
    """Maximum number of versions besides the current ones that are loaded for requests with `name@version`. A version
    loaded for a request stays loaded for at least 10 s."""

    microbatch_max_size: int = Field(32, ge=1, le=4096)
    """Maximum number of images per forward pass of single scores."""
    microbatch_max_delay_ms: float = Field(0.0, ge=0)
    """Batching delay in milliseconds: the maximum time that the first image of a micro-batch waits for further images.
    With 0, there is no delay."""
    queue_max_images: int = Field(1024, ge=1)
    """Maximum number of images in the queue of a model version; further images get 503. The same limit applies to
    records that wait for the reconstruction store, and to requests that wait for a version to be loaded."""
    deadline_ms: float = Field(2000.0, gt=0)
    """Maximum time in milliseconds from queuing an image to its reply; then the response is 504. Fitting an image and
    loading a version have the same limit each. It must be greater than the batching delay."""

    max_body_bytes: int = Field(64 * 1024, ge=1024)
    """Maximum number of bytes of a body of `POST /score`, and of each file of `POST /score/batch`."""
    fit_max_body_bytes: int = Field(2 * 1024 * 1024, ge=1024)
    """Maximum number of bytes of a body of `POST /score` with `fit=mnist`."""
    fit_max_pixels: int = Field(4 * 1024 * 1024, ge=28 * 28, le=4096 * 4096)
    """Maximum number of pixels of an image with `fit=mnist`. Such images are decoded one at a time."""
    fit_max_waiting: int = Field(16, ge=1)
    """Maximum number of concurrent requests with `fit=mnist`, or with a form above `ANOMALY_MAX_BODY_BYTES`; further
    requests get 503. If clients compete, each has about the same number of them. Clients are told apart by API key, or
    else by address."""
    body_timeout_ms: float = Field(5000.0, gt=0)
    """Maximum time in milliseconds to receive a body of `POST /score`, and maximum pause within a body of `POST
    /score/batch`; then the response is 408."""

    batch_max_body_bytes: int = Field(128 * 1024 * 1024, ge=1024)
    """Maximum number of bytes of a body of `POST /score/batch`. An array of 100,000 images has 78,400,128 bytes."""
    batch_max_files: int = Field(10_000, ge=1)
    """Maximum number of files per form of `POST /score/batch`; a form with more files gets 413."""
    batch_min_bytes_per_second: float = Field(64 * 1024, gt=0)
    """Minimum average rate, in bytes per second, at which a client of `POST /score/batch` must send its body and read
    its reply."""
    batch_max_requests: int = Field(2, ge=1)
    """Maximum number of requests of `POST /score/batch` whose images are scored at the same time; further requests get
    503. A request that waits for its client does not count."""
    batch_max_connections: int = Field(16, ge=1)
    """Maximum number of concurrent requests of `POST /score/batch`, including those that wait for their clients;
    further requests get 503. If clients compete, each has about the same number of them. Clients are told apart by API
    key, or else by address."""
    batch_chunk_images: int = Field(64, ge=1, le=4096)
    """Maximum number of images per forward pass of a batch request. A single score waits for one of these forward
    passes at most."""

    store_url: str = "sqlite:///var/reconstructions.db"
    """URL of the reconstruction store. Its scheme selects the backend: see the table of stores."""
    store_password_file: Path | None = None
    """File that contains the password of the Redis server. The URL must not contain a password."""
    store_ttl_seconds: float = Field(3600.0, gt=0, le=10 * 366 * 86400)
    """Time to live of a reconstruction in seconds."""
    store_max_bytes: int = Field(256 * 1024 * 1024, ge=64 * 1024)
    """Approximate maximum number of bytes of all reconstructions in a SQLite store; the oldest are deleted first. Redis
    has its own limit, `maxmemory`."""
    store_timeout_ms: float = Field(500.0, gt=0)
    """Maximum time in milliseconds that a score waits for its reconstruction to be stored; then the id is null. The
    same limit applies to connecting to Redis, to each reply of Redis, and to a lock of the SQLite file. It must be less
    than `ANOMALY_DEADLINE_MS`."""

    validity_limit: float = Field(100.0, ge=10, le=1e9)
    """Evidence at which the validity of a model version becomes `changed`. If nothing has changed, the probability that
    this ever happens is at most one divided by this value."""

    review_dir: Path | None = None
    """Folder of the review queue: a sample of the scored images, as PNG files, for a person to label with `anomaly
    review`. Default: no image is written."""
    review_max_images: int = Field(1000, ge=10, le=10_000)
    """Maximum number of images in the review queue. A new image then replaces the oldest one of the group with the most
    images; a group is a model and the reason for choosing an image."""
    review_max_bytes: int = Field(16 * 1024 * 1024, ge=64 * 1024)
    """Maximum number of bytes of the files of the review queue."""
    review_share: float = Field(0.01, ge=0, le=1)
    """Probability with which a scored image is drawn for the review queue, independently of its score. Only these
    images may be used to choose a threshold."""
    review_near: float = Field(3.0, ge=1, le=100)
    """Normal images are near the threshold, and chosen for the review queue, if their p-value is at most this factor
    times the false-positive rate of the version."""

    api_keys_file: Path | None = None
    """File that contains the hashes of the API keys. Without a file, no key is required. `deploy/secrets key NAME` adds
    a key."""

    allowed_hosts: str = ""
    """Host names by which clients may address the service, separated by commas, without ports. IP addresses,
    `localhost` and names without a dot are always allowed; `*` allows all names. Default: with API keys all names,
    without API keys no further name."""
    cors_origins: str = ""
    """Origins whose web pages may call the service from a browser, separated by commas: `https://example.org`. `*`
    allows all origins. Default: none."""

    max_connections: int = Field(1024, ge=1, le=60_000)
    """Maximum number of connections per worker. Requests on further connections get 503, except for probes, and their
    connections are closed."""
    keep_alive_seconds: int = Field(75, ge=1, le=3600)
    """Number of seconds that an idle connection stays open. It must be longer than the idle time-out of a proxy before
    the service."""
    drain_seconds: float = Field(0.0, ge=0, le=86400)
    """Seconds after SIGTERM during which `/readyz` returns 503 and requests are still served."""
    log_requests: bool = True
    """Whether to write one line of JSON per request to standard output. Successful probes are not logged."""
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    """Minimum level of logged events: `debug`, `info`, `warning` or `error`."""
    log_format: Literal["auto", "json", "text"] = "auto"
    """Format of the log: `json`, `text`, or `auto`, which is `text` on a terminal and `json` elsewhere."""

    @field_validator("model_store", "review_dir")
    @classmethod
    def _named(cls, path: Path | None) -> Path | None:
        if path == Path():
            raise ValueError("must be the path of a folder")
        return path

    @field_validator("cors_origins")
    @classmethod
    def _origins(cls, text: str) -> str:
        origins = [part.strip().lower() for part in text.split(",") if part.strip()]
        for origin in origins:
            if not _ORIGIN.fullmatch(origin):
                raise ValueError(f"{origin!r} is not an origin; write scheme, host and port alone: https://example.org")
        return ",".join(origins)

    @field_validator("allowed_hosts")
    @classmethod
    def _host_names(cls, text: str) -> str:
        names = [part.strip().lower().removesuffix(".") for part in text.split(",") if part.strip()]
        for name in names:
            if not _HOST_NAME.fullmatch(name):
                raise ValueError(f"{name!r} is not a host name; write it without scheme, port and path: example.org")
        return ",".join(names)

    @field_validator("probe_port", "deadline_ms", "store_timeout_ms")
    @classmethod
    def _no_contradiction(cls, value: float | None, info: ValidationInfo) -> float | None:
        if value is not None:
            _check_combination(info.field_name, value, info.data)
        return value

    @field_validator("root_path")
    @classmethod
    def _not_a_path_of_the_service(cls, prefix: str) -> str:
        # The framework removes the prefix from every path, including paths that a gateway did not add it to.
        if not _FIRST_SEGMENTS.isdisjoint(prefix.split("/")[1:2]):
            raise ValueError("must not begin with a path of the service, such as /score")
        return prefix


def _check_combination(name: str | None, value: float, earlier: Mapping[str, Any]) -> None:
    """Check a value against the valid ones among the settings that the class defines before it.

    Raises:
        ValueError: it contradicts one of them.
    """
    if name == "probe_port" and value == earlier.get("port"):
        raise ValueError(f"must not be the port {value} of {PREFIX}PORT")
    delay, deadline = earlier.get("microbatch_max_delay_ms", 0.0), earlier.get("deadline_ms", math.inf)
    # A single image waits for the whole delay.
    if name == "deadline_ms" and value <= delay:
        raise ValueError(f"must be greater than {PREFIX}MICROBATCH_MAX_DELAY_MS={delay:g}, not {value:g}")
    # The deadline of a score includes the wait for the store: with a longer wait, no score would get a null id.
    if name == "store_timeout_ms" and value >= deadline:
        raise ValueError(f"must be less than {PREFIX}DEADLINE_MS={deadline:g}, not {value:g}")


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
        SettingsError: a variable with the prefix is unknown, or its value is invalid. The message names the variable.
    """
    known = {f"{PREFIX}{name}".upper() for name in Settings.model_fields} | OF_THE_COMMAND
    ignored = {name.upper() for name in service_links()}
    given = {name for name in os.environ if name.upper().startswith(PREFIX)}
    unknown = sorted(name for name in given if name.upper() not in known | ignored)
    if unknown:
        raise SettingsError(f"unknown setting {', '.join(unknown)}; docs/configuration.md lists the known ones")
    try:
        ports = {name for name in ("port", "probe_port") if f"{PREFIX}{name}".upper() in ignored}
        return Settings(**{name: Settings.model_fields[name].default for name in ports})
    except ValidationError as error:
        first = error.errors()[0]
        words = first["msg"].removeprefix("Value error, ").partition(", unable to parse")[0]
        if first["type"].startswith(("int", "float", "bool", "greater", "less")):  # numbers and switches are not secret
            words += f", not {str(first['input'])[:_MAX_SHOWN]!r}"
        raise SettingsError(f"{PREFIX}{str(first['loc'][0]).upper()}: {words}") from error
