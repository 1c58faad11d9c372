"""Helpers on other machines: hired by the measured wait, never in the way of decoders here, and lost without a trace."""

import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from msclip.data import helpers
from msclip.data.decode import Recipe
from msclip.data.helpers import Crew, Helper, Queue
from msclip.data.loader import Batch, Batches
from msclip.data.pool import Decoded, Work, decode_apart
from msclip.data.shards import Manifest
from msclip.data.tokenizer import Tokenizer
from msclip.errors import UserError
from tests.msclip.test_loader import (
    ROWS,
    SIZE,
    Slow,
    batches,
    good_captions,
    kept,
    picture,
    plan_of,
    read,
    recipe_of,
    same,
    write,
)

STEPS = 12


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.train([f"picture {i} of three words" for i in range(40)], vocab_size=600, context_length=12)


@pytest.fixture
def manifest(tmp_path: Path) -> Manifest:
    images: list[bytes | None] = [picture(i) if i != 8 else b"GIF? no" for i in range(ROWS)]
    return write(tmp_path, images, good_captions())


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(helpers, "STRETCH_SECONDS", 0.1)
    monkeypatch.setattr(helpers, "IDLE_SECONDS", 0.5)


class Friend:
    """Decodes in the thread that asks it, until it is closed."""

    def __init__(self, recipe: Recipe):
        self.recipe, self.pieces = recipe, 0
        self.closed = threading.Event()

    def start(self) -> None:
        if self.closed.is_set():
            raise RuntimeError("closed")

    def decode(self, work: Work) -> Decoded:
        self.pieces += 1
        return decode_apart(self.recipe, work)

    def close(self) -> None:
        self.closed.set()


class Dying(Friend):
    """Is gone at its second piece."""

    def decode(self, work: Work) -> Decoded:
        if self.pieces:
            raise ConnectionError("the node has gone")
        return super().decode(work)


class Silent(Friend):
    """Says nothing until it is closed."""

    def decode(self, work: Work) -> Decoded:
        self.pieces += 1
        self.closed.wait(30)
        raise ConnectionError("closed")


class Absent(Silent):
    """Never comes."""

    def start(self) -> None:
        self.closed.wait(30)
        raise ConnectionError("closed")


class Friends:
    """Has as many as are wanted, and remembers what was asked."""

    def __init__(self, kind: type[Friend], recipe: Recipe):
        self.kind, self.recipe = kind, recipe
        self.asked: list[tuple[int, int, int]] = []
        self.hired: list[Friend] = []

    def hire(self, wanted: int, working: int, coming: int) -> Sequence[Helper]:
        self.asked.append((wanted, working, coming))
        hired = [self.kind(self.recipe) for _ in range(wanted)]
        self.hired += hired
        return hired


def helped(manifest: Manifest, tokenizer: Tokenizer, friends: Friends, slow: bool = True, pause: float = 0.0) -> list[Batch]:
    """Batches of a loader whose own decoder takes 50 ms an image, if `slow`."""
    plan = plan_of(manifest)
    recipe = recipe_of(manifest, tokenizer)
    own = replace(recipe, preprocess=Slow(image_size=SIZE)) if slow else recipe
    with Batches(plan, 0, 1, 0, STEPS, read(manifest, plan, 0, 1, 0, STEPS), own, helpers=friends) as loader:

        def paused() -> Iterator[Batch]:
            time.sleep(pause)
            for batch in loader:
                time.sleep(pause)
                yield batch

        return kept(paused())


@pytest.mark.parametrize("kind", [Friend, Dying])
def test_whoever_decodes_batches_are_the_same(manifest: Manifest, tokenizer: Tokenizer, kind: type[Friend]) -> None:
    friends = Friends(kind, recipe_of(manifest, tokenizer))
    found, alone = helped(manifest, tokenizer, friends), batches(manifest, tokenizer, stop=STEPS)
    assert sum(friend.pieces for friend in friends.hired) > 0
    assert same(found, alone)
    assert [batch.bad for batch in found] == [batch.bad for batch in alone]
    assert {row.key for batch in found for row in batch.bad} == {"k8"}
    if kind is Dying:
        assert len(friends.hired) > 1, "a lost one is replaced while training waits"
        assert friends.hired[0].pieces == 1
    assert all(friend.closed.wait(1) for friend in friends.hired)


class Stretches(threading.Event):
    """Stretches of training that each waited for decoding this share of their time; then the end."""

    def __init__(self, crew: Crew, *shares: float | None):
        super().__init__()
        self.crew, self.shares = crew, iter(shares)

    def wait(self, timeout: float | None = None) -> bool:
        assert timeout is not None
        share = next(self.shares, "end")
        if share == "end":
            self.set()
        elif isinstance(share, float):
            self.crew.waited = (self.crew.waited or 0.0) + share * timeout
        return self.is_set()


def asked(friends: Friends, *shares: float | None, come: bool) -> list[tuple[int, int, int]]:
    """What is asked for by a loader with four decoders of its own; each helper comes at once or never."""
    crew = Crew()

    def employ(helper: Helper, rank: int) -> None:
        if come:
            crew._coming.discard(helper)
            crew._working.add(helper)

    crew.watch(friends, 4, Stretches(crew, *shares), employ)
    return friends.asked


@pytest.mark.parametrize(
    ("shares", "come", "expected"),
    [
        ((None, 0.9, 0.04, 0.04), True, []),  # the wait for the first batch is not for want of decoders
        ((0.0, 0.5), True, [(4, 0, 0)]),  # half of the time with four: twice as many
        ((0.0, 0.5, 0.5, 0.75), False, [(4, 0, 0), (8, 0, 4)]),  # four are coming, twelve are wanted
        ((0.0, 0.5, 0.5, 0.04, 0.25), True, [(4, 0, 0), (3, 4, 0)]),  # not while they come: that stretch was without them
        ((0.0, -0.5, 0.0), True, []),  # files came late
    ],
)
def test_as_many_are_hired_as_the_measured_wait_asks_for(
    shares: tuple[float | None, ...], come: bool, expected: list[tuple[int, int, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(helpers, "STRETCH_SECONDS", 1.0)  # where these shares are exact
    friends = Friends(Friend, None)  # type: ignore[arg-type]
    assert asked(friends, *shares, come=come) == expected
    assert all(friend.closed.is_set() for friend in friends.hired)


def test_a_cluster_that_does_not_answer_is_asked_again(caplog: pytest.LogCaptureFixture) -> None:
    class Deaf(Friends):
        def hire(self, wanted: int, working: int, coming: int) -> Sequence[Helper]:
            super().hire(wanted, working, coming)
            raise ConnectionError("no answer")

    assert asked(Deaf(Friend, None), 0.0, 0.5, 0.5, come=True) == [(4, 0, 0)] * 2  # type: ignore[arg-type]
    assert "no answer" in caplog.text


def test_nobody_is_hired_while_the_decoders_here_suffice(
    manifest: Manifest, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(helpers, "STRETCH_SECONDS", 0.5)
    friends = Friends(Friend, recipe_of(manifest, tokenizer))
    helped(manifest, tokenizer, friends, slow=False, pause=0.2)
    assert friends.asked == []


def test_nobody_is_hired_for_want_of_files(manifest: Manifest, tokenizer: Tokenizer) -> None:
    plan, friends = plan_of(manifest), Friends(Friend, recipe_of(manifest, tokenizer))

    def late() -> Iterator[object]:
        for unit in read(manifest, plan, 0, 1, 0, 6):
            time.sleep(0.1)
            yield unit

    with Batches(plan, 0, 1, 0, 6, late(), friends.recipe, helpers=friends) as loader:  # type: ignore[arg-type]
        assert len(list(loader)) == 6
        assert loader.waits.storage > 0.5
    assert friends.asked == []


@pytest.mark.parametrize("kind", [Silent, Absent])
def test_closing_does_not_wait_for_a_helper_that_says_nothing(
    manifest: Manifest, tokenizer: Tokenizer, kind: type[Friend]
) -> None:
    plan, friends = plan_of(manifest), Friends(kind, recipe_of(manifest, tokenizer))
    own = replace(friends.recipe, preprocess=Slow(image_size=SIZE))
    with Batches(plan, 0, 1, 0, None, read(manifest, plan), own, helpers=friends) as loader:
        deadline = time.monotonic() + 20
        while not friends.hired:
            next(loader)
        while kind is Silent and not friends.hired[0].pieces:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        began = time.monotonic()
    assert time.monotonic() - began < 5
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("batches")]


def test_an_error_in_the_data_keeps_its_words(tmp_path: Path, tokenizer: Tokenizer) -> None:
    manifest = write(tmp_path, [b"broken"] * ROWS, good_captions())
    friends = Friends(Friend, recipe_of(manifest, tokenizer))
    with pytest.raises(UserError, match=r"no row of row group \d of .*\.parquet can be used"):
        helped(manifest, tokenizer, friends)


def taken(queue: Queue[str], rank: int) -> str | None:
    return queue.take_elsewhere(rank, 0.05)


def waiting(queue: Queue[str], rank: int, found: dict[int, str | None]) -> threading.Thread:
    """A decoder that takes one part, and is idle now."""

    def run() -> None:
        found[rank] = queue.take_elsewhere(rank, 30) if rank else queue.take()

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    deadline = time.monotonic() + 10
    while rank not in queue._idle:
        assert time.monotonic() < deadline
        time.sleep(0.001)
    return thread


def test_work_goes_to_the_decoders_here_then_to_helpers_in_the_order_of_their_hire() -> None:
    queue, found = Queue[str](enough=1), dict[int, str | None]()
    threads = {rank: waiting(queue, rank, found) for rank in (3, 2, 0, 1)}
    queue.put(["a"])
    threads[0].join(10)
    assert found == {0: "a"}
    queue.put(["b", "c"])
    threads[1].join(10)
    threads[2].join(10)
    assert set(found) == {0, 1, 2}
    assert {found[1], found[2]} == {"b", "c"}
    queue.end()
    threads[3].join(10)
    assert found[3] is None


def test_helpers_get_nothing_while_enough_batches_wait_nor_what_one_of_them_gave_back() -> None:
    queue = Queue[str](enough=2)
    queue.put(["a", "b"])
    queue.count_finished(2)
    assert taken(queue, 1) is None
    queue.count_finished(-1)
    assert taken(queue, 1) == "a"
    queue.give_back("a")
    assert taken(queue, 1) == "b"
    assert taken(queue, 1) is None
    assert queue.take() == "a"


def test_who_waits_for_room_goes_on_when_enough_was_taken_and_at_the_end() -> None:
    queue = Queue[str](enough=1)
    for end in (queue.take, queue.end):
        queue.put(["a", "b", "c"])
        queue.take()
        waiter = threading.Thread(target=queue.wait_for_room, args=(1,), daemon=True)
        waiter.start()
        waiter.join(0.2)
        assert waiter.is_alive()
        end()
        waiter.join(10)
        assert not waiter.is_alive()
        queue.take()


def test_a_helper_without_work_goes() -> None:
    queue, crew = Queue[str](enough=1), Crew()
    friend = Friend(None)  # type: ignore[arg-type]
    done: list[str] = []
    thread = threading.Thread(target=crew.work, args=(friend, 1, queue, done.append, threading.Event()))
    thread.start()
    queue.put(["a"])
    thread.join(10)
    assert (done, crew.size, friend.closed.is_set()) == (["a"], 0, True)


def test_what_a_helper_could_not_do_is_for_the_decoders_here() -> None:
    queue, crew = Queue[str](enough=1), Crew()
    queue.put(["a"])

    def fail(part: str) -> None:
        raise ConnectionError("the node has gone")

    crew.work(Friend(None), 1, queue, fail, threading.Event())  # type: ignore[arg-type]
    assert crew.size == 0
    assert taken(queue, 2) is None
    assert queue.take() == "a"
