"""Write csrc/wgmma_products.cuh: wgmma has one instruction per width, and inline PTX names every register.

    python csrc/wgmma.py > csrc/wgmma_products.cuh

tests/test_extension.py holds the file to what this writes.
"""

# Widths of S = Q K^T (rows of a key box) and of O = P V (the head dimension).
SCORES = (64, 80, 96, 112, 128, 160, 176, 192)
OUTPUTS = (64, 128)
# Of products whose operands are both transposed: dQ = dS K from dS^T.
TRANSPOSED = (64,)

HEAD = """// The matrix products of csrc/wgmma.cuh, which includes them once a type: of ELEMENT in C++, KIND in PTX.
// Written by csrc/wgmma.py: edit that file.
"""


def registers(first: int, count: int) -> str:
    """Join operand numbers in lines of at most 110 columns of PTX text."""
    names = [f"%{i}" for i in range(first, first + count)]
    lines = [", ".join(names[i : i + 20]) for i in range(0, count, 20)]
    return ', "\n            "'.join(lines)


def operands(count: int, constraint: str) -> str:
    names = [f'"{constraint}"(c[{i}])' for i in range(count)]
    lines = [", ".join(names[i : i + 8]) for i in range(0, count, 8)]
    return ",\n              ".join(lines)


def function(width: int, a_in_registers: bool, first: bool, transposed: bool = False) -> str:
    count = width // 2
    a = f"{{{registers(count, 4)}}}" if a_in_registers else f"%{count}"
    b = f"%{count + (4 if a_in_registers else 1)}"
    # imm-scale-a, imm-scale-b, then the transpositions: an A in registers has none.
    tail = "1, 1, 1" if a_in_registers else f"1, 1, {'1, 1' if transposed else '0, 0'}"
    parameter = "const uint32_t (&a)[4]" if a_in_registers else "uint64_t a"
    given = '"r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3])' if a_in_registers else '"l"(a)'
    name = ("first" if first else "next") + ("_transposed" if transposed else "")
    return f"""    static __device__ __forceinline__ void {name}(float (&c)[{count}], {parameter}, uint64_t b) {{
        asm volatile(
            "{{\\n.reg .pred p;\\nsetp.ne.b32 p, {0 if first else 1}, 0;\\n"
            "wgmma.mma_async.sync.aligned.m64n{width}k16.f32." KIND "." KIND " {{"
            "{registers(0, count)}}}, "
            "{a}, {b}, p, {tail};\\n}}\\n"
            : {operands(count, "=f" if first else "+f")}
            : {given}, "l"(b));
    }}
"""


def main() -> None:
    print(HEAD)
    structs = []
    for width in sorted({*SCORES, *OUTPUTS, *TRANSPOSED}):
        parts = []
        if width in SCORES:
            parts += [function(width, False, first) for first in (True, False)]
        if width in OUTPUTS:
            parts.append(function(width, True, False))
        if width in TRANSPOSED:
            parts += [function(width, False, first, transposed=True) for first in (True, False)]
        structs.append(f"template <>\nstruct Wgmma<ELEMENT, {width}> {{\n" + "\n".join(parts) + "};")
    print("\n\n".join(structs))


if __name__ == "__main__":
    main()
