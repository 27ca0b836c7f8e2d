"""Networks in the form in which they are served: the same function of the same weights, cheaper on a CPU.

Knows: which network has such a form. Does not know: training, files. `training.export` compares the scores of both.
"""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from torch import Tensor, nn

from training.autoencoders import ArticleAutoencoder


class ReexpressedArticle(nn.Module):
    """The article's network for serving.

    Max pooling over 2x2 is two strided maxima, and a transposed convolution of 2x2 with stride 2 is a linear layer at
    each place, whose outputs are the four pixels: from batches of 8 up a quarter to a third of the time. ReLU comes
    after the maximum, where it has a quarter of the work and gives the same.
    """

    def __init__(self, article: ArticleAutoencoder) -> None:
        super().__init__()
        first, _, _, second, _, _ = article.encoder
        third, _, fourth, _ = article.decoder
        self.first, self.second = first, second
        self.third, self.fourth = _linear(third), _linear(fourth)

    def forward(self, inputs: Tensor) -> Tensor:
        """Redraw standardised inputs."""
        n = inputs.shape[0]
        code = torch.relu(_halved(self.second(torch.relu(_halved(self.first(inputs))))))
        wide = torch.relu(self.third(code.permute(0, 2, 3, 1))).view(n, 7, 7, 2, 2, 16)
        pixels = torch.sigmoid(self.fourth(wide)).view(n, 7, 7, 2, 2, 2, 2)
        return pixels.permute(0, 1, 3, 5, 2, 4, 6).reshape(n, 1, 28, 28)


def _halved(planes: Tensor) -> Tensor:
    rows = torch.maximum(planes[:, :, 0::2], planes[:, :, 1::2])
    return torch.maximum(rows[:, :, :, 0::2], rows[:, :, :, 1::2])


def _linear(transposed: nn.Module) -> nn.Linear:
    assert isinstance(transposed, nn.ConvTranspose2d)
    assert transposed.bias is not None
    inputs, outputs = transposed.weight.shape[:2]
    linear = nn.Linear(inputs, 4 * outputs)
    with torch.no_grad():
        linear.weight.copy_(transposed.weight.permute(2, 3, 1, 0).reshape(4 * outputs, inputs))
        linear.bias.copy_(transposed.bias.repeat(4))
    return linear


REEXPRESSED: dict[type[nn.Module], Callable[..., nn.Module]] = {ArticleAutoencoder: ReexpressedArticle}


def reexpressed(scoring: nn.Module) -> nn.Module:
    """Return a copy of a scoring module in which every network that has a form for serving is in it."""
    scoring = copy.deepcopy(scoring)
    for parent in list(scoring.modules()):
        for name, child in list(parent.named_children()):
            form = REEXPRESSED.get(type(child))
            if form is not None:
                setattr(parent, name, form(child))
    return scoring.eval()
