"""The sample order: each row once an epoch, and the same global batches whoever reads them and wherever one starts."""

import collections
import itertools
import math
import pickle
import time
import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from msclip.data.assembly import check_rows, pieces_of_batches
from msclip.data.decode import Encoded
from msclip.data.plan import Plan, Portion, Unit, batch_parts
from msclip.errors import UserError

WORLD_SIZES = (1, 2, 3, 4, 8)


def source_sizes(draw: st.DrawFn, least: int) -> list[int]:
    """Row groups, some of them empty, with at least so many rows."""
    sizes = draw(st.lists(st.integers(0, 40), min_size=1, max_size=20))
    return [*sizes, max(1, least + draw(st.integers(0, 60)) - sum(sizes))]


def skipped(draw: st.DrawFn, rows: int, most: int) -> set[int]:
    return draw(st.sets(st.integers(0, rows - 1), max_size=most))


@st.composite
def plans(draw: st.DrawFn, weighted: bool | None = None, resample: bool | None = False) -> Plan:
    """Of one set of rows, or of up to four sources with weights, perhaps resampled; perhaps with rows left out."""
    global_batch = 24 * draw(st.integers(1, 2))
    weighted = draw(st.booleans()) if weighted is None else weighted
    sources = [source_sizes(draw, 2 * global_batch) for _ in range(draw(st.integers(1, 4)) if weighted else 1)]
    scale = draw(st.sampled_from((0.01, 1 / 3, 1, 1000)))  # at most 1 to 18: even the smallest has a row in a batch of 24
    portions = [Portion(f"source {i}", len(sizes), scale * draw(st.integers(1, 6))) for i, sizes in enumerate(sources)]
    sizes = [size for source in sources for size in source]
    return Plan(
        sizes,
        global_batch,
        seed=draw(st.integers(0, 9)),
        lanes=draw(st.one_of(st.none(), st.integers(1, global_batch))),
        window=draw(st.one_of(st.none(), st.integers(1, 5))),
        unit_rows=draw(st.integers(1, 30)),
        portions=portions if weighted else (),
        skip=sorted(skipped(draw, sum(sizes), global_batch)),
        resample=weighted and (draw(st.booleans()) if resample is None else resample),
    )


def kept_rows(plan: Plan) -> list[np.ndarray]:
    """The ids of each source's rows that are not left out, in order."""
    sizes, skip = np.asarray(plan.sizes), plan.skip
    groups = [portion.row_groups for portion in plan.portions] or [len(sizes)]
    ends = np.cumsum([source.sum() for source in np.split(sizes, np.cumsum(groups)[:-1])])
    begins = np.r_[0, ends[:-1]]
    return [np.setdiff1d(np.arange(begin, end), skip) for begin, end in zip(begins, ends, strict=True)]


def stream(plan: Plan, steps: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows and their epochs, of all steps one after another."""
    batches = [plan.batch(step) for step in range(steps)]
    assert {len(batch.row) for batch in batches} == {plan.global_batch}
    return np.concatenate([b.row for b in batches]), np.concatenate([b.epoch for b in batches])


@given(plans())
@settings(max_examples=80, deadline=None)
def test_each_row_that_is_kept_comes_once_in_each_epoch_of_its_source_and_no_tail_is_dropped(plan: Plan) -> None:
    rows, epochs = 0, 3
    steps = 2 + epochs * max(math.ceil(source.rows / source.width) for source in plan.sources)
    row, epoch = stream(plan, steps)
    for source, kept in zip(plan.sources, kept_rows(plan), strict=True):
        mine = np.isin(row, kept)
        rows += mine.sum()
        for e in range(epochs):
            np.testing.assert_array_equal(np.sort(row[mine & (epoch == e)]), kept)
        assert mine.sum() == steps * source.width
    assert rows == steps * plan.global_batch  # none of another source, none of those left out


@given(plans(weighted=True), st.integers(0, 20))
@settings(max_examples=60, deadline=None)
def test_every_batch_has_each_source_s_part_within_a_row(plan: Plan, step: int) -> None:
    row, total = plan.batch(step).row, sum(portion.weight for portion in plan.portions)
    for portion, source, kept in zip(plan.portions, plan.sources, kept_rows(plan), strict=True):
        count = int(np.isin(row, kept).sum())
        assert abs(count - plan.global_batch * portion.weight / total) < 1
        assert plan.passes(step + 1)[portion.name] == pytest.approx((step + 1) * count / len(kept))
        assert count == source.width


def test_weights_are_parts_of_a_batch_by_largest_remainder() -> None:
    assert batch_parts([1, 2], 256) == [85, 171]
    assert batch_parts([0.1, 0.2, 0.7], 100) == [10, 20, 70]
    assert batch_parts([1, 1, 1], 8) == [3, 3, 2]


def test_a_worker_s_slice_has_something_of_each_source() -> None:
    plan = Plan([250] * 400, 1024, portions=[Portion("photos", 300, 3), Portion("drawings", 100, 1)])
    for rank in range(8):
        drawings = (plan.share(0, rank, 8).row >= 75_000).sum()
        assert abs(drawings - 32) <= 16


def test_a_small_source_repeats_while_a_large_one_goes_on() -> None:
    plan = Plan([30, 3000], 30, portions=[Portion("small", 1, 1), Portion("large", 1, 2)])
    row, epoch = stream(plan, 150)
    assert epoch[row < 30].max() == 49  # 1,500 rows of 30
    assert sorted(row[row >= 30]) == list(range(30, 3030))  # once each


def test_sources_of_one_size_are_not_shuffled_alike_and_the_first_is_as_it_would_be_alone() -> None:
    alone = Plan([50] * 4, 20)
    both = Plan([50] * 8, 40, portions=[Portion("a", 4, 1), Portion("b", 4, 1)])
    row, _ = stream(both, 10)
    first, second = row[row < 200], row[row >= 200]
    np.testing.assert_array_equal(first, stream(alone, 10)[0])
    assert not np.array_equal(first, second - 200)


@given(plans(weighted=True, resample=True), st.integers(0, 20))
@settings(max_examples=60, deadline=None)
def test_resampled_batches_hold_rows_that_are_kept(plan: Plan, step: int) -> None:
    assert np.isin(plan.batch(step).row, np.concatenate(kept_rows(plan))).all()


def test_resampled_rows_come_in_proportion_to_their_weights_and_some_twice_and_some_not() -> None:
    # Row groups of several sizes, and a source whose part of a batch is a fifth of a row.
    sizes = [*range(1, 40), *[7] * 50, *[25] * 4]
    portions = [Portion("a", 39, 1), Portion("b", 50, 3), Portion("c", 4, 0.0125)]
    plan = Plan(sizes, 64, seed=1, portions=portions, resample=True)
    row, epoch = stream(plan, 6000)
    bounds = np.cumsum([0, *sizes])[[0, 39, 89, 93]]
    counts = np.histogram(row, bounds)[0] / len(row)
    # Drawn are row groups, of 15 rows on average: sqrt(15 / rows) is the standard deviation of a part, in parts of its root.
    parts = np.array([1, 3, 0.0125]) / 4.0125
    assert (np.abs(counts - parts) < 5 * np.sqrt(40 * parts / len(row))).all()
    expected = plan.passes(6000)
    for portion, begin, end in zip(portions, bounds, bounds[1:], strict=False):
        times = np.bincount(row[(row >= begin) & (row < end)] - begin, minlength=end - begin)
        assert times.mean() == pytest.approx(expected[portion.name], rel=0.2)
        assert np.abs(times - times.mean()).max() < 6 * np.sqrt(times.mean())  # whatever the size of the row group
    first = row[: plan.rows]
    assert 0.2 < 1 - len(np.unique(first)) / plan.rows < 0.8
    # A row that comes again has another number for its crop and its caption.
    pairs = np.stack([row, epoch], 1)
    assert len(np.unique(pairs, axis=0)) == len(pairs)


@given(plans(weighted=False))
@settings(max_examples=60, deadline=None)
def test_rows_of_a_row_group_land_as_near_and_as_far_as_is_said(plan: Plan) -> None:
    places = dict[tuple[int, int, int], list[int]]()
    for unit in plan.units(stop_step=math.ceil(plan.steps_per_epoch)):
        places.setdefault((unit.lane, unit.epoch, unit.window), []).extend(unit.row.tolist())
    steps = {
        (int(e), int(r)): step
        for step in range(math.ceil(plan.steps_per_epoch))
        for e, r in zip(*plan.batch(step), strict=True)
    }
    w = plan.global_batch // plan.lanes
    for (_, epoch, _), rows in places.items():
        used = [steps[epoch, row] for row in rows]
        assert max(used) - min(used) <= math.ceil(len(rows) / w)
        assert max(collections.Counter(used).values()) <= w + 1


def test_neighbouring_row_groups_of_a_file_are_a_third_of_an_epoch_apart() -> None:
    plan = Plan([256] * 2000, 1024)
    steps = np.empty(plan.rows)
    for step in range(500):
        steps[plan.batch(step).row] = step
    first_rows = steps.reshape(2000, 256)[:, 0]
    assert np.abs(np.diff(first_rows)).mean() == pytest.approx(500 / 3, rel=0.05)  # three standard deviations
    within = np.abs(np.diff(steps.reshape(2000, 256), axis=1))
    # A window of 256 rows is used over 16 batches.
    assert np.median(within.max(axis=1)) <= 16
    assert np.median(within.mean(axis=1)) == pytest.approx(16 / 3, rel=0.1)


def test_memory_is_that_of_the_windows_in_use() -> None:
    plan = Plan([256] * 20_000, 1024)  # 5 million rows: their ids alone would take 40 MB
    plan.batch(0)  # the epoch's order of row groups
    tracemalloc.start()
    for unit in itertools.islice(plan.units(start_step=0), 2000):
        assert len(unit.row) <= plan.unit_rows
    for step in range(0, 4000, 40):
        plan.share(step, 3, 8)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 4 * plan.lanes * 256 * 8 + 1e6


@given(plans(weighted=False))
@settings(max_examples=60, deadline=None)
def test_lanes_never_drift_apart(plan: Plan) -> None:
    # `rows` batches are exactly `global_batch` epochs: then all lanes must be at the same point again.
    assert plan.batch(plan.rows - 1).epoch.max() == plan.global_batch - 1
    assert plan.batch(plan.rows).epoch.min() == plan.global_batch


@given(plans(resample=None), st.integers(0, 20))
@settings(max_examples=60, deadline=None)
def test_global_batches_do_not_depend_on_the_number_of_workers(plan: Plan, step: int) -> None:
    whole = plan.batch(step)
    for world_size in WORLD_SIZES:
        shares = [plan.share(step, rank, world_size) for rank in range(world_size)]
        assert {len(share.row) for share in shares} == {plan.global_batch // world_size}
        np.testing.assert_array_equal(np.concatenate([share.row for share in shares]), whole.row)
        np.testing.assert_array_equal(np.concatenate([share.epoch for share in shares]), whole.epoch)


@given(plans(resample=None), st.sampled_from(WORLD_SIZES), st.integers(0, 12), st.integers(1, 8), st.data())
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


@given(plans(resample=None), st.integers(1, 10))
@settings(max_examples=30, deadline=None)
def test_a_plan_made_anew_continues_the_unbroken_order(plan: Plan, step: int) -> None:
    for past in range(step):  # fills the caches of one of them
        plan.batch(past)
    np.testing.assert_array_equal(pickle.loads(pickle.dumps(plan)).batch(step).row, plan.batch(step).row)


@given(plans(resample=None), st.lists(st.tuples(st.integers(1, 4), st.sampled_from((1, 2, 4))), min_size=1, max_size=4))
@settings(max_examples=60, deadline=None)
def test_a_run_broken_off_anywhere_goes_on_with_the_unbroken_batches_on_1_2_or_4_workers(
    plan: Plan, starts: list[tuple[int, int]]
) -> None:
    """Each start makes some steps on some workers, whose units become batches in the way that training makes them."""
    done = 0
    for steps, world_size in starts:
        fresh = pickle.loads(pickle.dumps(plan))
        found = [list[np.ndarray]() for _ in range(steps)]
        for rank in range(world_size):
            place = rank, world_size, done, done + steps
            for step, pieces in pieces_of_batches(fresh, *place, map(read, fresh.units(*place))):
                found[step - done].append(check_rows(fresh, step, rank, world_size, pieces))
        for step, shares in enumerate(found, done):
            assert {len(share) for share in shares} == {plan.global_batch // world_size}
            np.testing.assert_array_equal(np.concatenate(shares), plan.batch(step).row)
        done += steps


def read(unit: Unit) -> Encoded:
    """What a reader makes of a unit, but for the files."""
    return Encoded(unit.epoch, unit.row, np.empty(0, np.uint8), np.zeros(len(unit.row), np.int64), ("",) * len(unit.row))


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
    assert (plan.lanes, plan.sources[0].window) == (64, 1)
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
    with pytest.raises(UserError, match=r"data\.resample draws sources by their weights"):
        Plan([100], 16, resample=True)
    with pytest.raises(UserError, match="b has no rows"):
        Plan([100, 5], 16, portions=[Portion("a", 1, 1), Portion("b", 1, 1)], skip=range(100, 105), resample=True)
    with pytest.raises(UserError, match="global_batch must not exceed the rows of the data, got 30 for 29 rows"):
        Plan([29], 30)
    with pytest.raises(UserError, match=r"data\.lanes must be from 1 to global_batch \(8\), got 9"):
        Plan([29], 8, lanes=9)
    with pytest.raises(UserError, match=r"data\.window must be at least 1, got 0"):
        Plan([29], 8, window=0)
    with pytest.raises(UserError, match="global_batch must be a multiple of num_workers, got 8 and 3"):
        Plan([29], 8).share(0, 0, 3)
    with pytest.raises(UserError, match="got 8 for 7 rows"):
        Plan([9], 8, skip=[2, 5])
    with pytest.raises(UserError, match=r"by its weight 0\.01 b has no row in a batch of 8"):
        Plan([9, 9], 8, portions=[Portion("a", 1, 1), Portion("b", 1, 0.01)])
    with pytest.raises(UserError, match="by its weight 3 b has 6 rows in every batch of 8, and only 5 in all"):
        Plan([9, 5], 8, portions=[Portion("a", 1, 1), Portion("b", 1, 3)])
