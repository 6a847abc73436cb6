"""The prompt grammar: weights as in AUTOMATIC1111's web UI, sections, LoRAs, chunks, and malicious prompts."""

import contextlib
import time

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from triptych.errors import ConfigError
from triptych.models.tokenization.prompt_schedule import schedule, split_prompts
from triptych.models.tokenization.prompt_syntax import (
    Lora,
    WeightedText,
    extract_loras,
    literal,
    pack,
    parse_prompt,
    refuse_foreign_syntax,
)

# Of the grammar, and of no meaning in a caption.
PARTS = ("a", " ", "(", ")", "[", "]", "\\", ":1.3", "BREAK", "AND", "|", "{", "}", "__", "<lora:x:1>", "\n")
# Written as that program's own documentation writes them: text and weight of each piece.
WEIGHTS = {
    "": [],
    "normal text": [("normal text", 1.0)],
    "an (important) word": [("an ", 1.0), ("important", 1.1), (" word", 1.0)],
    "a [dull] word": [("a ", 1.0), ("dull", 1 / 1.1), (" word", 1.0)],
    "a (red:1.3) apple": [("a ", 1.0), ("red", 1.3), (" apple", 1.0)],
    "((a)) [[b]]": [("a", 1.21), (" ", 1.0), ("b", 1 / 1.21)],
    "(unbalanced": [("unbalanced", 1.1)],
    "[unbalanced": [("unbalanced", 1 / 1.1)],
    "unbalanced)]": [("unbalanced)]", 1.0)],
    r"\(literal\]": [("(literal]", 1.0)],
    r"\[a\) \\ b\c": [(r"[a) \ bc", 1.0)],
    "(unnecessary)(parens)": [("unnecessaryparens", 1.1)],
    "()[]": [],
    "a (((house:1.3)) [on] a (hill:0.5), sun, (((sky))).": [
        ("a ", 1.0), ("house", 1.573), (" ", 1.1), ("on", 1.0), (" a ", 1.1), ("hill", 0.55), (", sun, ", 1.1),
        ("sky", 1.4641), (".", 1.1),
    ],
    "(a [b) c]": [("a ", 1.1), ("b", 1.0), (" c", 1 / 1.1)],
    "[square:1.2]": [("square:1.2", 1 / 1.1)],
    "(a: 0.5 )(b:+2)(c:-1)(d:.5)(e:2.)": [("a", 0.5), ("b", 2.0), ("c", -1.0), ("d", 0.5), ("e", 2.0)],
    "(a:0)": [("a", 0.0)],
    "at 12:30)": [("at 12:30)", 1.0)],
    "(ratio 1:2:1.5)": [("ratio 1:2", 1.5)],
    "(a:1.2.3)(b:one)": [("a:1.2.3b:one", 1.1)],
    "BREAKFAST": [("BREAKFAST", 1.0)],
    "日本 (語:1.2)": [("日本 ", 1.0), ("語", 1.2)],
}  # fmt: skip


@pytest.mark.parametrize("prompt", WEIGHTS)
def test_weights(prompt):
    (section,) = parse_prompt(prompt)
    assert [piece.text for piece in section] == [text for text, _ in WEIGHTS[prompt]]
    assert [piece.weight for piece in section] == pytest.approx([weight for _, weight in WEIGHTS[prompt]])


@given(st.lists(st.sampled_from(PARTS), max_size=30))
@example("BREAK (a:1.3) <lora:x:1> [b] \\( BREAKBREAK")
def test_literal_text_is_read_as_it_is(words):
    text = "".join(words)
    (section,) = parse_prompt(literal(text))
    assert "".join(piece.text for piece in section) == text
    assert all(piece.weight == 1 for piece in section)
    assert extract_loras(literal(text))[1] == []
    refuse_foreign_syntax(literal(text))
    assert split_prompts(literal(text)) == [(literal(text), 1.0)]
    assert {shown for _, shown in schedule(literal(text), 9)} == {literal(text)}


def test_break_divides_also_inside_brackets():
    assert parse_prompt("a red apple BREAK a cat") == [
        [WeightedText("a red apple", 1.0)],
        [WeightedText("a cat", 1.0)],
    ]
    assert parse_prompt("(a BREAK b:2) c") == [
        [WeightedText("a", 2.0)],
        [WeightedText("b", 2.0), WeightedText(" c", 1.0)],
    ]
    assert parse_prompt("BREAK") == [[], []]


def test_weights_beyond_reason():
    with pytest.raises(ConfigError, match=r"the weight of 'x' is 5e\+04, which must be at most 10000"):
        parse_prompt("a (x:50000)")
    with pytest.raises(ConfigError, match="the weight of 'x' is inf"):
        parse_prompt("(" * 9000 + "x")


def test_loras_are_taken_out():
    assert extract_loras("a <lora:ink:0.5>cat <lora: my style > x") == (
        "a cat  x",
        [Lora("ink", 0.5), Lora("my style", 1.0)],
    )
    assert extract_loras("a <b> <lora> c < lora:x>")[1] == []
    assert extract_loras("<lora:x:-1>") == ("", [Lora("x", -1.0)])


@pytest.mark.parametrize(
    ("tag", "weight"),
    [
        ("<lyco:x:0.5>", 0.5),
        ("<lora:x:0.8:0.5>", (0.8, 0.5)),
        ("<lora:x:0.5:0.5>", 0.5),
        ("<lora:x:te=0.3>", 0.3),
        ("<lora:x:unet=0.3>", (1.0, 0.3)),
        ("<lora:x:0.8:unet=0>", (0.8, 0.0)),
    ],
)
def test_text_encoder_and_unet_have_weights_of_their_own(tag, weight):
    """The first number is of the text encoder, and of the UNet where it has none, as in the web UI."""
    assert extract_loras(tag) == ("", [Lora("x", weight)])


@pytest.mark.parametrize(
    ("prompt", "words"),
    [
        ("a <hypernet:ink:1> cat", "'<hypernet:ink:1>': hypernetworks"),
        ("a {red|green} cat", r"'\{red\|green\}': variants"),
        ("a __color/warm__ cat", "'__color/warm__': wildcards"),
        ("a <segment:face> cat", "'<segment:face>': such a tag"),
    ],
)
def test_syntax_of_extensions_is_refused_by_name(prompt, words):
    with pytest.raises(ConfigError, match=words):
        refuse_foreign_syntax(prompt)
    refuse_foreign_syntax(literal(prompt))


@pytest.mark.parametrize(
    "prompt", ["a <cat> {cat} __ cat snake_case __init", r"\{a|b\} \__x__ \<a:b>", "a | b"]
)
def test_text_that_only_looks_like_syntax(prompt):
    refuse_foreign_syntax(prompt)


@pytest.mark.parametrize(
    "tag", ["<lora:x:much>", "<lora::1>", "<lora:x:>", "<lora:x:nan>", "<lora:x:1:2:3>", "<lora:x:1:dyn=4>"]
)
def test_loras_without_a_name_or_a_number(tag):
    with pytest.raises(ConfigError, match="must be a"):
        extract_loras(f"a cat {tag}")


def letters(text: str) -> list[tuple[int, ...]]:
    """A tokenizer with one token per letter, and three that stay together per digit."""
    return [(100, 101, 102) if c.isdigit() else (ord(c),) for c in text]


def test_chunks_hold_the_tokens_in_order_with_their_weights():
    chunks = pack(parse_prompt("abc(def:2)g"), letters, 3)
    assert chunks == [
        [(97, 1.0), (98, 1.0), (99, 1.0)],
        [(100, 2.0), (101, 2.0), (102, 2.0)],
        [(103, 1.0)],
    ]


def test_chunks_do_not_cut_spans():
    assert [[i for i, _ in chunk] for chunk in pack(parse_prompt("ab1c1"), letters, 4)] == [
        [97, 98],
        [100, 101, 102, 99],
        [100, 101, 102],
    ]


def test_sections_start_chunks():
    def lengths(prompt):
        return [len(chunk) for chunk in pack(parse_prompt(prompt), letters, 3)]

    assert lengths("") == [0]
    assert lengths("abcdBREAK") == [3, 3, 3]
    assert lengths("abcd BREAK ab") == [3, 1, 2]
    assert lengths("ab BREAK") == [2]
    assert lengths("BREAK ab") == [0, 2]
    assert lengths("a BREAK BREAK b") == [1, 0, 1]


@pytest.mark.parametrize(
    "prompt",
    ["word, " * 5000, "(x:1.1) " * 4000, "(" + "[" * 3000 + "(a:1)" + "]" * 3000, ": " * 10000, ":" + "1" * 100000,
     ":" + " " * 100000, " " * 100000 + "BREA", "\\" * 10000, "<lora:" * 10000, "([" * 40 + "a", "BREAK " * 5000,
     "[" * 3000 + "a" + ":b:0.5]" * 3000, "[a|" * 3000 + "]" * 3000, "{" * 9000, "_" * 9000, "a :1 AND " * 3000],
    ids=lambda prompt: f"{prompt[:10]!r}",
)  # fmt: skip
def test_hostile_prompts_take_no_time(prompt):
    started = time.perf_counter()
    text, _ = extract_loras(prompt)
    refuse_foreign_syntax(text)
    with contextlib.suppress(ConfigError):  # a weight of 100,000 digits
        for part, _ in split_prompts(text):
            schedule(part, 4)
    pack(parse_prompt(text), letters, 75)
    assert time.perf_counter() - started < 10  # far below 1 s; squares of the length would take far more
