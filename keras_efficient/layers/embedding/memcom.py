"""MEmCom: a compressed embedding in which every entity keeps a vector of its own (Pansare et al., MLSys 2022)."""

from __future__ import annotations

import keras

from keras_efficient.layers.embedding.layer import CompressedEmbedding

__all__ = ["MEmComEmbedding"]

FORMS = {"scaled": "memcom", "subspace": "factorised", "codebooks": "codebooks"}
BITS = {"scaled": 32, "subspace": 2, "codebooks": 8}  # by default: what each form is good at
SCALED_ONLY = {"bias": False, "scalars": 1, "scalar_bits": 32, "own_rows": 0, "hash": "modulo"}


@keras.saving.register_keras_serializable(package="keras_efficient")
class MEmComEmbedding(CompressedEmbedding):
    """An `Embedding` in a fraction of the bytes, in which every entity has a vector of its own.

    ```
    e(i) = U[h(i)] · V[i] (+ W[i])        form="scaled", the paper's: U m×d, V and W n×G
    e(i) = Σ_k V[i, k] · U[k]             form="subspace": U K×d, V n×K of a few bits
    e(i) = [U_1[h_1(i)], …, U_G[h_G(i)]]  form="codebooks": U_g 256×d/G, the hashes h_g learned
    ```

    In the scaled form entities share the m rows of U by a hash h, and each scales its row by a number of its own; with
    `scalars` G > 1, each number scales d / G columns. It is the one to train from nothing: its weights, its gradients
    and the state of its optimizer are all small.

    In the subspace form all entities share all rows, and each adds them up with numbers of its own, of a few bits. In
    the form of codebooks the private part of an entity is its hash itself: for each stretch of columns a byte says
    which of 256 shared rows it takes. Both are made for tables that are trained already: `from_embedding` finds the
    scalars or the hashes, and loses a fraction of what training from nothing in few bits does.

    ```python
    x = keras_efficient.layers.MEmComEmbedding(1_000_000, 64, compression=16)(ids)
    small = keras_efficient.layers.MEmComEmbedding.from_embedding(
        trained, counts=counts, compression=32, form="codebooks"
    )
    ```

    Args:
        input_dim, output_dim, embeddings_initializer, mask_zero: as in `Embedding`. Ids should be sorted by falling
            frequency (`StringLookup.adapt` and `IntegerLookup.adapt` do so), or take `hash="mix"`.
        embeddings_regularizer: applied in training to the vectors that a call looks up, over the number of them;
            `Embedding` applies it to the whole table.
        compression: Number. The bytes of the float32 table over the bytes of all that is stored here, at least. By
            default 16.
        hash_size: Integer, in the place of `compression`: rows m (scaled) or K (subspace), or hashes G (codebooks).
        form: `"scaled"`, `"subspace"` or `"codebooks"`.
        bias: Boolean. Adds W. Scaled form only.
        scalars: Integer, a divisor of `output_dim`: G. Scaled form only.
        scalar_bits: 32, 16 or 8: width of V and W. Scaled form only.
        own_rows: Integer. So many of the most frequent entities have rows of their own. Scaled form only.
        hash: `"modulo"` or `"mix"`: i mod m, or a hash without a pattern. Scaled form only.
        bits: 32, 16, 8, 4, 2 or 1: width of V in the subspace form, of U in the others (codebooks have at least 8). By
            default 32 in the scaled form, 2 in the subspace form, 8 for codebooks.
        combiner, out_of_range, frozen: as in `CompressedEmbedding`.

    Input shape: integers `(…)`. Output shape: `(…, output_dim)`; with a combiner without the ids' last axis.

    Raises:
        TypeError: ids that are floats.
        ValueError: ids out of range; a compression that leaves no row (the message says how far the form goes).

    Source: Learning Compressed Embeddings for On-Device Inference, MLSys 2022, section 3. The subspace form is
    MEmCom with one bucket of K rows: a factorisation of few bits. Codebooks are MEmCom with a hash that is learned for
    each group of columns: the product quantisation of Jégou, Douze and Schmid, PAMI 2011.
    """

    def __init__(
        self,
        input_dim,
        output_dim,
        embeddings_initializer="uniform",
        embeddings_regularizer=None,
        mask_zero=False,
        *,
        compression=None,
        hash_size=None,
        form="scaled",
        bias=False,
        scalars=1,
        scalar_bits=32,
        own_rows=0,
        hash="modulo",
        bits=None,
        combiner=None,
        out_of_range="error",
        frozen=False,
        **kwargs,
    ):
        if form not in FORMS:
            raise ValueError(f"`form` must be one of {', '.join(map(repr, FORMS))}. Received: form={form!r}.")
        options = {"bias": bias, "scalars": scalars, "scalar_bits": scalar_bits, "own_rows": own_rows, "hash": hash}
        if form != "scaled":
            if wrong := [name for name, value in options.items() if value != SCALED_ONLY[name]]:
                raise ValueError(f"`{wrong[0]}` belongs to the scaled form. Received: form={form!r}, {wrong[0]}.")
            options = {}
        if compression is not None and hash_size is not None:
            raise ValueError(
                f"Give `compression` or `hash_size`, not both. Received: compression={compression}, "
                f"hash_size={hash_size}."
            )
        if compression is None and hash_size is None:
            compression = 16
        super().__init__(
            input_dim,
            output_dim,
            embeddings_initializer,
            embeddings_regularizer,
            mask_zero,
            method=FORMS[form],
            compression=compression,
            size=hash_size,
            bits=BITS[form] if bits is None else bits,
            combiner=combiner,
            out_of_range=out_of_range,
            frozen=frozen,
            **options,
            **kwargs,
        )
        self.form = form

    @property
    def hash_size(self):
        """Rows that entities share, m in the scaled form and K in the subspace form; or learned hashes, G."""
        return self.plan.size

    def get_config(self):
        config = super().get_config()
        del config["method"]
        config["hash_size"] = config.pop("size")
        return {**config, "form": self.form}
