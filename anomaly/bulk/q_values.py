"""Adds q-values to the rows of a finished run: the Benjamini-Hochberg adjustment of the p-values of all rows.

The smallest q-value of a set of discoveries bounds their expected share of normal images (Benjamini and Hochberg,
"Controlling the false discovery rate", 1995). The p-values of one calibration set depend on each other, but the bound
still holds (Bates et al., "Testing for outliers with conformal p-values", 2023).
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from anomaly.bulk.locations import Location
from anomaly.bulk.outputs import opened, parts, write_part


def adjust(counts: NDArray[np.int64]) -> NDArray[np.float64]:
    """Return the q-value of each possible p-value.

    Args:
        counts: number of rows with the p-value (k + 1) / n, for k = 0 to n - 1.

    Returns:
        float64 [n]: the minimum over all p-values p' >= p of rows * p' / (rows with a p-value <= p'), at most 1.
    """
    size, rows = len(counts), int(counts.sum())
    ranks = np.maximum(np.cumsum(counts), 1)
    raw = rows * np.arange(1.0, size + 1) / (size * ranks)  # one division, as in `app.scoring.discoveries`
    raw[counts == 0] = np.inf
    adjusted: NDArray[np.float64] = np.minimum(np.minimum.accumulate(raw[::-1])[::-1], 1.0)
    return adjusted


def add(output: Location, calibration_size: int) -> None:
    """Fill the column `q_value` of all rows.

    P-values are multiples of 1/(n + 1), so memory depends on the calibration and on the largest file of rows only. Each
    file is replaced completely. If the process is killed, the next run computes all q-values again.

    Args:
        output: folder of the rows.
        calibration_size: number of calibration scores, n.

    Raises:
        DamagedRowsError: a file is damaged.
    """
    size = calibration_size + 1
    counts = np.zeros(size, np.int64)
    for path in parts(output):
        with opened(output, path) as rows:
            for batch in rows.iter_batches(columns=["p_value"]):
                counts += np.bincount(_places(batch.column(0).drop_null(), size), minlength=size)
    q_values = adjust(counts)
    for path in parts(output):
        with opened(output, path) as rows:
            table = rows.read()
        p_values = table.column("p_value").combine_chunks()
        absent = np.asarray(p_values.is_null())
        found = pa.array(q_values[_places(p_values.fill_null(1.0), size)], mask=absent)
        table = table.set_column(table.schema.get_field_index("q_value"), "q_value", found)
        write_part(output, path, table)


def _places(p_values: Any, size: int) -> Any:
    return np.rint(np.asarray(p_values) * size).astype(np.int64) - 1
