"""Zero-shot classification (arXiv 2103.00020, section 3.1): the classifier is made of class names.

Each class fills every template; the texts are encoded, normalised, averaged and normalised again. Ensembling is in
embedding space, so any number of templates costs the images nothing.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import pyarrow
import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from msclip.checkpoint import Loaded
from msclip.data.tokenizer import Tokenizer
from msclip.errors import UserError
from msclip.eval.metrics import best_positive_ranks, mean_per_class_recall, recall_at_k
from msclip.eval.rows import Rows, Skipped, encode_images, encode_texts, image_bytes, open_rows, spread
from msclip.eval.tasks import Task
from msclip.model import Model


def build_classifier(
    model: Model,
    tokenizer: Tokenizer,
    classes: Sequence[str],
    templates: Sequence[str],
    *,
    device: torch.device | str = "cpu",
    batch_size: int = 256,
) -> Float[Tensor, "classes dim"]:
    """One unit vector a class: the direction of the mean of its filled templates.

    Args:
        templates: texts in which {} stands for the class name.
    """
    # Not str.format: names may hold braces.
    texts = [template.replace("{}", name) for name in classes for template in templates]
    features = encode_texts(model, tokenizer, texts, device=torch.device(device), batch_size=batch_size)
    return F.normalize(features.view(len(classes), len(templates), -1).mean(1), dim=-1)


@dataclass(frozen=True)
class Labels:
    """The classes of a data set, and how a cell of its label column becomes a class's index."""

    classes: tuple[str, ...]
    index: dict[Any, int] = field(repr=False)

    def of(self, row: int, value: Any, task: Task) -> int | None:
        """The index of a label; None for a missing one.

        Raises:
            UserError: the label is none of the classes.
        """
        if value is None:
            return None
        if value not in self.index:
            raise UserError(
                f"task {task.name!r}: row {row} has the label {value!r}, which is none of the {len(self.classes)} "
                f"classes; labels count from 0 to {len(self.classes) - 1}, or are class names"
            )
        return self.index[value]


def labels(task: Task, rows: Rows) -> Labels:
    """Classes from the task, or from all rows of the data (whatever the task's limit), in the order of their labels.

    Raises:
        UserError: a missing column, one label under two names, or fewer than two classes.
    """
    kind = rows.column_type(task.label_column, "label_column")
    named = pyarrow.types.is_string(kind) or pyarrow.types.is_large_string(kind)
    if not named and not pyarrow.types.is_integer(kind):
        raise UserError(f"label_column of task {task.name!r} must hold whole numbers or texts, got {kind}")
    if task.classes:
        keys = task.classes if named else range(len(task.classes))
        return Labels(task.classes, {key: i for i, key in enumerate(keys)})
    names: dict[Any, str] = {}
    if named:
        names = {values[task.label_column]: values[task.label_column] for _, values in rows.read([task.label_column])}
    else:
        rows.column_type(task.class_column, "class_column")
        for number, values in rows.read([task.label_column, task.class_column]):
            label, name = values[task.label_column], values[task.class_column]
            if label is not None and name is not None and names.setdefault(label, name) != name:
                raise UserError(
                    f"task {task.name!r}: label {label} is called {names[label]!r}, and in row {number} {name!r}; "
                    "mend the data or give the task its classes"
                )
    names.pop(None, None)
    if len(names) < 2:
        raise UserError(f"task {task.name!r} needs two classes or more, and its data name {len(names)}")
    ordered = sorted(names)
    return Labels(tuple(names[key] for key in ordered), {key: i for i, key in enumerate(ordered)})


def evaluate(
    loaded: Loaded, task: Task, *, device: torch.device, batch_size: int, threads: int
) -> tuple[dict[str, Any], list[Skipped]]:
    """Measures top-1, top-5 and mean per class accuracy; top-5 where there are five classes or more.

    Returns:
        `metrics`, `chance`, `rows`, `classes` of the result, and the rows left out: undecodable, or without a label.
    """
    rows = open_rows(task.data)
    rows.column_type(task.image_column, "image_column")
    known = labels(task, rows)
    targets: dict[int, int] = {}
    unlabelled: list[Skipped] = []

    def images() -> Iterator[tuple[int, bytes | None]]:
        for number, values in rows.read([task.image_column, task.label_column], spread(len(rows), task.limit)):
            target = known.of(number, values[task.label_column], task)
            if target is None:
                unlabelled.append(Skipped(number, "no label"))
            else:
                targets[number] = target
                yield number, image_bytes(values[task.image_column])

    classifier = build_classifier(
        loaded.model, loaded.tokenizer, known.classes, task.templates, device=device, batch_size=batch_size
    )
    features, kept, skipped = encode_images(
        loaded.model, loaded.preprocess, images(), device=device, batch_size=batch_size, threads=threads
    )
    target = torch.tensor([targets[number] for number in kept], device=device)
    ranks = best_positive_ranks(features, classifier, target, torch.arange(len(classifier), device=device))
    count = len(known.classes)
    metrics = {"acc1": recall_at_k(ranks, 1), "mean_per_class_recall": mean_per_class_recall(ranks < 1, target)}
    chance = {"acc1": 1 / count, "mean_per_class_recall": 1 / count}
    if count >= 5:
        metrics["acc5"], chance["acc5"] = recall_at_k(ranks, 5), 5 / count
    result = {"metrics": metrics, "chance": chance, "rows": len(kept), "classes": count}
    return result, sorted(skipped + unlabelled)
