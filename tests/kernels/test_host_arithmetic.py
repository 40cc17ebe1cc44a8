"""fastfuse/csrc/arithmetic.h, compiled for the host by g++ alone, against numpy in float64."""

import ctypes
import shutil

import numpy as np
import pytest

from fastfuse.kernels import _build
from tests.kernels.cuda_on_host import run

PROGRAM = """
#include "arithmetic.h"
using namespace fastfuse;
extern "C" {
void moments(const float* values, int count, int tile, float* out) {
  Moments all;
  for (int first = 0; first < count; first += tile) {
    Moments own;
    for (int i = first; i < count && i < first + tile; ++i) add(own, values[i]);
    all = merge(all, own);
  }
  out[0] = all.count, out[1] = all.mean, out[2] = all.squares;
}
void slopes(const float* a, const float* t, int n, float a_norm, float t_norm, float dot, float* out) {
  for (int i = 0; i < n; ++i) out[i] = distance_slope(a[i], t[i], a_norm, t_norm, dot, n);
}
void norm_slopes(const float* g, const float* x, int n, float sum, float sum_x, float weight, float inv, float* out) {
  for (int i = 0; i < n; ++i) out[i] = norm_slope(g[i], x[i], sum, sum_x, static_cast<float>(n), weight, inv);
}
float smallest(const float* values, int count, int k) {
  return kth_smallest(k, [&](unsigned bits) {
    int below = 0;
    for (int i = 0; i < count; ++i) below += ordered_bits(values[i]) < bits;
    return below;
  });
}
float shift(float value, float threshold, float half) { return shifted(value, threshold, half); }
}
"""


@pytest.fixture(scope="module")
def arithmetic(tmp_path_factory):
    if shutil.which("g++") is None:
        pytest.skip("there is no g++")
    folder = tmp_path_factory.mktemp("arithmetic")
    (folder / "host.cpp").write_text(PROGRAM)
    flags = ["-std=c++17", "-O2", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC", "-I", str(_build.SOURCES)]
    run(["g++", *flags, str(folder / "host.cpp"), "-o", str(folder / "host.so")])
    found = ctypes.CDLL(str(folder / "host.so"))
    found.shift.restype = found.smallest.restype = ctypes.c_float
    return found


def pointer(array):
    return array.ctypes.data_as(ctypes.c_void_p)


def singles(*numbers):
    return [ctypes.c_float(x) for x in numbers]


@pytest.mark.parametrize("tile", [1, 7, 64, 1000], ids=lambda t: f"tiles of {t}")
def test_moments_survive_a_mean_that_is_large_against_the_spread(arithmetic, tile):
    """Sums of squares in float32 would have no correct digit here."""
    values = (4000 + np.random.default_rng(1).standard_normal(1000)).astype(np.float32)
    out = np.zeros(3, np.float32)
    arithmetic.moments(pointer(values), values.size, tile, pointer(out))
    exact = values.astype(np.float64)
    assert out[0] == values.size
    np.testing.assert_allclose(out[1], exact.mean(), rtol=1e-6)
    np.testing.assert_allclose(out[2] / values.size, exact.var(), rtol=2e-3)


def test_moments_of_nothing(arithmetic):
    out = np.ones(3, np.float32)
    arithmetic.moments(pointer(np.zeros(1, np.float32)), 0, 4, pointer(out))
    assert out.tolist() == [0, 0, 0]


def distance(a, t):
    """Mean squared distance of two maps, each over its norm."""
    return np.mean((a / np.linalg.norm(a) - t / np.linalg.norm(t)) ** 2)


def numerical(function, x, step):
    found = np.zeros_like(x)
    for i in range(x.size):
        more, less = x.copy(), x.copy()
        more[i] += step
        less[i] -= step
        found[i] = (function(more) - function(less)) / (2 * step)
    return found


def test_slope_of_the_attention_distance(arithmetic):
    generator = np.random.default_rng(2)
    a, t = (generator.random(13).astype(np.float32) + 0.1 for _ in range(2))
    exact, other = a.astype(np.float64), t.astype(np.float64)
    ah, th = exact / np.linalg.norm(exact), other / np.linalg.norm(other)
    out = np.zeros_like(a)
    numbers = singles(np.linalg.norm(exact), np.linalg.norm(other), (ah * (ah - th)).sum())
    arithmetic.slopes(pointer(a), pointer(t), a.size, *numbers, pointer(out))
    np.testing.assert_allclose(out, numerical(lambda x: distance(x, other), exact, 1e-6), rtol=1e-4, atol=1e-7)


def test_a_map_without_a_direction_has_no_slope(arithmetic):
    out = np.full(4, np.nan, np.float32)
    zeros, t = np.zeros(4, np.float32), np.ones(4, np.float32)
    arithmetic.slopes(pointer(zeros), pointer(t), 4, *singles(0, 2, 0), pointer(out))
    assert out.tolist() == [0] * 4


@pytest.mark.parametrize("training", [True, False], ids=["batch statistics", "running statistics"])
def test_slope_of_a_batch_norm(arithmetic, training):
    generator = np.random.default_rng(3)
    z, g = generator.standard_normal((2, 17))
    weight, eps, fixed = 1.3, 1e-5, (0.2, 1.7)

    def loss(z):
        mean, var = (z.mean(), z.var()) if training else fixed
        return (g * weight * (z - mean) / np.sqrt(var + eps)).sum()

    mean, var = (z.mean(), z.var()) if training else fixed
    inverse = 1 / np.sqrt(var + eps)
    x = (z - mean) * inverse
    sums = (g.sum(), (g * x).sum()) if training else (0, 0)
    out = np.zeros(17, np.float32)
    g32, x32 = g.astype(np.float32), x.astype(np.float32)
    arithmetic.norm_slopes(pointer(g32), pointer(x32), 17, *singles(*sums, weight, inverse), pointer(out))
    np.testing.assert_allclose(out, numerical(loss, z, 1e-6), rtol=1e-4, atol=1e-5)


VALUES = np.random.default_rng(4)


@pytest.mark.parametrize(
    "values",
    [
        pytest.param(VALUES.random(49), id="an attention map"),
        pytest.param(VALUES.standard_normal(64), id="values of both signs"),
        pytest.param(VALUES.integers(-2, 3, 50), id="ties"),
        pytest.param(np.zeros(9), id="all equal"),
        pytest.param(np.array([1e-45, 3e38, -3e38, 0, 1e-38]), id="the range of float32"),
    ],
)
def test_kth_smallest_of_any_k(arithmetic, values):
    values = values.astype(np.float32)
    found = [arithmetic.smallest(pointer(values), values.size, k) for k in range(1, values.size + 1)]
    assert found == np.sort(values).tolist()


@pytest.mark.parametrize(
    ("value", "expected"),
    [pytest.param(0.7, 1.3, id="above"), pytest.param(0.3, 0.3, id="below"), pytest.param(0.5, 1.0, id="at it")],
)
def test_shifted_value(arithmetic, value, expected):
    """With a scale of 2: 2 - value above the threshold, value below it, 1 at it."""
    assert arithmetic.shift(*singles(value, 0.5, 1.0)) == pytest.approx(expected, rel=1e-6)
