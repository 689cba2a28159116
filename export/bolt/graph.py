"""An ONNX file in the form that `partition` reads: what a region can compute stands in one spelling only.

    constants     folded; scales and shifts of channels (batch normalisation) are in weights and biases
    PReLU, GELU   and SiLU, hard-swish, clip, which converters write as several nodes, are one node each
    half precision inside is float32, without casts
    convolutions  have explicit padding; transposed ones are convolutions of phases before a depth to space
    depth to space is behind everything that works on single numbers
    transposes    between layouts cancel each other wherever only such work lies between them

The file still runs everywhere: operators that ONNX does not have in this opset are functions of the domain `DOMAIN`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from keras_efficient.errors import ConversionError, MissingDependency
from keras_efficient.export.bolt.folding import padding_explicit, to_fixed_point
from keras_efficient.export.bolt.layout import axes_kept, plain_scalars, products_of_rows, reshapes, sink_transposes
from keras_efficient.export.bolt.phases import cut_transposed
from keras_efficient.export.bolt.rewriting import constant, folded, tidied
from keras_efficient.export.bolt.shapes import Shapes
from keras_efficient.export.bolt.standard import DOMAIN, FUSED, OURS, function
from keras_efficient.export.bolt.widening import to_float32

if TYPE_CHECKING:
    import onnx
    import onnx_ir as ir

__all__ = [
    "check_installed",
    "normalised",
    "normalised_ir",
]

OLDEST_OPSET, NEWEST_OPSET = 13, 19  # between them the operators that are read here mean the same


def check_installed(purpose: str = "Looking for kernels in a network") -> None:
    """Whether networks can be taken apart.

    Raises:
        MissingDependency: the extra `gpu` is not installed.
    """
    try:
        import onnxscript  # noqa: F401 - brings onnx_ir
    except ImportError as err:
        raise MissingDependency("onnxscript", purpose, "gpu") from err


def normalised(model: onnx.ModelProto) -> onnx.ModelProto:
    """The same function in one spelling, as this file's head tells; normal models come back as they are.

    Raises:
        ConversionError: an opset that is not read, no valid model, or one in regions already.
        MissingDependency: the extra `gpu` is not installed.
    """
    check_installed()
    import onnx_ir as ir

    return ir.serde.serialize_model(normalised_ir(model))


def normalised_ir(proto: onnx.ModelProto) -> ir.Model:
    """`normalised` for those who go on rewriting."""
    check_installed()
    import onnx_ir as ir

    opsets = {one.domain or "": one.version for one in proto.opset_import}
    if not OLDEST_OPSET <= opsets.get("", 0) <= NEWEST_OPSET:
        raise ConversionError(
            f"The file has opset {opsets.get('')}; {OLDEST_OPSET} to {NEWEST_OPSET} are read.",
            hint="Export it again: keras_efficient.export.save writes opset 18.",
        )
    if any(node.domain == DOMAIN and node.op_type == FUSED for node in proto.graph.node):
        raise ConversionError("The file is in regions already.", hint="Give the file that it was made from.")
    try:
        model = ir.serde.deserialize_model(proto)
        _cleaned(model)
        to_float32(model)
    except ImportError:
        raise  # a damaged installation, and no fault of the model
    except Exception as err:  # onnx_ir raises ValueError, TypeError, KeyError, … for what is no model
        raise ConversionError(f"The file is no valid ONNX model: {str(err).splitlines()[0][:300]}") from err
    shapes = Shapes(model)
    plain_scalars(model, shapes)
    reshapes(model, shapes)
    axes_kept(model, shapes)
    products_of_rows(model, shapes)
    cut_transposed(model, shapes)
    tidied(model)
    sink_transposes(model)
    _recognised(model)
    shapes = Shapes(model)
    padding_explicit(model, shapes)
    to_fixed_point(model, shapes)
    sink_transposes(model)
    tidied(model)
    return model


def _cleaned(model: ir.Model) -> None:
    """Constants folded into initializers, identities gone."""
    import onnx_ir.passes.common as common

    common.RemoveInitializersFromInputsPass()(model)
    folded(model)
    common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model)
    common.IdentityEliminationPass()(model)
    tidied(model)


def _recognised(model: ir.Model) -> None:
    """Activations that converters write as several nodes, as one."""
    import onnx_ir as ir
    from onnxscript.rewriter import pattern

    def gelu(op: Any, x: Any) -> Any:
        return (0.5 * x) * (1.0 - op.Erf(op.Neg(x) * 0.70710678))

    def gelu_by_sum(op: Any, x: Any) -> Any:
        return (0.5 * x) * (1.0 + op.Erf(x * 0.70710678))

    def gelu_by_root(op: Any, x: Any) -> Any:
        return (x * (op.Erf(x / 1.41421356) + 1.0)) * 0.5

    def gelu_tanh(op: Any, x: Any) -> Any:
        return (0.5 * x) * (1.0 + op.Tanh(0.79788456 * (x + 0.044715 * op.Pow(x, 3.0))))

    def silu(op: Any, x: Any) -> Any:
        return x * op.Sigmoid(x)

    def hard_swish(op: Any, x: Any) -> Any:
        return x * (op.Clip(x + 3.0, 0.0, 6.0) * 0.16666667)

    def hard_swish_by_sigmoid(op: Any, x: Any) -> Any:
        return x * op.HardSigmoid(x, alpha=0.16666667, beta=0.5)

    def prelu(op: Any, x: Any, slopes: Any) -> Any:
        return op.Relu(x) + op.Relu(op.Neg(x)) * slopes

    def has_slopes(context: Any, slopes: ir.Value, **_: Any) -> bool:
        return constant(slopes) is not None

    def to_prelu(op: Any, x: Any, slopes: ir.Value, **_: Any) -> Any:
        given = constant(slopes)
        assert given is not None  # `has_slopes`
        numbers = -given
        numbers = numbers[0] if numbers.ndim == 4 and len(numbers) == 1 else numbers
        return op.PRelu(x, op.initializer(ir.tensor(numbers), name=f"{slopes.name}__{x.name}__slopes"))

    ours = [(gelu, "Gelu"), (gelu_by_sum, "Gelu"), (gelu_by_root, "Gelu"), (gelu_tanh, "GeluTanh"), (silu, "Silu")]
    rules = [
        pattern.RewriteRule(one, lambda op, x, _kind=kind, **_: getattr(op, _kind)(x, _domain=DOMAIN))
        for one, kind in ours
    ]
    rules += [
        pattern.RewriteRule(one, lambda op, x, **_: op.HardSwish(x)) for one in (hard_swish, hard_swish_by_sigmoid)
    ]
    rules.append(pattern.RewriteRule(prelu, to_prelu, has_slopes))
    pattern.RewriteRuleSet(rules, commute=True).apply_to_model(model)
    for kind in {node.op_type for node in model.graph if node.domain == DOMAIN} & OURS:
        made = function(kind)
        model.functions[made.identifier()] = made
        model.graph.opset_imports[DOMAIN] = 1
