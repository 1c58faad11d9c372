"""What fine-tuning asks of a model: fewer patches, less memory, parts that stay as they are."""

from typing import Any

import pytest
import torch
from torch import Tensor

import msclip
from msclip.sharing import SEPARATE
from msclip.tokens import pack
from tests.msclip.test_towers import CBOW, RESNET, VIT, captions, tiny
from tests.msclip.two_ranks import tiny_engine, tiny_model, train


def features(model: msclip.Model, images: Tensor, ids: Tensor) -> Tensor:
    torch.manual_seed(3)  # of dropout
    return torch.cat(model(images, pack(ids))[:2])


def test_patches_are_dropped_in_training_alone_and_the_class_token_never() -> None:
    model, whole = tiny(**VIT, patch_dropout=0.5), tiny(**VIT)
    images = torch.randn(4, 3, 64, 64)
    model.train()
    torch.manual_seed(1)
    thinned, full = model.image_input(images), whole.image_input(images)
    assert (full.shape[1], thinned.shape[1]) == (17, 9)
    chosen = [[int((full[i] == token).all(1).nonzero()) for token in thinned[i]] for i in range(4)]
    assert all(row[0] == 0 and len(set(row)) == 9 for row in chosen)  # each one of its own image's, none twice
    assert len({tuple(sorted(row)) for row in chosen}) > 1
    assert torch.equal(model.eval().encode_image(images), whole.eval().encode_image(images))


@pytest.mark.parametrize(("share", "left"), [(0.05, 15), (0.4, 10), (0.7, 5), (0.95, 1)])
def test_a_share_of_patches_is_rounded_to_whole_ones(share: float, left: int) -> None:
    model = tiny(**VIT, patch_dropout=share).train()
    assert model.image_input(torch.randn(1, 3, 64, 64)).shape[1] == 1 + left


def test_training_with_fewer_patches_reaches_every_weight_of_both_encoders() -> None:
    model = tiny(patch_dropout=0.4, branch_layers=()).train()
    image, text, _ = model(torch.randn(2, 3, 64, 64), pack(captions([5, 9])))
    (image * text).sum().backward()
    assert {name for name, p in model.named_parameters() if p.grad is None} == {"logit_scale"}


@pytest.mark.parametrize("overrides", [{}, {"text_layers": 3, "sharing": SEPARATE}, VIT | {"text_width": 32}])
def test_recomputed_layers_give_the_same_gradients_with_dropout(overrides: dict[str, Any]) -> None:
    images, ids = torch.randn(3, 3, 64, 64), captions([5, 9, 2])
    gradients = []
    for checkpoint_blocks in (False, True):
        model = tiny(**overrides, dropout=0.2, checkpoint_blocks=checkpoint_blocks).train()
        calls: list[int] = []
        model.blocks[1].register_forward_pre_hook(lambda module, args, calls=calls: calls.append(1))
        out = features(model, images, ids)
        once = len(calls)
        torch.manual_seed(9)
        (out * torch.randn_like(out)).sum().backward()
        assert len(calls) == once * (1 + checkpoint_blocks)
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    kept, recomputed = gradients
    assert kept.keys() == recomputed.keys()
    assert all(torch.equal(kept[name], recomputed[name]) for name in kept)


FREEZES: dict[str, tuple[dict[str, Any], str]] = {
    "image": ({"freeze_image": "all"}, "image"),
    "text": ({"freeze_text": "all"}, "text"),
    "resnet": (RESNET | {"image_size": 64, "freeze_image": "all"}, "image"),
    "cbow": (CBOW | {"freeze_text": "all"}, "text"),
}


@pytest.mark.parametrize("variant", FREEZES)
def test_a_frozen_encoder_answers_the_same_after_training(variant: str) -> None:
    overrides, modality = FREEZES[variant]
    model = tiny(vocab_size=512, **overrides)
    images, ids = torch.randn(4, 3, 64, 64), captions([5, 9, 2, 3]) % 512
    model.eval()
    before = model.encode_image(images), model.encode_text(ids)
    train(tiny_engine(model), 3)
    model.eval()
    after = model.encode_image(images), model.encode_text(ids)
    same = [torch.equal(x, y) for x, y in zip(before, after, strict=True)]
    assert same == [modality == "image", modality == "text"]


def frozen_names(model: msclip.Model) -> set[str]:
    return {name for name, p in model.named_parameters() if not p.requires_grad}


def test_the_first_layers_freeze_with_what_feeds_them_and_no_later_one() -> None:
    frozen = frozen_names(tiny(freeze_image="first:3"))
    assert {name.split(".")[1] for name in frozen if name.startswith("blocks.")} == {"1", "2"}  # layer 0 is the stem
    assert {name.split(".")[2] for name in frozen if name.startswith("branch.")} == {"0", "1"}  # before layers 1 and 2
    assert any(name.startswith("image_input.patches") for name in frozen)
    assert {"blocks.1.mlp.shared.fc.weight", "blocks.1.ln1.image.weight"} <= frozen
    assert not any(name.startswith(("text_input", "final_norm", "projection", "logit_scale")) for name in frozen)
    assert not any(".text." in name for name in frozen)
    of_text = frozen_names(tiny(freeze_text="first:3", sharing=SEPARATE))
    assert {name.split(".")[1] for name in of_text if name.startswith("blocks.")} == {"0", "1", "2"}
    assert all(".text." in name or name.startswith("text_input") for name in of_text)


def test_the_first_stages_of_a_resnet_freeze_with_its_stem() -> None:
    frozen = frozen_names(tiny(**RESNET, freeze_image="first:2"))
    assert {name.split(".")[2] for name in frozen if ".stages." in name} == {"0", "1"}
    assert "resnet.conv1.weight" in frozen
    assert not any(".pool." in name for name in frozen)


def test_frozen_batch_norms_keep_their_statistics_and_others_count() -> None:
    model = tiny_model(batch_norm=True, freeze_image="first:3", vocab_size=512)
    before = {name: buffer.clone() for name, buffer in model.named_buffers() if name.endswith("running_mean")}
    train(tiny_engine(model, accumulation_steps=1), 2)
    unmoved = {name for name, buffer in model.named_buffers() if name in before and torch.equal(buffer, before[name])}
    assert "image_input.patches.bn1.running_mean" in unmoved
    assert "branch.stages.1.bn1.running_mean" in unmoved
    moved = before.keys() - unmoved
    assert moved == {name for name in before if name.split(".")[0] == "branch" and int(name.split(".")[2]) >= 2}


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        ({"patch_dropout": 0.5}, r"branch_layers \[\]"),
        ({"patch_dropout": 1.0, "branch_layers": ()}, "below 1"),
        (VIT | {"patch_dropout": 0.02}, "at least one of an image's 16 patches.*0.02, which comes to 0"),
        (VIT | {"patch_dropout": 0.99}, "leave one, got 0.99, which comes to 16"),
        (RESNET | {"patch_dropout": 0.5}, "image_tower vit"),
        (RESNET | CBOW | {"checkpoint_blocks": True}, "needs a transformer"),
        ({"freeze_image": "first:7"}, "N from 1 to 6"),
        ({"freeze_text": "last:2"}, "freeze_text"),
        (RESNET | {"freeze_image": "first:5"}, "N from 1 to 4"),
        (CBOW | {"freeze_text": "first:1"}, "none or all"),
    ],
)
def test_what_a_model_cannot_leave_out_or_freeze_is_refused_by_name(overrides: dict[str, Any], words: str) -> None:
    with pytest.raises(msclip.UserError, match=words):
        tiny(**overrides)
