"""Parts of scoring modules in the form in which they are served: the same function, cheaper on a CPU.

Knows: which part has such a form. Does not know: training, files. `training.publishing.export` compares the
scores of both.
"""

import copy
from collections.abc import Callable

import torch
from torch import Tensor, nn

from training.networks.autoencoders import ArticleAutoencoder
from training.networks.gradients import OrientedGradients


class ReexpressedArticle(nn.Module):
    """The article's network for serving.

    Max pooling over 2x2 of a 3x3 convolution is the maximum of four strided convolutions, one for each of the four
    places: one convolution with four times the channels, whose maxima are of whole blocks of memory. A transposed
    convolution of 2x2 with stride 2 is a linear layer at each place, whose outputs are the four pixels. Together half
    of the time in full batches. ReLU comes after the maximum, where it has a quarter of the work and gives the same.
    Pixels come out patch by patch: picking each by its place costs a tenth of turning axes, which moves two at once.
    """

    places: Tensor

    def __init__(self, article: ArticleAutoencoder) -> None:
        super().__init__()
        first, _, _, second, _, _ = article.encoder
        third, _, fourth, _ = article.decoder
        self.first, self.second = first, second
        self.first_pooled, self.second_pooled = _pooled(first), _pooled(second)
        self.third, self.fourth = _linear(third), _linear(fourth)
        places = torch.arange(784).view(7, 7, 2, 2, 2, 2)
        self.register_buffer("places", places.permute(0, 2, 4, 1, 3, 5).flatten())

    def forward(self, inputs: Tensor) -> Tensor:
        """Redraw standardised inputs."""
        n = inputs.shape[0]
        if n == 1:
            # A lone image is cheaper this way: starting the larger convolutions costs more than it saves.
            code = torch.relu(_halved(self.second(torch.relu(_halved(self.first(inputs))))))
        else:
            code = torch.relu(_best(self.second_pooled(torch.relu(_best(self.first_pooled(inputs))))))
        wide = torch.relu(self.third(code.permute(0, 2, 3, 1))).view(n, 7, 7, 2, 2, 16)
        pixels = torch.sigmoid(self.fourth(wide)).flatten(1)
        return pixels.index_select(1, self.places).view(n, 1, 28, 28)


class ReexpressedGradients(OrientedGradients):
    """The standardisation for serving: pooled from the left first, so that the right has half as many short rows."""

    def __init__(self, gradients: OrientedGradients) -> None:
        nn.Module.__init__(self)
        for name, values in gradients.named_buffers():
            self.register_buffer(name, values)

    def pooled(self, edges: Tensor) -> Tensor:
        """Pool as `OrientedGradients` does."""
        pooled: Tensor = (self.pool @ edges) @ self.pool.T
        return pooled


def _halved(planes: Tensor) -> Tensor:
    rows = torch.maximum(planes[:, :, 0::2], planes[:, :, 1::2])
    return torch.maximum(rows[:, :, :, 0::2], rows[:, :, :, 1::2])


def _best(places: Tensor) -> Tensor:
    # Of four blocks of channels, one for each place.
    half = places.shape[1] // 2
    pairs = torch.maximum(places[:, :half], places[:, half:])
    return torch.maximum(pairs[:, : half // 2], pairs[:, half // 2 :])


def _pooled(convolution: nn.Module) -> nn.Conv2d:
    assert isinstance(convolution, nn.Conv2d)
    assert convolution.bias is not None
    outputs, inputs = convolution.weight.shape[:2]
    pooled = nn.Conv2d(inputs, 4 * outputs, 4, stride=2, padding=1)
    with torch.no_grad():
        kernels = torch.zeros(2, 2, outputs, inputs, 4, 4)
        for down in range(2):
            for across in range(2):
                kernels[down, across, :, :, down : down + 3, across : across + 3] = convolution.weight
        pooled.weight.copy_(kernels.flatten(0, 2))
        pooled.bias.copy_(convolution.bias.repeat(4))  # type: ignore[union-attr]
    # The layer after the last one takes the channels of a place from one piece of memory.
    return pooled.to(memory_format=torch.channels_last)  # type: ignore[call-overload, no-any-return]


def _linear(transposed: nn.Module) -> nn.Linear:
    assert isinstance(transposed, nn.ConvTranspose2d)
    assert transposed.bias is not None
    inputs, outputs = transposed.weight.shape[:2]
    linear = nn.Linear(inputs, 4 * outputs)
    with torch.no_grad():
        linear.weight.copy_(transposed.weight.permute(2, 3, 1, 0).reshape(4 * outputs, inputs))
        linear.bias.copy_(transposed.bias.repeat(4))
    return linear


REEXPRESSED: dict[type[nn.Module], Callable[..., nn.Module]] = {
    ArticleAutoencoder: ReexpressedArticle,
    OrientedGradients: ReexpressedGradients,
}


def reexpressed(scoring: nn.Module) -> nn.Module:
    """Return a copy of a scoring module in which every part that has a form for serving is in it."""
    scoring = copy.deepcopy(scoring)
    for parent in list(scoring.modules()):
        for name, child in list(parent.named_children()):
            form = REEXPRESSED.get(type(child))
            if form is not None:
                setattr(parent, name, form(child))
    return scoring.eval()
