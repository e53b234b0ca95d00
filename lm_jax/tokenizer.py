"""A fast Hugging Face tokenizer: read, train, check that labels are single tokens, write."""

from __future__ import annotations

import functools
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers

from lm_jax.gguf_file import GGUFFile, byte_level_tokenizer
from lm_jax.source import locate

PATTERNS = ("tokenizer*.json", "chat_template.jinja")
END_OF_TEXT, PADDING = "<|endoftext|>", "<|padding|>"


class Tokenizer:
    """Text to token ids and back. No special token is ever added, and none is read out of a text: what a document
    says of "<|endoftext|>" is letters.

    Attributes:
        bos, eos, pad: ids of the special tokens, None where there is none; without a padding token `pad` is `eos`.
        special: ids of all special tokens.
        vocab_size: one more than the largest id. A model's vocabulary may be larger (Qwen3 rounds it up).
    """

    def __init__(self, tokenizer: tokenizers.Tokenizer, settings: dict[str, Any]):
        self._tokenizer, self._settings = tokenizer, settings
        tokenizer.encode_special_tokens = True
        self.vocab_size = max(tokenizer.get_vocab(with_added_tokens=True).values()) + 1
        self.bos, self.eos, pad = (self._special(name) for name in ("bos_token", "eos_token", "pad_token"))
        self.pad = self.eos if pad is None else pad
        added = tokenizer.get_added_tokens_decoder()
        self.special = frozenset(token for token, described in added.items() if described.special)

    @classmethod
    def load(cls, source: str | Path) -> Tokenizer:
        """Read the tokenizer of a model folder, a hub id or a .gguf file.

        Raises:
            FileNotFoundError: the folder has no tokenizer.json.
            FileNotFoundError, ConnectionError: see `source.locate`.
        """
        path = locate(source, PATTERNS)
        if path.is_file():
            return cls(*GGUFFile(path).tokenizer())
        if not (path / "tokenizer.json").exists():
            raise FileNotFoundError(f"{path}: tokenizer.json is missing; transformers' save_pretrained() writes it")
        settings_file = path / "tokenizer_config.json"
        settings = json.loads(settings_file.read_text()) if settings_file.exists() else {}
        if (path / "chat_template.jinja").exists():
            settings["chat_template"] = (path / "chat_template.jinja").read_text()
        try:
            tokenizer = tokenizers.Tokenizer.from_file(str(path / "tokenizer.json"))
        except Exception as error:  # the library raises nothing narrower
            raise ValueError(f"{path / 'tokenizer.json'} is no tokenizer: {error}") from error
        tokenizer.no_truncation()
        tokenizer.no_padding()
        return cls(tokenizer, settings)

    def encode(self, text: str) -> list[int]:
        return self._tokenizer.encode(text, add_special_tokens=False).ids

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        return [encoding.ids for encoding in self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)]

    def encode_chat(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of texts that a chat template made, in which special tokens are meant as such."""
        reader = tokenizers.Tokenizer.from_str(self._tokenizer.to_str())
        return [encoding.ids for encoding in reader.encode_batch_fast(list(texts), add_special_tokens=False)]

    def chat(self, content: str) -> str:
        """What a user says as the model's chat template has it, up to where the answer begins; without a template the
        content itself."""
        if not (template := self._settings.get("chat_template")):
            return content
        from transformers.utils.chat_template_utils import render_jinja_template  # slow to import, and seldom needed

        special = {name: self._settings[name] for name in ("bos_token", "eos_token") if name in self._settings}
        (text,), _ = render_jinja_template(
            conversations=[[{"role": "user", "content": content}]],
            chat_template=template,
            add_generation_prompt=True,
            **{name: token["content"] if isinstance(token, dict) else token for name, token in special.items()},
        )
        return text

    def decode(self, ids: Iterable[int]) -> str:
        """The text of the ids, special tokens included; ids beyond the tokenizer's vocabulary have no text."""
        return self._tokenizer.decode([int(token) for token in ids], skip_special_tokens=False)

    def texts(self, vocab_size: int) -> list[str]:
        """The text of each token within a text; "" for special tokens and beyond the tokenizer's vocabulary.

        Bytes that are no whole character are U+FFFD.
        """
        ids = range(min(self.vocab_size, vocab_size))
        decode = functools.partial(self._tokenizer.decode_batch, skip_special_tokens=True)
        # Behind a letter: some decoders take the blank from the first token of a text.
        alone = enumerate(decode([[token] for token in ids]))
        anchor, letter = next(((token, text) for token, text in alone if text.isalnum()), (None, ""))
        before = [] if anchor is None else [anchor]
        found = [text[len(letter) :] for text in decode([[*before, token] for token in ids])]
        return found + [""] * (vocab_size - len(found))

    def newlines(self, vocab_size: int) -> np.ndarray:
        """[vocab_size] int32: newline characters in each token's text; 0 beyond the tokenizer's vocabulary."""
        return np.array([text.count("\n") for text in self.texts(vocab_size)], np.int32)

    def save(self, folder: str | Path, *, chat_template: bool = True) -> None:
        """Write tokenizer.json and tokenizer_config.json, which transformers' AutoTokenizer loads.

        Args:
            chat_template: whether to keep the tokenizer's, if it has one.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        self._tokenizer.save(str(folder / "tokenizer.json"))
        settings = {"tokenizer_class": "PreTrainedTokenizerFast", **self._settings}
        if not chat_template:
            settings.pop("chat_template", None)
        text = json.dumps(settings, indent=2, ensure_ascii=False)
        (folder / "tokenizer_config.json").write_text(text + "\n", encoding="utf-8")

    def _special(self, name: str) -> int | None:
        token = self._settings.get(name)
        token = token["content"] if isinstance(token, dict) else token
        return None if token is None else self._tokenizer.token_to_id(token)


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """Train byte-level BPE on texts; every digit is a token of its own. The same texts give the same tokenizer.

    Text is normalized (NFC) and split as Qwen does it: transformers reads any tokenizer beside a Qwen2 model so.
    """
    tokenizer = byte_level_tokenizer(tokenizers.models.BPE(), "qwen2")
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT, PADDING],
        initial_alphabet=sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return Tokenizer(tokenizer, {"eos_token": END_OF_TEXT, "pad_token": PADDING})


def label_token_ids(tokenizer: Tokenizer, prompt_tail: str, labels: Sequence[str]) -> tuple[int, ...]:
    """The id of each label right after the prompt.

    Args:
        prompt_tail: the exact end of every prompt, long enough that what precedes it cannot change its tokens.

    Raises:
        ValueError: a label that is not one token there, or two labels that share a token.
    """
    tail = tokenizer.encode(prompt_tail)
    ids = []
    for label in labels:
        tokens = tokenizer.encode(prompt_tail + label)
        if not tokens or tokens[:-1] != tail:
            common = next((i for i, (a, b) in enumerate(zip(tokens, tail, strict=False)) if a != b), len(tail))
            found = [tokenizer.decode([token]) for token in tokens[common:]]
            raise ValueError(
                f"label {label!r} must be one token right after {prompt_tail!r}; "
                f"from where the two differ, the tokens are {found} (ids {tokens[common:]})"
            )
        if tokens[-1] in ids:
            raise ValueError(f"labels {labels[ids.index(tokens[-1])]!r} and {label!r} are the same token {tokens[-1]}")
        ids.append(tokens[-1])
    return tuple(ids)
