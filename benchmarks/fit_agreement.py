"""How often `fit=mnist` gives a changed digit the verdict of the original: writes the table of docs/fit.md.

python -m benchmarks.fit_agreement --data-dir FOLDER_OF_MNIST
"""

from __future__ import annotations

import argparse
import io
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageFilter, ImageOps

from app.images.fit import fit
from app.inference.detector import Detector
from app.models.repository import Repository
from app.problems import InvalidImage
from training.data.loaders import load

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "fit.md"
BEGIN, END = "<!-- table -->", "<!-- end of table -->"
Change = Callable[[Image.Image, np.random.Generator], Image.Image]


def _scaled(image: Image.Image, factor: float, kernel: Image.Resampling) -> Image.Image:
    return image.resize((round(image.width * factor), round(image.height * factor)), kernel)


def _placed(image: Image.Image, side: int, rng: np.random.Generator) -> Image.Image:
    canvas = Image.new("L", (side, side), 0)
    left, top = (int(rng.integers(0, side - length + 1)) for length in image.size)
    canvas.paste(image, (left, top))
    return canvas


def _grey(image: Image.Image, dark: int, bright: int) -> Image.Image:
    return image.point(lambda value: dark + value * (bright - dark) / 255)


def _noisy(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    pixels = np.asarray(image, float) * 0.7 + 30 + rng.normal(0, 3, (image.height, image.width))
    return Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))


def cropped(image: Image.Image) -> Image.Image:
    """Return a bright digit on black without any margin around its strokes; enlarged, without blurred edges too."""
    return image.crop(image.point(lambda value: 255 * (value > (127 if image.width > 28 else 0))).getbbox())


def _shaded(image: Image.Image) -> Image.Image:
    light = np.linspace(1, 0.9, image.width)[None, :]
    pixels = (235 - np.asarray(image, float) * 0.75) * light
    return Image.fromarray(pixels.astype(np.uint8))


BICUBIC, BILINEAR, NEAREST = Image.Resampling.BICUBIC, Image.Resampling.BILINEAR, Image.Resampling.NEAREST

MILD: dict[str, Change] = {
    "left as it is": lambda image, _: image,
    "moved on a 64x64 canvas": lambda image, rng: _placed(image, 64, rng),
    "inverted": lambda image, _: ImageOps.invert(image),
    "enlarged 3 times, smoothly": lambda image, _: _scaled(image, 3, BICUBIC),
    "enlarged 10 times, smoothly": lambda image, _: _scaled(image, 10, BICUBIC),
    "enlarged 10 times, in squares": lambda image, _: _scaled(image, 10, NEAREST),
    "enlarged 7.3 times, moved, inverted": lambda image, rng: ImageOps.invert(
        _placed(_scaled(image, 7.3, BILINEAR), 400, rng)
    ),
    "dark grey on light grey, 8 times": lambda image, _: _grey(_scaled(image, 8, BICUBIC), 220, 40),
    "in colour, 8 times": lambda image, _: ImageOps.colorize(_scaled(image, 8, BICUBIC), "#0b2a4a", "#ffe9a8"),
}
CROPPED: dict[str, Change] = {
    "cropped to its strokes": lambda image, _: cropped(image),
    "cropped to its strokes, 8 times, inverted": lambda image, _: ImageOps.invert(cropped(_scaled(image, 8, BICUBIC))),
}
STRONGER: dict[str, Change] = {
    "noise of a camera, 8 times": lambda image, rng: _noisy(_scaled(image, 8, BICUBIC), rng),
    "paper lit from one side, 8 times": lambda image, _: _shaded(_scaled(image, 8, BICUBIC)),
    "drawn thicker by 0.6 pixels, 10 times": lambda image, _: _scaled(image, 10, BICUBIC).filter(
        ImageFilter.MaxFilter(7)
    ),
    "drawn thicker by 1.2 pixels, 10 times": lambda image, _: _scaled(image, 10, BICUBIC).filter(
        ImageFilter.MaxFilter(13)
    ),
    "drawn thinner by 0.6 pixels, 10 times": lambda image, _: _scaled(image, 10, BICUBIC).filter(
        ImageFilter.MinFilter(7)
    ),
    "hard edges, 10 times": lambda image, _: _scaled(image, 10, BICUBIC).point(lambda value: 255 * (value > 127)),
}


def fitted(digits: NDArray[np.uint8], change: Change, seed: int = 0) -> tuple[NDArray[np.uint8], NDArray[np.bool_]]:
    """Return what `fit=mnist` makes of changed digits, uint8 [n, 28, 28] each, and which of them it took, bool [n]."""
    rng = np.random.default_rng(seed)
    planes, taken = np.zeros_like(digits), np.ones(len(digits), np.bool_)
    for at, digit in enumerate(digits):
        buffer = io.BytesIO()
        change(Image.fromarray(digit), rng).save(buffer, "PNG", compress_level=1)
        try:
            planes[at] = np.frombuffer(fit(buffer.getvalue(), 1 << 22).pixels, np.uint8).reshape(28, 28)
        except InvalidImage:
            taken[at] = False
    return planes, taken


class Judge:
    """The current version of a model.

    Args:
        store: the model store.
        name: of the model.
    """

    def __init__(self, store: Path, name: str) -> None:
        repository = Repository(store)
        artifact = repository.open(name, repository.current(name) or 0)
        self.threshold = artifact.manifest.threshold
        self._detector = Detector.load(artifact, torch.device("cpu"), (1,))

    def verdicts(self, digits: NDArray[np.uint8]) -> NDArray[np.bool_]:
        """Return whether each digit, uint8 [n, 28, 28], is anomalous."""
        found = self._detector.detect(np.ascontiguousarray(digits[:, None]))
        anomalous: NDArray[np.bool_] = found.mse.astype(float) > self.threshold
        return anomalous


def agreement(judge: Judge, digits: NDArray[np.uint8], change: Change) -> float:
    """Return the share of digits whose verdict is that of the original; a refused one has none."""
    planes, taken = fitted(digits, change)
    return _agreement(judge, digits, planes, taken)


def _agreement(judge: Judge, digits: NDArray[np.uint8], planes: NDArray[np.uint8], taken: NDArray[np.bool_]) -> float:
    return float(((judge.verdicts(digits) == judge.verdicts(planes)) & taken).mean())


def _rows(judges: dict[str, Judge], digits: NDArray[np.uint8]) -> Iterator[str]:
    names = [f"`{name}`" for name in judges]
    yield "| change | " + " | ".join(names) + " | refused |"
    yield "| --- |" + " ---: |" * (len(names) + 1)
    for kind, changes in (("mild", MILD), ("no margin", CROPPED), ("stronger", STRONGER)):
        for words, change in changes.items():
            planes, taken = fitted(digits, change)
            shares = [_agreement(judge, digits, planes, taken) for judge in judges.values()]
            cells = [*(f"{100 * share:.1f} %" for share in shares), f"{100 * (~taken).mean():.1f} %"]
            yield f"| {words} ({kind}) | {' | '.join(cells)} |"


def main() -> None:
    """Score the test digits, each as it is and after each change, and write the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data-dir", type=Path, help="folder with MNIST's files")
    parser.add_argument("--per-kind", type=int, default=500, help="zeros, and other digits")
    parser.add_argument("--model-store", type=Path, default=ROOT / "model_store")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    data = load("mnist", arguments.data_dir)
    start = data.test_start or 0
    images, labels = data.images[start:], data.labels[start:]
    digits = np.concatenate(
        [images[labels == 0][: arguments.per_kind], images[labels != 0][: arguments.per_kind]],
    )
    store = arguments.model_store
    judges = {name: Judge(store, name) for name in Repository(store).names() if name.startswith("zero")}
    said = (
        f"{len(digits):,} digits of MNIST's test file, half of them zeros; share whose verdict is the original's.\n"
        "A rejected image counts as a different verdict.\n\n"
    )
    table = said + "\n".join(_rows(judges, digits)) + "\n"
    head, _, rest = PAGE.read_text().partition(BEGIN)
    PAGE.write_text(f"{head}{BEGIN}\n\n{table}\n{END}{rest.partition(END)[2]}")
    print(table)


if __name__ == "__main__":
    main()
