"""Tokenizers that take the best sum of scores, against SentencePiece and against enumeration."""

import io
import itertools
import random
import re
import time
import warnings
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from vocabularies import BYTES, plamo_metadata, unigram_metadata

from jaxsplit.errors import JaxsplitError
from jaxsplit.text import Tokenizer

METADATA = {
    "t5": unigram_metadata(),
    "plamo2": plamo_metadata(),
    "plamo3": plamo_metadata(model="plamo3"),
}


@pytest.fixture(scope="module", params=METADATA)
def tokenizer(request) -> Tokenizer:
    return Tokenizer.from_metadata(METADATA[request.param])


def pieces_of(tokenizer: Tokenizer, text: str | bytes, **options: bool) -> list[str]:
    ids = tokenizer.encode(text, add_special=False, **options)
    return [tokenizer.token_text(id) for id in ids]


# --- SentencePiece's unigram model, against SentencePiece

# Options of the trainer, and thus of the normalization.
TRAINED = {
    "nmt_nfkc": {},
    "bytes, no prefix": {"byte_fallback": True, "add_dummy_prefix": False},
    "case folding": {"normalization_rule_name": "nfkc_cf", "byte_fallback": True},
    "identity, all spaces": {
        "normalization_rule_name": "identity",
        "remove_extra_whitespaces": False,
    },
}
ODD_CHARACTERS = (
    " \t\n\u3000\u00a0\u2581\u200b\u0301\u0308\u00a8eéaﬁ½Ⅷカ゛が한\u1112\u1161\u11ab가ßİ😀日本"
    "ATth.,:#`\u0344ﷺ\ufffd\u0f73\x00\x1f"
)


@pytest.fixture(scope="module", params=TRAINED)
def trained(request) -> tuple[Any, Tokenizer, dict[str, Any]]:
    """A model that SentencePiece has trained on this test, the tokenizer of its GGUF file, and the
    options of the trainer."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of SWIG and of protobuf
        import sentencepiece
        from sentencepiece import sentencepiece_model_pb2
    lines = Path(__file__).read_text("utf-8").splitlines() * 2
    written = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([line for line in lines if line.strip()]),
        model_writer=written,
        model_type="unigram",
        vocab_size=600,
        hard_vocab_limit=False,
        minloglevel=2,
        user_defined_symbols=["<tag>"],
        **TRAINED[request.param],
    )
    model = vars(sentencepiece_model_pb2)["ModelProto"].FromString(written.getvalue())
    rules = model.normalizer_spec.precompiled_charsmap
    metadata = {
        "model": "t5",
        "tokens": [piece.piece for piece in model.pieces],
        "scores": [piece.score for piece in model.pieces],
        "token_type": [int(piece.type) for piece in model.pieces],
        "add_space_prefix": model.normalizer_spec.add_dummy_prefix,
        "remove_extra_whitespaces": model.normalizer_spec.remove_extra_whitespaces,
        # The array's type is int8 in some files, uint8 in others.
        "precompiled_charsmap": [byte - 256 if byte > 127 else byte for byte in rules],
        "unknown_token_id": model.trainer_spec.unk_id,
        "eos_token_id": model.trainer_spec.eos_id,
        "bos_token_id": model.trainer_spec.bos_id,
    }
    processor = sentencepiece.SentencePieceProcessor(model_proto=written.getvalue())
    metadata = {f"tokenizer.ggml.{key}": value for key, value in metadata.items()}
    return processor, Tokenizer.from_metadata(metadata), TRAINED[request.param]


characters = st.one_of(
    st.sampled_from(ODD_CHARACTERS), st.sampled_from("the tokenizer in"), st.characters()
)


@settings(max_examples=400, deadline=None)
@given(text=st.text(characters, max_size=24))
def test_unigram_equals_sentencepiece(trained, text):
    """SentencePiece adds scores in float32. Where segmentations are equally good, its rounding
    decides: there, only the text and the score are compared."""
    processor, tokenizer, options = trained
    text = text.encode("utf-8", "replace").decode()  # SentencePiece refuses surrogates.
    expected, found = processor.encode(text), tokenizer.encode(text, add_special=False)
    if found != expected:

        def score(ids: list[int]) -> float:
            return sum(processor.get_score(id) for id in ids)

        def joined(ids: list[int]) -> str:
            return "".join(processor.id_to_piece(ids))

        assert joined(found) == joined(expected)
        assert score(found) == pytest.approx(score(expected), rel=1e-6)
    if options.get("byte_fallback"):  # Nothing is lost but what normalization takes.
        normalized = processor.normalize(text).replace("\u2581", " ")
        prefix = " " if options.get("add_dummy_prefix", True) else ""
        assert tokenizer.decode(found) == normalized.removeprefix(prefix)


def test_unigram_of_invalid_utf8_equals_sentencepiece(trained):
    processor, tokenizer, _ = trained
    for data in (b"a\xff", b"the\xe4b", b"\xed\xa0\x80x", b"\xc0\x80", b"\xf0\x9f\x98"):
        assert tokenizer.encode(data, add_special=False) == processor.encode(data), data


def test_unigram_user_defined_and_control_tokens(trained):
    """Texts between them are texts of their own, as in llama.cpp: SentencePiece adds no space
    after a user-defined token."""
    processor, tokenizer, _ = trained
    tag, eos = processor.piece_to_id("<tag>"), processor.eos_id()
    for text, after in itertools.product(["the ﬁ", "a b"], ["model", "in a"]):
        expected = [*processor.encode(text), tag, *processor.encode(after)]
        assert tokenizer.encode(f"{text}<tag>{after}", add_special=False) == expected
        # Control tokens are recognized only where they may be.
        marked = f"{text}</s>{after}"
        assert tokenizer.encode(marked, add_special=False) == processor.encode(marked)
        assert tokenizer.encode(marked, False, parse_special=True) == [
            *processor.encode(text),
            eos,
            *processor.encode(after),
        ]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", []),
        ("  ", []),
        ("the", ["\u2581the"]),
        ("  the  the ", ["\u2581the", "\u2581the"]),
        ("abc", ["\u2581a", "bc"]),  # -8.5; with "ab": -12.5.
        ("a<tag>a", ["\u2581a", "<tag>", "\u2581a"]),
        ("ß", ["\u2581", "<0xC3>", "<0x9F>"]),
        ("<0x41>", ["\u2581", *("<0x3C>", "<0x30>", "<0x78>", "<0x34>", "<0x31>", "<0x3E>")]),
        (b"a\xff", ["\u2581a", "<0xEF>", "<0xBF>", "<0xBD>"]),
    ],
)
def test_unigram_by_hand(text, expected):
    assert pieces_of(Tokenizer.from_metadata(unigram_metadata()), text) == expected


def test_unigram_without_bytes():
    """Neighboring unknown characters are one unknown token, as in SentencePiece."""
    tokenizer = Tokenizer.from_metadata(unigram_metadata(bytes=False))
    assert pieces_of(tokenizer, "aßßa") == ["\u2581a", "<unk>", "a"]
    assert pieces_of(tokenizer, "<unk>") == ["\u2581", "<unk>"]  # The characters, not the name.
    assert tokenizer.decode(tokenizer.encode("aßa")) == "aa"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"scores": None}, "scores is missing"),
        ({"precompiled_charsmap": [1, 2]}, "precompiled_charsmap has 2 bytes, .*is damaged"),
        ({"precompiled_charsmap": [8, 0, 0, 0] + [0] * 4}, "trie should end at byte 12"),
        ({"unknown_token_id": -1}, "neither the tokens <0x00> to <0xFF> nor an unknown token"),
        (
            {"remove_extra_whitespaces": "no"},
            "remove_extra_whitespaces is 'no', but must be a bool",
        ),
    ],
)
def test_unigram_errors(change, message):
    change = {f"tokenizer.ggml.{key}": value for key, value in change.items()}
    metadata = unigram_metadata(bytes=False) | change
    with pytest.raises(JaxsplitError, match=message):
        Tokenizer.from_metadata(metadata)


def test_damaged_rules_end():
    """Whatever the trie holds, the search in it ends, and the text stays text."""
    rng = random.Random()
    for _ in range(50):
        units = [rng.randrange(256) for _ in range(4 * 64)]
        rules = [0, 1, 0, 0, *units, *rng.choices(range(256), k=20)]
        metadata = unigram_metadata() | {"tokenizer.ggml.precompiled_charsmap": rules}
        tokenizer = Tokenizer.from_metadata(metadata)
        tokenizer.decode(tokenizer.encode("the é 你好 \x00" + chr(rng.randrange(0xD7FF))))


# --- PLaMo, against all segmentations


def best_segmentation(text: str, scores: dict[str, float]) -> list[str]:
    """The cheapest of all segmentations, of equal ones that with the longest tokens first.

    Costs are integers, ten-thousandths; a character that is no token costs 10 million.
    """
    best = None
    for cuts in itertools.product([True, False], repeat=max(0, len(text) - 1)):
        ends = [at for at, cut in enumerate(cuts, 1) if cut] + [len(text)]
        parts = [text[a:b] for a, b in zip([0, *ends], ends, strict=False)]
        cost = 0
        for part in parts:
            if part in scores:
                cost -= round(scores[part] * 1e4)
            else:
                cost += 10**7 if len(part) == 1 else 10**12
        key = (-cost, [len(part) for part in parts])
        if best is None or key > best[0]:
            best = (key, parts)
    assert best is not None
    return best[1]


def spelled(parts: list[str], scores: dict[str, float]) -> list[str]:
    """With byte tokens for characters that are no tokens."""
    out = []
    for part in parts:
        out += [part] if part in scores else [BYTES[byte] for byte in part.encode()]
    return out


def random_scores(rng: random.Random) -> tuple[dict[str, float], str]:
    """A vocabulary in which many segmentations are equally good, and its alphabet."""
    alphabet = rng.choice(["ab", "ab ", "aé本😀"])
    names = {"".join(rng.choices(alphabet, k=rng.randrange(1, 5))) for _ in range(15)}
    steps = rng.choice([1.0, 0.5, 0.0001])
    return {name: -steps * rng.randrange(1, 6) for name in sorted(names)}, alphabet


def test_plamo2_takes_the_best_segmentation():
    seed = random.randrange(2**32)
    rng = random.Random(seed)
    for trial in range(60):
        scores, alphabet = random_scores(rng)
        if trial % 5 == 0:  # Some tokens are as bad as unknown characters, or worse, or nothing.
            for name in rng.sample(sorted(scores), 2):
                scores[name] = rng.choice([-1000.0, -999.0, -3000.0, float("-inf")])
        tokenizer = Tokenizer.from_metadata(plamo_metadata(scores))
        usable = {name: score for name, score in scores.items() if score > -1000}
        for _ in range(8):
            text = "".join(rng.choices(alphabet + "xß", k=rng.randrange(1, 10)))
            expected = spelled(best_segmentation(text, usable), usable)
            assert pieces_of(tokenizer, text) == expected, f"seed {seed}, {scores}, {text!r}"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", []),
        ("abc", ["abc"]),
        ("ab", ["ab"]),  # As good as "a", "b", but longer.
        ("the the", ["the", " the"]),
        ("日本語", ["日本", "<0xE8>", "<0xAA>", "<0x9E>"]),
        ("語語", ["<0xE8>", "<0xAA>", "<0x9E>"] * 2),
        ("<tag>a", ["<tag>", "a"]),
        ("\ufeffa", ["<0xEF>", "<0xBB>", "<0xBF>", "a"]),
        (b"a\xff\xe6a", ["a", "<0xFF>", "<0xE6>", "a"]),
        ("[PAD1]", ["<0x5B>", "<0x50>", "<0x41>", "<0x44>", "<0x31>", "<0x5D>"]),
    ],
)
def test_plamo2_by_hand(text, expected):
    tokenizer = Tokenizer.from_metadata(plamo_metadata())
    assert pieces_of(tokenizer, text) == expected
    assert tokenizer.decode_bytes(tokenizer.encode(text)) == (
        text if isinstance(text, bytes) else text.encode()
    )


def test_plamo_control_tokens():
    for model in ("plamo2", "plamo3"):
        tokenizer = Tokenizer.from_metadata(plamo_metadata(model=model))
        assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.add_bos) == (1, 2, False)
        assert tokenizer.end_ids == {2}
        marked = "a<|plamo:eos|>a"
        assert pieces_of(tokenizer, marked, parse_special=True) == ["a", "<|plamo:eos|>", "a"]
        assert not {*range(4)} & {*tokenizer.encode(marked)}
        assert tokenizer.decode(tokenizer.encode(marked)) == marked


def plamo3_fragments(text: str) -> list[str]:
    """Where PLaMo 3 has boundaries, found character by character."""
    ends = {0, len(text)}
    for found in re.finditer(r"<\|plamo:", text):
        name = itertools.takewhile(lambda c: c != "|" and not c.isspace(), text[found.end() :])
        end = found.end() + len("".join(name))
        if end - found.end() <= 64 and text[end : end + 2] == "|>":
            ends |= {found.start(), end + 2}
    marks = sorted(ends)
    for start, stop in zip(marks, marks[1:], strict=False):
        for character, run in itertools.groupby(range(start, stop), lambda at: text[at]):
            places = [*run]
            if (len(places) >= 4 and character != "\n") or (len(places) >= 2 and character == " "):
                ends |= {places[0], places[-1] + 1}
    marks = sorted(ends)
    return [text[a:b] for a, b in zip(marks, marks[1:], strict=False)]


def test_plamo3_has_boundaries():
    seed = random.randrange(2**32)
    rng = random.Random(seed)
    parts = ["a", "aa", "aaaa", " ", "  ", "\n\n\n\n", "bc", "<|plamo:", "|>", "<|plamo:x|>", "<"]
    scores = {"a": -3.0, "aa": -1.0, "aaaaa": -0.5, " ": -4.0, "a ": -1.0, " a": -1.0, "  ": -1.0}
    scores |= {"   ": -1.0, "\n\n\n\n\n": -1.0, "b": -2.0, ">a": -1.0, "a<": -1.0, "b ": -0.5}
    tokenizer = Tokenizer.from_metadata(plamo_metadata(scores, "plamo3"))
    for _ in range(200):
        text = "".join(rng.choices(parts, k=rng.randrange(1, 7)))
        expected = []
        for fragment in plamo3_fragments(text):
            if len(fragment) <= 12:
                expected += spelled(best_segmentation(fragment, scores), scores)
            else:
                expected += pieces_of(Tokenizer.from_metadata(plamo_metadata(scores)), fragment)
        assert pieces_of(tokenizer, text) == expected, f"seed {seed}, text {text!r}"


def test_plamo3_drops_marked_boundaries():
    tokenizer = Tokenizer.from_metadata(plamo_metadata(model="plamo3"))
    assert pieces_of(tokenizer, "a\uee00bc") == ["a", "bc"]
    assert pieces_of(tokenizer, "\uee00") == []


def test_plamo_needs_all_bytes():
    metadata = plamo_metadata()
    metadata["tokenizer.ggml.tokens"][5] = "A"
    metadata["tokenizer.ggml.token_type"][5] = 1
    with pytest.raises(JaxsplitError, match="has 255 of the 256 tokens <0x00> to <0xFF>"):
        Tokenizer.from_metadata(metadata)


# --- All of them


@pytest.fixture(scope="module")
def plamo2() -> Tokenizer:
    return Tokenizer.from_metadata(plamo_metadata())


@settings(max_examples=200, deadline=None)
@given(
    data=st.binary(max_size=20) | st.text(max_size=12).map(lambda t: t.encode("utf-8", "replace"))
)
def test_plamo2_loses_nothing(plamo2, data):
    assert plamo2.decode_bytes(plamo2.encode(data)) == data


def test_streams_equal_decode(tokenizer):
    seed = random.randrange(2**32)
    rng = random.Random(seed)
    for _ in range(100):
        text = "".join(rng.choices("ab c 你好é😀日本", k=rng.randrange(12)))
        ids = tokenizer.encode(text, parse_special=True)
        ids += rng.choices(range(tokenizer.vocab_size), k=rng.randrange(8))
        for show_special in ("none", "all"):
            stream = tokenizer.stream(show_special=show_special)
            streamed = "".join(map(stream.push, ids)) + stream.flush()
            assert streamed == tokenizer.decode(ids, show_special=show_special), f"seed {seed}"


LONG = 131_072


def test_long_texts_are_fast(tokenizer):
    for run in ("a", " a", "x", "1", "\u0301", "你好", "ab c."):
        text = (run * LONG)[:LONG].strip()
        start = time.perf_counter()
        ids = tokenizer.encode(text, add_special=False)
        assert tokenizer.decode(ids) == text
        took = time.perf_counter() - start
        assert took < 3, f"{run!r} takes {took:.1f} s"  # Measured: at most 0.5 s.
