"""Equivalent forms of networks that are faster on a CPU: the exported version of a model contains these.

`training.publishing.export` compares the scores of both forms.
"""

import copy
from collections.abc import Callable

import torch
from torch import Tensor, nn

from training.networks.autoencoders import ArticleAutoencoder
from training.networks.gradients import OrientedGradients


class ReexpressedArticle(nn.Module):
    """The article's network in a form that takes half the time for full batches.

    * 2x2 max pooling of a 3x3 convolution is the maximum of four convolutions with stride 2, one for each pixel of the
      window. They are one convolution with four times the channels, and the maxima are over contiguous blocks.
    * A transposed 2x2 convolution with stride 2 is a linear layer at each position, with the four pixels as outputs.
    * ReLU and maximum commute. After the maximum, ReLU processes a quarter of the elements.
    * The output pixels are in the order of patches. `index_select` takes a tenth of the time of the two permutations.
    """

    positions: Tensor

    def __init__(self, article: ArticleAutoencoder) -> None:
        super().__init__()
        first, _, _, second, _, _ = article.encoder
        third, _, fourth, _ = article.decoder
        self.first, self.second = first, second
        self.first_pooled, self.second_pooled = _pooled_convolution(first), _pooled_convolution(second)
        self.third, self.fourth = _linear(third), _linear(fourth)
        positions = torch.arange(784).view(7, 7, 2, 2, 2, 2)
        self.register_buffer("positions", positions.permute(0, 2, 4, 1, 3, 5).flatten())

    def forward(self, inputs: Tensor) -> Tensor:
        """Reconstruct scaled pixels."""
        n = inputs.shape[0]
        if n == 1:
            # For a single image, the start-up cost of the larger convolutions is higher than the saving.
            code = torch.relu(_max_pooled(self.second(torch.relu(_max_pooled(self.first(inputs))))))
        else:
            code = torch.relu(_block_max(self.second_pooled(torch.relu(_block_max(self.first_pooled(inputs))))))
        wide = torch.relu(self.third(code.permute(0, 2, 3, 1))).view(n, 7, 7, 2, 2, 16)
        pixels = torch.sigmoid(self.fourth(wide)).flatten(1)
        return pixels.index_select(1, self.positions).view(n, 1, 28, 28)


class ReexpressedGradients(OrientedGradients):
    """The standardisation, pooled over rows first, so that the second product has half as many rows."""

    def __init__(self, gradients: OrientedGradients) -> None:
        nn.Module.__init__(self)
        for name, values in gradients.named_buffers():
            self.register_buffer(name, values)

    def pooled(self, edges: Tensor) -> Tensor:
        """Pool float32 [N, directions, 28, 28] to [N, directions, cells, cells]."""
        pooled: Tensor = (self.pool @ edges) @ self.pool.T
        return pooled


def _max_pooled(planes: Tensor) -> Tensor:
    """Return the maxima of 2x2 windows."""
    rows = torch.maximum(planes[:, :, 0::2], planes[:, :, 1::2])
    return torch.maximum(rows[:, :, :, 0::2], rows[:, :, :, 1::2])


def _block_max(blocks: Tensor) -> Tensor:
    """Return the maximum of four blocks of channels, one block for each pixel of a window."""
    half = blocks.shape[1] // 2
    pairs = torch.maximum(blocks[:, :half], blocks[:, half:])
    return torch.maximum(pairs[:, : half // 2], pairs[:, half // 2 :])


def _pooled_convolution(convolution: nn.Module) -> nn.Conv2d:
    """Return the four convolutions with stride 2 for the pixels of the pooling window, as one."""
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
    # The next linear layer reads all channels of a position, which are then contiguous.
    return pooled.to(memory_format=torch.channels_last)  # type: ignore[call-overload, no-any-return]


def _linear(transposed: nn.Module) -> nn.Linear:
    """Return a transposed 2x2 convolution with stride 2 as a linear layer at each position."""
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
    """Return a copy of a scoring module with the faster form of every part that has one."""
    scoring = copy.deepcopy(scoring)
    for parent in list(scoring.modules()):
        for name, child in list(parent.named_children()):
            form = REEXPRESSED.get(type(child))
            if form is not None:
                setattr(parent, name, form(child))
    return scoring.eval()
