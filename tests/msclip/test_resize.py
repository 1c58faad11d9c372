"""Positional tables of other sizes, against courses whose interpolation is known."""

from typing import Any

import pytest
import torch

import msclip
from msclip.resize import resize_grid, resize_line, resize_positions
from msclip.tokens import pack
from tests.msclip.test_towers import RESNET, VIT, captions, tiny


def test_a_smooth_table_keeps_its_course_and_the_class_token_its_value() -> None:
    rows = torch.arange(8).double()
    plane = (3 * rows[:, None] + rows).flatten()[:, None]
    table = torch.cat([torch.full((1, 1), 99.0).double(), plane])
    larger = resize_grid(table, 16)
    assert torch.equal(larger[0], table[0])
    centres = (torch.arange(16).double() + 0.5) / 2 - 0.5
    expected = 3 * centres[:, None] + centres
    inner = slice(4, 12)  # away from the border, where a bicubic kernel repeats the last value
    assert torch.allclose(larger[1:].view(16, 16)[inner, inner], expected[inner, inner], atol=1e-4)
    assert torch.equal(resize_grid(table, 8), table)


def test_caption_positions_are_interpolated_in_a_line() -> None:
    table = torch.arange(8).float()[:, None].expand(8, 3)
    assert torch.allclose(resize_line(table, 16)[1:15, 0], (torch.arange(1, 15) + 0.5) / 2 - 0.5)
    assert torch.equal(resize_line(table, 8), table)


@pytest.mark.parametrize("overrides", [{}, VIT, RESNET | {"image_size": 64}], ids=["ms_clip_s", "vit", "resnet"])
def test_a_resized_model_takes_the_new_size_and_keeps_every_other_weight(overrides: dict[str, Any]) -> None:
    model = tiny(**overrides).eval()
    larger = resize_positions(model, image_size=128, context_length=24)
    assert larger.encode_image(torch.randn(1, 3, 128, 128)).shape == (1, 32)
    assert larger.encode_text(torch.randint(1, 1000, (2, 24))).shape == (2, 32)
    before, after = model.state_dict(), larger.state_dict()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {name for name in before if name.endswith("positional_embedding")}
    again = resize_positions(model)
    images, ids = torch.randn(2, 3, model.config.image_size, model.config.image_size), captions([5, 9])
    assert all(torch.equal(x, y) for x, y in zip(again(images, pack(ids)), model(images, pack(ids)), strict=True))
    assert all(p.requires_grad for p in larger.parameters())


def test_a_size_that_is_no_multiple_of_the_patch_is_refused() -> None:
    with pytest.raises(msclip.UserError, match="image_size"):
        resize_positions(tiny(), image_size=100)
