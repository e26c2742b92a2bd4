"""What a session is given while it lives: another limit, and a function that is told how far a prompt is."""

from __future__ import annotations

from . import _native
from .limit import Limit, check_limit
from .pins import n_pinned
from .progress import KVProgress, check_progress
from .states import SavedStates

__all__ = ["Limited"]


class Limited(SavedStates):
    """The part of :class:`windowkv_edge.Llama` that these attributes belong to."""

    @property
    def kv_limit(self) -> int | str | None:
        """The limit, see the class; setting it takes effect at the next batch or token, and a smaller one compacts
        there. ``kv_budget`` stays what it is.

        Raises:
            UnsupportedCallError: when set, the session has no policy or cannot be used now (see the class).
            TypeError, ValueError: when set, it is no limit, or leaves too few cells for the policy or for the pins; the
                old one stays.
        """
        return None if self._kv_limit is None else self._kv_limit.given

    @kv_limit.setter
    def kv_limit(self, limit: int | str | None) -> None:
        with self._use("setting kv_limit"):
            cache = self._need_cache("setting kv_limit")
            if limit is None:
                self._kv_limit = None
                self._kv_given.pop("kv_limit", None)
                return
            new, stats = Limit(check_limit(limit), self._kv_interval), cache.kv.stats()
            new.check(stats, cache.bound)
            n, room = n_pinned(self._kv_pins.asked), new.n_free(stats, cache.bound)
            if n >= room:
                raise ValueError(
                    f"kv_limit={new.given!r} leaves {room} cells per head for what stays, and {n} positions are "
                    "pinned; give a larger one, or call kv_unpin()"
                )
            self._kv_limit = new
            self._kv_given["kv_limit"] = new.given

    def kv_room(self, n_tokens: int) -> int | None:
        """Cells per (layer, kv head) within which a prompt would be read that goes on behind what is there; None with
        the full cache.

        Args:
            n_tokens: tokens that are not in the cache yet.

        Raises:
            UnsupportedCallError: the session has no policy or cannot be used now (see the class).
            TypeError, ValueError: no number of tokens.
        """
        with self._kv_guard.use("kv_room()", reads=True):
            cache = self._need_cache("kv_room()")
            if (n_tokens := _native.int32("n_tokens", n_tokens)) < 0:
                raise ValueError(f"n_tokens is {n_tokens}, expected at least 0")
            return self._room(cache, n_tokens, "prompt")

    @property
    def kv_progress(self) -> KVProgress | None:
        """The function that is told how far a prompt is, see the class.

        Raises:
            TypeError: when set, neither None nor something to call.
        """
        return self._kv_progress

    @kv_progress.setter
    def kv_progress(self, progress: KVProgress | None) -> None:
        self._kv_progress = check_progress(progress)
