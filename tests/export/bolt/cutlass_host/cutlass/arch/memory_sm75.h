// For the CPU, in the place of CUTLASS's file of this name: what it writes as PTX is done by machine.hpp. Only what the
// kernels of templates/cutlass.py use is here.
#pragma once

#include "cutlass/array.h"
#include "cutlass/cutlass.h"
#include "cutlass/layout/matrix.h"

namespace cutlass::arch {

template <class Layout, int count>
inline void ldsm(Array<unsigned, count>& to, const void* row) {
    static_assert(count == 4, "matrices come by fours");
    uint32_t words[4];
    bolt::host::load_matrix(words, row, platform::is_same<Layout, layout::ColumnMajor>::value);
    for (int i = 0; i < 4; ++i) to[i] = words[i];
}

}  // namespace cutlass::arch
