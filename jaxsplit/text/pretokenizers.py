r"""Pre-tokenizers: how a byte-level BPE tokenizer splits text into words before merging.

`tokenizer.ggml.pre` of a GGUF file names one. Each is a list of regular expressions, applied in
order to every piece left by the previous one; both the matches and the text between them become
pieces. The syntax is Oniguruma's, as in the `tokenizers` library. Contractions list both cases,
because `(?i:s)` would match U+017F as well.

No pattern may look ahead over a whole run at each of its characters: long runs would take quadratic
time.
"""

from dataclasses import dataclass

from jaxsplit.errors import JaxsplitError


@dataclass(frozen=True)
class PreTokenizer:
    """One row of the table.

    Attributes:
        patterns: regular expressions, in order of application.
        ignore_merges: a word in the vocabulary is one token, whatever the merges say.
        add_bos: whether text starts with BOS by default.
        clean_spaces: conventional detokenization removes spaces before punctuation.
    """

    patterns: tuple[str, ...]
    ignore_merges: bool = False
    add_bos: bool = False
    clean_spaces: bool = False


_CONTRACTION = "(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])"
_SPACES = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)"


def _words(digits: str, *, contraction: str = _CONTRACTION + "|", spaces: str = _SPACES) -> str:
    """The pattern of GPT-4 (cl100k) and its descendants, which differ in the digits."""
    return (
        contraction
        + rf"[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|{digits}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{spaces}"
    )


def _cased_words(digits: str, *, contraction: str = _CONTRACTION + "?", outside: str = "") -> str:
    """The pattern of GPT-4o (o200k): a word ends where upper case follows lower case."""
    upper = rf"[\p{{Lu}}\p{{Lt}}\p{{Lm}}\p{{Lo}}\p{{M}}{outside}]"
    lower = rf"[\p{{Ll}}\p{{Lm}}\p{{Lo}}\p{{M}}{outside}]"
    lead = r"[^\r\n\p{L}\p{N}]?"
    line_end = r"[\r\n]*" if outside else r"[\r\n/]*"
    return (
        f"{lead}{upper}*{lower}+{contraction}|{lead}{upper}+{lower}*{contraction}"
        rf"|{digits}| ?[^\s\p{{L}}\p{{N}}]+{line_end}|{_SPACES}"
    )


def _threes(digit: str) -> tuple[str, str]:
    """Splits pieces of digits only into threes from the right: 1234567 is 1 234 567.

    The first pattern matches the remainder at the start, so that the second can count from the
    left.
    """
    return rf"\A{digit}{{1,2}}(?=(?:{digit}{{3}})++\z)", rf"{digit}{{3}}"


def _class(code_points: str) -> str:
    """A pattern for one or more code points, given in hexadecimal: `"41-5A 5F"` is `[A-Z_]+`."""
    ranges = ("-".join(chr(int(end, 16)) for end in r.split("-")) for r in code_points.split())
    return f"[{''.join(ranges)}]+"


_ASCII_PUNCTUATION_WORD = r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+"""
_MARKED_LETTERS = r"[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"
_DEEPSEEK_V3_WORDS = (
    rf"{_ASCII_PUNCTUATION_WORD}|{_MARKED_LETTERS}| ?[\p{{P}}\p{{S}}]+[\r\n]*|{_SPACES}"
)
_CJK_KANA = _class("4E00-9FA5 3040-30FF")
_DEEPSEEK_CJK = _class("800-9FA5 AC00-D7FF")
# The cased letters that DeepSeek-LLM lists, without those of newer Unicode versions.
_DEEPSEEK_LETTERS = _class(
    "41-5A 61-7A B5 C0-D6 D8-F6 F8-1BA 1BC-1BF 1C4-293 295-2AF 370-373 376 377 37B-37D 37F 386 "
    "388-38A 38C 38E-3A1 3A3-3F5 3F7-481 48A-52F 531-556 10A0-10C5 13A0-13F5 13F8-13FD "
    "1C90-1CBA 1CBD-1CBF 1D00-1D2B 1D6B-1D77 1D79-1D9A 1E00-1F15 1F18-1F1D 1F20-1F45 1F48-1F4D "
    "1F50-1F57 1F59 1F5B 1F5D 1F5F-1F7D 1F80-1FB4 1FB6-1FBC 1FBE 1FC2-1FC4 1FC6-1FCC 1FD0-1FD3 "
    "1FD6-1FDB 1FE0-1FEC 1FF2-1FF4 1FF6-1FFC 2102 2107 210A-2113 2115 2119-211D 2124 2126 2128 "
    "212A-212D 212F-2134 2139 213C-213F 2145-2149 214E 2183 2184 2C00-2C7B 2C7E-2CE4 2CEB-2CEE "
    "2CF2 2CF3 A640-A66D A680-A69B A722-A76F A771-A787 A78B-A78E AB70-ABBF FB00-FB06 FB13-FB17 "
    "FF21-FF3A FF41-FF5A 10400-1044F 104B0-104D3 104D8-104FB 10C80-10CB2 10CC0-10CF2 "
    "118A0-118DF 1E900-1E943"
)
_DEEPSEEK_PUNCTUATION = _class("21-2F 3A-7E FF01-FF0F FF1A-FF5E 2018-201F 3000-3002")
_NOT_PUNCTUATION = " ?[^(\\s|.,!?\u2026\u3002\uff0c\u3001\u0964\u06d4\u060c)]+"
_HALVING_SPACES = "|".join(
    [r"\s*[\r\n]+"] + [rf"\s{{{2**n}}}(?!\S)" for n in range(9, 1, -1)] + [r"\s{1,2}(?!\S)|\s"]
)
_UNSPACED_SCRIPTS = _class(
    "4E00-9FFF 3400-4DBF F900-FAFF 3040-30FF FF65-FF9F 2F00-2FDF E40-EFF 1780-17FF 1000-109F "
    "AA60-AA7F A9E0-A9FF AC00-D7AF 1100-11FF"
)

# Keys: names that share a row, separated by spaces.
_ROWS = {
    "default": PreTokenizer(
        (r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", "[0-9][0-9][0-9]"), clean_spaces=True
    ),
    # GPT-2 and its kin.
    "gpt-2 phi-2 jina-es jina-de jina-v1-en jina-v2-es jina-v2-de jina-v2-code roberta-bpe "
    "modern-bert gigachat mellum a.x-4.0 mpt olmo jais exaone4": PreTokenizer(
        (_GPT2,), clean_spaces=True
    ),
    "trillion granite-docling": PreTokenizer((_GPT2,)),
    "starcoder refact codeshell exaone minerva-7b mellum2": PreTokenizer(
        (r"\p{N}", _GPT2), clean_spaces=True
    ),
    "smollm command-r": PreTokenizer((r"\p{N}", _GPT2)),
    "falcon": PreTokenizer((r"[\p{P}\$\+<=>\^~\|`]+", _GPT2, "[0-9][0-9][0-9]"), clean_spaces=True),
    "chameleon": PreTokenizer(
        (
            "<sentinel:[0-9]+>",
            "IMGIMG[A-I]{1,4}Z",
            r"[\t\n]|    |  ",
            r"\p{N}",
            r"[\p{P}!-/:-@\[-`{-~]",
            _GPT2,
        ),
        add_bos=True,
    ),
    # GPT-4 (cl100k) with groups of one to three digits.
    "llama3 llama-v3 llama-bpe falcon3 falcon-h1 pixtral midm-2.0 lfm2 jina-v5-nano": PreTokenizer(
        (_words(r"\p{N}{1,3}"),), ignore_merges=True, add_bos=True, clean_spaces=True
    ),
    "dbrx smaug-bpe chatglm-bpe glm4": PreTokenizer((_words(r"\p{N}{1,3}"),), clean_spaces=True),
    "jais-2": PreTokenizer((_words(r"\p{N}{1,3}", spaces=_HALVING_SPACES),), clean_spaces=True),
    "minicpm5": PreTokenizer(
        (r"\p{N}{1,3}", _words(r"\p{N}+")), ignore_merges=True, clean_spaces=True
    ),
    # The same with single digits.
    "qwen2 deepseek-r1-qwen kormo f2llmv2 hunyuan solar-open grok-2": PreTokenizer(
        (_words(r"\p{N}"),)
    ),
    "stablelm2 megrez": PreTokenizer((_words(r"\p{N}"),), clean_spaces=True),
    "ufakzeka": PreTokenizer((_words(r"\p{N}", contraction=""),)),
    "laguna": PreTokenizer((r"[^\n]+|\n+", _words(r"\p{N}"))),
    "bailingmoe bailingmoe2 llada-moe": PreTokenizer(
        (_words(r"\p{N}", spaces=r"\s*[\r\n]|\s+(?!\S)|\s+"),)
    ),
    "qwen35": PreTokenizer(
        (
            rf"{_CONTRACTION}|[^\r\n\p{{L}}\p{{N}}]?[\p{{L}}\p{{M}}]+|\p{{N}}"
            rf"| ?[^\s\p{{L}}\p{{M}}\p{{N}}]+[\r\n]*|{_SPACES}",
        )
    ),
    "seed-coder": PreTokenizer(
        (
            rf"{_CONTRACTION}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}"
            rf"| ?[^\s\p{{L}}\p{{N}}\r\n]+|{_SPACES}",
        )
    ),
    "exaone-moe": PreTokenizer(
        (
            _CONTRACTION + r"|[^\r\n\p{L}\p{N}]?(?:\p{L}\p{M}*(?: \p{L}\p{M}*)*)+|\p{N}"
            r"| ?[^\s\p{L}\p{N}]+[\r\n/]?|\s*[\r\n]|\s+(?!\S)|\s+",
        ),
        clean_spaces=True,
    ),
    # GPT-4o (o200k) and its kin.
    "gpt-4o llama4 kanana2 talkie minimax-m2": PreTokenizer((_cased_words(r"\p{N}{1,3}"),)),
    "granite-embed-multi-97m": PreTokenizer((_cased_words(r"\p{N}{1,3}"),), ignore_merges=True),
    "tekken": PreTokenizer(
        (_cased_words(r"\p{N}", contraction=""),), ignore_merges=True, add_bos=True
    ),
    "tiny_aya cohere2moe": PreTokenizer(
        # Digits before a letter count from the left; the pattern of words splits all into threes.
        (r"(?<!\d)\d++\b", _threes(r"\d")[0], _cased_words(r"\p{N}{1,3}"))
    ),
    "youtu": PreTokenizer(
        (
            "|".join(
                [
                    _class("AC00-D7A3 3131-318E"),
                    _class("FF01 2026 201C 201D 2018 2019 2014 FF1A FF1B FF0C 3001-303F FE30-FE4F"),
                    _class("3105-312F"),
                    _CJK_KANA,
                ]
            ),
            _cased_words(r"\p{N}"),
        ),
        ignore_merges=True,
    ),
    "kimi-k2": PreTokenizer((r"\p{Han}+|" + _cased_words(r"\p{N}{1,3}", outside=r"&&[^\p{Han}]"),)),
    # DeepSeek and its kin.
    "deepseek-llm": PreTokenizer(
        (
            r"[\r\n]",
            r"\s?" + _DEEPSEEK_LETTERS,
            r"\s?" + _DEEPSEEK_PUNCTUATION,
            r"(?<!\s)\s++$",
            _DEEPSEEK_CJK,
            r"\p{N}+",
        )
    ),
    "deepseek-coder": PreTokenizer(
        (r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", _DEEPSEEK_CJK, r"\p{N}")
    ),
    "deepseek-v3 hunyuan-dense hy_v4 joyai-llm": PreTokenizer(
        (r"\p{N}{1,3}", _CJK_KANA, _DEEPSEEK_V3_WORDS)
    ),
    "spark2_5": PreTokenizer(
        (
            r"\p{N}{1,3}",
            _CJK_KANA,
            _ASCII_PUNCTUATION_WORD + "|" + _MARKED_LETTERS + r"| ?[\p{P}\p{S}]+|[\r\n]"
            r"|\s+(?!\S)|\s+",
            r"\p{N}",
        )
    ),
    "afmoe": PreTokenizer((r"\p{N}+", *_threes(r"\p{N}"), _UNSPACED_SCRIPTS, _DEEPSEEK_V3_WORDS)),
    # Others.
    "bloom gpt3-finnish": PreTokenizer((_NOT_PUNCTUATION,), clean_spaces=True),
    "poro-chat": PreTokenizer((_NOT_PUNCTUATION,)),
    "viking": PreTokenizer((_NOT_PUNCTUATION, r"\p{N}")),
    "superbpe": PreTokenizer((r"\p{N}+", "[0-9]+", *_threes("[0-9]"))),
}
PRE_TOKENIZERS = {name: row for names, row in _ROWS.items() for name in names.split()}


def pre_tokenizer(name: str | None) -> PreTokenizer:
    """Looks a pre-tokenizer up by its `tokenizer.ggml.pre` name.

    Raises:
        JaxsplitError: the name is missing or unknown; a wrong guess would silently change the
            model's tokens.
    """
    if name is None:
        found = "tokenizer.ggml.pre is missing from the file"
    elif name in PRE_TOKENIZERS:
        return PRE_TOKENIZERS[name]
    else:
        found = f"tokenizer.ggml.pre is {name!r}, which is unknown"
    raise JaxsplitError(f"{found}; supported: {', '.join(PRE_TOKENIZERS)}")
