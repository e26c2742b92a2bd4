"""What a session remembers of its prompts: how many tokens it evaluated, and the logits behind the last one."""

from __future__ import annotations

from collections.abc import Container, Sequence
from typing import Literal

import numpy as np
import numpy.typing as npt

__all__ = ["Prompts", "Step", "n_common", "n_reused", "n_shared", "why_missed"]

Step = Literal["prompt", "answer", "piece"] | None
"""What is evaluated: by ``generate`` its prompt or what it generated, by hand several tokens or (None) one."""


def n_shared(tokens: Sequence[int], cached: npt.NDArray[np.intc]) -> int:
    """Tokens that a prompt and what a cache has seen share at their beginning."""
    n = min(len(tokens), len(cached))
    same = np.asarray(tokens[:n], dtype=np.int64) == cached[:n]
    return n if same.all() else int(same.argmin())


def n_common(tokens: npt.NDArray[np.intc], prompt: npt.NDArray[np.intc]) -> int:
    """The same of two arrays."""
    n = min(len(tokens), len(prompt))
    differ = np.flatnonzero(tokens[:n] != prompt[:n])
    return int(differ[0]) if differ.size else n


def n_reused(
    held: npt.NDArray[np.intc], removable: int, prompt: npt.NDArray[np.intc], known: Container[int] = ()
) -> int:
    """Tokens of a prompt that need not be evaluated by a session.

    Args:
        held: the tokens that it holds.
        removable: positions from here on can be removed from it.
        prompt: the prompt.
        known: numbers of its first tokens behind which it has the logits.
    """
    n = n_common(held, prompt)
    if n == len(prompt) and n not in known:
        n -= 1  # one is evaluated for its logits
    return n if n >= removable else 0


def why_missed(
    n_prompt: int, n_same: int, n_past: int, n_boundary: int, budget_changed: bool, is_known: bool = False
) -> str:
    """In words why a prompt cannot continue the cache behind the tokens that they share.

    Args:
        n_prompt: tokens of the prompt.
        n_same: of these, the first ones that the cache has seen.
        n_past: positions in the cache.
        n_boundary: positions below this one were compacted.
        budget_changed: ``kv_budget`` is another one since the last compaction.
        is_known: of the whole prompt the logits are there, so that nothing of it would have to be evaluated.
    """
    is_same = n_same == n_prompt
    where = f"the prompt {'ends' if is_same else 'differs'} at token {n_same} of {n_prompt}"
    if is_same and budget_changed and n_boundary > 0:
        return f"kv_budget or kv_query was changed since the first {n_boundary} positions were compacted"
    if n_same - (is_same and not is_known) < n_boundary:
        return f"{where}, and positions below {n_boundary} were compacted"
    return f"{where}, and the window or recurrent layers moved on to {n_past} and cannot go back that far"


class Prompts:
    """Counts, and the logits of prompts' last tokens: with them the same prompt needs no evaluation.

    Attributes:
        is_open: tokens were evaluated by hand, in one call or several, and nothing was sampled behind them yet.
        n_evaluated, n_reused: tokens of all prompts.
        n_evaluated_last, n_reused_last: of the last one.
        miss: why tokens that the last prompt shared with the cache were evaluated again, "" if none were.
        kept: logits, float32 [n_vocab], by the number of positions in front of them: of the last prompt, and of the
            one that was compacted last. Nobody writes to them.
        n_shifted: positions that were given up at the end of the context, in all.
    """

    def __init__(self) -> None:
        self.is_open = False
        self.n_evaluated = self.n_reused = 0
        self.n_evaluated_last = self.n_reused_last = 0
        self.miss = ""
        self.n_shifted = 0
        self._n_prompt = self._n_same = 0
        self._start = 0  # position of the first of the pieces
        self._why = self._lost = ""
        self.kept: dict[int, npt.NDArray[np.float32]] = {}

    #
    # counts
    #

    def begin(self, n_prompt: int, n_same: int, why: str, n_read: int = 0, lost: str = "") -> None:
        """A prompt begins, or goes on with pieces that were evaluated by hand.

        Args:
            n_prompt: its tokens.
            n_same: of these, the first ones that the cache has seen.
            why: :func:`why_missed`, if these cannot be reused.
            n_read: others of its tokens that were evaluated ahead.
            lost: why those that were read before and are not in the cache any more are evaluated again.
        """
        if not self.is_open or n_same < self._start + self.n_evaluated_last:
            self.n_evaluated_last = 0
        self.n_evaluated += n_read
        self.n_evaluated_last += n_read
        self._n_prompt, self._n_same, self._why, self._lost = n_prompt, n_same, why, lost
        self.n_reused_last = 0
        self.miss = lost

    def evaluated(self, step: Step, n: int, n_before: int) -> None:
        """n tokens were evaluated behind n_before positions."""
        if step == "piece":
            if n == 0:
                return  # refused
            if not self.is_open:
                self.begin(0, 0, "")
                self._start = n_before
            self.is_open = True
        elif step != "prompt":
            return
        else:
            self.n_reused_last = max(0, min(n_before, self._n_same) - self.n_evaluated_last)
            # of a prompt that is there as a whole the last token is evaluated again, for its logits
            self.miss = self._why if n_before < self._n_same - (self._n_same == self._n_prompt) else self._lost
        self.n_evaluated += n
        self.n_evaluated_last += n
        self.n_reused += self.n_reused_last if step == "prompt" else 0

    def forget(self) -> None:
        """Another session goes on here: nothing is known of its last prompt, and its logits are gone."""
        self.n_evaluated_last = self.n_reused_last = self._start = 0
        self.miss = ""
        self.changed(0)

    #
    # logits
    #

    def keep(self, n_tokens: int, logits: npt.NDArray[np.float32], n_boundary: int) -> None:
        """Keep a copy of the logits behind n_tokens positions, float32 [n_vocab], and those behind the boundary."""
        self.kept = {at: own for at, own in self.kept.items() if at == n_boundary}
        self.kept = {**self.kept, n_tokens: logits.copy()}

    def logits(self, n_tokens: int) -> npt.NDArray[np.float32] | None:
        """Those that :meth:`keep` kept behind so many positions."""
        return self.kept.get(n_tokens)

    def moved(self, p0: int, n: int) -> None:
        """The positions [p0, p0 + n) were given up, and the later ones moved down."""
        self.n_shifted += n
        self._start = self._start if self._start <= p0 else max(p0, self._start - n)
        self.kept = {(at if at <= p0 else at - n): row for at, row in self.kept.items() if at <= p0 or at > p0 + n}

    def changed(self, n_tokens: int) -> None:
        """The cache forgets the positions from n_tokens on."""
        self.kept = {at: own for at, own in self.kept.items() if at <= n_tokens}
