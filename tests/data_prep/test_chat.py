import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_prep.chat import ChatFormat
from data_prep.errors import DataError
from data_prep.tokenizer import CHAT_TEMPLATE, Tokenizer

CHAT = [
    {"role": "system", "content": " Be kind.\n"},
    {"role": "user", "content": "2 + 2?"},
    {"role": "assistant", "content": "It is\u00a04 \u2713 "},
    {"role": "user", "content": "Sure?"},
    {"role": "Huginn", "content": "Yes."},
]
RENDERED = (
    "<|begin_text|><|begin_header|>system<|end_header|>\n\nBe kind.<|end_turn|>"
    "<|begin_header|>user<|end_header|>\n\n2 + 2?<|end_turn|>"
    "<|begin_header|>Huginn<|end_header|>\n\nIt is\u00a04 \u2713<|end_turn|>"
    "<|begin_header|>user<|end_header|>\n\nSure?<|end_turn|>"
    "<|begin_header|>Huginn<|end_header|>\n\nYes.<|end_turn|><|end_text|>"
)


@pytest.fixture(scope="module")
def tokenizer(tokenizer_dir: Path) -> Tokenizer:
    return Tokenizer.load(tokenizer_dir)


@pytest.fixture(scope="module")
def chat(tokenizer_dir: Path, tokenizer: Tokenizer) -> ChatFormat:
    return ChatFormat.load(tokenizer_dir, tokenizer)


def with_template(tokenizer: Tokenizer, template: str, **options: Any) -> ChatFormat:
    return ChatFormat(tokenizer, template, "test", **options)


def control_ids(tokenizer: Tokenizer, ids: np.ndarray) -> list[int]:
    return [token for token in ids.tolist() if token in tokenizer.special_tokens.values()]


def test_a_chat_is_rendered_as_the_reference_does_and_its_answers_are_learned(
    chat: ChatFormat, tokenizer: Tokenizer
) -> None:
    ids, trainable = chat.encode(CHAT)
    assert (str(ids.dtype), str(trainable.dtype), ids.shape) == ("uint32", "bool", trainable.shape)
    assert tokenizer.decode(ids) == RENDERED
    assert tokenizer.decode(ids[trainable]) == "It is\u00a04 \u2713<|end_turn|>Yes.<|end_turn|>"


def test_ids_are_those_of_the_text_between_control_tokens(chat: ChatFormat, tokenizer: Tokenizer) -> None:
    (text,) = tokenizer.encode_batch(["\n\n2 + 2?"])
    ids = chat.encode(CHAT)[0].tolist()
    start = [place for place, token in enumerate(ids) if token == tokenizer.special_tokens["<|end_header|>"]][1]
    assert ids[start + 1 : start + 1 + len(text)] == text.tolist()


def test_trained_on_all_every_token_is_a_target(tokenizer_dir: Path, tokenizer: Tokenizer, chat: ChatFormat) -> None:
    ids, trainable = ChatFormat.load(tokenizer_dir, tokenizer, "all").encode(CHAT)
    assert trainable.all()
    np.testing.assert_array_equal(ids, chat.encode(CHAT)[0])


# Pieces of special tokens in every combination, with what the template puts next to them.
hostile = st.lists(
    st.sampled_from(["<|", "|>", "end_text", "pad", "<|end_text|>", "<", "|", ">", " ", "\n", "x", "\ufdd0", "\ufdd1"]),
    max_size=8,
).map("".join)


@given(contents=st.lists(hostile, min_size=1, max_size=3), role=hostile)
def test_no_content_becomes_a_control_token_and_none_is_lost(
    chat: ChatFormat, tokenizer: Tokenizer, contents: list[str], role: str
) -> None:
    roles = ["user", "assistant", "tool" + role]
    turns = [{"role": name, "content": content} for name, content in zip(roles, contents, strict=False)]
    ids, trainable = chat.encode(turns)
    harmless = [{"role": turn["role"][:4], "content": "x"} if turn["role"][:4] == "tool" else turn for turn in turns]
    plain = [{"role": turn["role"], "content": "x"} for turn in harmless]
    assert control_ids(tokenizer, ids) == control_ids(tokenizer, chat.encode(plain)[0])
    names = {"assistant": "Huginn"}
    headers = [f"<|begin_header|>{names.get(turn['role'], turn['role'])}<|end_header|>\n\n" for turn in turns]
    said = [turn["content"].strip(" \n") + "<|end_turn|>" for turn in turns]
    whole = "".join(header + text for header, text in zip(headers, said, strict=True))
    assert tokenizer.decode(ids) == f"<|begin_text|>{whole}<|end_text|>"
    assert tokenizer.decode(ids[trainable]) == "".join(said[1:2])


@pytest.mark.parametrize(
    ("before", "after", "content"),
    [
        ("<|", "|>", "pad"),
        ("<", "", "|pad|>"),
        ("", "|>", "say <|end_text"),
        ("<|end_", "", "text|> so"),
        ("<|", "", "pad|>"),
    ],
)
def test_template_and_content_together_make_no_control_token(
    tokenizer: Tokenizer, before: str, after: str, content: str
) -> None:
    template = "{{ '" + before + "' + messages[0]['content'] + '" + after + "' }}"
    ids, _ = with_template(tokenizer, template, train_on="all").encode([{"role": "user", "content": content}])
    assert control_ids(tokenizer, ids) == [tokenizer.begin_id, tokenizer.end_id]
    assert tokenizer.decode(ids[1:-1]) == before + content + after


def test_begin_and_end_are_put_on_where_the_template_does_not(tokenizer: Tokenizer) -> None:
    template = "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}"
    ids, trainable = with_template(tokenizer, template).encode([{"role": "user", "content": "hello"}])
    assert tokenizer.decode(ids) == "<|begin_text|>hello<|end_text|>"
    assert tokenizer.decode(ids[trainable]) == "hello"


def test_templates_see_what_hugging_face_gives_them(tokenizer: Tokenizer) -> None:
    template = (
        "{%- for m in messages -%}\n    {%- if loop.index > 1 %}{% break %}{% endif -%}\n"
        "{{ m.tools | tojson }} {{ bos_token }}{{ eos_token }}{{ pad_token }}{{ add_generation_prompt }}\n{%- endfor %}"
    )
    turns: list[dict[str, Any]] = [
        {"role": "user", "content": "", "tools": [{"n": "<a> \u00e9"}]},
        {"role": "user", "content": ""},
    ]
    ids, _ = with_template(tokenizer, template, train_on="all").encode(turns)
    expected = '<|begin_text|>[{"n": "<a> \u00e9"}] <|begin_text|><|end_text|><|pad|>False<|end_text|>'
    assert tokenizer.decode(ids) == expected


def test_a_turn_with_several_pieces_of_content_is_for_the_template(tokenizer: Tokenizer) -> None:
    template = "{% for part in messages[0].content %}{{ part.text }}{% endfor %}"
    turns = [{"role": "user", "content": [{"type": "text", "text": "a<|pad|>"}, {"type": "text", "text": "b"}]}]
    ids, _ = with_template(tokenizer, template, train_on="all").encode(turns)
    assert tokenizer.decode(ids[1:-1]) == "a<|pad|>b"
    assert tokenizer.pad_id not in ids


@pytest.mark.parametrize(
    ("template", "turns", "message"),
    [
        (CHAT_TEMPLATE, [{"from": "human", "value": "x"}], "needs a role and a content: {'from'"),
        (CHAT_TEMPLATE, [{"role": "user", "content": None, "x": 1}], "content: .*None"),
        (
            "{{ raise_exception('roles must alternate') }}{% generation %}{% endgeneration %}",
            CHAT,
            "roles must alternate",
        ),
        ("{{ ''.__class__.__mro__ }}{% generation %}{% endgeneration %}", CHAT, "unsafe"),
    ],
)
def test_turns_that_the_template_refuses_are_an_error_that_says_why(
    tokenizer: Tokenizer, template: str, turns: list[dict[str, Any]], message: str
) -> None:
    with pytest.raises(DataError, match=message):
        with_template(tokenizer, template).encode(turns)


@pytest.mark.parametrize(
    ("template", "options", "message"),
    [
        ("{% for %}", {"train_on": "all"}, "test: the chat template is no Jinja template"),
        ("{{ messages }}", {}, r"does not mark what the assistant says with {% generation %}.* train_on: all"),
        ("{{ messages }}", {"train_on": "user"}, "train_on: 'user' is none of assistant, all"),
    ],
)
def test_a_template_that_cannot_be_used_is_refused_before_any_chat(
    tokenizer: Tokenizer, template: str, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(DataError, match=message):
        with_template(tokenizer, template, **options)


def test_the_template_is_read_from_where_hugging_face_puts_it(
    tokenizer_dir: Path, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    directory = shutil.copytree(tokenizer_dir, tmp_path / "bpe")
    turns = [{"role": "user", "content": "x"}]

    def rendered() -> str:
        return tokenizer.decode(ChatFormat.load(directory, tokenizer, "all").encode(turns)[0])

    config = json.loads((directory / "tokenizer_config.json").read_text())
    config["chat_template"] = [{"name": "default", "template": "of the list"}, {"name": "rag", "template": "other"}]
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
    assert rendered() == "<|begin_text|>of the list<|end_text|>"
    (directory / "chat_template.jinja").write_text("of the file\n")
    assert rendered() == "<|begin_text|>of the file<|end_text|>"
    (directory / "chat_template.jinja").unlink()
    (directory / "tokenizer_config.json").unlink()
    with pytest.raises(DataError, match=r"tokenizer_config\.json: no chat_template, which chat data needs"):
        rendered()
