"""Prepares the image file of a request or of a training folder as a model version expects it."""

from __future__ import annotations

from typing import Literal

from app.images import png
from app.images.fit import Fitted, fit
from app.images.resize import resize
from app.models.manifest import Manifest, Preparation
from app.problems import InvalidParameter

Fit = Literal["strict", "mnist", "resize"]


def choose(asked: Fit | None, manifest: Manifest) -> Preparation:
    """Return the preparation for a request: the requested one, or that of the version if none is requested.

    Raises:
        InvalidParameter: `resize` is asked for, and the version does not record its inversion and its crop.
    """
    own = manifest.preparation
    if asked is None or asked == own.fit:
        return own
    if asked == "resize":
        raise InvalidParameter(
            f"fit=resize repeats what a version was trained with, and {manifest.name}@{manifest.version} was trained "
            f"with fit={own.fit}"
        )
    return Preparation(fit=asked)


def prepare(content: bytes, preparation: Preparation, max_pixels: int) -> Fitted:
    """Prepare an image file with `mnist` or `resize`.

    Args:
        content: the whole file.
        preparation: of the model version, or what a request asks for; not `strict`, which changes nothing.
        max_pixels: a file that declares more pixels is rejected before it is decompressed.

    Raises:
        InvalidImage: one of its kinds says what is wrong.
        EmptyBody: the content is empty.
    """
    if preparation.fit == "mnist":
        return fit(content, max_pixels)
    return resize(content, max_pixels, invert=preparation.invert, crop=preparation.crop)


def prepared_pixels(content: bytes, preparation: Preparation, max_pixels: int) -> bytes:
    """Return the pixels that the model scores, uint8 [28, 28] as bytes.

    Args and errors as for `prepare`; `strict` is allowed.
    """
    return png.decode(content) if preparation.fit == "strict" else prepare(content, preparation, max_pixels).pixels
