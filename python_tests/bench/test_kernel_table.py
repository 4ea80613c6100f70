"""bench.kernels.kernel_table parses nvcc's output and computes occupancy."""

from __future__ import annotations

import json
import random
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from bench.kernels import kernel_table as kernels

NVCC = kernels.find_nvcc()
needs_nvcc = pytest.mark.skipif(NVCC is None, reason="no nvcc: nothing can be compiled for a GPU")

USAGE = """\
ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function '_Z4fastIfLi16EEvPT_' for 'sm_90'
ptxas info    : Function properties for _Z4fastIfLi16EEvPT_
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 32 registers, used 1 barriers, 4096 bytes smem
ptxas info    : Compile time = 24.021 ms
ptxas info    : Compiling entry function '_Z4slowPf' for 'sm_90'
ptxas info    : Function properties for _Z4slowPf
    48 bytes stack frame, 20 bytes spill stores, 28 bytes spill loads
ptxas info    : Used 255 registers, used 0 barriers, 400 bytes cmem[0]
ptxas info    : Function properties for _Z6calledv
    16 bytes stack frame, 4 bytes spill stores, 8 bytes spill loads
"""


def test_usage_is_parsed_by_kernel():
    found = kernels.parse_usage(USAGE, "90")
    assert list(found) == ["_Z4fastIfLi16EEvPT_", "_Z4slowPf"]
    fast, slow = found.values()
    assert (fast.registers, fast.barriers, fast.static_shared) == (32, 1, 4096)
    assert (fast.stack, fast.spill_stores, fast.spill_loads) == (0, 0, 0)
    assert (slow.registers, slow.barriers, slow.static_shared) == (255, 0, 0)
    assert (slow.stack, slow.spill_stores, slow.spill_loads) == (64, 24, 36)
    assert kernels.spills(slow) and not kernels.spills(fast)
    fast.spill_stores = kernels.TOLERATED
    assert not kernels.spills(fast)
    fast.spill_stores += 4
    assert kernels.spills(fast)


PTX = """\
.version 9.0
.extern .shared .align 16 .b8 scratch[];

.visible .entry _Z1aPf(
	.param .u64 _Z1aPf_param_0
)
.maxntid 256
.minnctapersm 2
{
	mov.u64 	%rd1, scratch;
	ret;
}
	// .globl	_Z1bv
.visible .entry _Z1bv()
.maxntid 16, 8, 1
{
	ret;
}
.weak .entry _Z1cPf(
	.param .u64 _Z1cPf_param_0
)
{
	ret;
}
.func helper()
{
	mov.u64 	%rd1, scratch;
}
"""


def test_launch_bounds_and_dynamic_shared_memory_are_parsed():
    assert kernels.parse_ptx(PTX) == {
        "_Z1aPf": (256, True),
        "_Z1bv": (128, False),
        "_Z1cPf": (None, False),
    }


SASS = """\
	.section	.text._Z1aPf,"ax",@progbits
_Z1aPf:
        /*0000*/                   LDC R1, c[0x0][0x28] ;
        /*0010*/                   LDG.E.128 R4, desc[UR4][R2.64] ;
        /*0020*/              @!P0 LDG.E.64.CONSTANT R8, desc[UR4][R2.64+0x10] ;
        /*0030*/                   LDG.E.U16 R8, desc[UR4][R2.64+0x20] ;
        /*0040*/              @P1  LDG.E R8, desc[UR4][R2.64+0x24] ;
        /*0048*/                   LDG.E.LTC128B.U8 R8, desc[UR4][R2.64+0x28] ;
        /*004c*/                   LDGSTS.E.BYPASS.128 [R9], desc[UR4][R2.64] ;
        /*0050*/                   LD.E.64 R10, [R2.64] ;
        /*0060*/                   LDS.128 R12, [R16] ;
        /*0070*/                   DMMA.8x8x4 R4, R4, R6, R8 ;
        /*0080*/                   DFMA R4, R4, R6, R8 ;
        /*0090*/                   F2F.F64.F32 R4, R4 ;
        /*00a0*/                   F2FP.BF16.F32.PACK_AB R4, R4, R5 ;
        /*00b0*/                   BAR.SYNC.DEFER_BLOCKING 0x0 ;
        /*00c0*/             @!UP0 STG.E.128 desc[UR4][R2.64], R4 ;
        /*00d0*/                   STG.E desc[UR4][R2.64], R4 ;
        /*00e0*/                   STL.64 [R1], R4 ;
	.section	.text._Z1bv,"ax",@progbits
        /*0000*/                   LDL R4, [R1] ;
        /*0010*/                   FFMA.FTZ R4, R4, R4, R4 ;
"""


def test_instructions_are_counted_by_kernel():
    counts = kernels.count_instructions(SASS)
    nonzero = {name: {k: v for k, v in row.items() if v} for name, row in counts.items()}
    assert nonzero == {
        "_Z1aPf": {
            **{"LDG.128": 1, "LDG.64": 1, "LDG <64": 3, "LDGSTS": 1, "LD": 1},
            **{"STG.128": 1, "STG": 1, "STL": 1, "DMMA": 1, "DFMA": 1, "F2F": 1, "BAR": 1},
        },
        "_Z1bv": {"LDL": 1, "FFMA": 1},
    }


def test_names_are_demangled_without_parameters():
    for demangled, short in [
        ("eflat::cuda::apply_kernel(eflat::cuda::Tables, eflat::Update)", "apply_kernel"),
        ("void eflat::cuda::fused<float, 16>(eflat::cuda::Tables)", "fused<float, 16>"),
        ("void eflat::cuda::f<(eflat::DType)1>(void (*)(int), int)", "f<(DType)1>"),
        ("eflat::cuda::(anonymous namespace)::f(int)", "f"),
        ("_Z7mangled", "_Z7mangled"),
    ]:
        assert kernels.without_parameters(demangled) == short


@pytest.mark.parametrize(
    "arch, registers, threads, shared, barriers, blocks, limit",
    [
        # 65536 / (64 x 32) = 32 warps, 4 blocks of 8
        (90, 64, 256, 0, 1, 4, "registers"),
        # 228 KiB / (32 KiB and the driver's 1 KiB) = 6.9
        (90, 32, 256, 32 * 1024, 1, 6, "shared"),
        # 16384 registers of a partition / (40 x 32) = 12.8, so 4 x 12 warps; 227 / 33 = 6.9
        (90, 40, 256, 32 * 1024, 1, 6, "registers/shared"),
        (80, 32, 32, 0, 0, 32, "blocks"),
        (86, 32, 256, 0, 0, 6, "warps"),
        # 255 registers take 256: 8 warps
        (120, 255, 256, 0, 0, 1, "registers"),
        # 1024 threads x 96 registers are more than there are
        (100, 96, 1024, 0, 0, 0, "registers"),
        (120, 16, 32, 0, 2, 12, "barriers"),
        (89, 16, 32, 0, 2, 24, "blocks"),
        (120, 32, 128, 100 * 1024, 0, 0, "shared"),
    ],
)
def test_occupancy_has_the_expected_limits(
    arch, registers, threads, shared, barriers, blocks, limit
):
    assert kernels.blocks_per_multiprocessor(arch, registers, threads, shared, barriers) == (
        blocks,
        limit,
    )


ORACLE = """
#include <climits>
#include <cstddef>
#include <cstdio>
#include <cuda_occupancy.h>
int main() {
  int arch, warps, registers, threads, shared, barriers;
  size_t all;
  while (scanf("%d %d %zu %d %d %d %d", &arch, &warps, &all, &registers, &threads, &shared,
               &barriers) == 7) {
    cudaOccDeviceProp p;
    p.computeMajor = arch / 10;
    p.computeMinor = arch % 10;
    p.maxThreadsPerBlock = 1024;
    p.maxThreadsPerMultiprocessor = 32 * warps;
    p.regsPerBlock = p.regsPerMultiprocessor = 65536;
    p.warpSize = 32;
    p.sharedMemPerBlock = 48 * 1024;
    p.sharedMemPerMultiprocessor = all;
    p.sharedMemPerBlockOptin = all - 1024;
    p.reservedSharedMemPerBlock = 1024;
    p.numSms = 100;
    cudaOccFuncAttributes a{};
    a.maxThreadsPerBlock = INT_MAX;
    a.numRegs = registers;
    a.shmemLimitConfig = FUNC_SHMEM_LIMIT_OPTIN;
    a.maxDynamicSharedSizeBytes = shared;
    a.numBlockBarriers = barriers;
    cudaOccDeviceState s{};
    s.carveoutConfig = SHAREDMEM_CARVEOUT_MAX_SHARED;
    cudaOccResult r{};
    if (cudaOccMaxActiveBlocksPerMultiprocessor(&r, &p, &a, &s, threads, shared) != 0) return 1;
    printf("%d\\n", r.activeBlocksPerMultiprocessor);
  }
}
"""


@needs_nvcc
def test_occupancy_is_that_of_the_toolkits_own_header(tmp_path):
    home = [Path(NVCC).resolve().parent.parent / "include", Path("/usr/local/cuda/include")]
    include = next((p for p in home if (p / "cuda_occupancy.h").is_file()), None)
    if include is None or shutil.which("c++") is None:
        pytest.skip("no cuda_occupancy.h, or no C++ compiler")
    (tmp_path / "oracle.cpp").write_text(ORACLE)
    compile = ["c++", "-w", "-I", str(include), "oracle.cpp", "-o", "oracle"]
    subprocess.run(compile, cwd=tmp_path, check=True)
    cases = [
        (arch, random.randint(1, 255), random.randint(1, 1024), shared, random.randint(0, 4))
        for arch, sm in kernels.MULTIPROCESSORS.items()
        for shared in [0, 48 * 1024, *random.sample(range(sm.shared - 1024), 100)]
    ]
    lines = [
        f"{arch} {kernels.MULTIPROCESSORS[arch].warps} {kernels.MULTIPROCESSORS[arch].shared} "
        f"{registers} {threads} {shared} {barriers}\n"
        for arch, registers, threads, shared, barriers in cases
    ]
    run = subprocess.run(
        [str(tmp_path / "oracle")], input="".join(lines), capture_output=True, text=True, check=True
    )
    for case, blocks in zip(cases, run.stdout.split(), strict=True):
        assert kernels.blocks_per_multiprocessor(*case)[0] == int(blocks), case


@needs_nvcc
def test_the_command_prints_the_table_and_fails_on_spills(tmp_path):
    command = [sys.executable, "-m", "bench.kernels.kernel_table", "--arch", "90", "--allow-spills"]
    nvdisasm = kernels.find_nvdisasm(NVCC)
    command += ["--sass"] if nvdisasm else []
    command += ["--json", str(tmp_path / "kernels.json")]
    run = subprocess.run(command, capture_output=True, text=True, check=True, timeout=300)
    results = json.loads((tmp_path / "kernels.json").read_text())["results"]
    assert results
    for kernel in results:
        assert kernel["arch"] == "90" and 0 < kernel["registers"] <= 255
        assert f"\n{kernel['name']} " in run.stdout
        if nvdisasm:
            assert sum(kernel["sass"].values()) > 0
    sources = "".join(p.read_text() for p in kernels.CUDA.glob("*.cu*"))
    assert all(re_name(kernel["name"]) in sources for kernel in results)
    assert any(kernel["threads"] for kernel in results)


def re_name(name: str) -> str:
    return name.split("<")[0].split("::")[-1]
