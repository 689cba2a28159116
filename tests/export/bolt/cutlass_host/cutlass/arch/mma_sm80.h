// For the CPU, in the place of CUTLASS's file of this name: see memory_sm75.h.
#pragma once

#include <cstring>

#include "cutlass/arch/mma.h"
#include "cutlass/gemm/gemm.h"

namespace cutlass::arch {

template <>
struct Mma<gemm::GemmShape<16, 8, 16>, 32, half_t, layout::RowMajor, half_t, layout::ColumnMajor, float,
           layout::RowMajor, OpMultiplyAdd> {
    using Shape = gemm::GemmShape<16, 8, 16>;
    using ElementA = half_t;
    using LayoutA = layout::RowMajor;
    using FragmentA = Array<half_t, 8>;
    using ElementB = half_t;
    using LayoutB = layout::ColumnMajor;
    using FragmentB = Array<half_t, 4>;
    using ElementC = float;
    using LayoutC = layout::RowMajor;
    using FragmentC = Array<float, 4>;
    using Operator = OpMultiplyAdd;
    using ArchTag = arch::Sm80;

    void operator()(FragmentC& d, const FragmentA& a, const FragmentB& b, const FragmentC& c) const {
        uint32_t words_a[4], words_b[2];
        float sums[4];
        std::memcpy(words_a, &a, sizeof words_a);
        std::memcpy(words_b, &b, sizeof words_b);
        std::memcpy(sums, &c, sizeof sums);
        bolt::host::multiply(sums, words_a, words_b[0], words_b[1]);
        std::memcpy(&d, sums, sizeof sums);
    }
};

}  // namespace cutlass::arch
