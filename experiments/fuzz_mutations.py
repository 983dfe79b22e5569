"""Valid files, damaged: seeded mutations of trees (JSON, msgpack), tensors and bytes.

Objects are lists of pairs (`Pairs`), so that a key may occur twice. All functions draw
from the `random.Random` they are given and from nothing else.
"""

import json
import random
import struct
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import msgpack


class Pairs(list):
    """An object: [(key, value), ...]."""


class Raw(NamedTuple):
    """JSON text that no Python value stands for."""

    text: str


class Ext(NamedTuple):
    """A msgpack extension whose content is msgpack too."""

    code: int
    content: Any


NAMES = (
    *("", ".", "..", "a", "__metadata__", "../outside.safetensors", "/dev/zero"),
    *("/etc/passwd", "a/b", "a\\b", "nul\0nul", "\ud800", "n" * 300, "n" * 5000),
    *("model.safetensors", "\u202e", "é", "a\nb", "x." * 2000, "0", "\x1b[2J"),
)
NUMBERS = (
    *(-(2**63), -1, 0, 1, 2, 3, 7, 8, 255, 2**16, 2**31, 2**32, 2**53, 2**62),
    *(2**63 - 1, 2**63, 2**64 - 1, 10**18, 10**30, 10**400, -0.0, 1.0, 1.5, 1e308),
    *(float("nan"), float("inf"), True, False, None),
)
JSON_ONLY = (
    *(Raw("9" * 5000), Raw("1e999"), Raw("[" * 3000)),
    *(Raw("[" * n + "]" * n) for n in (90, 900, 20_000)),
)


def value(rng: random.Random) -> Any:
    """Something that a reader may not expect."""
    kinds: list[Callable[[], Any]] = [
        lambda: rng.choice(NUMBERS),
        lambda: rng.choice(NAMES),
        lambda: rng.choice(("F32", "BF16", "I64", "float32", "lora", "dense", "*")),
        lambda: [rng.choice(NUMBERS) for _ in range(rng.choice((0, 1, 2, 3, 70)))],
        lambda: [2**62] * 2000,
        lambda: Pairs((str(i), i) for i in range(rng.choice((0, 1, 3)))),
        lambda: _nested(rng.choice((3, 50, 150, 300))),
    ]
    return rng.choice(kinds)()


def _nested(depth: int) -> list[Any]:
    out: list[Any] = []
    for _ in range(depth):
        out = [out]
    return out


def tree(content: Any, rng: random.Random, extra: Sequence[Any] = ()) -> Any:
    """A copy in which one to three places have changed."""
    for _ in range(rng.choice((1, 1, 2, 3))):
        content = _change(content, rng, extra)
    return content


def _children(x: Any) -> list[Any]:
    if isinstance(x, Pairs):
        return [v for _, v in x]
    if isinstance(x, Ext):
        return [x.content]
    return x if isinstance(x, list) else []


def _replaced(x: Any, i: int, child: Any) -> Any:
    if isinstance(x, Ext):
        return x._replace(content=child)
    out = type(x)(x)
    out[i] = (x[i][0], child) if isinstance(x, Pairs) else child
    return out


def _change(x: Any, rng: random.Random, extra: Sequence[Any]) -> Any:
    """Changes one node, chosen on a walk from the root."""
    inner = _children(x)
    if inner and rng.random() < 0.8:
        i = rng.randrange(len(inner))
        return _replaced(x, i, _change(inner[i], rng, extra))
    if extra and rng.random() < 0.1:
        return rng.choice(extra)
    if isinstance(x, Pairs) and x and rng.random() < 0.9:
        out, i = Pairs(x), rng.randrange(len(x))
        what = rng.randrange(5)
        if what == 0:
            del out[i]
        elif what == 1:
            out.insert(rng.randrange(len(x) + 1), x[i])  # the key twice
        elif what == 2:
            out[i] = (rng.choice((*NAMES, *(k for k, _ in x))), x[i][1])
        elif what == 3:
            j = rng.randrange(len(x))
            out[i], out[j] = (x[i][0], x[j][1]), (x[j][0], x[i][1])
        else:
            out.append((rng.choice(NAMES), value(rng)))
        return out
    if isinstance(x, Ext) and rng.random() < 0.5:
        return x._replace(code=rng.choice((0, 1, 2, 3, 4, 127)))
    if isinstance(x, bytes) and rng.random() < 0.8:
        return data(x, rng)
    if isinstance(x, list) and x and rng.random() < 0.7:
        out = list(x)
        what = rng.randrange(4)
        if what == 0:
            del out[rng.randrange(len(x))]
        elif what == 1:
            out.append(rng.choice(x))
        elif what == 2:
            rng.shuffle(out)
        else:
            out.append(value(rng))
        return out
    if type(x) in (int, float) and rng.random() < 0.6:
        if not abs(x) < 1e15:
            return 0
        return rng.choice((x + 1, x - 1, x * 2, -x, float(x), str(x), x * 8))
    if isinstance(x, str) and x and rng.random() < 0.4:
        i = rng.randrange(len(x))
        more = (x[:i], x[i:], x + x, x.upper(), x[:i] + chr(rng.randrange(256)) + x[i:])
        return rng.choice(more)
    return value(rng)


def to_json(x: Any) -> str:
    """JSON of a tree; keys may occur twice."""
    if isinstance(x, Raw):
        return x.text
    if isinstance(x, Pairs):
        inner = (f"{json.dumps(str(k))}:{to_json(v)}" for k, v in x)
        return "{" + ",".join(inner) + "}"
    if isinstance(x, list):
        return "[" + ",".join(map(to_json, x)) + "]"
    return json.dumps(x)


def from_json(text: str | bytes) -> Any:
    """The tree of a JSON text."""
    return json.loads(text, object_pairs_hook=Pairs)


def to_msgpack(x: Any) -> bytes:
    """Msgpack of a tree; what msgpack cannot hold becomes nil."""
    packer = msgpack.Packer()
    if isinstance(x, Pairs):
        parts = [to_msgpack(v) for pair in x for v in pair]
        return packer.pack_map_header(len(x)) + b"".join(parts)
    if isinstance(x, list):
        return packer.pack_array_header(len(x)) + b"".join(map(to_msgpack, x))
    if isinstance(x, Ext):
        return packer.pack_ext_type(x.code, to_msgpack(x.content))
    if isinstance(x, str):
        text = x.encode("utf-8", "surrogatepass")
        return b"\xdb" + struct.pack(">I", len(text)) + text
    try:
        return packer.pack(x)
    except (OverflowError, ValueError, TypeError):
        return packer.pack(None)


def from_msgpack(content: bytes) -> Any:
    """The tree of a msgpack file, extensions opened."""

    def ext(code: int, inner: bytes) -> Any:
        try:
            return Ext(code, from_msgpack(inner))
        except ValueError:
            return msgpack.ExtType(code, inner)

    return msgpack.unpackb(
        content, object_pairs_hook=Pairs, ext_hook=ext, strict_map_key=False
    )


def data(content: bytes, rng: random.Random) -> bytes:
    """Bytes flipped, overwritten, cut, doubled or moved, in one to eight places."""
    out = bytearray(content)
    for _ in range(rng.choice((1, 1, 2, 8))):
        i = rng.randrange(len(out) + 1)
        j = min(len(out), i + rng.choice((1, 1, 2, 8, 100)))
        what = rng.randrange(7)
        if what == 0 and i < len(out):
            out[i] ^= 1 << rng.randrange(8)
        elif what == 1 and i < len(out):
            out[i] = rng.choice((0, 1, 0x7F, 0x80, 0xFF, *b'{}[]",:0\\', 0xDF, 0xC6))
        elif what == 2:
            width = rng.choice("BHIQ")
            number = rng.choice((0, 1, 2**7, 2**15, 2**31, 2**63, 2**64 - 1))
            word = struct.pack("<" + width, number % 256 ** struct.calcsize(width))
            out[i : i + len(word)] = word
        elif what == 3:
            del out[i:j]
        elif what == 4:
            out[i:i] = out[i:j] * rng.choice((1, 1, 3))
        elif what == 5:
            del out[i:]
        else:
            k = rng.randrange(len(out) + 1)
            out[i:j] = out[k : k + j - i]
    return bytes(out)


# -- safetensors -----------------------------------------------------------------------

_WIDTHS = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "U64": 8}
_WIDTHS |= {"U32": 4, "U16": 2, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1}
_WIDTHS |= {"F8_E4M3": 1, "F8_E5M2": 1}


def safetensors(content: bytes, rng: random.Random) -> bytes:
    """Other tensors in a sound file, another header, or other bytes."""
    size = int.from_bytes(content[:8], "little")
    header, body = from_json(content[8 : 8 + size]), content[8 + size :]
    level = rng.randrange(4)
    if level == 0:
        return data(content, rng)
    if level == 1:
        text = to_json(tree(header, rng, JSON_ONLY)).encode("utf-8", "surrogatepass")
        claimed = len(text) if rng.random() < 0.95 else rng.choice((2**63, 0, 2**40))
        return struct.pack("<Q", claimed) + text + body
    tensors = [
        (name, dict(about)["dtype"], dict(about)["shape"], _of(about, body))
        for name, about in header
        if name != "__metadata__"
    ]
    metadata = dict(header).get("__metadata__", Pairs())
    for _ in range(rng.choice((1, 1, 2))):
        if rng.random() < 0.15 or not tensors:
            metadata = tree(metadata, rng)
        else:
            i = rng.randrange(len(tensors))
            tensors[i : i + 1] = _other(tensors[i], [t[0] for t in tensors], rng)
    return _safetensors(metadata, tensors)


def _of(about: Pairs, body: bytes) -> bytes:
    start, stop = dict(about)["data_offsets"]
    return body[start:stop]


def _other(t: tuple, names: Sequence[str], rng: random.Random) -> list[tuple]:
    """What takes a tensor's place: none, itself in another way, or two."""
    name, dtype, shape, body = t
    what = rng.randrange(7)
    if what == 0:
        return []
    if what == 1:
        rest = name.partition("/")[2]
        near = (*NAMES, *names, f"dense/{rest}", f"values/{rest}", f"{name}.bias")
        return [(rng.choice(near), dtype, shape, body)]
    if what == 2:
        shapes = ([*shape, 1], [1, *shape], shape[::-1], [len(body) // _WIDTHS[dtype]])
        return [(name, dtype, rng.choice(shapes), body)]
    if what == 3:
        same = [d for d, width in _WIDTHS.items() if width == _WIDTHS[dtype]]
        return [(name, rng.choice(same), shape, body)]
    if what == 4:  # another length
        n = rng.choice((0, 0, 1, 2, 100))
        body = (body * (1 + 800 // max(1, len(body))))[: n * _WIDTHS[dtype]]
        return [(name, dtype, [n], body.ljust(n * _WIDTHS[dtype], b"\1"))]
    if what == 5:
        return [t, (rng.choice((*NAMES, name + "2")), dtype, shape, body)]
    changed = data(body, rng)[: len(body)]
    return [(name, dtype, shape, changed.ljust(len(body), b"\xff"))]


def _safetensors(metadata: Any, tensors: Sequence[tuple]) -> bytes:
    header, body = Pairs([("__metadata__", metadata)]), b""
    for name, dtype, shape, content in tensors:
        offsets = [len(body), len(body) + len(content)]
        about = [("dtype", dtype), ("shape", shape), ("data_offsets", offsets)]
        header.append((name, Pairs(about)))
        body += content
    text = to_json(header).encode()
    return struct.pack("<Q", len(text)) + text + body


# -- YAML ------------------------------------------------------------------------------

_BOMB = "\n".join(
    ["a0: &a0 [x, x]", *(f"a{i}: &a{i} [*a{i - 1}, *a{i - 1}]" for i in range(1, 40))]
)
_LINES = (
    *("a: &a [*a]", "<<: *a", "<<: {a: 1}", "!!python/object/apply:os.system [ls]"),
    *("- " * 400, "[" * 2000, "{a: " * 300, "? [a, b]", "--- ", "%YAML 9.9", "\t- x"),
    *("x: !!float ''", "x: !!int ''", "x: !!bool maybe", "x: !!timestamp soon"),
    *("x: !!binary '*'", "x: !!set {a, b}", "x: 2024-13-45", "x: " + "1:" * 3000 + "1"),
    *("x: 0x" + "f" * 9000, "x: " + "9" * 9000, "x: 1e999", "x: .nan", "=: 1", _BOMB),
)
_SCALARS = (
    *("-1", "0", "1e-6", ".inf", ".nan", "null", "~", "true", "[]", "{}", "''", "*a"),
    *("!!float ''", "!!bool x", "1000000000000000000", "[0, 1000000000000000000]"),
    *("[3, 1]", "2001-01-01", "0o7", "!!python/name:os.system", "{filter: mlp}"),
    *("passthrough", "ties", "slerp", "a", "base", "../outside", "/dev/zero", "a+b"),
)


def yaml(content: bytes, rng: random.Random) -> bytes:
    """A recipe with other lines or values; half of the time another tree of them."""
    import yaml as library

    text = content.decode()
    if rng.random() < 0.5:
        plain = json.dumps(library.safe_load(text))
        return to_json(tree(from_json(plain), rng, JSON_ONLY)).encode()
    lines = text.split("\n")
    for _ in range(rng.choice((1, 1, 2, 3))):
        i = rng.randrange(len(lines))
        what = rng.randrange(6)
        if what == 0:
            lines.insert(i, rng.choice(_LINES))
        elif what == 1 and len(lines) > 1:
            del lines[i]
        elif what == 2:
            lines.insert(rng.randrange(len(lines)), lines[i])
        elif what == 3:
            lines[i] = " " * rng.choice((1, 2, 4)) + lines[i]
        elif what == 4:
            key, colon, _ = lines[i].partition(":")
            lines[i] = f"{key}{colon} {rng.choice(_SCALARS)}"
        else:
            return data("\n".join(lines).encode("utf-8", "surrogatepass"), rng)
    return "\n".join(lines).encode()


def file(name: str, content: bytes, rng: random.Random) -> bytes:
    """A damaged file, by what its name says it is; one in five just has other bytes."""
    if rng.random() < 0.2:
        return data(content, rng)
    if name.endswith(".safetensors"):
        return safetensors(content, rng)
    if name.endswith(".yaml"):
        return yaml(content, rng)
    if name.endswith(".msgpack"):
        return to_msgpack(tree(from_msgpack(content), rng))
    try:
        content_tree = from_json(content)
    except ValueError:
        return data(content, rng)
    return to_json(tree(content_tree, rng, JSON_ONLY)).encode()
