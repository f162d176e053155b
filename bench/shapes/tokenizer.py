"""The tokenizer of the shapes pipeline, to which each word of a caption is one token."""

from collections.abc import Sequence
from itertools import pairwise

from tokenizers import pre_tokenizers
from torch import Tensor
from transformers import CLIPTokenizer

from bench.shapes import TEXT_TOKENS


def word_tokenizer(words: Sequence[str]) -> CLIPTokenizer:
    """CLIP's tokenizer with a vocabulary in which each word is one token, the same in every process.

    A trained one is not: which of equally frequent pairs is merged first differs from process to process, and a run
    that is resumed would then go on with other ids.

    Args:
        words: Of lower case; a comma may follow.
    """
    words = sorted({part for word in words for part in (word.rstrip(","), "," * word.endswith(",")) if part})
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges: list[tuple[str, str]] = []
    for word in words:  # a merge comes after all earlier ones, so that it cannot take the words before this one apart
        while len(parts := _merged([*word[:-1], word[-1] + "</w>"], merges)) > 1:
            merges.append((parts[0], parts[1]))
    pieces = ["<|startoftext|>", "<|endoftext|>", *letters, *(f"{letter}</w>" for letter in letters)]
    vocabulary = {piece: i for i, piece in enumerate(dict.fromkeys([*pieces, *map("".join, merges)]))}
    return CLIPTokenizer(vocabulary, merges)


def _merged(parts: list[str], merges: Sequence[tuple[str, str]]) -> list[str]:
    """What byte pair encoding makes of a word's parts: of all that can be merged, the earliest merge is done first."""
    while pairs := set(pairwise(parts)) & set(merges):
        first = min(pairs, key=merges.index)
        at = list(pairwise(parts)).index(first)
        parts = [*parts[:at], "".join(first), *parts[at + 2 :]]
    return parts


def tokens(tokenizer: CLIPTokenizer, captions: Sequence[str]) -> Tensor:
    """Ids `[B, TEXT_TOKENS]`."""
    ids: Tensor = tokenizer(
        list(captions), padding="max_length", max_length=TEXT_TOKENS, truncation=True, return_tensors="pt"
    ).input_ids
    return ids
