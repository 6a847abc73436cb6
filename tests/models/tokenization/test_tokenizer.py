"""Tokenizers against transformers' on the same vocabularies; files in both directions; added tokens."""

import copy
import json
import random

import pytest
from transformers import AutoTokenizer, BertTokenizer, CLIPTokenizer

from triptych.errors import TriptychError
from triptych.models.tokenization.files import load_tokenizer, save_tokenizer
from triptych.models.tokenization.tokenizer import (
    Tokenizer,
    bert_tokenizer,
    clip_tokenizer,
    clip_vocabulary,
    train_tokenizer,
)

pytestmark = pytest.mark.proves(
    "Prompts and generation metadata", "tokenizers of CLIP and BERT", by="transformers", writes=True
)

TEXTS = [
    "", " ", "a red apple", "  A   RED\tapple\r\n\n", "don't it's we'LL I'd they've", "naïve café Ünïcödé ŠŽ e\u0301",
    "日本語のテキスト", "नमस्ते दुनिया ไทย 한국어", "🍎🍏👩‍👩‍👧‍👦 🏳️‍🌈", "1234 3.14 ⅷ ½ ١٢", "!!!???... #@%^",
    "ﬁ ﬂ İstanbul ẞ",
    "\x00\x01 \u200b\ufeff x\u00a0y\u2003z", "&amp; &lt;b&gt;", "new-york_city's http://a.b/c?d=e", "𝓯𝓪𝓷𝓬𝔂 \U0010ffff",
    "<|endoftext|> a <|STARTOFTEXT|> [SEP] [mask]", "a" * 10_000, "red apple, " * 900, "''''ssss 'tis 's'S",
]  # fmt: skip
WORDS = [
    "[PAD]",
    "[UNK]",
    "[CLS]",
    "[SEP]",
    "[MASK]",
    *"abcdefghijklmnopqrstuvwxyz,.!'1234",
    "##s",
    "##e",
    "##pple",
    "red",
    "the",
]


def scribbles(count: int) -> list[str]:
    """Random strings of letters, accents, other scripts and emoji."""
    draw = random.Random(0)
    ranges = [(32, 127), (32, 0x2FF), (0x20, 0xD000), (0x1F300, 0x1F700)]
    return [
        "".join(chr(draw.randrange(*draw.choice(ranges))) for _ in range(draw.randrange(40)))
        for _ in range(count)
    ]


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory):
    """CLIP's vocabulary as published folders hold it, padding with "!" as SD 2's does."""
    folder = tmp_path_factory.mktemp("clip")
    vocabulary, merges = clip_vocabulary()
    (folder / "vocab.json").write_text(json.dumps(vocabulary), encoding="utf-8")
    lines = "".join(f"{a} {b}\n" for a, b in merges)
    (folder / "merges.txt").write_text(f"#version: 0.2\n{lines}", encoding="utf-8")
    (folder / "special_tokens_map.json").write_text('{"pad_token": "!"}')
    end = {"__type": "AddedToken", "content": "<|endoftext|>", "normalized": False}
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"pad_token": "<|endoftext|>", "eos_token": end})
    )
    return folder


def test_clip_is_transformers_clip():
    theirs, ours = CLIPTokenizer(*map(copy.copy, clip_vocabulary())), clip_tokenizer()
    assert (ours.start, ours.end, ours.pad, ours.size) == (49406, 49407, 49407, 49408)
    for text in TEXTS + scribbles(300):
        ids = theirs(text, padding="max_length", truncation=True, max_length=77)["input_ids"]
        assert ours.framed(ours.ids(text), 77, ours.pad) == ids, text


def test_clips_own_numbers():
    """Numbers that CLIP's published checkpoints were trained with."""
    ids = clip_tokenizer().ids
    assert ids("a diagram") == [320, 22697]
    assert ids("a photo of a cat") == [320, 1125, 539, 320, 2368]
    assert ids("!") == [256]
    assert clip_tokenizer().text(ids("A  photo of a cat!")) == "a photo of a cat !"


def test_bert_is_transformers_bert(tmp_path):
    (tmp_path / "vocab.txt").write_text("".join(f"{word}\n" for word in WORDS), encoding="utf-8")
    theirs, ours = BertTokenizer.from_pretrained(tmp_path), load_tokenizer(tmp_path / "vocab.txt")
    assert (ours.start, ours.end, ours.pad) == (2, 3, 0)
    for text in [*TEXTS, "The red apples, the Rèd apple!", "x " * 200, *scribbles(300)]:
        ids = theirs(text, padding="max_length", truncation=True, max_length=77)["input_ids"]
        assert ours.framed(ours.ids(text), 77, ours.pad) == ids, text


def test_a_vocab_txt_of_windows_and_one_with_capitals(tmp_path):
    (tmp_path / "vocab.txt").write_bytes("\r\n".join(WORDS).encode())
    assert load_tokenizer(tmp_path).ids("Red") == bert_tokenizer(WORDS).ids("red") == [WORDS.index("red")]
    (tmp_path / "tokenizer_config.json").write_text('{"do_lower_case": false}')
    assert load_tokenizer(tmp_path).ids("Red") == [1]


def test_a_published_clip_folder(clip_folder):
    tokenizer = load_tokenizer(clip_folder)
    assert tokenizer.pad == 0  # where the two files differ, the map of special tokens holds
    assert CLIPTokenizer.from_pretrained(clip_folder).pad_token_id == 0
    assert tokenizer.backend is clip_tokenizer().backend
    assert tokenizer.ids("hello!") == clip_tokenizer().ids("hello!")


def test_a_diffusers_folder_stands_for_its_tokenizer(tmp_path, clip_folder):
    (tmp_path / "tokenizer").symlink_to(clip_folder)
    assert load_tokenizer(tmp_path).ids("a cat") == [320, 2368]


def test_what_transformers_writes(tmp_path, clip_folder):
    theirs = CLIPTokenizer.from_pretrained(clip_folder)
    theirs.add_tokens(["<cat>", "<cat>_1", "<dog>", "<dog>_2"])
    theirs.save_pretrained(tmp_path)
    assert (tmp_path / "tokenizer.json").exists()
    ours = load_tokenizer(tmp_path)
    assert ours.added == {"<cat>": (49408, 49409), "<dog>": (49410,), "<dog>_2": (49411,)}
    assert ours.pad == 0
    assert ours.ids("a <cat>!") == [320, 49408, 49409, 256]


def test_what_we_write_transformers_reads(tmp_path):
    ours = clip_tokenizer().add("<cat>", range(49408, 49411)).add("<dog>", [49411])
    save_tokenizer(ours, tmp_path / "clip", pad=0)
    theirs = CLIPTokenizer.from_pretrained(tmp_path / "clip")
    text = "a photo of <cat> <cat>_1 <cat>_2 and <dog>"
    assert theirs(text)["input_ids"][1:-1] == ours.ids("a photo of <cat> and <dog>")
    assert (theirs.pad_token_id, theirs.model_max_length, len(theirs)) == (0, 77, 49412)
    again = load_tokenizer(tmp_path / "clip")
    assert (again.added, again.pad, again.ids("<CAT>")) == (ours.added, 0, [49408, 49409, 49410])

    save_tokenizer(bert_tokenizer(WORDS), tmp_path / "bert")
    assert BertTokenizer.from_pretrained(tmp_path / "bert")("the reds")["input_ids"] == [
        2,
        *bert_tokenizer(WORDS).ids("the reds"),
        3,
    ]
    assert load_tokenizer(tmp_path / "bert").ids("the reds") == bert_tokenizer(WORDS).ids("the reds")


def test_a_vocabulary_of_ones_own(tmp_path):
    texts = ["a red apple, noto style", "A green apple", "", "日本" * 30, "x" * 10_000] * 3
    ours = train_tokenizer(texts, 300)
    assert ours.backend.to_str() == train_tokenizer(iter(texts), 300).backend.to_str()
    assert ours.size <= 300
    assert len(ours.ids("apple")) == 1
    for text in ["a red apple", "никогда", "🍎", "日 本"]:
        assert ours.text(ours.ids(text)) == text  # every byte has a token
    save_tokenizer(ours, tmp_path, length=32)
    assert AutoTokenizer.from_pretrained(tmp_path)("a red ж")["input_ids"] == [
        ours.start,
        *ours.ids("a red ж"),
        ours.end,
    ]
    again = load_tokenizer(tmp_path)
    assert (again.frame, again.ids("a red ж")) == (ours.frame, ours.ids("a red ж"))
    with pytest.raises(TriptychError, match="at least 259"):
        train_tokenizer(texts, 100)


def test_a_stored_cut_off_and_padding_are_ours_to_decide(tmp_path):
    backend = train_tokenizer(["a red apple"], 259).backend
    backend = type(backend).from_str(backend.to_str())
    backend.enable_truncation(3)
    backend.enable_padding(length=9)
    backend.save(str(tmp_path / "tokenizer.json"))
    assert len(load_tokenizer(tmp_path / "tokenizer.json").ids("apple")) == 6


def test_framing():
    tokenizer = clip_tokenizer()
    assert tokenizer.framed([], 5, 0) == [49406, 49407, 0, 0, 0]
    assert tokenizer.framed([1, 2, 3], 5, 0) == [49406, 1, 2, 3, 49407]
    assert tokenizer.framed([1, 2, 3, 4], 5, 0) == [49406, 1, 2, 3, 49407]


def test_added_tokens():
    tokenizer = clip_tokenizer().add("<cat>", [49408, 49409]).add("my style", [49410])
    assert tokenizer.spans("a <CAT>, My Style") == [(320,), (49408, 49409), (267,), (49410,)]
    assert tokenizer.text(tokenizer.ids("a <cat> in my style")) == "a <cat> in my style"
    assert tokenizer.ids("in my styles") == clip_tokenizer().ids(
        "in my styles"
    )  # part of a word is not a token
    assert tokenizer.ids("<cat><cat>") == [49408, 49409] * 2
    assert clip_tokenizer().added == {}


@pytest.mark.parametrize(
    ("token", "problem"), [("<Cat>", "already"), (" ", "empty"), ("photo</w>", "already")]
)
def test_tokens_that_cannot_be_added(token, problem):
    with pytest.raises(TriptychError, match=problem):
        clip_tokenizer().add("<cat>", [49408]).add(token, [49409])


def test_the_longest_added_token_wins():
    tokenizer = clip_tokenizer().add("<a", [49408]).add("<a b>", [49409])
    assert tokenizer.ids("<a b> <a") == [49409, 49408]


def test_json_both_ways():
    for tokenizer in [
        clip_tokenizer().add("<cat>", [49408, 49409]),
        bert_tokenizer(WORDS),
        train_tokenizer(["a b"], 260),
    ]:
        data = json.loads(json.dumps(tokenizer.to_json()))
        again = Tokenizer.from_json(data)
        assert again.to_json() == data
        assert (again.ids("the <cat>"), again.frame) == (tokenizer.ids("the <cat>"), tokenizer.frame)
    assert len(json.dumps(clip_tokenizer().to_json())) < 200  # the shipped vocabulary is named, not copied
    assert copy.deepcopy(tokenizer) is tokenizer


@pytest.mark.parametrize(
    "data",
    [
        None,
        {},
        {"vocabulary": "{", "frame": [], "added": {}},
        {"vocabulary": "clip", "frame": ["<|startoftext|>"], "added": {}},
        {"vocabulary": "clip", "frame": ["a", "a", "no such"], "added": {}},
        {"vocabulary": "clip", "frame": ["a", "a", "a"], "added": []},
    ],
)
def test_damaged_json(data):
    with pytest.raises(TriptychError, match=r"damaged|no 'no such'"):
        Tokenizer.from_json(data)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("tokenizer.json", b""),
        ("tokenizer.json", b"[]"),
        ("tokenizer.json", b"{}"),
        ("tokenizer.json", b"[" * 100_000),
        ("tokenizer.json", b'{"model": {"type": "BPE", "vocab": {"a": 0}, "merges": []}}'),
        (
            "tokenizer.json",
            b'{"model": {"type": "BPE", "vocab": {}, "merges": ["x"], "end_of_word_suffix": "</w>"}}',
        ),
        ("tokenizer.json", b'{"model": {"vocab": 5}, "added_tokens": [7]}'),
        ("vocab.txt", b"\xff\xfe"),
        ("vocab.txt", b"a\nb\n"),
        ("vocab.txt", b""),
        ("other.txt", b""),
    ],
)
def test_damaged_files(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(TriptychError) as caught:
        load_tokenizer(tmp_path)
    assert "\n" not in str(caught.value)


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(TriptychError, match="does not exist"):
        load_tokenizer(tmp_path / "vocab.txt")


def test_damaged_merges(tmp_path):
    (tmp_path / "vocab.json").write_text('{"a</w>": 0}')
    (tmp_path / "merges.txt").write_text("#version\na b c\n")
    with pytest.raises(TriptychError, match="cannot be read as a tokenizer"):
        load_tokenizer(tmp_path)
