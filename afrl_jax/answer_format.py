"""The answer-first format: prompt, gold answer, strict parser, and their tokens.

Prompt: the instruction (task, scale, numbered rules) and the query come first, the document last, so candidates of one
query share a prefix. The answer's first token is the grade; the explanation follows, one line a segment:

    grade how well the clip answers the query
    0 irrelevant, 1 related, 2 nearly right, 3 right
    Query: robots under 20 minutes
    Document: robots interview
    minutes: 24
    Grade: 2
    Match: topic robots | robots | met; under 20 minutes | 24 minutes | violated
    Rule: 25
    Verdict: 2

Each constraint stands beside what the document says of it and the verdict on that. In three lists, one a line, a model
must count to keep them of one length: small ones failed at that more often than at anything else.

The answer-first order for relevance is also that of TaoSR1 (arXiv 2508.12365). The decoder is causal, so the grade
cannot see the explanation: `P(grade)` is read at one position after one prefill, and never changes when an explanation
is asked for.

The three parts of a prompt (up to the query, the document, the slot) are tokenized apart and joined as token ids: that
*defines* the prompt, and makes the shared prefix exact. Every part begins and ends at a line, where tokenizers split
anyway, except that some join a line's last punctuation mark with the newline after it.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import sys
import threading
import unicodedata
from collections.abc import Iterable, Sequence

import numpy as np

from afrl_jax.bounded_cache import BoundedCache
from afrl_jax.schema import Document, Explanation, Instruction, Judgment, Match, Query
from lm_jax.tokenizer import Tokenizer, label_token_ids

DOCUMENT_BYTES = 2**25  # of documents' tokens kept, texts included

# Segments of an answer, in order; a generated token belongs to the segment of its line.
SEGMENTS = ("label", "match", "rule", "consistency")
LABEL, MATCH, RULE, CONSISTENCY = range(len(SEGMENTS))
EVIDENCE = {None: " free"} | {match: f" {match}" for match in Match}  # what is said of a field, see encode_evidence
_KEYS = ("Match", "Rule", "Verdict")
VERDICT_LINE = f"\n{_KEYS[-1]}:"  # begins the last line of an answer; a blank and the grade follow
_SEGMENT_OF_LINE = np.array([LABEL, MATCH, RULE, CONSISTENCY], np.int32)


@dataclasses.dataclass(frozen=True)
class Template:
    """The fixed strings of a prompt. Travels with a model, in relevance.json, under its checksum."""

    query: str = "\nQuery: "
    context: str = "\nContext: "
    document: str = "\nDocument: "
    slot: str = "\nGrade: "

    @property
    def checksum(self) -> str:
        """First 16 hex digits of the SHA-256 of the template's canonical JSON."""
        text = json.dumps([2, dataclasses.asdict(self), _KEYS], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]


@dataclasses.dataclass(frozen=True)
class Parsed:
    """A well-formed answer: the label's index on the scale, the explanation, and the verdict's index."""

    label: int
    explanation: Explanation
    verdict: int


def one_line(text: str) -> str:
    """Runs of white space become one blank."""
    return " ".join(text.split())


def query_text(judgment: Judgment) -> str:
    """What its query says, whatever the blanks and the Unicode form: by it queries are the same."""
    return unicodedata.normalize("NFC", one_line(judgment.query.text))


def query_texts(judgments: Iterable[Judgment]) -> set[str]:
    """`query_text` of each."""
    return set(map(query_text, judgments))


def render_instruction(instruction: Instruction) -> str:
    """Task, scale and rules as the head of a prompt."""
    scale = instruction.scale
    meanings = scale.meanings or ("",) * len(scale)
    grades = [f"{label} {meaning}" for label, meaning in zip(scale.labels, meanings, strict=True)]
    rules = [f"{rule.number}. {rule.text}" for rule in instruction.rules]
    return "\n".join([instruction.task, ", ".join(grade.strip() for grade in grades), *rules])


def render_document(document: Document) -> str:
    """Title, text and fields, a line each; what is empty is left out."""
    lines = [one_line(document.title), one_line(document.text)]
    lines += [f"{one_line(name)}: {one_line(value)}" for name, value in document.fields.items() if value]
    return "\n".join(line for line in lines if line)


def render_explanation(explanation: Explanation, verdict: str) -> str:
    """The answer after its label."""
    checks = zip(explanation.need, explanation.facts, explanation.verdicts, strict=True)
    values = ("; ".join(map(" | ".join, checks)), str(explanation.rule), verdict)
    return "".join(f"\n{key}: {value}" for key, value in zip(_KEYS, values, strict=True))


def plain_texts(judgment: Judgment, instruction: Instruction, *, show_rules: bool) -> list[str]:
    """Prompt and answer of a judgment as text, to train a tokenizer on."""
    template, labels = Template(), instruction.scale.labels
    shown = instruction if show_rules else dataclasses.replace(instruction, rules=())
    texts = [
        render_instruction(judgment.query.instruction or shown) + template.query + one_line(judgment.query.text),
        template.document + render_document(judgment.document),
        template.slot + labels[judgment.grade],
    ]
    return texts + ([render_explanation(judgment.explanation, labels[judgment.grade])] if judgment.explanation else [])


def parse_answer(text: str, labels: Sequence[str]) -> Parsed | None:
    """Read an answer strictly; None for anything but exactly this format (`text` without the end-of-text token)."""
    lines = text.split("\n")
    if len(lines) != 1 + len(_KEYS) or lines[0] not in labels:
        return None
    values = []
    for key, line in zip(_KEYS, lines[1:], strict=True):
        if not line.startswith(f"{key}: "):
            return None
        values.append(line[len(key) + 2 :])
    matches, rule, verdict = values
    if verdict not in labels or not (rule.isascii() and rule.isdigit()) or str(int(rule)) != rule:
        return None
    try:
        checks = [check.split(" | ") for check in matches.split("; ")] if matches else []
        need, facts, verdicts = zip(*checks, strict=True) if checks else ((), (), ())
        explanation = Explanation(need, facts, tuple(Match(word) for word in verdicts), int(rule))
    except ValueError:
        return None
    return Parsed(labels.index(lines[0]), explanation, labels.index(verdict))


@dataclasses.dataclass(frozen=True)
class PromptTokens:
    """A prompt in its parts; `prefix` is the same array for all documents of a query under one instruction."""

    prefix: np.ndarray
    document: np.ndarray  # truncated, with the slot after it

    @property
    def tokens(self) -> np.ndarray:
        return np.concatenate([self.prefix, self.document])


class AnswerFormat:
    """Template, instruction and tokenizer together: judgments to tokens, and tokens to answers.

    Args:
        max_document_tokens: documents are cut to so many tokens; instruction, query and slot never are.
        show_rules: whether the prompt lists the numbered rules (a small model learns them instead of reading them).

    Raises:
        ValueError: a label that is not a single token after the slot.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        instruction: Instruction,
        *,
        template: Template | None = None,
        max_document_tokens: int = 256,
        show_rules: bool = True,
    ):
        self.tokenizer, self.instruction, self.template = tokenizer, instruction, template or Template()
        self.max_document_tokens, self.show_rules = max_document_tokens, show_rules
        self.labels = instruction.scale.labels
        self.label_ids = label_token_ids(tokenizer, self.template.slot, self.labels)
        shown = instruction if show_rules else dataclasses.replace(instruction, rules=())
        self._head = render_instruction(shown)
        self._slot = np.array(tokenizer.encode(self.template.slot), np.int32)
        # The last entry stands for ids beyond the tokenizer.
        self._newlines = tokenizer.newlines(tokenizer.vocab_size + 1)
        self._evidence = {match: tokenizer.encode(word)[0] for match, word in EVIDENCE.items()}
        self._prefix_tokens = functools.lru_cache(maxsize=4096)(self._encode_prefix)
        self._documents: BoundedCache[np.ndarray] = BoundedCache(DOCUMENT_BYTES)
        self._lock = threading.Lock()

    @property
    def slot_size(self) -> int:
        """Tokens of the slot, which end every prompt."""
        return len(self._slot)

    def prefix_text(self, query: Query) -> str:
        """Instruction and query. A query's own instruction stands in place of the format's, its rules always shown."""
        context = f"{self.template.context}{one_line(query.context)}" if query.context else ""
        own = query.instruction
        if own and own.scale.labels != self.labels:
            labels = own.scale.labels
            raise ValueError(f"query {query.query_id!r}: its instruction has labels {labels}, not {self.labels}")
        head = render_instruction(own) if own else self._head
        return f"{head}{self.template.query}{one_line(query.text)}{context}"

    def document_text(self, document: Document) -> str:
        """The document part, before truncation."""
        return f"{self.template.document}{render_document(document)}"

    @functools.cached_property
    def head_tokens(self) -> np.ndarray:
        """The tokens that prompts begin with whatever the query: the instruction, as far as no query changes them."""
        return self._tokens_before_anything(self.prefix_text(Query("", "")))

    @functools.cached_property
    def document_head_size(self) -> int:
        """How many tokens of a prompt's document part come before the document, whatever that is."""
        return len(self._tokens_before_anything(self.template.document))

    def _tokens_before_anything(self, text: str) -> np.ndarray:
        bare = text.rstrip()  # a blank at its end may become one token with what follows
        one, *others = (np.array(self.tokenizer.encode(text), np.int32) for text in (bare, bare + " a", bare + " 7 b"))
        while not all(np.array_equal(one, other[: len(one)]) for other in others):
            one = one[:-1]
        return one

    def encode_prompts(self, pairs: Sequence[tuple[Query, Document]], salt: bytes = b"") -> list[PromptTokens]:
        """Tokens of prompts, the last of which predicts the label. May be called from any thread.

        Tokens of queries and documents are kept for the next call with the same salt: nobody can tell from the time
        what those with another have asked.
        """
        documents = self._document_tokens([self.document_text(document) for _, document in pairs], salt)
        return [
            PromptTokens(self._prefix_tokens(query, salt), document)
            for (query, _), document in zip(pairs, documents, strict=True)
        ]

    def _document_tokens(self, texts: Sequence[str], salt: bytes) -> list[np.ndarray]:
        """Of each document: its tokens, truncated, with the slot after them."""
        with self._lock:
            known = {text: self._documents.get((salt, text)) for text in texts}
        missing = [text for text, tokens in known.items() if tokens is None]
        for text, tokens in zip(missing, self.tokenizer.encode_batch(missing), strict=True):
            cut = np.array(tokens[: self.max_document_tokens], np.int32)
            known[text] = np.concatenate([cut, self._slot])
        with self._lock:
            for text in missing:
                self._documents.put((salt, text), known[text], sys.getsizeof(text) + known[text].nbytes)
        return [known[text] for text in texts]

    def encode_answer(self, judgment: Judgment) -> tuple[np.ndarray, np.ndarray]:
        """(tokens, segments) of the gold answer; the label alone where the judgment has no explanation."""
        label = self.label_ids[judgment.grade]
        if judgment.explanation is None:
            return np.array([label], np.int32), np.array([LABEL], np.int32)
        text = render_explanation(judgment.explanation, self.labels[judgment.grade])
        tokens = np.array([label, *self.tokenizer.encode(text), self.tokenizer.eos], np.int32)
        return tokens, self.segments(tokens)

    def encode_evidence(self, judgment: Judgment, document: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(places, tokens): in the encoded document, the last token of each field's line, and what its state may be
        asked to say there: " met", " violated", " unknown" or " free" (the first token of the word)."""
        line = np.cumsum(self._newlines[document])
        whole = len(document) - len(self._slot) < self.max_document_tokens
        last = int(line[len(document) - len(self._slot) - 1]) - (not whole)
        heads = bool(judgment.document.title.strip()) + bool(judgment.document.text.strip())
        places, tokens = [], []
        shown = (name for name, value in judgment.document.fields.items() if value)
        for number, name in enumerate(shown, start=heads + 1):
            if number <= last and name in judgment.evidence:
                places.append(int(np.searchsorted(line, number, side="right")) - 1)
                tokens.append(self._evidence[judgment.evidence[name]])
        return np.array(places, np.int32), np.array(tokens, np.int32)

    def segments(self, tokens: np.ndarray) -> np.ndarray:
        """The segment of each answer token [..., A], by the line it stands on; the first token is always the label."""
        line = np.cumsum(self._newlines[np.minimum(tokens, self.tokenizer.vocab_size)], axis=-1)
        line[..., 1:] = np.maximum(line[..., 1:], 1)
        line[..., 0] = 0
        return _SEGMENT_OF_LINE[np.minimum(line, len(_SEGMENT_OF_LINE) - 1)]

    def parse(self, tokens: np.ndarray) -> Parsed | None:
        """Read generated tokens, end-of-text included; None where the answer is malformed or was cut off."""
        if len(tokens) == 0 or tokens[-1] != self.tokenizer.eos or tokens[0] not in self.label_ids:
            return None
        if np.max(tokens) >= self.tokenizer.vocab_size:  # has no text: it would be overlooked
            return None
        label = self.labels[self.label_ids.index(tokens[0])]
        parsed = parse_answer(label + self.tokenizer.decode(tokens[1:-1].tolist()), self.labels)
        return parsed if parsed and self.labels[parsed.label] == label else None  # "1" and then "0" is no "10"

    def _encode_prefix(self, query: Query, salt: bytes) -> np.ndarray:
        return np.array(self.tokenizer.encode(self.prefix_text(query)), np.int32)
