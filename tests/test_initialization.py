"Initialization: distributions, parity with torch.nn.init number by number, orthogonality, spectral radius, the adding problem, errors."
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from scipy import stats

from rnnbook import initialization as ours

SHAPES = [(40, 60), (60, 40), (1, 7), (7, 1), (8, 3, 5), (6, 4, 3, 2)]
DRAWS = {  # name -> the standard deviation that the theory asks for, from fan_in and fan_out
    "xavier_uniform": lambda i, o: math.sqrt(2 / (i + o)),
    "xavier_normal": lambda i, o: math.sqrt(2 / (i + o)),
    "kaiming_uniform": lambda i, o: math.sqrt(2 / i),
    "kaiming_normal": lambda i, o: math.sqrt(2 / i),
}


def drawn(name, shape, seed=0, torch_twin=False, **options):
    "The weight that the NumPy function draws or, as an array too, its PyTorch twin."
    if not torch_twin: return getattr(ours, name)(shape, rng=np.random.default_rng(seed), **options)
    tensor = torch.empty(shape, dtype=torch.float64)
    return getattr(ours, name + "_")(tensor, generator=torch.Generator().manual_seed(seed), **options).numpy()


both = pytest.mark.parametrize("torch_twin", [False, True], ids=["numpy", "torch"])


# ---- distributions


@both
@pytest.mark.parametrize("shape", [(300, 500), (500, 300), (50, 20, 5, 10)])
@pytest.mark.parametrize("name", DRAWS)
def test_distribution(name, shape, torch_twin):
    "Mean, variance, bounds and the shape of the distribution (Kolmogorov-Smirnov), at a gain that is not 1."
    options = {"gain": 1.7} if "xavier" in name else {"a": 0.3}
    std = DRAWS[name](*ours.fans(shape)) * (1.7 if "xavier" in name else 1 / math.sqrt(1 + 0.3**2))
    weight = drawn(name, shape, 1, torch_twin, **options).ravel()
    n = weight.size
    kurtosis = 1.8 if "uniform" in name else 3.0
    assert abs(weight.mean()) < 4.5 * std / math.sqrt(n)
    assert abs(weight.var() / std**2 - 1) < 4.5 * math.sqrt((kurtosis - 1) / n)
    law = stats.uniform(-math.sqrt(3) * std, 2 * math.sqrt(3) * std) if "uniform" in name else stats.norm(0, std)
    assert stats.kstest(weight[:20000], law.cdf).pvalue > 1e-3
    if "uniform" in name:
        bound = math.sqrt(3) * std
        assert 0.9995 * bound < np.abs(weight).max() <= bound * (1 + 1e-15)


@both
@pytest.mark.parametrize("mode", ["fan_in", "fan_out"])
@pytest.mark.parametrize("name", ["kaiming_uniform", "kaiming_normal"])
def test_fan_modes(name, mode, torch_twin):
    weight = drawn(name, (400, 100), 2, torch_twin, mode=mode, nonlinearity="relu")
    assert math.isclose(weight.var(), 2 / (100 if mode == "fan_in" else 400), rel_tol=0.03)


def test_entries_are_uncorrelated():
    weight = ours.xavier_normal((400, 400), rng=np.random.default_rng(3))
    assert abs((weight[1:] * weight[:-1]).mean()) < 4.5 * weight.var() / 400 and abs((weight * weight.T).mean() - weight.var() / 400) < 1e-4


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_dtype_and_seed(dtype):
    for name in [*DRAWS, "orthogonal"]:
        a, b, c = (drawn(name, (5, 4), seed, dtype=dtype) for seed in (7, 7, 8))
        assert a.dtype == dtype and (a == b).all() and (a != c).any()
    assert ours.identity((3, 4), dtype=dtype).dtype == dtype


# ---- parity with torch.nn.init


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", SHAPES)
def test_the_same_numbers_as_torch(shape, dtype):
    cases = [(name, {"gain": gain}) for name in ("xavier_uniform_", "xavier_normal_", "orthogonal_") for gain in (1.0, 5 / 3, 0.0)]
    cases += [(name, dict(a=a, mode=mode, nonlinearity=f)) for name in ("kaiming_uniform_", "kaiming_normal_")
              for a in (0, 0.2) for mode in ("fan_in", "fan_out") for f in ("leaky_relu", "relu", "tanh", "linear", "selu")]
    for name, options in cases:
        a, b = (getattr(module, name)(torch.empty(shape, dtype=dtype), **options, generator=torch.Generator().manual_seed(5))
                for module in (ours, torch.nn.init))
        assert torch.equal(a, b), (name, options)


@pytest.mark.parametrize("name", ["xavier_uniform_", "xavier_normal_", "kaiming_uniform_", "kaiming_normal_", "orthogonal_"])
def test_the_default_generator(name):
    results = []
    for module in (ours, torch.nn.init):
        with torch.random.fork_rng():
            torch.manual_seed(11)
            results.append((getattr(module, name)(torch.empty(5, 4)), torch.rand(())))
    assert torch.equal(results[0][0], results[1][0]) and results[0][1] == results[1][1]


@pytest.mark.parametrize("shape", [(4, 4), (3, 5), (5, 3)])
def test_eye(shape):
    assert torch.equal(ours.eye_(torch.empty(shape)), torch.nn.init.eye_(torch.empty(shape)))
    np.testing.assert_array_equal(ours.identity(shape, gain=0.5), 0.5 * np.eye(*shape))


@pytest.mark.parametrize("name", ["linear", "conv2d", "conv_transpose3d", "sigmoid", "tanh", "relu", "selu", "leaky_relu"])
def test_gains(name):
    for param in (None, 0, 0.2, 1.0):
        assert ours.calculate_gain(name, None if param is None else np.float64(param)) == ours.calculate_gain(name, param)
        assert math.isclose(ours.calculate_gain(name, param), torch.nn.init.calculate_gain(name, param), rel_tol=1e-15)


@pytest.mark.parametrize("shape", SHAPES)
def test_fans(shape):
    assert ours.fans(shape) == torch.nn.init._calculate_fan_in_and_fan_out(torch.empty(shape))


def test_parameters_and_what_is_returned():
    "Leaves that need a gradient are filled, stay leaves, and come back; views are filled where they are."
    for name in ("xavier_uniform_", "xavier_normal_", "kaiming_uniform_", "kaiming_normal_", "orthogonal_", "eye_"):
        weight = torch.nn.Parameter(torch.full((6, 6), 9.0))
        assert getattr(ours, name)(weight) is weight and weight.is_leaf and weight.requires_grad and (weight != 9).all()
        whole = torch.full((8, 8), 9.0)
        getattr(ours, name)(whole[1:7, 1:7].T)
        assert (whole[1:7, 1:7] != 9).all() and (whole[0] == 9).all() and (whole[:, 7] == 9).all()
    weight = torch.nn.Parameter(torch.randn(6, 6, generator=torch.Generator().manual_seed(0)))
    assert ours.scale_spectral_radius_(weight, 0.5) is weight and weight.is_leaf


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype):
    Q = ours.orthogonal_(torch.empty(20, 20, dtype=dtype), generator=torch.Generator().manual_seed(0))
    assert Q.dtype == dtype and ((Q.double() @ Q.double().T) - torch.eye(20)).abs().max() < 0.02
    assert ours.spectral_radius(ours.scale_spectral_radius_(Q, 0.9).double().numpy()) == pytest.approx(0.9, rel=0.01)


@pytest.mark.parametrize("shape", [(0, 5), (5, 0), (3, 0, 2)])
def test_nothing_to_fill(shape):
    for name in [*DRAWS, "orthogonal"]:
        assert drawn(name, shape).shape == drawn(name, shape, torch_twin=True).shape == shape


# ---- orthogonal


@both
@settings(deadline=None, max_examples=30)
@given(rows=st.integers(1, 40), columns=st.integers(1, 40), seed=st.integers(0, 10**6), gain=st.sampled_from([0.1, 1.0, 3.0]))
def test_orthogonality(torch_twin, rows, columns, seed, gain):
    Q = drawn("orthogonal", (rows, columns), seed, torch_twin, gain=gain)
    gram = Q @ Q.T if rows <= columns else Q.T @ Q
    np.testing.assert_allclose(gram, gain**2 * np.eye(len(gram)), atol=1e-12 * gain**2)


@both
@pytest.mark.parametrize("shape", [(4, 3, 2, 2), (30, 2, 3)])
def test_orthogonality_in_more_dimensions(shape, torch_twin):
    Q = drawn("orthogonal", shape, 3, torch_twin).reshape(shape[0], -1)
    gram = Q @ Q.T if len(Q) <= Q.shape[1] else Q.T @ Q
    np.testing.assert_allclose(gram, np.eye(len(gram)), atol=1e-12)


@both
def test_every_orthogonal_matrix_is_as_likely(torch_twin):
    "Haar measure: H times an entry squared has mean 1, entries are symmetric, the determinant is +1 as often as -1."
    many = np.stack([drawn("orthogonal", (3, 3), seed, torch_twin) for seed in range(1500)])
    assert abs((many[:, 0, 0] > 0).mean() - 0.5) < 0.06 and abs((np.linalg.det(many) > 0).mean() - 0.5) < 0.06
    assert stats.kstest(many[:, 0, 0], stats.uniform(-1, 2).cdf).pvalue > 1e-3  # in three dimensions a coordinate of a unit vector is uniform
    assert stats.kstest(many[:, 2, 1], stats.uniform(-1, 2).cdf).pvalue > 1e-3


# ---- spectral radius


@settings(deadline=None, max_examples=40)
@given(n=st.integers(1, 60), seed=st.integers(0, 10**6), radius=st.floats(1e-6, 1e6), scale=st.sampled_from([1e-150, 1e-5, 1.0, 1e150]))
def test_scaled_to_the_radius(n, seed, radius, scale):
    matrix = scale * np.random.default_rng(seed).standard_normal((n, n))
    before = matrix.copy()
    scaled = ours.scale_spectral_radius(matrix, radius)
    assert abs(ours.spectral_radius(scaled) / radius - 1) < 1e-8 and (matrix == before).all()
    assert abs(np.abs(np.linalg.eigvals(scaled)).max() / radius - 1) < 1e-8
    np.testing.assert_allclose(scaled / scaled.flat[0], matrix / matrix.flat[0], rtol=1e-9)  # a multiple


def test_known_radii():
    turn = np.array([[0.0, -2.0], [2.0, 0.0]])                      # eigenvalues ±2i
    assert ours.spectral_radius(turn) == pytest.approx(2, rel=1e-12)
    assert ours.spectral_radius(np.diag([0.5, -3.0, 1.0])) == pytest.approx(3, rel=1e-12)
    assert ours.spectral_radius(np.array([[0.5, 100.0], [0.0, -0.25]])) == pytest.approx(0.5, rel=1e-12)  # the norm is 100
    big = 1e300 * np.ones((2, 2))
    assert ours.spectral_radius(big / 4) == pytest.approx(5e299)
    assert isinstance(ours.spectral_radius(turn.astype(np.float32)), float)


def conjugated(matrix, seed=0):
    Q = ours.orthogonal(matrix.shape, rng=np.random.default_rng(seed))
    return Q @ matrix @ Q.T


@pytest.mark.parametrize("n", [1, 2, 3, 8, 33, 100])
def test_nilpotent(n):
    "Zero; strictly triangular; the same in another order; for few units also in another basis, where eigvals alone says 1e-4."
    rng = np.random.default_rng(n)
    triangle = np.triu(rng.standard_normal((n, n)), 1)
    order = rng.permutation(n)
    others = [conjugated(triangle), 1e200 * conjugated(triangle)] if n <= 8 else []  # of more units the rounded matrix is not nilpotent
    for matrix in (np.zeros((n, n)), triangle, triangle[order][:, order], 1e-200 * triangle, *others):
        assert ours.spectral_radius(matrix) == 0
        with pytest.raises(ValueError, match="matrix: .*nilpotent"): ours.scale_spectral_radius(matrix, 0.9)
        tensor = torch.from_numpy(matrix.copy())
        with pytest.raises(ValueError, match="nilpotent"): ours.scale_spectral_radius_(tensor, 0.9)
        assert (tensor.numpy() == matrix).all()


def test_nilpotent_in_whole_numbers():
    for matrix in ([[1.0, -1], [1, -1]], [[5.0, -3, 2], [15, -9, 6], [10, -6, 4]]):
        assert ours.spectral_radius(np.array(matrix)) == 0


@pytest.mark.parametrize("n", [2, 5, 40])
def test_almost_nilpotent_is_not_nilpotent(n):
    "A chain whose end leads back to its start, if only faintly, and a triangle with a small diagonal."
    chain = np.diag(np.ones(n - 1), 1)
    chain[-1, 0] = 1e-6
    assert ours.spectral_radius(chain) == pytest.approx(1e-6 ** (1 / n), rel=1e-8)
    triangle = np.triu(np.random.default_rng(0).standard_normal((n, n)), 1) + 1e-3 * np.eye(n)
    assert ours.spectral_radius(triangle) == pytest.approx(1e-3, rel=1e-8)
    assert ours.spectral_radius(np.ones((n, n))) == pytest.approx(n, rel=1e-12)


def test_sparse_random_matrices():
    for seed in range(20):
        rng = np.random.default_rng(seed)
        matrix = rng.standard_normal((150, 150)) * (rng.random((150, 150)) < 0.02)
        assert abs(ours.spectral_radius(ours.scale_spectral_radius(matrix, 0.95)) - 0.95) < 1e-8


@pytest.mark.parametrize("dtype,tol", [(np.float32, 1e-5), (np.float64, 1e-8)])
def test_torch_scaling(dtype, tol):
    matrix = np.random.default_rng(0).standard_normal((50, 50)).astype(dtype)
    tensor = torch.from_numpy(matrix.copy())
    ours.scale_spectral_radius_(tensor, 1.25)
    scaled = ours.scale_spectral_radius(matrix, 1.25)
    assert scaled.dtype == dtype and (tensor.numpy() == scaled).all()
    assert abs(ours.spectral_radius(scaled) - 1.25) < tol


# ---- the adding problem


@settings(deadline=None, max_examples=40)
@given(steps=st.integers(2, 60), batch=st.integers(0, 9), seed=st.integers(0, 1000))
def test_adding_problem(steps, batch, seed):
    x, y = ours.adding_problem(steps, batch, np.random.default_rng(seed))
    again, _ = ours.adding_problem(steps, batch, np.random.default_rng(seed))
    assert x.shape == (steps, batch, 2) and y.shape == (batch, 1) and (x == again).all()
    numbers, marks = x[..., 0], x[..., 1]
    assert ((0 <= numbers) & (numbers < 1)).all() and set(np.unique(marks)) <= {0.0, 1.0}
    assert (marks[:steps // 2].sum(0) == 1).all() and (marks[steps // 2:].sum(0) == 1).all()
    for b in range(batch): assert y[b, 0] == pytest.approx(numbers[marks[:, b] == 1, b].sum())


def test_adding_problem_statistics():
    x, y = ours.adding_problem(10, 40000, np.random.default_rng(0))
    assert abs(((y - 1) ** 2).mean() - 1 / 6) < 0.004
    assert np.abs(x[:5, :, 1].mean(1) - 0.2).max() < 0.01 and np.abs(x[5:, :, 1].mean(1) - 0.2).max() < 0.01  # every step is marked as often


# ---- errors, and the global random states


def test_errors():
    rng, square = np.random.default_rng(0), np.eye(3)
    for error, words, call in [
        (ValueError, r"shape: .*got \(3,\)", lambda: ours.xavier_uniform((3,), rng=rng)),
        (ValueError, r"shape: .*got \(\)", lambda: ours.orthogonal((), rng=rng)),
        (ValueError, r"shape: .*got \(2, 2, 2\)", lambda: ours.identity((2, 2, 2))),
        (ValueError, "shape: .*got 5", lambda: ours.xavier_uniform(5, rng=rng)),
        (ValueError, "shape: .*got 3", lambda: ours.identity(3)),
        (ValueError, "shape: .*got -2", lambda: ours.orthogonal((-2, 3), rng=rng)),
        (ValueError, "shape: .*got 2.0", lambda: ours.kaiming_normal((2.0, 3), rng=rng)),
        (TypeError, "a: .*got 'x'", lambda: ours.kaiming_normal((2, 3), rng=rng, a="x")),
        (ValueError, "a: .*got nan", lambda: ours.kaiming_uniform((2, 3), rng=rng, a=math.nan)),
        (TypeError, "rng: .*got int", lambda: ours.xavier_normal((3, 3), rng=0)),
        (TypeError, "dtype: .*got int64", lambda: ours.kaiming_normal((3, 3), rng=rng, dtype=np.int64)),
        (TypeError, "dtype: .*got int64", lambda: ours.identity((3, 3), dtype=np.int64)),
        (ValueError, "gain: .*got -1", lambda: ours.xavier_uniform((3, 3), rng=rng, gain=-1)),
        (ValueError, "gain: .*got nan", lambda: ours.orthogonal((3, 3), rng=rng, gain=math.nan)),
        (TypeError, "gain: .*got 'tanh'", lambda: ours.xavier_normal((3, 3), rng=rng, gain="tanh")),
        (ValueError, "mode: .*got 'fan'", lambda: ours.kaiming_normal((3, 3), rng=rng, mode="fan")),
        (ValueError, "nonlinearity: .*'relu'.*got 'gelu'", lambda: ours.kaiming_uniform((3, 3), rng=rng, nonlinearity="gelu")),
        (TypeError, "param: .*got True", lambda: ours.calculate_gain("leaky_relu", True)),
        (ValueError, r"matrix: .*got \(2, 3\)", lambda: ours.spectral_radius(np.ones((2, 3)))),
        (ValueError, r"matrix: .*got \(0, 0\)", lambda: ours.spectral_radius(np.ones((0, 0)))),
        (ValueError, "matrix: .*finite", lambda: ours.spectral_radius(np.full((2, 2), math.nan))),
        (TypeError, "matrix: .*got int64", lambda: ours.spectral_radius(np.ones((2, 2), np.int64))),
        (ValueError, "radius: .*got 0", lambda: ours.scale_spectral_radius(square, 0)),
        (ValueError, "radius: .*got -1", lambda: ours.scale_spectral_radius(square, -1.0)),
        (ValueError, "radius: .*got inf", lambda: ours.scale_spectral_radius(square, math.inf)),
        (ValueError, "steps: .*got 1", lambda: ours.adding_problem(1, 4, rng)),
        (ValueError, "steps: .*got '10'", lambda: ours.adding_problem("10", 4, rng)),
        (ValueError, "batch_size: .*got -1", lambda: ours.adding_problem(4, -1, rng)),
        (TypeError, "rng: .*got int", lambda: ours.adding_problem(4, 4, 0)),
    ]:
        with pytest.raises(error, match=words): call()


def test_errors_of_the_torch_twins():
    for name in ("xavier_uniform_", "xavier_normal_", "kaiming_uniform_", "kaiming_normal_", "orthogonal_", "eye_"):
        fill_ = getattr(ours, name)
        with pytest.raises(ValueError, match=r"tensor: .*got \(3,\)"): fill_(torch.empty(3))
        with pytest.raises(TypeError, match="tensor: .*got torch.int64"): fill_(torch.zeros(3, 3, dtype=torch.int64))
        with pytest.raises(TypeError, match="tensor: .*got ndarray"): fill_(np.zeros((3, 3)))
    with pytest.raises(ValueError, match=r"tensor: .*got \(2, 2, 2\)"): ours.eye_(torch.empty(2, 2, 2))
    with pytest.raises(ValueError, match="gain"): ours.xavier_uniform_(torch.empty(2, 2), gain=-1.0)
    with pytest.raises(ValueError, match=r"matrix: .*got \(2, 3\)"): ours.scale_spectral_radius_(torch.ones(2, 3), 1.0)
    before = torch.ones(3, 3)
    with pytest.raises(ValueError, match="mode"): ours.kaiming_normal_(before, mode="fan")
    assert (before == 1).all()


def test_global_random_states_stay():
    numpy_state, torch_state = np.random.get_state()[1].copy(), torch.get_rng_state()
    for name in [*DRAWS, "orthogonal"]: drawn(name, (4, 3)); drawn(name, (4, 3), torch_twin=True)
    ours.adding_problem(5, 2, np.random.default_rng(0))
    assert (np.random.get_state()[1] == numpy_state).all() and torch.equal(torch.get_rng_state(), torch_state)


# ---- CUDA


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("name", ["xavier_uniform_", "xavier_normal_", "kaiming_uniform_", "kaiming_normal_", "orthogonal_"])
def test_cuda_parity(name):
    a, b = (getattr(module, name)(torch.empty(60, 40, device="cuda", dtype=torch.float64), generator=torch.Generator("cuda").manual_seed(0))
            for module in (ours, torch.nn.init))
    assert torch.equal(a, b)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_cuda_scaling():
    matrix = np.random.default_rng(0).standard_normal((40, 40))
    tensor = ours.scale_spectral_radius_(torch.from_numpy(matrix.copy()).cuda(), 0.9)
    assert np.abs(tensor.cpu().numpy() - ours.scale_spectral_radius(matrix, 0.9)).max() < 1e-10
    assert torch.equal(ours.eye_(torch.empty(3, 4, device="cuda")).cpu(), torch.eye(3, 4))
