"""Errors in the words of the command: a hint names an option or a command, never an HTTP route."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from anomaly import Fit, Problem, ServiceError
from anomaly.client import errors

Explain = Callable[[ServiceError], ServiceError]


@dataclass(frozen=True)
class _Words:
    """The words for one problem.

    Attributes:
        hint: what to do.
        offline: what to do if no service is involved. Default: `hint`.
        fitted: what to do with `--fit mnist` or `--fit resize`. Default: `hint`.
        title: what happened. Default: the title of the service.
    """

    hint: str
    offline: str | None = None
    fitted: str | None = None
    title: str | None = None


_WORDS: dict[type[Problem], _Words] = {
    errors.EmptyBody: _Words("", title="The image is empty"),
    errors.Unauthorized: _Words("set ANOMALY_KEY, or name the file of the key with --key-file"),
    errors.ModelNotFound: _Words(
        "`anomaly models` lists the models of the service",
        offline="`anomaly list --model-store FOLDER` lists the versions",
    ),
    errors.BodyTimeout: _Words("try again; the connection was too slow", title="The image took too long to arrive"),
    errors.BodyTooLarge: _Words(
        "use --fit mnist for a photo, or scale the image to 28x28 pixels",
        fitted="scale the image down",
        title="The file is too large",
    ),
    errors.InvalidImage: _Words("the image must be a greyscale PNG of 28x28 pixels"),
    errors.NotAPng: _Words("convert the image to PNG"),
    errors.TruncatedPng: _Words("copy the whole file"),
    errors.CorruptPng: _Words("save the image again"),
    errors.AnimatedPng: _Words("save one frame as a PNG"),
    errors.WrongSize: _Words("use --fit mnist, or scale the image to 28x28 pixels"),
    errors.ImageTooLarge: _Words("scale the image down"),
    errors.NotGrey: _Words("convert the image to greyscale"),
    errors.Transparent: _Words("flatten the image onto its background"),
    errors.BlankImage: _Words("the image needs clear strokes on a plain background"),
    errors.AmbiguousImage: _Words("the image needs one digit on a plain background, with a margin around it"),
    errors.InvalidParameter: _Words("`anomaly score --help` lists the options", title="An option is not valid"),
    errors.UnsupportedAlpha: _Words("use a larger --alpha"),
    errors.RateLimited: _Words("use a lower --concurrency or a longer --patience"),
    errors.InternalError: _Words("try again; the log of the service contains the reason", offline=""),
    errors.BadGateway: _Words("try again"),
    errors.ModelUnavailable: _Words("try again soon; `anomaly models` shows the reason"),
    errors.Overloaded: _Words("use a lower --concurrency or a longer --patience"),
    errors.DeadlineExceeded: _Words("use a lower --concurrency, or try again"),
}


def explain(error: ServiceError, *, fit: Fit | None = None, offline: bool = False) -> ServiceError:
    """Return an error with the title and hint of the command.

    Args:
        error: error of the client.
        fit: the option `--fit`.
        offline: whether the image was scored without a service.
    """
    if not isinstance(error, Problem):
        return error
    words = next((_WORDS[kind] for kind in type(error).__mro__ if kind in _WORDS), None)
    document = {name: value for name in ("type", "title", "detail") if (value := getattr(error, name))}
    if error.request_id:
        document["instance"] = f"urn:request:{error.request_id}"
    if words is not None:
        document["title"] = words.title or error.title
        hint = words.offline if offline and words.offline is not None else words.hint
        document["hint"] = words.fitted if fit not in (None, "strict") and words.fitted is not None else hint
    elif not offline:
        document["hint"] = error.hint
    return type(error)(error.status, document, error.retry_after)


def in_one_line(error: ServiceError) -> str:
    """Return the message of an error, followed by its hint if it has one."""
    hint = getattr(error, "hint", "")
    return f"{error}; {hint}" if hint else str(error)
