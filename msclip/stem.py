"""Early specialisation (arXiv 2207.12661): a small residual CNN takes the place of the patch embedding and of image layer 0.

Each stage is a single 3x3 convolution with a projected shortcut, so the stem is much lighter than a ResNet of the same
depth. The text side keeps an ordinary transformer layer there.
"""

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn


def strides(patch_size: int, count: int) -> list[int]:
    """Strides of `count` stages in a row that end at one cell a patch: 2 until the grid is reached, then 1."""
    return [2 if 2 ** (i + 1) <= patch_size else 1 for i in range(count)]


def conv(in_channels: int, out_channels: int, kernel_size: int, stride: int = 1, groups: int = 1) -> nn.Conv2d:
    """A convolution without bias that pads to keep the size, as all of them do here."""
    return nn.Conv2d(in_channels, out_channels, kernel_size, stride, kernel_size // 2, groups=groups, bias=False)


class ImageConv(nn.Conv2d):
    """A 3x3 convolution of three colours, which on a GPU is a matrix product: cuDNN is slow where channels are this few."""

    def __init__(self, out_channels: int, stride: int):
        super().__init__(3, out_channels, 3, stride, padding=1, bias=False)

    def forward(self, images: Float[Tensor, "images 3 size size"]) -> Float[Tensor, "images out side side"]:
        return window_product(images, self.weight, self.stride[0]) if images.is_cuda else super().forward(images)


def window_product(
    images: Float[Tensor, "images 3 size size"], weight: Float[Tensor, "out 3 k k"], stride: int
) -> Float[Tensor, "images out side side"]:
    """The convolution that pads to keep the size; best for images that lie channels last in memory."""
    k = weight.shape[2]
    rows = F.pad(images, (k // 2,) * 4).permute(0, 2, 3, 1).flatten(2)  # (images, size, size * 3), padded
    windows = rows.unfold(1, k, stride).unfold(2, 3 * k, 3 * stride).flatten(3)  # (images, side, side, k * k * 3)
    aligned = (0, -windows.shape[3] % 16)  # 27 numbers are no size for a tensor core
    kernels = F.pad(weight.permute(0, 2, 3, 1).flatten(1), aligned)
    return F.linear(F.pad(windows, aligned), kernels).permute(0, 3, 1, 2)


class PatchEmbedding(nn.Conv2d):
    """The linear map of each patch of the image: a convolution whose kernel is its stride, as one matrix product."""

    def __init__(self, width: int, patch_size: int):
        super().__init__(3, width, patch_size, patch_size, bias=False)

    def forward(self, images: Float[Tensor, "images 3 size size"]) -> Float[Tensor, "images cells width"]:
        k = self.kernel_size[0]
        cells = images.permute(0, 2, 3, 1).unflatten(2, (-1, k)).unflatten(1, (-1, k))  # (images, side, k, side, k, 3)
        cells = cells.transpose(2, 3).flatten(3).flatten(1, 2)
        return F.linear(cells, self.weight.permute(0, 2, 3, 1).flatten(1))


class StemStage(nn.Module):
    """relu(bn(conv3x3(x)) + bn(conv1x1(x))), both with the stage's stride."""

    def __init__(self, in_channels: int, out_channels: int, stride: int):
        super().__init__()
        self.conv = conv(in_channels, out_channels, 3, stride)
        self.bn = nn.BatchNorm2d(out_channels)
        self.skip = conv(in_channels, out_channels, 1, stride)
        self.skip_bn = nn.BatchNorm2d(out_channels)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn(self.conv(x)) + self.skip_bn(self.skip(x)))


class Stem(nn.Module):
    """Images to one vector a patch: maps of w/16, w/8, w/4, w/2 and w channels."""

    def __init__(self, width: int, patch_size: int):
        super().__init__()
        channels = [width // 16 * 2**i for i in range(5)]
        first, *rest = strides(patch_size, 5)
        self.conv1 = ImageConv(channels[0], first)
        self.bn1 = nn.BatchNorm2d(channels[0])
        pairs = zip(channels[:-1], channels[1:], rest, strict=True)
        self.stages = nn.Sequential(*(StemStage(a, b, stride) for a, b, stride in pairs))
        self.last_conv = conv(width, width, 1)

    def forward(self, images: Float[Tensor, "images 3 size size"]) -> Float[Tensor, "images cells width"]:
        return self.last_conv(self.stages(F.relu(self.bn1(self.conv1(images))))).flatten(2).transpose(1, 2)
