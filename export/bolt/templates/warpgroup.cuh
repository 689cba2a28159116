// A convolution or a product of matrices as one large product, as tile.cuh has it, by the products of warpgroups, whose
// matrices both lie in shared memory. They go on while the next parts are fetched and waited for.

namespace bolt {

constexpr int part_bytes = 128;  // 64 numbers of the inner axis, of a place or of a filter

// Sums of a product become those of the kernel: no use of theirs may move before the wait.
template <int heights, int tiles>
BOLT_DEVICE void settle(float (&sums)[heights][tiles][4]) {
#ifndef BOLT_HOST
    BOLT_UNROLL
    for (int i = 0; i < heights; ++i) {
        BOLT_UNROLL
        for (int tile = 0; tile < tiles; ++tile) {
            BOLT_UNROLL
            for (int k = 0; k < 4; ++k) asm volatile("" : "+f"(sums[i][tile][k])::"memory");
        }
    }
#endif
}

// Results of a block that waited for what did not come: nobody takes them for numbers.
template <int heights, int tiles>
BOLT_DEVICE void spoil(float (&sums)[heights][tiles][4]) {
    BOLT_UNROLL
    for (int i = 0; i < heights; ++i) {
        BOLT_UNROLL
        for (int tile = 0; tile < tiles; ++tile) {
            BOLT_UNROLL
            for (int k = 0; k < 4; ++k) sums[i][tile][k] = low(0x7fffu);  // NaN
        }
    }
}

// Begins sums += A · B over one part of the inner axis: A of `heights` times 64 places.
template <int heights, int tiles>
BOLT_DEVICE void begin_product(float (&sums)[heights][tiles][4], const void* places, const void* weights) {
    const uint64_t a = matrix_in_shared(places), b = matrix_in_shared(weights);
    settle(sums);  // else compilers copy them while the last product is under way, and make this one wait for it
    group_fence();
    BOLT_UNROLL
    for (int step = 0; step < 4; ++step) {
        BOLT_UNROLL
        for (int i = 0; i < heights; ++i)
            multiply_group(sums[i], a + after(i * 64 * part_bytes + 32 * step), b + after(32 * step));
    }
    group_commit();
}

// The second of two products, of what the first one left in registers: two of its tiles are a fragment, as in
// `product_of_registers` of tile.cuh. Weights lie in parts of 64 inner numbers, each of `tiles` times 8 filters. It ends
// before it returns.
template <int heights, int inner, int tiles>
BOLT_DEVICE void second_product(float (&sums)[heights][tiles][4], const float (&first)[heights][inner][4],
                                const void* weights) {
    static_assert(inner % 2 == 0, "whole fragments");
    uint32_t a[heights][inner / 2][4];
    BOLT_UNROLL
    for (int i = 0; i < heights; ++i) {
        BOLT_UNROLL
        for (int step = 0; step < inner / 2; ++step) {
            const float(&even)[4] = first[i][2 * step];
            const float(&odd)[4] = first[i][2 * step + 1];
            a[i][step][0] = pack(even[0], even[1]), a[i][step][1] = pack(even[2], even[3]);
            a[i][step][2] = pack(odd[0], odd[1]), a[i][step][3] = pack(odd[2], odd[3]);
        }
    }
    const uint64_t b = matrix_in_shared(weights);
    group_fence();
    BOLT_UNROLL
    for (int step = 0; step < inner / 2; ++step) {
        BOLT_UNROLL
        for (int i = 0; i < heights; ++i)
            multiply_group(sums[i], a[i][step], b + after(step / 4 * 8 * tiles * part_bytes + step % 4 * 32));
    }
    group_commit();
    group_wait<0>();
    settle(sums);
#ifndef BOLT_HOST
    // Products read registers until they end: nothing else may take their place before.
    BOLT_UNROLL
    for (int i = 0; i < heights; ++i) {
        BOLT_UNROLL
        for (int step = 0; step < inner / 2; ++step) {
            BOLT_UNROLL
            for (int k = 0; k < 4; ++k) asm volatile("" ::"r"(a[i][step][k]) : "memory");
        }
    }
#endif
}

}  // namespace bolt
