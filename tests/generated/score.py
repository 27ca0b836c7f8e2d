"""Scores an image with the generated Python client: score.py FOLDER URL IMAGE."""

from __future__ import annotations

import io
import json
import pathlib
import sys

folder, url, image = sys.argv[1:]
sys.path.insert(0, folder)

import client  # noqa: E402
from client.api.models import calibration, model  # noqa: E402
from client.api.open_inference_protocol import v1_predict, v2_infer, v2_model  # noqa: E402
from client.api.scores import score, score_batch  # noqa: E402
from client.models import (  # noqa: E402
    ErrorDocument,
    ProblemDocument,
    ScoreBatchFilesBody,
    ScoreFilesBody,
    V1PredictBody,
    V2InferBody,
)
from client.types import File  # noqa: E402

content = pathlib.Path(image).read_bytes()


def file(data: bytes = content) -> File:
    """Return a file to send."""
    return File(io.BytesIO(data), "image.png", "image/png")


with client.Client(url, raise_on_unexpected_status=True) as service:
    form = score.sync(client=service, body=ScoreFilesBody(file()), model="zero")
    batch = score_batch.sync(client=service, body=ScoreBatchFilesBody([file(), file()]))
    problem = score.sync(client=service, body=ScoreFilesBody(file(b"no image")))
    assert isinstance(problem, ProblemDocument)
    document = {"inputs": [{"name": "images", "shape": [1, 28, 28], "datatype": "UINT8", "data": [0] * 784}]}
    tensor = v2_infer.sync("zero", client=service, body=V2InferBody.from_dict(document))
    instances = v1_predict.sync("zero", client=service, body=V1PredictBody.from_dict({"instances": [[0] * 784]}))
    missing = v2_model.sync("none", client=service)
    assert isinstance(missing, ErrorDocument)
    found = {
        "form": form.to_dict(),
        "batch": [item.mse for item in batch.items],
        "problem": problem.type_,
        "tensor": [(each.name, each.data) for each in tensor.outputs],
        "prediction": instances.predictions[0].to_dict(),
        "missing": missing.error,
        "model": model.sync("zero", client=service).name,
        "calibration": calibration.sync("zero", 1, client=service).n,
    }
sys.stdout.write(json.dumps(found))
