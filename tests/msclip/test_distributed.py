"""Collectives on two gloo processes, and their identity on one."""

from typing import Any

import torch

from msclip.distributed import all_gather_objects, first_ranks_object, gather_with_grad, mean_over_ranks, rank, world_size


def test_one_process_is_a_world_of_its_own() -> None:
    x = torch.randn(3, 2, requires_grad=True)
    assert (world_size(), rank()) == (1, 0)
    assert gather_with_grad(x) is x
    assert all_gather_objects("x") == ["x"]
    assert first_ranks_object("x") == "x"
    assert torch.equal(mean_over_ranks(torch.ones(2)), torch.ones(2))


def test_gathering_keeps_rank_order_on_every_rank(two_ranks: list[dict[Any, Any]]) -> None:
    rows = torch.arange(6.0).view(2, 3)
    for observed in two_ranks:
        assert torch.equal(observed["gathered"], torch.cat([rows, rows + 10]))


def test_gathered_rows_get_the_sum_of_all_ranks_gradients(two_ranks: list[dict[Any, Any]]) -> None:
    # Row i is weighed by (i + 1) on rank 0 and 2 (i + 1) on rank 1.
    assert torch.equal(two_ranks[0]["gather_gradient"], torch.tensor([[3.0] * 3, [6.0] * 3]))
    assert torch.equal(two_ranks[1]["gather_gradient"], torch.tensor([[9.0] * 3, [12.0] * 3]))


def test_objects_and_means_cross_ranks(two_ranks: list[dict[Any, Any]]) -> None:
    for observed in two_ranks:
        assert observed["objects"] == [{"rank": 0}, {"rank": 1}]
        assert observed["first"] == "from 0"
        assert torch.equal(observed["mean"], torch.tensor([1.5, 3.0]))
