// A chain of convolutions in one kernel: a block walks down a strip of an image, a few rows a step.
//
// Each layer's newest rows are kept in a ring in shared memory. In a step every layer, one after the other, computes as
// many rows as all others, of a row number that lags behind its input by its kernel's reach. What a kernel reads beside
// the strip is computed by the neighbour again: only that, and the rows that fill the rings, are computed twice.

namespace bolt {

BOLT_DEVICE int wrapped(int position, int rows) {
    return position < 0 ? position + rows : position >= rows ? position - rows : position;
}

// Rows of one value. Pixels are `channels` halves, in chunks of 8, the unit of matrix loads; chunks of neighbouring
// pixels change places, so that 8 pixels' equal chunks lie in 8 different groups of banks, wherever the first one is.
template <int channels_, int rows_, int columns_>
struct Ring {
    static constexpr int channels = channels_, rows = rows_, columns = columns_, chunks = channels / 8;
    static constexpr int cycle = chunks % 8 == 0 ? 8 : chunks % 4 == 0 ? 4 : chunks % 2 == 0 ? 2 : 1;
    static constexpr int pixels_in_all_banks = 8 / cycle;
    half* data;

    // Of a pixel's chunk within its row, in halves.
    BOLT_DEVICE static int place(int column, int chunk) {
        return (column * chunks + (chunk ^ ((column / pixels_in_all_banks) & (cycle - 1)))) * 8;
    }
    BOLT_DEVICE half* row(int slot) const { return data + slot * (columns * channels); }
};

// Adds to sums[row][segment][tile] what a kernel's taps see: segments are 16 pixels, tiles 8 filters.
//
// Fragments of inputs are loaded once for each horizontal tap and used for all vertical taps, and for that those taps'
// weights wait in registers. `slot` is of the first row that is read, `column` of the first pixel's leftmost tap. From a
// row of sums to the next it goes `down` rows down.
template <int height, int width, int down, int rows, int segments, int tiles, class Source>
BOLT_DEVICE void sweep(float (&sums)[rows][segments][tiles][4], const Source& source, int slot, int column,
                       const Words2* weights) {
    constexpr int steps = Source::channels / 16;
    const int pixel = column + (lane() & 15), side = lane() >> 4;
    BOLT_LOOP
    for (int dx = 0; dx < width; ++dx) {
        BOLT_LOOP
        for (int step = 0; step < steps; ++step) {
            Words2 b[height][tiles];
            BOLT_UNROLL
            for (int dy = 0; dy < height; ++dy) {
                BOLT_UNROLL
                for (int tile = 0; tile < tiles; ++tile)
                    b[dy][tile] = weights[(((dx * steps + step) * height + dy) * tiles + tile) * 32 + lane()];
            }
            int places[segments];
            BOLT_UNROLL
            for (int segment = 0; segment < segments; ++segment)
                places[segment] = Source::place(pixel + 16 * segment + dx, 2 * step + side);
            BOLT_UNROLL
            for (int read = 0; read < down * (rows - 1) + height; ++read) {
                const half* line = source.row(wrapped(slot + read, Source::rows));
                BOLT_UNROLL
                for (int segment = 0; segment < segments; ++segment) {
                    uint32_t a[4];
                    load_matrix(a, line + places[segment]);
                    BOLT_UNROLL
                    for (int dy = 0; dy < height; ++dy) {
                        const int row = (read - dy) / down;
                        if (read >= dy && (read - dy) % down == 0 && row < rows) {
                            BOLT_UNROLL
                            for (int tile = 0; tile < tiles; ++tile)
                                multiply(sums[row][segment][tile], a, b[dy][tile].x, b[dy][tile].y);
                        }
                    }
                }
            }
        }
    }
}

// The same for a first layer of so few channels that all its taps, side by side, are the matrix' inner axis: fragments
// are gathered number by number. `taps[k]` is where the lane's k-th number lies behind a pixel's first one.
template <int steps, int rows, int segments, int tiles>
BOLT_DEVICE void gather(float (&sums)[rows][segments][tiles][4], const half* raw, int line, int pixel_size, int column,
                        const int (&taps)[4 * steps], const Words2* weights) {
    const int first = column + (lane() >> 2);
    BOLT_UNROLL
    for (int step = 0; step < steps; ++step) {
        Words2 b[tiles];
        BOLT_UNROLL
        for (int tile = 0; tile < tiles; ++tile) b[tile] = weights[(step * tiles + tile) * 32 + lane()];
        BOLT_UNROLL
        for (int row = 0; row < rows; ++row) {
            BOLT_UNROLL
            for (int segment = 0; segment < segments; ++segment) {
                const half* here = raw + row * line + (first + 16 * segment) * pixel_size;
                const half* there = here + 8 * pixel_size;
                const int* k = taps + 4 * step;
                const uint32_t a[4] = {join(here[k[0]], here[k[1]]), join(there[k[0]], there[k[1]]),
                                       join(here[k[2]], here[k[3]]), join(there[k[2]], there[k[3]])};
                BOLT_UNROLL
                for (int tile = 0; tile < tiles; ++tile) multiply(sums[row][segment][tile], a, b[tile].x, b[tile].y);
            }
        }
    }
}

// Sums begin as the bias of their filters.
template <int rows, int segments, int tiles>
BOLT_DEVICE void begin(float (&sums)[rows][segments][tiles][4], const float* bias) {
    BOLT_UNROLL
    for (int tile = 0; tile < tiles; ++tile) {
        const int filter = 8 * tile + 2 * (lane() & 3);
        const float even = load_global(bias + filter), odd = load_global(bias + filter + 1);
        BOLT_UNROLL
        for (int row = 0; row < rows; ++row) {
            BOLT_UNROLL
            for (int segment = 0; segment < segments; ++segment) {
                float(&one)[4] = sums[row][segment][tile];
                one[0] = even, one[1] = odd, one[2] = even, one[3] = odd;
            }
        }
    }
}

}  // namespace bolt
