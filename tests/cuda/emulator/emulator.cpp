// One GPU block at a time: its threads are fibers that run until they meet the others at a barrier or at an instruction of a warp.
//
// What it refuses, with a sentence that names block, threads and addresses of code (`@` and an offset into the library):
//  * shared memory: reads and writes of bytes that another thread wrote or read since the last barrier (RAW, WAW, WAR), reads of bytes
//    never written, anything outside of it or not aligned;
//  * asynchronous copies: the bytes come when a wait_group covers them and not before; until then nobody may touch them;
//  * arrays: accesses outside of them, writes to inputs, bytes of a result written by two threads or read by another than wrote them;
//  * warps and blocks that do not arrive together.
// Instructions are written from the PTX ISA 8.5: "Matrix Fragments for mma.m8n8k16" and following, ldmatrix, cp.async.

#include <dlfcn.h>
#include <setjmp.h>
#include <sys/mman.h>
#include <ucontext.h>

#include <algorithm>
#include <cstdarg>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <string>
#include <vector>

extern "C" {
alignas(1024) unsigned char hawq_shared[232448];  // as much as a block can have on sm_90
struct Dim {
    unsigned x, y, z;
};
unsigned char *hawq_static;  // static shared memory, behind the dynamic one
Dim threadIdx, blockIdx, blockDim, gridDim;
}

namespace {

constexpr unsigned WINDOW = 0x400;  // where shared memory begins among 32-bit addresses
constexpr size_t STACK = 256 << 10;
constexpr unsigned char POISON = 0xA5;
constexpr int LANES = 32, MANY = -2, NOBODY = -1;

struct Byte {
    int writer, reader, owner;  // owner: whose copy is under way
    int written, read;          // in which epoch, 0: never
    uintptr_t writer_at, reader_at;
};

struct Copy {
    unsigned to;
    const unsigned char *from;
    int bytes, taken;
    uintptr_t at;
};

enum class State { READY, WARP, BARRIER, DONE };
enum class Op { LDMATRIX, MMA, SHUFFLE };

struct Fiber {
    jmp_buf where;
    ucontext_t start;
    unsigned char *stack;
    bool started;
    State state;
    int line;  // of the barrier
    uintptr_t at;
    Dim index;
    std::vector<Copy> uncommitted;
    std::vector<std::vector<Copy>> groups;
};

struct Warp {
    int arrived;
    Op op;
    int m, k, bits, signs;
    void *operands[LANES];
    uintptr_t at[LANES];
};

struct Array {
    unsigned char *begin;
    int64_t size;
    int32_t is_result;
    int32_t *writers;  // of every byte, 0: nobody, -1: an earlier kernel
};

struct Result {
    char error[1024];
    int64_t products, conflicts, barriers;
};

std::vector<Fiber> fibers;
std::vector<Warp> warps;
std::vector<Byte> bytes;
Array *arrays;
int array_count, shared_bytes, current, epoch, block;
jmp_buf scheduler;
Result *result;
void (*kernel)(void **);
void **arguments;

int threads() { return int(blockDim.x * blockDim.y * blockDim.z); }

uintptr_t offset(uintptr_t address) {
    Dl_info info;
    return dladdr(reinterpret_cast<void *>(address), &info) ? address - 1 - reinterpret_cast<uintptr_t>(info.dli_fbase) : address;
}

[[noreturn]] void fail(uintptr_t at, const char *format, ...) {
    va_list list;
    va_start(list, format);
    char why[640];
    vsnprintf(why, sizeof why, format, list);
    va_end(list);
    const Dim t = fibers[current].index;
    snprintf(result->error, sizeof result->error, "block (%u, %u, %u), thread (%u, %u, %u) @%lx: %s", blockIdx.x, blockIdx.y, blockIdx.z, t.x, t.y,
             t.z, (unsigned long)offset(at), why);
    _longjmp(scheduler, 2);
}

std::string name(int thread) {
    if (thread == MANY) return "several threads";
    const Dim t = fibers[thread].index;
    char text[64];
    snprintf(text, sizeof text, "thread (%u, %u, %u)", t.x, t.y, t.z);
    return text;
}

#define HERE reinterpret_cast<uintptr_t>(__builtin_return_address(0))

// ---- shared memory

void shared_range(uintptr_t at, int64_t first, int64_t size, bool aligned, const char *what) {
    if (first < 0 || first + size > shared_bytes) fail(at, "%s of %d bytes at byte %ld of shared memory, which has %d", what, int(size), long(first), shared_bytes);
    if (aligned && first % size) fail(at, "%s of %d bytes at byte %ld of shared memory is not aligned", what, int(size), long(first));
}

void shared_read(int thread, uintptr_t at, int64_t first, int64_t size) {
    for (int64_t i = first; i < first + size; ++i) {
        Byte &b = bytes[i];
        if (b.owner != NOBODY) fail(at, "reads shared byte %ld while the copy of %s @%lx is under way", long(i), name(b.owner).c_str(), (unsigned long)offset(b.writer_at));
        if (b.written == 0) fail(at, "reads shared byte %ld, which nobody has written", long(i));
        if (b.written == epoch && b.writer != thread)
            fail(at, "reads shared byte %ld without a barrier after %s @%lx wrote it", long(i), name(b.writer).c_str(), (unsigned long)offset(b.writer_at));
        b.reader = b.read == epoch && b.reader != thread ? MANY : thread;
        b.read = epoch, b.reader_at = at;
    }
}

void shared_write(int thread, uintptr_t at, int64_t first, int64_t size) {
    for (int64_t i = first; i < first + size; ++i) {
        Byte &b = bytes[i];
        if (b.owner != NOBODY) fail(at, "writes shared byte %ld while the copy of %s @%lx is under way", long(i), name(b.owner).c_str(), (unsigned long)offset(b.writer_at));
        if (b.written == epoch && b.writer != thread)
            fail(at, "writes shared byte %ld without a barrier after %s @%lx wrote it", long(i), name(b.writer).c_str(), (unsigned long)offset(b.writer_at));
        if (b.read == epoch && b.reader != thread)
            fail(at, "writes shared byte %ld without a barrier after %s @%lx read it", long(i), name(b.reader).c_str(), (unsigned long)offset(b.reader_at));
        b.writer = thread, b.written = epoch, b.writer_at = at;
    }
}

// ---- global memory

Array *array_of(const unsigned char *p) {
    for (int i = 0; i < array_count; ++i)
        if (p >= arrays[i].begin && p < arrays[i].begin + arrays[i].size) return &arrays[i];
    return nullptr;
}

void array_access(uintptr_t at, const unsigned char *p, int64_t size, bool write, bool aligned) {
    Array *a = array_of(p);
    const char *what = write ? "writes" : "reads";
    if (a == nullptr) {
        int near = 0;  // probably meant
        const auto distance = [&](int i) { return p < arrays[i].begin ? arrays[i].begin - p : p - arrays[i].begin - arrays[i].size; };
        for (int i = 1; i < array_count; ++i)
            if (distance(i) < distance(near)) near = i;
        fail(at, "%s %d bytes outside of all arrays, at byte %ld of array %d, which has %ld", what, int(size), long(p - arrays[near].begin), near, long(arrays[near].size));
    }
    const int number = int(a - arrays);
    const int64_t first = p - a->begin;
    if (first + size > a->size) fail(at, "%s %d bytes at byte %ld of array %d, which has %ld", what, int(size), long(first), number, long(a->size));
    if (aligned && first % size) fail(at, "%s %d bytes at byte %ld of array %d, which is not aligned", what, int(size), long(first), number);
    if (!a->is_result) {
        if (write) fail(at, "writes array %d, an input", number);
        return;
    }
    const int32_t me = block * threads() + current + 1;
    for (int64_t i = first; i < first + size; ++i) {
        if (a->writers[i] != me && a->writers[i] != -1 && (a->writers[i] != 0 || !write))
            fail(at, a->writers[i] ? "%s byte %ld of array %d, which another thread has written" : "%s byte %ld of array %d, a result nobody has written", what, long(i), number);
        if (write) a->writers[i] = me;
    }
}

void access(uintptr_t at, const void *pointer, int64_t size, bool write, bool aligned) {
    const auto *p = static_cast<const unsigned char *>(pointer);
    const Fiber &f = fibers[current];
    if (p >= f.stack && p < f.stack + STACK) return;
    const int64_t first = p - hawq_shared;
    if (first < -(1 << 16) || first > shared_bytes + (1 << 16)) return array_access(at, p, size, write, aligned);
    shared_range(at, first, size, aligned, write ? "a write" : "a read");
    write ? shared_write(current, at, first, size) : shared_read(current, at, first, size);
}

// ---- fibers

void pause(State state) {
    Fiber &f = fibers[current];
    f.state = state;
    if (!_setjmp(f.where)) _longjmp(scheduler, 1);
}

void begin() {
    kernel(arguments);
    Fiber &f = fibers[current];
    if (!f.uncommitted.empty() || !f.groups.empty())
        fail(f.uncommitted.empty() ? f.groups[0].empty() ? 0 : f.groups[0][0].at : f.uncommitted[0].at, "ends without waiting for its copies");
    f.state = State::DONE;
    _longjmp(scheduler, 1);
}

void run(int thread) {
    current = thread;
    Fiber &f = fibers[thread];
    threadIdx = f.index;
    if (f.started) _longjmp(f.where, 1);
    f.started = true;
    setcontext(&f.start);
}

// Whether the block ended: everybody who is not waiting runs until nobody can; then all are at one barrier, or it is an error.
void run_block() {
    for (;;) {
        bool ran = false;
        for (volatile int t = 0; t < threads(); t = t + 1)
            if (fibers[t].state == State::READY) {
                ran = true;
                const int from = _setjmp(scheduler);
                if (from == 0) run(t);
                if (from == 2) return;
            }
        if (ran) continue;
        const State all = fibers[0].state;
        const int line = fibers[0].line;
        const int other = int(std::find_if(fibers.begin(), fibers.begin() + threads(), [&](const Fiber &f) {
            return f.state != all || (all == State::BARRIER && f.line != line);
        }) - fibers.begin());
        current = 0;
        if (other < threads() || all == State::WARP) {
            static const char *const WHERE[] = {"ready", "at an instruction of its warp", "at a barrier", "at its end"};
            const int odd = std::min(other, threads() - 1);
            if (_setjmp(scheduler) == 0)
                fail(fibers[0].at, "is %s, but %s @%lx is %s", WHERE[int(all)], name(odd).c_str(), (unsigned long)offset(fibers[odd].at), WHERE[int(fibers[odd].state)]);
            return;
        }
        if (all == State::DONE) return;
        epoch++, result->barriers++;
        for (int t = 0; t < threads(); ++t) fibers[t].state = State::READY;
    }
}

// ---- instructions of a warp

struct Ldmatrix {
    unsigned row;
    unsigned *r;
};

void ldmatrix(const Warp &w, int first_lane) {
    for (int giver = 0; giver < LANES; ++giver) {
        current = first_lane + giver;
        shared_range(w.at[giver], int64_t(static_cast<const Ldmatrix *>(w.operands[giver])->row) - WINDOW, 16, true, "a row");
    }
    for (int matrix = 0; matrix < 4; ++matrix) {
        unsigned banks = 0;
        for (int r = 0; r < 8; ++r) {
            const int giver = matrix * 8 + r;
            const int64_t first = int64_t(static_cast<const Ldmatrix *>(w.operands[giver])->row) - WINDOW;
            banks |= 1u << (first / 16 % 8);
            for (int part = 0; part < 4; ++part) {
                const int lane = r * 4 + part;
                current = first_lane + lane;
                shared_read(current, w.at[lane], first + 4 * part, 4);
                memcpy(static_cast<Ldmatrix *>(w.operands[lane])->r + matrix, hawq_shared + first + 4 * part, 4);
            }
        }
        result->conflicts += 8 - __builtin_popcount(banks);
    }
}

struct Mma {
    const unsigned *a, *b;
    int *c;
};

int element(unsigned reg, int i, int bits, bool is_signed) {
    const unsigned value = reg >> (i * bits) & ((1u << bits) - 1);
    return is_signed && value >> (bits - 1) ? int(value) - (1 << bits) : int(value);
}

// A thread's registers hold 32 / bits neighbours along k: of A those of row `group`, of row `group` + 8, then both of the upper half of k.
void multiply(const Warp &w) {
    int a[16][64], b[8][64];
    const int each = 32 / w.bits;
    for (int lane = 0; lane < LANES; ++lane) {
        const int group = lane / 4, of_group = lane % 4;
        const auto *o = static_cast<const Mma *>(w.operands[lane]);
        for (int reg = 0; reg < (w.m == 16 ? 4 : 1); ++reg)
            for (int i = 0; i < each; ++i)
                a[group + 8 * (reg & 1)][of_group * each + i + (reg & 2 ? w.k / 2 : 0)] = element(o->a[reg], i, w.bits, w.signs & 1);
        for (int reg = 0; reg < (w.m == 16 ? 2 : 1); ++reg)
            for (int i = 0; i < each; ++i) b[group][of_group * each + i + (reg ? w.k / 2 : 0)] = element(o->b[reg], i, w.bits, w.signs & 2);
    }
    for (int lane = 0; lane < LANES; ++lane)
        for (int i = 0; i < w.m / 4; ++i) {
            const int row = lane / 4 + 8 * (i / 2), column = lane % 4 * 2 + i % 2;
            int &c = static_cast<Mma *>(w.operands[lane])->c[i];
            unsigned sum = unsigned(c);
            for (int k = 0; k < w.k; ++k) sum += unsigned(a[row][k] * b[column][k]);
            c = int(sum);
        }
    result->products++;
}

struct Shuffle {
    uint64_t value;
    int from;
    uint64_t result;
};

void shuffle(const Warp &w, int lanes) {
    for (int lane = 0; lane < lanes; ++lane) {
        auto *mine = static_cast<Shuffle *>(w.operands[lane]);
        memset(&mine->result, POISON, sizeof mine->result);  // of a lane that is not there
        if (mine->from < lanes) mine->result = static_cast<Shuffle *>(w.operands[mine->from])->value;
    }
}

void meet(uintptr_t at, const Warp &mine, void *operands) {
    const int lane = current % LANES;
    Warp &w = warps[current / LANES];
    const int lanes = std::min(LANES, threads() - (current - lane));
    if (lanes < LANES && mine.op != Op::SHUFFLE) fail(at, "executes an instruction of a whole warp in one of %d threads", lanes);
    if (w.arrived == 0) w.op = mine.op, w.m = mine.m, w.k = mine.k, w.bits = mine.bits, w.signs = mine.signs;
    if (w.op != mine.op || w.m != mine.m || w.k != mine.k || w.bits != mine.bits || w.signs != mine.signs)
        fail(at, "executes another instruction than the other lanes of its warp");
    w.operands[lane] = operands, w.at[lane] = at;
    fibers[current].at = at;
    if (++w.arrived < lanes) return pause(State::WARP);
    const int me = current, first = me - lane;
    if (w.op == Op::LDMATRIX) ldmatrix(w, first);
    if (w.op == Op::MMA) multiply(w);
    if (w.op == Op::SHUFFLE) shuffle(w, lanes);
    current = me;
    w.arrived = 0;
    for (int l = 0; l < lanes; ++l) fibers[first + l].state = State::READY;
}

void arrive(const Copy &c, int thread) {
    memset(hawq_shared + c.to, 0, c.bytes);
    memcpy(hawq_shared + c.to, c.from, c.taken);
    for (unsigned i = c.to; i < c.to + c.bytes; ++i) bytes[i].owner = NOBODY, bytes[i].writer = thread, bytes[i].written = epoch;
}

}  // namespace

namespace hawq_emulated {

void barrier(int line) {
    fibers[current].line = line;
    fibers[current].at = HERE;
    pause(State::BARRIER);
}

unsigned shared_address(const void *p) {
    // Not an address of shared memory is found out when it is used.
    return unsigned(static_cast<const unsigned char *>(p) - hawq_shared) + WINDOW;
}

void ldmatrix_x4(unsigned (&r)[4], unsigned row) {
    Ldmatrix o{row, r};
    Warp w{};
    w.op = Op::LDMATRIX;
    meet(HERE, w, &o);
}

void mma(int m, int k, int bits, bool a_signed, bool b_signed, const unsigned *a, const unsigned *b, int *c) {
    Mma o{a, b, c};
    Warp w{};
    w.op = Op::MMA, w.m = m, w.k = k, w.bits = bits, w.signs = a_signed + 2 * b_signed;
    meet(HERE, w, &o);
}

unsigned lanes() {
    const int there = std::min(LANES, threads() - current / LANES * LANES);
    return there == LANES ? ~0u : (1u << there) - 1;
}

uint64_t shuffle(unsigned mask, uint64_t value, int by, int width, bool down) {
    if (mask != lanes()) fail(HERE, "shuffles lanes %x of a warp with lanes %x", mask, lanes());
    const int lane = current % LANES, first = lane / width * width;
    Shuffle o{value, down ? (lane + by < first + width ? lane + by : lane) : first + by % width, 0};
    Warp w{};
    w.op = Op::SHUFFLE;
    meet(HERE, w, &o);
    return o.result;
}

void copy_async(unsigned to, size_t from, int size, int taken) {
    const uintptr_t at = HERE;
    const int64_t first = int64_t(to) - WINDOW;
    shared_range(at, first, size, true, "a copy");
    if (taken < 0 || taken > size) fail(at, "copies %d bytes of %d", taken, size);
    if (from % size) fail(at, "copies %d bytes from an address that is not aligned", size);
    const auto *source = reinterpret_cast<const unsigned char *>(from);
    if (taken) array_access(at, source, taken, false, false);
    shared_write(current, at, first, size);
    memset(hawq_shared + first, POISON, size);
    for (int64_t i = first; i < first + size; ++i) bytes[i].owner = current;
    fibers[current].uncommitted.push_back({unsigned(first), source, size, taken, at});
}

void commit_group() {
    Fiber &f = fibers[current];
    f.groups.push_back(std::move(f.uncommitted));
    f.uncommitted.clear();
}

void wait_group(int still_running) {
    Fiber &f = fibers[current];
    while (int(f.groups.size()) > still_running) {
        for (const Copy &c : f.groups.front()) arrive(c, current);
        f.groups.erase(f.groups.begin());
    }
}

}  // namespace hawq_emulated

extern "C" {

// What -fsanitize=thread calls before every access.
#define HAWQ_ACCESS(SIZE) \
    void __tsan_read##SIZE(void *p) { access(HERE, p, SIZE, false, true); } \
    void __tsan_write##SIZE(void *p) { access(HERE, p, SIZE, true, true); } \
    void __tsan_unaligned_read##SIZE(void *p) { access(HERE, p, SIZE, false, false); } \
    void __tsan_unaligned_write##SIZE(void *p) { access(HERE, p, SIZE, true, false); }
HAWQ_ACCESS(1)
HAWQ_ACCESS(2)
HAWQ_ACCESS(4)
HAWQ_ACCESS(8)
HAWQ_ACCESS(16)
void __tsan_read_range(void *p, unsigned long size) { access(HERE, p, int64_t(size), false, false); }
void __tsan_write_range(void *p, unsigned long size) { access(HERE, p, int64_t(size), true, false); }
void __tsan_init() {}
// What -fsanitize=alignment calls: a load or store of a vector at an address that is no multiple of its size.
void __ubsan_handle_type_mismatch_v1(void *, void *p) {
    const auto *address = static_cast<const unsigned char *>(p);
    for (int i = 0; i < array_count; ++i)
        if (address >= arrays[i].begin && address < arrays[i].begin + arrays[i].size)
            fail(HERE, "accesses byte %ld of array %d, which is not aligned", long(address - arrays[i].begin), i);
    fail(HERE, "accesses byte %ld of shared memory, which is not aligned", long(address - hawq_shared));
}

// Runs a kernel; 0, or 1 with result->error. dims: grid and block, x y z each.
// dynamic, fixed: bytes of shared memory.
int hawq_launch(void (*entry)(void **), void **args, Array *given, int count, const unsigned *dims, int dynamic, int fixed, Result *out) {
    const int behind = (dynamic + 63) / 64 * 64, shared = fixed ? behind + fixed : dynamic;
    hawq_static = hawq_shared + behind;
    kernel = entry, arguments = args, arrays = given, array_count = count, shared_bytes = shared, result = out;
    gridDim = {dims[0], dims[1], dims[2]}, blockDim = {dims[3], dims[4], dims[5]};
    *out = Result();
    fibers.resize(threads());
    warps.resize((threads() + LANES - 1) / LANES);
    bytes.resize(shared);
    auto *stacks = static_cast<unsigned char *>(mmap(nullptr, STACK * threads(), PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
    if (stacks == MAP_FAILED) return snprintf(out->error, sizeof out->error, "no memory for %d stacks", threads()), 1;
    const int blocks = int(gridDim.x * gridDim.y * gridDim.z);
    for (block = 0; block < blocks && !out->error[0]; ++block) {
        const unsigned b = unsigned(block);
        blockIdx = {b % gridDim.x, b / gridDim.x % gridDim.y, b / gridDim.x / gridDim.y};
        epoch = 1;
        memset(hawq_shared, POISON, shared);
        std::fill(bytes.begin(), bytes.end(), Byte{NOBODY, NOBODY, NOBODY, 0, 0, 0, 0});
        for (Warp &w : warps) w.arrived = 0;
        for (int t = 0; t < threads(); ++t) {
            Fiber &f = fibers[t];
            f.stack = stacks + STACK * t;
            memset(f.stack + STACK - 8192, POISON, 8192);  // what it reads before it writes is not zero
            f.started = false, f.state = State::READY, f.line = 0, f.at = 0;
            f.uncommitted.clear(), f.groups.clear();
            const unsigned i = unsigned(t);
            f.index = {i % blockDim.x, i / blockDim.x % blockDim.y, i / blockDim.x / blockDim.y};
            getcontext(&f.start);
            f.start.uc_stack.ss_sp = f.stack;
            f.start.uc_stack.ss_size = STACK;
            f.start.uc_link = nullptr;
            makecontext(&f.start, begin, 0);
        }
        run_block();
    }
    munmap(stacks, STACK * threads());
    return out->error[0] != 0;
}
}
