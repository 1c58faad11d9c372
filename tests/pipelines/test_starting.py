"""Training from existing weights: what the file decides, what may differ, and what moves."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file
from torch import Tensor

import msclip
from msclip import checkpoint
from msclip.config import ModelConfig
from msclip.convert.open_clip import WEIGHTS
from msclip.convert.weights import CLIP_MEAN, CLIP_STD, Weights
from msclip.convert.write import write
from msclip.data.images import Preprocess
from msclip.data.tokenizer import Tokenizer
from msclip.resize import resize_positions
from msclip.storage import Folder
from pipelines import cli, starting, train
from pipelines.jobs import TrainJob
from tests.drawn import TEXTS, captioned
from tests.msclip.tiny_models import tiny

STEPS, EVERY = 6, 3
CONFIG: dict[str, Any] = {
    "optim": {"lr": 1e-3, "warmup_steps": 1, "layer_decay": 0.8, "ema_decay": 0.2},
    "training": {
        "global_batch": 16,
        "epochs": None,
        "steps": STEPS,
        "precision": "fp32",
        "log_every_steps": 1,
        "zero_stage": 2,
    },
    "checkpoint": {"every_steps": EVERY, "every_minutes": None, "keep_optimizer": 9},
    "cluster": {"num_workers": 2, "use_gpu": False},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An exported model with settings of its own training, pairs, and a config that says nothing of the model."""
    folder = tmp_path_factory.mktemp("starting")
    captioned(folder / "pairs.parquet", [[TEXTS[i % 10]] for i in range(48)])
    model = tiny(dropout=0.25, freeze_image="all")
    tokenizer = Tokenizer.train(TEXTS * 3, 580, context_length=16)
    pixels = Preprocess(image_size=32, mean=(0.1, 0.2, 0.3), std=(0.4, 0.5, 0.6))
    checkpoint.export(folder / "tiny.safetensors", model.state_dict(), model.config, tokenizer, pixels)
    write(Weights("msclip", tiny(), Preprocess(32, CLIP_MEAN, CLIP_STD), None), folder / "openai.pt", "openai")
    write(Weights("msclip", tiny(), pixels, tokenizer), folder / "folder", "open_clip")
    shutil.copy(folder / "folder" / WEIGHTS[0], folder / "lone.safetensors")
    job = CONFIG | {"data": {"train": str(folder / "pairs.parquet")}, "run": {"storage": str(folder / "runs")}}
    (folder / "job.yaml").write_text(yaml.safe_dump(job))
    return folder


def described(folder: Path, *arguments: str) -> TrainJob:
    """The job that these arguments make with the exported model."""
    return train.new(["--config", str(folder / "job.yaml"), "--init", str(folder / "tiny.safetensors"), *arguments])[0]


def start(folder: Path, *arguments: str) -> int:
    return cli.guard(lambda: train.main(["--config", str(folder / "job.yaml"), *arguments]))


def test_what_the_user_does_not_write_is_the_files_and_what_concerns_training_the_jobs(folder: Path) -> None:
    job = described(folder)
    loaded = msclip.load(folder / "tiny.safetensors")
    assert job.model == ModelConfig.from_dict(loaded.config.to_dict() | {"dropout": 0.0, "freeze_image": "none"})
    assert (job.pixels.mean, job.pixels.std) == (loaded.preprocess.mean, loaded.preprocess.std)
    assert job.tokenizer.source == "init"
    assert job.init == str(folder / "tiny.safetensors")


def test_input_sizes_training_settings_and_what_agrees_may_be_written(folder: Path) -> None:
    sizes = ["--model.image_size", "48", "--model.context_length", "12"]
    others = [
        "--model.dropout",
        "0.1",
        "--model.freeze_text",
        "first:2",
        "--model.width",
        "64",
        "--pixels.mean",
        "[0.5,0.5,0.5]",
    ]
    model = described(folder, *sizes, *others).model
    assert (model.image_size, model.context_length, model.dropout, model.freeze_text) == (48, 12, 0.1, "first:2")
    assert described(folder, *others).pixels.mean == (0.5, 0.5, 0.5)


def test_weights_and_runs_may_lie_in_an_object_store(folder: Path, s3_url: str) -> None:
    store = Folder(s3_url)
    store.upload(folder / "tiny.safetensors", "weights.safetensors")
    url, run = (store / "weights.safetensors").url, store / "run"
    job, weights = train.new(["--config", str(folder / "job.yaml"), "--init", url, "--model.image_size", "48"])
    assert weights is not None
    assert job.init == url
    starting.write(weights, job, starting.tokenizer(weights, job), Preprocess(48), run)
    model = msclip.build(job.model)
    starting.load_into(model, run)
    assert torch.equal(model.get_parameter("projection.text.weight"), weights.model.get_parameter("projection.text.weight"))
    with pytest.raises(msclip.UserError, match="init must name weights"):
        train.new(["--config", str(folder / "job.yaml"), "--init", (store / "missing.safetensors").url])


def test_another_loss_adds_its_bias_or_leaves_it_out(folder: Path, tmp_path: Path) -> None:
    sigmoid = described(folder, "--model.loss", "sigmoid", "--model.logit_bias_init", "-7.0")
    weights = starting.read(str(folder / "tiny.safetensors"))
    tokenizer = starting.tokenizer(weights, sigmoid)
    run = Folder(str(tmp_path / "sigmoid"))
    starting.write(weights, sigmoid, tokenizer, weights.preprocess, run)
    model = msclip.build(sigmoid.model)
    starting.load_into(model, run)
    assert model.logit_bias is not None
    assert model.logit_bias.tolist() == [-7.0]
    back = described(folder)
    starting.write(
        starting.read((run / starting.INIT).url), back, tokenizer, weights.preprocess, Folder(str(tmp_path / "back"))
    )
    again = msclip.build(back.model)
    starting.load_into(again, Folder(str(tmp_path / "back")))
    for name, value in again.state_dict().items():
        assert torch.equal(value, weights.model.state_dict()[name])


@pytest.mark.parametrize("activation", ["gelu", "quick_gelu"])
def test_a_lone_state_dict_is_told_its_activation(folder: Path, activation: str) -> None:
    arguments = ["--init", str(folder / "lone.safetensors"), "--model.activation", activation, "--tokenizer.source", "train"]
    job, weights = train.new(["--config", str(folder / "job.yaml"), *arguments])
    assert weights is not None
    assert job.model.activation == weights.model.config.activation == activation


def test_the_config_of_the_run_that_made_a_file_agrees_with_it(folder: Path, tmp_path: Path) -> None:
    values = yaml.safe_load((folder / "job.yaml").read_text())
    values["model"] = msclip.load(folder / "tiny.safetensors").config.to_dict()
    (tmp_path / "its.yaml").write_text(yaml.safe_dump(values))
    job, _ = train.new(["--config", str(tmp_path / "its.yaml"), "--init", str(folder / "tiny.safetensors")])
    assert job.model.dropout == 0.25


def test_the_tokenizer_is_the_files_for_captions_of_the_jobs_length(folder: Path) -> None:
    weights = checkpoint.read(folder / "tiny.safetensors")
    job = described(folder, "--model.context_length", "6", "--tokenizer.truncation", "official")
    ids = starting.tokenizer(weights, job)(TEXTS[:1])
    assert weights.tokenizer is not None
    assert ids.shape == (1, 6)
    assert torch.equal(ids, weights.tokenizer(TEXTS[:1])[:, :6])


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--init", "/no/such/file.safetensors"), "init must name weights to start from: there is no exported model at /no/"),
        (("--init", "job.yaml"), "init must name weights"),
        (
            ("--init", "tiny.safetensors", "--model.width", "96", "--model.sharing.layers", "all", "--model.layers", "4"),
            "model.width is 64 there and 96 here; model.layers is 3 there and 4 here; model.sharing.layers is none there",
        ),
        (("--init", "tiny.safetensors", "--config", "ms_clip_b32"), "model.sharing.layers is none there and all here"),
        (("--init", "tiny.safetensors", "--model.image_size", "40"), "model.image_size must be a multiple of model.patch_size"),
        (("--init", "lone.safetensors"), "--model.activation"),
        (("--init", "folder", "--model.activation", "gelu"), "model.activation is quick_gelu there and gelu here"),
        (("--init", "openai.pt"), "hold no tokenizer: set tokenizer.source"),
        (("--tokenizer.source", "init"), "init is null"),
        (("--init", "tiny.safetensors", "--tokenizer.source", "/no/merges.txt"), "/no/merges.txt"),
    ],
)
def test_a_mistake_is_one_paragraph_before_anything_is_written(
    folder: Path, ray_session: None, capfd: pytest.CaptureFixture[str], arguments: tuple[str, ...], words: str
) -> None:
    known = [str(folder / a) if (folder / a).exists() and a[0] != "/" else a for a in arguments]
    assert start(folder, "--run.name", "mistaken", *known) == 2
    error = capfd.readouterr().err
    assert words in error
    assert len(error.strip().splitlines()) == 1
    assert not (folder / "runs" / "mistaken" / "config.yaml").exists()


def test_the_shipped_recipe_asks_for_weights(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    arguments = ["--config", "finetune", "--data.train", str(folder / "pairs.parquet")]
    assert cli.guard(lambda: train.main(arguments)) == 2
    assert "there is no exported model at weights.safetensors" in capfd.readouterr().err


@pytest.fixture(scope="module")
def finetuned(folder: Path, ray_session: None) -> Folder:
    """A run of two workers from the exported model: larger images, shorter captions, a frozen text encoder."""
    shutil.copy(folder / "tiny.safetensors", folder / "gone.safetensors")
    arguments = ["--init", str(folder / "gone.safetensors"), "--run.name", "finetuned"]
    arguments += ["--model.image_size", "48", "--model.context_length", "12", "--model.freeze_text", "all"]
    assert start(folder, *arguments) == 0
    (folder / "gone.safetensors").unlink()
    return Folder(folder / "runs" / "finetuned")


def weights_at(run: Folder, step: int, name: str = checkpoint.MODEL) -> dict[str, Tensor]:
    assert run.local is not None
    return load_file(run.local / "checkpoints" / checkpoint.folder_name(step) / name)


def test_frozen_weights_stay_and_the_others_move_from_where_the_file_had_them(folder: Path, finetuned: Folder) -> None:
    first = resize_positions(msclip.load(folder / "tiny.safetensors").model, 48, 12).state_dict()
    last, average = weights_at(finetuned, STEPS), weights_at(finetuned, STEPS, checkpoint.EMA)
    assert first.keys() == last.keys() == average.keys()
    text = {name for name in first if ".text." in name or name.startswith("text_input")}
    assert len(text) > 20
    for name, value in first.items():
        moved = (last[name] - value).abs().max()
        assert (moved == 0) == (name in text), name
        assert moved < 1.1e-3 * STEPS + 1e-4  # not far: AdamW moves by the rate a step
        assert torch.equal(average[name], value) == (name in text), name
    loaded = msclip.load(f"{finetuned.url}/checkpoints/{checkpoint.folder_name(STEPS)}/{checkpoint.EMA}")
    assert (loaded.config.image_size, loaded.config.context_length) == (48, 12)
    assert loaded.preprocess == Preprocess(image_size=48, mean=(0.1, 0.2, 0.3), std=(0.4, 0.5, 0.6))
    assert loaded.tokenizer.context_length == 12


def test_a_resumed_run_needs_no_file_and_keeps_its_average_on_other_workers(folder: Path, finetuned: Folder) -> None:
    assert finetuned.local is not None
    run = Folder(shutil.copytree(finetuned.local, folder / "runs" / "fewer"))
    shutil.rmtree(folder / "runs" / "fewer" / "checkpoints" / checkpoint.folder_name(STEPS))
    arguments = ["--resume", run.url, "--cluster.num_workers", "1", "--training.zero_stage", "3"]
    assert cli.guard(lambda: train.main(arguments)) == 0
    for name in (checkpoint.MODEL, checkpoint.EMA):
        ours, theirs = weights_at(run, STEPS, name), weights_at(finetuned, STEPS, name)
        assert all(torch.allclose(ours[key], theirs[key], rtol=0, atol=1e-4) for key in theirs)


def test_a_run_that_broke_off_before_its_first_checkpoint_starts_from_its_copy(folder: Path, finetuned: Folder) -> None:
    assert finetuned.local is not None
    run = Folder(shutil.copytree(finetuned.local, folder / "runs" / "early"))
    shutil.rmtree(folder / "runs" / "early" / "checkpoints")
    (folder / "runs" / "early" / "metrics.jsonl").unlink()
    assert cli.guard(lambda: train.main(["--resume", run.url])) == 0
    ours, theirs = weights_at(run, STEPS), weights_at(finetuned, STEPS)
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)


def test_weights_to_start_from_are_for_new_runs(folder: Path, finetuned: Folder, capfd: pytest.CaptureFixture[str]) -> None:
    arguments = ["--resume", finetuned.url, "--init", str(folder / "tiny.safetensors")]
    assert cli.guard(lambda: train.main(arguments)) == 2
    assert "init is for new runs" in capfd.readouterr().err
