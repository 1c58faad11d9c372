"""Actors on another node decode what this one is too slow for, to the same bit, and a killed one loses nothing."""

import contextlib
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from msclip.data import helpers
from msclip.data.decode import Recipe
from msclip.data.loader import Batch, Batches
from msclip.data.shards import Manifest
from msclip.data.tokenizer import Tokenizer
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


@pytest.fixture
def manifest(tmp_path: Path) -> Manifest:
    images: list[bytes | None] = [picture(i) if i != 8 else b"GIF? no" for i in range(ROWS)]
    return write(tmp_path, images, good_captions())


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.train([f"picture {i} of three words" for i in range(40)], vocab_size=600, context_length=12)


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def here() -> str:
    import ray

    return ray.get_runtime_context().get_node_id()


def hirer(recipe: Recipe, most: int | None = None, autoscaling: bool = False, three_workers: bool = False) -> Any:
    from pipelines.decoding import RayHelpers

    # Two that are not there, whose ids sort before and after that of this one.
    nodes = ["0" * 56, here(), "f" * 56] if three_workers else [here()]
    return RayHelpers(recipe, nodes, most, autoscaling)


@pytest.mark.usefixtures("ray_session")
def test_a_lone_node_hires_nobody_and_an_autoscaler_is_asked_for_one_at_a_time(
    manifest: Manifest, tokenizer: Tokenizer
) -> None:
    recipe = recipe_of(manifest, tokenizer)
    assert hirer(recipe).hire(5, 0, 0) == []
    assert hirer(recipe, autoscaling=True).hire(5, 0, 1) == []
    until(lambda: idle(here()) == 4)
    (waiting,) = hirer(recipe, autoscaling=True, three_workers=True).hire(5, 0, 0)
    errors = []

    def start() -> None:
        try:
            waiting.start()
        except Exception as error:
            errors.append(error)

    thread = threading.Thread(target=start)
    thread.start()
    thread.join(3)
    assert thread.is_alive(), "there is no node to decode on"
    assert idle(here()) == 4, "not beside a training worker either"
    waiting.close()
    thread.join(10)
    assert errors


def idle(node: str) -> float:
    """CPUs."""
    import ray

    return ray._private.state.available_resources_per_node().get(node, {}).get("CPU", 0)


@pytest.fixture(scope="module")
def second_node(ray_session: None) -> Iterator[str]:
    """A node of four CPUs beside that of this process, from here on."""
    import ray
    from ray.cluster_utils import Cluster

    cluster = Cluster(shutdown_at_exit=False)
    cluster.head_node = ray._private.worker.global_worker.node
    node = cluster.add_node(wait=False, num_cpus=4)
    try:
        until(lambda: idle(node.node_id) == 4)
        yield node.node_id
    finally:
        cluster.remove_node(node)


def address(helper: Any) -> dict[str, Any]:
    """Where its actor is."""
    import ray

    found = ray._private.state.actors(helper.actor._actor_id.hex())
    return {"node": found["Address"]["NodeID"], "pid": found["Pid"]}


@pytest.mark.parametrize("end", [signal.SIGKILL, signal.SIGSTOP])
def test_batches_are_the_same_when_actors_decode_and_one_dies_or_says_nothing(
    second_node: str, manifest: Manifest, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch, end: signal.Signals
) -> None:
    from pipelines import decoding
    from pipelines.decoding import RayHelper

    monkeypatch.setattr(decoding, "PIECE_SECONDS", 2)
    monkeypatch.setattr(helpers, "STRETCH_SECONDS", 0.3)
    decoded: list[tuple[str, int]] = []
    ended: list[int] = []
    decode = RayHelper.decode

    def counted(self: RayHelper, work: Any) -> Any:
        where = address(self)
        if len(decoded) == 3 and not ended:
            os.kill(where["pid"], end)
            ended.append(where["pid"])
        result = decode(self, work)
        decoded.append((where["node"], where["pid"]))
        return result

    monkeypatch.setattr(RayHelper, "decode", counted)
    recipe, plan = recipe_of(manifest, tokenizer), plan_of(manifest)
    own = replace(recipe, preprocess=Slow(image_size=SIZE))
    found: list[Batch] = []
    deadline = time.monotonic() + 90
    with Batches(plan, 0, 1, 0, None, read(manifest, plan), own, helpers=hirer(recipe, most=1)) as loader:
        while len(found) < 10 or (len(decoded) < 10 and time.monotonic() < deadline):
            found += kept([next(loader)])
        found += kept(next(loader) for _ in range(5))  # the last pieces too
    with contextlib.suppress(ProcessLookupError):
        os.kill(ended[0], signal.SIGCONT)  # to hear that it was let go, if it still has to
    alone = batches(manifest, tokenizer, stop=len(found))
    assert same(found, alone)
    assert [batch.bad for batch in found] == [batch.bad for batch in alone]
    assert {node for node, _ in decoded} == {second_node}
    assert {pid for _, pid in decoded} > set(ended), "another actor took its place"


def test_actors_are_asked_for_where_there_is_room_beside_reading_and_other_workers(
    second_node: str, manifest: Manifest, tokenizer: Tokenizer
) -> None:
    until(lambda: idle(second_node) == 4)
    recipe = recipe_of(manifest, tokenizer)
    hired = hirer(recipe, three_workers=True).hire(5, 0, 0)
    try:
        assert len(hired) == 1, "two are left for the other workers"
        hired += hirer(recipe).hire(1, 0, 1)
        assert len(hired) == 2
        hired += hirer(recipe, most=3).hire(5, 2, 0)
        for helper in hired:
            helper.start()
        assert [address(helper)["node"] for helper in hired] == [second_node] * 3
        assert hirer(recipe).hire(5, 3, 0) == [], "the last CPU is for reading"
    finally:
        for helper in hired:
            helper.close()
