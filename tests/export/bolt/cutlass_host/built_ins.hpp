// For the CPU: CUDA's built-ins that CUTLASS uses. Some stand in functions that kernels of templates/cutlass.py do not
// call, and only have to be there.
#pragma once

#include "machine.hpp"

inline void __syncthreads() { bolt::host::barrier(); }
inline int min(int a, int b) { return a < b ? a : b; }

int __syncthreads_and(int);
static const struct {
    int x, y, z;
} threadIdx{}, blockIdx{}, blockDim{}, gridDim{};
namespace cutlass::arch {
int LaneId();
unsigned cutlass_get_smem_pointer(const void*);
}  // namespace cutlass::arch
