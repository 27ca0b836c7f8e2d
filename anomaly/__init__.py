"""A typed client of the service: one dependency (httpx), nothing of torch or numpy, and nothing of the service's code.

    from anomaly import Client

    with Client("http://127.0.0.1:8000") as service:
        score = service.score(Path("zero.png"))
        print(score.mse, score.is_anomaly)

`AsyncClient` has the same methods as coroutines. `anomaly.client.errors` draws the tree of what can go wrong.
"""

from anomaly.client.asynchronous import AsyncClient
from anomaly.client.errors import Problem, ServiceError, TimedOut, UnexpectedReply, Unreachable, UnreadableImage
from anomaly.client.replies import Fitted, Model, Score
from anomaly.client.retry import NO_RETRY, Retry
from anomaly.client.synchronous import Client
from anomaly.client.wire import Fit, Image, View

__all__ = [
    "NO_RETRY",
    "AsyncClient",
    "Client",
    "Fit",
    "Fitted",
    "Image",
    "Model",
    "Problem",
    "Retry",
    "Score",
    "ServiceError",
    "TimedOut",
    "UnexpectedReply",
    "Unreachable",
    "UnreadableImage",
    "View",
]
