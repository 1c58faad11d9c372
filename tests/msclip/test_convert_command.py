"""The command that turns one layout into another."""

from pathlib import Path

import pytest
import torch

import msclip
from msclip.convert.__main__ import main
from msclip.convert.ms_clip import to_state_dict
from tests.msclip.tiny_models import equal, tiny, tokenizer


@pytest.fixture
def lone_file(tmp_path: Path) -> Path:
    """A state dict of open_clip's, without a tokenizer."""
    torch.save(to_state_dict(tiny(activation="gelu")), tmp_path / "in.pt")
    return tmp_path / "in.pt"


def test_a_file_goes_through_every_layout_that_can_hold_it(tmp_path: Path, lone_file: Path) -> None:
    (tmp_path / "tokenizer.json").write_text(tokenizer().to_json())
    named = ["--tokenizer", str(tmp_path / "tokenizer.json")]
    assert main([str(lone_file), str(tmp_path / "a"), "--to", "open_clip", "--activation", "gelu"]) == 0
    assert main([str(tmp_path / "a"), str(tmp_path / "b"), "--to", "huggingface", *named]) == 0
    assert main([str(tmp_path / "b"), str(tmp_path / "new" / "c.safetensors"), "--to", "msclip"]) == 0
    loaded = msclip.load(tmp_path / "new" / "c.safetensors")
    assert equal(loaded.model, tiny(activation="gelu"))
    assert loaded.config.activation == "gelu"


def test_the_activation_of_a_lone_file_can_be_said(tmp_path: Path, lone_file: Path) -> None:
    assert main([str(lone_file), str(tmp_path / "a"), "--to", "openai", "--activation", "quick_gelu"]) == 0


def test_mistakes_are_one_paragraph_and_status_2(tmp_path: Path, lone_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    gelu = ["--activation", "gelu"]
    for arguments, reason in (
        ([str(tmp_path / "nothing"), str(tmp_path / "a"), "--to", "openai"], "there is no"),
        ([str(lone_file), str(lone_file), "--to", "huggingface", *gelu], "not overwritten"),
        ([str(lone_file), str(tmp_path / "a"), "--to", "msclip", *gelu], "--tokenizer"),
        ([str(lone_file), str(tmp_path / "a"), "--to", "openai", *gelu], "this model has gelu"),
        ([str(lone_file), str(tmp_path / "a"), "--to", "openai"], "as --activation quick_gelu"),
        ([str(lone_file), str(tmp_path / "b" / "c" / "a"), "--to", "openai", *gelu], "this model has gelu"),
        ([str(lone_file), str(lone_file / "a"), "--to", "huggingface", *gelu], "could not be written"),
    ):
        assert main(arguments) == 2
        error = capsys.readouterr().err
        assert error.startswith("error: ")
        assert reason in error
        assert error.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["in.pt"]
    with pytest.raises(SystemExit) as caught:
        main([str(lone_file), "x", "--to", "elsewhere"])
    assert caught.value.code == 2
