"""The choice of the images that a report shows, and their reconstructions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from app.inference.detector import Detector
from training.evaluation.probes import Probe
from training.networks.scoring import LOCAL_CODE
from training.report.pictures import Example

TitledImages = Sequence[tuple[str, NDArray[np.uint8]]]
"""Titles with one image each, uint8 [28, 28]."""


@dataclass(frozen=True)
class ScoredTest:
    """A test set with its scores.

    Attributes:
        images: uint8 [n, 28, 28].
        labels: uint8 [n].
        scores: float32 [n].
        is_normal: bool [n].
        label_names: name of each label.
    """

    images: NDArray[np.uint8]
    labels: NDArray[np.uint8]
    scores: NDArray[np.float32]
    is_normal: NDArray[np.bool_]
    label_names: Sequence[str]

    def sorted_indices(self, mask: NDArray[np.bool_]) -> NDArray[np.intp]:
        """Return the indices of the images in a mask, bool [n], lowest score first."""
        indices = np.flatnonzero(mask)
        return indices[np.argsort(self.scores[indices], kind="stable")]

    def typical(self, label: int) -> int:
        """Return the index of the image with the median score of its label."""
        indices = self.sorted_indices(self.labels == label)
        return int(indices[len(indices) // 2])


def overview(test: ScoredTest) -> TitledImages:
    """Choose a typical normal image, a typical six (else the first other label), and the extremes of both classes."""
    normals, anomalies = test.sorted_indices(test.is_normal), test.sorted_indices(~test.is_normal)
    names, labels = test.label_names, test.labels
    chosen: list[tuple[str, int]] = []
    if len(normals):
        typical = int(normals[len(normals) // 2])
        chosen.append((f"typical {names[labels[typical]]}", typical))
    if len(anomalies):
        shown = 6 if (labels[anomalies] == 6).any() else int(labels[anomalies].min())
        chosen.append((f"typical {names[shown]}", test.typical(shown)))
    if len(normals):
        chosen.append((f"highest normal: {names[labels[normals[-1]]]}", int(normals[-1])))
    if len(anomalies):
        chosen.append((f"lowest anomalous: {names[labels[anomalies[0]]]}", int(anomalies[0])))
        chosen.append((f"highest anomalous: {names[labels[anomalies[-1]]]}", int(anomalies[-1])))
    return [(title, test.images[index]) for title, index in chosen]


def normals(test: ScoredTest, each: int = 5) -> TitledImages:
    """Choose the `each` normal images with the lowest scores, and as many with the highest scores."""
    indices = test.sorted_indices(test.is_normal)
    each = min(each, len(indices) // 2)
    ends = [*(("lowest", i) for i in indices[:each]), *(("highest", i) for i in indices[len(indices) - each :])]
    return [(f"{end} {test.label_names[test.labels[index]]}", test.images[index]) for end, index in ends]


def kinds(test: ScoredTest) -> TitledImages:
    """Choose a typical image of every label, normal labels first."""
    is_normal = {int(label): bool(test.is_normal[test.labels == label][0]) for label in np.unique(test.labels)}
    order = sorted(is_normal, key=lambda label: (not is_normal[label], label))
    return [(f"typical {test.label_names[label]}", test.images[test.typical(label)]) for label in order]


def of_probes(probes: Sequence[Probe], names: Sequence[str]) -> TitledImages:
    """Choose the first image of each named probe."""
    by_name = {probe.name: probe.images[0] for probe in probes}
    return [(name, by_name[name]) for name in names if name in by_name]


def reconstruct(
    chosen: TitledImages, detector: Detector, threshold: float, reference: Detector | None = None
) -> list[Example]:
    """Score and reconstruct the chosen images, also by a reference model if there is one."""
    images = np.ascontiguousarray(np.stack([image for _, image in chosen])[:, None])
    detections = detector.detect(images)
    of_reference = reference.detect(images).reconstruction[:, 0] if reference else [None] * len(images)
    return [
        Example(
            title=title,
            image=image,
            reconstruction=detections.reconstruction[row, 0],
            error_map=detections.error_map[row],
            mse=float(detections.mse[row]),
            flagged=bool(detections.mse[row] > threshold),
            guarded=0 < int(detections.reason[row]) < LOCAL_CODE,
            reference=of_reference[row],
        )
        for row, (title, image) in enumerate(chosen)
    ]
