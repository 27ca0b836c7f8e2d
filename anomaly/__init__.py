"""The client of the image anomaly detection service. Its only dependency is httpx; it never imports numpy or torch.

    from anomaly import Client

    with Client("http://127.0.0.1:8000") as service:
        score = service.score("zero.png")
        print(score.mse, score.is_anomaly)

`AsyncClient` has the same methods as coroutines. `anomaly.client.errors` lists the exceptions.
"""

from typing import TYPE_CHECKING, Any

from anomaly.client.asynchronous import AsyncClient
from anomaly.client.errors import (
    ConnectionFailed,
    Problem,
    ServiceError,
    TimedOut,
    UnexpectedReply,
    Unreachable,
    UnreadableImage,
)
from anomaly.client.images import Image
from anomaly.client.replies import Calibration, Fitted, Model, Readiness, Score, Validity
from anomaly.client.retry import NO_RETRY, Retry
from anomaly.client.synchronous import Client
from anomaly.client.wire import Fit, View

if TYPE_CHECKING:
    __version__: str

__all__ = [
    "NO_RETRY",
    "AsyncClient",
    "Calibration",
    "Client",
    "ConnectionFailed",
    "Fit",
    "Fitted",
    "Image",
    "Model",
    "Problem",
    "Readiness",
    "Retry",
    "Score",
    "ServiceError",
    "TimedOut",
    "UnexpectedReply",
    "Unreachable",
    "UnreadableImage",
    "Validity",
    "View",
    "__version__",
]


def __getattr__(name: str) -> Any:
    # Reading the metadata of the installation takes longer than most imports, and few programs need it.
    if name == "__version__":
        from anomaly.version import version

        return version()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
