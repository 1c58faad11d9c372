"""The efficient parallel branch (arXiv 2207.12661): a five-stage CNN beside the image encoder, fused into it by adapters.

Two things surprise: the branch starts from the raw image, not from a stem feature; and an adapter *replaces* the grid tokens
(a depth-wise convolution of them plus the branch's map, then a LayerNorm), with no identity path around it. The branch's map
is normalised before its point-wise convolution, or after it for weights of one's own.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from msclip import kernels
from msclip.config import AdapterNorm
from msclip.stem import ImageConv, conv, strides

BOTTLENECK_BN_EPS = 1e-6  # the official bottlenecks differ here from every other BatchNorm of the model (1e-5)


class ConvStage(nn.Module):
    """The branch's first stage: relu(bn(conv3x3(x)))."""

    def __init__(self, out_channels: int, stride: int):
        super().__init__()
        self.conv = ImageConv(out_channels, stride)
        self.bn = nn.BatchNorm2d(out_channels)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn(self.conv(x)))


class Bottleneck(nn.Module):
    """1x1, 3x3 (with the stride), 1x1, and a projected shortcut; half the output width inside."""

    def __init__(self, in_channels: int, out_channels: int, stride: int):
        super().__init__()
        mid = out_channels // 2

        def norm(channels: int) -> nn.BatchNorm2d:
            return nn.BatchNorm2d(channels, eps=BOTTLENECK_BN_EPS)

        self.conv1, self.bn1 = conv(in_channels, mid, 1), norm(mid)
        self.conv2, self.bn2 = conv(mid, mid, 3, stride), norm(mid)
        self.conv3, self.bn3 = conv(mid, out_channels, 1), norm(out_channels)
        self.skip, self.skip_bn = conv(in_channels, out_channels, 1, stride), norm(out_channels)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)))
        y = F.relu(self.bn2(self.conv2(y)))
        return F.relu(self.bn3(self.conv3(y)) + self.skip_bn(self.skip(x)))


class PatchSum(nn.Conv2d):
    """A depth-wise convolution whose kernel is its stride, as a weighted sum over patches.

    The same numbers; cuDNN would transpose the whole map to its own layout before such a convolution and back after it. On a
    GPU the sum has a kernel of its own, which reads the map once.
    """

    def __init__(self, channels: int, kernel_size: int):
        super().__init__(channels, channels, kernel_size, kernel_size, groups=channels, bias=False)

    def forward(self, x: Float[Tensor, "images channels size size"]) -> Float[Tensor, "images channels side side"]:
        k = self.kernel_size[0]
        if kernels.usable(x.device):
            from msclip.kernels.patch_sum import patch_sum  # Triton comes with PyTorch for GPUs alone

            return patch_sum(x, self.weight.squeeze(1).permute(1, 2, 0)).permute(0, 3, 1, 2)
        patches = x.unflatten(3, (-1, k)).unflatten(2, (-1, k))  # (images, channels, side, k, side, k)
        return (patches * self.weight.to(x.dtype).view(-1, 1, k, 1, k)).sum((3, 5))


class Adapter(nn.Module):
    """Brings one stage of the branch to the token grid and mixes it with the tokens there."""

    def __init__(self, channels: int, width: int, kernel_size: int, norm_eps: float, bn: AdapterNorm):
        super().__init__()
        self.bn_first = bn == "after_dw"
        self.branch_conv = PatchSum(channels, kernel_size)
        self.branch_bn = nn.BatchNorm2d(channels if self.bn_first else width)
        self.branch_proj = conv(channels, width, 1)
        self.grid_conv = conv(width, width, 3, groups=width)
        self.grid_bn = nn.BatchNorm2d(width)
        self.norm = nn.LayerNorm(width, eps=norm_eps)

    def project(self, feature: Float[Tensor, "images channels size size"]) -> Float[Tensor, "images width side side"]:
        """What a stage of the branch adds to the grid."""
        mixing = (self.branch_bn, self.branch_proj) if self.bn_first else (self.branch_proj, self.branch_bn)
        for part in (self.branch_conv, *mixing):
            feature = part(feature)
        return feature

    def forward(
        self, tokens: Float[Tensor, "images grid width"], projected: Float[Tensor, "images width side side"]
    ) -> Float[Tensor, "images grid width"]:
        """The tokens with what `project` made of a stage mixed in."""
        grid = tokens[:, 1:].transpose(1, 2).unflatten(2, projected.shape[2:])
        fused = self.grid_bn(self.grid_conv(grid)) + projected
        # The official code doubles the class token first; the LayerNorm cancels that factor.
        return self.norm(torch.cat([tokens[:, :1], fused.flatten(2).transpose(1, 2)], dim=1))


class ParallelBranch(nn.Module):
    """Five maps of the raw image, finest first, each with the adapter that feeds it to the encoder."""

    def __init__(self, width: int, patch_size: int, norm_eps: float, adapter_bn: AdapterNorm):
        super().__init__()
        channels = [width // 16 * 2**i for i in range(5)]
        steps = strides(patch_size, 5)
        later = zip(channels[:-1], channels[1:], steps[1:], strict=True)
        self.stages = nn.ModuleList([ConvStage(channels[0], steps[0]), *(Bottleneck(a, b, s) for a, b, s in later)])
        reduction = [2 ** sum(s == 2 for s in steps[: i + 1]) for i in range(5)]
        self.adapters = nn.ModuleList(
            Adapter(c, width, patch_size // r, norm_eps, adapter_bn) for c, r in zip(channels, reduction, strict=True)
        )

    def forward(self, images: Float[Tensor, "images 3 size size"]) -> list[Tensor]:
        """What each stage adds to the grid, (images, width, side, side)."""
        projected, x = [], images
        for stage, adapter in zip(self.stages, self.adapters, strict=True):
            x = stage(x)
            assert isinstance(adapter, Adapter)
            projected.append(adapter.project(x))
        return projected
