"""The emulation computes what CUDA would, and notices mistakes."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from cuda_emulation import emulator as emulation, sanitized
from cuda_emulation.emulator import ORDERS, EmulationError, Emulator, exact

ROWS = 3
X = np.arange(ROWS * 96, dtype=np.float32)  # sums of these are exact
SUMS = X.reshape(ROWS, 96).sum(1)


@pytest.fixture(scope="session")
def sanitizer() -> tuple[str, Path]:
    """The runtime to load first, and the library."""
    runtime = emulation.sanitizer_runtime()
    if runtime is None:
        pytest.skip("the C++ compiler has no address sanitizer")
    return runtime, emulation.build(sanitize=True)


def run_sanitized(sanitizer: tuple[str, Path], *arguments: str) -> subprocess.CompletedProcess[str]:
    runtime, library = sanitizer
    environment = {**os.environ, "LD_PRELOAD": runtime, "ASAN_OPTIONS": "detect_leaks=0"}
    environment["UBSAN_OPTIONS"] = "print_stacktrace=1"
    command = [sys.executable, str(Path(sanitized.__file__)), str(library), *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True)


@pytest.mark.parametrize("order", ORDERS)
class TestRightKernels:
    def test_a_block_adds_up(self, emulator: Emulator, order: tuple[str, int]) -> None:
        y = exact(np.zeros(ROWS, np.float32))
        with emulator.order(*order):
            emulator("selftest_row_sums", exact(X), y, ROWS)
        np.testing.assert_array_equal(y, SUMS)

    def test_lanes_exchange(self, emulator: Emulator, order: tuple[str, int]) -> None:
        y = exact(np.zeros(32 * 4 + 16, np.int32))
        with emulator.order(*order):
            emulator("selftest_warp", y)
        lanes = np.arange(32)
        np.testing.assert_array_equal(y[:32], lanes ^ 1)
        np.testing.assert_array_equal(y[32:64], np.where(lanes % 8 + 3 < 8, lanes + 3, lanes))
        np.testing.assert_array_equal(y[64:96], np.full(32, 5))
        np.testing.assert_array_equal(y[96:128].view(np.uint32), np.full(32, 0xAAAAAAAA))
        np.testing.assert_array_equal(y[128:], lanes[:16][::-1])

    def test_dynamic_shared_memory(self, emulator: Emulator, order: tuple[str, int]) -> None:
        x = exact(X[:200])
        with emulator.order(*order):
            emulator("selftest_reverse", x, 200)
        np.testing.assert_array_equal(x, X[:200][::-1])

    def test_shared_memory_begins_as_nan(self, emulator: Emulator, order: tuple[str, int]) -> None:
        y = exact(np.zeros(96, np.float32))
        with emulator.order(*order):
            emulator("selftest_unwritten_shared", y)
        assert np.isnan(y).all()


class TestMistakes:
    @pytest.mark.parametrize("kernel", ["written_too_early", "read_too_early"])
    def test_a_missing_barrier_depends_on_the_order(self, emulator: Emulator, kernel: str) -> None:
        wrong = 0
        for order in ORDERS:
            y = exact(np.zeros(ROWS, np.float32))
            with emulator.order(*order):
                emulator(f"selftest_{kernel}", exact(X), y, ROWS)
            wrong += not np.array_equal(y, SUMS)
        assert wrong > 0

    @pytest.mark.parametrize("order", ORDERS)
    @pytest.mark.parametrize(
        ("kernel", "text"),
        [
            ("early_exit", r"95 threads .* wait in __syncthreads .*; 1 of 96 threads have ended"),
            ("divergent_barrier", r"wait in __syncthreads .* wait in __syncthreads .*; 0 of 96"),
            ("wrong_mask", r"16 threads .* wait in __shfl_down_sync .*; 16 of 32 threads"),
        ],
    )
    def test_waiting_for_ever(
        self, emulator: Emulator, kernel: str, text: str, order: tuple[str, int]
    ) -> None:
        y = exact(np.zeros(96, np.float32))
        with emulator.order(*order), pytest.raises(EmulationError, match=text):
            emulator(f"selftest_{kernel}", y)
        # And the next launch is not disturbed.
        sums = exact(np.zeros(ROWS, np.float32))
        emulator("selftest_row_sums", exact(X), sums, ROWS)
        np.testing.assert_array_equal(sums, SUMS)

    @pytest.mark.parametrize("kernel", ["empty_grid", "large_block"])
    def test_impossible_launches(self, emulator: Emulator, kernel: str) -> None:
        with pytest.raises(EmulationError, match="returned 9"):
            emulator(f"selftest_{kernel}", exact(np.zeros(96, np.float32)))


class TestSanitizers:
    def test_every_kernel_is_clean(self, emulator: Emulator, sanitizer: tuple[str, Path]) -> None:
        """And computes the same bits in other orders."""
        done = run_sanitized(sanitizer)
        assert done.returncode == 0, done.stderr
        assert done.stderr == ""
        expected = sanitized.digest(emulator, ("forward", 0))
        lines = [f"{name} {seed} {expected}" for name, seed in sanitized.SANITIZED_ORDERS]
        assert done.stdout.splitlines() == lines

    @pytest.mark.parametrize(
        ("kernel", "text"),
        [
            ("write_beyond", "heap-buffer-overflow"),
            ("write_beyond_shared", "heap-buffer-overflow"),
            ("write_beyond_dynamic", "heap-buffer-overflow"),
            ("write_beyond_local", "stack-buffer-overflow|out of bounds"),
            ("misaligned", "misaligned address"),
            ("signed_overflow", "signed integer overflow"),
        ],
    )
    def test_planted_mistakes_are_found(
        self, sanitizer: tuple[str, Path], kernel: str, text: str
    ) -> None:
        done = run_sanitized(sanitizer, f"selftest_{kernel}")
        assert done.returncode != 0
        assert any(part in done.stderr for part in text.split("|")), done.stderr

    def test_right_kernels_are_not_accused(self, sanitizer: tuple[str, Path]) -> None:
        done = run_sanitized(sanitizer, "selftest_reverse")
        assert (done.returncode, done.stderr) == (0, "")
