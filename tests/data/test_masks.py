"""What trains: for every family the ids a server would send, and of them the answers and their end tokens."""

from __future__ import annotations

from typing import Any

import pytest

from pronghorn.data.formats import Chat, Pair, RowError, Text
from pronghorn.data.isolated import IsolatedTemplate
from pronghorn.data.options import DataOptions
from pronghorn.data.templates import ChatTemplate, Prefix, RenderError, choose_template, library
from pronghorn.data.tokens import EncodedRow, Encoder
from tests.data.families import CHAT, FAMILIES, family_tokenizer, tokenizer


def encoder(tok: Any, max_length: int = 10_000, **options: Any) -> Encoder:
    chosen = DataOptions(train="unused", **options)
    return Encoder(tok, choose_template(tok, chosen.template, chosen.template_options), chosen, max_length)


def encode(tok: Any, sample: Any, max_length: int = 10_000, **options: Any) -> list[EncodedRow]:
    (result,) = encoder(tok, max_length, **options).encode([sample])
    assert not isinstance(result, RowError), result
    return result


def refusal(tok: Any, sample: Any, **options: Any) -> RowError:
    (result,) = encoder(tok, **options).encode([sample])
    assert isinstance(result, RowError)
    return result


def chat(messages: list[dict[str, Any]], train: tuple[bool | None, ...] | None = None) -> Chat:
    return Chat(messages, train or (None,) * len(messages))


def trained(tok: Any, row: EncodedRow) -> str:
    assert all(label in (-100, token) for label, token in zip(row.labels, row.input_ids, strict=True))
    return str(tok.decode([label for label in row.labels if label != -100]))


def test_every_template_of_the_library_has_a_family() -> None:
    assert set(library()) == set(FAMILIES)


@pytest.mark.parametrize("name", FAMILIES)
def test_family_renders_its_real_format(name: str) -> None:
    tok = family_tokenizer(name)
    assert tok.apply_chat_template(CHAT, tokenize=False) == FAMILIES[name].rendered


@pytest.mark.parametrize("name", FAMILIES)
def test_family_trains_answers_and_end_tokens(name: str) -> None:
    family, tok = FAMILIES[name], family_tokenizer(name)
    rows = encode(tok, chat(CHAT), rewritten="split" if family.splits else "refuse")
    assert "".join(trained(tok, row) for row in rows) == family.trained
    assert len(rows) == (2 if family.splits else 1)
    assert not set(rows[-1].flags) - {"rewritten", "opening"}
    for row, messages in zip(reversed(rows), (CHAT, CHAT[:3]), strict=False):
        assert row.input_ids == tok.apply_chat_template(messages, tokenize=True, return_dict=False)
        assert family.bos is None or row.input_ids.count(tok.bos_token_id) == family.rendered.count(
            family.bos
        )


@pytest.mark.parametrize("name", FAMILIES)
def test_family_last_answer_only(name: str) -> None:
    tok = family_tokenizer(name)
    (row,) = encode(tok, chat(CHAT), loss_on="last_assistant")
    text = trained(tok, row)
    assert "Five." in text and "Four." not in text
    assert any(text.rstrip().endswith(end) for end in ("|>", "</s>", "<end_of_turn>", "｜>"))


def test_all_tokens() -> None:
    tok = family_tokenizer("llama-3")
    (row,) = encode(tok, chat(CHAT), loss_on="all")
    assert row.labels == [-100, *row.input_ids[1:]]


def test_all_but_one_message() -> None:
    tok = family_tokenizer("chatml")
    (row,) = encode(tok, chat(CHAT, (None, False, None, None, None)), loss_on="all")
    assert "Two plus two?" not in trained(tok, row)
    assert trained(tok, row).startswith("system\nBe brief.<|im_end|>")


def test_message_flags_override() -> None:
    tok = family_tokenizer("chatml")
    (row,) = encode(tok, chat(CHAT, (None, None, False, None, None)))
    assert trained(tok, row) == "Five.<|im_end|>"
    (row,) = encode(tok, chat(CHAT, (None, True, False, None, None)))
    assert trained(tok, row) == "<|im_start|>user\nTwo plus two?<|im_end|>Five.<|im_end|>"


def test_no_message_trains() -> None:
    error = refusal(family_tokenizer("chatml"), chat(CHAT, (None, None, False, None, False)))
    assert "no message trains" in error.reason


def test_conversation_without_answer_or_starting_with_one() -> None:
    tok = family_tokenizer("chatml")
    assert "no assistant message" in refusal(tok, chat(CHAT[:2])).reason
    assert refusal(tok, chat(CHAT[2:])).field == "messages[0].role"


def test_trailing_question_does_not_train() -> None:
    tok = family_tokenizer("chatml")
    (row,) = encode(tok, chat(CHAT[:4]))
    assert trained(tok, row) == "Four.<|im_end|>"
    assert tok.decode(row.input_ids).endswith("Plus one?<|im_end|>\n")


def test_answer_that_repeats_markers_and_the_question() -> None:
    """Masks come from where messages lie, so text that looks like a marker moves nothing."""
    tok = family_tokenizer("alpaca")
    messages = [
        {"role": "user", "content": "Say\n\n### Response:\nFour."},
        {"role": "assistant", "content": "### Response:\nFour.\n\n### Instruction:\nFour."},
    ]
    (row,) = encode(tok, chat(messages))
    assert trained(tok, row) == "### Response:\nFour.\n\n### Instruction:\nFour.</s>"


def test_answer_beginning_with_newlines_that_merge_with_the_opening() -> None:
    """Of the newlines shared with the opening the token is the prompt's; nothing before the answer trains."""
    tok = family_tokenizer("chatml")
    (row,) = encode(
        tok, chat([{"role": "user", "content": "x"}, {"role": "assistant", "content": "\nFour."}])
    )
    assert trained(tok, row) == "Four.<|im_end|>"


def test_characters_of_several_tokens() -> None:
    tok = family_tokenizer("chatml")
    answer = "é 漢字 🎉"
    (row,) = encode(tok, chat([{"role": "user", "content": "ß"}, {"role": "assistant", "content": answer}]))
    assert trained(tok, row) == answer + "<|im_end|>"


def test_rewritten_turns_are_refused_by_name() -> None:
    error = refusal(family_tokenizer("qwen-3"), chat(CHAT))
    assert error.field == "messages[2]"
    assert "writes this message differently" in error.reason and "data.rewritten=split" in error.reason


def test_rewritten_last_turn() -> None:
    tok = family_tokenizer("qwen-3")
    (row,) = encode(tok, chat(CHAT), rewritten="last_turn")
    assert trained(tok, row) == "<think>\n\n</think>\n\nFive.<|im_end|>"
    assert "rewritten" in row.flags


def test_reasoning_trains_with_the_answer() -> None:
    tok = family_tokenizer("qwen-3")
    messages = [CHAT[1], {"role": "assistant", "content": "Four.", "reasoning_content": "2 and 2"}]
    (row,) = encode(tok, chat(messages))
    assert trained(tok, row) == "<think>\n2 and 2\n</think>\n\nFour.<|im_end|>"
    assert row.flags == ()


def test_reasoning_the_template_leaves_out_is_flagged() -> None:
    tok = family_tokenizer("chatml")
    messages = [CHAT[1], {"role": "assistant", "content": "Four.", "reasoning_content": "2 and 2"}]
    (row,) = encode(tok, chat(messages))
    assert row.flags == ("lost_text",)


CALLS: list[dict[str, Any]] = [
    {"role": "user", "content": "Weather?"},
    {
        "role": "assistant",
        "content": "",
        "tool_calls": [{"type": "function", "function": {"name": "look", "arguments": {"city": "Oslo"}}}],
    },
    {"role": "tool", "content": "rain"},
    {"role": "assistant", "content": "Rain."},
]


@pytest.mark.parametrize("name", FAMILIES)
def test_templates_of_the_library_refuse_tools_by_name(name: str) -> None:
    """A call left out would train an empty answer, a result in an answer's place the tool's own words."""
    tok = family_tokenizer(name)
    reason = rf"the {name} template of pronghorn writes no tools"
    assert reason in refusal(tok, chat(CALLS)).reason
    assert reason in refusal(tok, Chat(CHAT, (None,) * len(CHAT), [{"name": "look"}])).reason
    results = chat([CALLS[0], CHAT[2], *CALLS[2:]])
    if name != "chatml":  # whose turns may have any role
        assert reason in refusal(tok, results).reason
        return
    (row,) = encode(tok, results)
    assert trained(tok, row) == "Four.<|im_end|>Rain.<|im_end|>"
    assert "<|im_start|>tool\nrain<|im_end|>" in tok.decode(row.input_ids)


@pytest.mark.parametrize("name", FAMILIES)
def test_thoughts_train_or_are_flagged(name: str) -> None:
    tok = family_tokenizer(name)
    apart = {"role": "assistant", "content": "Four.", "reasoning_content": "2 and 2"}
    inline = {"role": "assistant", "content": "<think>2 and 2</think>Four."}
    for answer in (apart, inline):
        (row,) = encode(tok, chat([CHAT[1], answer]))
        kept = "2 and 2" in trained(tok, row)
        assert kept == ("lost_text" not in row.flags)
        assert kept == (name == "qwen-3" or answer is inline)


def test_calls_the_template_leaves_out_are_flagged() -> None:
    template = (
        "{%- for m in messages %}{{ '<|im_start|>' ~ m.role ~ '\\n' ~ m.content ~ '<|im_end|>\\n' }}"
        "{%- endfor %}{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
    )
    (row,) = encode(tokenizer(FAMILIES["chatml"], template), chat(CALLS))
    assert row.flags == ("lost_text",)


def _marked() -> str:
    """Qwen-3's template, which rewrites earlier answers, with its answers marked."""
    text = str(family_tokenizer("qwen-3").chat_template)
    plain = "{{ '<|im_start|>assistant\\n' ~ answer ~ '<|im_end|>\\n' }}"
    assert plain in text
    marked = (
        "{{ '<|im_start|>assistant\\n' }}{% generation %}{{ answer ~ '<|im_end|>' }}{% endgeneration %}"
        "{{ '\\n' }}"
    )
    return text.replace(plain, marked)


@pytest.mark.parametrize("isolated", [False, True])
def test_marks_are_used_where_turns_are_rewritten(isolated: bool) -> None:
    tok = tokenizer(FAMILIES["qwen-3"], _marked())
    own = encoder(tok)
    with IsolatedTemplate(ChatTemplate(tok, _marked(), "tokenizer", True)) as there:
        if isolated:
            own.template = there
        (rows, last) = own.encode([chat(CHAT), chat(CHAT, (None, None, False, None, None))])
    assert not isinstance(rows, RowError) and not isinstance(last, RowError)
    assert trained(tok, rows[0]) == "Four.<|im_end|><think>\n\n</think>\n\nFive.<|im_end|>"
    assert rows[0].flags == ("marks",)
    assert rows[0].input_ids == tok.apply_chat_template(CHAT, return_dict=False)
    assert trained(tok, last[0]) == "<think>\n\n</think>\n\nFive.<|im_end|>"
    # as transformers itself reads them
    given = tok.apply_chat_template(CHAT, return_dict=True, return_assistant_tokens_mask=True)
    assert [label != -100 for label in rows[0].labels] == [bool(one) for one in given["assistant_masks"]]


def test_marks_change_nothing_where_no_turn_is_rewritten() -> None:
    tok = tokenizer(FAMILIES["qwen-3"], _marked())
    (row,) = encode(tok, chat(CHAT[:3]))
    assert row.flags == ()
    assert trained(tok, row) == "<think>\n\n</think>\n\nFour.<|im_end|>"
    assert len(encode(tok, chat(CHAT), rewritten="split")) == 2


def test_marks_that_name_no_message_are_no_help() -> None:
    tok = tokenizer(FAMILIES["qwen-3"], _marked())
    error = refusal(tok, chat(CHAT, (None, True, None, None, None)))  # a question that trains has no mark
    assert "writes this message differently" in error.reason
    twice = _marked().replace("{{ answer ~", "{{ '' }}{% endgeneration %}{% generation %}{{ answer ~")
    assert (
        "writes this message differently" in refusal(tokenizer(FAMILIES["qwen-3"], twice), chat(CHAT)).reason
    )


def test_template_that_raises_on_marks_names_its_row() -> None:
    broken = "{%- if messages | length == 5 and messages[4].role == 'x' %}{% endif %}" + _marked()
    marked = ChatTemplate(tokenizer(FAMILIES["qwen-3"], broken), "{{ raise_exception('no') }}", "x", False)
    found = marked.marked(Prefix(CHAT, 5))
    assert isinstance(found, RenderError) and "TemplateError: no" in found.reason


def test_opening_that_serving_extends() -> None:
    """A server opens the answer with <think>, the row does not: the answer trains, the row is flagged."""
    template = (
        "{%- for m in messages %}{{ '<|im_start|>' ~ m.role ~ '\\n' ~ m.content ~ '<|im_end|>\\n' }}"
        "{%- endfor %}"
        "{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n<think>\\n' }}{% endif %}"
    )
    tok = tokenizer(FAMILIES["chatml"], template)
    (row,) = encode(tok, chat(CHAT))
    assert trained(tok, row) == "Four.<|im_end|>Five.<|im_end|>"
    assert row.flags == ("opening",)


def test_end_token_that_opens_the_next_turn() -> None:
    """GLM: the token before the next question ends the answer; the last answer has none, which is flagged."""
    template = (
        "{%- for m in messages %}{{ '<|' ~ m.role ~ '|>\\n' ~ m.content }}{% endfor %}"
        "{%- if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% endif %}"
    )
    tok = tokenizer(FAMILIES["phi-3"], template)
    (row,) = encode(tok, chat(CHAT))
    assert trained(tok, row) == "Four.<|user|>Five."
    assert row.flags == ("end_token",)


def test_two_bos_are_flagged() -> None:
    family = FAMILIES["llama-3"]
    tok = tokenizer(family, "{{ bos_token }}" + str(family_tokenizer("llama-3").chat_template))
    (row,) = encode(tok, chat(CHAT))
    assert row.flags == ("bos",)


def test_missing_bos_is_flagged() -> None:
    tok = tokenizer(
        FAMILIES["llama-3"], str(family_tokenizer("llama-3").chat_template).replace("{{- bos_token -}}", "")
    )
    (row,) = encode(tok, chat(CHAT))
    assert row.flags == ("no_bos",)


def test_special_tokens_in_a_message_are_flagged() -> None:
    tok = family_tokenizer("chatml")
    (row,) = encode(tok, chat([{"role": "user", "content": "<|im_end|> hi"}, CHAT[2]]))
    assert row.flags == ("special_text",)
    assert trained(tok, row) == "Four.<|im_end|>"


def test_template_that_raises_names_only_its_rows() -> None:
    tok = family_tokenizer("gemma")
    bad = chat([CHAT[1], CHAT[0], CHAT[2]])
    results = encoder(tok).encode([chat(CHAT), bad, chat(CHAT)])
    assert [isinstance(result, RowError) for result in results] == [False, True, False]
    assert "gemma takes one system message" in str(results[1])


def test_prompt_and_completion() -> None:
    tok = family_tokenizer("llama-3")
    (row,) = encode(tok, Pair("Two plus two is", " Four."))
    assert tok.decode(row.input_ids) == "<|begin_of_text|>Two plus two is Four.<|eot_id|>"
    assert trained(tok, row) == " Four.<|eot_id|>"
    served = tok("Two plus two is")["input_ids"]
    assert row.input_ids[: len(served)] == served


def test_prompt_and_completion_with_loss_on_all() -> None:
    tok = family_tokenizer("llama-3")
    (row,) = encode(tok, Pair("Two plus two is", " Four."), loss_on="all")
    assert trained(tok, row) == "Two plus two is Four.<|eot_id|>"


def test_prompt_and_completion_sharing_a_token() -> None:
    """A prompt ending in the space of " Four" keeps the ids a server sends."""
    tok = family_tokenizer("llama-3")
    (row,) = encode(tok, Pair("is ", "Four."))
    served = tok("is ")["input_ids"]
    assert row.input_ids[: len(served)] == served
    assert trained(tok, row) == "Four.<|eot_id|>"


@pytest.mark.parametrize(
    "text", ["Four.", "<|begin_of_text|>Four.", "Four.<|eot_id|>", "<|begin_of_text|>Four.<|eot_id|>"]
)
def test_text_has_one_bos_and_one_eos(text: str) -> None:
    tok = family_tokenizer("llama-3")
    (row,) = encode(tok, Text(text))
    assert tok.decode(row.input_ids) == "<|begin_of_text|>Four.<|eot_id|>"
    assert row.labels == [-100, *row.input_ids[1:]]


def test_text_that_is_a_rendered_chat_ends_at_its_end_token() -> None:
    tok = family_tokenizer("chatml")
    (row,) = encode(tok, Text(FAMILIES["chatml"].rendered))
    assert tok.decode(row.input_ids) == FAMILIES["chatml"].rendered.rstrip()


def test_cut_rows_keep_their_full_length() -> None:
    tok = family_tokenizer("chatml")
    whole = encode(tok, chat(CHAT))[0]
    (row,) = encode(tok, chat(CHAT), max_length=60)
    assert (row.input_ids, row.labels) == (whole.input_ids[:60], whole.labels[:60])
    assert row.full_length == len(whole.input_ids)


def test_tools_and_calls_reach_the_template() -> None:
    template = (
        "{%- for t in tools or [] %}{{ '<|im_start|>tool\\n' ~ t.function.name ~ '<|im_end|>\\n' }}"
        "{%- endfor %}"
        "{%- for m in messages %}{{ '<|im_start|>' ~ m.role ~ '\\n' ~ m.content }}"
        "{%- for c in m.tool_calls or [] %}{{ c.function.name ~ c.function.arguments.city }}{% endfor %}"
        "{{- '<|im_end|>\\n' }}{% endfor %}"
        "{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
    )
    tok = tokenizer(FAMILIES["chatml"], template)
    messages = [
        {"role": "user", "content": "Weather?"},
        {
            "role": "assistant",
            "content": "",
            "tool_calls": [{"type": "function", "function": {"name": "look", "arguments": {"city": "Oslo"}}}],
        },
        {"role": "tool", "content": "rain"},
        {"role": "assistant", "content": "Rain."},
    ]
    tools = [{"type": "function", "function": {"name": "look"}}]
    (row,) = encode(tok, Chat(messages, (None,) * 4, tools))
    assert trained(tok, row) == "lookOslo<|im_end|>Rain.<|im_end|>"
    assert tok.decode(row.input_ids).startswith("<|im_start|>tool\nlook<|im_end|>\n<|im_start|>user")
