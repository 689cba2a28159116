"""SOAP: Adam in the eigenbasis of the gradient's second moments (Vyas et al., 2024)."""

from __future__ import annotations

import keras
import numpy as np
from keras import ops

__all__ = ["SOAP"]


@keras.saving.register_keras_serializable(package="keras_efficient")
class SOAP(keras.optimizers.Optimizer):
    r"""Adam run in the slowly turning eigenbasis of each weight's gradient covariances.

    A weight is seen as a matrix of (all axes but the last) × (last axis), its gradient as `G`:

    ```
    L ← β L + (1 − β) G Gᵀ,   R ← β R + (1 − β) Gᵀ G          (β = covariance_decay)
    every `refresh` steps:  Q_L ← qr(L Q_L).q,  Q_R ← qr(R Q_R).q      one power iteration towards the eigenvectors
    G' = Q_Lᵀ G Q_R,  v ← β₂ v + (1 − β₂) G'²,  m ← β₁ m + (1 − β₁) G
    weight ← weight − rate · Q_L (Q_Lᵀ m̂ Q_R / (√v̂ + ε)) Q_Rᵀ
    ```

    Vectors, and sides of a matrix longer than `largest_side`, keep the plain basis; with both plain it is Adam. For
    networks of some ten thousand weights the algebra is small beside the convolutions, and each step is worth more
    (short trials on SESR-M5, one run each: `docs/decisions.md`).

    Args:
        learning_rate: Float or schedule.
        beta_1, beta_2, epsilon: as in Adam.
        covariance_decay: Float. Of L and R.
        refresh: Integer. Steps between two refreshes of the eigenbasis.
        largest_side: Integer. Longer sides are not rotated.

    Source: SOAP: Improving and Stabilizing Shampoo using Adam, arXiv 2409.11321, algorithm 3.
    """

    def __init__(
        self,
        learning_rate=1e-3,
        beta_1=0.95,
        beta_2=0.95,
        epsilon=1e-8,
        covariance_decay=0.95,
        refresh=25,
        largest_side=512,
        name="soap",
        **kwargs,
    ):
        super().__init__(learning_rate=learning_rate, name=name, **kwargs)
        self.beta_1, self.beta_2, self.epsilon = beta_1, beta_2, epsilon
        self.covariance_decay, self.refresh, self.largest_side = covariance_decay, refresh, largest_side

    def build(self, variables):
        if self.built:
            return
        super().build(variables)
        self._means = [self.add_variable_from_reference(v, name="mean") for v in variables]
        self._squares = [self.add_variable_from_reference(v, name="square") for v in variables]
        self._bases = [[self._basis(v, side) for side in _matrix_shape(v)] for v in variables]

    def _basis(self, variable, side):
        """(covariance, eigenvectors) of one side of a matrix, or None where it stays as it is."""
        if len(variable.shape) < 2 or side == 1 or side > self.largest_side:
            return None
        zeros, identity = "zeros", keras.initializers.Identity()
        return (
            self.add_variable((side, side), initializer=zeros, name="covariance"),
            self.add_variable((side, side), initializer=identity, name="eigenvectors"),
        )

    def update_step(self, gradient, variable, learning_rate):
        index = self._get_variable_index(variable)
        mean, square, bases = self._means[index], self._squares[index], self._bases[index]
        shape = _matrix_shape(variable)
        step = ops.cast(self.iterations + 1, gradient.dtype)
        self.assign(mean, self.beta_1 * mean + (1 - self.beta_1) * gradient)
        matrix = ops.reshape(gradient, shape)
        rotated = _rotate(matrix, bases)
        squares = self.beta_2 * ops.reshape(square, shape) + (1 - self.beta_2) * ops.square(rotated)
        self.assign(square, ops.reshape(squares, variable.shape))
        direction = _rotate(ops.reshape(mean, shape), bases) / (1 - ops.power(self.beta_1, step))
        direction = direction / (ops.sqrt(squares / (1 - ops.power(self.beta_2, step))) + self.epsilon)
        direction = ops.reshape(_rotate_back(direction, bases), variable.shape)
        self.assign_sub(variable, ops.cast(learning_rate, gradient.dtype) * direction)
        for basis, rows in zip(bases, (matrix, ops.transpose(matrix)), strict=True):
            if basis is not None:
                self._follow(basis, ops.matmul(rows, ops.transpose(rows)))

    def _follow(self, basis, new):
        covariance, vectors = basis
        keep = self.covariance_decay
        moved = keep * covariance + (1 - keep) * new
        self.assign(covariance, moved)
        due = ops.equal(self.iterations % self.refresh, 0)
        turned = ops.cond(
            due,
            lambda: ops.qr(ops.matmul(moved, ops.convert_to_tensor(vectors)))[0],
            lambda: ops.convert_to_tensor(vectors),
        )
        self.assign(vectors, turned)

    def get_config(self):
        config = super().get_config()
        names = ("beta_1", "beta_2", "epsilon", "covariance_decay", "refresh", "largest_side")
        return {**config, **{name: getattr(self, name) for name in names}}


def _matrix_shape(variable):
    shape = tuple(variable.shape)
    if len(shape) < 2:
        return (1, int(np.prod(shape))) if shape else (1, 1)
    return int(np.prod(shape[:-1])), shape[-1]


def _rotate(matrix, bases):
    left, right = bases
    if left is not None:
        matrix = ops.matmul(ops.transpose(left[1]), matrix)
    return matrix if right is None else ops.matmul(matrix, right[1])


def _rotate_back(matrix, bases):
    left, right = bases
    if left is not None:
        matrix = ops.matmul(left[1], matrix)
    return matrix if right is None else ops.matmul(matrix, ops.transpose(right[1]))
