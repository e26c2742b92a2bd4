"""Damage: to bytes, to values of JSON, and to the keys of a GGUF header."""

from __future__ import annotations

import copy
import json
import random
import struct
from pathlib import Path
from typing import Any

import gguf

DEEP = "@deep@"  # stands for a value that is nested 5,000 times, which json.dumps could not write

ODD: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, 2, 7, 2**31 - 1, 2**31, 2**32 - 1, 2**63, 2**64, 10**30, 10**400, 0.5, -0.5, 1e-320, 1e308,
    float("nan"), float("inf"), "", " ", "0", "-1", "a" * 5000, "\ud800", "\0", "\x1b[31mred", "[/red]", "$x^$", "<script>",
    "a|b", "a\nb", "../../x", "é" * 50, [], {}, [[]], [None], [1, "a"], {"a": 1}, {"": []}, DEEP, [0.1] * 300,
)  # fmt: skip


def damage(data: bytes, rng: random.Random) -> bytes:
    """A few changed, lost, repeated or foreign bytes, or an end that is missing."""
    out = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 4))):
        at, n = rng.randrange(len(out) + 1), rng.choice((1, 1, 2, 4, 8, 40))
        what = rng.randrange(6)
        if what == 0:
            out[at : at + n] = rng.randbytes(n)
        elif what == 1:
            del out[at : at + n]
        elif what == 2:
            out[at:at] = out[at : at + n] * rng.choice((1, 2, 50))
        elif what == 3:
            del out[at:]
        elif what == 4:
            out[at : at + 1] = rng.choice(
                (b"\xff", b"\0", b"\n", b"\xef\xbb\xbf", b"\xed\xa0\x80", b"[" * 5000, b"9" * 5000, b"-")
            )
        elif at < len(out):
            out[at] ^= 1 << rng.randrange(8)
    return bytes(out)


def _nodes(value: Any, found: list[tuple[Any, Any]]) -> list[tuple[Any, Any]]:
    """(container, key) of everything inside."""
    for key in list(value) if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ():
        found.append((value, key))
        _nodes(value[key], found)
    return found


def _odd(rng: random.Random) -> Any:
    return copy.deepcopy(rng.choice(ODD))


def restructure(value: Any, rng: random.Random) -> Any:
    """Odd values, and keys and items that are missing, doubled, renamed or in another place."""
    value = copy.deepcopy(value)
    for _ in range(rng.choice((1, 1, 2, 3, 6))):
        nodes = _nodes(value, [])
        if not nodes:
            return _odd(rng)
        box, key = rng.choice(nodes)
        what = rng.randrange(8)
        if what == 0:
            del box[key]
        elif what == 1:
            other, at = rng.choice(nodes)
            box[key] = copy.deepcopy(other[at]) if not isinstance(at, int) or at < len(other) else None
        elif what == 2 and isinstance(box, dict):
            box[rng.choice(("", "results", "0-0", "a" * 300, "\ud800", key.upper()))] = box.pop(key)
        elif what == 2:
            box.insert(key, copy.deepcopy(box[key]))
        elif what == 3:
            box[key] = [copy.deepcopy(box[key]) for _ in range(rng.choice((1, 2, 100 if len(nodes) < 100 else 2)))]
        elif what == 4:
            box[key] = {"a": box[key]}
        elif what == 5 and type(box[key]) in (int, float) and abs(box[key]) < 1e300:
            box[key] = rng.choice((-1, 0, 1e6, 1e30, 0.5)) * box[key]
        else:
            box[key] = _odd(rng)
    return value


def dump(value: Any, rng: random.Random) -> bytes:
    """JSON text, with what Python writes beyond JSON, keys twice, and deep nesting."""
    text = json.dumps(value, ensure_ascii=rng.random() < 0.8)
    if rng.random() < 0.05:
        text = text.replace('"', '"a": 1, "', 1) if text.startswith("{") else text + text
    deep = rng.choice(("[", '{"a":'))
    text = text.replace(json.dumps(DEEP), deep * 5000 + "1" + {"[": "]"}.get(deep, "}") * 5000)
    return text.encode("utf-8", "surrogatepass")


#
# headers
#

_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "B", 10: "Q", 11: "q", 12: "d"}
STRING, _ARRAY = 8, 9
_KEYS = (
    "block_count", "context_length", "embedding_length", "feed_forward_length", "attention.head_count", "attention.head_count_kv",
    "attention.key_length", "attention.value_length", "attention.key_length_mla", "attention.value_length_mla", "num_loops",
    "nextn_predict_layers", "attention.sliding_window", "attention.sliding_window_pattern", "attention.shared_kv_layers",
    "attention.max_alibi_bias", "attn_logit_softcapping", "rope.dimension_sections", "rope.dimension_count", "attention.causal",
    "attention.recurrent_layers", "full_attention_interval", "ssm.state_size", "attention.kv_lora_rank", "vocab_size", "expert_count",
    "attention.layer_norm_rms_epsilon", "rope.freq_base", "rope.scaling.type", "attention.clamp_kqv",
)  # fmt: skip
_COMMON = (
    "general.name", "general.architecture", "general.file_type", "general.alignment", "tokenizer.chat_template",
    "tokenizer.ggml.model", "tokenizer.ggml.tokens", "windowkv.head_scores", "split.count",
)  # fmt: skip
_ARCHS = (
    "llama",
    "nanbeige",
    "gemma2",
    "gemma3",
    "gpt-oss",
    "qwen3next",
    "lfm2",
    "jamba",
    "baichuan",
    "mpt",
    "deepseek2",
    "glm4",
    "x",
)

Field = tuple[str, int, Any]  # key, type of GGUF, value; of an array (type of its items, number it claims, items)


class Header:
    """A GGUF file taken apart: its keys, and the bytes behind them."""

    def __init__(self, path: Path) -> None:
        reader, data = gguf.GGUFReader(path), path.read_bytes()
        self.fields: list[Field] = [
            (field.name, int(field.types[0]), field.contents())
            for field in reader.fields.values()
            if not field.name.startswith("GGUF.")
        ]
        assert not any(kind == _ARRAY for _, kind, _ in self.fields)
        first, last = reader.tensors[0].field, reader.tensors[-1].field
        self.n_tensors = len(reader.tensors)
        self.tensors = data[first.offset : last.offset + sum(int(part.nbytes) for part in last.parts)]
        self.weights = data[reader.data_offset :]

    def whole(self, fields: list[Field]) -> bytes:
        """The file with these keys, and nothing else changed."""
        head = struct.pack("<4sIQQ", b"GGUF", 3, self.n_tensors, len(fields)) + b"".join(map(_encode, fields))
        head += self.tensors
        return head + b"\0" * (-len(head) % 32) + self.weights

    def mutated(self, rng: random.Random) -> bytes:
        fields = list(self.fields)
        if rng.random() < 0.5:  # a model that may still load
            at = rng.randrange(len(fields))
            fields[at] = (fields[at][0], fields[at][1], _near(fields[at][2], rng))
            new = (f"llama.{rng.choice(_KEYS)}", 4, rng.choice((0, 1, 2, 32, 64, 2**31, 2**32 - 1)))
            return self.whole(
                [*fields, new] if rng.random() < 0.3 and new[0] not in (key for key, _, _ in fields) else fields
            )
        if rng.random() < 0.4:
            fields = self._renamed(fields, rng.choice(_ARCHS))
        arch = next(value for key, _, value in fields if key == "general.architecture")
        for _ in range(rng.choice((0, 1, 1, 2, 4))):
            what, at = rng.randrange(5), rng.randrange(len(fields))
            if what == 0:
                del fields[at]
            elif what == 1:
                fields.append(fields[at])
            elif what == 2:
                fields[at] = (fields[at][0], *_value(rng))
            else:
                key = rng.choice((*(f"{arch}.{name}" for name in _KEYS), *_COMMON))
                fields = [field for field in fields if field[0] != key]
                fields.append((key, *_value(rng)))
            if not fields:
                break
        counts = [self.n_tensors, len(fields)]
        if rng.random() < 0.1:
            counts[rng.randrange(2)] = rng.choice((0, 1, 2**31, 2**32 - 1, 2**62, 2**64 - 1))
        return self._file(fields, counts, rng)

    def _file(self, fields: list[Field], counts: list[int], rng: random.Random) -> bytes:
        head = struct.pack("<4sIQQ", b"GGUF", rng.choice((3,) * 20 + (1, 2, 4)), *counts) + b"".join(
            map(_encode, fields)
        )
        if rng.random() < 0.2:
            head = damage(head, rng)
        head += self.tensors if rng.random() < 0.9 else damage(self.tensors, rng)
        return (
            head
            + b"\0" * (-len(head) % 32)
            + (self.weights if rng.random() < 0.9 else self.weights[: rng.randrange(4096)])
        )

    def _renamed(self, fields: list[Field], arch: str) -> list[Field]:
        renamed = [
            (f"{arch}.{key.removeprefix('llama.')}" if key.startswith("llama.") else key, kind, value)
            for key, kind, value in fields
        ]
        return [(key, kind, arch if key == "general.architecture" else value) for key, kind, value in renamed]


def _near(value: Any, rng: random.Random) -> Any:
    if isinstance(value, str):
        return rng.choice((value, value + "x", "\x1b[31m" + value))
    return type(value)(rng.choice((value, value, value * 2, value / 2, value + 1, 0, 1)))


def _value(rng: random.Random) -> tuple[int, Any]:
    what = rng.randrange(10)
    if what < 4:
        return rng.choice((4, 4, 5, 10, 11)), rng.choice(
            (0, 1, -1, 2, 3, 64, 512, 513, 2**31 - 1, 2**31, 2**32 - 1, 2**63, rng.randrange(200))
        )
    if what == 4:
        return rng.choice((6, 12)), rng.choice((0.0, -1.0, 8.0, 1e30, float("nan"), float("inf")))
    if what == 5:
        return 7, rng.randrange(2)
    if what == 6:
        return STRING, rng.choice(
            (
                "",
                "x",
                "\x1b]0;title\x07",
                "[/red]",
                "[bold",
                "a" * 5000,
                "\ud800",
                "$x^$",
                '{"99999999-0":[1]}',
                "{{ x }",
            )
        )
    if what == 7:
        depth = rng.choice((1, 2, 5000))
        return _ARRAY, (
            _ARRAY,
            1,
            b"".join(struct.pack("<IQ", _ARRAY, 1) for _ in range(depth)) + struct.pack("<IQI", 4, 1, 7),
        )
    item = rng.choice((0, 4, 5, 6, 7, 8, 10, 99))
    items = [
        rng.choice((0, 1, 2, 7, 2**32 - 1)) if item != STRING else "ab" for _ in range(rng.choice((0, 1, 3, 4, 5000)))
    ]
    claimed = len(items) if rng.random() < 0.7 else rng.choice((0, 1, 4097, 2**31, 2**40, 2**61, 2**64 - 1))
    return _ARRAY, (item, claimed, items)


def _encode(field: Field) -> bytes:
    key, kind, value = field
    return _text(key) + struct.pack("<I", kind) + _payload(kind, value)


def _payload(kind: int, value: Any) -> bytes:
    if kind == STRING:
        return _text(str(value))
    if kind == _ARRAY:
        item, claimed, items = value
        body = items if isinstance(items, bytes) else b"".join(_payload(item, each) for each in items)
        return struct.pack("<IQ", item, claimed) + body
    form = _SCALARS.get(kind, "I")
    if form in "fd":
        return struct.pack("<" + form, value)
    return (int(value) % 2**64).to_bytes(8, "little")[: struct.calcsize(form)]


def _text(text: str) -> bytes:
    data = text.encode("utf-8", "surrogatepass")
    return struct.pack("<Q", len(data)) + data
