// The only place where kernels touch PTX and CUDA's built-ins. There are two bodies of each primitive: for the device
// (NVRTC or nvcc, sm_80 and later) and, with BOLT_HOST, for the CPU (g++), where each CUDA thread is a fiber. A kernel
// that uses nothing else can be tested thread by thread without a GPU. Kernels have blocks of one dimension, of whole
// warps, and dynamic shared memory only.
#ifndef BOLT_PRIMITIVES
#define BOLT_PRIMITIVES

#ifdef BOLT_HOST
#include "machine.hpp"  // fibers, rendezvous, shared memory and checks
#else
#include <cuda_fp16.h>
#ifndef __CUDACC_RTC__
#include <stdint.h>
#endif
#endif

namespace bolt {

#ifdef BOLT_HOST

#define BOLT_KERNEL(threads, blocks) extern "C" void
#define BOLT_CLUSTER(blocks)
#define BOLT_DEVICE inline
#define BOLT_UNROLL
#define BOLT_LOOP
#define BOLT_SHARED(name) unsigned char* const name = ::bolt::host::shared()

using std::int32_t, std::int64_t, std::uint16_t, std::uint32_t, std::uint64_t, std::uint8_t;
using half = _Float16;

#else

#define BOLT_KERNEL(threads, blocks) extern "C" __global__ void __launch_bounds__(threads, blocks)
#define BOLT_CLUSTER(blocks) __cluster_dims__(blocks, 1, 1)
#define BOLT_DEVICE __device__ __forceinline__
#define BOLT_UNROLL _Pragma("unroll")
#define BOLT_LOOP _Pragma("unroll 1")
#define BOLT_SHARED(name)                                             \
    extern __shared__ __align__(1024) unsigned char bolt_shared[]; \
    unsigned char* const name = bolt_shared

#ifdef __CUDACC_RTC__
using uint8_t = unsigned char;
using uint16_t = unsigned short;
using uint32_t = unsigned int;
using uint64_t = unsigned long long;
using int32_t = int;
using int64_t = long long;
#else
using ::int32_t, ::int64_t, ::uint16_t, ::uint32_t, ::uint64_t, ::uint8_t;
#endif
using half = ::__half;

#endif

struct alignas(16) Words {
    uint32_t x, y, z, w;
};
struct alignas(8) Words2 {
    uint32_t x, y;
};

// Where this thread is.

#ifdef BOLT_HOST

inline int thread() { return host::place.thread; }
inline int block_x() { return host::place.block[0]; }
inline int block_y() { return host::place.block[1]; }
inline int block_z() { return host::place.block[2]; }
inline int grid_x() { return host::place.grid[0]; }
inline int grid_y() { return host::place.grid[1]; }
inline int grid_z() { return host::place.grid[2]; }

#else

BOLT_DEVICE int thread() { return int(threadIdx.x); }
BOLT_DEVICE int block_x() { return int(blockIdx.x); }
BOLT_DEVICE int block_y() { return int(blockIdx.y); }
BOLT_DEVICE int block_z() { return int(blockIdx.z); }
BOLT_DEVICE int grid_x() { return int(gridDim.x); }
BOLT_DEVICE int grid_y() { return int(gridDim.y); }
BOLT_DEVICE int grid_z() { return int(gridDim.z); }

#endif

BOLT_DEVICE int lane() { return thread() % 32; }
BOLT_DEVICE int warp() { return thread() / 32; }

// Rendezvous: of all threads of the block, of all lanes of the warp.

#ifdef BOLT_HOST

inline void barrier() { host::barrier(); }
inline void warp_barrier() { host::warp_barrier(); }

#else

BOLT_DEVICE void barrier() { __syncthreads(); }
BOLT_DEVICE void warp_barrier() { __syncwarp(); }

#endif

// Numbers. `pack` makes two halves of two floats, rounded to nearest, ties to even, and `join` of two halves; `low`
// is the one at the lower address.

#ifdef BOLT_HOST

inline half to_half(float x) { return half(x); }
inline float to_float(half x) { return float(x); }
inline uint32_t pack(float low, float high) {
    return std::bit_cast<uint16_t>(half(low)) | uint32_t(std::bit_cast<uint16_t>(half(high))) << 16;
}
inline uint32_t join(half low, half high) {
    return std::bit_cast<uint16_t>(low) | uint32_t(std::bit_cast<uint16_t>(high)) << 16;
}
inline float low(uint32_t both) { return float(std::bit_cast<half>(uint16_t(both))); }
inline float high(uint32_t both) { return float(std::bit_cast<half>(uint16_t(both >> 16))); }

inline float fast_exp(float x) { return __builtin_expf(x); }
inline float fast_tanh(float x) { return __builtin_tanhf(x); }
inline float absolute(float x) { return __builtin_fabsf(x); }
inline float fast_reciprocal(float x) { return 1.0f / x; }
inline float fast_log1p(float x) { return __builtin_log1pf(x); }

#else

BOLT_DEVICE half to_half(float x) { return __float2half_rn(x); }
BOLT_DEVICE float to_float(half x) { return __half2float(x); }
BOLT_DEVICE uint32_t pack(float low, float high) {
    uint32_t both;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(high), "f"(low));  // the upper half comes first
    return both;
}
BOLT_DEVICE uint32_t join(half low, half high) {
    return __half_as_ushort(low) | uint32_t(__half_as_ushort(high)) << 16;
}
BOLT_DEVICE float low(uint32_t both) {
    float x;
    asm("{ .reg .f16 a, b; mov.b32 {a, b}, %1; cvt.f32.f16 %0, a; }" : "=f"(x) : "r"(both));
    return x;
}
BOLT_DEVICE float high(uint32_t both) {
    float x;
    asm("{ .reg .f16 a, b; mov.b32 {a, b}, %1; cvt.f32.f16 %0, b; }" : "=f"(x) : "r"(both));
    return x;
}

BOLT_DEVICE float absolute(float x) { return fabsf(x); }
// To a few units of the last place of a float, which is much better than the halves that are written.
BOLT_DEVICE float fast_exp(float x) { return __expf(x); }
BOLT_DEVICE float fast_reciprocal(float x) {
    float y;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}
BOLT_DEVICE float fast_tanh(float x) { return tanhf(x); }
BOLT_DEVICE float fast_log1p(float x) { return log1pf(x); }

#endif

// Products of matrices. A fragment is spread over the warp; with g = lane / 4 and t = lane % 4, and the lower half
// first, lane holds
//     a[0] (g, 2t), (g, 2t+1)    a[1] (g+8, 2t), …    a[2] (g, 2t+8), …    a[3] (g+8, 2t+8), …     of A, 16 × 16
//     b0   (2t, g), (2t+1, g)    b1   (2t+8, g), …                                                of B, 16 × 8
//     d[0] (g, 2t)   d[1] (g, 2t+1)   d[2] (g+8, 2t)   d[3] (g+8, 2t+1)                           of D, 16 × 8
// `load_matrix` loads four matrices of 8 × 8 halves: lane i gives the address of row i % 8 of matrix i / 8, 16 bytes
// at a multiple of 16 in shared memory. r[m] are elements (g, 2t) and (g, 2t+1) of matrix m; transposed, (2t, g) and
// (2t+1, g). So A in rows is loaded plainly, and B in rows (k, n) transposed.

#ifdef BOLT_HOST

inline void load_matrix(uint32_t (&r)[4], const half* row) { host::load_matrix(r, row, false); }
inline void load_matrix_transposed(uint32_t (&r)[4], const half* row) { host::load_matrix(r, row, true); }
inline void multiply(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) { host::multiply(d, a, b0, b1); }

#else

BOLT_DEVICE uint32_t shared_address(const void* pointer) { return uint32_t(__cvta_generic_to_shared(pointer)); }

BOLT_DEVICE void load_matrix(uint32_t (&r)[4], const half* row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(shared_address(row))
                 : "memory");
}
BOLT_DEVICE void load_matrix_transposed(uint32_t (&r)[4], const half* row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(shared_address(row))
                 : "memory");
}
BOLT_DEVICE void multiply(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

#endif

// Copies of 16 bytes from global to shared memory, both at multiples of 16, that go on beside the computing; zeros are
// written where there is nothing to copy, and `global` is not read. `copy_commit` closes a group of this thread's
// copies, and `copy_wait` waits until all but the latest `left` groups have arrived: for this thread. Others see them
// behind a barrier. `copy_async_again` is for what this block soon copies again: it stays in the L1 cache.

#ifdef BOLT_HOST

inline void copy_async(void* shared, const void* global, bool there) { host::copy_async(shared, global, there); }
inline void copy_async_again(void* shared, const void* global, bool there) { host::copy_async(shared, global, there); }
inline void copy_commit() { host::copy_commit(); }
template <int left>
inline void copy_wait() {
    host::copy_wait(left);
}

#else

BOLT_DEVICE void copy_async(void* shared, const void* global, bool there) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;"
                 :
                 : "r"(shared_address(shared)), "l"(__cvta_generic_to_global(global)), "r"(there ? 16 : 0)
                 : "memory");
}
BOLT_DEVICE void copy_async_again(void* shared, const void* global, bool there) {
    asm volatile("cp.async.ca.shared.global [%0], [%1], 16, %2;"
                 :
                 : "r"(shared_address(shared)), "l"(__cvta_generic_to_global(global)), "r"(there ? 16 : 0)
                 : "memory");
}
BOLT_DEVICE void copy_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int left>
BOLT_DEVICE void copy_wait() {
    asm volatile("cp.async.wait_group %0;" ::"n"(left) : "memory");
}

#endif

// Products of a warpgroup, which is four warps one behind the other: on sm_90a only. Matrices lie in shared memory in
// rows of 64 halves of the inner axis, 8 rows a kilobyte, which begins at a multiple of that; chunks of 8 halves of row r
// change places, c for c ^ (r % 8). B's rows are its filters. `matrix_in_shared` describes such a matrix; with `after`
// added, one that begins so many bytes later, a multiple of 16: another step of 16 along the inner axis is 32, another 8
// rows 1024. The warpgroup's first 64 rows of A times all of B's `8 * tiles` filters are added to sums, which each warp
// has as `multiply` leaves them, of 16 rows, warp by warp. A may be in registers too, each warp's 16 rows as `multiply`
// takes them.
//
// `publish_copies`, then a barrier, lets products see what `copy_async` brought, of which `copy_wait` has told.
// `group_fence` lets products use sums that this thread has written. `group_commit` closes a group of products, and
// `group_wait` waits until all but the latest `left` groups are done: before that nobody may touch their sums, nor write
// to what they read.

#ifdef BOLT_HOST

inline uint64_t after(int bytes) { return uint64_t(bytes / 16); }
inline uint64_t matrix_in_shared(const void* rows) {
    return host::matrix_in_shared(rows, uint64_t(1024 / 16) << 32 | uint64_t(1) << 16 | uint64_t(1) << 62);
}
inline void publish_copies() { host::publish_copies(); }
inline void group_fence() {}
template <int tiles>
inline void multiply_group(float (&sums)[tiles][4], uint64_t a, uint64_t b) {
    host::multiply_group(sums, tiles, a, b);
}
template <int tiles>
inline void multiply_group(float (&sums)[tiles][4], const uint32_t (&a)[4], uint64_t b) {
    host::multiply_group(sums, tiles, a, b);
}
inline void group_commit() { host::group_commit(); }
template <int left>
inline void group_wait() {
    host::group_wait(left);
}

#else

BOLT_DEVICE uint64_t after(int bytes) { return uint64_t(bytes / 16); }
BOLT_DEVICE uint64_t matrix_in_shared(const void* rows) {
    return uint64_t(shared_address(rows) / 16 & 0x3fff) | uint64_t(1024 / 16) << 32 | uint64_t(1) << 16 |
           uint64_t(1) << 62;
}
BOLT_DEVICE void publish_copies() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }
BOLT_DEVICE void group_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
template <int tiles>
BOLT_DEVICE void multiply_group(float (&sums)[tiles][4], uint64_t a, uint64_t b);  // by templates/warpgroup.py
template <int tiles>
BOLT_DEVICE void multiply_group(float (&sums)[tiles][4], const uint32_t (&a)[4], uint64_t b);
BOLT_DEVICE void group_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int left>
BOLT_DEVICE void group_wait() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(left) : "memory");
}

#endif

// Copies of a block, or of the blocks of a cluster (BOLT_CLUSTER) that have each asked for the same bytes, on sm_90 and
// later: each block of a cluster fetches a share and gives it to all. One thread of each block calls `copy_bulk`, for the
// same place in shared memory and the same arrival, which counts that call and what comes. `arrival_signal` counts once
// at an arrival of each block of the cluster. `arrival_wait` waits for the end of an arrival's phase, when all has come
// that it counts; phases are numbered from 0 on and told by their parity. Products see then what was copied. It gives up
// after a second, and says so: a mistake must not stop a GPU. Arrivals begin in one thread, followed by
// `arrivals_visible`, and `cluster_barrier` by all threads; another one stands before a block ends. On the CPU a cluster
// has one block, as `cluster_blocks` says.

#ifdef BOLT_HOST

using Arrival = uint64_t;

constexpr int cluster_blocks(int) { return 1; }  // whatever a kernel asks for
inline void cluster_barrier() { host::barrier(); }
inline void arrival_begin(Arrival* arrival, int count) { host::arrival_begin(arrival, count); }
inline void arrivals_visible() {}
template <int blocks, int bytes>
inline void copy_bulk(void* shared, const void* global, Arrival* arrival) {
    host::copy_bulk(shared, global, bytes, arrival);
}
template <int blocks>
inline void arrival_signal(Arrival* arrival) {
    host::arrival_signal(arrival);
}
inline bool arrival_wait(Arrival* arrival, int parity) { return host::arrival_wait(arrival, parity); }

#else

using Arrival = uint64_t;

constexpr int cluster_blocks(int asked) { return asked; }
BOLT_DEVICE void cluster_barrier() {
    asm volatile("barrier.cluster.arrive.release.aligned; barrier.cluster.wait.acquire.aligned;" ::: "memory");
}
BOLT_DEVICE void arrival_begin(Arrival* arrival, int count) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(arrival)), "r"(count) : "memory");
}
BOLT_DEVICE void arrivals_visible() {
    asm volatile("fence.mbarrier_init.release.cluster; fence.proxy.async.shared::cta;" ::: "memory");
}
template <int blocks, int bytes>
BOLT_DEVICE void copy_bulk(void* shared, const void* global, Arrival* arrival) {
    static_assert(blocks > 1, "a block alone copies by copy_async");
    constexpr uint32_t share = bytes / blocks;
    static_assert(share % 16 == 0, "shares are whole chunks");
    const uint32_t at = shared_address(arrival);
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(at), "r"(uint32_t(bytes)) : "memory");
    uint32_t own;
    asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(own));
    const uint32_t to = shared_address(shared) + own * share;
    const uint64_t from = uint64_t(__cvta_generic_to_global(global)) + own * share;
    asm volatile(
        "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster [%0], [%1], %2, [%3], %4;"
        :
        : "r"(to), "l"(from), "r"(share), "r"(at), "h"(uint16_t((1 << blocks) - 1))
        : "memory");
}
template <int blocks>
BOLT_DEVICE void arrival_signal(Arrival* arrival) {
    BOLT_UNROLL
    for (int block = 0; block < blocks; ++block)
        asm volatile(
            "{ .reg .b32 there; mapa.shared::cluster.u32 there, %0, %1; "
            "mbarrier.arrive.release.cluster.shared::cluster.b64 _, [there]; }"
            :
            : "r"(shared_address(arrival)), "r"(block)
            : "memory");
}
BOLT_DEVICE uint64_t nanoseconds() {
    uint64_t now;
    asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(now));
    return now;
}
BOLT_DEVICE bool arrival_wait(Arrival* arrival, int parity) {
    const uint64_t start = nanoseconds();
    BOLT_LOOP
    while (nanoseconds() - start < 1000000000) {
        uint32_t over;
        asm volatile(
            "{ .reg .pred p; mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2; selp.u32 %0, 1, 0, p; }"
            : "=r"(over)
            : "r"(shared_address(arrival)), "r"(parity)
            : "memory");
        if (over) return true;
    }
    return false;
}

#endif

// Exchanges between the lanes of a warp, all of which take part. `shuffle_down` gives the value of lane + by, and
// this lane's own where there is none.

#ifdef BOLT_HOST

inline float shuffle_xor(float x, int mask) { return host::shuffle(x, host::place.thread % 32 ^ mask); }
inline float shuffle_down(float x, int by) { return host::shuffle(x, host::place.thread % 32 + by); }

#else

BOLT_DEVICE float shuffle_xor(float x, int mask) { return __shfl_xor_sync(0xffffffffu, x, mask); }
BOLT_DEVICE float shuffle_down(float x, int by) { return __shfl_down_sync(0xffffffffu, x, by); }

#endif

// A load of global memory that nothing writes while the kernel runs: of 2, 4, 8 or 16 bytes, at a multiple of these.

template <class T>
BOLT_DEVICE T load_global(const T* from) {
    static_assert(sizeof(T) == 2 || sizeof(T) == 4 || sizeof(T) == 8 || sizeof(T) == 16, "2, 4, 8 or 16 bytes");
#ifdef BOLT_HOST
    host::check_global(from, sizeof(T));
    return *from;
#else
    union Both {
        T value;
        unsigned short two;
        unsigned int four;
        uint2 eight;
        uint4 sixteen;
        __device__ Both() {}
    } both;
    if constexpr (sizeof(T) == 2) both.two = __ldg(reinterpret_cast<const unsigned short*>(from));
    if constexpr (sizeof(T) == 4) both.four = __ldg(reinterpret_cast<const unsigned int*>(from));
    if constexpr (sizeof(T) == 8) both.eight = __ldg(reinterpret_cast<const uint2*>(from));
    if constexpr (sizeof(T) == 16) both.sixteen = __ldg(reinterpret_cast<const uint4*>(from));
    return both.value;
#endif
}

}  // namespace bolt

#endif  // BOLT_PRIMITIVES
