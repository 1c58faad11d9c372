"""CLIP's text: cleaned captions, byte-level BPE with an end-of-word mark, a start and an end token, padding with 0.

All of it runs in the `tokenizers` library except the cleaning, and except that the ids of a word are remembered: putting
a caption's together costs a quarter of what the library needs, which is a twentieth of decoding. The end token has the
largest id of the vocabulary, because the models pool the text where the largest id stands. An over-long caption keeps its
end token last; the official MS-CLIP tokenizer cuts it off (`truncation="official"`), after which every over-long caption
has the same embedding.
"""

from __future__ import annotations

import gzip
import html
import itertools
import json
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Literal, get_args

# One thread a process: pipelines run a process a core. Set, the library also stays silent when a process forks.
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import ftfy
import numpy as np
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, processors, trainers

from msclip.errors import UserError

if TYPE_CHECKING:
    from jaxtyping import Int32, Int64
    from torch import Tensor

START, END = "<|startoftext|>", "<|endoftext|>"
WORD_END = "</w>"
FORMAT = "msclip-tokenizer/1"
_PLAIN_WORDS = re.compile(r"'s|'t|'re|'ve|'m|'ll|'d|[a-z]+|[0-9]|[^\sa-z0-9]+")
"""`_WORDS` for cleaned ASCII."""
_REMEMBERED, _LONG_WORD = 2**16, 32
"""Words, and characters of one that is not worth it."""
CLIP_MERGES = 49408 - 512 - 2
"""OpenAI's file holds many more merges than its vocabulary uses."""

# Contractions, runs of letters, single digits, runs of anything else that is not space, all in lower case by then.
_WORDS = tokenizers.Regex(r"'s|'t|'re|'ve|'m|'ll|'d|\p{L}+|\p{N}|[^\s\p{L}\p{N}]+")

Truncation = Literal["end", "official"]


def clean(text: str) -> str:
    """Mojibake and HTML entities mended, spaces collapsed, lower case."""
    if not text.isascii() or not text.isprintable() or "&" in text:  # else there is nothing to mend, and ftfy is slow
        text = html.unescape(html.unescape(ftfy.fix_text(text)))
    return " ".join(text.split()).lower()


class Tokenizer:
    """Captions to token ids. Immutable; pickles as its JSON and is rebuilt once a process.

    Args:
        library: a tokenizer of the `tokenizers` library. Where its largest id is not CLIP's end token, a start and an
            end token are added after its own ids.
        context_length: ids a caption has, start, end and padding included.
        truncation: what becomes of longer captions: "end" keeps the end token last, "official" cuts it off.
    """

    def __init__(self, library: tokenizers.Tokenizer, context_length: int = 77, truncation: Truncation = "end"):
        if context_length < 3:
            raise UserError(f"context_length must leave room for start, end and one token, got {context_length}")
        if truncation not in get_args(Truncation):
            raise UserError(f"truncation must be one of {', '.join(get_args(Truncation))}, got {truncation!r}")
        self.context_length = context_length
        self.truncation: Truncation = truncation
        library = tokenizers.Tokenizer.from_str(library.to_str())
        start, end = START, END
        if library.token_to_id(START) is None or library.token_to_id(END) != _largest_id(library):
            start, end = "<|startofcaption|>", "<|endofcaption|>"
            if library.token_to_id(end) != _largest_id(library):
                library.add_special_tokens([start, end])
        special: Any = library.token_to_id  # its own type allows for None, and these are there
        self.start_id: int = special(start)
        self.end_id: int = special(end)
        self.vocab_size = _largest_id(library) + 1
        assert self.end_id == self.vocab_size - 1
        library.post_processor = processors.TemplateProcessing(
            single=f"{start} $A {end}", special_tokens=[(start, self.start_id), (end, self.end_id)]
        )
        library.no_padding()
        if truncation == "end":
            library.enable_truncation(context_length)
        else:
            library.no_truncation()
        self._library = library
        self._by_words = _splits_as_clip(library)
        self._remembered_ids = lru_cache(_REMEMBERED)(self._word_ids)

    @classmethod
    def train(cls, captions: Iterable[str], vocab_size: int, context_length: int = 77) -> Tokenizer:
        """A byte-level BPE of these captions; it may end smaller than vocab_size when they hold too few words.

        Raises:
            UserError: no captions, or vocab_size below the 512 byte symbols, the two special tokens and one merge.
        """
        if vocab_size <= 514:
            raise UserError(f"the tokenizer's vocab_size must exceed 514 (bytes and special tokens), got {vocab_size}")
        seen = 0

        def cleaned() -> Iterator[str]:
            nonlocal seen
            for caption in captions:
                seen += 1
                yield clean(caption)

        library = _untrained(models.BPE(end_of_word_suffix=WORD_END))
        wanted = vocab_size - 514
        trainer = trainers.BpeTrainer(
            vocab_size=wanted + 512,
            min_frequency=2,
            initial_alphabet=_byte_symbols(),
            # Named, these symbols have fixed ids; else their order differs from run to run, and with it the choice
            # between merges of equal frequency.
            special_tokens=[symbol + WORD_END for symbol in _byte_symbols()],
            end_of_word_suffix=WORD_END,
            show_progress=False,
        )
        library.train_from_iterator(cleaned(), trainer)
        if not seen:
            raise UserError("no captions to train a tokenizer on")
        merges = json.loads(library.to_str())["model"]["merges"]
        return cls(_from_merges([(left, right) for left, right in merges]), context_length)

    @classmethod
    def load(cls, spec: str, context_length: int = 77, truncation: Truncation = "end") -> Tokenizer:
        """The tokenizer that spec names.

        Args:
            spec: a file or URL ending in .json (of the `tokenizers` library, or `to_json`'s, whose own settings are
                then overridden), in .txt or .txt.gz (OpenAI's merges), or the name of a repository on Hugging Face.

        Raises:
            UserError: none of these can be read; the message says what was tried.
        """
        library = (_read if spec.endswith((".json", ".txt", ".txt.gz")) else _downloaded)(spec)
        return cls(library, context_length, truncation)

    def encode_numpy(self, texts: Sequence[str]) -> Int32[np.ndarray, "captions context_length"]:
        """Token ids of each caption: start, its tokens, end, then zeros."""
        cleaned = [clean(text) for text in texts]
        remembered = [self._by_words and text.isascii() and text.isprintable() and "<|" not in text for text in cleaned]
        others = iter(self._library.encode_batch_fast([t for t, known in zip(cleaned, remembered, strict=True) if not known]))
        rows = [
            self._joined(text) if known else next(others).ids[: self.context_length]
            for text, known in zip(cleaned, remembered, strict=True)
        ]
        ids = np.zeros((len(rows), self.context_length), np.int32)
        lengths = np.array([len(row) for row in rows], np.int64)
        ids[np.arange(self.context_length) < lengths[:, None]] = list(itertools.chain.from_iterable(rows))
        return ids

    def _joined(self, text: str) -> list[int]:
        """What the library makes of a text without special tokens: BPE looks at each word alone."""
        ids = [self.start_id]
        for word in _PLAIN_WORDS.findall(text):
            ids += self._remembered_ids(word) if len(word) < _LONG_WORD else self._word_ids(word)
        if self.truncation == "end":
            del ids[self.context_length - 1 :]
        ids.append(self.end_id)
        return ids[: self.context_length]

    def _word_ids(self, word: str) -> list[int]:
        return self._library.encode(word, add_special_tokens=False).ids

    def __call__(self, texts: str | Sequence[str]) -> Int64[Tensor, "captions context_length"]:
        """`encode_numpy` as a tensor; one text gives one row."""
        import torch

        return torch.from_numpy(self.encode_numpy([texts] if isinstance(texts, str) else texts)).long()

    def decode(self, ids: Iterable[int]) -> str:
        """The cleaned caption that a row of ids stands for, without start, end and what follows it."""
        kept: list[int] = []
        for i in ids:
            if int(i) == self.end_id:
                break
            if int(i) != self.start_id:
                kept.append(int(i))
        return self._library.decode(kept, skip_special_tokens=False).strip()

    def to_json(self) -> str:
        """Everything, as one line; `tokenizer` in it is a complete file of the `tokenizers` library."""
        settings = {"format": FORMAT, "context_length": self.context_length, "truncation": self.truncation}
        return json.dumps({**settings, "tokenizer": json.loads(self._library.to_str())}, ensure_ascii=False)

    @staticmethod
    def from_json(text: str) -> Tokenizer:
        """The tokenizer of `to_json`; the same text gives the same object.

        Raises:
            UserError: not such a text.
        """
        return _rebuilt(text)

    def __reduce__(self) -> tuple[Any, ...]:
        return Tokenizer.from_json, (self.to_json(),)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Tokenizer) and self.to_json() == other.to_json()

    def __hash__(self) -> int:
        return hash(self.to_json())


@lru_cache(maxsize=4)
def _rebuilt(text: str) -> Tokenizer:
    try:
        values = json.loads(text)
        if values["format"] != FORMAT:
            raise UserError(f"the tokenizer's format must be {FORMAT}, got {values['format']!r}")
        library = tokenizers.Tokenizer.from_str(json.dumps(values["tokenizer"]))
        return Tokenizer(library, values["context_length"], values["truncation"])
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"not a tokenizer as msclip writes it: {_first_line(error)}") from error


def _read(path: str) -> tokenizers.Tokenizer:
    from msclip.storage import Folder  # and with it PyArrow, which a decoding process has no use for

    folder, _, name = path.rpartition("/")
    try:
        data = Folder(folder or ("/" if path.startswith("/") else ".")).read_bytes(name)
        if path.endswith(".json"):
            values = json.loads(data)
            return tokenizers.Tokenizer.from_str(json.dumps(values.get("tokenizer", values)))
        lines = (gzip.decompress(data) if path.endswith(".gz") else data).decode().splitlines()[1:]
        pairs = [line.split() for line in lines[:CLIP_MERGES] if line.strip()]
        if not pairs or any(len(pair) != 2 for pair in pairs):
            raise ValueError("after its first line each line must hold one merge: two symbols with a space between")
        return _from_merges([(left, right) for left, right in pairs])
    except FileNotFoundError:
        raise UserError(f"cannot load the tokenizer {path!r}: there is no such file") from None
    except UserError:
        raise
    except Exception as error:  # the library raises bare exceptions for every cause
        raise UserError(f"cannot load the tokenizer {path!r}: {_first_line(error)}") from error


def _downloaded(name: str) -> tokenizers.Tokenizer:
    tried = f"cannot load the tokenizer {name!r}: it ends neither in .json (tokenizer file) nor in .txt or .txt.gz (merges)"
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name) or name.startswith("."):
        raise UserError(f"{tried}, and is no Hugging Face name such as openai/clip-vit-base-patch32")
    # The library would look at the Hub for half a minute before it says that there is no such name.
    if os.path.exists(here := name.rpartition("/")[0] or name):
        raise UserError(f"{tried}, and as {here} is here it is taken for a path, not for a Hugging Face name")
    try:
        return tokenizers.Tokenizer.from_pretrained(name)
    except Exception as error:
        raise UserError(f"{tried}, and as a Hugging Face name it failed: {_first_line(error)}") from error


def _from_merges(merges: Sequence[tuple[str, str]]) -> tokenizers.Tokenizer:
    """OpenAI's layout of ids: bytes, bytes that end a word, merges by rank, start, end."""
    symbols = _byte_symbols()
    tokens = [*symbols, *(s + WORD_END for s in symbols), *("".join(pair) for pair in merges), START, END]
    # Two merges may give one token: a+bc and ab+c.
    vocabulary = {token: i for i, token in enumerate(dict.fromkeys(tokens))}
    library = _untrained(models.BPE(vocabulary, list(merges), end_of_word_suffix=WORD_END))
    library.add_special_tokens([START, END])
    return library


def _untrained(model: models.BPE) -> tokenizers.Tokenizer:
    library = tokenizers.Tokenizer(model)
    library.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(_WORDS, behavior="removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    library.decoder = decoders.Sequence([decoders.ByteLevel(), decoders.Replace(WORD_END, " ")])
    return library


def _splits_as_clip(library: tokenizers.Tokenizer) -> bool:
    """Whether a text's ids are those of its words as `_untrained` splits it, unless it holds a special token: a <|...|>."""
    mine, clip = (json.loads(each.to_str()) for each in (library, _untrained(models.BPE())))
    alike = all(mine[part] == clip[part] for part in ("normalizer", "pre_tokenizer"))
    marked = all(token.content.startswith("<|") for token in library.get_added_tokens_decoder().values())
    return alike and marked and mine["model"]["type"] == "BPE" and not mine["model"]["dropout"]


def _byte_symbols() -> list[str]:
    """The 256 printable characters that byte-level BPE writes bytes with, in the order of OpenAI's ids."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    return [chr(b) for b in printable] + [chr(256 + n) for n in range(256 - len(printable))]


def _largest_id(library: tokenizers.Tokenizer) -> int:
    return max(library.get_vocab(with_added_tokens=True).values(), default=-1)


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:300]
