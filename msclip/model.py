"""MS-CLIP and MS-CLIP-S (arXiv 2207.12661) and CLIP (arXiv 2103.00020), as values of one config.

Training goes through `forward`, which sends images and packed captions through the encoder in one joint stream;
`encode_image` and `encode_text` send one modality through the same modules and give the same numbers. A tower that is not a
transformer stands beside the stream and maps its input straight to embeddings.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple, Self

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from msclip.blocks import Block
from msclip.branch import Bottleneck, ParallelBranch
from msclip.config import ModelConfig
from msclip.freezing import freeze
from msclip.layers import add_norm, plain_add_norm
from msclip.parallel import AttentionBeside, FFNBeside, beside
from msclip.presets import preset
from msclip.sharing import Paired
from msclip.stem import PatchEmbedding, Stem, StemStage
from msclip.tokens import PackedText, Tokens, pack
from msclip.towers.cbow import CBOW
from msclip.towers.modified_resnet import ModifiedResNet


class ImageInput(nn.Module):
    """Images to tokens: stem or patch projection, class token, positions, LayerNorm."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        width, patch = config.width, config.patch_size
        self.image_size = config.image_size
        self.patches = Stem(width, patch) if config.stem else PatchEmbedding(width, patch)
        scale = width**-0.5
        self.class_embedding = nn.Parameter(scale * torch.randn(width))
        positions = (config.image_size // patch) ** 2 + 1
        self.positional_embedding = nn.Parameter(scale * torch.randn(positions, width))
        self.ln_pre = nn.LayerNorm(width, eps=config.norm_eps)
        self.dropped = config.dropped_patches

    def forward(self, images: Float[Tensor, "images 3 size size"]) -> Float[Tensor, "images grid width"]:
        if images.shape[1:] != (3, self.image_size, self.image_size):
            raise ValueError(f"images must be (B, 3, {self.image_size}, {self.image_size}), got {tuple(images.shape)}")
        grid = self.patches(images)
        first = self.class_embedding.to(grid.dtype).expand(len(grid), 1, -1)
        tokens = torch.cat([first, grid], dim=1) + self.positional_embedding
        if self.training and self.dropped:
            tokens = self._thinned(tokens)
        return self.ln_pre(tokens)

    def _thinned(self, tokens: Float[Tensor, "images grid width"]) -> Float[Tensor, "images fewer width"]:
        """Without `dropped` patches of each image, chosen by lot."""
        order = torch.rand(len(tokens), tokens.shape[1] - 1, device=tokens.device).argsort(1)
        kept = 1 + order[:, self.dropped :]
        return torch.cat([tokens[:, :1], tokens.gather(1, kept[..., None].expand(-1, -1, tokens.shape[-1]))], dim=1)


class TextInput(nn.Module):
    """Packed ids to tokens."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.token_embedding = nn.Embedding(config.vocab_size, config.text_width)
        self.positional_embedding = nn.Parameter(torch.empty(config.context_length, config.text_width))

    def forward(self, text: PackedText) -> Float[Tensor, "tokens width"]:
        return self.token_embedding(text.ids) + self.positional_embedding[text.positions]


class Parts(NamedTuple):
    """The functions that take a model's time, as they are or compiled."""

    enter: Callable[["Model", Tensor], tuple[Tensor, list[Tensor]]]
    """Images to tokens, and to what each stage of the branch adds to them later."""
    fuse: Callable[[nn.Module, Tokens, Tensor], Tokens]
    """An adapter of the branch."""
    layer: Callable[[nn.Module, Tokens], Tokens]
    """A transformer layer."""


def _enter(model: "Model", images: Tensor) -> tuple[Tensor, list[Tensor]]:
    return model.image_input(images), [] if model.branch is None else model.branch(images)


def _fuse(adapter: nn.Module, tokens: Tokens, projected: Tensor) -> Tokens:
    return tokens.with_image(adapter(tokens.image, projected))


def _layer(block: nn.Module, tokens: Tokens) -> Tokens:
    return tokens.with_rows(block(tokens.rows, tokens))


def _unsized(tokens: Tokens) -> Tokens:
    """Tells the compiler that captions are packed: their tokens are never as many twice."""
    from torch._dynamo import maybe_mark_dynamic  # a second to import

    for tensor in (tokens.rows, *(() if tokens.text is None else (tokens.text.padded,))):
        maybe_mark_dynamic(tensor, 0)
    return tokens


def _unsized_block(forward: Callable[[Tensor, Tokens], Tensor], rows: Tensor, tokens: Tokens) -> Tensor:
    return forward(rows, _unsized(tokens.with_rows(rows)))


PLAIN = Parts(_enter, _fuse, _layer)


class Model(nn.Module):
    """Two encoders that share what `config.sharing` says, and a temperature; for the sigmoid loss also a bias."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.resnet = self.cbow = None
        if "image" in config.transformers:
            self.image_input = ImageInput(config)
        else:
            self.resnet = ModifiedResNet(
                config.image_size, config.resnet_blocks, config.width, config.num_heads, config.embed_dim
            )
        if "text" in config.transformers:
            self.text_input = TextInput(config)
        else:
            self.cbow = CBOW(
                config.vocab_size, config.text_width, config.embed_dim, config.norm_eps, config.token_std, config.cbow_ends
            )
        self.blocks = nn.ModuleList(Block(config, layer) for layer in range(config.depth))
        self.branch = None
        if config.branch_layers:
            self.branch = ParallelBranch(config.width, config.patch_size, config.norm_eps, config.adapter_bn)
        self.pooled, self.dropout = beside(config, "pooled"), nn.Dropout(config.dropout)
        widths, sharing, modalities = config.widths, config.sharing, config.transformers
        self.final_norm = Paired(lambda m: nn.LayerNorm(widths[m], eps=config.norm_eps), sharing.final_norm, modalities)
        self.projection = Paired(lambda m: nn.Linear(widths[m], config.embed_dim, bias=False), sharing.out_proj, modalities)
        # One element, not none: DeepSpeed cannot broadcast a parameter without dimensions.
        self.logit_scale = nn.Parameter(torch.full((1,), config.logit_scale_init), config.logit_scale_learned)
        self.logit_bias = nn.Parameter(torch.full((1,), config.logit_bias_init)) if config.loss == "sigmoid" else None
        initialise(self)
        self._frozen_norms = freeze(self)
        self._parts: Parts = PLAIN

    def train(self, mode: bool = True) -> Self:
        """As of any module, but BatchNorms of frozen parts keep their statistics."""
        super().train(mode)
        for norm in self._frozen_norms:
            norm.eval()
        return self

    def units(self) -> list[nn.Module]:
        """Modules each of which needs all of its parameters at once: stage 3 of ZeRO gathers those of a large model together.

        Not those that see pixels: DeepSpeed learns from the gradient of a unit's input that it is done with. So none where
        first layers are frozen, whose output has no gradient. Nor layers that run once for each modality: it would take the
        gradients of all of a unit's parameters each time.
        """
        if any(self.config.freezes.values()):
            return []
        once = (block for block in self.blocks if isinstance(block, Block) and (self.joint or len(block.modalities) == 1))
        return [*once, *(module for module in self.modules() if isinstance(module, StemStage | Bottleneck))]

    def compile_parts(self, save_memory: bool = False, by_unit: bool = False) -> None:
        """Compiles what takes the time of a pass over images, part by part: the input, the branch, and a layer of each kind.

        For GPUs; the first passes take a minute. The same weights and, but for rounding, the same numbers. With `save_memory`,
        what costs no matrix product or convolution is computed again in the backward pass instead of being kept. This setting,
        and how many kinds of layer may be compiled, are PyTorch's and hold for all that the process compiles. `by_unit`
        compiles each of `units()` by itself, a little slower, so that hooks that bring its parameters stay outside.
        """
        from torch._dynamo import config as dynamo_config  # a second to import

        # PyTorch leaves a ninth kind as it is, and slow. A layer is compiled at most for either modality alone, with and
        # without gradients, and, where plain attention looks at the longest caption, again once that has changed.
        dynamo_config.recompile_limit = max(dynamo_config.recompile_limit, 8 * len(self.blocks))
        if save_memory:
            from torch._functorch import config

            # PyTorch recomputes what its kernels can do in passing; these three keep it from what a matrix product reads.
            config.ban_recompute_materialized_backward = False
            config.ban_recompute_used_far_apart = config.ban_recompute_long_fusible_chains = False
        for block in self.blocks:
            assert isinstance(block, Block)
            block.add_norm = plain_add_norm if save_memory else add_norm  # a kernel's work it cannot do again
        if by_unit:
            units = self.units()
            compiled = {kind: torch.compile(kind.forward) for kind in {type(unit) for unit in units}}
            for unit in units:
                # Partial, not a closure: a copy of the model then computes with weights of its own.
                forward = partial(compiled[type(unit)], unit)
                unit.forward = partial(_unsized_block, forward) if isinstance(unit, Block) else forward
            return
        fuse, layer = torch.compile(_fuse), torch.compile(_layer)
        self._parts = Parts(
            torch.compile(_enter),
            lambda adapter, tokens, projected: fuse(adapter, _unsized(tokens), projected),
            lambda block, tokens: layer(block, _unsized(tokens)),
        )

    def _run(self, images: Tensor | None, text: PackedText | None) -> tuple[Tensor | None, Tensor | None]:
        image, projected = (None, []) if images is None else self._parts.enter(self, images)
        tokens = Tokens.join(image, None if text is None else self.text_input(text), text)
        for layer, block in enumerate(self.blocks):
            assert isinstance(block, Block)
            if projected and self.branch is not None and layer in self.config.branch_layers:
                stage = self.config.branch_layers.index(layer)
                tokens = self._parts.fuse(self.branch.adapters[stage], tokens, projected[stage])
            if any(m in tokens.modalities for m in block.modalities):
                tokens = self._recomputed(block, tokens) if self.config.checkpoint_blocks else self._parts.layer(block, tokens)
        pooled = tokens.pooled(self.config.text_pool)
        for module in self.pooled.values():
            pooled = pooled.with_rows(pooled.rows + self.dropout(module(pooled)))
        rows, split = pooled.rows, pooled.split
        embedded = self.projection(self.final_norm(rows, split), split)
        return (None if images is None else embedded[:split]), (None if text is None else embedded[split:])

    def _recomputed(self, block: Block, tokens: Tokens) -> Tokens:
        # The rows go in as a tensor: its device is the one whose random state is kept, for the same dropout in both passes.
        layer = self._parts.layer
        rows = checkpoint(lambda rows: layer(block, tokens.with_rows(rows)).rows, tokens.rows, use_reentrant=False)
        assert isinstance(rows, Tensor)
        return tokens.with_rows(rows)

    def _embed_images(self, images: Tensor) -> Tensor:
        features = self._run(images, None)[0] if self.resnet is None else self.resnet(images)
        assert features is not None
        return features

    def _embed_captions(self, text: PackedText) -> Tensor:
        features = self._run(None, text)[1] if self.cbow is None else self.cbow(text)
        assert features is not None
        return features

    def encode_image(self, images: Float[Tensor, "images 3 size size"], normalize: bool = True) -> Float[Tensor, "images dim"]:
        """Embeds normalised images (see `Preprocess`); unit length unless `normalize` is false.

        Raises:
            ValueError: no images, bytes instead of normalised numbers, or another size than the model's.
        """
        if images.ndim != 4 or not len(images) or not images.is_floating_point():
            raise ValueError(
                "images must be floating-point numbers, as Preprocess makes them, of shape (B, 3, size, size) with B at least "
                f"1, got {tuple(images.shape)} of {images.dtype}"
            )
        features = self._embed_images(images)
        return F.normalize(features.float(), dim=-1) if normalize else features

    def encode_text(
        self, token_ids: Int[Tensor, "captions length"] | PackedText, normalize: bool = True
    ) -> Float[Tensor, "captions dim"]:
        """Embeds captions given as ids, each row up to its largest id, the end token.

        Raises:
            ValueError: no captions, rows without ids or longer than the context, or ids beyond the vocabulary.
        """
        text = token_ids if isinstance(token_ids, PackedText) else self._pack(token_ids)
        features = self._embed_captions(text)
        return F.normalize(features.float(), dim=-1) if normalize else features

    def _pack(self, token_ids: Int[Tensor, "captions length"]) -> PackedText:
        context, vocabulary = self.config.context_length, self.config.vocab_size
        shaped = token_ids.ndim == 2 and len(token_ids) and 1 <= token_ids.shape[1] <= context
        if not shaped or token_ids.is_floating_point():
            raise ValueError(
                f"token_ids must be whole numbers of shape (B, L) with B at least 1 and L from 1 to {context}, got "
                f"{tuple(token_ids.shape)} of {token_ids.dtype}"
            )
        low, high = torch.stack(token_ids.aminmax()).tolist()  # waits for the device once, as `pack` has to
        if low < 0 or high >= vocabulary:
            raise ValueError(f"token_ids must be from 0 to below vocab_size {vocabulary}, got {low} to {high}")
        return pack(token_ids)

    @property
    def joint(self) -> bool:
        """Whether there are image and text tokens of the same width, so that they can travel in one matrix."""
        return len(self.config.transformers) == 2 and self.config.width == self.config.text_width

    def forward(
        self, images: Float[Tensor, "images 3 size size"], text: PackedText
    ) -> tuple[Float[Tensor, "images dim"], Float[Tensor, "captions dim"], Float[Tensor, "scale"]]:
        """Unit image and caption embeddings, and what makes logits of their cosines.

        That is the temperature exp(logit_scale) alone, or the temperature and the bias of the sigmoid loss, which turns
        temperature * cosine + bias into the probability that the two belong together.
        """
        if self.joint:
            image_features, text_features = self._run(images, text)
        else:
            image_features, text_features = self._embed_images(images), self._embed_captions(text)
        assert image_features is not None
        assert text_features is not None
        temperature = self.logit_scale.exp()
        return (
            F.normalize(image_features.float(), dim=-1),
            F.normalize(text_features.float(), dim=-1),
            temperature if self.logit_bias is None else torch.cat([temperature, self.logit_bias]),
        )

    def parameter_groups(self) -> dict[str, list[str]]:
        """Names of the parameters by how they are decayed: `shared`, `own`, `no_decay`; each exactly once.

        No decay for vectors (biases, norms, temperature) and the embedding tables, as the official config lists them.
        """
        shared = {
            f"{path}.shared.{name}"
            for path, module in self.named_modules()
            if isinstance(module, Paired) and module.is_shared
            for name, _ in module.shared.named_parameters()
        }
        groups: dict[str, list[str]] = {"shared": [], "own": [], "no_decay": []}
        for name, parameter in self.named_parameters():
            if parameter.ndim < 2 or name.endswith(("positional_embedding", "token_embedding.weight")):
                groups["no_decay"].append(name)
            else:
                groups["shared" if name in shared else "own"].append(name)
        return groups


@torch.no_grad()
def initialise(model: Model) -> None:
    """Fresh weights of the transformers by the laws of the official code (norms start as identity, biases at zero).

    The other towers have laws of their own and are ready when built.
    """
    other_towers = {module for tower in (model.resnet, model.cbow) if tower is not None for module in tower.modules()}
    for module in model.modules():
        if isinstance(module, nn.Linear | nn.Conv2d) and module not in other_towers:
            nn.init.trunc_normal_(module.weight, std=0.02)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    for block in model.blocks:
        assert isinstance(block, Block)
        for projection in block.attn.in_proj.children():
            assert isinstance(projection, nn.Linear)
            nn.init.xavier_uniform_(projection.weight)
    for module in model.modules():
        if isinstance(module, AttentionBeside | FFNBeside):
            nn.init.zeros_(module.last.weight)  # a module beside a layer starts without effect
    if "image" in model.config.transformers:
        image_projection = model.projection.part("image")
        assert isinstance(image_projection, nn.Linear)
        nn.init.normal_(image_projection.weight, std=model.config.width**-0.5)
    if "text" in model.config.transformers:
        nn.init.trunc_normal_(model.text_input.positional_embedding, std=0.02)
        nn.init.normal_(model.text_input.token_embedding.weight, std=model.config.token_std)


def create_model(name: str, device: torch.device | str | None = None, **overrides: Any) -> Model:
    """A model with fresh weights: `create_model("ms_clip_s_b32", image_size=64)`; on `meta`, only its shapes.

    Raises:
        UserError: an unknown name or setting, or settings that contradict each other.
    """
    return build(preset(name, **overrides), device)


def build(config: ModelConfig, device: torch.device | str | None = None) -> Model:
    """The model that `config` describes, with fresh weights."""
    with torch.device(device or "cpu"):
        return Model(config)
