"""The sample order: each row once an epoch, and the same global batches whoever reads them and wherever one starts."""

import itertools
import pickle
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from msclip.data.plan import Plan
from msclip.errors import UserError

WORLD_SIZES = (1, 2, 3, 4, 8)


@st.composite
def plans(draw: st.DrawFn) -> Plan:
    global_batch = 24 * draw(st.integers(1, 2))
    sizes = draw(st.lists(st.integers(0, 40), min_size=1, max_size=20))
    sizes.append(max(1, global_batch + draw(st.integers(0, 60)) - sum(sizes)))
    return Plan(
        sizes,
        global_batch,
        seed=draw(st.integers(0, 9)),
        lanes=draw(st.one_of(st.none(), st.integers(1, global_batch))),
        window=draw(st.one_of(st.none(), st.integers(1, 5))),
        unit_rows=draw(st.integers(1, 30)),
    )


@given(plans())
@settings(max_examples=60, deadline=None)
def test_each_row_comes_once_in_each_epoch_and_no_tail_is_dropped(plan: Plan) -> None:
    epochs = 3
    steps = int(epochs * plan.steps_per_epoch) + 2
    batches = [plan.batch(step) for step in range(steps)]
    assert {len(batch.row) for batch in batches} == {plan.global_batch}
    row, epoch = (np.concatenate(column) for column in zip(*((b.row, b.epoch) for b in batches), strict=True))
    for e in range(epochs):
        np.testing.assert_array_equal(np.sort(row[epoch == e]), np.arange(plan.rows))


@given(plans())
@settings(max_examples=60, deadline=None)
def test_lanes_never_drift_apart(plan: Plan) -> None:
    # `rows` batches are exactly `global_batch` epochs: then all lanes must be at the same point again.
    assert plan.batch(plan.rows - 1).epoch.max() == plan.global_batch - 1
    assert plan.batch(plan.rows).epoch.min() == plan.global_batch


@given(plans(), st.integers(0, 20))
@settings(max_examples=60, deadline=None)
def test_global_batches_do_not_depend_on_the_number_of_workers(plan: Plan, step: int) -> None:
    whole = plan.batch(step)
    for world_size in WORLD_SIZES:
        shares = [plan.share(step, rank, world_size) for rank in range(world_size)]
        assert {len(share.row) for share in shares} == {plan.global_batch // world_size}
        np.testing.assert_array_equal(np.concatenate([share.row for share in shares]), whole.row)
        np.testing.assert_array_equal(np.concatenate([share.epoch for share in shares]), whole.epoch)


@given(plans(), st.sampled_from(WORLD_SIZES), st.integers(0, 12), st.integers(1, 8), st.data())
@settings(max_examples=80, deadline=None)
def test_units_hold_exactly_the_share_of_a_rank_from_any_step_on(
    plan: Plan, world_size: int, start: int, count: int, data: st.DataObject
) -> None:
    rank = data.draw(st.integers(0, world_size - 1))
    units = list(plan.units(rank, world_size, start, start + count))
    shares = [plan.share(step, rank, world_size) for step in range(start, start + count)]
    wanted = sorted((int(e), int(r)) for share in shares for e, r in zip(share.epoch, share.row, strict=True))
    assert sorted((unit.epoch, int(r)) for unit in units for r in unit.row) == wanted
    assert all(0 < len(unit.row) <= plan.unit_rows for unit in units)
    first_steps = [unit.first_step for unit in units]
    assert first_steps == sorted(first_steps)
    begin = 0
    for lane, first, last in plan.columns(rank, world_size):
        of_lane = [share.row[begin : begin + last - first] for share in shares]
        begin += last - first
        read = [unit.row for unit in units if unit.lane == lane]
        np.testing.assert_array_equal(np.concatenate(read), np.concatenate(of_lane))


@given(plans(), st.integers(1, 10))
@settings(max_examples=30, deadline=None)
def test_a_plan_made_anew_continues_the_unbroken_order(plan: Plan, step: int) -> None:
    for past in range(step):  # fills the caches of one of them
        plan.batch(past)
    np.testing.assert_array_equal(pickle.loads(pickle.dumps(plan)).batch(step).row, plan.batch(step).row)


def test_the_order_is_the_one_that_earlier_releases_had() -> None:
    # Recorded: a resumed run must meet the same rows after an upgrade of msclip or NumPy.
    plan = Plan([5, 4, 3, 6], 6, seed=3, lanes=2, window=1)
    assert [plan.batch(step).row.tolist() for step in range(4)] == [
        [0, 2, 1, 12, 14, 16],
        [3, 4, 6, 15, 13, 17],
        [5, 8, 7, 11, 10, 9],
        [15, 14, 17, 8, 10, 9],
    ]


def test_epochs_and_seeds_differ_in_order() -> None:
    plan = Plan([50] * 8, 40)
    first, second = (np.concatenate([plan.batch(s).row for s in range(e * 10, e * 10 + 10)]) for e in range(2))
    other = np.concatenate([Plan([50] * 8, 40, seed=1).batch(s).row for s in range(10)])
    assert not np.array_equal(first, second)
    assert not np.array_equal(first, other)


def test_a_small_data_set_is_shuffled_as_a_whole() -> None:
    plan = Plan([500] * 12, 256)  # 6,000 rows that are sorted by class, say: 12 classes
    share = [np.bincount(plan.batch(step).row // 500, minlength=12) for step in range(20)]
    # A sample of 256 has 21 +- 4.4 of each class.
    assert np.min(share) >= 5
    assert np.max(share) <= 45


def test_rows_of_one_row_group_are_spread_over_batches_of_a_large_data_set() -> None:
    plan = Plan([256] * 1000, 1024)
    assert (plan.lanes, plan.window) == (64, 1)
    for step in (0, 100):
        groups = np.bincount(plan.batch(step).row // 256)
        assert groups.max() <= 2 * 1024 // plan.lanes  # twice where two lanes share a row group
        assert np.count_nonzero(groups) >= plan.lanes // 2


def test_units_are_not_a_handful_of_rows_on_small_data() -> None:
    for rows, global_batch in ((300, 32), (4_000, 256), (6_089, 1024)):
        units = list(Plan([500] * (rows // 500) + [rows % 500], global_batch).units(0, 2, 0, 50))
        assert np.mean([len(unit.row) for unit in units]) >= min(96, rows / 4)


def test_each_row_group_of_large_data_is_read_about_once_an_epoch() -> None:
    plan = Plan([256] * 2000, 512)
    steps = int(plan.steps_per_epoch)
    reads = sum(len(np.unique(unit.row // 256)) for unit in plan.units(stop_step=steps))
    assert reads <= 2000 + 2 * plan.lanes


def test_a_hundred_million_rows_cost_milliseconds_a_step() -> None:
    plan = Plan(np.full(400_000, 250), 32_768)
    begin = time.perf_counter()
    share = plan.share(100_000, 5, 64)
    units = list(itertools.islice(plan.units(5, 64, 100_000), 64))
    elapsed = time.perf_counter() - begin
    assert len(share.row) == 512
    assert len(units) == 64
    assert elapsed < 5  # 0.2 s on a quiet machine, nearly all of it the order of 400,000 row groups


def test_settings_out_of_range_are_named() -> None:
    with pytest.raises(UserError, match="global_batch must not exceed the rows of the data, got 30 for 29 rows"):
        Plan([29], 30)
    with pytest.raises(UserError, match=r"data\.lanes must be from 1 to global_batch \(8\), got 9"):
        Plan([29], 8, lanes=9)
    with pytest.raises(UserError, match=r"data\.window must be at least 1, got 0"):
        Plan([29], 8, window=0)
    with pytest.raises(UserError, match="global_batch must be a multiple of num_workers, got 8 and 3"):
        Plan([29], 8).share(0, 0, 3)
