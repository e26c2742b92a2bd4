"""Sessions that are saved and go on: states as llama-cpp-python has them, caches of states, files for people."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
import struct
import sys
from collections.abc import Callable, Generator, Mapping, Sequence
from typing import Any

import llama_cpp
import numpy as np
import numpy.typing as npt
from llama_cpp.llama import LlamaState
from llama_cpp.llama_cache import LlamaDiskCache, LlamaRAMCache

from . import state_files
from ._files import open_regular
from .budget import check_budget, is_same
from .errors import FormatError, NativeError, UnsupportedCallError
from .evaluation import PolicyEvaluation
from .native_state import get_state, refusal, set_state
from .pins import n_pinned
from .policies import QUERIES, KVPolicy
from .prompts import n_common, n_reused
from .shift import GivenUp
from .state_files import SavedSession

__all__ = ["SavedState", "SavedStates", "model_id", "policy_text"]

Tokens = npt.NDArray[np.intc]

ROPE = (
    "rope_scaling_type", "rope_freq_base", "rope_freq_scale", "yarn_ext_factor", "yarn_attn_factor", "yarn_beta_fast",
    "yarn_beta_slow", "yarn_orig_ctx",
)  # fmt: skip
"""Parameters of a context that keys depend on."""

N_SAMPLES, N_SAMPLE = 64, 4096  # of a model file, and bytes of each


class SavedState(LlamaState):
    """What ``save_state`` of a session with a policy returns; it can be pickled.

    Attributes:
        input_ids: int32 [n_ctx], -1 behind the tokens.
        scores: float32 [n_tokens, n_vocab] with ``logits_all=True``, else [0, n_vocab].
        n_tokens: tokens that were evaluated.
        llama_state: the cells that stay, and what windows and recurrent layers hold.
        llama_state_size: its bytes.
        seed: of the session.
        session: what else belongs to it (model, policy, budget), plain values.
    """

    def __init__(self, *, session: dict[str, Any], **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.session = session


def policy_text(policy: KVPolicy) -> str:
    """The policy and all of its parameters; the same text means the same choices."""
    return f"{policy.name}({_parameters(policy) if dataclasses.is_dataclass(policy) else ''})"


def _parameters(value: Any) -> str:
    return ", ".join(f"{own.name}={_described(getattr(value, own.name))}" for own in dataclasses.fields(value))


def _described(value: Any) -> str:
    if isinstance(value, np.ndarray):
        digest = hashlib.blake2b(np.ascontiguousarray(value).tobytes(), digest_size=8).hexdigest()
        return f"array({value.dtype}, {value.shape}, {digest})"
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return f"{type(value).__name__}({_parameters(value)})"
    if isinstance(value, Mapping):
        return f"{{{', '.join(sorted(f'{_described(key)}: {_described(item)}' for key, item in value.items()))}}}"
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(map(_described, value))}]"
    if isinstance(value, (str, int, float, type(None), os.PathLike)):
        return repr(os.fspath(value) if isinstance(value, os.PathLike) else value)
    # what it does cannot be told; at least its kind
    return str(getattr(value, "__qualname__", type(value).__qualname__))


def model_id(llm: Any) -> str:
    """Tells whether two sessions have the same model: of its metadata, its size, samples of its file, and of what else
    keys and values depend on (LoRA, overrides, RoPE parameters).

    Raises:
        OSError: the file cannot be read.
    """
    params, metadata = llm.context_params, llm.metadata
    trained = metadata.get(f"{metadata.get('general.architecture')}.rope.scaling.original_context_length")
    model = llm._model.model
    about = {
        "metadata": metadata,
        "size": [llama_cpp.llama_model_size(model), llama_cpp.llama_model_n_params(model)],
        "lora": [llm.lora_path, llm.lora_scale],
        "overrides": repr(llm.kv_overrides),
        "rope": [getattr(params, name) for name in ROPE],
        # LongRoPE takes other factors beyond it
        "is_long": trained is not None and trained.isdecimal() and llm.n_ctx() > int(trained),
    }
    digest = hashlib.blake2b(json.dumps(about, sort_keys=True, default=repr).encode(), digest_size=16)
    with open_regular(llm.model_path) as file:
        n_bytes = os.fstat(file.fileno()).st_size
        digest.update(str(n_bytes).encode())
        for i in range(N_SAMPLES):
            file.seek(max(0, n_bytes - N_SAMPLE) * i // (N_SAMPLES - 1))
            digest.update(file.read(N_SAMPLE))
    return digest.hexdigest()


def _head(data: npt.NDArray[np.uint8]) -> tuple[bytes, int]:
    """Architecture and positions of a state that a context with a policy wrote: it begins with the length of the name,
    the name, magic, version, parts and positions. (b"", -1) if it is shorter than that."""
    head = data[:256].tobytes()
    try:
        (n_name,) = struct.unpack_from("=I", head)
        return head[4 : 4 + n_name], int(struct.unpack_from("=4I", head, 4 + n_name)[3])
    except struct.error:
        return b"", -1


class SavedStates(PolicyEvaluation):
    """The part of :class:`windowkv_edge.Llama` that saves and loads."""

    _kv_states: Any = None
    _kv_taking = False  # inside create_completion(), which looks for a state and keeps one

    def save_state(self) -> LlamaState:
        """Everything that the session needs to go on: the cells that stayed, tokens, policy and budget.

        Raises:
            UnsupportedCallError: the session cannot be used now (see the class), or others removed positions from its
                context.
            NativeError: memory ran out.
        """
        with self._use("save_state()"):
            if self._kv_cache is None:
                return super().save_state()
            own = self._capture("save_state()")
            input_ids = np.full(self.n_ctx(), -1, dtype=np.intc)
            input_ids[: len(own.tokens)] = own.tokens
            return SavedState(
                input_ids=input_ids, scores=own.scores, n_tokens=len(own.tokens), llama_state=own.native.tobytes(),
                llama_state_size=own.native.size, seed=own.seed, session=own.session,
            )  # fmt: skip

    def load_state(self, state: LlamaState) -> None:
        """Go on from a state that a session with the same model and policy saved; what is not taken leaves the session
        as it was. The session takes over its budget.

        A prompt that shares only a part of its beginning with what was compacted in the state is evaluated anew.

        Raises:
            UnsupportedCallError: the state does not fit the session (says why), or that cannot be used now (see the
                class).
            TypeError: it is no state.
            NativeError: memory ran out.
        """
        with self._use("load_state()"):
            if self._kv_cache is None:
                super().load_state(state)
                return
            if not isinstance(state, LlamaState):
                raise TypeError(f"load_state(): got {type(state).__name__}, expected what save_state() returned")
            if not isinstance(state, SavedState):
                raise UnsupportedCallError("load_state(): the state is of a session without a policy")
            tokens = np.array(state.input_ids[: state.n_tokens], dtype=np.intc)
            native = np.frombuffer(state.llama_state, dtype=np.uint8)[: state.llama_state_size]
            self._take("load_state()", SavedSession(tokens, state.scores, state.seed, native, state.session, {}))

    def kv_save(self, path: str | os.PathLike[str], *, extra: Mapping[str, Any] | None = None) -> None:
        """Save the session to a file, to go on from it at any time: :meth:`kv_load`.

        The file is written whole or not at all; what was there stays until then. It holds the tokens of the session as
        they are.

        Args:
            path: the file.
            extra: JSON values that :meth:`kv_load` returns.

        Raises:
            FileError: the file cannot be written, or the disk is full; what was there stays. A RuntimeError.
            UnsupportedCallError: the session has no policy, or see :meth:`save_state`.
            NativeError: memory ran out.
            ValueError, TypeError: ``extra`` is no JSON object, or larger than 16 MiB.
        """
        with self._use("kv_save()"):
            self._need_cache("kv_save()")
            text = state_files.extra_text({} if extra is None else extra)
            state_files.write(path, self._capture("kv_save()"), text)

    def kv_load(self, path: str | os.PathLike[str]) -> dict[str, Any]:
        """Go on from a file of :meth:`kv_save`. The session needs the same model and policy, and takes over the budget.
        If it is refused, the session stays as it was.

        Args:
            path: the file.

        Returns:
            What ``extra`` was when it was saved.

        Raises:
            OSError: the file cannot be read.
            FormatError: it is no saved session, was cut or changed. A ValueError.
            UnsupportedCallError: it was saved with another model or policy, or holds more than ``n_ctx`` tokens, or see
                :meth:`load_state`.
            NativeError: memory ran out.
        """
        with self._use("kv_load()"):
            self._need_cache("kv_load()")
            try:
                saved = state_files.read(path)
            except MemoryError:
                raise NativeError(f"kv_load(): no memory for the content of {os.fspath(path)}") from None
            self._take(f"kv_load() of {os.fspath(path)}", saved)
            return saved.extra

    #
    # caches of states
    #

    @property
    def cache(self) -> Any:
        """What ``set_cache`` set.

        Raises:
            TypeError: when set, see :meth:`set_cache`.
        """
        return _Taker(self, self._kv_states) if self._kv_taking and self._kv_states is not None else self._kv_states

    @cache.setter
    def cache(self, cache: Any) -> None:
        self._kv_states = cache

    def set_cache(self, cache: Any) -> None:
        """Keep a state after every completion, and begin with one that saves evaluating, as ``llama_cpp.Llama`` does.

        A session with a policy takes the state that saves most: one of its model, policy and budget that can go back to
        where the prompt differs.

        Args:
            cache: ``llama_cpp.LlamaRAMCache()``, ``llama_cpp.LlamaDiskCache(folder)`` or None.
        """
        self._kv_states = cache

    def _create_completion(self, *args: Any, **kwargs: Any) -> Any:
        own = super()._create_completion(*args, **kwargs)
        return own if self._kv_cache is None else self._completing(own)

    def _completing(self, own: Any) -> Generator[Any, None, None]:
        try:
            while True:
                before, self._kv_taking = self._kv_taking, True
                try:
                    chunk = next(own)
                except StopIteration:
                    return
                finally:
                    self._kv_taking = before
                yield chunk
        finally:
            own.close()

    def _take_best(self, cache: Any, prompt: Sequence[int]) -> bool:
        """Load the state that saves most; False if none saves more than the session as it is."""
        with self._use("load_state()"):
            own = self._need_cache("load_state()")
            tokens = np.array(prompt, dtype=np.intc)
            held = self.input_ids[: self.n_tokens]
            n_live = self._n_mapped(self._kv_lost, held, tokens, lambda mapped: self._n_live(own, mapped))
            n_live = 0 if self._kv_is_over else n_live
            best = max(n_live, self._n_kept(tokens))
            if (found := _best_of(cache, tokens, best, lambda state: self._saves(state, tokens))) is None:
                return False
            self.load_state(found)
            return True

    def _saves(self, state: Any, prompt: Tokens) -> int:
        if not isinstance(state, SavedState):
            return 0
        try:
            state_files.check_session(getattr(state, "session", None), state.n_tokens, self._kv_noted())
        except FormatError:
            return 0  # of another version
        if self._misfit(state.session, state.n_tokens, state.scores) is not None:
            return 0
        if not is_same(state.session["budget"], self._kv_when.budget):
            return 0  # its prompt was compacted for another one
        if state.session["noted"]["pins"] != self._kv_noted()["pins"]:
            return 0  # and without these pins, or with others
        if not self._suits(state.session["noted"]["kept_for"]):
            return 0  # and for another question
        lost = GivenUp.of(state.session["noted"]["lost"])
        held, removable = state.input_ids[: state.n_tokens], state.session["removable"]
        return self._n_mapped(lost, held, prompt, lambda mapped: n_reused(held, removable, mapped))

    def _n_mapped(self, lost: GivenUp, held: Tokens, prompt: Tokens, count: Callable[[Tokens], int]) -> int:
        """What ``count`` gives of a prompt as a session sees it that gave up a part, and this part."""
        if not self._shifts:
            return count(prompt)
        mapped = np.array(lost.held(prompt.tolist(), held)[1], dtype=np.intc)
        n = count(mapped)
        return n + len(prompt) - len(mapped) if n > 0 else 0

    #
    # internals
    #

    def _capture(self, call: str) -> SavedSession:
        cache = self._need_cache(call)
        n_past = int(cache.kv.stats().n_past)
        if n_past < self.n_tokens:
            raise UnsupportedCallError(
                f"{call}: n_tokens is {self.n_tokens} and the cache holds {n_past} positions; call reset() and "
                "evaluate the prompt again"
            )
        try:
            native = get_state(self._ctx.ctx, call)
            tokens = np.array(self.input_ids[: self.n_tokens], dtype=np.intc)
            rows = self.n_tokens if self._logits_all else 0
            scores = np.array(self.scores[:rows], dtype=np.single)
        except MemoryError:
            raise NativeError(f"{call}: no memory for a copy of the session") from None
        session = {
            "model": self._kv_model, "policy": policy_text(cache.policy), "budget": self._kv_when.budget,
            "n_past": n_past, "removable": cache.kv.removable(), "noted": self._kv_noted(),
        }  # fmt: skip
        return SavedSession(tokens, scores, int(self._seed), native, session, {})

    def _misfit(self, session: Mapping[str, Any], n_tokens: int, scores: npt.NDArray[np.single]) -> str | None:
        """Why a saved session is not one for this model, policy and context; None if it is."""
        cache = self._need_cache("load_state()")
        if session["model"] != self._kv_model:
            return "it was saved with another model, or with other LoRA, metadata or RoPE parameters"
        if session["policy"] != (own := policy_text(cache.policy)):
            return f"it was saved with kv_policy={session['policy']}, and this session has {own}; set kv_policy first"
        kept_for = session["noted"]["kept_for"]
        if kept_for == "last" and not self._suits(kept_for):
            return f"its cells were kept for the last question, and this session has kv_query={self._kv_query!r}"
        if max(n_tokens, session["n_past"]) > self._n_positions:
            return f"it holds {max(n_tokens, session['n_past'])} tokens, this session n_ctx={self._n_positions}"
        if self._logits_all and len(scores) != n_tokens:
            return "it was saved without logits_all=True, which this session has"
        return None

    def _take(self, call: str, saved: SavedSession) -> None:
        """Become what was saved. What is refused changes nothing; after Ctrl-C the session is empty."""
        n_tokens, session = len(saved.tokens), saved.session
        try:
            state_files.check_session(session, n_tokens, self._kv_noted())
            budget = check_budget(session["budget"])
        except (FormatError, ValueError, TypeError) as error:
            raise FormatError(f"{call}: {error}") from None
        for query in (session["noted"]["query"], session["noted"]["kept_for"] or "last"):
            if query not in QUERIES:
                expected = ", ".join(QUERIES)
                raise FormatError(f"{call}: it keeps cells for the question {query!r}, expected one of {expected}")
        if (why := self._misfit(session, n_tokens, saved.scores)) is not None:
            raise UnsupportedCallError(f"{call}: {why}")
        if n_tokens and not (0 <= int(saved.tokens.min()) <= int(saved.tokens.max()) < self._n_vocab):
            raise FormatError(f"{call}: it holds tokens outside of the vocabulary of {self._n_vocab}")
        if not all(type(token) is int and 0 <= token < self._n_vocab for token in session["noted"]["asks"]):
            raise FormatError(f"{call}: what its prompt asked are no tokens of the vocabulary of {self._n_vocab}")
        if self._kv_limit is not None:
            cache = self._need_cache(call)
            n = n_pinned([(start, stop) for start, stop in session["noted"]["pins"]])
            if n >= (room := self._kv_limit.n_free(cache.kv.stats(), cache.for_query(self._given_query))):
                raise UnsupportedCallError(
                    f"{call}: {n} positions are pinned in it, and kv_limit={self._kv_limit.given!r} leaves {room} for "
                    "them and other cells; set a larger one first"
                )
        want = self.metadata["general.architecture"].encode(), session["n_past"]
        if (head := _head(saved.native)) != want:
            raise FormatError(
                f"{call}: its cells are of {head[1]} positions ({head[0]!r}), expected {want[1]} ({want[0]!r})"
            )
        try:
            input_ids = np.zeros_like(self.input_ids)
        except MemoryError:
            raise NativeError(f"{call}: no memory for its tokens") from None
        input_ids[:n_tokens] = saved.tokens

        is_refused = False
        try:
            n_read = set_state(self._ctx.ctx, saved.native)
            is_refused = n_read == 0
            if is_refused:
                raise refusal(call)
            if n_read != saved.native.size:
                raise FormatError(
                    f"{call}: {n_read:,} of its {saved.native.size:,} bytes are cells; the session is empty"
                )
            if self._logits_all and n_tokens > 0:
                self.scores[:n_tokens] = saved.scores
                self.scores[n_tokens:] = 0
            self.input_ids = input_ids
            self.n_tokens = n_tokens
            self._seed = saved.seed
            self._requires_eval = True  # its logits are not among what is saved
            self._kv_when.budget = self._kv_given["kv_budget"] = budget
            self._kv_note(session["noted"])
            self._kv_when.changed = self._kv_when.changed or not self._suits(self._kv_kept_for)
        except BaseException:
            if not is_refused:
                self._clear()
            raise


class _Taker:
    """What ``create_completion`` takes for the cache of states: it asks for a state once, and keeps one at the end."""

    def __init__(self, llm: SavedStates, cache: Any) -> None:
        self._llm, self._cache = llm, cache

    def __getitem__(self, prompt: Sequence[int]) -> LlamaState:
        if self._llm._take_best(self._cache, prompt) and self._llm.verbose:
            print("Llama._create_completion: a saved state was loaded", file=sys.stderr)
        raise KeyError("nothing is left to load")

    def __setitem__(self, tokens: Sequence[int], state: LlamaState) -> None:
        self._cache[tokens] = state

    def __getattr__(self, name: str) -> Any:
        return getattr(self._cache, name)


def _best_of(cache: Any, prompt: Tokens, n: int, saves: Callable[[Any], int]) -> Any:
    """The state of a cache that saves most of a prompt, if it is more than n tokens."""
    found: Any = None
    if isinstance(cache, LlamaRAMCache):
        states = cache.cache_state
        for key in sorted(states, key=lambda key: -_n_common(key, prompt)):
            if (own := saves(states[key])) > n:
                n, best, found = own, key, states[key]
        if found is not None:
            states.move_to_end(best)
    elif isinstance(cache, LlamaDiskCache):
        files = cache.cache
        for key in sorted(files.iterkeys(), key=lambda key: -_n_common(key, prompt)):
            if _n_common(key, prompt) <= n:
                break  # what lies there is read, and saves no more
            state = files.get(key)
            if (own := saves(state)) > n:
                n, best, found = own, key, state
        if found is not None:
            files.pop(best)  # as its own lookup does: the longer one is put there at the end
    else:
        with contextlib.suppress(KeyError):
            state = cache[prompt.tolist()]
            found = state if saves(state) > n else None
    return found


def _n_common(key: Sequence[int], prompt: Tokens) -> int:
    return n_common(np.array(key, dtype=np.intc), prompt)
