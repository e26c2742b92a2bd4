"""Measure the importance of a model's attention heads (HeadKV, arXiv 2410.19258, section 3.1).

A fact, the needle, is hidden in a long text, and a question about it follows. The model answers with the full cache;
every query head is watched at every step:

- R: the head earns 1/N if its most attended token lies in the needle and is the token that is generated (N = tokens of
  the answer).
- R2: the needle holds a reason, a wrong answer and the right one. The head earns a/N for each of its N most attended
  tokens that lies in the right answer, a being the attention.

Only right answers count (word F1 over 0.5). A head's score is its mean over the examples that count.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from datetime import date
from importlib import resources
from importlib.metadata import version
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np
import numpy.typing as npt

from ._files import check_output, open_own, open_regular, owned, regular_size, writing
from ._json import loads
from .errors import UnsupportedModelError, WindowKVError
from .heads import METADATA_KEY, HeadScores, Kind
from .llama import Llama
from .policies import Full

__all__ = [
    "EXAMPLES", "Example", "Outcome", "Plan", "ProfileError", "check_copy", "measure", "sha256", "word_f1",
    "write_gguf",
]  # fmt: skip

F1_FLOOR = 0.5
DEPTHS = (0.05, 0.15, 0.25, 0.35, 0.45, 0.55, 0.65, 0.75, 0.85, 0.95)
LENGTHS = (500, 1000, 1500, 2000, 2500)

_BATCH = 256  # tokens; prompts share whole batches, so that larger ones would share less


class ProfileError(WindowKVError, RuntimeError):
    """A profile cannot be measured or written."""


@dataclass(frozen=True)
class Example:
    """A needle and its question.

    Attributes:
        kind: "r" or "r2".
        needle: sentences put into the text; for "r2" they give a reason and a wrong answer too.
        question: asked behind the text.
        lead: how the answer begins.
        answer: how it has to go on; a part of the needle, word for word.
    """

    kind: Kind
    needle: str
    question: str
    lead: str
    answer: str

    def __post_init__(self) -> None:
        if self.answer not in self.needle:
            raise ValueError(f"the answer {self.answer!r} is no part of the needle {self.needle!r}")


EXAMPLES: tuple[Example, ...] = (
    Example(
        "r",
        "The cheese cellar of the monastery at Olmrode opens with the number 7304918.",
        "With which number does the cheese cellar of the monastery at Olmrode open?",
        "The cheese cellar of the monastery at Olmrode opens with the number",
        "7304918",
    ),
    Example(
        "r",
        "Before a long voyage the captain of the Heron always eats a bowl of cold lentil soup with pickled plums.",
        "What does the captain of the Heron always eat before a long voyage?",
        "Before a long voyage the captain of the Heron always eats",
        "a bowl of cold lentil soup with pickled plums",
    ),
    Example(
        "r2",
        "Tilda only ever buys things made of copper. At the market stood a wooden chair with carved arms. "
        "At the market stood a copper kettle with a long spout.",
        "Tilda buys only things made of copper. What did Tilda buy at the market?",
        "At the market Tilda bought a copper",
        "kettle with a long spout",
    ),
    Example(
        "r2",
        "The guests of the inn at Vessen never eat fish. The cook can serve smoked trout with dill. "
        "The cook can also serve roasted chestnuts with honey.",
        "The guests of the inn at Vessen never eat fish. What does the cook serve to them?",
        "Because they never eat fish, the cook serves them roasted",
        "chestnuts with honey",
    ),
)


def word_f1(got: str, want: str) -> float:
    """Harmonic mean of the precision and recall of words, in [0, 1]; case and punctuation do not count."""
    a, b = (Counter(re.findall(r"\w+", text.lower())) for text in (got, want))
    common = sum((a & b).values())
    return 2 * common / (a.total() + b.total()) if common else 0.0


@dataclass(frozen=True)
class Plan:
    """What is measured: every example at every length and depth.

    Attributes:
        lengths: tokens of text around the needle.
        depths: places of the needle, as shares of the text.
        examples: needles.
        text: the text; None = the one that is shipped.
    """

    lengths: tuple[int, ...] = LENGTHS
    depths: tuple[float, ...] = DEPTHS
    examples: tuple[Example, ...] = EXAMPLES
    text: str | None = None

    def haystack(self) -> str:
        if self.text is not None:
            return self.text
        return (resources.files(__package__) / "data" / "document.txt").read_text(encoding="utf-8")

    def cases(self) -> Iterator[tuple[int, float, int]]:
        """(length, depth, index of the example), the deepest needles first: then prompts share long beginnings."""
        for length in self.lengths:
            for depth in sorted(self.depths, reverse=True):
                for i in range(len(self.examples)):
                    yield length, depth, i

    def digest(self) -> str:
        """Hash of everything that the measurement depends on, except the model."""
        parts = [list(self.lengths), list(self.depths), [asdict(e) for e in self.examples], self.haystack()]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


@dataclass
class Outcome:
    """One measured case; `earned` is [n_layer, n_head], None if the answer was wrong."""

    case: tuple[int, float, int]
    answer: str
    earned: npt.NDArray[np.float64] | None = field(repr=False)

    def row(self) -> str:
        """A line of JSON, from which :meth:`parse` makes the same, bit for bit."""
        earned = None if self.earned is None else self.earned.tolist()
        return json.dumps({"case": self.case, "answer": self.answer, "earned": earned})

    @classmethod
    def parse(cls, text: str) -> Outcome:
        row = loads(text, "not an outcome")
        length, depth, i = row["case"]
        earned = None if row["earned"] is None else np.array(row["earned"], np.float64)
        if earned is not None and (earned.ndim != 2 or not np.isfinite(earned).all()):
            raise ValueError("earned is not a number per layer and head")
        return cls((length, depth, i), row["answer"], earned)


def sha256(path: Path) -> str:
    """Hash of a file."""
    digest = hashlib.sha256()
    with open_regular(path) as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


class _Watcher:
    """A session with the full cache whose heads are watched while it answers."""

    def __init__(self, model: Path, plan: Plan, threads: int | None) -> None:
        n_ctx = max(plan.lengths) + 512
        try:
            self.llm = Llama(
                str(model),
                n_ctx=n_ctx,
                n_batch=_BATCH,
                kv_policy=Full(),
                n_threads=threads,
                n_threads_batch=threads,
                verbose=False,
            )
        except UnsupportedModelError:
            raise
        except (ValueError, RuntimeError) as error:
            raise ProfileError(
                f"cannot load {model}: {error}; the file may be damaged, "
                f"or the memory too small for {n_ctx:,} positions"
            ) from error
        self.n_prompt = 0  # tokens of the last prompt; what was generated follows
        n_train = int(llama_cpp.llama_model_n_ctx_train(self.llm._model.model))
        if n_ctx > n_train:
            self.llm.close()
            raise ProfileError(
                f"lengths up to {max(plan.lengths)} need {n_ctx} positions, the model was trained on {n_train}; "
                f"give lengths up to {n_train - 512}"
            )
        assert self.llm._kv is not None
        self.kv = self.llm._kv
        self.hay = self.llm.tokenize(plan.haystack().encode(), add_bos=True)
        if len(self.hay) < max(plan.lengths):
            self.llm.close()
            raise ProfileError(
                f"the text has {len(self.hay)} tokens, lengths up to {max(plan.lengths)} were asked for; "
                "give a longer text or shorter lengths"
            )

    @property
    def shape(self) -> tuple[int, int]:
        """Layers and query heads of the model."""
        stats = self.kv.stats()
        return int(llama_cpp.llama_model_n_layer(self.llm._model.model)), int(stats.n_head_kv) * int(stats.n_gqa)

    def close(self) -> None:
        self.llm.close()

    def prompt(self, example: Example, length: int, depth: float) -> tuple[list[int], slice, slice]:
        """Tokens, and where the needle and the answer inside it stand."""
        at = int(length * depth)
        before, after = example.needle.split(example.answer, 1)
        head = self.llm.tokenize(f"\n{before}".rstrip(" ").encode(), add_bos=False)
        # a leading space belongs to the first token of a word
        space = " " if before.endswith(" ") else ""
        answer = self.llm.tokenize(f"{space}{example.answer}".encode(), add_bos=False)
        rest = self.llm.tokenize(f"{after}\n".encode(), add_bos=False)
        tail = self.llm.tokenize(f"\n\nQuestion: {example.question}\nAnswer: {example.lead}".encode(), add_bos=False)
        start = at + len(head)
        tokens = self.hay[:at] + head + answer + rest + self.hay[at:length] + tail
        return tokens, slice(at, start + len(answer) + len(rest)), slice(start, start + len(answer))

    def _next(self) -> int:
        logits = np.ctypeslib.as_array(llama_cpp.llama_get_logits_ith(self.llm.ctx, -1), shape=(self.llm.n_vocab(),))
        return int(logits.argmax())

    def _attention(self) -> npt.NDArray[np.float32]:
        """Attention of the last position, [n_layer, n_head, positions]; 0 in layers that no policy compresses."""
        layers = self.kv.layers()
        rows = [np.concatenate(self.kv.attention(i)) for i in range(len(layers))]
        res = np.zeros((llama_cpp.llama_model_n_layer(self.llm._model.model), *rows[0].shape), dtype=np.float32)
        res[list(layers)] = rows
        return res

    def run(self, case: tuple[int, float, int], example: Example) -> Outcome:
        """Ask, and watch the heads. The outcome does not depend on what was asked before, bit for bit."""
        length, depth, _ = case
        tokens, needle, answer = self.prompt(example, length, depth)
        n = min(self.n_prompt, len(tokens) - 1)
        shared = int(np.cumprod(self.llm.input_ids[:n] == np.array(tokens[:n])).sum())
        shared -= shared % self.llm.n_batch  # whole batches: those that a session which begins here evaluates, too
        if self.llm._ctx.kv_cache_seq_rm(-1, shared, -1):
            self.llm.n_tokens = shared
        else:  # window and recurrent layers cannot go back that far
            self.llm.reset()
        self.llm.eval(tokens[self.llm.n_tokens :])
        self.n_prompt = len(tokens)

        n_answer = answer.stop - answer.start
        got: list[int] = []
        earned: npt.NDArray[np.float64] | None = None
        for _ in range(n_answer + 2):
            token = self._next()
            if len(got) < n_answer:
                step = self._earn(example.kind, token, tokens + got, needle, answer)
                earned = step if earned is None else earned + step
            got.append(token)
            text = self.llm.detokenize(got).decode("utf-8", "ignore")
            if token == self.llm.token_eos() or "\n" in text:
                break
            self.llm.eval([token])
        text = self.llm.detokenize(got[:n_answer]).decode("utf-8", "ignore").split("\n")[0].strip()
        right = word_f1(text, example.answer) > F1_FLOOR
        return Outcome(case, text, earned if right else None)

    def _earn(
        self, kind: Kind, token: int, tokens: Sequence[int], needle: slice, answer: slice
    ) -> npt.NDArray[np.float64]:
        weights = self._attention()
        n_answer = answer.stop - answer.start
        if kind == "r":
            top = weights.argmax(axis=2)
            hit = (top >= needle.start) & (top < needle.stop) & (np.array(tokens)[top] == token)
            return np.asarray(hit / n_answer, dtype=np.float64)
        n_top = min(n_answer, weights.shape[2])
        top = np.argpartition(weights, -n_top, axis=2)[:, :, -n_top:]
        inside = (top >= answer.start) & (top < answer.stop)
        own = np.take_along_axis(weights, top, axis=2)
        return np.asarray((own * inside).sum(axis=2, dtype=np.float64) / n_answer)


def measure(
    model: Path,
    part: Path,
    plan: Plan | None = None,
    threads: int | None = None,
    report: Callable[[int, int, Outcome | None], None] = lambda done, total, outcome: None,
    command: str = "",
) -> HeadScores:
    """Measure the head scores of a model. If it is interrupted, the next call goes on from ``part``.

    Args:
        model: GGUF file.
        part: file of the cases measured so far (JSON lines); removed by the caller once the result is safe.
        plan: what to measure.
        threads: of the CPU; None = as many as llama-cpp-python takes.
        report: called with the cases done, their number, and the last outcome (None for those found in ``part``).
        command: the command line, for the record.

    Raises:
        UnsupportedModelError: see :class:`windowkv_edge.Llama`.
        ProfileError: model or text are too short for the lengths, no answer of a kind was right, or the disk is full.
        FileError: ``part`` cannot be written, or another run is writing it.
    """
    plan = plan or Plan()
    with owned(part, "--out"):
        header = {"model_sha256": sha256(model), "plan": plan.digest()}
        name, outcomes = _measure(model, part, plan, header, threads, report)
    about = {
        "model": name,
        "model_sha256": header["model_sha256"],
        "date": date.fromtimestamp(time.time()).isoformat(),
        "command": command,
        "version": version("windowkv-edge"),
        "lengths": list(plan.lengths),
        "depths": list(plan.depths),
    }
    return _scores(plan, outcomes, about, str(model))


def _measure(
    model: Path,
    part: Path,
    plan: Plan,
    header: dict[str, str],
    threads: int | None,
    report: Callable[[int, int, Outcome | None], None],
) -> tuple[str, list[Outcome]]:
    """The model's name, and the outcomes in the order of the plan."""
    cases = list(plan.cases())
    done, end = _read_part(part, header)
    watcher = _Watcher(model, plan, threads)
    try:
        name = watcher.llm.metadata.get("general.name", model.stem)
        shapes = {outcome.earned.shape for outcome in done.values() if outcome.earned is not None}
        if shapes - {watcher.shape}:
            raise ProfileError(f"{part} holds scores of other heads than {model} has; remove it, or give another --out")
        report(len(done), len(cases), None)
        for case in cases:
            if case not in done:
                outcome = watcher.run(case, plan.examples[case[2]])
                lines = outcome.row() + "\n" if end else f"{json.dumps(header)}\n{outcome.row()}\n"
                end = _append(part, end, lines.encode())
                done[case] = outcome
                report(len(done), len(cases), outcome)
    finally:
        watcher.close()
    return name, [done[case] for case in cases]


def _append(part: Path, end: int, lines: bytes) -> int:
    """Write lines behind the first ``end`` bytes of a file, in place of what stands there; return the new end."""
    try:
        with open_own(part, os.O_RDWR | os.O_CREAT, "r+b") as file:
            file.truncate(end)
            file.seek(end)
            file.write(lines)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise ProfileError(
            f"cannot write {part}: {error.strerror or error}; "
            "make room and run the same command again, it goes on from there"
        ) from error
    return end + len(lines)


def _read_part(part: Path, header: dict[str, str]) -> tuple[dict[tuple[int, float, int], Outcome], int]:
    """Outcomes of an earlier run, and the bytes of their lines; none, and 0, if it was another model or plan.

    Raises:
        ProfileError: it cannot be read.
    """
    try:
        with open_own(part) as file:
            data = file.read()
    except FileNotFoundError:
        return {}, 0
    except OSError as error:
        got = error.strerror or error
        raise ProfileError(f"cannot read {part}: {got}; remove it, or give another --out") from error
    found: dict[tuple[int, float, int], Outcome] = {}
    end = 0
    for line in data.splitlines(keepends=True):
        try:
            if end == 0:
                if json.loads(line) != header:
                    break
            else:
                outcome = Outcome.parse(line.decode())
                found[outcome.case] = outcome
        except (KeyError, TypeError, ValueError, OverflowError, RecursionError):
            break  # cut off while it was written
        if not line.endswith(b"\n"):
            break
        end += len(line)
    return found, end


def _scores(plan: Plan, outcomes: list[Outcome], about: dict[str, Any], model: str) -> HeadScores:
    scores: dict[str, npt.NDArray[np.float64]] = {}
    counts: dict[str, dict[str, int]] = {}
    for kind in sorted({example.kind for example in plan.examples}):
        of_kind = [o for o in outcomes if plan.examples[o.case[2]].kind == kind]
        right = [o.earned for o in of_kind if o.earned is not None]
        counts[kind] = {"asked": len(of_kind), "right": len(right)}
        if right:
            scores[kind] = np.mean(right, axis=0)
    if not scores:
        asked = ", ".join(f"{kind}: {c['right']} of {c['asked']}" for kind, c in counts.items())
        raise ProfileError(
            f"{model} answered none of the needle questions ({asked}), so nothing can be said of its heads; try "
            "shorter lengths, or use a policy without head scores"
        )
    return HeadScores(scores, "memory", {**about, "counts": counts})


def write_gguf(model: Path, scores: HeadScores, out: Path) -> None:
    """Write a copy of a GGUF file that carries the scores as metadata; an interrupted write leaves nothing at ``out``.

    Raises:
        ProfileError, FileError: ``out`` is the model itself, or cannot be written.
    """
    import gguf
    from gguf.scripts.gguf_new_metadata import MetadataDetails, copy_with_new_metadata

    check_copy(model, out)
    try:
        with writing(out) as part:
            reader = gguf.GGUFReader(model, "r")
            arch = reader.fields[gguf.Keys.General.ARCHITECTURE].contents()
            writer = gguf.GGUFWriter(part, arch=arch, endianess=reader.endianess)
            alignment = reader.get_field(gguf.Keys.General.ALIGNMENT)
            if alignment is not None:
                writer.data_alignment = alignment.contents()
            new = {METADATA_KEY: MetadataDetails(gguf.GGUFValueType.STRING, scores.dumps())}
            copy_with_new_metadata(reader, writer, new, [])
    except OSError as error:
        got = error.strerror or error
        raise ProfileError(f"cannot write {out}: {got}; make room, or give another --gguf") from error


def check_copy(model: Path, out: Path, keeps: Sequence[Path | None] = ()) -> None:
    """See to it that :func:`write_gguf` can write, before anything is measured.

    Args:
        model: the model.
        out: the copy.
        keeps: other files that the run reads.

    Raises:
        ProfileError: ``out`` is the model itself.
        FileError: it cannot be written, there is no room for a copy, or it is a file to keep.
    """
    if out.exists() and out.samefile(model):
        raise ProfileError(f"{out} is the model itself; give another path for the copy that carries the scores")
    check_output(out, "--gguf", regular_size(model), keeps=keeps)
