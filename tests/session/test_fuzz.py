"""Random sequences of operations on the cache against a model of it that only keeps lists of positions.

    python tests/session/test_fuzz.py 20000        # as many steps as wanted, with a seed of one's own as the second argument
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import tiny_model  # noqa: E402
from policy_table import kept  # noqa: E402
from reference.common import sizes  # noqa: E402

from windowkv_edge import (  # noqa: E402
    AdaKV,
    HeadKV,
    HeadScores,
    KVPolicy,
    Llama,
    NativeError,
    PyramidKV,
    SnapKV,
    StreamingLLM,
    WindowAdaKV,
    WindowHeadKV,
    WindowKV,
)

N_LAYER, N_HEAD, N_HEAD_KV, N_CTX = 3, 4, 2, 512
RNG = np.random.default_rng(0)
SCORES = HeadScores({kind: RNG.random((N_LAYER, N_HEAD)) ** 3 for kind in ("r", "r2")})
POLICIES: tuple[KVPolicy, ...] = (
    WindowKV(window_size=6, omega=4),
    WindowKV(window_size=6, omega=4, gamma=2, scope="layer", budget="arithmetic", recent_share=1.0, carry=0),
    SnapKV(window_size=5, kernel_size=3),
    PyramidKV(window_size=5, kernel_size=3, beta=4.0),
    StreamingLLM(n_sink=2),
    AdaKV(window_size=5, kernel_size=3, alpha_safeguard=0.1),
    WindowAdaKV(window_size=6, omega=4, alpha_safeguard=0.1),
    HeadKV(window_size=5, kernel_size=3, beta=1.1, importance=SCORES),
    WindowHeadKV(window_size=6, omega=4, beta=1.1, importance=SCORES),
)


class Model:
    """What the cache should hold: the positions of every head."""

    def __init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        self.n = self.boundary = 0
        self.heads = [[np.zeros(0, dtype=np.int32) for _ in range(N_HEAD_KV)] for _ in range(N_LAYER)]

    def append(self, n: int) -> None:
        new = np.arange(self.n, self.n + n, dtype=np.int32)
        self.heads = [[np.concatenate([own, new]) for own in layer] for layer in self.heads]
        self.n += n

    def trim(self, p0: int) -> bool:
        if p0 == 0:
            self.clear()
        elif p0 < min(self.boundary, self.n):
            return False
        else:
            self.heads = [[own[own < p0] for own in layer] for layer in self.heads]
            self.n = min(self.n, p0)
        return True

    def shift(self, p0: int, n: int) -> None:
        def close(own: np.ndarray) -> np.ndarray:
            return np.concatenate([own[own < p0], own[own >= p0 + n] - n])

        self.heads = [[close(own) for own in layer] for layer in self.heads]
        if self.boundary > p0:
            self.boundary = max(p0, self.boundary - n, 1)
        self.n -= n

    def keep(self, masks: list[list[np.ndarray]]) -> None:
        self.heads = [[own[m] for own, m in zip(a, b, strict=True)] for a, b in zip(self.heads, masks, strict=True)]
        self.boundary = self.n


def same(llm: Llama, model: Model) -> None:
    stats = llm.kv_stats()
    assert stats.n_past == model.n
    assert stats.cells.tolist() == [[len(own) for own in layer] for layer in model.heads]
    for il, layer in enumerate(model.heads):
        for ih, own in enumerate(layer):
            assert llm.kv_positions(il, ih).tolist() == own.tolist()


def run(path: Path, n_steps: int, seed: int) -> dict[str, int]:
    """Returns how often each operation was done; raises AssertionError at the first difference."""
    rng = np.random.default_rng(seed)
    llm = Llama(str(path), n_ctx=N_CTX, kv_policy=POLICIES[0], kv_budget=N_CTX, n_threads=1, n_threads_batch=1, verbose=False)
    kv = llm._kv
    assert kv is not None
    model = Model()
    done: dict[str, int] = {}
    for _ in range(n_steps):
        what = rng.choice(
            ["one", "prompt", "compact", "trim", "clear", "policy", "snapshot", "shift"],
            p=[0.46, 0.14, 0.14, 0.12, 0.03, 0.03, 0.04, 0.04],
        )
        done[what] = done.get(what, 0) + 1
        if what in ("one", "prompt"):
            n = 1 if what == "one" else int(rng.integers(2, 120))
            if model.n + n > N_CTX:
                with pytest.raises(RuntimeError):
                    llm.eval(rng.integers(0, tiny_model.N_VOCAB, n).tolist())
                llm.n_tokens = model.n
            else:
                llm.eval(rng.integers(0, tiny_model.N_VOCAB, n).tolist())
                model.append(n)
        elif what == "compact" and model.n:
            n_cells = int(rng.integers(1, 80))
            bound = llm._kv_bound
            try:
                scores = [kv.scores(il, bound.n_observed) for il in range(N_LAYER)]
            except NativeError as error:
                # every observed query was trimmed away
                assert "nothing to score" in str(error)
                continue
            keep = kept(bound, model.heads, scores, n_cells)
            stats = llm.kv_compact(n_cells)
            # heads that compete are not asked where everything fits
            fits = all(sum(own) <= n_cells * N_HEAD_KV for own in sizes(model.heads))
            is_asked = not fits or bound.parts("localization").allocation.heads != "score"
            if is_asked and not all(own.all() for layer in keep for own in layer):
                model.keep(keep)
            assert stats.cells.tolist() == sizes(model.heads)
        elif what == "trim":
            p0 = int(rng.integers(0, model.n + 2))
            assert llm._ctx.kv_cache_seq_rm(-1, p0, -1) == model.trim(p0)
            llm.n_tokens = model.n
        elif what == "shift":
            # on one side of the boundary, and before the last tokens on both: definitions take these for held by all heads
            lo, hi = (0, model.boundary - 8) if rng.random() < 0.5 else (model.boundary, model.n - 8)
            if hi - lo < 2:
                continue
            p0 = int(rng.integers(lo, hi - 1))
            n = int(rng.integers(1, hi - p0))
            kv.shift(p0, n)
            model.shift(p0, n)
            llm.n_tokens = llm._kv_known = model.n
            llm.input_ids[p0 : model.n] = llm.input_ids[p0 + n : model.n + n]
        elif what == "clear":
            llm.reset()
            model.clear()
        elif what == "policy":
            llm.kv_policy = POLICIES[rng.integers(len(POLICIES))]
            model.clear()
        elif what == "snapshot" and model.n:
            kv.snapshot_save()
            n, boundary, heads = model.n, model.boundary, model.heads
            extra = min(int(rng.integers(1, 40)), N_CTX - model.n)
            if extra:
                llm.eval(rng.integers(0, tiny_model.N_VOCAB, extra).tolist())
            kv.snapshot_restore()
            kv.snapshot_drop()
            llm.n_tokens = n
            model.n, model.boundary, model.heads = n, boundary, heads
        same(llm, model)
    llm.close()
    return done


def test_random_operations(tiny: Path) -> None:
    done = run(tiny, 2000, 0)
    assert len(done) == 8 and min(done.values()) > 20


@pytest.mark.slow
def test_twenty_thousand_operations(tiny: Path) -> None:
    run(tiny, 20_000, 1)


if __name__ == "__main__":
    steps = int(sys.argv[1]) if len(sys.argv) > 1 else 20_000
    own_seed = int(sys.argv[2]) if len(sys.argv) > 2 else 0
    tiny_path = tiny_model.write_llama(Path("/tmp/windowkv-fuzz.gguf"))
    print(steps, "steps without a difference:", run(tiny_path, steps, own_seed))
