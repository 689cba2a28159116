// Functions of each number behind a product of matrices.

namespace bolt {

BOLT_DEVICE float relu(float x) { return x < 0.0f ? 0.0f : x; }  // NaN stays NaN
BOLT_DEVICE float sigmoid(float x) { return 1.0f / (1.0f + fast_exp(-x)); }
BOLT_DEVICE float silu(float x) { return x / (1.0f + fast_exp(-x)); }
BOLT_DEVICE float gelu(float x) { return 0.5f * x * (1.0f + fast_erf(0.70710678f * x)); }
BOLT_DEVICE float gelu_tanh(float x) {
    return 0.5f * x * (1.0f + fast_tanh(0.79788456f * (x + 0.044715f * x * x * x)));
}
BOLT_DEVICE float hard_swish(float x) {
    const float gate = x + 3.0f;
    return x * (gate < 0.0f ? 0.0f : gate > 6.0f ? 6.0f : gate) * (1.0f / 6.0f);
}
BOLT_DEVICE float softplus(float x) { return relu(x) + fast_log1p(fast_exp(x < 0.0f ? x : -x)); }

}  // namespace bolt
