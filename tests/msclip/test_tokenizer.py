"""Captions to ids: equal to the recorded ids of the official tokenizer, and trained on captions of one's own."""

import gzip
import json
import os
import pickle
import subprocess
import sys
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
import tokenizers
import torch
from hypothesis import given
from hypothesis import strategies as st

from msclip.data.tokenizer import Tokenizer, Truncation, clean
from msclip.errors import UserError

CAPTIONS = [
    "A red circle above a blue square",
    "two green triangles below a yellow circle",
    "a blue square left of three red circles",
    "The dog's ball isn't red",
] * 3


@pytest.fixture(scope="module")
def trained() -> Tokenizer:
    return Tokenizer.train(CAPTIONS, 560, context_length=12)


@pytest.fixture(scope="module")
def merges(shared_fixtures: Path) -> str:
    return str(shared_fixtures / "bpe_simple_vocab_16e6.txt.gz")


def test_openai_merges_give_the_official_ids(merges: str, shared_fixtures: Path) -> None:
    tokenizer = Tokenizer.load(merges, truncation="official")
    cases = json.loads((shared_fixtures / "clip_tokens.json").read_text())
    ids = tokenizer([case["text"] for case in cases])
    assert ids.tolist() == [case["ids"] for case in cases]
    assert (tokenizer.vocab_size, tokenizer.start_id, tokenizer.end_id) == (49408, 49406, 49407)


def test_an_over_long_caption_keeps_its_end_token_unless_official(merges: str) -> None:
    long = "word " * 200
    ids = Tokenizer.load(merges)(long)[0]
    assert ids.argmax() == 76
    assert ids[0] == 49406
    official = Tokenizer.load(merges, truncation="official")(long)[0]
    assert official.argmax() == 0
    assert torch.equal(ids[:76], official[:76])


@pytest.mark.parametrize(
    ("text", "cleaned"),
    [
        ("  Two\n\tSPACES  ", "two spaces"),
        ("Fish &amp;amp; chips", "fish & chips"),
        ("schÃ¶n", "schön"),
        ("“smart” ﬁne", '"smart" fine'),
        ("plain ascii, untouched", "plain ascii, untouched"),
        ("a\x1b[31mred\x00", "ared"),
    ],
)
def test_captions_are_mended_before_they_are_split(text: str, cleaned: str) -> None:
    assert clean(text) == cleaned


def test_a_trained_tokenizer_ends_with_its_special_tokens(trained: Tokenizer) -> None:
    assert trained.vocab_size == 560
    assert (trained.start_id, trained.end_id) == (558, 559)
    ids = trained("a red circle")
    assert ids.dtype == torch.int64
    assert ids.tolist()[0][:1] == [558]
    assert ids.shape == (1, 12)
    assert ids[0].argmax() == (ids[0] == 559).nonzero()[0]
    assert not ids[0, ids[0].argmax() + 1 :].any()


def test_any_text_comes_back_through_a_tokenizer_that_never_saw_its_bytes(trained: Tokenizer) -> None:
    roomy = Tokenizer.train(CAPTIONS, 560, context_length=99)
    assert roomy.decode(roomy("Ein Bär 🐻 in 北京")[0]) == "ein bär 🐻 in 北京"
    assert trained.decode(trained("A red  circle")[0]) == "a red circle"


WORDS = st.sampled_from(
    ["dog", "dog's", "they'll", "x'x", "3 dogs", "12", "<|endoftext|>", "<|", "a_b-c", "!!?", "Ä", "long" * 10, "\x1c", " "]
)


@given(st.lists(WORDS | st.text(st.characters(max_codepoint=0x100), max_size=8), max_size=12), st.sampled_from(["", " "]))
def test_remembered_words_give_the_ids_of_the_library(trained: Tokenizer, parts: list[str], space: str) -> None:
    text = space.join(parts)
    for truncation in get_args(Truncation):
        tokenizer = Tokenizer(trained._library, 12, truncation)
        library = tokenizers.Tokenizer.from_str(json.dumps(json.loads(tokenizer.to_json())["tokenizer"]))
        expected = library.encode(clean(text)).ids[:12]
        for _ in range(2):  # new words, and words that have been seen
            assert tokenizer.encode_numpy([text])[0].tolist() == expected + [0] * (12 - len(expected))


def test_frequent_words_become_one_token(trained: Tokenizer) -> None:
    assert (trained("red circle")[0] != 0).sum() == 4


def test_training_twice_gives_the_same_tokenizer_in_every_process(trained: Tokenizer) -> None:
    program = (
        "import sys, json; from msclip.data.tokenizer import Tokenizer;"
        "print(Tokenizer.train(json.loads(sys.argv[1]), 560, context_length=12).to_json())"
    )
    for _ in range(2):
        done = subprocess.run([sys.executable, "-c", program, json.dumps(CAPTIONS)], capture_output=True, text=True, check=True)
        assert Tokenizer.from_json(done.stdout) == trained


def test_a_tokenizer_travels_as_json_and_as_a_pickle(trained: Tokenizer, tmp_path: Path) -> None:
    official = Tokenizer.from_json(trained.to_json().replace('"end"', '"official"', 1))
    assert (official.context_length, official.truncation) == (12, "official")
    assert pickle.loads(pickle.dumps(official)) == official != trained
    texts = [*CAPTIONS[:4], "one two three four five six seven eight nine ten eleven"]
    assert np.array_equal(pickle.loads(pickle.dumps(official)).encode_numpy(texts), official.encode_numpy(texts))
    assert Tokenizer.from_json(trained.to_json()) is Tokenizer.from_json(trained.to_json())
    (tmp_path / "tokenizer.json").write_text(trained.to_json(), encoding="utf-8")
    assert Tokenizer.load(str(tmp_path / "tokenizer.json"), context_length=12) == trained


def test_a_foreign_tokenizer_gets_start_and_end_after_its_own_ids(tmp_path: Path) -> None:
    foreign = tokenizers.Tokenizer(tokenizers.models.WordLevel({"[UNK]": 0, "red": 1, "circle": 2}, unk_token="[UNK]"))
    foreign.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    foreign.enable_padding(length=40)
    foreign.save(str(tmp_path / "words.json"))
    tokenizer = Tokenizer.load(str(tmp_path / "words.json"), context_length=6)
    assert tokenizer.vocab_size == 5
    assert tokenizer("Red circle").tolist() == [[3, 1, 2, 4, 0, 0]]
    assert tokenizer("red " * 20).tolist() == [[3, 1, 1, 1, 1, 4]]
    assert Tokenizer.from_json(tokenizer.to_json()) == tokenizer


def test_a_forking_process_hears_no_warning() -> None:
    program = (
        "import os; from msclip.data.tokenizer import Tokenizer;"
        "t = Tokenizer.train(['a b', 'a b'] * 9, 515); t.encode_numpy(['a'] * 500);"
        "p = os.fork(); t.encode_numpy(['a'] * 500); p and os.waitpid(p, 0)"
    )
    environment = {k: v for k, v in os.environ.items() if k != "TOKENIZERS_PARALLELISM"}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment, check=True)
    assert done.stderr == ""


def test_bad_specs_say_what_was_tried(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such file"):
        Tokenizer.load(str(tmp_path / "missing.json"))
    with pytest.raises(UserError, match=r"neither in \.json .* no Hugging Face name"):
        Tokenizer.load("some/folder/of/mine")
    (tmp_path / "broken.json").write_text('{"model": 3}')
    with pytest.raises(UserError, match=r"broken\.json"):
        Tokenizer.load(str(tmp_path / "broken.json"))
    (tmp_path / "merges.txt.gz").write_bytes(gzip.compress(b"#version\na b c\n"))
    with pytest.raises(UserError, match="two symbols"):
        Tokenizer.load(str(tmp_path / "merges.txt.gz"))
    with pytest.raises(UserError, match="not a tokenizer as msclip writes it"):
        Tokenizer.from_json("{}")


@pytest.mark.parametrize("spec", ["runs/tokenizer", "runs", "./tokenizer", "../tokenizer", "/tokenizer", "~/tokenizer"])
def test_a_path_without_a_known_ending_is_refused_before_anything_is_downloaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, spec: str
) -> None:
    (tmp_path / "runs").mkdir()
    monkeypatch.chdir(tmp_path)

    class NoHub:
        @staticmethod
        def from_pretrained(name: str) -> None:
            raise AssertionError(f"looked for {name} at the Hub")

    monkeypatch.setattr(tokenizers, "Tokenizer", NoHub)
    with pytest.raises(UserError, match=r"neither in \.json .* Hugging Face name"):
        Tokenizer.load(spec)


def test_a_hugging_face_name_that_cannot_be_had_is_the_users_mistake() -> None:
    program = "from msclip.data.tokenizer import Tokenizer; Tokenizer.load('msclip-no-such/tokenizer')"
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment, check=False)
    assert "UserError: cannot load the tokenizer 'msclip-no-such/tokenizer'" in done.stderr
    assert "as a Hugging Face name it failed" in done.stderr


def test_settings_that_cannot_work_are_refused() -> None:
    with pytest.raises(UserError, match="vocab_size must exceed 514"):
        Tokenizer.train(CAPTIONS, 300)
    with pytest.raises(UserError, match="no captions"):
        Tokenizer.train([], 600)
    with pytest.raises(UserError, match="context_length"):
        Tokenizer.train(CAPTIONS, 600, context_length=2)
    with pytest.raises(UserError, match="truncation must be one of end, official"):
        Tokenizer(tokenizers.Tokenizer(tokenizers.models.BPE()), truncation="middle")  # type: ignore[arg-type]
