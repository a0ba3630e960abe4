"""NVRTC makes machine code of the CUDA kernels, for every generation of GPUs and every pair of types. It needs none."""

from __future__ import annotations

import functools
import re
from typing import Any

import pytest
from cuda_on_cpu import PAIRS
from density import ALL, sample

from lars_array.kernels.cuda.one_launch import one_launch_source
from lars_array.kernels.cuda.source import COMMON, OPTIONS, THREADS, pair_name, source

ARCHITECTURES = [70, 75, 80, 86, 89, 90, 100]
KERNELS = [pair_name(stage, *pair) for pair in PAIRS for stage in ("sums", "apply")] + [*COMMON, "write_pointers"]


@functools.cache
def nvrtc() -> Any:
    """Return CuPy's binding of NVRTC, or the reason why there is none."""
    try:
        from cupy.cuda import nvrtc

        nvrtc.getVersion()
    except (ImportError, RuntimeError) as error:  # no CuPy; or no library behind it
        return str(error)
    return nvrtc


def compiled(code: str, architecture: int, *more: str, assembly: bool = False) -> tuple[bytes, str]:
    """Return machine code, as CuPy has it made, or assembly, and what the compiler says."""
    if isinstance(nvrtc(), str):
        pytest.skip(nvrtc())
    kind = "compute" if assembly else "sm"
    options = [*OPTIONS, *more, "--device-as-default-execution-space", f"-arch={kind}_{architecture}"]
    program = nvrtc().createProgram(code, "lars_array.cu", [], [])
    try:
        nvrtc().compileProgram(program, options)
    except nvrtc().NVRTCError as error:
        raise AssertionError(nvrtc().getProgramLog(program)) from error
    binary = nvrtc().getPTX(program) if assembly else nvrtc().getCUBIN(program)
    return binary, nvrtc().getProgramLog(program)


def skip_given_up(architecture: int) -> None:
    if architecture < 75 and not isinstance(nvrtc(), str) and nvrtc().getVersion() >= (13, 0):
        pytest.skip("CUDA 13 has given it up")


@pytest.mark.parametrize("architecture", sample(ARCHITECTURES, [70, 100]))
def test_every_kernel_is_compiled(architecture: int) -> None:
    skip_given_up(architecture)
    in_one = [pair_name("step", *pair) for pair in PAIRS] if ALL else []  # which take twice as long as all others
    binary, log = compiled(one_launch_source(PAIRS) if in_one else source(PAIRS), architecture)
    log = re.sub("nvrtc: warning: Architectures prior to .* are deprecated.*\n", "", log)
    assert log.strip("\0\n ") == "", "a warning is an error"
    assert binary.startswith(b"\x7fELF")
    found = set(re.findall(rb"\.text\.(\w+)", binary))
    assert found == {name.encode() for name in [*KERNELS, *in_one]}
    assert len(found) == 2 * 16 + 3 + len(in_one)


@pytest.mark.parametrize(
    "change",
    [
        ("bool clipped = *norm > hyper", "bool clipped = *nrom > hyper"),
        ("struct Array { u64 p;", "struct Array { u64 p, q;"),  # the host knows another structure
        ("const int SLOTS = 160;", "const int SLOTS = 190;"),  # more shared memory than there is
    ],
)
def test_what_is_wrong_is_not_compiled(change: tuple[str, str]) -> None:
    code = source([("float32", "float32")])
    assert code.count(change[0]) == 1
    with pytest.raises(AssertionError):
        compiled(code.replace(*change), 90)


def test_memory_is_moved_in_vectors() -> None:
    """16 bytes at once, for each array that is read or written; sums in float64; and nothing kept in local memory."""
    text = compiled(one_launch_source([("float32", "float32")]), 90, assembly=True)[0].decode()
    bodies = dict(re.findall(r"\.entry (\w+)\((.*?)\n}", text, re.DOTALL))
    reads, writes = (
        {name: len(re.findall(rf"{kind}\.(?:global\.)?(?:cs\.)?v4\.[fu]32", body)) for name, body in bodies.items()}
        for kind in ("ld", "st")
    )
    assert reads["sums_float32_float32"] >= 2 and reads["apply_float32_float32"] >= 3
    assert writes["sums_float32_float32"] == 0 and writes["apply_float32_float32"] >= 2
    assert reads["step_float32_float32"] >= 5 and writes["step_float32_float32"] >= 2
    streams = {name for name, body in bodies.items() if "ld.global.cs.v4" in body and "st.global.cs.v4" in body}
    assert streams == {"step_float32_float32"}, "updates leave the cache to sums where it is planned for these"
    assert "fma.rn.f64" in bodies["sums_float32_float32"]
    assert "fma" not in bodies["apply_float32_float32"], "each operation is rounded, as NumPy does"
    assert ".local" not in text


@pytest.mark.parametrize("architecture", sample(ARCHITECTURES, [80, 90]))
def test_two_blocks_of_one_launch_fit_into_a_multiprocessor(architecture: int) -> None:
    """With nothing spilled: the smallest have 65,536 registers and 64 KiB of shared memory."""
    skip_given_up(architecture)
    pairs = [("float32", "float32"), ("bfloat16", "float32"), ("float64", "float64")]
    log = compiled(one_launch_source(pairs), architecture, "--ptxas-options=-v")[1]
    for pair in pairs:
        about = log.split(f"Compiling entry function '{pair_name('step', *pair)}'")[1].split("Compiling entry")[0]
        spilled, registers, shared = (
            int(re.findall(pattern, about)[0])
            for pattern in (r"(\d+) bytes spill stores", r"Used (\d+) registers", r"(\d+) bytes smem")
        )
        assert spilled == 0
        assert 2 * registers * THREADS <= 1 << 16 and 2 * shared <= 1 << 16
