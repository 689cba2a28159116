// A convolution or a product of matrices as one large product: output places are rows, filters are columns, and the
// inner axis runs over taps and channels. A block computes a tile; parts of the inner axis come through shared memory,
// some of them on their way while one is multiplied.
//
// Needs `Ring` of strip.cuh for the order of chunks: here a "pixel" is an output place, its channels one part of the
// inner axis, and each stage of the pipeline is a "row".

namespace bolt {

// sums += A · B over one part of the inner axis: A of `heights` times 16 places from `place` on, B of `tiles` times 8
// filters, in fragments.
template <int heights, int tiles, class Stages>
BOLT_DEVICE void product(float (&sums)[heights][tiles][4], const Stages& stages, int stage, int place,
                         const Words2* weights, int tiles_of_block) {
    const half* line = stages.row(stage);
    BOLT_UNROLL
    for (int step = 0; step < Stages::channels / 16; ++step) {
        uint32_t a[heights][4];
        BOLT_UNROLL
        for (int i = 0; i < heights; ++i)
            load_matrix(a[i], line + Stages::place(place + 16 * i + (lane() & 15), 2 * step + (lane() >> 4)));
        BOLT_UNROLL
        for (int tile = 0; tile < tiles; ++tile) {
            const Words2 b = weights[(step * tiles_of_block + tile) * 32 + lane()];
            BOLT_UNROLL
            for (int i = 0; i < heights; ++i) multiply(sums[i][tile], a[i], b.x, b.y);
        }
    }
}

// The second of two products, whose A is what the first one left in registers: two tiles of 8 filters of a result are
// one fragment of 16 inner numbers, for the same places, so that nothing moves between threads.
template <int heights, int inner, int tiles>
BOLT_DEVICE void product_of_registers(float (&sums)[heights][tiles][4], const float (&first)[heights][inner][4],
                                      const Words2* weights) {
    static_assert(inner % 2 == 0, "whole fragments");
    BOLT_UNROLL
    for (int step = 0; step < inner / 2; ++step) {
        uint32_t a[heights][4];
        BOLT_UNROLL
        for (int i = 0; i < heights; ++i) {
            const float(&even)[4] = first[i][2 * step];
            const float(&odd)[4] = first[i][2 * step + 1];
            a[i][0] = pack(even[0], even[1]), a[i][1] = pack(even[2], even[3]);
            a[i][2] = pack(odd[0], odd[1]), a[i][3] = pack(odd[2], odd[3]);
        }
        BOLT_UNROLL
        for (int tile = 0; tile < tiles; ++tile) {
            const Words2 b = load_global(weights + (step * tiles + tile) * 32 + lane());
            BOLT_UNROLL
            for (int i = 0; i < heights; ++i) multiply(sums[i][tile], a[i], b.x, b.y);
        }
    }
}

// The same with A in shared memory, of all filters of the first product: a warp computes some filters of the second.
template <int heights, int tiles, class First>
BOLT_DEVICE void product_of_shared(float (&sums)[heights][tiles][4], const First& first, int place,
                                   const Words2* weights, int all_tiles) {
    BOLT_LOOP
    for (int step = 0; step < First::channels / 16; ++step) {
        uint32_t a[heights][4];
        BOLT_UNROLL
        for (int i = 0; i < heights; ++i)
            load_matrix(a[i], first.data + First::place(place + 16 * i + (lane() & 15), 2 * step + (lane() >> 4)));
        BOLT_UNROLL
        for (int tile = 0; tile < tiles; ++tile) {
            const Words2 b = load_global(weights + (step * all_tiles + tile) * 32 + lane());
            BOLT_UNROLL
            for (int i = 0; i < heights; ++i) multiply(sums[i][tile], a[i], b.x, b.y);
        }
    }
}

template <int heights, int tiles>
BOLT_DEVICE void begin(float (&sums)[heights][tiles][4], const float* bias) {
    BOLT_UNROLL
    for (int tile = 0; tile < tiles; ++tile) {
        const int filter = 8 * tile + 2 * (lane() & 3);
        const float even = load_global(bias + filter), odd = load_global(bias + filter + 1);
        BOLT_UNROLL
        for (int i = 0; i < heights; ++i) {
            float(&one)[4] = sums[i][tile];
            one[0] = even, one[1] = odd, one[2] = even, one[3] = odd;
        }
    }
}

}  // namespace bolt
