"""`msclip.load` tells a file by its contents, brings what belongs to it, runs nothing of it and refuses what is not a model."""

import io
import json
import math
import os
import pickle
import warnings
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import msclip
from msclip.checkpoint import read
from msclip.convert import openai
from msclip.convert.ms_clip import to_state_dict
from msclip.convert.weights import CLIP_MEAN, CLIP_STD, Layout, Weights
from msclip.convert.write import write
from msclip.data.images import Preprocess
from msclip.sharing import Sharing
from tests.msclip.tiny_models import RESNET, SIZES, equal, tiny, tokenizer


def weights(model: msclip.Model) -> Weights:
    return Weights("msclip", model, Preprocess(model.config.image_size, CLIP_MEAN, CLIP_STD), tokenizer())


def state_of(model: msclip.Model) -> dict[str, Tensor]:
    return {name: tensor.clone().contiguous() for name, tensor in to_state_dict(model).items()}


class Node(nn.Module):
    """A module of nothing but named tensors and modules of the same kind."""


def scripted(state: dict[str, Tensor], path: Path) -> None:
    """A TorchScript archive of these tensors, with a method that nobody should run."""
    root = Node()
    for name, tensor in state.items():
        *parents, leaf = name.split(".")
        node: nn.Module = root
        for parent in parents:
            if not hasattr(node, parent):
                node.add_module(parent, Node())
            node = getattr(node, parent)
        if tensor.is_floating_point():
            node.register_parameter(leaf, nn.Parameter(tensor, requires_grad=False))
        else:
            node.register_buffer(leaf, tensor)
    with warnings.catch_warnings(action="ignore", category=DeprecationWarning):  # no new archives are made but these
        torch.jit.script(root).save(str(path))


@pytest.mark.parametrize("changes", [{}, RESNET], ids=["vit", "resnet"])
def test_a_torchscript_archive_of_openai_is_read_without_torchscript(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any]
) -> None:
    model = tiny(**changes)
    scripted(openai.write(weights(model)), tmp_path / "x")

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("TorchScript was run")

    monkeypatch.setattr(torch.jit, "load", refuse)
    loaded = msclip.load(tmp_path / "x", tokenizer=tokenizer())
    assert equal(model, loaded.model)
    assert (loaded.config.norm_eps, loaded.config.activation) == (1e-5, "quick_gelu")
    assert loaded.preprocess == Preprocess(model.config.image_size, CLIP_MEAN, CLIP_STD)


def test_half_precision_in_matrices_alone_is_a_mark_of_openai(tmp_path: Path) -> None:
    state = {n: t.half() if n.endswith(("proj", "projection", "weight")) else t for n, t in state_of(tiny()).items()}
    state["token_embedding.weight"] = state["token_embedding.weight"].float()
    torch.save(state, tmp_path / "x.pt")
    assert read(tmp_path / "x.pt").layout == "openai"


@pytest.mark.parametrize("kind", ["safetensors", "pickle", "legacy pickle", "training checkpoint", "custom text"])
def test_a_lone_file_of_two_plain_towers_has_to_be_told_its_activation(tmp_path: Path, kind: str) -> None:
    model, file = tiny(activation="gelu"), tmp_path / "x"
    state = state_of(model)
    if kind == "safetensors":
        save_file(state, file)
    elif kind == "legacy pickle":
        torch.save(state, file, _use_new_zipfile_serialization=False)
    elif kind == "training checkpoint":
        torch.save(
            {"epoch": 3, "name": "run", "state_dict": {f"module.{n}": t for n, t in state.items()}, "optimizer": {}}, file
        )
    elif kind == "custom text":
        own = ("visual.", "logit_scale")
        state = {n if n.startswith(own) else f"text.{n}": t for n, t in state.items()}
        torch.save({**state, "text.attn_mask": torch.zeros(16, 16)}, file)
    else:
        torch.save(state, file)
    with pytest.raises(msclip.UserError, match=r'x: nothing in it tells its activation.*activation="quick_gelu"'):
        read(file)
    found = read(file, {"activation": "gelu"})
    assert found.layout == "open_clip"
    assert equal(model, found.model)
    assert found.model.config == model.config.from_dict(
        {**model.config.to_dict(), "logit_scale_init": 2.6592600369327779, "token_std": 0.02}
    )
    assert msclip.load(file, tokenizer=tokenizer(), activation="quick_gelu").config.activation == "quick_gelu"


def test_the_weights_of_an_open_clip_folder_are_read_with_the_configuration_beside_them(tmp_path: Path) -> None:
    model = tiny(sharing=Sharing(), activation="gelu", norm_eps=1e-6)
    write(weights(model), tmp_path / "there", "open_clip")
    found = read(tmp_path / "there" / "open_clip_model.safetensors")
    assert found.layout == "open_clip"
    assert (found.model.config.activation, found.model.config.norm_eps) == ("gelu", 1e-6)


def test_towers_that_share_do_not_tell_whose_they_are(tmp_path: Path) -> None:
    model = tiny(sharing=Sharing(), activation="gelu")
    write(weights(model), tmp_path / "there", "open_clip")
    alone = (tmp_path / "there" / "open_clip_model.safetensors").rename(tmp_path / "alone")
    with pytest.raises(msclip.UserError, match=r'towers share.*activation="gelu" or "quick_gelu".*norm_eps=1e-12'):
        read(alone)
    found = read(alone, {"activation": "gelu"})
    assert (found.layout, found.preprocess) == ("open_clip", Preprocess(32, CLIP_MEAN, CLIP_STD))
    assert (found.model.config.activation, found.model.config.norm_eps) == ("gelu", 1e-5)
    assert equal(found.model, model)


def test_a_sigmoid_models_bias_is_read_whether_it_is_a_number_or_a_vector_of_one(tmp_path: Path) -> None:
    model = tiny(loss="sigmoid")
    state = state_of(model)
    assert state["logit_bias"].shape == ()
    for shape in ((), (1,)):
        save_file({**state, **{n: state[n].reshape(shape) for n in ("logit_scale", "logit_bias")}}, tmp_path / "x")
        found = read(tmp_path / "x", {"activation": "quick_gelu"}).model
        assert found.config.loss == "sigmoid"
        assert equal(model, found)


def test_heads_of_vit_h_are_eighty_channels_wide(tmp_path: Path) -> None:
    save_file(state_of(tiny(width=1280, layers=1, num_heads=16)), tmp_path / "x")
    assert read(tmp_path / "x", {"activation": "gelu"}).model.config.num_heads == 16


def test_ms_clip_without_stem_and_branch_is_told_by_our_mark_or_its_epsilon_and_has_its_own_preprocessing(
    tmp_path: Path,
) -> None:
    model = tiny(norm_eps=1e-12, sharing=Sharing())
    write(Weights("msclip", model, Preprocess(32), None), tmp_path / "marked", "ms_clip")
    assert read(tmp_path / "marked").layout == "ms_clip"
    save_file(state_of(model), tmp_path / "x")  # as another program would write it
    merges = tmp_path / "merges.txt"
    merges.write_text("#version\n" + "a b\nab c</w>\n" * 40)
    loaded = msclip.load(tmp_path / "x", tokenizer=str(merges), norm_eps=1e-12)
    assert equal(loaded.model, model)
    assert loaded.config.sharing == Sharing()
    assert loaded.config.norm_eps == 1e-12
    assert loaded.preprocess == Preprocess(32)
    assert loaded.tokenizer.truncation == "official"
    assert loaded.tokenizer.context_length == loaded.config.context_length


@pytest.mark.parametrize("layout", ["ms_clip", "openai"])
def test_the_merges_of_openai_cut_long_captions_as_the_model_learned_it(
    tmp_path: Path, shared_fixtures: Path, layout: Layout
) -> None:
    sizes = {
        "vocab_size": 49408,
        "context_length": 77,
        "sharing": Sharing(),
        "norm_eps": 1e-12 if layout == "ms_clip" else 1e-5,
    }
    preprocess = Preprocess(32) if layout == "ms_clip" else Preprocess(32, CLIP_MEAN, CLIP_STD)
    write(Weights("msclip", tiny(**sizes), preprocess, None), tmp_path / "x", layout)
    loaded = msclip.load(tmp_path / "x", tokenizer=str(shared_fixtures / "bpe_simple_vocab_16e6.txt.gz"))
    long = loaded.tokenizer("dog " * 100)[0]
    assert long[0] == 49406
    assert (long[-1] == 49407) == (layout == "openai")
    assert loaded.tokenizer("a dog")[0, :5].tolist() == [49406, 320, 1929, 49407, 0]


def test_a_model_with_stem_and_branch_is_ms_clip(tmp_path: Path) -> None:
    changes = {"stem": True, "layers": 6, "branch_layers": (1, 2, 3, 4, 5), "text_layers": 6, "norm_eps": 1e-12}
    model = tiny(**changes, sharing=Sharing(layers="last:5"))
    torch.save(to_state_dict(model), tmp_path / "x")
    found = read(tmp_path / "x")
    assert found.layout == "ms_clip"
    assert equal(model, found.model)


def test_a_folder_whose_weights_are_in_parts_is_put_together(tmp_path: Path) -> None:
    model = tiny()
    write(weights(model), tmp_path / "hf", "huggingface")
    tensors = load_file(tmp_path / "hf" / "model.safetensors")
    (tmp_path / "hf" / "model.safetensors").unlink()
    parts = {name: f"model-{i % 2}.safetensors" for i, name in enumerate(tensors)}
    for part in set(parts.values()):
        save_file({n: t for n, t in tensors.items() if parts[n] == part}, tmp_path / "hf" / part)
    index = tmp_path / "hf" / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": parts}))
    assert equal(model, read(tmp_path / "hf").model)
    index.write_text(json.dumps({"weight_map": {"x": "../secret.safetensors"}}))
    with pytest.raises(msclip.UserError, match="same folder"):
        read(tmp_path / "hf")


@pytest.mark.parametrize("layout", ["open_clip", "huggingface"])
def test_a_folder_is_read_by_its_url(tmp_path: Path, layout: Layout) -> None:
    model = tiny()
    write(weights(model), tmp_path / "there", layout)
    assert equal(model, msclip.load(f"file://{tmp_path}/there").model)
    with pytest.raises(msclip.UserError, match="no exported model"):
        msclip.load(f"file://{tmp_path}/elsewhere")


def test_old_hugging_face_files_with_position_ids_and_end_token_2_are_read(tmp_path: Path) -> None:
    model = tiny()
    write(weights(model), tmp_path / "hf", "huggingface")
    tensors = load_file(tmp_path / "hf" / "model.safetensors")
    (tmp_path / "hf" / "model.safetensors").unlink()
    for tower in ("text_model", "vision_model"):
        tensors[f"{tower}.embeddings.position_ids"] = torch.arange(16)[None]
    torch.save(tensors, tmp_path / "hf" / "pytorch_model.bin")
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    config["text_config"]["eos_token_id"] = 2
    (tmp_path / "hf" / "config.json").write_text(json.dumps(config))
    loaded = msclip.load(tmp_path / "hf")
    ids = loaded.tokenizer(["a dog", "two birds fly"])
    assert torch.equal(loaded.model.encode_text(ids), model.encode_text(ids))


@pytest.mark.parametrize(
    ("file", "part", "setting", "value", "reason"),
    [
        ("config.json", None, "model_type", "siglip", "siglip"),
        ("config.json", "text_config", "hidden_act", "relu", "relu|other"),
        ("config.json", "vision_config", "layer_norm_eps", 0.1, "epsilons"),
        ("config.json", "vision_config", "num_attention_heads", 7, "num_heads"),
        ("config.json", "vision_config", "num_attention_heads", "many", "not that of a CLIPModel"),
        ("config.json", "vision_config", "num_attention_heads", math.inf, "not that of a CLIPModel.*infinity"),
        ("preprocessor_config.json", None, "resample", 2, "bicubic"),
        ("preprocessor_config.json", None, "size", {"shortest_edge": 36}, "36.*does 32"),
        ("preprocessor_config.json", None, "size", {"height": 32, "width": 64}, "'width': 64.*shortest_edge"),
        ("preprocessor_config.json", None, "size", {"height": 32, "width": 32}, "'width': 32.*shortest_edge"),
        ("preprocessor_config.json", None, "crop_size", {"height": 32, "width": 64}, "crop_size.*'width': 64"),
        ("preprocessor_config.json", None, "crop_size", 28, "crop_size 28"),
        ("preprocessor_config.json", None, "rescale_factor", 1 / 127.5, "rescale_factor 0.0078"),
        ("preprocessor_config.json", None, "rescale_factor", "a", "preprocessor_config.json is not that"),
        ("preprocessor_config.json", None, "image_processor_type", "ViTImageProcessor", "ViTImageProcessor"),
        ("preprocessor_config.json", None, "do_pad", True, "do_pad True"),
        *(
            ("preprocessor_config.json", None, f"do_{what}", False, f"do_{what} False")
            for what in ("resize", "center_crop", "rescale", "normalize")
        ),
    ],
)
def test_a_setting_that_would_change_the_result_is_refused(
    tmp_path: Path, file: str, part: str | None, setting: str, value: object, reason: str
) -> None:
    write(weights(tiny()), tmp_path / "hf", "huggingface")
    values = json.loads((tmp_path / "hf" / file).read_text())
    (values if part is None else values[part])[setting] = value
    (tmp_path / "hf" / file).write_text(json.dumps(values))
    with pytest.raises(msclip.UserError, match=reason):
        read(tmp_path / "hf")


def test_old_and_sparse_preprocessing_of_hugging_face_is_read(tmp_path: Path) -> None:
    write(weights(tiny()), tmp_path / "hf", "huggingface")
    old = {"feature_extractor_type": "CLIPFeatureExtractor", "size": 32, "crop_size": 32, "do_resize": True, "do_pad": None}
    (tmp_path / "hf" / "preprocessor_config.json").write_text(json.dumps(old))
    assert read(tmp_path / "hf").preprocess == Preprocess(32, CLIP_MEAN, CLIP_STD)


@pytest.mark.parametrize(
    ("place", "setting", "value", "reason"),
    [
        (["model_cfg", "vision_cfg"], "pool_type", "avg", r"vision_cfg\.pool_type 'avg'"),
        (["model_cfg", "vision_cfg"], "head_width", math.inf, "is not open_clip's"),
        (["model_cfg", "text_cfg"], "heads", math.inf, "is not open_clip's.*infinity"),
        (["model_cfg", "text_cfg"], "tokenizer_kwargs", {"clean": "canonicalize"}, "tokenizer_kwargs.clean 'canonicalize'"),
        (["model_cfg", "text_cfg"], "tokenizer_kwargs", {"reduction_mask": "shuffle"}, "tokenizer_kwargs.reduction_mask"),
        (["preprocess_cfg"], "resize_mode", "squash", "preprocess_cfg.resize_mode 'squash'"),
        (["preprocess_cfg"], "resize_mode", "longest", "preprocess_cfg.resize_mode 'longest'"),
        (["preprocess_cfg"], "interpolation", "bilinear", "preprocess_cfg.interpolation 'bilinear'"),
        (["preprocess_cfg"], "mode", "L", "preprocess_cfg.mode 'L'"),
    ],
)
def test_a_setting_of_open_clip_that_would_change_the_result_is_refused(
    tmp_path: Path, place: list[str], setting: str, value: object, reason: str
) -> None:
    write(weights(tiny()), tmp_path / "oc", "open_clip")
    file = tmp_path / "oc" / "open_clip_config.json"
    values = part = json.loads(file.read_text())
    for name in place:
        part = part[name]
    part[setting] = value
    file.write_text(json.dumps(values))
    with pytest.raises(msclip.UserError, match=reason):
        read(tmp_path / "oc")


def test_a_file_without_a_tokenizer_asks_for_one_and_checks_that_it_fits(tmp_path: Path) -> None:
    save_file(state_of(tiny()), tmp_path / "x")
    with pytest.raises(msclip.UserError, match="tokenizer="):
        msclip.load(tmp_path / "x", activation="gelu")
    save_file(state_of(tiny(vocab_size=300)), tmp_path / "y")
    with pytest.raises(msclip.UserError, match="300 tokens"):
        msclip.load(tmp_path / "y", tokenizer=tokenizer(), activation="gelu")


def test_an_export_takes_no_settings_from_outside(tmp_path: Path) -> None:
    write(weights(tiny()), tmp_path / "x", "msclip")
    with pytest.raises(msclip.UserError, match="activation"):
        msclip.load(tmp_path / "x", activation="gelu")


class Malicious:
    """Leaves a mark when it is unpickled."""

    def __init__(self, mark: Path):
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.mark),)


@pytest.mark.parametrize("kind", ["legacy", "zip", "torchscript"])
def test_a_pickle_that_would_run_code_is_refused(tmp_path: Path, kind: str) -> None:
    mark, file = tmp_path / "mark", tmp_path / "x"
    if kind == "torchscript":
        with zipfile.ZipFile(file, "w") as archive:
            archive.writestr("x/data.pkl", pickle.dumps({"a": Malicious(mark)}, protocol=2))
            archive.writestr("x/constants.pkl", pickle.dumps((), protocol=2))
    else:
        torch.save({"a": Malicious(mark)}, file, _use_new_zipfile_serialization=kind == "zip")
    with pytest.raises(msclip.UserError, match="refused") as caught:
        msclip.load(file)
    assert "weights_only" not in str(caught.value)
    assert not mark.exists()


def test_a_tensor_larger_than_its_file_is_refused(tmp_path: Path) -> None:
    torch.save({"token_embedding.weight": torch.zeros(1).expand(1 << 40)}, tmp_path / "x")
    with pytest.raises(msclip.UserError, match="more than the file holds"):
        msclip.load(tmp_path / "x")


def test_a_compressed_archive_is_refused(tmp_path: Path) -> None:
    plain = io.BytesIO()
    torch.save({"x": torch.zeros(1 << 20)}, plain)
    with zipfile.ZipFile(plain) as source, zipfile.ZipFile(tmp_path / "x", "w", zipfile.ZIP_DEFLATED) as target:
        for name in source.namelist():
            target.writestr(name, source.read(name))
    with pytest.raises(msclip.UserError, match="compressed"):
        msclip.load(tmp_path / "x")


@pytest.mark.parametrize(
    ("claim", "reason"),
    [
        ({"layers": 10**9, "text_layers": 10**9}, "1000000000 layers"),
        ({"embed_dim": -1}, r"model\.embed_dim must be at least 1, got -1"),
        ({"embed_dim": 10**30}, "no model has the sizes"),
        ({"width": "wide"}, r"model\.width must be a whole number, got 'wide'"),
        ({"layers": True}, r"model\.layers must be a whole number, got True"),
        ({"vocab_size": None}, r"model\.vocab_size must be a whole number, got None"),
        ({"dropout": "0"}, r"model\.dropout must be a number, got '0'"),
        ({"branch_layers": ["a"]}, r"model\.branch_layers must be a list, each a whole number, got \('a',\)"),
        ({"loss": []}, r"model\.loss must be softmax or sigmoid, got \(\)"),
        ({"sharing": {"layers": 5}}, r"model\.sharing\.layers must be text, got 5"),
        ({"sharing": {"ln1": 1}}, r"model\.sharing\.ln1 must be true or false, got 1"),
        ({"sharing": []}, r"model\.sharing must be a section of settings, got \(\)"),
        ({"colour": 1}, "another version of msclip.*colour"),
    ],
)
def test_a_header_that_claims_what_no_model_has_is_refused_at_once(
    tmp_path: Path, claim: dict[str, object], reason: str
) -> None:
    config = {**msclip.ModelConfig(**SIZES).to_dict(), **claim}
    header = {"format": "msclip/1", "model": json.dumps(config), "tokenizer": tokenizer().to_json()}
    tensors = {str(i): torch.zeros(1) for i in range(6)}  # as many as it has layers
    save_file(tensors, tmp_path / "x", metadata={**header, "preprocess": json.dumps(Preprocess(32).to_dict())})
    with pytest.raises(msclip.UserError, match=f"x .*{reason}"):
        msclip.load(tmp_path / "x")


@pytest.mark.parametrize(
    "remark", [[], {"sharing": {"layers": 5}}, {"sharing": {"layers": "all", "colour": 1}}, {"sharing": None}]
)
def test_a_remark_that_makes_no_sense_is_passed_over(tmp_path: Path, remark: object) -> None:
    model = tiny()
    write(weights(model), tmp_path / "hf", "huggingface")
    file = tmp_path / "hf" / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "msclip": remark}))
    assert equal(model, read(tmp_path / "hf").model)


def test_a_name_that_claims_a_million_layers_is_refused_at_once(tmp_path: Path) -> None:
    state = {**state_of(tiny()), "transformer.resblocks.9999.ln_1.weight": torch.ones(64)}
    save_file(state, tmp_path / "x")
    with pytest.raises(msclip.UserError, match="gaps"):
        msclip.load(tmp_path / "x")


@pytest.mark.parametrize("kind", ["safetensors", "zip", "legacy", "torchscript"])
def test_a_file_cut_anywhere_is_refused_in_one_sentence(tmp_path: Path, kind: str) -> None:
    file = tmp_path / "x"
    if kind == "safetensors":
        save_file(state_of(tiny()), file)
    elif kind == "torchscript":
        scripted(openai.write(weights(tiny())), file)
    else:
        torch.save(state_of(tiny()), file, _use_new_zipfile_serialization=kind == "zip")
    whole = file.read_bytes()
    for share in (0.0, 1e-5, 1e-3, 0.1, 0.5, 0.999):
        file.write_bytes(whole[: int(share * len(whole))])
        with pytest.raises(msclip.UserError) as caught:
            msclip.load(file)
        assert "\n" not in str(caught.value)


def test_bytes_changed_at_random_give_a_model_or_a_sentence_but_no_traceback(tmp_path: Path) -> None:
    file = tmp_path / "x"
    scripted(openai.write(weights(tiny(layers=1, text_layers=1))), file)
    with zipfile.ZipFile(file) as archive:
        entries = {name: archive.read(name) for name in archive.namelist()}
    (pickled,) = (name for name in entries if name.endswith("/data.pkl"))
    generator = torch.Generator().manual_seed(0)
    refused = 0
    for _ in range(50):
        data = bytearray(entries[pickled])
        for _ in range(2):
            place, value = (int(torch.randint(n, (1,), generator=generator)) for n in (len(data), 256))
            data[place] = value
        with zipfile.ZipFile(file, "w") as archive:
            for name, content in entries.items():
                archive.writestr(name, bytes(data) if name == pickled else content)
        try:
            read(file)
        except msclip.UserError:
            refused += 1
    assert refused > 30


@pytest.mark.parametrize("content", [b"", b"<html>404</html>", b"\x89PNG\r\n\x1a\n", b"PK\x03\x04", b"\x80\x02."])
def test_a_file_of_another_kind_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "x").write_bytes(content)
    with pytest.raises(msclip.UserError, match="x"):
        msclip.load(tmp_path / "x")


@pytest.mark.parametrize("value", [[1, 2], {"a": "text"}, {1: 2}, {}, {"linear.weight": torch.ones(2, 2)}])
def test_a_pickle_of_something_else_is_refused(tmp_path: Path, value: object) -> None:
    torch.save(value, tmp_path / "x")
    with pytest.raises(msclip.UserError, match="x"):
        msclip.load(tmp_path / "x")


def test_an_empty_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(msclip.UserError, match=r"config\.json"):
        msclip.load(tmp_path)
