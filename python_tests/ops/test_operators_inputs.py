"""Results do not depend on memory layouts, modes, threads or instruction sets; a call changes no
input, and takes memory as n + m, not as n m."""

import copy
import io
import os
import pickle
import resource
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import (
    DEVICE,
    DTYPES,
    HOST_CUDA,
    ONTO,
    RHO,
    added,
    all_same_bits,
    averages,
    cpu_only,
    error,
    foreach_perturb,
    lists,
    make_pair,
    on_device,
    ontos,
    pairs,
    perturb,
    perturb_ema_,
    perturbations,
    same_bits,
)

import eflat_ext

ops = torch.ops.eflat

LAYOUTS = {
    "transposed": lambda t: t.T.contiguous().T,
    "every other column": lambda t: t.repeat_interleave(2, 1)[:, ::2],
    "inside a larger one": lambda t: torch.nn.functional.pad(t, (1, 2, 3, 1))[3:-1, 1:-2],
    "unaligned": lambda t: torch.cat([t.new_zeros(1), t.flatten()])[1:].view(t.shape),
    "from a batch": lambda t: torch.stack([t, t], 2)[:, :, 1],
    "flipped twice": lambda t: t.flip(0).flip(0),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_strides_do_not_matter(layout, dtype):
    pair = make_pair(3, 600, 33, 7, dtype)
    for onto in ONTO:
        expected, expected_norm = perturbations(pair, RHO, onto)
        for which in ({0}, {1}, {2}, {3}, {0, 1, 2, 3}):
            inputs = [LAYOUTS[layout](t) if i in which else t for i, t in enumerate(pair[:4])]
            assert all(torch.equal(x, y) for x, y in zip(inputs, pair[:4], strict=True))
            E, norm = perturbations(pair.__class__(*inputs, pair.scaling), RHO, onto)
            assert same_bits(norm, expected_norm) and all_same_bits(E, expected)


def test_expanded_inputs():
    A = torch.tensor([[1.0], [2.0]]).expand(2, 9)
    B = torch.tensor(0.5).expand(7, 2)
    ones_A, ones_B = torch.ones(()).expand(2, 9), torch.ones(1, 2).expand(7, 2)
    result = on_device(eflat_ext.perturb, A, B, ones_A, ones_B, 1.0, RHO)
    contiguous = [t.contiguous() for t in (A, B, ones_A, ones_B)]
    expected = on_device(eflat_ext.perturb, *contiguous, 1.0, RHO)
    assert all_same_bits(result, expected)
    expanded = [[t] for t in (A, B, ones_A, ones_B)]
    E, norms = on_device(eflat_ext.foreach_perturb, *expanded, [1.0], RHO, "both")
    listed = [[t] for t in contiguous]
    expected_E, expected = on_device(eflat_ext.foreach_perturb, *listed, [1.0], RHO, "both")
    assert same_bits(norms, expected) and all_same_bits(E, expected_E)


@given(st.lists(pairs(), min_size=1, max_size=4), ontos)
def test_inputs_are_never_modified(listed, onto):
    before = [p.clone() for p in listed]
    versions = [t._version for p in listed for t in p[:4]]
    foreach_perturb(listed, RHO, onto)
    perturbations(listed[0], RHO, onto)
    ema = averages(listed, onto)
    E = added(ema, "own", 0)
    copies = [e.clone() for e in E]
    perturb_ema_(listed, ema, torch.tensor(0), 0.9, onto, E=E)
    assert all_same_bits(E, copies) and not any(e._version for e in E)
    _, B, _, _, scaling = lists(listed)
    on_device(ops.foreach_bound, averages(listed, "A"), B, scaling, RHO)
    for p, q in zip(listed, before, strict=True):
        assert all_same_bits(p[:4], q[:4])
    assert versions == [t._version for p in listed for t in p[:4]]


def test_modes_make_no_difference():
    pair = make_pair(4, 50, 40, 6)
    expected = perturb(pair)
    parameters = [torch.nn.Parameter(t) for t in pair[:4]]
    with torch.inference_mode():
        inference = perturb(pair)
    with torch.no_grad():
        no_grad = on_device(eflat_ext.perturb, *parameters, pair.scaling, RHO)
    with torch.autocast(DEVICE.type, torch.bfloat16):
        autocast = perturb(pair)
    grad = on_device(eflat_ext.perturb, *parameters, pair.scaling, RHO)
    for result in (inference, no_grad, autocast, [t.detach() for t in grad]):
        assert all_same_bits(result, expected)
    assert not any(t.requires_grad for t in no_grad)


def test_results_can_be_copied_and_stored():
    E, norm = perturb(make_pair(4, 50, 40, 6))
    buffer = io.BytesIO()
    torch.save([E, norm], buffer)
    buffer.seek(0)
    for copied in (
        copy.deepcopy([E, norm]),
        pickle.loads(pickle.dumps([E, norm])),
        torch.load(buffer, weights_only=True),
    ):
        assert same_bits(copied[0], E) and same_bits(copied[1], norm)


def test_empty_lists():
    for options in ((), ("A", "global", 1e-3), ("both", "layer"), ("both", "global")):
        E, norms = eflat_ext.foreach_perturb([], [], [], [], [], RHO, *options)
        assert E == [] and norms.shape == (0,)
    skipped = torch.tensor(3)
    for onto in ONTO:
        norms = ops.foreach_perturb_ema_([], [], [], [], [], [], skipped, [], RHO, 0.9, onto)
        assert norms.shape == (0,) and int(skipped) == 3
    assert ops.foreach_bound([], [], [], RHO).shape == (0,)


# Threads, repeats, instruction sets, memory.


def hard_list():
    """Many shapes, long and short, well and ill-conditioned (a second pass over the factors)."""
    listed = [
        make_pair(i, 40 + 67 * i, 2000 - 150 * i, 1 + 3 * i, DTYPES[i % 4], 10.0, 10.0 ** (i % 6))
        for i in range(12)
    ]
    return [*listed, make_pair(20, 9000, 7, 5), make_pair(21, 7, 9000, 5, torch.float64, 1e6)]


@cpu_only
@pytest.mark.parametrize(
    "onto, scope", [("B", "layer"), ("A", "global"), ("both", "layer"), ("both", "global")]
)
def test_results_do_not_depend_on_the_number_of_threads(onto, scope):
    listed = hard_list()
    ema = averages(listed, "A")
    B, scaling = lists(listed)[1], lists(listed)[4]

    def everything():
        E, norms = foreach_perturb(listed, RHO, onto, scope)
        factors = ops.foreach_bound([e + 1 for e in ema], B, scaling, RHO, scope)
        means = [torch.ones_like(e) for e in averages(listed, onto)]
        perturb_ema_(listed, means, torch.tensor(0), 0.9, onto, scope, means)
        return [*E, norms, factors, *means]

    threads = torch.get_num_threads()
    try:
        results = []
        for count in (1, 2, 3, 7, 2):
            torch.set_num_threads(count)
            results.append(everything())
    finally:
        torch.set_num_threads(threads)
    for result in results[1:]:
        assert all_same_bits(result, results[0])


@pytest.mark.skipif(HOST_CUDA, reason="the executor of CUDA threads knows one launch")
def test_calls_from_several_threads_at_once():
    lists_of_pairs = [hard_list()[i::3] for i in range(3)]
    calls = [(listed, RHO, onto) for listed in lists_of_pairs for onto in ("B", "both")]
    expected = [foreach_perturb(*call) for call in calls]
    with ThreadPoolExecutor(3) as pool:
        results = list(pool.map(lambda call: foreach_perturb(*call), calls * 6))
    for i, (E, norms) in enumerate(results):
        assert all_same_bits(E, expected[i % 6][0])
        assert same_bits(norms, expected[i % 6][1])


@cpu_only
@pytest.mark.parametrize("instructions", ["baseline", "avx2", "avx512"])
def test_every_instruction_set_gives_the_same_numbers(instructions, tmp_path):
    # One that this processor or build lacks falls back to the baseline.
    listed = [
        make_pair(i, 40 + 67 * i, 500 - 30 * i, r, DTYPES[i % 4])
        for i, r in enumerate([1, 2, 3, 4, 5, 7, 8, 9, 16, 17, 24, 33])
    ]
    torch.save([list(p) for p in listed], tmp_path / "pairs.pt")
    script = (
        "import sys, torch, eflat_ext\n"
        "pairs = torch.load(sys.argv[1])\n"
        "columns = [list(c) for c in zip(*pairs)]\n"
        "ontos = ('B', 'A', 'both')\n"
        "results = [eflat_ext.foreach_perturb(*columns, 0.05, o, 'global') for o in ontos]\n"
        "torch.save(results, sys.argv[2])\n"
    )
    subprocess.run(
        [sys.executable, "-c", script, str(tmp_path / "pairs.pt"), str(tmp_path / "out.pt")],
        env={**os.environ, "EFLAT_CPU": instructions},
        check=True,
        timeout=120,
    )
    for onto, (E, norms) in zip(ONTO, torch.load(tmp_path / "out.pt"), strict=True):
        expected, expected_norms = foreach_perturb(listed, RHO, onto, "global")
        assert error(norms, expected_norms) <= 1e-7
        for x, y in zip(E, expected, strict=True):
            # the same to the last bit or the one before
            assert error(x, y) <= 1e-3 * torch.finfo(x.dtype).eps ** 0.5


@pytest.mark.skipif(DEVICE.type != "cpu", reason="about this process's memory")
def test_memory_grows_with_n_plus_m_not_with_n_times_m():
    pair = make_pair(0, 2, 2, 2)
    n = 40_000  # n x m in float32: 6.4 GB
    pair = pair._replace(
        **{name: torch.randn(2, n) for name in ("A", "grad_A")},
        **{name: torch.randn(n, 2) for name in ("B", "grad_B")},
    )
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    perturb(pair)
    for onto in ("A", "both"):
        foreach_perturb([pair, pair], RHO, onto, "global")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 50_000  # KB
