"""Print registers, shared memory, spills and occupancy of every CUDA kernel, by architecture.

    python -m bench.kernels.kernel_table [--arch 80 90a] [--sass] [--shared BYTES] [--json FILE]

Needs nvcc, no GPU. The exit code is 1 if a kernel spills or keeps more than a few words in local
memory. Occupancy is the theoretical one: the warps per multiprocessor that registers, shared memory
and barriers allow, over those that the hardware can hold; launch bounds give the threads of a
block. `--sass` counts instructions of the machine code: wide and narrow accesses to device memory,
local memory (LDL, STL), arithmetic, conversions between types (F2F) and barriers. It needs
nvdisasm, from the toolkit, from triton (which CUDA builds of torch install), or from
nvidia-cuda-nvdisasm.
"""

from __future__ import annotations

import math
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path

from bench.timing import arguments, print_table, write_json

CUDA = Path(__file__).parents[2] / "csrc" / "cuda"
ARCHITECTURES = ["80", "86", "89", "90", "100", "120"]
FLAGS = ["-std=c++20", "-O3", "--resource-usage"]  # as setup.py's


@dataclass(frozen=True)
class Multiprocessor:
    warps: int
    blocks: int
    shared: int  # bytes
    barriers: int | None  # None: enough


# CUDA C++ Programming Guide, "Technical Specifications per Compute Capability"; barriers and the
# granularities below are those of the toolkit's cuda_occupancy.h.
MULTIPROCESSORS = {
    80: Multiprocessor(64, 32, 164 * 1024, None),
    86: Multiprocessor(48, 16, 100 * 1024, None),
    89: Multiprocessor(48, 24, 100 * 1024, None),
    90: Multiprocessor(64, 32, 228 * 1024, 64),
    100: Multiprocessor(64, 32, 228 * 1024, 64),
    120: Multiprocessor(48, 24, 100 * 1024, 24),
}
TOLERATED = 32  # bytes of local memory per thread
REGISTERS, PARTITIONS = 65536, 4
REGISTERS_AT_ONCE, SHARED_AT_ONCE = 256, 128  # per warp; bytes per block
RESERVED_SHARED = 1024  # bytes of every block that the driver keeps


def round_up(x: int, multiple: int) -> int:
    return -(-x // multiple) * multiple


def blocks_per_multiprocessor(
    arch: int, registers: int, threads: int, shared: int = 0, barriers: int = 0
) -> tuple[int, str]:
    """Return the number of thread blocks that fit at once, and the resources that limit it.

    Args:
        arch: compute capability times ten, 90 for 9.0.
        registers: per thread.
        threads: per block.
        shared: bytes per block, static and dynamic together, opted in to where needed.
    """
    sm = MULTIPROCESSORS[arch]
    warps = -(-threads // 32)
    per_warp = round_up(max(registers, 1) * 32, REGISTERS_AT_ONCE)
    resident = REGISTERS // PARTITIONS // per_warp * PARTITIONS
    launchable = per_warp * round_up(warps, PARTITIONS) <= REGISTERS
    per_block = round_up(shared + RESERVED_SHARED, SHARED_AT_ONCE)
    limits = {
        "warps": sm.warps // warps,
        "blocks": sm.blocks,
        "registers": resident // warps if launchable else 0,
        "shared": sm.shared // per_block,
    }
    if barriers and sm.barriers:
        limits["barriers"] = sm.barriers // barriers
    blocks = min(limits.values())
    return blocks, "/".join(name for name, value in limits.items() if value == blocks)


@dataclass
class Kernel:
    name: str
    arch: str
    registers: int = 0
    static_shared: int = 0
    stack: int = 0  # bytes of local memory, of the kernel and of what it calls
    spill_stores: int = 0
    spill_loads: int = 0
    barriers: int = 0
    threads: int | None = None  # of a block, by its launch bounds
    dynamic_shared: int = 0
    shared_unknown: bool = False


def parse_usage(text: str, arch: str) -> dict[str, Kernel]:
    """Parse the output of `nvcc --resource-usage`; return kernels by mangled name.

    Functions that were not inlined count towards the kernel that they are listed under.
    """
    kernels: dict[str, Kernel] = {}
    kernel = None
    for line in text.splitlines():
        entry = re.search(r"Compiling entry function '(\w+)'", line)
        memory = re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes", line)
        used = re.search(r"Used (\d+) registers(.*)", line)
        if entry:
            kernel = kernels[entry[1]] = Kernel(entry[1], arch)
        if kernel and memory:
            kernel.stack += int(memory[1])
            kernel.spill_stores += int(memory[2])
            kernel.spill_loads += int(memory[3])
        if kernel and used:
            kernel.registers = int(used[1])
            for field, unit in (("static_shared", "bytes smem"), ("barriers", "barriers")):
                value = re.search(rf"(\d+) {unit}", used[2])
                setattr(kernel, field, int(value[1]) if value else 0)
    return kernels


def parse_ptx(ptx: str) -> dict[str, tuple[int | None, bool]]:
    """Return by kernel the threads of a block by its launch bounds, and True if its shared memory
    is sized at launch."""
    arrays = set(re.findall(r"\.extern \.shared [^;]*?(\w+)\[\]", ptx))
    found = {}
    for function in re.split(r"^(?=\.visible |\.weak |\.func |\.entry )", ptx, flags=re.M):
        name = re.search(r"\.entry\s+(\w+)\s*\(", function)
        if name:
            head, _, body = function.partition("{")
            bound = re.search(r"\.(?:maxntid|reqntid) ([\d, ]+)", head)
            threads = math.prod(int(x) for x in bound[1].split(",")) if bound else None
            found[name[1]] = threads, bool(arrays & set(re.findall(r"\w+", body)))
    return found


COLUMNS = {
    "LDG.128": r"LDG\.(\w+\.)*(128|256)(\.|$)",
    "LDG.64": r"LDG\.(\w+\.)*64(\.|$)",
    "LDG <64": r"LDG(\.|$)",
    "LDGSTS": r"LDGSTS",  # cp.async
    "LD": r"LD(\.|$)",  # generic: the compiler does not know which memory
    "STG.128": r"STG\.(\w+\.)*(128|256)(\.|$)",
    "STG": r"STG(\.|$)",
    "LDL": r"LDL(\.|$)",
    "STL": r"STL(\.|$)",
    "DMMA": r"DMMA(\.|$)",
    "DFMA": r"DFMA(\.|$)",
    "FFMA": r"FFMA2?(\.|$)",
    "F2F": r"F2F(\.|$)",
    "BAR": r"BAR(\.|$)",
}


def count_instructions(sass: str) -> dict[str, dict[str, int]]:
    """Count instructions by kernel in nvdisasm's text; wider accesses count as .128, too."""
    counts: dict[str, dict[str, int]] = {}
    current: dict[str, int] = {}
    for line in sass.splitlines():
        section = re.match(r"\s*\.section\s+\.text\.(\w+)", line)
        if section:
            current = counts[section[1]] = dict.fromkeys(COLUMNS, 0)
        instruction = re.match(r"\s*/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)", line)
        if instruction and current:
            for column, pattern in COLUMNS.items():
                if re.match(pattern, instruction[1]):
                    current[column] += 1
                    break
    return counts


def short_names(mangled: list[str]) -> dict[str, str]:
    """Demangle names, without namespace and parameters; unchanged if there is no c++filt."""
    filt = shutil.which("cu++filt") or shutil.which("c++filt")
    if not filt or not mangled:
        return {name: name for name in mangled}
    run = subprocess.run([filt], input="\n".join(mangled), capture_output=True, text=True)
    return dict(zip(mangled, map(without_parameters, run.stdout.splitlines()), strict=True))


def without_parameters(name: str) -> str:
    name = re.sub(r"\(anonymous namespace\)::|\b(eflat|cuda)::", "", name.strip())
    if name.endswith(")"):
        depth = 0
        for i in range(len(name) - 1, -1, -1):
            depth += (name[i] == ")") - (name[i] == "(")
            if depth == 0:
                return name[:i].removeprefix("void ")
    return name.removeprefix("void ")


def find_nvcc() -> str | None:
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    places = [f"{home}/bin/nvcc"] if home else ["nvcc", "/usr/local/cuda/bin/nvcc"]
    return next((found for found in map(shutil.which, places) if found), None)


def find_nvdisasm(nvcc: str) -> str | None:
    packages = Path(sysconfig.get_path("platlib"))
    places = [
        Path(nvcc).resolve().parent / "nvdisasm",
        Path("/usr/local/cuda/bin/nvdisasm"),
        packages / "triton/backends/nvidia/bin/nvdisasm",
        *packages.glob("nvidia/*/bin/nvdisasm"),
    ]
    return shutil.which("nvdisasm") or next((p for p in map(shutil.which, places) if p), None)


def shared_of(name: str) -> int | None:
    """Return the dynamic shared memory that a kernel is launched with, from the sources' constants
    for the two widths of the templates (the last template argument)."""
    width = "Wide" if re.search(r"Lb1EE|true>", name) else "Small"
    for source in sorted(CUDA.glob("*")):
        value = re.search(rf"constexpr int kSharedBytes{width} = (\d+);", source.read_text())
        if value:
            return int(value[1])
    return None


def compile_kernels(
    nvcc: str, source: Path, arch: str, folder: Path, shared: int | None
) -> tuple[list[Kernel], Path]:
    """Compile one source for one architecture; return its kernels and the cubin."""
    cubin = folder / f"{source.stem}_{arch}.cubin"
    command = [nvcc, *FLAGS, f"-arch=sm_{arch}", "-cubin", "--keep", "--keep-dir", str(folder)]
    command += ["-o", str(cubin), str(source)]
    run = subprocess.run(command, capture_output=True, text=True)
    if run.returncode:
        raise SystemExit(f"{' '.join(command)}\n{run.stdout}{run.stderr}")
    kernels = parse_usage(run.stdout + run.stderr, arch)
    for name, (threads, dynamic) in parse_ptx((folder / f"{source.stem}.ptx").read_text()).items():
        kernels[name].threads = threads
        bytes_of = shared_of(name) if shared is None else shared
        kernels[name].dynamic_shared = (bytes_of or 0) if dynamic else 0
        kernels[name].shared_unknown = dynamic and bytes_of is None
    return list(kernels.values()), cubin


def usage_row(kernel: Kernel, name: str) -> list[str]:
    shared = f"{kernel.static_shared}+{'?' if kernel.shared_unknown else kernel.dynamic_shared}"
    row = [name, f"sm_{kernel.arch}", str(kernel.threads or "-"), str(kernel.registers), shared]
    row += [str(x) for x in (kernel.stack, kernel.spill_stores, kernel.spill_loads)]
    arch = int(re.sub(r"\D", "", kernel.arch))
    if kernel.threads is None or kernel.shared_unknown or arch not in MULTIPROCESSORS:
        return [*row, "-", "-", "-"]
    blocks, limit = blocks_per_multiprocessor(
        arch,
        kernel.registers,
        kernel.threads,
        kernel.static_shared + kernel.dynamic_shared,
        kernel.barriers,
    )
    warps = blocks * -(-kernel.threads // 32)
    return [*row, str(warps), f"{warps / MULTIPROCESSORS[arch].warps:.0%}", limit]


def main() -> int:
    parser = arguments(__doc__, plot=False)
    parser.add_argument("--arch", nargs="+", default=ARCHITECTURES, metavar="SM")
    parser.add_argument("--sass", action="store_true", help="also count instructions")
    parser.add_argument("--nvdisasm", metavar="FILE", help="the disassembler")
    parser.add_argument(
        "--shared",
        type=int,
        metavar="BYTES",
        help="dynamic shared memory per block, in place of the sources' constants",
    )
    parser.add_argument("--allow-spills", action="store_true", help="exit with 0 despite spills")
    options = parser.parse_args()
    nvcc = find_nvcc()
    if nvcc is None:
        parser.error("nvcc was not found: set CUDA_HOME, or put it on the path")
    nvdisasm = options.nvdisasm or find_nvdisasm(nvcc)
    if options.sass and nvdisasm is None:
        parser.error("nvdisasm was not found: pip install nvidia-cuda-nvdisasm, or name --nvdisasm")

    kernels: list[Kernel] = []
    instructions: dict[tuple[str, str], dict[str, int]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for source in sorted(CUDA.glob("*.cu")):
            for arch in options.arch:
                found, cubin = compile_kernels(nvcc, source, arch, Path(folder), options.shared)
                kernels += found
                if options.sass:
                    run = [nvdisasm, "-c", str(cubin)]
                    sass = subprocess.run(run, capture_output=True, text=True, check=True).stdout
                    for name, counts in count_instructions(sass).items():
                        instructions[name, arch] = counts
    names = short_names(sorted({k.name for k in kernels}))
    kernels.sort(key=lambda k: (names[k.name], options.arch.index(k.arch)))
    header = ["kernel", "for", "threads", "registers", "shared, B", "stack, B", "spill stores"]
    print_table(
        [*header, "loads", "warps/SM", "occupancy", "limit"],
        [usage_row(k, names[k.name]) for k in kernels],
    )
    if options.sass:
        print()
        rows = [
            [names[k.name], f"sm_{k.arch}", *map(str, instructions[k.name, k.arch].values())]
            for k in kernels
        ]
        print_table(["instructions of", "for", *COLUMNS], rows)
    write_json(
        options.json,
        [
            {**asdict(k), "name": names[k.name], "sass": instructions.get((k.name, k.arch))}
            for k in kernels
        ],
    )
    local = sorted({f"{names[k.name]} (sm_{k.arch})" for k in kernels if spills(k)})
    if local:
        print(f"\nregisters are spilled by {', '.join(local)}", file=sys.stderr)
    return int(bool(local) and not options.allow_spills)


def spills(kernel: Kernel) -> bool:
    """Return True for more than the few words that a call may keep in local memory."""
    return max(kernel.stack, kernel.spill_stores, kernel.spill_loads) > TOLERATED


if __name__ == "__main__":
    raise SystemExit(main())
