"""Collapsible linear blocks: trained with many weights, run with a few (SESR, Bhardwaj et al., MLSys 2022)."""

from __future__ import annotations

import numbers

import keras
from keras import ops

from keras_efficient.layers.fake_quantize import fake_quantize_kernel
from keras_efficient.layers.sparsity import keep_largest, parse_sparsity

__all__ = ["CollapsibleLinearBlock"]


@keras.saving.register_keras_serializable(package="keras_efficient")
class CollapsibleLinearBlock(keras.layers.Conv2D):
    r"""A `Conv2D` that is trained as two linear convolutions in a row and used as one.

    The block is a `kernel_size` convolution from the input's channels to `expansion` channels, and a 1×1 convolution
    from those to `filters` channels, with no activation between them. Two linear maps are one, so the block collapses
    exactly:

    ```
    kernel[h, w, i, o] = Σ_p expand_kernel[h, w, i, p] · project_kernel[p, o]   (+ 1 at the centre where i = o)
    bias[o]            = Σ_p expand_bias[p] · project_kernel[p, o] + project_bias[o]
    outputs            = activation(conv2d(inputs, kernel) + bias)
    ```

    The `+ 1` is the short residual: the input is added to the output inside the kernel, at no cost. Kernel and bias are
    collapsed apart, so that the zero padding of the image never meets a bias.

    Training convolves with the collapsed kernel and back-propagates into the four weights, which costs little more than
    a plain `Conv2D`. `collapsed=False` runs the two convolutions instead: the same function, many times slower, there
    for comparison. `deploy()` gives the stock `Conv2D`.

    ```python
    x = keras_efficient.layers.CollapsibleLinearBlock(16, 3, padding="same", activation="relu")(x)
    ```

    Args:
        filters, kernel_size, strides, padding, data_format, dilation_rate, groups, activation, use_bias: as in
            `keras.layers.Conv2D`.
        kernel_initializer: for both kernels. bias_initializer: for both biases.
        kernel_regularizer, bias_regularizer: applied to the collapsed kernel and bias, as a `Conv2D` would.
        activity_regularizer: as in `Conv2D`.
        kernel_constraint, bias_constraint: must be `None`: a product of two weights cannot be projected.
        expansion: Integer. Channels (per group) between the two convolutions, p in the paper.
        residual: `"auto"` adds the identity where the shapes allow it (stride 1, odd kernel, as many filters as input
            channels, one group, kernel larger than 1×1); `True` insists on it; `False` leaves it out.
        collapsed: Boolean. `False` runs the two convolutions one after the other.
        kernel_bits: `None` or Integer ≥ 2. Fake-quantises the collapsed kernel to that many bits (symmetric, one scale
            per output channel), for quantisation-aware training. The deployed kernel lies on that grid.
        sparsity: `None` or `"N:M"`. Of each M neighbouring input channels at most the N largest weights of the
            collapsed kernel are kept, chosen anew at each step. `"2:4"` is what an Ethos-U85 and NVIDIA's tensor cores
            run faster.

    Input shape: `(batch, height, width, channels)` for `channels_last`, as for `Conv2D`.

    Output shape: as `Conv2D`'s.

    Raises:
        ValueError: a constraint, `lora_rank`, an expansion below 1, `residual=True` where there is no identity, or a
            `sparsity` that is no `"N:M"` or whose M does not divide the input channels of a group.

    Source: Collapsible Linear Blocks for Super-Efficient Super Resolution, MLSys 2022, sections 3.1–3.3, algorithms 1,
    2.
    """

    def __init__(
        self,
        filters,
        kernel_size,
        strides=(1, 1),
        padding="valid",
        data_format=None,
        dilation_rate=(1, 1),
        groups=1,
        activation=None,
        use_bias=True,
        kernel_initializer="glorot_uniform",
        bias_initializer="zeros",
        kernel_regularizer=None,
        bias_regularizer=None,
        activity_regularizer=None,
        kernel_constraint=None,
        bias_constraint=None,
        *,
        expansion=256,
        residual="auto",
        collapsed=True,
        kernel_bits=None,
        sparsity=None,
        **kwargs,
    ):
        if kernel_constraint is not None or bias_constraint is not None:
            raise ValueError(
                "`kernel_constraint` and `bias_constraint` must be None: the kernel is a product of two weights, "
                f"which cannot be projected. Received: {kernel_constraint}, {bias_constraint}."
            )
        if kwargs.get("lora_rank") is not None:
            raise ValueError(
                "`lora_rank` is not supported: this layer has its own factorisation. "
                f"Received: lora_rank={kwargs['lora_rank']}."
            )
        if not isinstance(expansion, numbers.Integral) or expansion < 1:
            raise ValueError(f"`expansion` must be a positive integer. Received: expansion={expansion}.")
        if residual not in (True, False, "auto"):
            raise ValueError(f'`residual` must be True, False or "auto". Received: residual={residual!r}.')
        if kernel_bits is not None and (not isinstance(kernel_bits, int) or kernel_bits < 2):
            raise ValueError(f"`kernel_bits` must be None or an integer of at least 2. Received: {kernel_bits!r}.")
        if not collapsed and (kernel_bits is not None or sparsity is not None):
            raise ValueError("`kernel_bits` and `sparsity` change the collapsed kernel: they need `collapsed=True`.")
        super().__init__(
            filters,
            kernel_size,
            strides=strides,
            padding=padding,
            data_format=data_format,
            dilation_rate=dilation_rate,
            groups=groups,
            activation=activation,
            use_bias=use_bias,
            kernel_initializer=kernel_initializer,
            bias_initializer=bias_initializer,
            kernel_regularizer=kernel_regularizer,
            bias_regularizer=bias_regularizer,
            activity_regularizer=activity_regularizer,
            **kwargs,
        )
        self.expansion = int(expansion)
        self.residual = residual
        self.collapsed = collapsed
        self.kernel_bits = kernel_bits
        self.sparsity = sparsity
        self._kept = None if sparsity is None else parse_sparsity(sparsity)

    def build(self, input_shape):
        channel_axis = -1 if self.data_format == "channels_last" else 1
        channels = input_shape[channel_axis]
        if channels is None:
            raise ValueError(f"The number of input channels must be known. Received: input_shape={input_shape}.")
        if channels % self.groups:
            raise ValueError(
                "The number of input channels must be divisible by `groups`. "
                f"Received: groups={self.groups}, input_shape={input_shape}."
            )
        if self._kept is not None and channels // self.groups % self._kept[1]:
            raise ValueError(
                f"`sparsity={self.sparsity!r}` needs input channels in groups of {self._kept[1]}. "
                f"Received: {channels // self.groups} input channels."
            )
        self.input_spec = keras.layers.InputSpec(min_ndim=self.rank + 2, axes={channel_axis: channels})
        self.compute_output_shape(input_shape)  # refuses shapes that leave no output
        self._has_residual = self._resolve_residual(channels)
        # float32 variables, never autocast: a half-precision sum over `expansion` products loses three digits.
        weights = {"trainable": True, "dtype": self.variable_dtype, "autocast": False}
        kernel, bias = self.kernel_initializer, self.bias_initializer
        expanded = self.expansion * self.groups
        shape = (*self.kernel_size, channels // self.groups, expanded)
        # Keras asks each weight for its regularizer: these two stand for the collapsed kernel and bias.
        penalties = {"kernel": self._kernel_penalty, "bias": self._bias_penalty}
        if self.kernel_regularizer is None:
            penalties["kernel"] = None
        if self.bias_regularizer is None:
            penalties["bias"] = None
        # An initializer object answers every call alike (it is seeded once), so the second weight gets a clone.
        self.expand_kernel = self.add_weight(name="expand_kernel", shape=shape, initializer=kernel, **weights)
        self.project_kernel = self.add_weight(
            name="project_kernel",
            shape=(self.expansion, self.filters),
            initializer=kernel.clone(),
            regularizer=penalties["kernel"],
            **weights,
        )
        if self.use_bias:
            self.expand_bias = self.add_weight(name="expand_bias", shape=(expanded,), initializer=bias, **weights)
            self.project_bias = self.add_weight(
                name="project_bias",
                shape=(self.filters,),
                initializer=bias.clone(),
                regularizer=penalties["bias"],
                **weights,
            )
        self.built = True

    @property
    def kernel(self):
        """The collapsed kernel, identity and fake quantisation included: `(kh, kw, channels / groups, filters)`."""
        if not self.built:
            raise AttributeError("You must build the layer before accessing `kernel`.")
        groups, shape = self.groups, self.expand_kernel.shape
        expand = ops.reshape(self.expand_kernel, (*shape[:3], groups, self.expansion))
        project = ops.reshape(self.project_kernel, (self.expansion, groups, self.filters // groups))
        kernel = ops.reshape(ops.einsum("hwigp,pgo->hwigo", expand, project), (*shape[:3], self.filters))
        if self._has_residual:
            kernel = kernel + self._identity_kernel()
        if self._kept is not None:
            kernel = keep_largest(kernel, *self._kept)
        if self.kernel_bits is not None:
            kernel = fake_quantize_kernel(kernel, self.kernel_bits)
        return kernel

    @property
    def bias(self):
        """The collapsed bias `(filters,)`, or `None`."""
        if not self.use_bias:
            return None
        if not self.built:
            raise AttributeError("You must build the layer before accessing `bias`.")
        groups = self.groups
        expand = ops.reshape(self.expand_bias, (groups, self.expansion))
        project = ops.reshape(self.project_kernel, (self.expansion, groups, self.filters // groups))
        return ops.reshape(ops.einsum("gp,pgo->go", expand, project), (self.filters,)) + self.project_bias

    def call(self, inputs):
        outputs = self._collapsed_convolution(inputs) if self.collapsed else self._expanded_convolution(inputs)
        return outputs if self.activation is None else self.activation(outputs)

    def deploy(self):
        """The stock `Conv2D` that computes the same."""
        if not self.built:
            raise ValueError("You must build the layer before `deploy()`.")
        config = keras.layers.Layer.get_config(self)
        conv = keras.layers.Conv2D(
            self.filters,
            self.kernel_size,
            strides=self.strides,
            padding=self.padding,
            data_format=self.data_format,
            dilation_rate=self.dilation_rate,
            groups=self.groups,
            activation=self.activation,
            use_bias=self.use_bias,
            name=self.name,
            trainable=config["trainable"],
            dtype=self.variable_dtype,
        )
        conv.build(self._input_shape())
        weights = [self.kernel] + ([self.bias] if self.use_bias else [])
        conv.set_weights([ops.convert_to_numpy(w) for w in weights])
        return conv

    def enable_lora(self, rank, *args, **kwargs):
        """Refused: this layer has its own factorisation."""
        raise ValueError("LoRA is not supported: this layer has its own factorisation. Call it on `deploy()`'s Conv2D.")

    def get_config(self):
        config = super().get_config()
        config.pop("lora_rank", None)
        config.update(
            expansion=self.expansion,
            residual=self.residual,
            collapsed=self.collapsed,
            kernel_bits=self.kernel_bits,
            sparsity=self.sparsity,
        )
        return config

    def save_own_variables(self, store):
        keras.layers.Layer.save_own_variables(self, store)

    def load_own_variables(self, store):
        keras.layers.Layer.load_own_variables(self, store)

    def _kernel_penalty(self, _):
        return self.kernel_regularizer(self.kernel)

    def _bias_penalty(self, _):
        return self.bias_regularizer(self.bias)

    def _collapsed_convolution(self, inputs):
        outputs = self.convolution_op(inputs, ops.cast(self.kernel, self.compute_dtype))
        return self._add_bias(outputs, self.bias)

    def _expanded_convolution(self, inputs):
        expand, project = (ops.cast(w, self.compute_dtype) for w in (self.expand_kernel, self.project_kernel))
        hidden = self.convolution_op(inputs, expand)
        hidden = self._add_bias(hidden, self.expand_bias if self.use_bias else None)
        outputs = ops.conv(hidden, self._pointwise(project), padding="valid", data_format=self.data_format)
        outputs = self._add_bias(outputs, self.project_bias if self.use_bias else None)
        if self._has_residual:
            identity = ops.cast(self._identity_kernel(), self.compute_dtype)
            outputs = outputs + self.convolution_op(inputs, identity)
        return outputs

    def _pointwise(self, project):
        """`project_kernel` as the 1×1 kernel of a convolution with `groups` groups: `(1, 1, expansion, filters)`."""
        return ops.reshape(project, (1, 1, self.expansion, self.filters))

    def _add_bias(self, outputs, bias):
        if bias is None:
            return outputs
        shape = (1, 1, 1, -1) if self.data_format == "channels_last" else (1, -1, 1, 1)
        return outputs + ops.cast(ops.reshape(bias, shape), outputs.dtype)

    def _identity_kernel(self):
        rows, columns = self.kernel_size
        centre = ops.reshape(ops.eye(self.filters, dtype=self.variable_dtype), (1, 1, self.filters, self.filters))
        return ops.pad(centre, [[rows // 2] * 2, [columns // 2] * 2, [0, 0], [0, 0]])

    def _resolve_residual(self, channels):
        """Whether the identity is added; `residual=True` where there is none is an error that says why."""
        obstacles = {
            f"strides={self.strides} are not 1": max(self.strides) > 1,
            f"kernel_size={self.kernel_size} has no centre": any(k % 2 == 0 for k in self.kernel_size),
            f"filters={self.filters} differs from the {channels} input channels": self.filters != channels,
            f"groups={self.groups} is not 1": self.groups > 1,
        }
        found = [text for text, holds in obstacles.items() if holds]
        if self.residual is True and found:
            raise ValueError(f"`residual=True` needs an identity kernel, but {'; '.join(found)}.")
        if self.residual == "auto":
            return not found and max(self.kernel_size) > 1
        return bool(self.residual)

    def _input_shape(self):
        channels = self.expand_kernel.shape[2] * self.groups
        return (None, None, None, channels) if self.data_format == "channels_last" else (None, channels, None, None)
