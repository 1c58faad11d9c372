"""What to evaluate, as a value: the kind of task, where its data lie, and what a score means there.

A task comes from the command line as `zeroshot:/data/cifar10_test.parquet`, or with all its settings from a YAML or
JSON file. Class names and templates given by a file are read into the task, so that it alone says what was measured.
"""

import dataclasses
import difflib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import yaml

from msclip.errors import UserError
from msclip.storage import Folder

KINDS = ("zeroshot", "retrieval")
OF_KIND = {"zeroshot": ("templates", "classes", "label_column", "class_column"), "retrieval": ("caption_column",)}

TEMPLATES: dict[str, tuple[str, ...]] = {
    "photo": ("a photo of a {}.",),
    "ensemble": (
        "a photo of a {}.",
        "a photo of the {}.",
        "a close-up photo of a {}.",
        "a small photo of a {}.",
        "a dark photo of a {}.",
        "a blurry photo of a {}.",
        "a picture of one {}.",
        "a drawing of a {}.",
    ),
}


@dataclass(frozen=True)
class Task:
    """One measurement over one labelled or captioned Parquet set."""

    name: str
    """names the result file `<name>.json`: letters, digits, dot, hyphen and underscore"""
    kind: str
    """zeroshot (classification) or retrieval (both directions)"""
    data: str
    """a Parquet file, a folder of them or a pattern such as /data/val-*.parquet; local or a URL such as s3://bucket/val"""
    templates: tuple[str, ...] = TEMPLATES["photo"]
    """zeroshot: texts with {} for the class name, averaged as embeddings; in a file also a set: photo, ensemble"""
    classes: tuple[str, ...] = ()
    """zeroshot: names by label; empty: the data's own; in a file also a JSON file {"classes", "templates"}"""
    image_column: str = "image"
    """encoded bytes, or a struct with a field bytes"""
    label_column: str = "label"
    """zeroshot: whole numbers, or the class names themselves"""
    class_column: str = "class_name"
    """zeroshot: the label's name, read where `classes` is empty and labels are numbers"""
    caption_column: str = "captions"
    """retrieval: a text or a list of texts for each image"""
    limit: int = 0
    """evaluate only so many rows, spread evenly over the data; 0: all"""

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise UserError(f"kind of task {self.name!r} must be one of {', '.join(KINDS)}, got {self.kind!r}")
        if not re.fullmatch(r"[A-Za-z0-9_-][A-Za-z0-9._-]*", self.name):
            raise UserError(
                f"name of a task must be letters, digits, '.', '-' and '_' (it becomes a file name), got {self.name!r}"
            )
        if not self.data:
            raise UserError(f"data of task {self.name!r} must be a Parquet file, a folder or a pattern, got nothing")
        if self.limit < 0:
            raise UserError(f"limit of task {self.name!r} must be 0 (all rows) or more, got {self.limit}")
        if not self.templates:
            raise UserError(f"templates of task {self.name!r} must hold at least one text, got none")
        for template in self.templates:
            if "{}" not in template:
                raise UserError(f"templates of task {self.name!r} must hold {{}} for the class name, got {template!r}")
        if len(self.classes) == 1:
            raise UserError(f"classes of task {self.name!r} must be two or more, got only {self.classes[0]!r}")


def parse_tasks(specs: Sequence[str], limit: int = 0) -> tuple[Task, ...]:
    """The tasks that the command line names, in its order.

    Args:
        specs: each `zeroshot:DATA`, `retrieval:DATA` (named by the data's file stem) or a YAML or JSON file of tasks:
            a list of mappings with `Task`'s fields, or such a list under the key `tasks`.
        limit: rows for every task that sets no limit itself.

    Raises:
        UserError: no task, an unknown kind, key or value, a file that is missing, or two tasks of one name.
    """
    tasks: list[Task] = []
    for spec in specs:
        kind, colon, data = spec.partition(":")
        if colon and kind in KINDS:
            tasks.append(_task({"kind": kind, "data": data}, spec))
        elif spec.partition("?")[0].endswith((".yaml", ".yml", ".json")):
            tasks += _tasks_of_file(spec)
        else:
            raise UserError(
                f"--tasks must be {', '.join(f'{kind}:DATA' for kind in KINDS)} or a .yaml or .json file, got {spec!r}"
            )
    if not tasks:
        raise UserError("--tasks names no task; write for instance --tasks zeroshot:/data/test.parquet")
    names = [task.name for task in tasks]
    for name in sorted(set(names)):
        if names.count(name) > 1:
            raise UserError(f"two of the tasks are named {name!r} and would share one result file; give each its own name")
    return tuple(dataclasses.replace(task, limit=task.limit or limit) for task in tasks)


def _tasks_of_file(path: str) -> list[Task]:
    content = _read(path, "--tasks")
    if isinstance(content, Mapping) and set(content) == {"tasks"}:
        content = content["tasks"]
    if not isinstance(content, list) or not all(isinstance(entry, Mapping) for entry in content):
        raise UserError(f"the task file {path} must hold a list of tasks, each a mapping with kind and data")
    return [_task(entry, path) for entry in content]


def _task(entry: Mapping[str, Any], origin: str) -> Task:
    known = [field.name for field in dataclasses.fields(Task)]
    for key in entry:
        if key not in known:
            near = difflib.get_close_matches(str(key), known, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"known are {', '.join(known)}"
            raise UserError(f"unknown setting {key!r} of a task in {origin}; {hint}")
    settings = dict(entry)
    for kind, own in OF_KIND.items():
        if ignored := sorted(set(own) & set(settings)) if settings.get("kind") != kind else []:
            raise UserError(f"{ignored[0]} in {origin} would be ignored: it belongs to tasks of the kind {kind}")
    for key in ("kind", "data"):
        if not isinstance(settings.get(key), str):
            raise UserError(f"a task in {origin} needs the text {key!r}, got {settings.get(key)!r}")
    if isinstance(settings.get("classes"), str):
        settings = _with_classes_file(settings)
    if isinstance(settings.get("templates"), str):
        name = settings["templates"]
        if name not in TEMPLATES:
            raise UserError(f"templates must be a list of texts or one of {', '.join(TEMPLATES)}, got {name!r} in {origin}")
        settings["templates"] = TEMPLATES[name]
    for key in ("classes", "templates"):
        if key in settings:
            settings[key] = _texts(settings[key], key, origin)
    for key, value in settings.items():
        if key == "limit" and (not isinstance(value, int) or isinstance(value, bool)):
            raise UserError(f"limit must be a whole number, got {value!r} in {origin}")
        if key not in ("limit", "classes", "templates") and not isinstance(value, str):
            raise UserError(f"{key} must be a text, got {value!r} in {origin}")
    if "://" not in settings["data"] and settings["data"]:
        settings["data"] = str(Folder(settings["data"]).local)  # workers have other working folders
    settings.setdefault("name", _stem(settings["data"]))
    return Task(**settings)


def _with_classes_file(settings: dict[str, Any]) -> dict[str, Any]:
    """Replaces the path of a classes file by its classes, and missing templates by the file's."""
    path = settings["classes"]
    content = _read(path, "classes")
    if not isinstance(content, Mapping) or "classes" not in content:
        raise UserError(f'the classes file {path} must hold {{"classes": [...], "templates": [...]}}')
    templates = {"templates": content["templates"]} if "templates" in content else {}
    return {**templates, **settings, "classes": content["classes"]}


def _texts(value: Any, key: str, origin: str) -> tuple[str, ...]:
    if not isinstance(value, Sequence) or isinstance(value, str) or not all(isinstance(text, str) for text in value):
        raise UserError(f"{key} must be a list of texts, got {value!r} in {origin}")
    # CLIP_benchmark's template files write {c} for the class name.
    return tuple(text.replace("{c}", "{}") for text in value) if key == "templates" else tuple(value)


def _read(path: str, setting: str) -> Any:
    parent, name = split_parent(path)
    try:
        return yaml.safe_load(Folder(parent).read_text(name))  # JSON is YAML
    except (FileNotFoundError, IsADirectoryError, NotADirectoryError) as error:
        raise UserError(f"{setting} names the file {path}, which does not exist") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{setting} names the file {path}, which is neither YAML nor JSON: {reason}") from error


def split_parent(url: str) -> tuple[str, str]:
    """Folder and last name of a local path or a URL, whose query stays with the folder."""
    path, mark, query = url.partition("?") if "://" in url else (url, "", "")
    parent, slash, name = path.rstrip("/").rpartition("/")
    return (parent or slash or ".") + mark + query, name


def _stem(data: str) -> str:
    name = split_parent(data)[1].removesuffix(".parquet")
    return re.sub(r"[^A-Za-z0-9._-]+", "_", name).strip("._-") or "data"
