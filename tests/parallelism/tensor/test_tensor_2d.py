"""SUMMA and Cannon, 2.5-D and 3-D: products and both gradients are those of whole
matrices.
"""

from __future__ import annotations

import pytest
import torch

from llmlab.parallelism import World, launch
from llmlab.parallelism.tensor.grid import (
    block,
    cannon,
    input_block,
    layer_block,
    matmul_3d,
    output_block,
    summa,
    tesseract,
    unblock,
    weight_block,
)


def matrices(M, K, N):
    g = torch.Generator().manual_seed(0)
    X, W, G = (torch.randn(*s, generator=g) for s in ((M, K), (K, N), (M, N)))
    return X, W, G, (X @ W, G @ W.T, X.T @ G)


def in_two(comm, q, X, W, G):
    mesh = comm.mesh(q, q)
    x, w = block(X, mesh).requires_grad_(), block(W, mesh).requires_grad_()
    y = summa(x, w, mesh)
    y.backward(block(G, mesh))
    whole = [unblock(t.detach(), mesh) for t in (y, x.grad, w.grad)]
    return [*whole, unblock(cannon(x.detach(), w.detach(), mesh), mesh)]


@pytest.mark.parametrize("q", [1, 2, 3, 4])
@pytest.mark.parametrize("shape", [(12, 24, 36), (36, 12, 12)])
def test_summa_and_cannon(q, shape):
    X, W, G, (Y, dX, dW) = matrices(*shape)
    for results in World(q * q).run(in_two, q, X, W, G):
        for ours, theirs in zip(results, (Y, dX, dW, Y), strict=True):
            torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


def test_summa_on_real_processes():
    X, W, G, (Y, dX, dW) = matrices(8, 6, 4)
    for results in launch(in_two, 4, 2, X, W, G):
        for ours, theirs in zip(results, (Y, dX, dW, Y), strict=True):
            torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("d", "q"), [(1, 2), (2, 2), (3, 2), (2, 3)])
def test_tesseract(d, q):
    X, W, G, (Y, dX, dW) = matrices(36, 12, 24)

    def fn(comm):
        mesh = comm.mesh(d, q, q)
        x, w = layer_block(X, mesh).requires_grad_(), block(W, mesh).requires_grad_()
        y = tesseract(x, w, mesh)
        y.backward(layer_block(G, mesh))
        torch.testing.assert_close(
            y.detach(), layer_block(Y, mesh), atol=1e-5, rtol=1e-5
        )
        torch.testing.assert_close(x.grad, layer_block(dX, mesh), atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(w.grad, block(dW, mesh), atol=1e-5, rtol=1e-5)

    World(d * q * q).run(fn)


@pytest.mark.parametrize("q", [1, 2, 3])
def test_three_dimensions(q):
    X, W, G, (Y, dX, dW) = matrices(36, 36, 18)

    def fn(comm):
        mesh = comm.mesh(q, q, q)
        x, w = (
            input_block(X, mesh).requires_grad_(),
            weight_block(W, mesh).requires_grad_(),
        )
        y = matmul_3d(x, w, mesh)
        y.backward(output_block(G, mesh))
        torch.testing.assert_close(
            y.detach(), output_block(Y, mesh), atol=1e-5, rtol=1e-5
        )
        torch.testing.assert_close(x.grad, input_block(dX, mesh), atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(w.grad, weight_block(dW, mesh), atol=1e-5, rtol=1e-5)

    World(q**3).run(fn)


def test_an_output_is_the_next_layers_input_with_j_and_l_exchanged():
    X = torch.arange(64.0).view(8, 8)

    def fn(comm):
        mesh = comm.mesh(2, 2, 2)
        i, j, l = mesh.coords  # noqa: E741
        return (i, j, l), output_block(X, mesh), input_block(X, mesh)

    results = {c: (out, into) for c, out, into in World(8).run(fn)}
    assert all(
        torch.equal(out, results[i, k, j][1]) for (i, j, k), (out, _) in results.items()
    )


def test_nonsense_is_refused():
    with pytest.raises(ValueError, match="square"):
        World(2).run(lambda comm: block(torch.ones(4, 4), comm.mesh(1, 2)))
    with pytest.raises(ValueError, match="multiples of the mesh's side 2"):
        World(4).run(lambda comm: block(torch.ones(4, 5), comm.mesh(2, 2)))
    # jaxtyping, where it is on, is first
    with pytest.raises(Exception, match=r"cannot be multiplied|Kq"):
        World(4).run(
            lambda comm: summa(torch.ones(2, 3), torch.ones(2, 3), comm.mesh(2, 2))
        )
    with pytest.raises(ValueError, match="needs a cube"):
        World(4).run(
            lambda comm: matmul_3d(torch.ones(2, 2), torch.ones(2, 2), comm.mesh(2, 2))
        )
    with pytest.raises(ValueError, match=r"needs a mesh \(d, q, q\)"):
        World(4).run(
            lambda comm: tesseract(torch.ones(2, 2), torch.ones(2, 2), comm.mesh(2, 2))
        )
