// For the CPU, in the place of CUTLASS's file of this name: see memory_sm75.h.
#pragma once

#include "cutlass/arch/cache_operation.h"
#include "cutlass/cutlass.h"

namespace cutlass::arch {

template <int bytes, CacheOperation::Kind = CacheOperation::Always>
struct cp_async_zfill {
    static_assert(bytes == 16, "copies are of 16 bytes");
    cp_async_zfill(void* shared, const void* global, bool there) { bolt::host::copy_async(shared, global, there); }
};

// Without a copy what was there stays, which no lane may read.
template <int bytes, CacheOperation::Kind = CacheOperation::Always>
struct cp_async {
    static_assert(bytes == 16, "copies are of 16 bytes");
    cp_async(void* shared, const void* global, bool there = true) {
        if (there) bolt::host::copy_async(shared, global, true);
    }
};

template <int bytes, CacheOperation::Kind = CacheOperation::Always>
struct cp_async_nan;  // other main loops' alone

inline void cp_async_fence() { bolt::host::copy_commit(); }

template <int left>
inline void cp_async_wait() {
    bolt::host::copy_wait(left);
}

}  // namespace cutlass::arch
