"""Training from existing weights: what the file decides, what may differ, and what moves."""

import io
import re
import shutil
from contextlib import redirect_stdout
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from torch import Tensor

import msclip
from msclip import checkpoint
from msclip.config import ModelConfig, ParallelFFN
from msclip.convert.open_clip import WEIGHTS
from msclip.convert.weights import CLIP_MEAN, CLIP_STD, Weights
from msclip.convert.write import write
from msclip.data.images import Preprocess
from msclip.data.tokenizer import Tokenizer
from msclip.presets import PRESETS
from msclip.resize import resize_positions
from msclip.sharing import SEPARATE, Sharing
from msclip.storage import Folder
from pipelines import cli, starting, train
from pipelines.jobs import TrainJob
from tests.drawn import TEXTS, captioned
from tests.msclip.tiny_models import SIZES, tiny
from tests.pipelines.without_ray import without_ray

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
    state = load_file(folder / "lone.safetensors")
    save_file({name: tensor for name, tensor in state.items() if name != "ln_final.bias"}, folder / "cut.safetensors")
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


def resolved(folder: Path, where: Path, **pixels: list[float]) -> list[str]:
    """The arguments that name the config.yaml of the run that made the exported model, with other pixels if given."""
    loaded = msclip.load(folder / "tiny.safetensors")
    values = yaml.safe_load((folder / "job.yaml").read_text())
    values["model"] = loaded.config.to_dict()
    values["tokenizer"] = {"source": "train", "truncation": "end"}
    values["pixels"] = {k: v for k, v in loaded.preprocess.to_dict().items() if k != "image_size"} | pixels
    (where / "its.yaml").write_text(yaml.safe_dump(values))
    return ["--config", str(where / "its.yaml"), "--init", str(folder / "tiny.safetensors")]


def test_the_config_of_the_run_that_made_a_file_agrees_with_it_and_means_its_tokenizer(folder: Path, tmp_path: Path) -> None:
    job, weights = train.new(resolved(folder, tmp_path))
    assert weights is not None
    assert job.model.dropout == 0.25
    assert job.tokenizer.source == "init"
    assert starting.other_pixels(weights, job) == []


def test_pixels_of_another_run_are_refused_unless_the_command_line_says_them(folder: Path, tmp_path: Path) -> None:
    arguments = resolved(folder, tmp_path, std=[0.5, 0.5, 0.5])
    with pytest.raises(msclip.UserError, match=r"std is \[0.5, 0.5, 0.5\] in the configuration and \[0.4, 0.5, 0.6\] in"):
        train.new(arguments)
    job, weights = train.new([*arguments, "--pixels.std", "[0.5,0.5,0.5]"])
    assert weights is not None
    assert "pixels.std [0.5, 0.5, 0.5] instead of [0.4, 0.5, 0.6]" in starting.summary(weights, job)


def test_another_tokenizer_must_have_as_many_ids_and_is_named(folder: Path, tmp_path: Path) -> None:
    own = checkpoint.read(folder / "tiny.safetensors").tokenizer
    assert own is not None
    for name, tokenizer in (("own", own), ("fewer", Tokenizer.train(TEXTS * 3, 530, context_length=16))):
        (tmp_path / f"{name}.json").write_text(tokenizer.to_json())
    arguments = ["--config", str(folder / "job.yaml"), "--init", str(folder / "tiny.safetensors"), "--tokenizer.source"]
    job, weights = train.new([*arguments, str(tmp_path / "own.json")])
    assert weights is not None
    assert f"tokenizer {tmp_path / 'own.json'} instead of its own" in starting.summary(weights, job)
    with pytest.raises(msclip.UserError, match=rf"fewer.json has \d+ ids and the tokenizer of init .* {own.vocab_size}"):
        train.new([*arguments, str(tmp_path / "fewer.json")])


def test_one_line_says_what_a_run_took_and_what_it_has_otherwise(folder: Path) -> None:
    sizes = ["--model.image_size", "48", "--model.context_length", "12", "--model.loss", "sigmoid"]
    job, weights = train.new(["--config", str(folder / "job.yaml"), "--init", str(folder / "tiny.safetensors"), *sizes])
    assert weights is not None
    count = sum(parameter.numel() for parameter in weights.model.parameters())
    assert starting.summary(weights, job) == (
        f"starts from {folder / 'tiny.safetensors'}: no named model, layout msclip, {count:,} parameters; positions resized "
        "(image_size 32 to 48, context_length 16 to 12); loss sigmoid instead of softmax; its tokenizer"
    )
    arguments = ["--init", str(folder / "openai.pt"), "--tokenizer.source", "train"]
    job, weights = train.new(["--config", str(folder / "job.yaml"), *arguments])
    assert weights is not None
    assert "layout openai" in starting.summary(weights, job)
    assert "a tokenizer learned from these captions, as it holds none" in starting.summary(weights, job)


@pytest.mark.parametrize("name", ["clip_b32", "clip_rn50", "ms_clip_s_b32"])
def test_a_named_model_is_called_by_its_name(folder: Path, name: str) -> None:
    config = replace(PRESETS[name], dropout=0.5, logit_scale_init=1.5)
    weights = Weights("openai", msclip.build(config, device="meta"), Preprocess(config.image_size), None)
    assert f": {name}, layout openai, " in starting.summary(weights, TrainJob(model=config))


@pytest.mark.parametrize("name", ["clip_b32", "ms_clip_b32", "ms_clip_s_b32", "ms_clip_s_b16", "ms_clip_s1"])
def test_a_config_with_the_name_of_an_architecture_starts_from_no_other(name: str) -> None:
    said = cli.written(TrainJob, ["--config", name])
    own = starting.architecture(cli.parse(TrainJob, ["--config", name]).model)
    for config in PRESETS.values():
        if starting.architecture(config) == own:
            starting.check_model(config, said, "x")
        else:
            with pytest.raises(msclip.UserError, match="of another architecture"):
                starting.check_model(config, said, "x")


@pytest.mark.parametrize(
    ("file", "said"),
    [
        (Sharing(layers="last:2"), {"layers": "1,2"}),
        (Sharing(layers="all"), {"layers": "first:3"}),
        (SEPARATE, {"layers": "none", "attn": True, "ffn": True}),
        (SEPARATE, {"layers": "all", "attn": False, "ffn": False}),
    ],
)
def test_sharing_is_compared_by_what_is_shared(file: Sharing, said: dict[str, Any]) -> None:
    config = ModelConfig(**{**SIZES, "sharing": file})
    starting.check_model(config, {f"model.sharing.{name}": value for name, value in said.items()}, "x")
    with pytest.raises(msclip.UserError, match=r"model\.sharing\.ln1 is False there and True here"):
        starting.check_model(replace(config, sharing=Sharing()), {"model.sharing.ln1": True}, "x")


def test_parallel_modules_are_compared_by_the_layers_beside_which_they_stand() -> None:
    config = ModelConfig(**{**SIZES, "sharing": Sharing(layers="last:2"), "parallel_ffn": ParallelFFN("after")})
    starting.check_model(config, {"model.parallel_ffn.layers": "1,2"}, "x")
    with pytest.raises(msclip.UserError, match=r"model\.parallel_ffn\.layers is shared there and all here"):
        starting.check_model(config, {"model.parallel_ffn.layers": "all"}, "x")


@pytest.mark.parametrize(
    ("file", "said"),
    [
        ({}, {"model.logit_scale_init": 2.0}),
        ({}, {"model.token_std": 0.5}),
        ({"loss": "sigmoid"}, {"model.logit_bias_init": -7.0}),
    ],
)
def test_how_fresh_weights_begin_is_refused_where_there_are_none(file: dict[str, Any], said: dict[str, float]) -> None:
    config = ModelConfig(**{**SIZES, **file})
    with pytest.raises(msclip.UserError, match=rf"{next(iter(said))} says how fresh weights begin"):
        starting.check_model(config, said, "x")
    own = {name.removeprefix("model."): value for name, value in said.items()}
    starting.check_model(ModelConfig(**{**SIZES, **file, **own}), said, "x")


def test_the_readme_lists_what_may_differ_from_the_weights() -> None:
    readme = (Path(__file__).parents[2] / "README.md").read_text()
    sentence = readme.split("What you do write of `model` must agree with it, except")[1].split("never taken from the file")[0]
    assert set(re.findall(r"`(\w+)`", sentence)) == starting.FREE


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
        (("--init", "tiny.safetensors", "--config", "ms_clip_b32"), "model.patch_size is 16 there and 32 here"),
        (("--init", "tiny.safetensors", "--model.image_size", "40"), "model.image_size must be a multiple of model.patch_size"),
        (("--init", "lone.safetensors"), "--model.activation"),
        (("--init", "folder", "--model.activation", "gelu"), "model.activation is quick_gelu there and gelu here"),
        (("--init", "cut.safetensors", "--model.activation", "gelu"), "the state dict lacks 1 tensors of this architecture"),
        (("--init", "openai.pt"), "hold no tokenizer: set tokenizer.source"),
        (("--init", "tiny.safetensors", "--tokenizer.source", "train"), "tokenizer.source train would give other tokens"),
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
    with redirect_stdout(io.StringIO()) as out:
        assert start(folder, *arguments) == 0
    assert f"\nstarts from {folder / 'gone.safetensors'}: " in out.getvalue()
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
    with without_ray():
        assert cli.guard(lambda: train.main(["--resume", run.url, "--training.zero_stage", "3"])) == 0
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
