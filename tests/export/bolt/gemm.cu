// D = A B, of halves, added up in float; behind primitives.cuh. A is (m, k), B (k, n), D (m, n), in rows; k and n are
// multiples of 8. A block of four warps makes 64 × 64 of D, and reads the next 16 of k while it multiplies these.
using namespace bolt;

constexpr int stride_a = 16 + 8, stride_b = 64 + 8;  // rows of a matrix then lie in different banks
constexpr int tile_a = 64 * stride_a, tile_b = 16 * stride_b;

BOLT_DEVICE void fetch(half* tile, const half* a, const half* b, int row, int column, int at, int m, int n, int k) {
    const int i = thread() / 2, j = thread() % 2 * 8;
    const bool there = row + i < m && at + j < k;
    copy_async(tile + i * stride_a + j, there ? a + (row + i) * k + at + j : a, there);
    const int p = thread() / 8, q = thread() % 8 * 8;
    const bool here = at + p < k && column + q < n;
    copy_async(tile + tile_a + p * stride_b + q, here ? b + (at + p) * n + column + q : b, here);
    copy_commit();
}

BOLT_KERNEL(128, 2) gemm(const half* a, const half* b, float* d, int m, int n, int k) {
    BOLT_SHARED(shared);
    half* const tiles = reinterpret_cast<half*>(shared);
    const int row = block_y() * 64, column = block_x() * 64;
    const int down = warp() / 2 * 32, right = warp() % 2 * 32;  // 32 × 32 of these are a warp's
    float sums[2][4][4] = {};
    fetch(tiles, a, b, row, column, 0, m, n, k);
    for (int at = 0, turn = 0; at < k; at += 16, turn ^= 1) {
        fetch(tiles + (turn ^ 1) * (tile_a + tile_b), a, b, row, column, at + 16, m, n, k);
        copy_wait<1>();
        barrier();  // all have arrived
        const half* const left = tiles + turn * (tile_a + tile_b);
        const half* const upper = left + tile_a;
        uint32_t x[2][4], y[2][4];
        BOLT_UNROLL
        for (int i = 0; i < 2; ++i) {
            load_matrix(x[i], left + (down + i * 16 + lane() % 16) * stride_a + lane() / 16 * 8);
            load_matrix_transposed(y[i], upper + lane() % 16 * stride_b + right + i * 16 + lane() / 16 * 8);
        }
        BOLT_UNROLL
        for (int i = 0; i < 2; ++i)
            BOLT_UNROLL
            for (int j = 0; j < 4; ++j) multiply(sums[i][j], x[i], y[j / 2][j % 2 * 2], y[j / 2][j % 2 * 2 + 1]);
        barrier();  // all are read
    }
    BOLT_UNROLL
    for (int i = 0; i < 2; ++i)
        BOLT_UNROLL
        for (int j = 0; j < 4; ++j)
            BOLT_UNROLL
            for (int e = 0; e < 4; ++e) {
                const int y = row + down + i * 16 + lane() / 4 + e / 2 * 8;
                const int x = column + right + j * 8 + lane() % 4 * 2 + e % 2;
                if (y < m && x < n) d[y * n + x] = sums[i][j][e];
            }
}
