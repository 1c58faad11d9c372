"""Decoders on the cluster's other nodes, for a training worker whose own cores fall short.

An actor holds one CPU of a node on which nothing trains. It gets image files, and hands back pixels and token ids, through the
object store. Where it cannot be placed yet, its request is what an autoscaler adds a node for. Nothing is restarted or tried
again: whatever becomes of an actor or its node, the worker does the work itself and may hire another.
"""

from collections.abc import Sequence
from typing import Any

import ray
from ray._private.state import available_resources_per_node

from msclip.data.decode import Recipe
from msclip.data.pool import Decoded, Work, decode_apart

PIECE_SECONDS = 60.0
"""For sixty images there and back. Then they are decoded here; a batch waits for them."""
_NODES_COME_SECONDS = 15 * 60
_NODE = "ray.io/node-id"
"""A label that Ray gives each node."""


class _Decoder:
    """Decodes with one recipe."""

    def __init__(self, recipe: Recipe):
        self.recipe = recipe
        _ = recipe.tokenizer

    def ready(self) -> None:
        """Returns when the actor is there."""

    def decode(self, work: Work) -> Decoded:
        return decode_apart(self.recipe, work)


_Actor: Any = ray.remote(num_cpus=1, max_restarts=0, max_task_retries=0)(_Decoder)


class RayHelper:
    """An actor; see `msclip.data.helpers.Helper`."""

    def __init__(self, recipe: ray.ObjectRef, place: dict[str, str]):
        self.actor = _Actor.options(label_selector=place).remote(recipe)

    def start(self) -> None:
        ray.get(self.actor.ready.remote(), timeout=_NODES_COME_SECONDS)

    def decode(self, work: Work) -> Decoded:
        return ray.get(self.actor.decode.remote(work), timeout=PIECE_SECONDS)

    def close(self) -> None:
        if ray.is_initialized():  # else it is gone, and Ray would start a cluster to tell it so
            ray.kill(self.actor)


class RayHelpers:
    """Hires actors for one training worker.

    Args:
        training_nodes: ids of the nodes of all training workers, one a worker.
        most: actors at a time; `None` for as many as there is room for.
        autoscaling: more nodes come when they are asked for.
    """

    def __init__(self, recipe: Recipe, training_nodes: Sequence[str], most: int | None, autoscaling: bool):
        self._recipe, self._most, self._autoscaling = ray.put(recipe), most, autoscaling
        self._training = frozenset(training_nodes)
        self._workers = len(training_nodes)

    def hire(self, wanted: int, working: int, coming: int) -> list[RayHelper]:
        from pipelines.stream import READ_CPUS  # above, it would bring Ray Data into every actor

        nodes = available_resources_per_node()
        idle = sum(have.get("CPU", 0) for node, have in nodes.items() if node not in self._training)
        # Reading needs a CPU too. Of the rest an equal part, at least one: the other workers may ask at the same time.
        room = int(idle - coming - READ_CPUS)
        room = max(1, room // self._workers) if room >= 1 else 0
        # One at a time, until its node is there and shows what else it has.
        if not room and not coming and self._autoscaling:
            room = 1
        if self._most is not None:
            room = min(room, self._most - working - coming)
        place = {_NODE: f"!in({','.join(sorted(self._training))})"}  # a blank after a comma would be part of the name
        return [RayHelper(self._recipe, place) for _ in range(min(wanted, room))]
