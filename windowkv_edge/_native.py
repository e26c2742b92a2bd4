"""The C interface through cffi; the two headers in ``include/`` are the only place where it is declared."""

from __future__ import annotations

import ctypes
import operator
import re
import runpy
import traceback
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import fields
from typing import TYPE_CHECKING, Any

import cffi
import numpy as np
import numpy.typing as npt

from ._libs import BUILT, llama_library
from .budget import TYPES
from .errors import (
    LibraryMismatchError,
    NativeArgumentError,
    NativeCallError,
    NativeError,
    NativeModelError,
    UnsupportedCallError,
    UnsupportedModelError,
    WindowKVError,
)

if TYPE_CHECKING:
    from .policies.parts import Allocation, Parts, Scoring, Selection

__all__ = ["Context", "budgets", "build_stamp", "decode_error", "ffi", "lib", "pending", "select"]

HEADERS = [BUILT / "include" / name for name in ("windowkv-policy.h", "windowkv.h")]
"""In the order of their includes."""


def _declarations() -> str:
    texts = [path.read_text(encoding="utf-8") for path in HEADERS]
    body = "".join(text.split("// cdef: begin", 1)[1].split("// cdef: end", 1)[0] for text in texts)
    return "struct llama_context;\n" + body.replace("WKV_API ", "")


ffi = cffi.FFI()
ffi.cdef(_declarations())
lib: Any = ffi.dlopen(str(llama_library()))


def build_stamp() -> str:
    """Hash of the pin, the patches and the native sources that the library was built from."""
    return str(ffi.string(lib.wkv_build_stamp()).decode())


def check_stamp() -> None:
    """Raise LibraryMismatchError unless the library was built together with this package."""
    try:
        from ._stamp import STAMP
    except ModuleNotFoundError:
        STAMP = str(runpy.run_path(str(BUILT / "_stamp.py"))["STAMP"])

    got = build_stamp()
    if got != STAMP:
        raise LibraryMismatchError(
            f"libllama has the build stamp {got[:12]}, this package expects {STAMP[:12]}; "
            'reinstall with: CMAKE_ARGS="-DLLAMA_BUILD=OFF" pip install --force-reinstall .'
        )


def last_error() -> str:
    """Message of the last native failure on this thread, "" if there was none."""
    return str(ffi.string(lib.wkv_last_error()).decode("utf-8", "replace"))


def clear_error() -> None:
    """Forget :func:`last_error`, so that what it says afterwards is about what was called in between."""
    lib.wkv_clear_error()


def out_of_memory() -> bool:
    """Whether :func:`last_error` says that memory ran out."""
    return re.search(r"\bno memory\b|\bmemory ran out\b", last_error()) is not None


ERRORS: Mapping[int, type[NativeError]] = {
    lib.WKV_ERR_ARGUMENT: NativeArgumentError,
    lib.WKV_ERR_NO_POLICY: NativeCallError,
    lib.WKV_ERR_UNSUPPORTED: NativeModelError,
}
"""By ``enum wkv_status``; the other codes are a plain NativeError."""


def check(status: int) -> int:
    """Return a non-negative status.

    Raises:
        NativeError: the status is negative; a subclass where the code says that it is the caller's argument
            (ValueError), the model (UnsupportedModelError) or the call (UnsupportedCallError).
    """
    if status < 0:
        raise ERRORS.get(int(status), NativeError)(last_error())
    return int(status)


_DECODE = {
    1: "no room in the cache",
    2: "it was aborted",
    -1: "the batch is invalid: a token outside of the vocabulary, or positions that do not follow those of the cache",
    -2: "memory ran out",
    -3: "the computation failed",
}


def decode_error(status: int, n_tokens: int) -> WindowKVError:
    """What to raise where ``llama_decode`` returned a status other than 0, with the cache's reason if there is one.

    Args:
        status: what it returned.
        n_tokens: tokens that were to be evaluated.
    """
    reason = last_error() or _DECODE.get(status, "see llama.cpp's log")
    kind = UnsupportedCallError if status in (1, -1) and not out_of_memory() else NativeError
    return kind(f"llama_decode of {n_tokens} tokens returned {status}: {reason}")


@contextmanager
def pending(n_observed: int, cells: str | None = None) -> Iterator[None]:
    """The llama_context created inside gets a ragged cache that observes ``n_observed`` queries.

    Its cells are of the type ``cells`` if the blocks of that divide the heads' rows, else of the context's types.
    """
    try:
        check(lib.wkv_pending_set(n_observed, -1 if cells is None else TYPES[cells]))
        yield
    finally:  # after Ctrl-C as well: the next context would be somebody else's
        lib.wkv_pending_clear()


# arrays that a struct points to live as long as it
_arrays: weakref.WeakKeyDictionary[Any, Any] = weakref.WeakKeyDictionary()


def _fields(part: Scoring | Allocation | Selection) -> dict[str, Any]:
    """Fields of a struct of the same names; a choice such as layers="pyramid" is the enum's WKV_LAYERS_PYRAMID."""
    own = ((field.name, getattr(part, field.name)) for field in fields(part) if field.name != "importance")
    return {
        name: getattr(lib, f"WKV_{name}_{value}".upper()) if isinstance(value, str) else value for name, value in own
    }


def policy_struct(parts: Parts) -> Any:
    """A ``struct wkv_policy *``."""
    of_parts = {name: _fields(getattr(parts, name)) for name in ("scoring", "allocation", "selection")}
    res = ffi.new("struct wkv_policy *", {**of_parts, "replay_share": parts.replay_share})
    if parts.allocation.importance is not None:
        scores = np.ascontiguousarray(parts.allocation.importance, dtype=np.float64)
        res.allocation.importance = ffi.cast("double *", ffi.from_buffer(scores))
        res.allocation.n_importance = scores.size
        _arrays[res] = scores
    return res


Cache = Sequence[Sequence[npt.NDArray[Any]]]
"""Per layer and kv head an array [cells]."""

Choose = Callable[[int, Cache, Cache, Cache], None]
"""``choose(n_cells, positions, scores, keep)``: int32, float32 and uint8, of the cells that are not pinned."""


def _split(pointer: Any, dtype: type, cells: npt.NDArray[np.int32], writeable: bool = False) -> Cache:
    """Views of native memory in which the cells of every (layer, kv head) follow each other."""
    n_layer, n_head_kv = cells.shape
    size = int(cells.sum()) * np.dtype(dtype).itemsize
    flat: npt.NDArray[Any] = np.frombuffer(ffi.buffer(pointer, size), dtype=dtype)
    flat.flags.writeable = writeable
    parts = iter(np.split(flat, np.cumsum(cells.ravel())[:-1]))
    return [[next(parts) for _ in range(n_head_kv)] for _ in range(n_layer)]


def _clear_frames(error: BaseException) -> None:
    """Of an exception and those that it came from: their arrays point to memory that is gone."""
    seen: list[BaseException] = []
    todo: list[BaseException | None] = [error]
    while todo:
        one = todo.pop()
        if one is not None and not any(one is other for other in seen):
            seen.append(one)
            traceback.clear_frames(one.__traceback__)
            todo += [one.__cause__, one.__context__]


def int32(name: str, value: Any) -> int:
    """An int that fits the interface; integers of NumPy are fine.

    Raises:
        TypeError: it is none.
        ValueError: it does not fit.
    """
    try:
        res = operator.index(value)
    except TypeError:
        raise TypeError(f"{name} is {value!r}, expected an int") from None
    if not -(2**31) <= res < 2**31:
        raise NativeArgumentError(f"{name} is {res}, expected an int of at most 2^31 - 1")
    return res


class Context:
    """The ragged cache of one llama_context (a ctypes pointer owned by llama-cpp-python).

    Raises:
        NativeError: by every method, see :func:`check`; :class:`NativeCallError` where the context has no policy.
    """

    def __init__(self, ctx: Any) -> None:
        self._ctx = ffi.cast("struct llama_context *", ctypes.cast(ctx, ctypes.c_void_p).value or 0)

    def reserve(self, n_tokens: int) -> None:
        check(lib.wkv_reserve(self._ctx, n_tokens))

    def fill(self, n_tokens: int) -> None:
        """Positions with random cells in an empty cache, for measuring; works without a policy too."""
        check(lib.wkv_fill(self._ctx, n_tokens))

    def ready(self, ragged: bool) -> None:
        """Raise UnsupportedModelError unless model and backend serve policies, those with ragged heads included."""
        if lib.wkv_ready(self._ctx, ragged) < 0:
            raise UnsupportedModelError(last_error())

    def has_ragged(self) -> bool:
        """Whether heads that hold different numbers of cells are attended at once on the devices of all layers."""
        return check(lib.wkv_has_ragged(self._ctx)) == 1

    def copy(self) -> Context:
        """The same cache, to be closed by itself."""
        res = object.__new__(type(self))
        res.__dict__.update(self.__dict__)
        return res

    def close(self) -> None:
        """Every later call raises instead of reading memory that is gone; the context itself is somebody else's."""
        self._ctx = ffi.NULL

    def set_observed(self, n_observed: int) -> None:
        """Observe up to this many tokens from now on; what was observed is forgotten."""
        check(lib.wkv_set_observed(self._ctx, n_observed))

    def prompt_done(self) -> None:
        """The positions so far end a prompt: its last queries stay available until the next one ends."""
        check(lib.wkv_prompt_done(self._ctx))

    def on_prompt(self, fn: Callable[[], None], failed: Callable[[BaseException], None]) -> None:
        """Have a function called inside ``llama_decode``, before a single token is evaluated behind a prompt that was
        neither compacted nor declared done; :meth:`watch` turns that on and off. It may compact, declare the prompt
        done and read the cache, nothing else.

        Args:
            fn: the function. Kept as long as this object, which has to outlive the context's last decode.
            failed: gets what it raises, and Ctrl-C, which C cannot pass on.
        """

        @ffi.callback("wkv_prompt_fn", onerror=lambda kind, error, trace: failed(error))  # type: ignore[untyped-decorator]
        def call(user: Any) -> None:
            fn()

        self._on_prompt = call
        self.watch(True)

    def watch(self, on: bool) -> None:
        """Whether the function of :meth:`on_prompt` is called."""
        check(lib.wkv_on_prompt(self._ctx, self._on_prompt if on else ffi.NULL, ffi.NULL))

    def set_pinned(self, ranges: Sequence[tuple[int, int]]) -> None:
        """Cells of these positions stay in every compaction, [start, stop) each."""
        flat = np.array(ranges, dtype=np.int32).reshape(-1)
        check(lib.wkv_set_pinned(self._ctx, ffi.from_buffer("int32_t[]", flat), len(ranges)))

    def set_room(self, n_tokens: int) -> None:
        """Every compaction from now on leaves room for this many tokens, 0 = little: cells do not move meanwhile."""
        check(lib.wkv_set_room(self._ctx, n_tokens))

    def accumulate(self) -> None:
        """Add the attention of the queries that are observed and in no sum yet to the sums of the cells."""
        check(lib.wkv_accumulate(self._ctx))

    def shift(self, p0: int, n: int) -> None:
        """Give up the positions [p0, p0 + n), the later ones move down; nothing changes if it fails."""
        check(lib.wkv_shift(self._ctx, p0, n))

    def can_shift(self) -> bool:
        """Whether the model's positions can be moved."""
        return check(lib.wkv_can_shift(self._ctx)) == 1

    def set_attention(self, name: str) -> None:
        """Attention of layers whose heads hold equally many cells: "auto", "stock" or "ragged"."""
        check(lib.wkv_set_attention(self._ctx, getattr(lib, f"WKV_ATTENTION_{name}".upper())))

    @contextmanager
    def observing(self, repeats: tuple[int, int] | None = None, n_tokens: int | None = None) -> Iterator[None]:
        """What is evaluated inside is only observed: its positions are given up afterwards, and a compaction that
        follows takes its queries for the newest ones.

        Args:
            repeats: positions [start, stop) that it repeats: their cells get scores by that (:meth:`replayed`), and its
                queries are forgotten.
            n_tokens: how many tokens do so; with any other number there are no scores. None = one for every position.
        """
        if repeats is None:
            check(lib.wkv_observe_begin(self._ctx))
        else:
            n = repeats[1] - repeats[0] if n_tokens is None else n_tokens
            check(lib.wkv_replay_begin(self._ctx, *repeats, n))
        try:
            yield
        finally:
            self.end_observing()

    def end_observing(self) -> None:
        """What :meth:`observing` does at its end; Ctrl-C may have kept it from doing so."""
        check(lib.wkv_observe_end(self._ctx))

    def compact(self, policy: Any, n_cells: int) -> int:
        """Cells released over all layers and heads."""
        return check(lib.wkv_compact(self._ctx, policy, n_cells))

    def compact_custom(self, window_size: int, n_cells: int, choose: Choose) -> int:
        """Cells released over all layers and heads; an exception of ``choose`` leaves the cache as it is.

        Args:
            window_size: tokens at the end whose attention the scores are.
            n_cells: cells per (layer, kv head) that stay on average.
            choose: sets ``keep`` to 1 for the cells that stay. All arrays are views of native memory, valid during the
                call.

        Raises:
            NativeError: the selection cannot be used, a graph failed or memory ran out.
            KeyboardInterrupt: Ctrl-C while the selection ran.
            BaseException: what ``choose`` raised.
        """
        failed: list[BaseException] = []

        def give_up(kind: type[BaseException], error: BaseException, trace: Any) -> None:
            failed.append(error)

        # a signal that is pending when the function starts raises before its first line: onerror gets that
        @ffi.callback("wkv_select_fn", error=1, onerror=give_up)  # type: ignore[untyped-decorator]
        def select(user: Any, shapes: Any, n_cells: int, positions: Any, scores: Any, keep: Any) -> int:
            try:
                n = shapes.n_layer, shapes.n_head_kv
                cells = np.frombuffer(ffi.buffer(shapes.cells, 4 * n[0] * n[1]), dtype=np.int32).reshape(n)
                chosen = _split(keep, np.uint8, cells, writeable=True)
                choose(int(n_cells), _split(positions, np.int32, cells), _split(scores, np.float32, cells), chosen)
                return 0
            except BaseException as error:  # C cannot pass it on
                failed.append(error)
                return 1

        status = lib.wkv_compact_custom(self._ctx, window_size, n_cells, select, ffi.NULL)
        if failed:
            _clear_frames(failed[0])
            raise failed[0]
        return check(status)

    def snapshot_save(self) -> None:
        check(lib.wkv_snapshot_save(self._ctx))

    def snapshot_restore(self) -> None:
        check(lib.wkv_snapshot_restore(self._ctx))

    def snapshot_drop(self) -> None:
        check(lib.wkv_snapshot_drop(self._ctx))

    def stats(self) -> Any:
        """A ``struct wkv_stats``."""
        res = ffi.new("struct wkv_stats *")
        check(lib.wkv_get_stats(self._ctx, res))
        return res

    def removable(self) -> int:
        """The first position from which on all can be removed; the number of positions if there is none."""
        return check(lib.wkv_get_removable(self._ctx))

    def layers(self) -> tuple[int, ...]:
        """Indices in the model of the layers that policies compress."""
        res = np.zeros(self.stats().n_layer, dtype=np.int32)
        n = check(lib.wkv_get_layers(self._ctx, ffi.from_buffer("int32_t[]", res), res.size))
        return tuple(res[:n].tolist())

    def cells(self) -> npt.NDArray[np.int32]:
        """int32 [n_layer, n_head_kv]."""
        stats = self.stats()
        res = np.zeros((stats.n_layer, stats.n_head_kv), dtype=np.int32)
        check(lib.wkv_get_cells(self._ctx, ffi.from_buffer("int32_t[]", res), res.size))
        return res

    def positions(self, layer: int, head: int) -> npt.NDArray[np.int32]:
        """int32 [cells], ascending."""
        layer, head = int32("layer", layer), int32("head", head)
        res = np.zeros(max(1, self.stats().n_past), dtype=np.int32)
        n = check(lib.wkv_get_positions(self._ctx, layer, head, ffi.from_buffer("int32_t[]", res), res.size))
        return res[:n]

    def scores(self, layer: int, window_size: int, among: int = 0) -> list[npt.NDArray[np.float32]]:
        """Per kv head float32 [cells]: mean attention of the last window_size tokens, as far as observed.

        For a policy that scores with two numbers of queries ``among`` is the larger one; a compaction's sums may round
        in another way.
        """
        cells = self.cells()[layer]
        res = np.zeros(cells.sum(), dtype=np.float32)
        check(lib.wkv_get_scores(self._ctx, layer, window_size, among, ffi.from_buffer("float[]", res), res.size))
        return np.split(res, np.cumsum(cells)[:-1])

    def replayed(self, layer: int) -> list[npt.NDArray[np.float32]]:
        """Per kv head float32 [cells]: the largest attention that tokens paid which repeated a cell's position; 2 where
        none did."""
        cells = self.cells()[layer]
        res = np.zeros(cells.sum(), dtype=np.float32)
        check(lib.wkv_get_replayed(self._ctx, layer, ffi.from_buffer("float[]", res), res.size))
        return np.split(res, np.cumsum(cells)[:-1])

    def attention(self, layer: int) -> list[npt.NDArray[np.float32]]:
        """Per kv head float32 [n_gqa, cells]: attention of the last position, a row for every query head."""
        cells = self.cells()[layer]
        n_gqa = self.stats().n_gqa
        res = np.zeros(cells.sum() * n_gqa, dtype=np.float32)
        check(lib.wkv_get_attention(self._ctx, layer, ffi.from_buffer("float[]", res), res.size))
        return [part.reshape(n_gqa, -1) for part in np.split(res, n_gqa * np.cumsum(cells)[:-1])]

    def rows(self, layer: int, head: int, which: str) -> npt.NDArray[np.float32]:
        """float32 [cells, head_dim] of K ("k") or V ("v")."""
        n = len(self.positions(layer, head))
        res = np.zeros(n * 1024, dtype=np.float32)
        size = check(
            lib.wkv_get_rows(self._ctx, layer, head, "kv".index(which), ffi.from_buffer("float[]", res), res.size)
        )
        return res[:size].reshape(n, -1)

    def queries(self, layer: int, head: int) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.float32]]:
        """Positions int32 [observed] and queries float32 [observed, head_dim] of one query head."""
        layer, head = int32("layer", layer), int32("head", head)
        pos = np.full(self.stats().n_observed, -1, dtype=np.int32)
        res = np.zeros(pos.size * 1024, dtype=np.float32)
        rows, at = ffi.from_buffer("float[]", res), ffi.from_buffer("int32_t[]", pos)
        size = check(lib.wkv_get_queries(self._ctx, layer, head, rows, res.size, at, pos.size))
        n = int(np.count_nonzero(pos >= 0))
        return pos[:n], res[:size].reshape(n, size // max(1, n))


def _shapes(cells: npt.NDArray[np.int32], n_past: int, n_gqa: int = 1) -> Any:
    res = ffi.new("struct wkv_shapes *")
    (res.n_layer, res.n_head_kv), res.n_gqa, res.n_past = cells.shape, n_gqa, n_past
    res.cells = ffi.cast("int32_t *", ffi.from_buffer(cells))
    _arrays[res] = cells
    return res


def _flat(cache: Cache, dtype: type) -> npt.NDArray[Any]:
    return np.ascontiguousarray(np.concatenate([np.ravel(own) for layer in cache for own in layer]), dtype=dtype)


def _planes(parts: Parts, scores: Cache, token_scores: Cache | None) -> npt.NDArray[np.float32]:
    if parts.scoring.token_window_size and token_scores is None:
        raise ValueError(f"token_window_size is {parts.scoring.token_window_size}, expected token_scores as well")
    flat = _flat(scores, np.float32)
    return flat if token_scores is None else np.concatenate([flat, _flat(token_scores, np.float32)])


def _n_gqa(parts: Parts, scores: Cache | None) -> int:
    """Rows of the scores of every kv head."""
    return 1 if parts.scoring.query_heads == "mean" or scores is None else len(np.atleast_2d(scores[0][0]))


def budgets(
    parts: Parts,
    cells: npt.ArrayLike,
    n_cells: int,
    positions: Cache | None = None,
    scores: Cache | None = None,
    token_scores: Cache | None = None,
) -> npt.NDArray[np.int32]:
    """Native budgets: int32 [n_layer, n_head_kv].

    Args:
        parts: the policy, :meth:`windowkv_edge.KVPolicy.parts`.
        cells: [n_layer, n_head_kv], cells that each head holds now.
        n_cells: average cells per (layer, kv head).
        positions: per layer and kv head int32 [cells], ascending; needed where heads compete.
        scores: per layer and kv head float32 [cells], or [n_gqa, cells] for query_heads="each"; likewise.
        token_scores: the same by the last ``token_window_size`` tokens, for policies with ``token_share``.
    """
    have = np.ascontiguousarray(cells, dtype=np.int32)
    res = np.zeros_like(have)
    pos = ffi.NULL if positions is None else ffi.from_buffer("int32_t[]", _flat(positions, np.int32))
    score = ffi.NULL if scores is None else ffi.from_buffer("float[]", _planes(parts, scores, token_scores))
    n_past = int(have.max(initial=0)) if positions is None else 1 + int(np.max(_flat(positions, np.int32), initial=-1))
    shapes = _shapes(have, n_past, _n_gqa(parts, scores))
    check(lib.wkv_budgets(policy_struct(parts), shapes, n_cells, pos, score, ffi.from_buffer("int32_t[]", res)))
    return res


def select(
    parts: Parts, budget: npt.ArrayLike, positions: Cache, scores: Cache, token_scores: Cache | None = None
) -> list[list[npt.NDArray[np.bool_]]]:
    """Native selection over arrays.

    Args:
        parts, positions, scores, token_scores: as for :func:`budgets`.
        budget: [n_layer, n_head_kv], cells that stay.

    Returns:
        Per layer and kv head bool [cells], True where the cell stays.
    """
    cells = np.array([[len(own) for own in layer] for layer in positions], dtype=np.int32)
    pos, score = _flat(positions, np.int32), _planes(parts, scores, token_scores)
    keep = np.zeros(pos.size, dtype=np.uint8)
    own = np.ascontiguousarray(budget, dtype=np.int32)
    check(
        lib.wkv_select(
            policy_struct(parts),
            _shapes(cells, int(pos.max(initial=-1)) + 1, _n_gqa(parts, scores)),
            ffi.from_buffer("int32_t[]", own),
            ffi.from_buffer("int32_t[]", pos),
            ffi.from_buffer("float[]", score),
            ffi.from_buffer("uint8_t[]", keep),
        )
    )
    parts_of = iter(np.split(keep.astype(bool), np.cumsum(cells.ravel())[:-1]))
    return [[next(parts_of) for _ in layer] for layer in positions]
