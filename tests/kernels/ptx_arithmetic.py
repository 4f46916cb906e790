"""Instructions of PTX that only compute: registers in, a register out, thread by thread.

Approximate functions (`ex2.approx`, `tanh.approx`, ...) return the nearest value.
"""

import re

import numpy as np

WARP = 32
_COMPARE = {
    "eq": np.equal, "ne": np.not_equal, "lt": np.less, "le": np.less_equal,
    "gt": np.greater, "ge": np.greater_equal,
    "lo": np.less, "ls": np.less_equal, "hi": np.greater, "hs": np.greater_equal,
}  # fmt: skip
_CONVERT = re.compile(r"([usbf])(\d+)$")


def dtype_of(kind):
    """Return the type of NumPy for one of PTX, such as s32; f16 and bf16 are given as words."""
    if kind == "pred":
        return np.dtype(np.bool_)
    letter, bits = kind[0], int(kind[1:])
    return np.dtype({"u": "u", "b": "u", "s": "i", "f": "f"}[letter] + str(bits // 8))


def round_to_bf16(x):
    """Return the bits of float32 values rounded to the nearest bf16, ties to even."""
    bits = x.astype(np.float32).view(np.uint32)
    rounded = (bits + 0x7FFF + (bits >> 16 & 1)) >> 16
    return np.where(np.isnan(x), 0x7FFF, rounded).astype(np.uint32)


def widen_bf16(bits):
    """Return the float32 values of bits of bf16."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def _widen_f16(bits):
    return bits.view(np.float16).astype(np.float32)


def _shift_left(x, n):
    width = 8 * x.dtype.itemsize
    return np.where(n < width, x << np.minimum(n, width - 1).astype(x.dtype), 0).astype(x.dtype)


def _shift_right(x, n):
    width = 8 * x.dtype.itemsize
    shifted = x >> np.minimum(n, width - 1).astype(x.dtype)
    if x.dtype.kind == "i":
        return shifted  # The sign fills up.
    return np.where(n < width, shifted, 0).astype(x.dtype)


def extract_field(x, start, length):
    """`bfe`: bits from `start` on, filled up with the last of them if signed."""
    width = 8 * x.dtype.itemsize
    unsigned = x.view(f"u{x.dtype.itemsize}")
    start, length = (v.astype(unsigned.dtype) & 0xFF for v in (start, length))
    length = np.minimum(length, width)
    field = _shift_right(unsigned, start)
    field = np.where(length < width, field & (_shift_left(np.ones_like(field), length) - 1), field)
    field = field.astype(unsigned.dtype)
    if x.dtype.kind == "u":
        return field
    last = np.clip(start.astype(np.int64) + length.astype(np.int64) - 1, 0, width - 1)
    sign = (_shift_right(unsigned, last) & 1).astype(bool) & (length > 0)
    high = np.where(length < width, ~(_shift_left(np.ones_like(field), length) - 1), 0)
    return np.where(sign, field | high.astype(field.dtype), field).view(x.dtype)


def combine_bits(a, b, c, table):
    """`lop3`: any function of three bits, read from a table of eight."""
    result = np.zeros(np.broadcast(a, b, c).shape, np.uint32)
    for i in range(8):
        if table >> i & 1:
            result |= (a if i & 4 else ~a) & (b if i & 2 else ~b) & (c if i & 1 else ~c)
    return result


def pick_bytes(a, b, selector):
    """`prmt`: four of the eight bytes of b:a; the high bit of a choice spreads the sign."""
    both = a.astype(np.uint64) | b.astype(np.uint64) << np.uint64(32)
    result = np.zeros(np.broadcast(both, selector).shape, np.uint32)
    for i in range(4):
        choice = (selector >> np.uint32(4 * i)) & 0xF
        byte = (both >> (8 * (choice & 7)).astype(np.uint64)).astype(np.uint32) & 0xFF
        byte = np.where(choice & 8, np.where(byte & 0x80, 0xFF, 0), byte)
        result |= byte.astype(np.uint32) << np.uint32(8 * i)
    return result


def funnel(low, high, shift, *, left, clamp):
    """`shf`: 32 bits of high:low, moved to the left or to the right."""
    shift = (np.minimum(shift, 32) if clamp else shift & 31).astype(np.uint64)
    both = low.astype(np.uint64) | high.astype(np.uint64) << np.uint64(32)
    moved = (both << shift) >> np.uint64(32) if left else both >> shift
    return moved.astype(np.uint32)


def _multiply_high(x, y):
    if x.dtype.itemsize == 4:
        wide = np.int64 if x.dtype.kind == "i" else np.uint64
        return (x.astype(wide) * y.astype(wide) >> wide(32)).astype(x.dtype)
    product = (x.astype(object) * y.astype(object)) >> 64
    return np.array([int(p) % (1 << 64) for p in np.atleast_1d(product)], np.uint64).view(x.dtype)


def _divide(x, y):
    quotient = np.abs(x.astype(np.int64)) // np.maximum(np.abs(y.astype(np.int64)), 1)
    return (quotient * np.sign(x.astype(np.int64)) * np.sign(y.astype(np.int64))).astype(x.dtype)


def _remainder(x, y):
    return (x - _divide(x, y) * y).astype(x.dtype)


def _extreme(function, name):
    """`max` and `min`: of floats, NaN only wins with `.NaN`."""
    return function if "NaN" in name else {np.maximum: np.fmax, np.minimum: np.fmin}[function]


_UNARY = {
    "mov": lambda x: x, "neg": np.negative, "not": np.invert, "abs": np.abs,
    "ex2": lambda x: np.exp2(x.astype(np.float64)).astype(np.float32),
    "lg2": lambda x: np.log2(x.astype(np.float64)).astype(np.float32),
    "rcp": lambda x: (1 / x.astype(np.float64)).astype(np.float32),
    "tanh": lambda x: np.tanh(x.astype(np.float64)).astype(np.float32),
    "sqrt": np.sqrt, "rsqrt": lambda x: (1 / np.sqrt(x.astype(np.float64))).astype(np.float32),
    "popc": lambda x: np.bitwise_count(x).astype(np.uint32),
}  # fmt: skip
_BINARY = {
    "add": np.add, "sub": np.subtract, "and": np.bitwise_and, "or": np.bitwise_or,
    "xor": np.bitwise_xor,
}  # fmt: skip
# Parts of a name that change nothing here: rounding to nearest, no contraction, precision.
_PLAIN = {"rn", "approx", "ftz", "full", "lo", "NaN", "to", "global", "rzi", "wrap", "clamp"}


def _flush(values, name):
    """Make subnormal results zero where the instruction does."""
    if "ftz" in name and values.dtype == np.float32:
        return np.where(np.abs(values) < np.finfo(np.float32).tiny, np.copysign(0, values), values)
    return values


def decode(machine, instruction):
    """Return a function of a group and an index that runs an instruction, or None."""
    name, operands = instruction.name, instruction.operands
    base, modifiers = name[0], set(name[1:-1])
    if base in ("prefetch", "cvta"):
        if base == "prefetch":
            return lambda group, index: None
        return _compute(machine, operands, "u8", ["u8"], lambda x: x)
    if base == "mov" and "{" in "".join(operands):
        return _decode_vector_move(machine, name, operands)
    if base == "cvt":
        return _decode_conversion(machine, name, operands)
    if base == "setp":
        return _decode_comparison(machine, name, operands)
    if base == "selp":
        kind = f"u{dtype_of(name[-1]).itemsize}"
        return _compute(
            machine, operands, kind, [kind, kind, "?"], lambda a, b, p: np.where(p, a, b)
        )
    if base == "prmt" and len(name) == 2:
        return _compute(machine, operands, "u4", ["u4"] * 3, pick_bytes)
    if base == "lop3" and len(name) == 2:
        table = int(operands[4], 0)
        return _compute(
            machine, operands[:4], "u4", ["u4"] * 3, lambda a, b, c: combine_bits(a, b, c, table)
        )
    if base == "shf":
        options = {"left": name[1] == "l", "clamp": name[2] == "clamp"}
        return _compute(
            machine, operands, "u4", ["u4"] * 3, lambda a, b, c: funnel(a, b, c, **options)
        )
    if base in ("mul", "mad") and "wide" in name:
        kind = dtype_of(name[-1])
        wide = np.dtype(f"{kind.kind}{2 * kind.itemsize}")

        def multiply(x, y, z=None):
            product = x.astype(wide) * y.astype(wide)
            return product if z is None else product + z

        reads = [kind, kind, wide][: len(operands) - 1]
        return _compute(machine, operands, wide, reads, multiply)
    if base == "add" and name[-2:] in (["f32", "bf16"], ["f32", "f16"]) and name[1:-2] == ["rn"]:
        # The first of the two is half as wide.
        widen = widen_bf16 if name[-1] == "bf16" else _widen_f16
        return _compute(machine, operands, "f4", ["u2", "f4"], lambda x, y: widen(x) + y)
    if name[-1] == "f32x2" and base in _PAIRWISE and modifiers <= {"rn"}:
        return _compute(
            machine, operands, "u8", ["u8"] * (len(operands) - 1),
            lambda *x: _PAIRWISE[base](*(v.view(np.float32) for v in x)).view(np.uint64),
        )  # fmt: skip
    if base not in _KNOWN or not modifiers <= _PLAIN | {"hi"}:
        return None
    kind = dtype_of(name[-1])
    reads = [kind] * (len(operands) - 1)
    if base in _UNARY:
        function = _UNARY[base]
    elif base in _BINARY:
        function = _BINARY[base]
    elif base in ("max", "min"):
        function = np.maximum if base == "max" else np.minimum
        if kind.kind == "f":
            function = _extreme(function, name)
    elif base in ("shl", "shr"):
        function, reads = (_shift_left if base == "shl" else _shift_right), [kind, "u4"]
    elif base == "bfe":
        function, reads = extract_field, [kind, "u4", "u4"]
    elif base == "mul":
        function = _multiply_high if "hi" in modifiers else np.multiply
    elif base == "mad":
        if "hi" in modifiers:
            return None

        def function(x, y, z):
            return x * y + z
    elif base == "fma":
        if kind != np.float32:
            return None
        function = _multiply_add
    elif base == "div":
        function = np.divide if kind.kind == "f" else _divide
    elif base == "rem":
        function = _remainder
    return _compute(machine, operands, kind, reads, lambda *x: _flush(function(*x), name))


def _multiply_add(x, y, z):
    return (x.astype(np.float64) * y + z).astype(np.float32)


# Two numbers in one register.
_PAIRWISE = {"add": np.add, "sub": np.subtract, "mul": np.multiply, "fma": _multiply_add}
_KNOWN = {
    *_UNARY, *_BINARY, "max", "min", "shl", "shr", "bfe", "mul", "mad", "fma", "div", "rem",
}  # fmt: skip


def _compute(machine, operands, out, kinds, function):
    write = machine.writer(operands[0], np.dtype(out))
    reads = [machine.reader(x, np.dtype(k)) for x, k in zip(operands[1:], kinds, strict=True)]
    if len(reads) == 1:
        (read,) = reads
        return lambda group, index: write(index, function(read(index)))
    return lambda group, index: write(index, function(*(read(index) for read in reads)))


def _decode_vector_move(machine, name, operands):
    """`mov` between a register and the parts of it, the lowest bits first."""
    whole, is_packing = np.dtype(f"u{int(name[1][1:]) // 8}"), operands[1].startswith("{")
    one, many = operands if is_packing else operands[::-1]
    parts = [part.strip() for part in many.strip("{}").split(",")]
    kind = f"u{whole.itemsize // len(parts)}"
    bits = [whole.type(8 * np.dtype(kind).itemsize * i) for i in range(len(parts))]
    if is_packing:

        def pack(*values):
            return sum(x.astype(whole) << bit for x, bit in zip(values, bits, strict=True))

        return _compute(machine, [one, *parts], whole, [kind] * len(parts), pack)
    read, writes = machine.reader(one, whole), [machine.writer(part, kind) for part in parts]

    def unpack(group, index):
        value = read(index)
        for write, bit in zip(writes, bits, strict=True):
            write(index, (value >> bit).astype(kind))

    return unpack


def _decode_comparison(machine, name, operands):
    kind = dtype_of(name[-1])
    if kind.kind == "f" and name[1] in ("nan", "num"):
        wanted = name[1] == "nan"
        return _compute(
            machine, operands, "?", [kind, kind],
            lambda x, y: (np.isnan(x) | np.isnan(y)) == wanted,
        )  # fmt: skip
    compare = _COMPARE[name[1].removesuffix("u")]
    is_unordered = name[1].endswith("u")
    joins = {"and": np.logical_and, "or": np.logical_or, "xor": np.logical_xor}
    join = joins[name[2]] if len(name) == 4 else None
    if len(name) not in (3, 4) or "|" in operands[0]:
        return None

    def function(x, y, *also):
        # Of NaN, only "not equal" holds, or all of the forms that end in "u".
        result = compare(x, y)
        if kind.kind == "f":
            unordered = np.isnan(x) | np.isnan(y)
            result = (result | unordered) if is_unordered else (result & ~unordered)
        return join(result, *also) if join else result

    reads = [kind, kind] + ["?"] * (join is not None)
    return _compute(machine, operands, "?", reads, function)


def _decode_conversion(machine, name, operands):
    """Integers of any size, f32 to and from bf16 and f16, rounded to nearest."""
    to, source, options = name[-2], name[-1], set(name[1:-2])
    if to in ("bf16x2", "f16x2") and source == "f32" and options == {"rn"}:

        def pack(high, low):
            if to == "bf16x2":
                return round_to_bf16(low) | round_to_bf16(high) << np.uint32(16)
            low, high = (
                x.astype(np.float16).view(np.uint16).astype(np.uint32) for x in (low, high)
            )
            return low | high << np.uint32(16)

        return _compute(machine, operands, "u4", ["f4", "f4"], pack)
    if source == "f32" and to in ("bf16", "f16") and options == {"rn"}:

        def narrow(x):
            return (round_to_bf16(x) if to == "bf16" else x.astype(np.float16).view(np.uint16)
                    ).astype(np.uint16)  # fmt: skip

        return _compute(machine, operands, "u2", ["f4"], narrow)
    if to == "f32" and source in ("bf16", "f16") and not options:

        def widen(x):
            return widen_bf16(x) if source == "bf16" else _widen_f16(x)

        return _compute(machine, operands, "f4", ["u2"], widen)
    if not (_CONVERT.match(to) and _CONVERT.match(source)) or not options <= {"rn", "rzi"}:
        return None
    to, source = dtype_of(to), dtype_of(source)
    # A register may be wider than the type that is read from it.
    register = machine.program.register_types.get(operands[1])
    width = np.dtype(register).itemsize if register else source.itemsize
    target = np.dtype(machine.program.register_types[operands[0]]).itemsize
    wide = np.dtype(f"{to.kind}{target}") if to.kind != "f" else to
    return _compute(
        machine, operands, wide, [f"{source.kind}{width}"],
        lambda x: x.astype(source).astype(to).astype(wide),
    )  # fmt: skip
