"""Write the seeds of the corpus: `python -m tests.fuzz.seeds`. Fuzzing adds to them."""

from __future__ import annotations

import io
import struct
from pathlib import Path

import numpy as np
from PIL import Image

from tests import pngs

CORPUS = Path(__file__).parent / "corpus"


def pictures() -> dict[str, bytes]:
    """Return one PNG per structure that the decoder distinguishes."""
    grey = Image.fromarray(pngs.gradient())
    coloured = Image.merge("RGB", (grey, grey, grey))
    transparent = grey.convert("LA")
    return {
        "grey": pngs.plain(),
        "one-bit": pngs.saved(grey.convert("1")),
        "palette": pngs.saved(grey.convert("P")),
        "rgb": pngs.saved(coloured),
        "grey-alpha": pngs.saved(transparent),
        "rgba": pngs.saved(coloured.convert("RGBA")),
        "sixteen": pngs.saved(Image.fromarray(pngs.gradient().astype(np.uint16) << 8)),
        "interlaced": pngs.SIGNATURE + pngs.header(interlace=1) + pngs.chunk(b"IDAT", pngs.rows(pngs.gradient())),
        "text": pngs.plain(None, pngs.chunk(b"tEXt", b"key\0value")),
        "level": pngs.plain(None, pngs.chunk(b"tRNS", struct.pack(">H", 255))),
        "small": pngs.plain(pngs.gradient(5)),
    }


def forms(field: str) -> dict[str, bytes]:
    """Return forms with one file, with parameters, with two files, with a preamble, and an empty one."""
    file = (field, "a.png", pngs.plain())
    alpha = ("alpha", None, b"0.05")
    made = {"one": [file], "parameter": [alpha, file], "after": [file, alpha], "two": [file, file], "none": []}
    bodies = {name: pngs.multipart(*parts, boundary="b")[1] for name, parts in made.items()}
    return {**bodies, "preamble": b"text\r\n" + bodies["one"], "short": bodies["one"][:-4]}


def arrays() -> dict[str, bytes]:
    """Return npy files: images, other types, other shapes, a truncated one."""
    images = (np.arange(3 * 28 * 28) % 251).astype(np.uint8).reshape(3, 28, 28)
    made = {
        "images": images,
        "channel": images[:, None],
        "none": images[:0],
        "float": images.astype(np.float32)[:1],
        "fortran": np.asfortranarray(images),
        "single": images[0],
    }
    files = {}
    for name, array in made.items():
        buffer = io.BytesIO()
        np.save(buffer, array)
        files[name] = buffer.getvalue()
    files["extra-key"] = files["images"].replace(b"'shape'", b"'a':1,'shape'").replace(b" " * 8 + b"\n", b"\n")
    files["minor-version"] = files["images"][:7] + b"\7" + files["images"][8:]
    return {**files, "short": files["images"][:-1], "long": files["images"] + b"x"}


def main() -> None:
    """Write all seeds."""
    built = {f"built-{n}": bytes((2, n % 5, n % 7, n % 2, n % 8, 0, n)) + bytes(range(n, n + 40)) for n in range(20)}
    seeds = {
        "png": {
            **{name: b"\x01" + file for name, file in pictures().items()},
            "raw": b"\x00" + pngs.plain(),
            **built,
        },
        "fit": {
            **{name: b"\x01" + file for name, file in pictures().items()},
            "jpeg": b"\x03" + pngs.saved(Image.fromarray(pngs.gradient(40)), format="JPEG", quality=20),
            "webp": b"\x03" + pngs.saved(Image.fromarray(pngs.gradient(40)), format="WEBP", quality=20),
        },
        "form": {name: b"\x00\x01" + body for name, body in forms("file").items()},
        "forms": {name: b"\x00\x01" + body for name, body in forms("files").items()},
        "npy": {name: b"\x00\x01" + body for name, body in arrays().items()},
        "score": {
            **{name: bytes((n % 8, 0, 0, n)) + file for n, (name, file) in enumerate(pictures().items())},
            **{f"form-{name}": bytes((n % 8, 1, 0, n)) + body for n, (name, body) in enumerate(forms("file").items())},
        },
    }
    for target, files in seeds.items():
        folder = CORPUS / target
        folder.mkdir(parents=True, exist_ok=True)
        for name, content in files.items():
            (folder / name).write_bytes(content)


if __name__ == "__main__":
    main()
