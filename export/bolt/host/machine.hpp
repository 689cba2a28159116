// Runs a kernel on the CPU: every thread of a block is a fiber with a stack of its own. What kernels see of it are the
// primitives (primitives.cuh), which call the functions here.
//
// Threads run warp by warp: a warp drawn at random runs until all of its lanes wait at a barrier of the block, so that
// warps drift as far apart as the barriers let them, and a missing barrier shows for most seeds. Within a warp a lane
// runs until it comes to an instruction of the whole warp; there it leaves its operands, and the lane that comes last
// computes for all.
#pragma once

#include <csetjmp>
#include <csignal>
#include <pthread.h>
#include <sys/mman.h>
#include <ucontext.h>
#include <unistd.h>

#include <bit>
#include <cstdarg>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <type_traits>
#include <utility>
#include <vector>

#ifndef __FLT16_MAX__
#error "no _Float16: g++ 12 or later is needed"
#endif

namespace bolt::host {

// ----------------------------------------------------------------------------------------------- what the caller gives

enum class Kind : int32_t { array, integer, real };

struct Argument {
    Kind kind;
    int32_t writable;
    int64_t integer;
    double real;
    unsigned char* data;
    int64_t bytes;
};

struct Request {
    const Argument* arguments;
    int32_t count;
    int32_t threads;
    int32_t grid[3];
    int32_t shared_bytes;
    uint64_t seed;
    // What is found:
    int64_t products;       // calls of multiply, of a warp each
    int64_t loads;          // calls of load_matrix
    int64_t load_passes;    // passes through the 32 banks that these need; without conflicts 4 each
    char message[512];
};

// --------------------------------------------------------------------------------------------------------------- state

struct Place {
    int thread;
    int block[3];
    int grid[3];
};

enum class State { ready, at_warp, at_block, ended };
enum class Meeting { barrier, load, load_transposed, product, shuffle, group, group_of_registers };
static const char* const names[] = {"warp_barrier", "load_matrix", "load_matrix_transposed",
                                    "multiply",     "shuffle",     "multiply_group", "multiply_group"};

struct Copy {
    unsigned char* shared;
    const unsigned char* global;  // null: zeros
    int group;
};

// A copy that a block announces bytes of at an `Arrival`, and whoever waits there lands it.
struct BulkCopy {
    unsigned char* shared;
    const unsigned char* global;
    size_t bytes;
    const void* arrival;
};

struct Arrivals {
    const void* at;
    int count, counted;  // of one phase
    size_t bytes;
    int phases;  // that are over
};

// A product of a warpgroup, that has not been waited for.
struct Product {
    float (*sums)[4];
    int tiles;
    uint64_t a, b;
    bool in_registers;
    float rows[2][16];  // of A, as registers had them
    int group;
};

struct Fiber {
    ucontext_t start;
    jmp_buf context;
    bool started;
    State state;
    std::vector<Copy> copies;  // that have not arrived
    int group;                 // the one that is open
    std::vector<size_t> landed;  // where copies have arrived that were not published
    std::vector<Product> products;
    int products_group;
};

struct Warp {
    int arrived;
    Meeting meeting;
    union Operand {
        const unsigned char* row;
        uint32_t words[10];
        struct {
            float value;
            int from;
        } shuffle;
    } given[32];
    uint32_t found[32][4];
    float rows[32][2][16];
};

// Memory between two guards that nobody may touch, so that what goes beyond it is seen; what lies between a guard and
// an end (less than a page) is filled, and looked at afterwards.
struct Region {
    unsigned char *mapped, *begin;
    size_t mapped_bytes, bytes;
    int argument;  // its number; -1: shared memory; -2: stacks
    bool writable;
};

constexpr size_t stack_bytes = 65536;
constexpr size_t guard_bytes = 1 << 20;  // whole pages
constexpr int filling = 0xfe;  // NaN, as halves; as floats -1.7e38
constexpr int poison = 0xff;  // NaN, as halves and as floats

// One kernel runs at a time. All is static: libraries of several kernels live in one process.
static Place place;
static std::vector<Fiber> fibers;
static std::vector<Warp> warps;
static std::vector<Region> regions;
static unsigned char* shared_memory;
static size_t shared_bytes;
static std::vector<BulkCopy> bulk_copies;
static std::vector<Arrivals> arrivals;
static std::vector<unsigned char> published;  // shared memory as products of warpgroups see it
static Request* request;
static jmp_buf scheduler;
static sigjmp_buf escape;
static uint64_t drawn;
static size_t page;

// A number drawn at random (splitmix64).
static uint32_t chance() {
    uint64_t x = drawn += 0x9e3779b97f4a7c15;
    x = (x ^ x >> 30) * 0xbf58476d1ce4e5b9;
    x = (x ^ x >> 27) * 0x94d049bb133111eb;
    return uint32_t(x >> 32);
}

static bool running;  // a thread's code, not the scheduler's
static pthread_t owner;

// Ends the launch.
[[noreturn, gnu::format(printf, 1, 2)]] static void fail(const char* format, ...) {
    int used = 0;
    char* text = request->message;
    const int room = sizeof request->message;
    const int* b = place.block;
    used += std::snprintf(text, room, "block (%d, %d, %d), ", b[0], b[1], b[2]);
    if (running) used += std::snprintf(text + used, room - used, "thread %d ", place.thread);
    va_list values;
    va_start(values, format);
    std::vsnprintf(text + used, room - used, format, values);
    va_end(values);
    siglongjmp(escape, 1);
}

// ------------------------------------------------------------------------------------------------------------ switches

static void resume(int thread) {
    place.thread = thread;
    running = true;
    Fiber& fiber = fibers[thread];
    if (_setjmp(scheduler)) {
        running = false;
        return;
    }
    if (fiber.started) _longjmp(fiber.context, 1);
    fiber.started = true;
    setcontext(&fiber.start);
}

static void yield(State state) {
    Fiber& fiber = fibers[place.thread];
    fiber.state = state;
    if (!_setjmp(fiber.context)) _longjmp(scheduler, 1);
}

// ------------------------------------------------------------------------------------------------ what primitives call

[[maybe_unused]] static unsigned char* shared() { return shared_memory; }

[[maybe_unused]] static void barrier() { yield(State::at_block); }

static void check_shared(const char* who, const void* pointer) {
    const auto at = reinterpret_cast<uintptr_t>(pointer), begin = reinterpret_cast<uintptr_t>(shared_memory);
    const auto offset = int64_t(at - begin);
    if (offset < 0 || offset + 16 > int64_t(shared_bytes))
        fail("goes out of shared memory: %s at byte %lld of %zu.", who, (long long)offset, shared_bytes);
    if (at % 16) fail("gives %s a row at byte %lld of shared memory, no multiple of 16.", who, (long long)offset);
}

[[maybe_unused]] static void check_global(const void* pointer, size_t bytes) {
    const auto at = reinterpret_cast<uintptr_t>(pointer);
    for (const Region& one : regions) {
        const auto begin = reinterpret_cast<uintptr_t>(one.begin);
        if (one.argument < 0 || at < begin || at + bytes > begin + one.bytes) continue;
        if (at % bytes)
            fail("loads %zu bytes at byte %zu of argument %d, no multiple.", bytes, size_t(at - begin), one.argument);
        return;
    }
    const unsigned char* byte = static_cast<const unsigned char*>(pointer);
    for (const Region& one : regions)
        if (one.argument >= 0 && byte >= one.mapped && byte < one.mapped + one.mapped_bytes) {
            const auto offset = (long long)(byte - one.begin);
            fail("reads out of argument %d: at byte %lld of %zu.", one.argument, offset, one.bytes);
        }
    fail("reads at %p, which is in no argument.", pointer);
}

// The compiler's checks are for kernels, and slow.
#define UNCHECKED [[gnu::no_sanitize("undefined")]]

// Rounds through the banks that one call needs: 8 rows of a matrix at a time, each of 4 banks.
UNCHECKED static void count_conflicts(const Warp& warp) {
    ++request->loads;
    for (int matrix = 0; matrix < 4; ++matrix) {
        int most = 0;
        for (int bank = 0; bank < 8; ++bank) {
            uintptr_t seen[8];
            int rows = 0;
            for (int row = 0; row < 8; ++row) {
                const uintptr_t at = reinterpret_cast<uintptr_t>(warp.given[matrix * 8 + row].row) / 16;
                bool known = at % 8 != uintptr_t(bank);
                for (int i = 0; i < rows && !known; ++i) known = seen[i] == at;  // the same row is read once
                if (!known) seen[rows++] = at;
            }
            most = rows > most ? rows : most;
        }
        request->load_passes += most;
    }
}

UNCHECKED static float unpacked(uint32_t both, int upper) {
    return float(std::bit_cast<_Float16>(uint16_t(both >> 16 * upper)));
}

UNCHECKED static void compute_product(Warp& warp) {
    float a[16][16], b[16][8], d[16][8];
    ++request->products;
    for (int lane = 0; lane < 32; ++lane) {
        const int g = lane / 4, t = lane % 4 * 2;
        const uint32_t* words = warp.given[lane].words;
        for (int upper = 0; upper < 2; ++upper) {
            a[g][t + upper] = unpacked(words[0], upper);
            a[g + 8][t + upper] = unpacked(words[1], upper);
            a[g][t + 8 + upper] = unpacked(words[2], upper);
            a[g + 8][t + 8 + upper] = unpacked(words[3], upper);
            b[t + upper][g] = unpacked(words[4], upper);
            b[t + 8 + upper][g] = unpacked(words[5], upper);
            d[g][t + upper] = std::bit_cast<float>(words[6 + upper]);
            d[g + 8][t + upper] = std::bit_cast<float>(words[8 + upper]);
        }
    }
    for (int m = 0; m < 16; ++m)
        for (int k = 0; k < 16; ++k)
            for (int n = 0; n < 8; ++n) d[m][n] += a[m][k] * b[k][n];
    for (int lane = 0; lane < 32; ++lane)
        for (int i = 0; i < 4; ++i)
            warp.found[lane][i] = std::bit_cast<uint32_t>(d[lane / 4 + i / 2 * 8][lane % 4 * 2 + i % 2]);
}

UNCHECKED static void compute_load(Warp& warp, bool transposed) {
    count_conflicts(warp);
    for (int matrix = 0; matrix < 4; ++matrix) {
        uint16_t elements[8][8];
        for (int row = 0; row < 8; ++row) std::memcpy(elements[row], warp.given[matrix * 8 + row].row, 16);
        for (int lane = 0; lane < 32; ++lane) {
            const int g = lane / 4, t = lane % 4 * 2;
            const uint32_t first = transposed ? elements[t][g] : elements[g][t];
            const uint32_t second = transposed ? elements[t + 1][g] : elements[g][t + 1];
            warp.found[lane][matrix] = first | second << 16;
        }
    }
}

// Each lane's two rows of A, whose numbers four neighbours have.
UNCHECKED static void gather_rows(Warp& warp) {
    for (int lane = 0; lane < 32; ++lane)
        for (int side = 0; side < 2; ++side)
            for (int k = 0; k < 16; ++k) {
                const uint32_t* words = warp.given[lane / 4 * 4 + k % 8 / 2].words;
                warp.rows[lane][side][k] = unpacked(words[k / 8 * 2 + side], k % 2);
            }
}

static void compute_shuffle(Warp& warp) {
    for (int lane = 0; lane < 32; ++lane) {
        const int from = warp.given[lane].shuffle.from;
        const float value = warp.given[from >= 0 && from < 32 ? from : lane].shuffle.value;
        warp.found[lane][0] = std::bit_cast<uint32_t>(value);
    }
}

// Waits for the other lanes. Operands must have been left; the results are there afterwards, and stay until this lane
// comes to the next meeting: no sooner can all have arrived at that.
static void meet(Meeting meeting) {
    Warp& warp = warps[place.thread / 32];
    if (warp.arrived == 0) warp.meeting = meeting;
    if (warp.meeting != meeting)
        fail("comes to %s while other lanes of its warp wait at %s.", names[int(meeting)], names[int(warp.meeting)]);
    if (++warp.arrived < 32) return yield(State::at_warp);
    switch (meeting) {
        case Meeting::barrier:
        case Meeting::group: break;
        case Meeting::load: compute_load(warp, false); break;
        case Meeting::load_transposed: compute_load(warp, true); break;
        case Meeting::product: compute_product(warp); break;
        case Meeting::shuffle: compute_shuffle(warp); break;
        case Meeting::group_of_registers: gather_rows(warp); break;
    }
    warp.arrived = 0;
    for (int lane = 0; lane < 32; ++lane) fibers[place.thread / 32 * 32 + lane].state = State::ready;
}

[[maybe_unused]] static void warp_barrier() { meet(Meeting::barrier); }

[[maybe_unused]] static void load_matrix(uint32_t (&r)[4], const void* row, bool transposed) {
    check_shared("load_matrix", row);
    Warp& warp = warps[place.thread / 32];
    const int lane = place.thread % 32;
    warp.given[lane].row = static_cast<const unsigned char*>(row);
    meet(transposed ? Meeting::load_transposed : Meeting::load);
    std::memcpy(r, warp.found[lane], sizeof r);
}

[[maybe_unused]] static void multiply(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    Warp& warp = warps[place.thread / 32];
    const int lane = place.thread % 32;
    uint32_t* words = warp.given[lane].words;
    std::memcpy(words, a, sizeof a);
    words[4] = b0;
    words[5] = b1;
    std::memcpy(words + 6, d, sizeof d);
    meet(Meeting::product);
    std::memcpy(d, warp.found[lane], sizeof d);
}

[[maybe_unused]] static float shuffle(float value, int from) {
    Warp& warp = warps[place.thread / 32];
    const int lane = place.thread % 32;
    warp.given[lane].shuffle = {value, from};
    meet(Meeting::shuffle);
    return std::bit_cast<float>(warp.found[lane][0]);
}

// A copy arrives when it is waited for, no sooner; until then there is poison at its place, since on a GPU neither the
// old nor the new bytes may be read there.
[[maybe_unused]] static void copy_async(void* shared, const void* global, bool there) {
    check_shared("copy_async", shared);
    if (there) check_global(global, 16);
    Fiber& fiber = fibers[place.thread];
    auto* to = static_cast<unsigned char*>(shared);
    std::memset(to, poison, 16);
    std::memset(published.data() + (to - shared_memory), poison, 16);
    fiber.copies.push_back({to, there ? static_cast<const unsigned char*>(global) : nullptr, fiber.group});
}

[[maybe_unused]] static void copy_commit() { ++fibers[place.thread].group; }

[[maybe_unused]] static void copy_wait(int left) {
    Fiber& fiber = fibers[place.thread];
    size_t kept = 0;
    for (const Copy& one : fiber.copies) {
        if (one.group >= fiber.group - left) {
            fiber.copies[kept++] = one;
            continue;
        }
        if (one.global) {
            std::memcpy(one.shared, one.global, 16);
        } else {
            std::memset(one.shared, 0, 16);
        }
        fiber.landed.push_back(size_t(one.shared - shared_memory));
    }
    fiber.copies.resize(kept);
}

[[maybe_unused]] static void publish_copies() {
    Fiber& fiber = fibers[place.thread];
    for (const size_t at : fiber.landed) std::memcpy(published.data() + at, shared_memory + at, 16);
    fiber.landed.clear();
}

// ---------------------------------------------------------------------------------------------------------- bulk copies

static Arrivals& arrivals_at(const char* who, const void* at) {
    for (Arrivals& one : arrivals)
        if (one.at == at) return one;
    fail("gives %s an arrival that has not begun.", who);
}

[[maybe_unused]] static void arrival_begin(const void* at, int count) {
    check_shared("arrival_begin", static_cast<const unsigned char*>(at) - (reinterpret_cast<uintptr_t>(at) & 8));
    arrivals.push_back({at, count, 0, 0, 0});
}

static void count_arrival(Arrivals& arrival, const char* who) {
    if (arrival.counted == arrival.count) fail("comes to %s more often than an arrival's phase counts.", who);
    ++arrival.counted;
}

[[maybe_unused]] static void arrival_signal(const void* at) {
    count_arrival(arrivals_at("arrival_signal", at), "arrival_signal");
    // Nobody waits in the next phase before this one is over.
    Arrivals& arrival = arrivals_at("arrival_signal", at);
    if (arrival.counted == arrival.count && arrival.bytes == 0) arrival.counted = 0, ++arrival.phases;
}

[[maybe_unused]] static void copy_bulk(void* shared, const void* global, size_t bytes, const void* at) {
    Arrivals& arrival = arrivals_at("copy_bulk", at);
    count_arrival(arrival, "copy_bulk");
    arrival.bytes = bytes;
    auto* to = static_cast<unsigned char*>(shared);
    const auto* from = static_cast<const unsigned char*>(global);
    check_shared("copy_bulk", to);
    check_shared("copy_bulk", to + bytes - 16);
    check_global(from, 16);
    check_global(from + bytes - 16, 16);
    std::memset(to, poison, bytes);
    std::memset(published.data() + (to - shared_memory), poison, bytes);
    bulk_copies.push_back({to, from, bytes, at});
}

// Whether the phase of this parity is over; here it is, or never will be.
[[maybe_unused]] static bool arrival_wait(const void* at, int parity) {
    Arrivals& arrival = arrivals_at("arrival_wait", at);
    if ((arrival.phases & 1) != parity) return true;
    size_t kept = 0, landed = 0;
    for (const BulkCopy& one : bulk_copies) {
        if (one.arrival != at) {
            bulk_copies[kept++] = one;
            continue;
        }
        std::memcpy(one.shared, one.global, one.bytes);
        std::memcpy(published.data() + (one.shared - shared_memory), one.global, one.bytes);
        landed += one.bytes;
    }
    bulk_copies.resize(kept);
    if (arrival.counted < arrival.count || landed != arrival.bytes)
        fail("waits for an arrival that nothing on its way ends.");
    arrival.counted = 0, arrival.bytes = 0;
    ++arrival.phases;
    return true;
}

// -------------------------------------------------------------------------------------------- products of a warpgroup

// Fields of a descriptor: bits 0 to 13 the first byte, 32 to 45 bytes from 8 rows to the next 8, both in units of 16;
// 62 and 63 how chunks are exchanged, 1 for rows of 128 bytes.
[[maybe_unused]] static uint64_t matrix_in_shared(const void* rows, uint64_t fields) {
    return fields | uint64_t(static_cast<const unsigned char*>(rows) - shared_memory) / 16;
}

// 16 numbers of a row. Chunks of 16 bytes are exchanged by bits 7 to 9 of their address.
UNCHECKED static void read_row(float (&numbers)[16], uint64_t descriptor, int row) {
    const size_t stride = (descriptor >> 32 & 0x3fff) * 16;
    const size_t start = (descriptor & 0x3fff) * 16 + row / 8 * stride + row % 8 * 128;
    for (int k = 0; k < 16; ++k) {
        const size_t plain = start + 2 * k, at = plain ^ ((plain >> 7 & 7) << 4);
        if (at + 2 > shared_bytes) fail("goes out of shared memory: multiply_group at byte %zu of %zu.", at, shared_bytes);
        if (std::memcmp(published.data() + at, shared_memory + at, 2))
            fail("reads by multiply_group, at byte %zu of shared memory, what was written and not published.", at);
        _Float16 number;
        std::memcpy(&number, published.data() + at, 2);
        numbers[k] = float(number);
    }
}

// A product is computed when it is waited for, no sooner, so that what is overwritten early is seen.
static Product& leave_product(Meeting meeting, float (*sums)[4], int tiles, uint64_t b) {
    if (b >> 62 != 1) fail("gives multiply_group a matrix of another kind.");
    if (fibers.size() % 128) fail("comes to multiply_group in a block of %zu threads, no warpgroups.", fibers.size());
    if (place.thread % 32 == 0) request->products += tiles;
    meet(meeting);
    Fiber& fiber = fibers[place.thread];
    fiber.products.push_back({sums, tiles, 0, b, meeting == Meeting::group_of_registers, {}, fiber.products_group});
    return fiber.products.back();
}

[[maybe_unused]] static void multiply_group(float (*sums)[4], int tiles, uint64_t a, uint64_t b) {
    if (a >> 62 != 1) fail("gives multiply_group a matrix of another kind.");
    leave_product(Meeting::group, sums, tiles, b).a = a;
}

[[maybe_unused]] static void multiply_group(float (*sums)[4], int tiles, const uint32_t (&a)[4], uint64_t b) {
    const int lane = place.thread % 32;
    Warp& warp = warps[place.thread / 32];
    std::memcpy(warp.given[lane].words, a, sizeof a);
    Product& one = leave_product(Meeting::group_of_registers, sums, tiles, b);
    std::memcpy(one.rows, warp.rows[lane], sizeof one.rows);
}

[[maybe_unused]] static void group_commit() { ++fibers[place.thread].products_group; }

UNCHECKED static void compute_group(const Product& one) {
    const int row = place.thread / 32 % 4 * 16 + place.thread % 32 / 4, t = place.thread % 4 * 2;
    float a[2][16], b[16];
    for (int side = 0; side < 2; ++side)
        if (!one.in_registers) read_row(a[side], one.a, row + 8 * side);
    if (one.in_registers) std::memcpy(a, one.rows, sizeof a);
    for (int column = 0; column < 2 * one.tiles; ++column) {
        read_row(b, one.b, column / 2 * 8 + t + column % 2);
        for (int side = 0; side < 2; ++side)
            for (int k = 0; k < 16; ++k) one.sums[column / 2][2 * side + column % 2] += a[side][k] * b[k];
    }
}

[[maybe_unused]] static void group_wait(int left) {
    Fiber& fiber = fibers[place.thread];
    size_t kept = 0;
    for (const Product& one : fiber.products) {
        if (one.group >= fiber.products_group - left) {
            fiber.products[kept++] = one;
        } else {
            compute_group(one);
        }
    }
    fiber.products.resize(kept);
}

// -------------------------------------------------------------------------------------------------------------- memory

static size_t rounded(size_t bytes, size_t to) { return (bytes + to - 1) / to * to; }

static unsigned char* mapped(size_t bytes) {
    void* found = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (found == MAP_FAILED) fail("there is no memory for %zu bytes.", bytes);
    return static_cast<unsigned char*>(found);
}

// Memory that ends, rounded up to `alignment`, at a guard.
static Region region(size_t bytes, size_t alignment, int argument, bool writable) {
    const size_t used = rounded(bytes, alignment), inner = rounded(used + 1, page);
    Region one{nullptr, nullptr, inner + 2 * guard_bytes, bytes, argument, writable};
    one.mapped = mapped(one.mapped_bytes);
    one.begin = one.mapped + guard_bytes + inner - used;
    std::memset(one.mapped + guard_bytes, filling, inner);
    mprotect(one.mapped, guard_bytes, PROT_NONE);
    mprotect(one.mapped + guard_bytes + inner, guard_bytes, PROT_NONE);
    regions.push_back(one);
    return one;
}

static void check_fillings() {
    for (const Region& one : regions) {
        if (one.argument == -2 || !one.writable) continue;
        const unsigned char *from = one.mapped + guard_bytes, *end = one.mapped + one.mapped_bytes - guard_bytes;
        for (const unsigned char* byte = from; byte < end; ++byte) {
            if (byte == one.begin) byte += one.bytes;
            if (byte == end || *byte == filling) continue;
            const auto offset = (long long)(byte - one.begin);
            if (one.argument < 0)
                fail("a thread has written out of shared memory: at byte %lld of %zu.", offset, one.bytes);
            fail("a thread has written out of argument %d: at byte %lld of %zu.", one.argument, offset, one.bytes);
        }
    }
}

static void map_memory() {
    for (int i = 0; i < request->count; ++i) {
        const Argument& one = request->arguments[i];
        if (one.kind != Kind::array) continue;
        const Region found = region(size_t(one.bytes), 256, i, one.writable);
        if (one.bytes) std::memcpy(found.begin, one.data, size_t(one.bytes));
        if (!one.writable) mprotect(found.mapped + guard_bytes, found.mapped_bytes - 2 * guard_bytes, PROT_READ);
    }
    // Products of warpgroups want whole kilobytes, and kernels that have them take whole ones.
    shared_memory = region(shared_bytes, shared_bytes % 1024 ? 128 : 1024, -1, true).begin;
    published.resize(shared_bytes);
    const size_t stride = stack_bytes + page, all = stride * fibers.size();
    Region stacks{mapped(all), nullptr, all, all, -2, false};
    stacks.begin = stacks.mapped;
    regions.push_back(stacks);
    for (size_t i = 0; i < fibers.size(); ++i) mprotect(stacks.mapped + i * stride, page, PROT_NONE);
}

// Memory that may not be touched was touched, or a check of the compiler failed.
static void trapped(int number, siginfo_t* what, void*) {
    if (!running || !pthread_equal(pthread_self(), owner)) {  // none of ours: it happens again, as without us
        std::signal(number, SIG_DFL);
        return;
    }
    if (number == SIGILL)  // the compiler's checks
        fail("does what is not defined: an address not aligned, an index out of an array, an integer out of range.");
    const auto* at = static_cast<const unsigned char*>(what->si_addr);
    for (const Region& one : regions) {
        if (at < one.mapped || at >= one.mapped + one.mapped_bytes) continue;
        const auto offset = (long long)(at - one.begin);
        if (one.argument == -2) fail("has used up its stack of %zu bytes.", stack_bytes);
        if (one.argument == -1) fail("goes out of shared memory: byte %lld of %zu.", offset, one.bytes);
        if (offset >= 0 && offset < (long long)one.bytes)
            fail("writes to argument %d, which is read-only: byte %lld.", one.argument, offset);
        fail("goes out of argument %d: byte %lld of %zu.", one.argument, offset, one.bytes);
    }
    fail("reads or writes at %p, where there is nothing.", static_cast<const void*>(at));
}

// ----------------------------------------------------------------------------------------------------------- scheduler

static void (*body)();  // the kernel, with its arguments

static void fiber_main() {
    for (;;) {  // once for each block
        body();
        yield(State::ended);
    }
}

static void make_fibers() {
    const unsigned char* stacks = regions.back().mapped;
    for (size_t i = 0; i < fibers.size(); ++i) {
        ucontext_t& start = fibers[i].start;
        getcontext(&start);
        start.uc_stack.ss_sp = const_cast<unsigned char*>(stacks) + i * (stack_bytes + page) + page;
        start.uc_stack.ss_size = stack_bytes;
        start.uc_link = nullptr;
        makecontext(&start, fiber_main, 0);
    }
}

// Runs a warp until all of its lanes wait at a barrier of the block or have ended. Lanes take turns in either
// direction, from any one on.
static void run_warp(int warp) {
    const uint32_t order = chance();
    const int first = order % 32, step = order & 32 ? 1 : 31;
    for (bool moved = true; moved;) {
        moved = false;
        for (int i = 0; i < 32; ++i) {
            const int thread = warp * 32 + (first + i * step) % 32;
            if (fibers[thread].state != State::ready) continue;
            resume(thread);
            moved = true;
        }
    }
    if (warps[warp].arrived)
        fail("warp %d is stuck: %d of its lanes wait at %s, where the others never come.", warp, warps[warp].arrived,
             names[int(warps[warp].meeting)]);
}

static void run_block() {
    std::memset(shared_memory, poison, shared_bytes);
    std::memset(published.data(), poison, shared_bytes);
    bulk_copies.clear();
    arrivals.clear();
    for (Fiber& one : fibers) {
        one.state = State::ready;
        one.copies.clear();
        one.landed.clear();
        one.products.clear();
        one.group = one.products_group = 0;
    }
    for (;;) {
        std::vector<int> able;
        size_t waiting = 0;
        for (size_t i = 0; i < fibers.size(); ++i) {
            waiting += fibers[i].state == State::at_block;
            const int warp = int(i / 32);
            if (fibers[i].state == State::ready && (able.empty() || able.back() != warp)) able.push_back(warp);
        }
        if (!able.empty()) {
            run_warp(able[chance() % able.size()]);
        } else if (waiting == 0) {
            break;
        } else if (waiting < fibers.size()) {
            fail("%zu threads wait at a barrier, and %zu have ended.", waiting, fibers.size() - waiting);
        } else {
            for (Fiber& one : fibers) one.state = State::ready;
        }
    }
    check_fillings();
}

static void run_grid() {
    const int* grid = request->grid;
    std::memcpy(place.grid, grid, sizeof place.grid);
    for (int z = 0; z < grid[2]; ++z)
        for (int y = 0; y < grid[1]; ++y)
            for (int x = 0; x < grid[0]; ++x) {
                place.block[0] = x;
                place.block[1] = y;
                place.block[2] = z;
                run_block();
            }
}

// -------------------------------------------------------------------------------------------------------------- launch

// An argument as the kernel takes it.
template <class T>
static T taken(int number) {
    const Argument& one = request->arguments[number];
    if constexpr (std::is_pointer_v<T>) {
        for (const Region& found : regions)
            if (found.argument == number) return reinterpret_cast<T>(found.begin);
        return nullptr;
    } else if constexpr (std::is_floating_point_v<T>) {
        return T(one.real);
    } else {
        return T(one.integer);
    }
}

template <class T>
constexpr Kind kind_of = std::is_pointer_v<T>          ? Kind::array
                         : std::is_floating_point_v<T> ? Kind::real
                                                       : Kind::integer;

// The kernel and its arguments, in a place that `body` can reach without a capture.
template <class... Ts>
struct Call {
    static inline void (*kernel)(Ts...);
    template <size_t... is>
    static void made(std::index_sequence<is...>) {
        kernel(taken<Ts>(int(is))...);
    }
    static void made() { made(std::index_sequence_for<Ts...>{}); }
    static bool fits() {
        const Kind kinds[] = {kind_of<Ts>..., Kind::array};
        const int count = int(sizeof...(Ts));
        if (request->count != count) {
            std::snprintf(request->message, sizeof request->message, "the kernel takes %d arguments, not %d.", count,
                          request->count);
            return false;
        }
        for (int i = 0; i < count; ++i) {
            const char* const words[] = {"an array", "an integer", "a float"};
            const Kind given = request->arguments[i].kind;
            if (given == kinds[i]) continue;
            std::snprintf(request->message, sizeof request->message, "argument %d is %s, and the kernel takes %s.", i,
                          words[int(given)], words[int(kinds[i])]);
            return false;
        }
        return true;
    }
};

// 0: done. 1: the arguments do not fit. 2: the kernel did something wrong. 1 and 2 leave a message, and the arrays as
// they were.
template <class... Ts>
static int launch(Request* asked, void (*kernel)(Ts...)) {
    request = asked;
    if (!Call<Ts...>::fits()) return 1;
    Call<Ts...>::kernel = kernel;
    body = Call<Ts...>::made;
    page = size_t(sysconf(_SC_PAGESIZE));
    owner = pthread_self();
    running = false;
    place = {};
    shared_bytes = size_t(request->shared_bytes);
    fibers = std::vector<Fiber>(size_t(request->threads));
    warps = std::vector<Warp>(fibers.size() / 32);
    drawn = request->seed;

    const int signals[] = {SIGSEGV, SIGBUS, SIGILL};
    static unsigned char signal_stack[65536];  // the stack of the fiber may be what is used up
    stack_t own{}, previous_stack{};
    own.ss_sp = signal_stack;
    own.ss_size = sizeof signal_stack;
    struct sigaction handler{}, previous[3]{};
    handler.sa_sigaction = trapped;
    handler.sa_flags = SA_SIGINFO | SA_ONSTACK;
    sigemptyset(&handler.sa_mask);
    sigaltstack(&own, &previous_stack);
    for (int i = 0; i < 3; ++i) sigaction(signals[i], &handler, &previous[i]);

    volatile int result = 2;
    if (!sigsetjmp(escape, 1)) {
        map_memory();
        make_fibers();
        run_grid();
        for (const Region& one : regions)
            if (one.argument >= 0 && one.writable && one.bytes)
                std::memcpy(request->arguments[one.argument].data, one.begin, one.bytes);
        result = 0;
    }
    running = false;
    for (int i = 0; i < 3; ++i) sigaction(signals[i], &previous[i], nullptr);
    sigaltstack(&previous_stack, nullptr);
    for (const Region& one : regions) munmap(one.mapped, one.mapped_bytes);
    regions.clear();
    fibers.clear();
    return result;
}

}  // namespace bolt::host

#define BOLT_HOST_LAUNCH(kernel)                                                                                \
    extern "C" __attribute__((visibility("default"))) int bolt_launch_##kernel(bolt::host::Request* asked) { \
        return bolt::host::launch(asked, kernel);                                                             \
    }
