"""How text is split before the merges of byte-level BPE, by the names of ``tokenizer.ggml.pre``.

The patterns are those of the models' own ``tokenizer.json``, or of the library that a model was
trained with. Each splits what the ones before have left; what no pattern matches is a piece, too.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from tokenizers import Regex, pre_tokenizers

# The end of most patterns: line ends, spaces before another space, other spaces.
_SPACES = r"|\s*[\r\n]+|\s+(?!\S)|\s+"
_SHORT_FORMS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_BEFORE_WORD = r"[^\r\n\p{L}\p{N}]?"

GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"


def _words(digits: str, *, letters: str = r"\p{L}", short_forms: str = _SHORT_FORMS + "|") -> str:
    """Return the pattern of Llama 3 and Qwen 2 for so many digits at a time."""
    others = letters.replace("[", "").replace("]", "")
    return (
        rf"{short_forms}{_BEFORE_WORD}{letters}+|{digits}"
        rf"| ?[^\s{others}\p{{N}}]+[\r\n]*" + _SPACES
    )


def _cased_words(digits: str, ending: str = "") -> str:
    """Return the pattern of tekken and GPT-4o: a word ends where upper case begins."""
    return (
        rf"{_BEFORE_WORD}{_UPPER}*{_LOWER}+{ending}|{_BEFORE_WORD}{_UPPER}+{_LOWER}*{ending}"
        rf"|{digits}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*" + _SPACES
    )


LLAMA3, QWEN2 = _words(r"\p{N}{1,3}"), _words(r"\p{N}")
GPT4O = _cased_words(r"\p{N}{1,3}", f"{_SHORT_FORMS}?")
# DeepSeek V3 begins words with a sign in ASCII, and takes some scripts by themselves.
DEEPSEEK3 = (
    r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+"
    r"|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*" + _SPACES
)


@dataclass(frozen=True, slots=True, kw_only=True)
class PreTokenizer:
    """One way to split text.

    Parameters
    ----------
    patterns
        One after the other.
    ignores_merges
        Whether a piece that is a token as a whole is taken without merges.
    adds_bos
        Whether a text begins with the token for that where no key says so.
    """

    patterns: tuple[str, ...]
    ignores_merges: bool = False
    adds_bos: bool = False

    def build(self) -> pre_tokenizers.PreTokenizer:
        """Make what splits text, and spells bytes as GPT-2 does."""
        splits = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in self.patterns]
        bytes_spelled = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        return pre_tokenizers.Sequence([*splits, bytes_spelled])


_KINDS: Mapping[PreTokenizer, tuple[str, ...]] = {
    PreTokenizer(patterns=(GPT2,)): (
        *("gpt-2", "phi-2", "mpt", "olmo", "jais", "trillion", "granite-docling"),
        *("gigachat", "a.x-4.0", "mellum", "exaone4"),
    ),
    # Each digit by itself.
    PreTokenizer(patterns=(r"\p{N}", GPT2)): (
        *("smollm", "starcoder", "refact", "command-r", "codeshell", "exaone"),
        *("minerva-7b", "mellum2"),
    ),
    PreTokenizer(patterns=(LLAMA3,), ignores_merges=True, adds_bos=True): (
        *("llama-bpe", "llama3", "llama-v3", "falcon3", "falcon-h1", "pixtral"),
        *("midm-2.0", "lfm2"),
    ),
    PreTokenizer(patterns=(LLAMA3,)): ("dbrx", "smaug-bpe", "chatglm-bpe"),
    PreTokenizer(patterns=(LLAMA3,), ignores_merges=True): ("glm4", "glm5"),
    PreTokenizer(patterns=(QWEN2,)): (
        *("qwen2", "deepseek-r1-qwen", "kormo", "f2llmv2", "megrez", "stablelm2"),
        *("hunyuan", "solar-open", "grok-2"),
    ),
    PreTokenizer(patterns=(_words(r"\p{N}", letters=r"[\p{L}\p{M}]"),)): ("qwen35",),
    PreTokenizer(patterns=(_cased_words(r"\p{N}"),), ignores_merges=True, adds_bos=True): (
        "tekken",
    ),
    PreTokenizer(patterns=(GPT4O,)): ("gpt-4o", "llama4", "kanana2", "talkie", "minimax-m2"),
    PreTokenizer(
        patterns=(r"\p{N}{1,3}", r"[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+", DEEPSEEK3)
    ): (*("deepseek-v3", "hunyuan-dense", "joyai-llm"),),
    PreTokenizer(
        patterns=(
            *(r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+"),
            *(r"[\u4e00-\u9fa5\u0800-\u4e00\uac00-\ud7ff]+", r"\p{N}"),
        )
    ): ("deepseek-coder",),
    PreTokenizer(
        patterns=(
            r"[\p{P}\$\+<=>\^~\|`]+",
            GPT2.replace(r"|\s+(?!\S)|\s+", r"|\s+(?!\S)"),
            r"[0-9]{3}",
        )
    ): ("falcon",),
    PreTokenizer(patterns=(r" ?[^(\s|.,!?\u2026\u3002\uff0c\u3001\u0964\u06d4\u060c)]+",)): (
        "bloom",
        "poro-chat",
        "gpt3-finnish",
    ),
}
PRE_TOKENIZERS: Mapping[str, PreTokenizer] = {
    name: kind for kind, names in _KINDS.items() for name in names
}
