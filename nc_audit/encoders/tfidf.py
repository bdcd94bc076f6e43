"""Captions as weighted word and character n-grams, reduced: fitted on the dataset's own captions, nothing fetched.

Words and word pairs carry most; n-grams of characters inside words join spellings ("tree", "trees"). In scripts that
put no spaces between words (Chinese, Japanese, Thai, Lao, Burmese, Khmer) each character counts as a word.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from functools import cached_property, partial

import numpy as np
import torch
from scipy.sparse import csr_matrix, hstack
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.utils.extmath import randomized_svd
from torch import Tensor

from nc_audit.encoders.weights import digest_of_encoder

DIMS = 384
NUM_TERMS = 1 << 16  # per kind of n-gram, the most frequent ones
NUM_FITTED = 50_000  # captions that vocabulary and reduction are learnt from
CHARACTER_WEIGHT = 0.5
CHUNK = 50_000
SPACELESS = (
    "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff"
    "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
)
WORD = rf"[{SPACELESS}]|[^\W{SPACELESS}]+"
MIN_LENGTH = 1e-6
MAX_WORDS = 32  # local embeddings of a caption; its remaining words have none


class Tfidf:
    """Learns a `TfidfEncoder` from the distinct captions."""

    spec = "tfidf"

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def digest_for(self, fitted_on: str) -> str:
        """Digest of the encoder fitted on the captions whose set has the digest `fitted_on`."""
        settings = [DIMS, NUM_TERMS, NUM_FITTED, CHARACTER_WEIGHT]
        return digest_of_encoder(
            {"spec": self.spec, "settings": settings, "seed": self.seed, "on": fitted_on}, {}
        )

    def fit(self, captions: Sequence[str], fitted_on: str, dim: int | None = None) -> TfidfEncoder:
        """The encoder learnt from the distinct captions, in canonical order; at least one.

        With `dim`, known from vectors it has made before, it learns only when a caption is to be encoded.
        """
        return TfidfEncoder(self.digest_for(fitted_on), partial(self._learn, captions), dim)

    def _learn(self, captions: Sequence[str]) -> tuple[list[tuple[float, TfidfVectorizer]], np.ndarray]:
        """Weighted vectorisers, and the axes they are reduced to, [T, D]."""
        at = np.unique(np.linspace(0, len(captions) - 1, min(len(captions), NUM_FITTED)).astype(np.int64))
        chosen = [captions[i] for i in at]
        vectorizers = []
        for weight, options in (
            (1.0, {"token_pattern": WORD, "ngram_range": (1, 2)}),
            (CHARACTER_WEIGHT, {"analyzer": "char_wb", "ngram_range": (3, 5)}),
        ):
            vectorizer = TfidfVectorizer(
                sublinear_tf=True, max_features=NUM_TERMS, dtype=np.float32, **options
            )
            try:
                vectorizer.fit(chosen)
            except ValueError:  # no caption holds a word
                continue
            vectorizers.append((weight, vectorizer))
        terms = _terms(vectorizers, chosen)
        axes = np.eye(1, dtype=np.float32)
        if min(terms.shape):
            _, _, axes = randomized_svd(terms, min(DIMS, *terms.shape), n_iter=3, random_state=self.seed)
        return vectorizers, np.ascontiguousarray(axes.T, dtype=np.float32)


class TfidfEncoder:
    """Captions to unit vectors of at most 384 dimensions; a caption without any known n-gram is the zero vector."""

    spec = "tfidf"

    def __init__(
        self,
        digest: str,
        learn: Callable[[], tuple[list[tuple[float, TfidfVectorizer]], np.ndarray]],
        dim: int | None = None,
    ) -> None:
        self.digest = digest
        self._learn = learn
        self.dim = self._learnt[1].shape[1] if dim is None else dim

    @cached_property
    def _learnt(self) -> tuple[list[tuple[float, TfidfVectorizer]], np.ndarray]:
        return self._learn()

    def encode(self, captions: Sequence[str]) -> Tensor:
        """Captions to vectors [N, D], float32."""
        vectorizers, axes_TD = self._learnt
        vectors = np.zeros((len(captions), self.dim), dtype=np.float32)
        for start in range(0, len(captions), CHUNK):
            terms = _terms(vectorizers, captions[start : start + CHUNK])
            if terms.shape[1]:
                vectors[start : start + CHUNK] = terms @ axes_TD
        lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
        return torch.from_numpy(
            np.divide(vectors, lengths, out=np.zeros_like(vectors), where=lengths > MIN_LENGTH)
        )

    def tokens(self, captions: Sequence[str]) -> Tensor:
        """Each word of a caption as a caption of its own, [N, T, D]; zeros behind the last of at most 32 words."""
        words = [re.findall(WORD, caption.lower())[:MAX_WORDS] for caption in captions]
        distinct = sorted({word for some in words for word in some})
        place = {word: at for at, word in enumerate(distinct)}
        vectors = self.encode(distinct)
        result = torch.zeros(len(captions), MAX_WORDS, self.dim)
        for at, some in enumerate(words):
            if some:
                result[at, : len(some)] = vectors[[place[word] for word in some]]
        return result

    def truncated(self, captions: Sequence[str]) -> list[bool]:
        """Never: captions of any length are read whole."""
        return [False] * len(captions)


def _terms(vectorizers: list[tuple[float, TfidfVectorizer]], captions: Sequence[str]) -> csr_matrix:
    if not vectorizers:
        return csr_matrix((len(captions), 0), dtype=np.float32)
    return hstack([weight * vectorizer.transform(captions) for weight, vectorizer in vectorizers]).tocsr()
