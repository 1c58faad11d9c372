"""The losses against hand values, chunks against the whole, and two ranks against one."""

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from msclip import loss as module
from msclip.loss import LOGITS_AT_ONCE, contrastive_loss
from tests.msclip.two_ranks import LOSSES, features


def test_loss_and_accuracies_equal_values_by_hand() -> None:
    images = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    texts = torch.tensor([[1.0, 0.0], [1.0, 0.0]])
    result = contrastive_loss(images, texts, torch.tensor([2.0]))
    # Logits are [[2, 2], [0, 0]]: each image is undecided; both captions prefer image 0.
    by_image = math.log(2)
    by_text = (math.log(1 + math.exp(-2)) + math.log(1 + math.exp(2))) / 2
    assert result.loss.item() == pytest.approx((by_image + by_text) / 2, abs=1e-6)
    assert result.text_to_image_accuracy.item() == 0.5


def test_sigmoid_loss_equals_its_value_by_hand() -> None:
    images = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    texts = torch.tensor([[1.0, 0.0], [1.0, 0.0]])
    result = contrastive_loss(images, texts, torch.tensor([2.0]), torch.tensor([-1.0]))
    # Logits are [[1, 1], [-1, -1]]: one pair is found, one mismatch is not, and the second image finds nothing.
    by_hand = [math.log(1 + math.exp(-z * logit)) for z, logit in ((1, 1), (-1, 1), (-1, -1), (1, -1))]
    assert result.loss.item() == pytest.approx(sum(by_hand) / 2, abs=1e-6)
    assert result.text_to_image_accuracy.item() == 0.5


def test_sigmoid_loss_and_gradients_are_those_of_the_formula_of_the_paper() -> None:
    leaves, again = features("sigmoid", rows=50), features("sigmoid", rows=50)
    contrastive_loss(*leaves).loss.backward()
    images, texts, temperature, bias = again
    labels = 2 * torch.eye(50) - 1
    expected = -F.logsigmoid(labels * (temperature * images @ texts.T + bias)).sum() / 50
    expected.backward()
    assert contrastive_loss(*leaves).loss.item() == pytest.approx(expected.item(), rel=1e-6)
    for leaf, other in zip(leaves, again, strict=True):
        torch.testing.assert_close(leaf.grad, other.grad, rtol=0, atol=1e-6)


def test_a_confident_sigmoid_still_has_a_gradient() -> None:
    bias = torch.tensor([0.0], requires_grad=True)
    result = contrastive_loss(torch.tensor([[1.0]]), torch.tensor([[1.0]]), torch.tensor([30.0]), bias)
    result.loss.backward()
    assert result.loss.item() == pytest.approx(math.exp(-30), rel=1e-5)
    assert bias.grad is not None
    assert bias.grad.item() == pytest.approx(-math.exp(-30), rel=1e-5)


@pytest.mark.parametrize("kind", LOSSES)
def test_loss_is_symmetric_in_image_and_text(kind: str) -> None:
    images, texts, *scale = features(kind)
    forth, back = contrastive_loss(images, texts, *scale), contrastive_loss(texts, images, *scale)
    assert forth.loss.item() == pytest.approx(back.loss.item(), abs=1e-6)
    assert forth.image_to_text_accuracy == back.text_to_image_accuracy


@pytest.mark.parametrize("kind", LOSSES)
def test_bfloat16_features_are_compared_in_float32(kind: str) -> None:
    images, texts, *scale = (x.detach() for x in features(kind))
    images, texts = images.bfloat16(), texts.bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        loss = contrastive_loss(images, texts, *scale).loss
    assert loss.dtype == torch.float32
    assert torch.equal(loss, contrastive_loss(images.float(), texts.float(), *scale).loss)


def test_unpaired_features_are_refused() -> None:
    with pytest.raises(ValueError, match="pair up"):
        contrastive_loss(torch.ones(2, 3), torch.ones(3, 3), torch.ones(1))


class Largest(TorchDispatchMode):
    """Notices the size of the largest tensor that any operation makes, in the backward pass too."""

    numbers = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        self.numbers = max([self.numbers, *(x.numel() for x in tree_leaves(made) if isinstance(x, Tensor))])
        return made


def observe(kind: str, rows: int, learned: tuple[bool, ...] = (True,) * 4) -> tuple[Tensor, list[Tensor | None], int]:
    """Loss and accuracies, gradients, and the size of the largest tensor on the way."""
    leaves = [x.detach().requires_grad_(wanted) for x, wanted in zip(features(kind, rows), learned, strict=False)]
    with Largest() as largest:
        result = contrastive_loss(*leaves)
        (3 * result.loss).backward()
    return torch.stack(result).detach(), [leaf.grad for leaf in leaves], largest.numbers


@pytest.mark.parametrize("learned", [(True, True, True, True), (False, True, True, False), (True, False, False, True)])
@pytest.mark.parametrize("kind", LOSSES)
def test_chunks_have_the_loss_accuracies_and_gradients_of_the_whole(
    kind: str, learned: tuple[bool, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = 100
    whole, gradients, _ = observe(kind, rows, learned)
    for at_once in (7 * rows, 1):  # 14 chunks of seven rows and one of two; a hundred of one
        monkeypatch.setattr(module, "LOGITS_AT_ONCE", at_once)
        chunked, chunked_gradients, _ = observe(kind, rows, learned)
        torch.testing.assert_close(chunked, whole, rtol=1e-6, atol=1e-6)
        assert [x is not None for x in chunked_gradients] == [x is not None for x in gradients]
        for x, expected in zip(chunked_gradients, gradients, strict=True):
            torch.testing.assert_close(x, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("kind", LOSSES)
def test_the_square_of_the_batch_is_never_held(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert observe(kind, rows=64)[2] == 64**2
    for rows in (64, 128, 256):
        monkeypatch.setattr(module, "LOGITS_AT_ONCE", 1024)
        assert observe(kind, rows)[2] == max(1024, 10 * rows)  # logits, or the features of both sides, side by side


def test_a_batch_of_four_thousand_is_compared_at_once_and_a_larger_one_is_not() -> None:
    assert LOGITS_AT_ONCE == 4096**2
    assert observe("softmax", rows=4100)[2] <= LOGITS_AT_ONCE


@pytest.mark.parametrize("in_chunks", [False, True])
@pytest.mark.parametrize("kind", LOSSES)
def test_two_ranks_have_the_loss_and_gradients_of_one_process(
    kind: str, in_chunks: bool, two_ranks: list[dict[Any, Any]]
) -> None:
    leaves = features(kind)
    result = contrastive_loss(*leaves)
    result.loss.backward()
    (first, first_gradients), (second, second_gradients) = (observed["loss", kind, in_chunks] for observed in two_ranks)
    torch.testing.assert_close((first + second) / 2, torch.stack(result).detach(), rtol=0, atol=1e-6)
    # Each rank's gradient is zero outside its own rows, so the mean that data-parallel training takes is half the sum.
    for leaf, x, y in zip(leaves, first_gradients, second_gradients, strict=True):
        torch.testing.assert_close((x + y) / 2, leaf.grad, rtol=0, atol=1e-6)
