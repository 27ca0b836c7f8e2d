"""Measure the shipped model `zero` on what the ten-digit benchmark does not show; write results/further.json.

python -m benchmarks.further --data-dir FOLDER_OF_MNIST

Four tables: recall at equal false-positive rates, small defects, the digits of scikit-learn, printed digits. Test data
choose nothing: the version and its threshold are fixed before. All random numbers have the seed 0.
"""

from __future__ import annotations

import argparse
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont
from scipy import ndimage
from sklearn.datasets import load_digits
from sklearn.metrics import roc_auc_score

from app.images.fit import fit
from app.inference.detector import Detector
from app.models.repository import Repository
from app.problems import InvalidImage
from training.data.loaders import load
from training.evaluation.calibrate import score

ROOT = Path(__file__).parent.parent
RESULT = ROOT / "benchmarks" / "results" / "further.json"
ALPHAS = (0.01, 0.05)
FONTS = ("DejaVuSans", "DejaVuSans-Bold", "DejaVuSansMono", "DejaVuSerif", "DejaVuSerif-Bold", "DejaVuSerif-Italic",
         "STIXGeneral", "STIXGeneralBol", "STIXGeneralItalic", "cmr10", "cmss10", "cmtt10")  # fmt: skip
"""Fonts that matplotlib carries and that have digits of their own."""
Images = NDArray[np.uint8]
Scores = NDArray[np.float32]


def line(image: Images, rng: np.random.Generator) -> Images:
    """Draw a vertical line of one pixel through the middle third."""
    image[4:24, int(rng.integers(10, 18))] = 255
    return image


def blob(image: Images, rng: np.random.Generator) -> Images:
    """Add a blob with a standard deviation of 1.5 pixels within 8 pixels of the middle."""
    spot = np.zeros((28, 28))
    spot[tuple(rng.integers(6, 22, 2))] = 1
    spot = ndimage.gaussian_filter(spot, 1.5)
    return np.maximum(image, spot / spot.max() * 255).astype(np.uint8)


def square(image: Images, _: np.random.Generator) -> Images:
    """Add a 4x4 square in the upper left corner."""
    image[2:6, 2:6] = 255
    return image


def gap(image: Images, rng: np.random.Generator) -> Images:
    """Erase a square of 5 pixels on the strokes."""
    rows, columns = np.nonzero(image > 128)
    at = int(rng.integers(len(rows)))
    image[max(0, rows[at] - 2) : rows[at] + 3, max(0, columns[at] - 2) : columns[at] + 3] = 0
    return image


DEFECTS: dict[str, Callable[[Images, np.random.Generator], Images]] = {
    "line of one pixel": line,
    "blob of 1.5 pixels": blob,
    "4x4 square in a corner": square,
    "gap of 5 pixels in a stroke": gap,
}


def rates(anomalous: Scores, normal: Scores, thresholds: list[float]) -> dict[str, Any]:
    """Return AUROC, and recall at the calibrated thresholds with their false-positive rates, and at equal rates."""
    labels = np.repeat([0, 1], [len(normal), len(anomalous)])
    equal = [float(np.quantile(normal, 1 - alpha, method="higher")) for alpha in ALPHAS]
    return {
        "auroc": float(roc_auc_score(labels, np.concatenate([normal, anomalous]))),
        "anomalous": len(anomalous),
        "normal": len(normal),
        "calibrated": [[float((anomalous > each).mean()), float((normal > each).mean())] for each in thresholds],
        "equal": [float((anomalous > each).mean()) for each in equal],
    }


def fitted(pictures: list[Image.Image]) -> tuple[Images, NDArray[np.bool_]]:
    """Return what `fit` makes of pictures, and which of them it accepts."""
    planes, taken = np.zeros((len(pictures), 28, 28), np.uint8), np.ones(len(pictures), np.bool_)
    for at, picture in enumerate(pictures):
        file = io.BytesIO()
        picture.save(file, "PNG", compress_level=1)
        try:
            planes[at] = np.frombuffer(fit(file.getvalue(), 10**6).pixels, np.uint8).reshape(28, 28)
        except InvalidImage:
            taken[at] = False
    return planes, taken


def uci() -> tuple[list[Image.Image], NDArray[np.int64]]:
    """Return the 1,797 digits of scikit-learn (UCI, 8x8 pixels), enlarged 8 times with a margin, and labels."""
    found = load_digits()
    pictures = []
    for digit in found.images:
        canvas = Image.new("L", (88, 88))
        canvas.paste(
            Image.fromarray((digit * 255 / 16).astype(np.uint8)).resize((64, 64), Image.Resampling.BICUBIC), (12, 12)
        )
        pictures.append(canvas)
    return pictures, found.target


def printed(digit: int) -> list[Image.Image]:
    """Return a digit in every font, black on white."""
    folder = Path(mpl.get_data_path()) / "fonts" / "ttf"
    pictures = []
    for font in FONTS:
        page = Image.new("L", (120, 120), 255)
        ImageDraw.Draw(page).text((60, 60), str(digit), 0, ImageFont.truetype(folder / f"{font}.ttf", 80), anchor="mm")
        pictures.append(page)
    return pictures


def measure(store: Path, data_dir: Path | None) -> dict[str, Any]:
    """Return all figures."""
    repository = Repository(store)
    version = repository.current("zero")
    assert version is not None
    artifact = repository.open("zero", version)
    detector = Detector.load(artifact, torch.device("cpu"))
    thresholds = [artifact.calibration.threshold(alpha) for alpha in ALPHAS]
    data = load("mnist", data_dir)
    images, labels = data.images[data.test_start or 0 :], data.labels[data.test_start or 0 :]
    normal, others = images[labels == 0], images[labels != 0]
    of_normal = score(detector, normal)
    rng = np.random.default_rng(0)
    defects = {
        name: rates(score(detector, np.stack([change(image.copy(), rng) for image in normal])), of_normal, thresholds)
        for name, change in DEFECTS.items()
    }
    pictures, targets = uci()
    planes, taken = fitted(pictures)
    of_uci = score(detector, planes)
    prints = {}
    for digit in range(10):
        planes, accepted = fitted(printed(digit))
        normal_at = [int(((score(detector, planes) <= each) & accepted).sum()) for each in thresholds]
        prints[str(digit)] = {"normal": normal_at, "of": int(accepted.sum()), "refused": int((~accepted).sum())}
    return {
        "version": version,
        "source": data.source,
        "digits": rates(score(detector, others), of_normal, thresholds),
        "defects": defects,
        "uci": {
            **rates(of_uci[taken & (targets != 0)], of_uci[taken & (targets == 0)], thresholds),
            "refused": int((~taken).sum()),
        },
        "printed": prints,
    }


def section(found: dict[str, Any]) -> str:
    """Return the section of docs/benchmark.md."""
    rows = [("other digits of MNIST's test file", found["digits"]), *found["defects"].items()]
    rows.append(("digits of scikit-learn (UCI), `fit=mnist`", found["uci"]))
    lines = [
        "| anomalies | AUROC | recall at alpha 1 % / 5 % | its false-positive rate | recall at equal rates 1 % / 5 % |",
        "| --- | ---: | ---: | ---: | ---: |",
    ]
    for name, of in rows:
        recall, alarms = (" / ".join(f"{100 * each[part]:.1f}" for each in of["calibrated"]) for part in (0, 1))
        equal = " / ".join(f"{100 * each:.1f}" for each in of["equal"])
        lines.append(f"| {name} | {100 * of['auroc']:.2f} | {recall} | {alarms} | {equal} |")
    prints = [
        "| printed digit | normal at alpha 1 % | normal at alpha 5 % | refused |",
        "| --- | ---: | ---: | ---: |",
        *(
            f"| {digit} | {of['normal'][0]} of {of['of']} | {of['normal'][1]} of {of['of']} | {of['refused']} |"
            for digit, of in found["printed"].items()
        ),
    ]
    whole, foreign = found["digits"], found["uci"]
    return f"""## The shipped model `zero`, beyond the benchmark

Written by `python -m benchmarks.further`, in %, for `zero@{found["version"]}`. Nothing was chosen on these images.
*Equal rates*: the threshold is the score that 1 % or 5 % of the normal images of the same row exceed, so that a row
with a higher false-positive rate has no advantage. Defects are on all {whole["normal"]:,} zeros of MNIST's test file
(seed 0). UCI: {foreign["normal"]:,} zeros and {foreign["anomalous"]:,} other digits; {foreign["refused"]:,} refused.

{chr(10).join(lines)}

Small defects are often missed, because the score is a mean over the whole image. Printed digits are another population
than handwriting. In {len(FONTS)} fonts (black on white, `fit=mnist`), these numbers have the verdict normal:

{chr(10).join(prints)}
"""


def main() -> None:
    """Measure and write the result."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data-dir", type=Path, help="folder with MNIST's files")
    parser.add_argument("--model-store", type=Path, default=ROOT / "model_store")
    given = parser.parse_args()
    torch.set_num_threads(1)
    found = measure(given.model_store, given.data_dir)
    RESULT.write_text(json.dumps(found, indent=1) + "\n")
    print(section(found))


if __name__ == "__main__":
    main()
