"""CLIP's ResNet (arXiv 2103.00020): three stem convolutions, average pools before strides, and attention instead of a mean.

Every reduction is an average pool beside a convolution of stride 1, in the main path and in the skip. The attention pool asks
with the mean of the map and answers in the embedding space, so no projection follows.

Names against OpenAI's, where all begin with `visual.`: `conv1` to `bn3` are the same; `stages.S.B.` is `layer(S+1).B.`, in
it `skip` is `downsample.0` and `skip_bn` is `downsample.1`; `pool.` is `attnpool.`, in it `out_proj` is `c_proj`. The shapes
are the same.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from msclip.stem import conv


class Bottleneck(nn.Module):
    """1x1, 3x3, average pool by the stride, 1x1 to four times `planes`; and a skip."""

    def __init__(self, in_channels: int, planes: int, stride: int):
        super().__init__()
        self.conv1, self.bn1 = conv(in_channels, planes, 1), nn.BatchNorm2d(planes)
        self.conv2, self.bn2 = conv(planes, planes, 3), nn.BatchNorm2d(planes)
        self.conv3, self.bn3 = conv(planes, 4 * planes, 1), nn.BatchNorm2d(4 * planes)
        self.stride = stride
        self.projects = stride > 1 or in_channels != 4 * planes
        if self.projects:
            self.skip, self.skip_bn = conv(in_channels, 4 * planes, 1), nn.BatchNorm2d(4 * planes)
        nn.init.zeros_(self.bn3.weight)  # a fresh block passes its input on

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)))
        y = F.relu(self.bn2(self.conv2(y)))
        if self.stride > 1:
            x, y = F.avg_pool2d(x, self.stride), F.avg_pool2d(y, self.stride)
        return F.relu(self.bn3(self.conv3(y)) + (self.skip_bn(self.skip(x)) if self.projects else x))


class AttentionPool(nn.Module):
    """Multi-head attention of one query, the mean of the map, to the mean and every cell."""

    def __init__(self, cells: int, channels: int, num_heads: int, embed_dim: int):
        super().__init__()
        self.num_heads = num_heads
        self.positional_embedding = nn.Parameter(channels**-0.5 * torch.randn(cells + 1, channels))
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(channels, channels) for _ in range(3))
        self.out_proj = nn.Linear(channels, embed_dim)
        for projection in (self.q_proj, self.k_proj, self.v_proj, self.out_proj):
            nn.init.normal_(projection.weight, std=channels**-0.5)

    def forward(self, x: Float[Tensor, "images channels side side"]) -> Float[Tensor, "images dim"]:
        cells = x.flatten(2).transpose(1, 2)
        tokens = torch.cat([cells.mean(1, keepdim=True), cells], dim=1) + self.positional_embedding
        # (images, tokens, channels) -> (images, heads, tokens, head); the query has one token
        q, k, v = (
            projection(part).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
            for projection, part in ((self.q_proj, tokens[:, :1]), (self.k_proj, tokens), (self.v_proj, tokens))
        )
        return self.out_proj(F.scaled_dot_product_attention(q, k, v).flatten(1))


class ModifiedResNet(nn.Module):
    """Images to embeddings.

    Args:
        image_size: side of the input, a multiple of 32.
        blocks: bottlenecks of each of the four stages.
        width: channels of the stem; the stages end at 4, 8, 16 and 32 times as many.
        num_heads: of the attention pool.
    """

    def __init__(self, image_size: int, blocks: Sequence[int], width: int, num_heads: int, embed_dim: int):
        super().__init__()
        self.image_size = image_size
        self.conv1, self.bn1 = conv(3, width // 2, 3, stride=2), nn.BatchNorm2d(width // 2)
        self.conv2, self.bn2 = conv(width // 2, width // 2, 3), nn.BatchNorm2d(width // 2)
        self.conv3, self.bn3 = conv(width // 2, width, 3), nn.BatchNorm2d(width)
        stages, channels = [], width
        for stage, count in enumerate(blocks):
            planes = width * 2**stage
            stride = 1 if stage == 0 else 2
            first = Bottleneck(channels, planes, stride)
            channels = 4 * planes
            stages.append(nn.Sequential(first, *(Bottleneck(channels, planes, 1) for _ in range(count - 1))))
        self.stages = nn.ModuleList(stages)
        self.pool = AttentionPool((image_size // 32) ** 2, channels, num_heads, embed_dim)

    def first(self, count: int) -> list[nn.Module]:
        """The stem and the first `count` stages."""
        return [self.conv1, self.bn1, self.conv2, self.bn2, self.conv3, self.bn3, *self.stages[:count]]

    def feature_map(self, images: Float[Tensor, "images 3 size size"]) -> Float[Tensor, "images channels side side"]:
        """The last map, before pooling: 32 times `width` channels, a 32nd of the side."""
        x = F.relu(self.bn1(self.conv1(images)))
        x = F.relu(self.bn2(self.conv2(x)))
        x = F.avg_pool2d(F.relu(self.bn3(self.conv3(x))), 2)
        for stage in self.stages:
            x = stage(x)
        return x

    def forward(self, images: Float[Tensor, "images 3 size size"]) -> Float[Tensor, "images dim"]:
        if images.shape[1:] != (3, self.image_size, self.image_size):
            raise ValueError(f"images must be (B, 3, {self.image_size}, {self.image_size}), got {tuple(images.shape)}")
        return self.pool(self.feature_map(images))
