"""The loss against hand values, and two ranks against one."""

import math
from typing import Any

import pytest
import torch

from msclip.loss import contrastive_loss
from tests.msclip.two_ranks import features


def test_loss_and_accuracies_equal_values_by_hand() -> None:
    images = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    texts = torch.tensor([[1.0, 0.0], [1.0, 0.0]])
    result = contrastive_loss(images, texts, torch.tensor([2.0]))
    # Logits are [[2, 2], [0, 0]]: each image is undecided; both captions prefer image 0.
    by_image = math.log(2)
    by_text = (math.log(1 + math.exp(-2)) + math.log(1 + math.exp(2))) / 2
    assert result.loss.item() == pytest.approx((by_image + by_text) / 2, abs=1e-6)
    assert result.text_to_image_accuracy.item() == 0.5


def test_loss_is_symmetric_in_image_and_text() -> None:
    images, texts, temperature = features()
    forth, back = contrastive_loss(images, texts, temperature), contrastive_loss(texts, images, temperature)
    assert forth.loss.item() == pytest.approx(back.loss.item(), abs=1e-6)
    assert forth.image_to_text_accuracy == back.text_to_image_accuracy


def test_bfloat16_features_are_compared_in_float32() -> None:
    images, texts, temperature = (x.detach() for x in features())
    images, texts = images.bfloat16(), texts.bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        loss = contrastive_loss(images, texts, temperature).loss
    assert loss.dtype == torch.float32
    assert torch.equal(loss, contrastive_loss(images.float(), texts.float(), temperature).loss)


def test_unpaired_features_are_refused() -> None:
    with pytest.raises(ValueError, match="pair up"):
        contrastive_loss(torch.ones(2, 3), torch.ones(3, 3), torch.ones(1))


def test_two_ranks_have_the_loss_and_gradients_of_one_process(two_ranks: list[dict[Any, Any]]) -> None:
    leaves = features()
    result = contrastive_loss(*leaves)
    result.loss.backward()
    torch.testing.assert_close(
        (two_ranks[0]["loss"] + two_ranks[1]["loss"]) / 2, torch.stack(result).detach(), rtol=0, atol=1e-6
    )
    # Each rank's gradient is zero outside its own rows, so the mean that data-parallel training takes is half the sum.
    for leaf, first, second in zip(leaves, *(observed["loss_gradients"] for observed in two_ranks), strict=True):
        torch.testing.assert_close((first + second) / 2, leaf.grad, rtol=0, atol=1e-6)
