"""Hadamard matrices of many sizes, and random rotations made of them.

Orthogonal matrices with entries +-1/sqrt(n) spread one large channel over all n, which is what takes outliers away.

    H_2m = [[1, 1], [1, -1]] (x) H_m       Sylvester
    H_(q + 1) = I + S                      Paley I, q a prime = 3 mod 4
    H_2(q + 1) = S (x) [[1, 1], [1, -1]] + I (x) [[1, -1], [-1, -1]]    Paley II, q a prime = 1 mod 4

S has the quadratic characters of differences within a border of ones. A size that no such product reaches gets a random
orthogonal matrix for its odd part. Sources: Paley 1933; QuaRot, arXiv:2404.00456, section 4; random signs before the
transform: QuIP#, arXiv:2402.04396, section 3.

Letters: n size; factors multiply to it.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

__all__ = [
    "Rotation",
    "apply_factors",
    "dense",
    "factors_of",
    "hadamard_order",
    "random_orthogonal",
    "random_rotation",
]

_LARGEST_ORDER = 512
"""Of the factor that is no power of two: applying it costs its size for each channel."""
_LARGEST = 64
"""Powers of two are split into factors of at most this size, so that applying them costs little."""


@dataclass(frozen=True)
class Rotation:
    """Signs, then the Kronecker product of orthogonal factors: x -> (x * signs) @ (F_1 (x) F_2 (x) ...)."""

    signs: Tensor
    """[n], float64."""
    factors: tuple[Tensor, ...]
    """float64."""

    def __call__(self, x: Tensor) -> Tensor:
        """[..., n] turned, float64."""
        return apply_factors(x * self.signs.to(x), [factor.to(x) for factor in self.factors])

    @property
    def matrix(self) -> Tensor:
        """[n, n], float64: x is turned as x @ matrix."""
        return self.signs[:, None] * dense(self.factors)


def random_rotation(size: int, generator: torch.Generator) -> Rotation:
    """Random signs and a Hadamard transform."""
    signs = torch.randint(0, 2, (size,), generator=generator, dtype=torch.float64) * 2 - 1
    return Rotation(signs, tuple(factors_of(size, generator)))


def dense(factors: Sequence[Tensor]) -> Tensor:
    """Their Kronecker product."""
    product = torch.ones(1, 1, dtype=torch.float64)
    for factor in factors:
        product = torch.kron(product, factor)
    return product


def factors_of(size: int, generator: torch.Generator | None = None) -> list[Tensor]:
    """Orthogonal matrices, float64, whose Kronecker product has the size.

    Args:
        generator: draws the odd part of a size that no Hadamard matrix of ours reaches; none takes seed 0.
    """
    order = hadamard_order(size)
    if order is None:
        odd = size // (size & -size)
        first = random_orthogonal(odd, generator or torch.Generator().manual_seed(0))
        return [first, *_powers_of_two(size // odd)]
    head = [] if order == 1 else [_paley(order).double() / order**0.5]
    return [*head, *_powers_of_two(size // order)]


def hadamard_order(size: int) -> int | None:
    """The smallest order with a Hadamard matrix of ours that leaves a power of two: 1 for 64, 36 for 576."""
    order = size // (size & -size)
    while size % order == 0 and order <= _LARGEST_ORDER:
        if order in (1, 2) or _prime_of(order) is not None:
            return order
        order *= 2
    return None


def apply_factors(x: Tensor, factors: Sequence[Tensor]) -> Tensor:
    """x [..., n] times the Kronecker product of the factors, in their dtype, O(n sum of sizes)."""
    shape = x.shape
    for factor in factors:
        # The first axis of what is left is multiplied and goes to the end: after all factors the order is restored.
        x = x.reshape(*shape[:-1], len(factor), -1).transpose(-1, -2) @ factor
        x = x.reshape(shape)
    return x


def random_orthogonal(size: int, generator: torch.Generator) -> Tensor:
    """[n, n], float64, uniform over the rotations and reflections: QR of a normal matrix, signs made unique."""
    normal = torch.randn(size, size, generator=generator, dtype=torch.float64)
    q: Tensor
    r: Tensor
    q, r = torch.linalg.qr(normal)
    return torch.mul(q, r.diagonal().sign()).contiguous()


def _powers_of_two(size: int) -> list[Tensor]:
    """Sylvester matrices whose sizes multiply to a power of two."""
    sizes = []
    while size > 1:
        sizes.append(min(size, _LARGEST))
        size //= sizes[-1]
    return [_sylvester(each) for each in sizes]


@cache
def _sylvester(size: int) -> Tensor:
    matrix = torch.ones(1, 1, dtype=torch.float64)
    pair = torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64) / 2**0.5
    while len(matrix) < size:
        matrix = torch.kron(pair, matrix)
    return matrix


def _prime_of(order: int) -> int | None:
    """The prime of a Paley matrix of this order."""
    for prime, remainder in ((order - 1, 3), (order // 2 - 1, 1)):
        if order % 4 == 0 and prime % 4 == remainder and _is_prime(prime):
            return prime
    return None


def _is_prime(number: int) -> bool:
    return number > 1 and all(number % divisor for divisor in range(2, int(number**0.5) + 1))


@cache
def _paley(order: int) -> Tensor:
    """[order, order] of +-1, int64."""
    if order == 2:
        return torch.tensor([[1, 1], [1, -1]])
    prime = _prime_of(order)
    assert prime is not None
    squares = {value * value % prime for value in range(1, prime)}
    character = torch.tensor([0] + [1 if value in squares else -1 for value in range(1, prime)])
    index = torch.arange(prime)
    border = torch.zeros(prime + 1, prime + 1, dtype=torch.int64)
    border[1:, 1:] = character[(index[:, None] - index[None]) % prime]
    border[0, 1:] = 1
    if prime % 4 == 3:
        border[1:, 0] = -1
        return border + torch.eye(prime + 1, dtype=torch.int64)
    border[1:, 0] = 1
    ones, cross = torch.tensor([[1, 1], [1, -1]]), torch.tensor([[1, -1], [-1, -1]])
    return torch.kron(border, ones) + torch.kron(torch.eye(prime + 1, dtype=torch.int64), cross)
