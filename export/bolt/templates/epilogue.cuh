// Functions of each number behind a product of matrices.

namespace bolt {

BOLT_DEVICE float relu(float x) { return x < 0.0f ? 0.0f : x; }  // NaN stays NaN
BOLT_DEVICE float sigmoid(float x) { return fast_reciprocal(1.0f + fast_exp(-x)); }
BOLT_DEVICE float silu(float x) { return x * sigmoid(x); }
// x Φ(x). Of |x|, 1 - Φ is a polynomial of t times exp(-x²/2), to 1e-7: Abramowitz and Stegun, 7.1.26.
BOLT_DEVICE float gelu(float x) {
    const float size = absolute(x), t = fast_reciprocal(1.0f + 0.23164189f * size);
    float p = 0.5307027f;
    p = p * t - 0.72657601f;
    p = p * t + 0.71070687f;
    p = p * t - 0.14224837f;
    p = p * t + 0.12741480f;
    const float rest = p * t * fast_exp(-0.5f * x * x);
    return x * (x < 0.0f ? rest : 1.0f - rest);
}
// (1 + tanh(u)) / 2 is the sigmoid of 2u.
BOLT_DEVICE float gelu_tanh(float x) { return x * sigmoid(1.5957691f * (x + 0.044715f * x * x * x)); }
BOLT_DEVICE float hard_swish(float x) {
    const float gate = x + 3.0f;
    return x * (gate < 0.0f ? 0.0f : gate > 6.0f ? 6.0f : gate) * (1.0f / 6.0f);
}
BOLT_DEVICE float softplus(float x) { return relu(x) + fast_log1p(fast_exp(-absolute(x))); }

}  // namespace bolt
