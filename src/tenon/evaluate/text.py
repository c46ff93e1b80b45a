"""Free answers against expected ones: exact match, ROUGE-L, BLEU; in English and in languages without spaces.

Sources: ROUGE-L is Lin 2004, by the rouge-score package; BLEU is Papineni et al. 2002, by sacrebleu (13a tokens, or its
`zh` tokens where the expected answers are Chinese). Both packages are imported where they are used: comparing two
results seldom needs them. This module does not know rows or models.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from rouge_score.rouge_scorer import RougeScorer
    from sacrebleu.metrics.bleu import BLEU

    from tenon.stats import FloatArray, Statistic

_REASONING_END = "</think>"
_CJK = r"\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uac00-\ud7af\uf900-\ufaff"
_WORDS = re.compile(rf"[{_CJK}]|[^\W_{_CJK}]+")
_CJK_CHARACTER = re.compile(rf"[{_CJK}]")
# From this share of all characters on, answers are tokenised as Chinese.
_CHINESE_SHARE = 0.2


def without_reasoning(text: str) -> str:
    """What follows the reasoning block that some models open their answers with; the text itself without one."""
    _, mark, answer = text.rpartition(_REASONING_END)
    return answer.lstrip("\n") if mark else text


def exact(expected: str, got: str) -> float:
    """1 when the two are equal, spaces and line breaks at the ends apart; nothing else is forgiven."""
    return float(expected.strip() == got.strip())


class _WordTokenizer:
    """Words in lower case, and each Chinese, Japanese or Korean character by itself.

    On ASCII text the same words as the package's own tokenizer, which drops every other letter.
    """

    def tokenize(self, text: str) -> list[str]:
        """The words of a text."""
        return _WORDS.findall(text.lower())


@cache
def _rouge() -> RougeScorer:
    from rouge_score.rouge_scorer import RougeScorer

    return RougeScorer(["rougeL"], tokenizer=_WordTokenizer())


def rouge_l(expected: str, got: str) -> float:
    """F1 of the longest common subsequence of words, 0 to 1. Two texts without any word are equal: 1."""
    if not _WORDS.search(expected.lower()):
        return exact(expected, got)
    return float(_rouge().score(expected, got)["rougeL"].fmeasure)


@dataclass(frozen=True, slots=True)
class BleuScorer:
    """BLEU of answers; the tokens follow from all expected answers together."""

    tokens: str

    @classmethod
    def for_answers(cls, expected: Sequence[str]) -> BleuScorer:
        """`zh` when at least a fifth of the characters are Chinese, Japanese or Korean, else `13a`."""
        text = "".join(expected)
        return cls("zh" if len(_CJK_CHARACTER.findall(text)) >= _CHINESE_SHARE * max(len(text), 1) else "13a")

    def row(self, expected: str, got: str) -> float:
        """BLEU of one row, 0 to 100, over the n-grams that it is long enough for."""
        return float(self._sentences().sentence_score(got, [expected]).score)

    def statistic(self, expected: Sequence[str], got: Sequence[str]) -> Statistic:
        """Corpus BLEU, 0 to 100, of resampled rows."""
        scorer = self._sentences()
        counts_NC = np.zeros((len(expected), 10))
        for i, (wanted, answer) in enumerate(zip(expected, got, strict=True)):
            row = scorer.sentence_score(answer, [wanted])
            counts_NC[i] = [*row.counts, *row.totals, row.sys_len, row.ref_len]

        def statistic(weights_BN: FloatArray) -> FloatArray:
            sums_BC = np.rint(weights_BN @ counts_NC).astype(int)
            return np.array([_corpus_bleu(scorer, sums_C.tolist()) for sums_C in sums_BC])

        return statistic

    def _sentences(self) -> BLEU:
        from sacrebleu.metrics.bleu import BLEU

        return BLEU(tokenize=self.tokens, effective_order=True)


def _corpus_bleu(scorer: BLEU, sums: list[int]) -> float:
    """BLEU of n-gram matches (1 to 4), n-grams (1 to 4), length, reference length."""
    return float(scorer.compute_bleu(sums[:4], sums[4:8], sums[8], sums[9], smooth_method="exp").score)
