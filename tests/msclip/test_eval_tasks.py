import json
from pathlib import Path

import pytest

from msclip.errors import UserError
from msclip.eval import Task, parse_tasks
from msclip.eval.tasks import TEMPLATES


def test_an_inline_task_is_named_after_its_data() -> None:
    zeroshot, retrieval = parse_tasks(["zeroshot:/data/cifar10_test.parquet", "retrieval:s3://bucket/flickr/val-*.parquet"])
    assert (zeroshot.name, zeroshot.kind, zeroshot.data) == ("cifar10_test", "zeroshot", "/data/cifar10_test.parquet")
    assert (retrieval.name, retrieval.data) == ("val", "s3://bucket/flickr/val-*.parquet")


def test_local_data_become_absolute_because_workers_have_other_folders(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    assert parse_tasks(["zeroshot:sets/a.parquet"])[0].data == str(tmp_path / "sets/a.parquet")


def test_a_yaml_file_lists_tasks_with_all_their_settings(tmp_path: Path) -> None:
    (tmp_path / "classes.json").write_text(json.dumps({"classes": ["cat", "dog"], "templates": ["a {c} here", "the {}"]}))
    (tmp_path / "tasks.yaml").write_text(
        f"""
        tasks:
        - {{kind: zeroshot, data: /d/pets, classes: {tmp_path}/classes.json}}
        - {{kind: zeroshot, name: pets_plain, data: /d/pets, classes: {tmp_path}/classes.json, templates: ["{{}}"]}}
        - {{kind: zeroshot, name: pets_many, data: /d/pets, templates: ensemble, limit: 5}}
        - {{kind: retrieval, data: /d/val.parquet, caption_column: text}}
        """
    )
    pets, plain, many, val = parse_tasks([str(tmp_path / "tasks.yaml")], limit=100)
    assert pets == Task(
        name="pets", kind="zeroshot", data="/d/pets", classes=("cat", "dog"), templates=("a {} here", "the {}"), limit=100
    )
    assert plain.templates == ("{}",)
    assert (many.templates, many.limit) == (TEMPLATES["ensemble"], 5)
    assert val.caption_column == "text"


@pytest.mark.parametrize(
    ("spec", "complaint"),
    [
        ("classify:/d/a.parquet", "--tasks must be zeroshot:DATA, retrieval:DATA or a .yaml"),
        ("/d/a.parquet", "--tasks must be"),
        ("zeroshot:", "data of task"),
        ("/nowhere/tasks.yaml", "does not exist"),
    ],
)
def test_a_spec_that_names_no_task_says_what_would(spec: str, complaint: str) -> None:
    with pytest.raises(UserError, match=complaint):
        parse_tasks([spec])


@pytest.mark.parametrize(
    ("entry", "complaint"),
    [
        ({"kind": "zeroshot", "data": "a", "template": []}, "did you mean 'templates'"),
        ({"kind": "zeroshots", "data": "a"}, "must be one of zeroshot, retrieval, got 'zeroshots'"),
        ({"kind": "zeroshot"}, "needs the text 'data'"),
        ({"kind": "zeroshot", "data": "a", "templates": ["a photo"]}, "must hold {} for the class name"),
        ({"kind": "zeroshot", "data": "a", "templates": "photos"}, "one of photo, ensemble, got 'photos'"),
        ({"kind": "zeroshot", "data": "a", "templates": []}, "at least one"),
        ({"kind": "zeroshot", "data": "a", "classes": ["cat"]}, "two or more"),
        ({"kind": "zeroshot", "data": "a", "limit": "many"}, "limit must be a whole number, got 'many'"),
        ({"kind": "zeroshot", "data": "a", "limit": -1}, "got -1"),
        ({"kind": "zeroshot", "data": "a", "image_column": 3}, "image_column must be a text, got 3"),
        ({"kind": "zeroshot", "data": "a", "name": "../a"}, "becomes a file name"),
        ({"kind": "retrieval", "data": "a", "templates": "photo"}, "templates in .* would be ignored"),
    ],
)
def test_a_wrong_setting_of_a_task_is_named(tmp_path: Path, entry: dict, complaint: str) -> None:
    (tmp_path / "tasks.json").write_text(json.dumps([entry]))
    with pytest.raises(UserError, match=complaint):
        parse_tasks([str(tmp_path / "tasks.json")])


@pytest.mark.parametrize("text", ["just words", "{kind: zeroshot, data: a}", "[1, 2]", "a: [unclosed"])
def test_a_file_that_is_no_list_of_tasks_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "tasks.yaml").write_text(text)
    with pytest.raises(UserError, match=r"must hold a list of tasks|neither YAML nor JSON"):
        parse_tasks([str(tmp_path / "tasks.yaml")])


def test_two_tasks_of_one_name_would_share_a_result() -> None:
    with pytest.raises(UserError, match="two of the tasks are named 'val'"):
        parse_tasks(["zeroshot:/d/val.parquet", "retrieval:/d/val.parquet"])


def test_no_task_is_an_error() -> None:
    with pytest.raises(UserError, match="names no task"):
        parse_tasks([])
