// A product of matrices or a convolution by the main loop of CUTLASS, whose headers the compiler must find, with the
// other templates' activations behind it. From CUTLASS come the iterators over global and shared memory, the pipeline
// and the products of warps; what happens to a block's sums afterwards is below.
//
// Needs primitives.cuh.
#ifdef BOLT_HOST
#ifndef BOLT_HOST_CUTLASS
#error "kernels made with CUTLASS run on a GPU only"
#endif
#endif
#ifndef NDEBUG
#define NDEBUG  // an assertion that may fail takes a stack
#endif
#include "cutlass/conv/kernel/default_conv2d_fprop.h"
#include "cutlass/gemm/threadblock/default_mma.h"

namespace bolt {

using CutlassHalf = cutlass::half_t;
using CutlassInstruction = cutlass::gemm::GemmShape<16, 8, 16>;

// Rows (places, channels) by weights (filters, channels).
template <class Block, class Warp, int stages>
using RowsMma = typename cutlass::gemm::threadblock::DefaultMma<
    CutlassHalf, cutlass::layout::RowMajor, 8, CutlassHalf, cutlass::layout::ColumnMajor, 8, float,
    cutlass::layout::RowMajor, cutlass::arch::OpClassTensorOp, cutlass::arch::Sm80, Block, Warp, CutlassInstruction,
    stages, cutlass::arch::OpMultiplyAdd>::ThreadblockMma;

// Images by weights (filters, height, width, channels). CUTLASS makes a whole kernel, of which only the main loop is
// taken; the epilogue's type fills a place.
template <class Block, class Warp, int stages>
using ImagesMma = typename cutlass::conv::kernel::DefaultConv2dFprop<
    CutlassHalf, cutlass::layout::TensorNHWC, CutlassHalf, cutlass::layout::TensorNHWC, float,
    cutlass::layout::TensorNHWC, float, cutlass::arch::OpClassTensorOp, cutlass::arch::Sm80, Block, Warp,
    CutlassInstruction, cutlass::epilogue::thread::LinearCombination<float, 4, float, float>,
    cutlass::gemm::threadblock::GemmIdentityThreadblockSwizzle<>, stages, cutlass::arch::OpMultiplyAdd,
    cutlass::conv::IteratorAlgorithm::kOptimized>::Kernel::Mma;

// The number of a thread's warp, from one lane to all, so that the compiler knows that they have the same.
BOLT_DEVICE int uniform_warp() {
#ifdef BOLT_HOST
    return warp();
#else
    return __shfl_sync(0xffffffffu, warp(), 0);
#endif
}

template <class Mma>
BOLT_DEVICE auto& stages_of(unsigned char* shared) {
    return *reinterpret_cast<typename Mma::Base::SharedStorage*>(shared);
}

// sums += rows · weights, of the places from `down` and the filters from `across` on. All threads have passed a
// barrier at the end, and stages are free.
template <class Mma>
BOLT_DEVICE void multiply_rows(typename Mma::FragmentC& sums, const half* input, const unsigned char* weights,
                               int places, int channels, int filters, int down, int across, unsigned char* shared) {
    // CUTLASS takes pointers to what may be written, and writes nothing there.
    auto* const a = reinterpret_cast<CutlassHalf*>(const_cast<half*>(input));
    auto* const b = reinterpret_cast<CutlassHalf*>(const_cast<unsigned char*>(weights));
    const typename Mma::IteratorA::Params params_a(cutlass::layout::RowMajor{channels});
    const typename Mma::IteratorB::Params params_b(cutlass::layout::ColumnMajor{channels});
    const typename Mma::IteratorA from_a(params_a, a, {places, channels}, thread(), {down, 0});
    const typename Mma::IteratorB from_b(params_b, b, {channels, filters}, thread(), {0, across});
    Mma mma(stages_of<Mma>(shared), thread(), uniform_warp(), lane());
    mma((channels + Mma::Shape::kK - 1) / Mma::Shape::kK, sums, from_a, from_b, sums);
}

// The same of a convolution. The way from tap to tap is looked up at run time, in a table that would be on a stack if
// each thread had its own: the block has one, behind the stages, of `cutlass_table_bytes` at most.
inline constexpr int cutlass_table_bytes = 128;

template <class Mma>
BOLT_DEVICE void multiply_images(typename Mma::FragmentC& sums, const half* input, const unsigned char* weights,
                                 const cutlass::conv::Conv2dProblemSize& problem, int down, int across,
                                 unsigned char* shared) {
    using Layout = cutlass::layout::TensorNHWC;
    using Table = typename Mma::IteratorA::Params;
    static_assert(sizeof(Table) <= cutlass_table_bytes && sizeof(stages_of<Mma>(shared)) % alignof(Table) == 0, "fits");
    const Layout images = Layout::packed({problem.N, problem.H, problem.W, problem.C});
    const Layout taps = Layout::packed({problem.K, problem.R, problem.S, problem.C});
    Table& table = *reinterpret_cast<Table*>(shared + sizeof(stages_of<Mma>(shared)));
    if (thread() == 0) table = Mma::IteratorA::getParams(problem, images);
    barrier();
    const typename Mma::IteratorB::Params params_b(problem, taps);
    auto* const a = reinterpret_cast<const CutlassHalf*>(input);
    auto* const b = reinterpret_cast<const CutlassHalf*>(weights);
    const typename Mma::IteratorA from_a(table, problem, a, thread(), {down, 0});
    const typename Mma::IteratorB from_b(params_b, problem, b, thread(), {0, across});
    Mma mma(stages_of<Mma>(shared), thread(), uniform_warp(), lane());
    const int parts = (problem.C + Mma::Shape::kK - 1) / Mma::Shape::kK;
    mma(problem.R * problem.S * parts, sums, from_a, from_b, sums);
}

// How a block's sums lie: warps stand first along the places, then along the filters, and so do the fragments of 16 × 8
// of a warp, as mma.sync has them.
template <class Mma>
struct Sums {
    using Warp = typename Mma::Operator::Shape;
    using Warps = typename Mma::Base::WarpCount;
    static constexpr int rows = Warps::kM * 16, columns = Mma::Shape::kN, threads = 32 * Warps::kM * Warps::kN;
    static constexpr int heights = Warp::kM / 16, widths = Warp::kN / 8;
    static_assert(Mma::FragmentC::kElements == 4 * heights * widths && Warps::kK == 1, "whole tiles");

    // Of this thread's first number of each tile of 8 filters.
    static BOLT_DEVICE int column(int tile) { return uniform_warp() / Warps::kM * Warp::kN + 8 * tile + lane() % 4 * 2; }
    static constexpr int at(int i, int tile) { return 4 * (tile * heights + i); }
};

// Sums are the bias at first.
template <class Mma>
BOLT_DEVICE void begin(typename Mma::FragmentC& sums, const float* bias) {
    using All = Sums<Mma>;
    BOLT_UNROLL
    for (int tile = 0; tile < All::widths; ++tile) {
        const float* const from = bias + All::column(tile);
        const float even = load_global(from), odd = load_global(from + 1);
        BOLT_UNROLL
        for (int i = 0; i < All::heights; ++i) {
            const int at = All::at(i, tile);
            sums[at] = even, sums[at + 1] = odd, sums[at + 2] = even, sums[at + 3] = odd;
        }
    }
}

struct alignas(8) Two {
    float of[2];
};
struct alignas(16) Four {
    float of[4];
};

// Sums on their way out, 16 places of each warp at a time, through shared memory: there threads take four neighbouring
// filters each, so that neighbours load and store neighbours, and few registers are needed. `step(four, filter, more)`
// does what follows the bias, `more` being what is added: four halves of `added`, of the output's shape, or null.
template <class Mma, bool adds, class Step>
BOLT_DEVICE void finish(const typename Mma::FragmentC& sums, unsigned char* shared, const half* added, half* output,
                        int places, int filters, int down, int across, const Step& step) {
    using All = Sums<Mma>;
    constexpr int line = All::columns + 8;  // floats; rows of a fragment are in different banks
    constexpr int each = All::widths, together = adds ? 4 : 1;  // fours of a thread, and those that are loaded at once
    static_assert(each % together == 0, "whole turns");
    float* const floats = reinterpret_cast<float*>(shared);
    BOLT_UNROLL
    for (int i = 0; i < All::heights; ++i) {
        if (i > 0) barrier();
        BOLT_UNROLL
        for (int tile = 0; tile < All::widths; ++tile) {
            BOLT_UNROLL
            for (int side = 0; side < 2; ++side) {
                const int row = uniform_warp() % All::Warps::kM * 16 + 8 * side + lane() / 4;
                const int at = All::at(i, tile) + 2 * side;
                *reinterpret_cast<Two*>(floats + row * line + All::column(tile)) = Two{{sums[at], sums[at + 1]}};
            }
        }
        barrier();
        BOLT_LOOP
        for (int turn = 0; turn < each; turn += together) {
            int64_t where[together];
            Words2 more[together];
            BOLT_UNROLL
            for (int k = 0; k < together; ++k) {
                const int number = thread() + (turn + k) * All::threads;
                const int row = number / (All::columns / 4), filter = across + number % (All::columns / 4) * 4;
                const int place = down + row / 16 * All::Warp::kM + 16 * i + row % 16;
                where[k] = place < places && filter < filters ? int64_t(place) * filters + filter : -1;
                if constexpr (adds)
                    if (where[k] >= 0) more[k] = load_global(reinterpret_cast<const Words2*>(added + where[k]));
            }
            BOLT_UNROLL
            for (int k = 0; k < together; ++k) {
                if (where[k] < 0) continue;
                const int number = thread() + (turn + k) * All::threads;
                const int row = number / (All::columns / 4), column = number % (All::columns / 4) * 4;
                Four four = *reinterpret_cast<const Four*>(floats + row * line + column);
                step(four.of, across + column, more[k]);
                const Words2 both{pack(four.of[0], four.of[1]), pack(four.of[2], four.of[3])};
                *reinterpret_cast<Words2*>(output + where[k]) = both;
            }
        }
    }
}

}  // namespace bolt
