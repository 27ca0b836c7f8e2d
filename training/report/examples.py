"""Choose what a report shows: typical images, extremes, one of every kind.

Knows: scores, labels, the detector that redraws. Does not know: how pictures are drawn, what a threshold is made of.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from app.inference.detector import Detector
from training.evaluation.probes import Probe
from training.report.pictures import Example

Chosen = Sequence[tuple[str, NDArray[np.uint8]]]
"""Titles with one image each, uint8 [28, 28]."""


@dataclass(frozen=True)
class Tested:
    """A test set with its scores.

    Attributes:
        images: uint8 [n, 28, 28].
        labels: [n].
        scores: float32 [n].
        is_normal: bool [n].
        label_names: what each label is called.
    """

    images: NDArray[np.uint8]
    labels: NDArray[np.uint8]
    scores: NDArray[np.float32]
    is_normal: NDArray[np.bool_]
    label_names: Sequence[str]

    def ranked(self, wanted: NDArray[np.bool_]) -> NDArray[np.intp]:
        """Return the positions of the wanted images, lowest score first."""
        places = np.flatnonzero(wanted)
        return places[np.argsort(self.scores[places], kind="stable")]

    def typical(self, label: int) -> int:
        """Return the position of the image of a label whose score is the label's median."""
        ranked = self.ranked(self.labels == label)
        return int(ranked[len(ranked) // 2])


def overview(tested: Tested) -> Chosen:
    """Choose a typical normal, a typical six (or the first other label), and the extremes of both kinds."""
    normals, anomalies = tested.ranked(tested.is_normal), tested.ranked(~tested.is_normal)
    names, labels = tested.label_names, tested.labels
    chosen: list[tuple[str, int]] = []
    if len(normals):
        typical = int(normals[len(normals) // 2])
        chosen.append((f"a typical {names[labels[typical]]}", typical))
    if len(anomalies):
        shown = 6 if (labels[anomalies] == 6).any() else int(labels[anomalies].min())
        chosen.append((f"a typical {names[shown]}", tested.typical(shown)))
    if len(normals):
        chosen.append((f"the worst {names[labels[normals[-1]]]}", int(normals[-1])))
    if len(anomalies):
        chosen.append((f"best hidden: {names[labels[anomalies[0]]]}", int(anomalies[0])))
        chosen.append((f"most anomalous: {names[labels[anomalies[-1]]]}", int(anomalies[-1])))
    return [(title, tested.images[at]) for title, at in chosen]


def normals(tested: Tested, each: int = 5) -> Chosen:
    """Choose the best and the worst redrawn normal images."""
    ranked = tested.ranked(tested.is_normal)
    each = min(each, len(ranked) // 2)
    ends = [*(("best", at) for at in ranked[:each]), *(("worst", at) for at in ranked[len(ranked) - each :])]
    return [(f"{end} {tested.label_names[tested.labels[at]]}", tested.images[at]) for end, at in ends]


def kinds(tested: Tested) -> Chosen:
    """Choose the typical image of every label, normal ones first."""
    of_normal = {int(label): bool(tested.is_normal[tested.labels == label][0]) for label in np.unique(tested.labels)}
    order = sorted(of_normal, key=lambda label: (not of_normal[label], label))
    return [(f"typical {tested.label_names[label]}", tested.images[tested.typical(label)]) for label in order]


def probed(probes: Sequence[Probe], wanted: Sequence[str]) -> Chosen:
    """Choose the first image of each wanted probe."""
    by_name = {probe.name: probe.images[0] for probe in probes}
    return [(name, by_name[name]) for name in wanted if name in by_name]


def redraw(chosen: Chosen, detector: Detector, threshold: float, reference: Detector | None = None) -> list[Example]:
    """Let the detector redraw what was chosen, and a reference model too if there is one."""
    images = np.ascontiguousarray(np.stack([image for _, image in chosen])[:, None])
    found = detector.detect(images)
    beside = reference.detect(images).reconstruction[:, 0] if reference else [None] * len(images)
    return [
        Example(
            title=title,
            image=image,
            reconstruction=found.reconstruction[row, 0],
            error_map=found.error_map[row],
            mse=float(found.mse[row]),
            flagged=bool(found.mse[row] > threshold),
            guarded=bool(found.reason[row]),
            reference=beside[row],
        )
        for row, (title, image) in enumerate(chosen)
    ]
