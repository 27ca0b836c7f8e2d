"""The problem types of images and arrays of images."""

from __future__ import annotations

from app.problems.base import Problem


class InvalidImage(Problem):
    """The body is not an image that the model can score."""

    status, type, title = 422, "/problems/invalid-image", "The image cannot be scored"
    hint = "Send a greyscale PNG of 28x28 pixels."


class NotAPng(InvalidImage):
    """The file does not begin with the PNG signature."""

    type, title = "/problems/not-a-png", "The file is not a PNG"


class TruncatedPng(InvalidImage):
    """The PNG ends before its IEND chunk is complete."""

    type, title = "/problems/truncated-png", "The PNG is truncated"
    hint = "Send the complete file."


class CorruptPng(InvalidImage):
    """The PNG has an invalid checksum, chunk order or pixel data, or bytes after its end."""

    type, title = "/problems/corrupt-png", "The PNG is corrupt"
    hint = "Save the image again, and transfer the file as binary."


class AnimatedPng(InvalidImage):
    """The PNG contains several frames."""

    type, title = "/problems/animated-png", "The PNG is animated"
    hint = "Send one frame per request."


class WrongSize(InvalidImage):
    """The image does not have the model's input size."""

    type, title = "/problems/wrong-size", "The image does not have the model's input size"
    hint = "Scale the image to 28x28 pixels before sending it, or set fit=mnist."


class ImageTooLarge(InvalidImage):
    """The image declares more pixels than the service accepts."""

    type, title = "/problems/image-too-large", "The image has too many pixels"
    hint = "Scale the image down before sending it."


class ExtremeShape(InvalidImage):
    """The header declares a side that is too long, or sides that differ too much."""

    type, title = "/problems/extreme-shape", "The image is too long or too narrow"
    hint = "Crop the image to the digit, with a margin around it."


class UnsupportedFormat(InvalidImage):
    """The bytes are not in a format that `fit=mnist` decodes."""

    type, title = "/problems/unsupported-format", "The image format is not supported"
    hint = "Convert the image to PNG, JPEG or WebP, upright and of any size."


class CorruptImage(InvalidImage):
    """A JPEG or WebP file is damaged or cut short."""

    type, title = "/problems/corrupt-image", "The image file is damaged"
    hint = "Save the image again, and send the whole file."


class AnimatedImage(InvalidImage):
    """A WebP file has several frames."""

    type, title = "/problems/animated-image", "The image is animated"
    hint = "Send one frame per request."


class NotGrey(InvalidImage):
    """The image has colours; only `fit=mnist` converts them."""

    type, title = "/problems/not-grey", "The image is not greyscale"
    hint = "Convert the image to greyscale before sending it."


class LowBitDepth(InvalidImage):
    """The 16-bit samples use 12 bits or fewer; the image would be scored as almost black."""

    type, title = "/problems/low-bit-depth", "The 16-bit samples are not scaled to 16 bits"
    hint = "Scale the samples so that white is 65535, or convert the image to 8 bits so that white is 255."


class Transparent(InvalidImage):
    """The image has transparent pixels, and no background is defined."""

    type, title = "/problems/transparent", "The image has transparent pixels"
    hint = "Flatten the image onto its background before sending it."


class BlankImage(InvalidImage):
    """The image has no strokes that `fit=mnist` could crop to."""

    type, title = "/problems/blank-image", "The image is blank"
    hint = "Send an image with a clear stroke on a plain background."


class AmbiguousImage(InvalidImage):
    """`fit=mnist` cannot distinguish the stroke from the background."""

    type, title = "/problems/ambiguous-image", "The stroke and the background cannot be distinguished"
    hint = "Send one digit with a margin, on a plain background that is darker or brighter than the whole digit."

    def __init__(self, detail: str = "", hint: str = "") -> None:
        super().__init__(detail)
        if hint:
            self.hint = hint


class WrongArray(InvalidImage):
    """The array does not have a supported type and shape."""

    type, title = "/problems/wrong-array", "The array is not uint8 of shape [N, 28, 28]"
    hint = "Send uint8 of shape [N, 28, 28], where 0 is the background and 255 the full stroke."
