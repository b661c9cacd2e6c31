"""Muon on one factor against its rule in NumPy in float64: singular vectors, and the steepest
descent that it says it is.
"""

import numpy as np
import pytest
import torch

from rolora.federated import muon

N, K, R, LR = 9, 7, 3, 1e-2


def orthogonal(X):
    U, _, Vt = np.linalg.svd(X, full_matrices=False)
    return U @ Vt


def root_of(F):
    """c (F Fᵀ)^−½ by singular values."""
    U, values, _ = np.linalg.svd(F, full_matrices=False)
    return (U / values) @ U.T * np.linalg.norm(F) / np.sqrt(len(F))


def stepped(kind, rests, gradients, weight_decay=0.0, start=None):
    """The factor's path under these gradients, fp64."""
    start = np.zeros_like(gradients[0]) if start is None else start
    p = torch.tensor(start, dtype=torch.float32).requires_grad_()
    optimizer = muon.Muon([p], kind, [torch.tensor(rests, dtype=torch.float32)], LR, weight_decay)
    path = []
    for gradient in gradients:
        p.grad = torch.tensor(gradient, dtype=torch.float32)
        optimizer.step()
        path.append(p.detach().double().numpy().copy())
    return path


@pytest.mark.parametrize("kind", ["A", "B"])
def test_steps_are_the_rule_s(kind):
    rng = np.random.default_rng(0)
    rests = rng.normal(size=(R, K) if kind == "B" else (N, R))
    shape = (N, R) if kind == "B" else (R, K)
    gradients, start = rng.normal(size=(3, *shape)), rng.normal(size=shape)
    F = rests if kind == "B" else rests.T
    S, moment, wanted = root_of(F), 0.0, start
    for gradient, found in zip(gradients, stepped(kind, rests, gradients, 0.5, start), strict=True):
        moment = 0.95 * moment + (gradient if kind == "B" else gradient.T)
        step = orthogonal(moment @ S) @ S * 0.2 * np.sqrt(max(moment.shape))
        wanted = wanted * (1 - LR * 0.5) - LR * (step if kind == "B" else step.T)
        np.testing.assert_allclose(found, wanted, atol=1e-6)


def test_it_is_the_steepest_descent_of_a_bounded_move_of_the_product():
    """Among all D with `‖D A‖₂ ≤ ρ c` none goes further down: `−⟨G, D⟩` is the bound times the
    dual norm, the sum of singular values of `G (A Aᵀ)^−½`.
    """
    rng = np.random.default_rng(1)
    A, G = rng.normal(size=(R, K)), rng.normal(size=(N, R))
    (D,) = stepped("B", A, G[None])
    bound = np.linalg.norm(D @ A, 2)
    c = np.linalg.norm(A) / np.sqrt(R)
    assert bound == pytest.approx(LR * 0.2 * np.sqrt(N) * c, rel=1e-5)
    dual = np.linalg.svd(G @ root_of(A) / c, compute_uv=False).sum()
    assert -np.sum(G * D) == pytest.approx(bound * dual, rel=1e-5)
    for _ in range(200):
        other = rng.normal(size=(N, R))
        other *= bound / np.linalg.norm(other @ A, 2)
        assert -np.sum(G * other) < bound * dual
    # Every direction of the product's move is as long.
    np.testing.assert_allclose(np.linalg.svd(D @ A, compute_uv=False)[:R], bound, rtol=1e-4)


def test_in_orthonormal_coordinates_it_is_muon_itself_and_no_coordinates_matter():
    rng = np.random.default_rng(2)
    G = rng.normal(size=(N, R))
    Q = np.linalg.qr(rng.normal(size=(K, R)))[0].T
    (D,) = stepped("B", Q, G[None])
    np.testing.assert_allclose(D, -LR * 0.2 * np.sqrt(N) * orthogonal(G), atol=1e-7)
    # A ← T A: the gradient of B is G Tᵀ then, and the product moves alike, but for c.
    T = rng.normal(size=(R, R))
    (E,) = stepped("B", T @ Q, (G @ T.T)[None])
    c = np.linalg.norm(T @ Q) / np.sqrt(R)
    np.testing.assert_allclose(E @ T @ Q, D @ Q * c, atol=1e-6)


def test_directions_without_a_gradient_or_a_factor_stay():
    rng = np.random.default_rng(3)
    A, G = rng.normal(size=(R, K)), rng.normal(size=(N, R))
    A[2] = A[0]  # rank 2
    G[:, 1] = 0.0
    for D in stepped("B", A, [G, np.zeros_like(G)]):
        assert np.isfinite(D).all()
    (D,) = stepped("B", np.zeros_like(A), G[None])
    assert not D.any()
    (D,) = stepped("B", rng.normal(size=(R, K)), np.zeros((1, N, R)))
    assert not D.any()


def test_clients_and_experts_are_stepped_each_by_itself():
    rng = np.random.default_rng(4)
    rests = torch.tensor(rng.normal(size=(2, R, K))).float()  # two experts
    p = torch.zeros(5, 2, N, R, requires_grad=True)  # of five clients
    p.grad = torch.tensor(rng.normal(size=p.shape)).float()
    muon.Muon([p], "B", [rests], LR).step()
    for client in range(5):
        for expert in range(2):
            gradient = p.grad[client, expert].double().numpy()
            (wanted,) = stepped("B", rests[expert].numpy(), gradient[None])
            np.testing.assert_allclose(p[client, expert].detach().numpy(), wanted, atol=1e-6)


def test_what_travels_beside_is_adamw_s():
    head = [torch.nn.Parameter(torch.ones(4)) for _ in range(2)]
    factor = torch.nn.Parameter(torch.zeros(N, R))
    rates = {"B": 2 * LR, "head": LR}  # each kind at its own
    made = muon.build({"B": [factor], "head": [head[0]]}, {"B": [torch.eye(R)]}, rates, 0.1)
    assert [group["lr"] for group in made.param_groups] == [2 * LR, LR]
    judge = torch.optim.AdamW([head[1]], lr=LR, weight_decay=0.1)
    for step in range(3):
        for p in (*head, factor):
            p.grad = torch.full_like(p, 0.3 + step)
        made.step(), judge.step()
        made.zero_grad()
        assert all(p.grad is None for p in (head[0], factor))
    assert torch.equal(head[0], head[1]) and factor.abs().max() > 0
