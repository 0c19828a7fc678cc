"""From turns of chat to ids and loss mask, through the tokenizer's own template.

Control tokens come from the template alone. A template is a program that mixes its own text with that of the turns,
so the two cannot be told apart in what it renders; therefore the names of special tokens in the turns are broken up by
a mark first, and the marks are taken out of the text between the control tokens afterwards.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt
from jinja2 import Template, TemplateError, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.runtime import Macro
from jinja2.sandbox import ImmutableSandboxedEnvironment

from data_prep.errors import DataError
from data_prep.tokenizer import CONFIG_FILE, TEMPLATE_FILE, Tokenizer, load_chat_template

TrainOn = Literal["assistant", "all"]
TRAIN_ON: tuple[TrainOn, ...] = ("assistant", "all")

Ids = npt.NDArray[np.uint32]
Mask = npt.NDArray[np.bool_]

# Unicode keeps these characters out of all text that is exchanged; those that a chat holds even so are not used.
_NONCHARACTERS = [chr(code) for code in range(0xFDD0, 0xFDF0)]
_CONTENT_KEYS = ("content", "text")
_GENERATION = re.compile(r"\{%-?\s*generation\b")


class _Marks(NamedTuple):
    """Characters that stand in no text of the chat at hand."""

    broken: str  # inside of what would be the name of a special token
    opened: str  # what is to be learned begins
    closed: str


class ChatFormat:
    """A tokenizer's chat template, applied to turns."""

    def __init__(self, tokenizer: Tokenizer, template: str, named: str, train_on: TrainOn = "assistant") -> None:
        """Compile `template` (Jinja, with what Hugging Face adds to it); `named` is what error messages call it.

        Args:
            tokenizer: encodes the text between control tokens.
            template: as in `chat_template` of a tokenizer_config.json.
            named: where it comes from.
            train_on: "assistant" for what the template marks with {% generation %}; "all" for every token.

        Raises:
            DataError: the template does not parse, or does not mark what is to be learned.
        """
        if train_on not in TRAIN_ON:
            raise DataError(f"train_on: {train_on!r} is none of {', '.join(TRAIN_ON)}")
        self._tokenizer, self._named, self._train_on = tokenizer, named, train_on
        self._environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols]
        )
        self._environment.filters["tojson"] = _to_json
        self._environment.globals["raise_exception"] = _raise_exception
        self._template = self._compile(template)
        names = sorted(tokenizer.special_tokens, key=len, reverse=True)
        self._names = re.compile("|".join(map(re.escape, names)))
        self._longest = len(names[0])
        self._beginnings = {name[:length] for name in names for length in range(1, len(name))}
        self._endings = {name[length:] for name in names for length in range(1, len(name))}

    @classmethod
    def load(cls, directory: Path, tokenizer: Tokenizer, train_on: TrainOn = "assistant") -> ChatFormat:
        """Read the template of a tokenizer directory: chat_template.jinja, or else from tokenizer_config.json.

        Raises:
            DataError: there is no template, or it cannot be used.
        """
        template = load_chat_template(directory)
        if template is None:
            raise DataError(
                f"{directory / CONFIG_FILE}: no chat_template, which chat data needs; add one, or make a tokenizer"
                " with `rookery data train-tokenizer`"
            )
        file = directory / TEMPLATE_FILE
        return cls(tokenizer, template, str(file if file.is_file() else directory / CONFIG_FILE), train_on)

    def encode(self, turns: Sequence[Mapping[str, Any]]) -> tuple[Ids, Mask]:
        """Return the ids of a chat, begin and end included, and whether each is a target of the loss.

        Both have shape (tokens,). Begin and end are put on where the template has not done it.

        Args:
            turns: objects with `role` and `content`, and whatever else the template reads.

        Raises:
            DataError: the turns are not of this form, or the template refuses them.
        """
        for turn in turns:
            _refuse_malformed(turn)
        marks = _unused_marks(json.dumps(list(turns), ensure_ascii=False))
        rendered = self._render([self._escaped(dict(turn), None, marks.broken) for turn in turns], marks)
        pieces = re.split(f"({marks.opened}|{marks.closed}|{self._names.pattern})", rendered)
        ids: list[Ids] = []
        masks: list[Mask] = []
        text = _Text()
        learning = self._train_on == "all"
        for number, piece in enumerate(pieces):
            if number % 2 == 0:
                text.add(piece.replace(marks.broken, ""), learning)
            elif piece in (marks.opened, marks.closed):
                learning = self._train_on == "all" or piece == marks.opened
            else:
                self._flush(text, ids, masks)
                text = _Text()
                ids.append(np.array([self._tokenizer.special_tokens[piece]], np.uint32))
                masks.append(np.array([learning]))
        self._flush(text, ids, masks)
        return self._with_begin_and_end(np.concatenate(ids), np.concatenate(masks))

    def _compile(self, template: str) -> Template:
        if self._train_on == "assistant" and not _GENERATION.search(template):
            raise DataError(
                f"{self._named}: the chat template does not mark what the assistant says with {{% generation %}};"
                " mark it, or set train_on: all"
            )
        try:
            return self._environment.from_string(template)
        except TemplateError as error:
            raise DataError(f"{self._named}: the chat template is no Jinja template ({error}); mend it") from error

    def _render(self, turns: list[Any], marks: _Marks) -> str:
        control = self._tokenizer.control
        try:
            return self._template.render(
                messages=turns,
                marks=marks,
                bos_token=control.begin,
                eos_token=control.end,
                pad_token=control.pad,
                add_generation_prompt=False,
            )
        except Exception as error:  # templates raise whatever operations on the data raise
            raise DataError(
                f"{self._named}: the chat template refuses the turns {json.dumps(turns)[:120]} ({error}); mend the"
                " data or the template"
            ) from error

    def _escaped(self, value: Any, key: str | None, mark: str) -> Any:
        """Return `value` with `mark` wherever its strings could become, or become part of, a special token."""
        if isinstance(value, dict):
            return {name: self._escaped(member, name, mark) for name, member in value.items()}
        if isinstance(value, list):
            return [self._escaped(member, key, mark) for member in value]
        if not isinstance(value, str):
            return value
        while self._names.search(value):
            value = self._names.sub(lambda match: match[0][0] + mark + match[0][1:], value)
        return self._with_guarded_edges(value, mark) if key in _CONTENT_KEYS else value

    def _with_guarded_edges(self, text: str, mark: str) -> str:
        """Keep the template's text from making the name of a special token together with `text`.

        Marks stay inside of the outer blanks, which templates trim.
        """
        core = text.strip()
        if not core:
            return text
        start = text.index(core)
        lengths = range(1, min(self._longest, len(core) + 1))
        inside = len(core) < self._longest and any(core in name for name in self._tokenizer.special_tokens)
        before = mark if inside or any(core[:length] in self._endings for length in lengths) else ""
        after = mark if any(core[-length:] in self._beginnings for length in lengths) else ""
        return text[:start] + before + core + after + text[start + len(core) :]

    def _flush(self, text: _Text, ids: list[Ids], masks: list[Mask]) -> None:
        encoded, spans = self._tokenizer.encode_with_spans(text.content)
        ids.append(encoded)
        # A token that reaches into what is learned is learned, though it may begin before.
        learned = np.concatenate([[0], np.cumsum(text.learned())])
        masks.append(learned[spans[:, 1]] > learned[spans[:, 0]])

    def _with_begin_and_end(self, ids: Ids, mask: Mask) -> tuple[Ids, Mask]:
        learning = self._train_on == "all"
        begin, end = np.uint32(self._tokenizer.begin_id), np.uint32(self._tokenizer.end_id)
        if not len(ids) or ids[0] != begin:
            ids, mask = np.concatenate([[begin], ids]), np.concatenate([[learning], mask])
        if ids[-1] != end:
            ids, mask = np.concatenate([ids, [end]]), np.concatenate([mask, [learning]])
        return ids.astype(np.uint32, copy=False), mask.astype(np.bool_, copy=False)


class _Text:
    """Text between two control tokens, and which of it is learned."""

    def __init__(self) -> None:
        self.content = ""
        self._stretches: list[tuple[int, bool]] = []

    def add(self, text: str, learning: bool) -> None:
        self.content += text
        self._stretches.append((len(text), learning))

    def learned(self) -> Mask:
        """Return whether each character is learned."""
        lengths, flags = [length for length, _ in self._stretches], [flag for _, flag in self._stretches]
        return np.repeat(np.array(flags, np.bool_), np.array(lengths, np.int64))


class _Generation(Extension):
    """The tag {% generation %} ... {% endgeneration %}: puts marks around what it encloses."""

    tags = {"generation"}  # noqa: RUF012 - so declared by Jinja

    def parse(self, parser: Parser) -> nodes.Node:
        """Parse the tag and what it encloses."""
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        call = self.call_method("_enclose", [nodes.Name("marks", "load")])
        return nodes.CallBlock(call, [], [], body).set_lineno(line)

    def _enclose(self, marks: _Marks, caller: Macro) -> str:
        return f"{marks.opened}{caller()}{marks.closed}"


def _unused_marks(text: str) -> _Marks:
    unused = [character for character in _NONCHARACTERS if character not in text]
    if len(unused) < len(_Marks._fields):
        raise DataError(f"a chat holds nearly all noncharacters of Unicode: {text[:60]!a}; leave it out or mend it")
    return _Marks(*unused[: len(_Marks._fields)])


def _refuse_malformed(turn: Mapping[str, Any]) -> None:
    # Templates render a null as "None".
    if not (isinstance(turn.get("role"), str) and isinstance(turn.get("content"), str | list)):
        raise DataError(f"a turn of chat needs a role and a content: {ascii(turn)[:120]}; mend it or leave it out")


def _to_json(value: Any, indent: int | None = None) -> str:
    # Jinja's own filter escapes for HTML, which no template for models expects.
    return json.dumps(value, ensure_ascii=False, indent=indent)


def _raise_exception(message: str) -> None:
    raise TemplateError(message)
