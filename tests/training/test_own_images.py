"""Models of one's own pictures: a folder of photos trains, and the version prepares new photos in the same way."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path

import httpx
import numpy as np
import pytest
from PIL import Image, ImageOps

from app.images.prepare import prepared_pixels
from app.inference.detector import Detector
from app.models.manifest import STRICT, Preparation
from app.models.repository import Repository
from app.settings import Settings
from benchmarks.washers import DEFECTS, washer, write
from tests.conftest import running
from tests.requests import assert_problem
from tests.training.commands import run
from tests.training.conftest import CPU, write_pngs
from training.data import preflight
from training.data.dataset import DataError
from training.data.pictures import MAX_PIXELS, read_folder
from training.evaluation.calibrate import count_band, score

pytestmark = pytest.mark.process  # a version records the commit, which comes from git
RESIZE = Preparation(fit="resize", invert=True)


def jpeg(image: Image.Image) -> bytes:
    """Return a photo as a JPEG file."""
    file = io.BytesIO()
    image.save(file, "JPEG", quality=90)
    return file.getvalue()


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with 600 JPEG photos, dark on bright, of mixed sizes."""
    folder = tmp_path_factory.mktemp("photos") / "normal"
    write(folder, 600, np.random.default_rng(1))
    return folder


@pytest.fixture(scope="module")
def trained(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """Return a store with a model of the photos, and the output of the training command."""
    store = tmp_path_factory.mktemp("store")
    odd = photos.parent / "odd"
    write(odd, 40, np.random.default_rng(2), DEFECTS)
    code, out, err = run(
        "train", "--data-dir", photos, "--anomalies-dir", odd, "--fit", "resize", "--recipe", "instant",
        "--name", "washers", "--promote", "--model-store", store, "--device", "cpu",
    )  # fmt: skip
    assert code == 0, err
    return store, out


def test_photos_train_with_one_command(trained: tuple[Path, str]) -> None:
    """The table describes the folder, the manifest records the preparation, and the guards' limits fit the folder."""
    store, out = trained
    for words in (
        "JPEG 600",
        "--fit resize, inverted",
        "360 for training, 120 for the threshold (alpha 0.01 needs 99)",
    ):
        assert words in " ".join(out.split()), out
    manifest = Repository(store).manifest("washers", 1)
    assert manifest.preparation == RESIZE
    guards = manifest.recipe.parameters["guards"]
    assert guards["own_background"] is True
    assert 20 < guards["least_ink"] < 80
    assert "--fit resize --invert" in Repository(store).read(manifest, "report/model-card.md").decode()


def test_new_photos_have_false_alarms_in_the_exact_band(trained: tuple[Path, str]) -> None:
    """Of new photos, as many are anomalous as the distribution of a conformal threshold allows; defects are found."""
    repository = Repository(trained[0])
    artifact = repository.open("washers", 1)
    detector, summary = Detector.load(artifact, CPU), artifact.manifest.calibration
    rng = np.random.default_rng(3)

    def flagged(count: int, defects: tuple[str, ...] = ()) -> int:
        files = [jpeg(washer(rng, defects[i % len(defects)] if defects else None)) for i in range(count)]
        pixels = b"".join(prepared_pixels(file, artifact.manifest.preparation, MAX_PIXELS) for file in files)
        scores = score(detector, np.frombuffer(bytearray(pixels), np.uint8).reshape(-1, 28, 28))
        return int((scores > artifact.manifest.threshold).sum())

    low, high = count_band(summary.n, summary.rank, 500, 0.999)
    assert low <= flagged(500) <= high
    assert flagged(40, DEFECTS) >= 38


async def test_the_service_prepares_requests_as_the_training_did(
    trained: tuple[Path, str], make_settings: Callable[..., Settings]
) -> None:
    """Without `fit`, a photo is scored exactly as offline; `fit` overrides, and the reply names the source."""
    artifact = Repository(trained[0]).open("washers", 1)
    photo = jpeg(washer(np.random.default_rng(4)))
    expected = prepared_pixels(photo, RESIZE, MAX_PIXELS)
    mse = score(Detector.load(artifact, CPU), np.frombuffer(bytearray(expected), np.uint8).reshape(1, 28, 28))[0]
    async with running(make_settings(model_store=trained[0], default_model="washers")) as client:
        types = {"content-type": "image/jpeg"}
        own = await client.post("/score", content=photo, headers=types)
        asked = await client.post("/score?fit=resize", content=photo, headers=types)
        form = await client.post("/score", files={"file": ("a.jpg", photo, "image/jpeg")})
        assert [reply.status_code for reply in (own, asked, form)] == [200] * 3, own.text
        assert own.json()["mse"] == asked.json()["mse"] == form.json()["mse"] == float(mse)
        width, height = Image.open(io.BytesIO(photo), formats=("JPEG",)).size
        fitted = {"fit": "resize", "inverted": True, "crop": [0, 0, width, height]}
        assert own.json()["fitted"] == {**fitted, "source": "model"}
        assert asked.json()["fitted"] == {**fitted, "source": "request"}
        small = png(Image.frombytes("L", (28, 28), expected))
        strict = await client.post("/score?fit=strict", content=small, headers={"content-type": "image/png"})
        assert strict.json()["mse"] == pytest.approx(float(mse))
        assert "fitted" not in strict.json()
        assert (await client.get("/models")).json()["models"][0]["fit"] == "resize"
        await check_batch(client, small)


async def check_batch(client: httpx.AsyncClient, small: bytes) -> None:
    """A batch does not prepare files: it needs `fit=strict` for a model that prepares."""
    files = [("files", ("a.png", small, "image/png"))]
    assert (
        "fit=resize"
        in assert_problem(await client.post("/score/batch", files=files), 422, "invalid-parameter")["detail"]
    )
    assert (await client.post("/score/batch?fit=strict", files=files)).json()["failed"] == 0


async def test_resize_needs_a_version_that_was_trained_with_it(client: httpx.AsyncClient, zero: bytes) -> None:
    """A version of digits records no inversion and no crop."""
    reply = await client.post("/score?fit=resize", content=zero, headers={"content-type": "image/png"})
    assert "was trained with fit=strict" in assert_problem(reply, 422, "invalid-parameter")["detail"]


def png(image: Image.Image) -> bytes:
    """Return an image as a PNG file."""
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


def test_calibrate_prepares_as_the_version_does(trained: tuple[Path, str], tmp_path: Path) -> None:
    """A new threshold shows before and after, warns of too few images, and draws the highest scores."""
    write(tmp_path / "new", 120, np.random.default_rng(5))
    code, out, err = run("calibrate", "washers", "--data-dir", tmp_path / "new", "--model-store", trained[0])
    assert code == 0, err
    words = " ".join(out.split())
    assert "before 0.01" in words
    assert "after 0.01" in words
    assert "fewer than 200 images" in words
    assert (trained[0] / "washers" / "2" / "report" / "highest.png").is_file()
    manifest = Repository(trained[0]).manifest("washers", 2)
    assert manifest.preparation == RESIZE
    assert manifest.metrics["recall"][0] > 0.9


def test_a_crop_is_a_share_of_every_picture() -> None:
    """The middle half of a picture gives the same pixels as that half alone, up to the kernel's reach at the edge."""
    whole = washer(np.random.default_rng(6)).resize((224, 224))
    middle = whole.crop((56, 56, 168, 168))
    cropped = Preparation(fit="resize", crop=(0.25, 0.25, 0.75, 0.75))
    of_whole = prepared_pixels(png(whole), cropped, MAX_PIXELS)
    of_middle = prepared_pixels(png(middle), Preparation(fit="resize"), MAX_PIXELS)
    inner = [np.frombuffer(pixels, np.uint8).reshape(28, 28)[1:-1, 1:-1] for pixels in (of_whole, of_middle)]
    assert (inner[0] == inner[1]).all()


def test_fine_patterns_do_not_alias() -> None:
    """A checkerboard of single pixels becomes an even grey."""
    board = np.indices((448, 448)).sum(0) % 2 * 255
    pixels = prepared_pixels(png(Image.fromarray(board.astype(np.uint8))), Preparation(fit="resize"), MAX_PIXELS)
    assert np.ptp(np.frombuffer(pixels, np.uint8)[29:-29].astype(int)) <= 2


@pytest.mark.parametrize(
    ("kind", "options", "words"),
    [
        ("dark on bright", [], "add --fit resize, which inverts"),
        ("large", [], "so are 119 more of 120 files. Add --fit resize"),
        ("blank", ["--fit", "resize"], "120 of 120 images are blank"),
        ("mixed", ["--fit", "resize"], "decide with --invert or --no-invert"),
        ("dark on bright", ["--fit", "mnist", "--crop", "0,0,1,1"], "options of --fit resize"),
        ("dark on bright", ["--fit", "resize", "--crop", "0,0,10,10"], "as shares of the sides"),
    ],
)
def test_preflight_ends_before_training(tmp_path: Path, digits, kind: str, options: list[str], words: str) -> None:
    """Every folder that could not train ends with exit code 2 and one line with the next step."""
    zeros = digits.images[digits.labels == 0][:120]
    images = {
        "dark on bright": 255 - zeros,
        "large": zeros.repeat(2, 1).repeat(2, 2),
        "blank": np.arange(120, dtype=np.uint8)[:, None, None].repeat(28, 1).repeat(28, 2),
        "mixed": np.concatenate([zeros[:60], 255 - zeros[60:]]),
    }[kind]
    folder = write_pngs(tmp_path / "images", images)
    code, out, err = run("train", "--data-dir", folder, "--name", "mine", "--model-store", tmp_path / "store", *options)
    assert code == 2
    assert words in err, err
    assert "epoch" not in out


def test_inversion_follows_the_backgrounds(digits) -> None:
    """Bright backgrounds are inverted, dark ones are not, and textures without a background are not."""
    zeros = digits.images[digits.labels == 0][:100]
    assert preflight.choose_inversion(255 - zeros)
    assert not preflight.choose_inversion(zeros)
    noise = np.random.default_rng(0).integers(0, 256, (100, 28, 28)).astype(np.uint8)
    assert preflight.polarity(noise).none == 100
    assert not preflight.choose_inversion(noise)


def test_ink_is_counted_above_the_own_background(digits) -> None:
    """A grey background and an inversion do not change the ink, except for the contrast."""
    zeros = digits.images[digits.labels == 0][:50]
    assert np.allclose(preflight.ink(zeros), preflight.ink(255 - zeros))
    grey = (115 + zeros * (140 / 255)).astype(np.uint8)
    assert np.allclose(preflight.ink(grey), preflight.ink(zeros) * 140 / 255, rtol=0.05)


def test_handwriting_without_a_clear_digit_is_left_out(tmp_path: Path, digits) -> None:
    """With `mnist`, images that the service would reject are left out and counted; too many of them are an error."""
    zeros = [ImageOps.expand(Image.fromarray(image).resize((84, 84)), 30) for image in digits.images[:50]]
    blank = Image.new("L", (100, 100))
    for number, image in enumerate([*zeros[:40], blank]):
        image.save(tmp_path / f"{number:02}.png")
    found = read_folder(tmp_path, Preparation(fit="mnist"))
    assert dict(found.refused) == {"blank-image": 1}
    assert len(found.images) == 40
    for number in range(41, 50):
        blank.save(tmp_path / f"{number:02}.png")
    with pytest.raises(DataError, match="use --fit resize"):
        read_folder(tmp_path, Preparation(fit="mnist"))
    with pytest.raises(DataError, match="has no PNG files"):
        read_folder(tmp_path / "..", STRICT)
