// The tile instructions of AMX in software, one register file per thread, with the checks that the CPU makes by a fault.

#include <atomic>
#include <cstdint>
#include <cstring>

namespace {

struct State {
    bool configured = false;
    uint8_t rows[8] = {};
    uint16_t bytes[8] = {};
    uint8_t tile[8][16][64] = {};
    bool fresh[8] = {};
};

thread_local State state;
std::atomic<const char *> failure{nullptr};
std::atomic<int64_t> products{0};
std::atomic<int> configured{0};
// Since they were last asked for: products, rows of data in them, loads, those with rows that cross cache lines, stores,
// those with such rows, loads of weights.
std::atomic<int64_t> counts[7];

void count(int what, int64_t more = 1) { counts[what].fetch_add(more, std::memory_order_relaxed); }

int fail(const char *why) {
    const char *none = nullptr;
    failure.compare_exchange_strong(none, why);
    return 1;
}

bool usable(int t) {
    if (!state.configured) return fail("a tile instruction before ldtilecfg, or after tilerelease"), false;
    if (t < 0 || t > 7) return fail("no such tile"), false;
    if (state.rows[t] == 0 || state.bytes[t] == 0) return fail("a tile without rows"), false;
    return true;
}

// Whether any row of a tile lies in two cache lines.
bool crosses(int t, uintptr_t at, int64_t stride) {
    for (int i = 0; i < state.rows[t]; i++)
        if ((at + i * stride) % 64 + state.bytes[t] > 64) return true;
    return false;
}

template <typename A, typename B>
int dot(int c, int a, int b) {
    if (!usable(c) || !usable(a) || !usable(b)) return 1;
    if (c == a || c == b || a == b) return fail("one tile twice");
    if (state.rows[c] != state.rows[a] || state.bytes[a] != 4 * state.rows[b] || state.bytes[c] != state.bytes[b])
        return fail("the sizes of three tiles do not fit");
    for (int i = 0; i < state.rows[c]; i++)
        for (int q = 0; q < state.bytes[a] / 4; q++)
            for (int o = 0; o < state.bytes[c] / 4; o++) {
                uint32_t sum;
                std::memcpy(&sum, &state.tile[c][i][4 * o], 4);
                for (int p = 0; p < 4; p++)
                    sum += static_cast<uint32_t>(int32_t(A(state.tile[a][i][4 * q + p])) * int32_t(B(state.tile[b][q][4 * o + p])));
                std::memcpy(&state.tile[c][i][4 * o], &sum, 4);
            }
    products++;
    count(0), count(1, state.rows[c]), count(6, state.fresh[b]);
    state.fresh[b] = false;
    return 0;
}

}  // namespace

extern "C" {

int hawq_emulated_ldtilecfg(const uint8_t *config) {
    state = State();
    if (config[0] != 1) return fail("not palette 1");
    for (int i = 1; i < 16; i++)
        if (config[i]) return fail("start_row or a reserved byte is not zero");
    for (int t = 0; t < 16; t++) {
        int bytes = config[16 + 2 * t] + 256 * config[17 + 2 * t], rows = config[48 + t];
        if (t > 7 ? bytes || rows : bytes > 64 || rows > 16 || !bytes != !rows) return fail("a tile larger than 16 x 64 bytes");
        if (t < 8) state.bytes[t] = bytes, state.rows[t] = rows;
    }
    state.configured = true;
    configured++;
    return 0;
}

int hawq_emulated_tilerelease() {
    if (!state.configured) return fail("tilerelease without ldtilecfg");
    state = State();
    configured--;
    return 0;
}

int hawq_emulated_tilezero(int t) {
    if (!usable(t)) return 1;
    std::memset(state.tile[t], 0, sizeof state.tile[t]);
    return 0;
}

int hawq_emulated_tileloadd64(int t, const uint8_t *from, int64_t stride) {
    if (!usable(t)) return 1;
    count(2), count(3, crosses(t, reinterpret_cast<uintptr_t>(from), stride));
    state.fresh[t] = true;
    std::memset(state.tile[t], 0, sizeof state.tile[t]);
    for (int i = 0; i < state.rows[t]; i++) std::memcpy(state.tile[t][i], from + i * stride, state.bytes[t]);
    return 0;
}

int hawq_emulated_tilestored64(int t, uint8_t *to, int64_t stride) {
    if (!usable(t)) return 1;
    count(4), count(5, crosses(t, reinterpret_cast<uintptr_t>(to), stride));
    for (int i = 0; i < state.rows[t]; i++) std::memcpy(to + i * stride, state.tile[t][i], state.bytes[t]);
    return 0;
}

int hawq_emulated_tdpbuud(int c, int a, int b) { return dot<uint8_t, uint8_t>(c, a, b); }
int hawq_emulated_tdpbusd(int c, int a, int b) { return dot<uint8_t, int8_t>(c, a, b); }
int hawq_emulated_tdpbsud(int c, int a, int b) { return dot<int8_t, uint8_t>(c, a, b); }
int hawq_emulated_tdpbssd(int c, int a, int b) { return dot<int8_t, int8_t>(c, a, b); }

// The first broken rule since the last call, or null; and how many products were made, by way of `made`.
const char *hawq_emulated_failure(int64_t *made) {
    *made = products.exchange(0);
    if (configured.exchange(0) != 0) fail("a task ended without tilerelease");
    return failure.exchange(nullptr);
}

void hawq_emulated_counts(int64_t *taken) {
    for (int i = 0; i < 7; i++) taken[i] = counts[i].exchange(0);
}

}
