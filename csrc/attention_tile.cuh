// Tiles of attention: their shape in shared memory, where they lie, which boxes of keys they visit, and the masks of these.
#pragma once

#include <cstdint>

#include "attention_fwd.h"
#include "sm90.cuh"

namespace stattn::attention_fwd {

using namespace sm90;

constexpr int STAGES = 2;
constexpr int ROWS = 64;  // of a warpgroup

template <typename Element_, int D_, int WARPGROUPS_, int BN_, bool PLANNED_>
struct Shape {
    using Element = Element_;
    static constexpr bool PLANNED = PLANNED_;
    static constexpr bool PIECES = PLANNED;  // whether tiles may be cut into pieces
    static constexpr int D = D_;                    // columns computed; the tensors may have fewer
    static constexpr int WARPGROUPS = WARPGROUPS_;  // consumers
    static constexpr int BN = BN_;                  // rows of a key box
    static constexpr int THREADS = 128 * (WARPGROUPS + 1);
    static constexpr int CHUNKS = D / 64;
    static constexpr uint32_t SLAB_CHUNK = ROWS * 128;
    static constexpr uint32_t SLAB = CHUNKS * SLAB_CHUNK;
    static constexpr uint32_t BOX_CHUNK = BN * 128;
    static constexpr uint32_t BOX = CHUNKS * BOX_CHUNK;
    static constexpr uint32_t Q_AT = 0;
    static constexpr uint32_t K_AT = Q_AT + WARPGROUPS * SLAB;
    static constexpr uint32_t V_AT = K_AT + STAGES * BOX;
    static constexpr uint32_t BARRIERS_AT = V_AT + STAGES * BOX;
    static constexpr uint32_t VALID = 8 * (4 * STAGES + 2 * WARPGROUPS);  // behind the barriers: which global keys are real
    static constexpr uint32_t SHARED = BARRIERS_AT + VALID;
    static constexpr uint32_t LAUNCHED = SHARED + 1024;  // room to align the start; without what depends on the call
    // setmaxnreg shares out what the launch allocated: more would wait for ever.
    static constexpr int CONSUMER_REGISTERS = WARPGROUPS == 2 ? 240 : 160;
    static constexpr int PRODUCER_REGISTERS = WARPGROUPS == 2 ? 24 : 32;
    static_assert(WARPGROUPS == 2 || WARPGROUPS == 3);
    static_assert(D % 64 == 0 && BN % 16 == 0 && BOX_CHUNK % 1024 == 0);
    static_assert(LAUNCHED <= 232448);

    // Addresses of barriers, from that of the first.
    __device__ static uint32_t full_k(uint32_t base, int stage) { return base + 8 * stage; }
    __device__ static uint32_t empty_k(uint32_t base, int stage) { return base + 8 * (STAGES + stage); }
    __device__ static uint32_t full_v(uint32_t base, int stage) { return base + 8 * (2 * STAGES + stage); }
    __device__ static uint32_t empty_v(uint32_t base, int stage) { return base + 8 * (3 * STAGES + stage); }
    __device__ static uint32_t full_q(uint32_t base, int group) { return base + 8 * (4 * STAGES + group); }
    __device__ static uint32_t empty_q(uint32_t base, int group) { return base + 8 * (4 * STAGES + WARPGROUPS + group); }
};

// A stage of a ring and the parity of its present use.
struct Turn {
    int stage = 0;
    uint32_t parity = 0;
    __device__ __forceinline__ void advance() {
        stage ^= 1;
        parity ^= stage == 0;
    }
    __device__ __forceinline__ Turn before() const { return {stage ^ 1, parity ^ (stage == 0)}; }
};
static_assert(STAGES == 2);

// A query tile, and what it visits.
struct Tile {
    int t, h, w;      // its first row
    int batch, head;  // of the queries
    int boxes, masked;  // the first `masked` have masks
    int first_box, first_mask;
    int kind;
    int piece;  // its number, or -1 for a tile that is whole
};

__device__ __forceinline__ int4 record_at(const Parameters& p, int number) {
    return __ldg(reinterpret_cast<const int4*>(p.plan) + number);
}

template <typename S>
__device__ __forceinline__ Tile tile_at(const Parameters& p, int index) {
    Tile tile{};
    const int in_lines = S::PLANNED ? p.tiles - p.heads * p.batch * p.tiles_per_head : 0;
    const bool line = index < in_lines;
    const int per_head = line ? p.line_tiles : p.tiles_per_head;
    if (!line) index -= in_lines;
    int number = index % per_head, sequence = index / per_head;
    if (S::PLANNED && p.pieces > 0) {
        // The longest pieces of all heads come first, and of these a head's side by side, which read the same keys.
        const int most = min(p.split_tiles, per_head), first = index / (most * p.heads * p.batch) * most;
        const int count = min(most, per_head - first);
        index -= first * p.heads * p.batch;
        number = first + index % count;
        sequence = index / count;
    }
    tile.head = sequence % p.heads;
    tile.batch = sequence / p.heads;
    tile.piece = -1;
    if constexpr (S::PLANNED) {
        const int first = line ? p.line_record : __ldg(p.plan + tile.head);
        const int4 place = record_at(p, first + 2 * number), list = record_at(p, first + 2 * number + 1);
        tile.t = place.x, tile.h = place.y, tile.w = place.z, tile.kind = place.w & 3, tile.piece = (place.w >> 2) - 1;
        tile.first_box = list.x, tile.boxes = list.y, tile.first_mask = list.z, tile.masked = list.w;
    } else {
        tile.w = number * S::WARPGROUPS * ROWS;
        tile.boxes = p.boxes;
    }
    return tile;
}

// Tiles of a plan are not all alike: there is a block for each, which keeps every multiprocessor busy to the end.
template <typename S>
__device__ __forceinline__ int next_tile(const Parameters& p, int index) {
    return S::PLANNED ? INT32_MAX : index + gridDim.x;
}

// The first row of a warpgroup's part of a tile.
struct Corner {
    int t, h, w;
};

template <typename S>
__device__ __forceinline__ Corner corner_of(const Parameters& p, const Tile& tile, int group) {
    if (S::PLANNED && tile.kind != VIDEO) return {0, 0, tile.w + group * ROWS};
    return {tile.t + group * p.slab_step[0], tile.h + group * p.slab_step[1], tile.w + group * p.slab_step[2]};
}

// The first of a thread's two rows in its warpgroup; the other is eight behind.
__device__ __forceinline__ int first_row() { return threadIdx.x / 32 % 4 * 16 + threadIdx.x % 32 / 4; }

// The token of a row of a warpgroup's part of a tile, or -1 if there is none.
template <typename S>
__device__ __forceinline__ int64_t token_of(const Parameters& p, const Tile& tile, const Corner& corner, int row) {
    if (S::PLANNED && tile.kind != VIDEO) {
        const int number = corner.w + row;
        if (number >= (tile.kind == BEFORE ? p.before : p.after)) return -1;
        return tile.kind == BEFORE ? number : p.queries - p.after + number;
    }
    const int plane = p.slab[1] * p.slab[2];
    const int t = corner.t + row / plane * p.steps[0], h = corner.h + row / p.slab[2] % p.slab[1] * p.steps[1];
    const int w = corner.w + row % p.slab[2] * p.steps[2];
    const bool real = row < p.slab_rows && t < p.q_shape[0] && h < p.q_shape[1] && w < p.q_shape[2];
    return real ? p.q_first + (t * p.q_shape[1] + h) * p.q_shape[2] + w : -1;
}

// Masks of a plan.

// The masks of a box for a thread's two rows: bit n of a row stands for key n.
template <typename S>
struct BoxMask {
    static constexpr int WORDS = (S::BN + 31) / 32;
    static constexpr int STORED = WORDS <= 2 ? 2 : 4;  // words
    uint32_t words[2][WORDS];

    // record: of the box's masks.
    __device__ __forceinline__ void load(const Parameters& p, uint32_t barriers, int4 record) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const int entry = record.x * ROWS + first_row() + 8 * half;
            if constexpr (STORED == 2) {
                const int2 found = __ldg(reinterpret_cast<const int2*>(p.plan) + entry);
                words[half][0] = found.x, words[half][1] = found.y;
            } else {
                const int4 found = __ldg(reinterpret_cast<const int4*>(p.plan) + entry);
                words[half][0] = found.x, words[half][1] = found.y, words[half][2] = found.z;
                if constexpr (WORDS == 4) words[half][3] = found.w;
            }
        }
        if (record.w > 0) {  // global keys, of which not all may be real
#pragma unroll
            for (int word = 0; word < WORDS; ++word) {
                uint32_t real;
                const uint32_t from = barriers + S::VALID + ((record.w - 1) * WORDS + word) * 4;
                asm volatile("ld.shared.b32 %0, [%1];" : "=r"(real) : "r"(from));
                words[0][word] &= real;
                words[1][word] &= real;
            }
        }
    }

    // Sets the scores of keys that a row does not see to -inf.
    __device__ __forceinline__ void apply(float (&scores)[S::BN / 2]) const {
#pragma unroll
        for (int half = 0; half < 2; ++half)
#pragma unroll
            for (int j = 0; j < S::BN / 8; ++j) {
                const uint32_t mine = words[half][j / 4] >> (threadIdx.x % 4 * 2);
#pragma unroll
                for (int i = 0; i < 2; ++i)
                    if (!(mine & 1u << (j % 4 * 8 + i))) scores[4 * j + 2 * half + i] = -INFINITY;
            }
    }
};

// Fills rows behind the end of key boxes with 0: no copy writes there, and a weight of 0 does not make up for a NaN.
// chunks: of 64 columns, one after the other from `first` on.
template <typename S>
__device__ __forceinline__ void clear_behind_boxes(const Parameters& p, uint32_t first, int chunks) {
    const int words = (S::BN - p.box_rows) * 32;
    for (int i = threadIdx.x; i < chunks * words; i += S::THREADS) {
        const uint32_t chunk = i / words, word = i % words;
        asm volatile("st.shared.b32 [%0], %1;" ::"r"(first + chunk * S::BOX_CHUNK + p.box_rows * 128 + word * 4), "r"(0)
                     : "memory");
    }
    proxy_fence();
}

// Writes down, a bit for a key of each box of global keys, which of them are real; and behind these of the last box of the
// video in the line, which are the video's.
template <typename S>
__device__ __forceinline__ void note_valid(const Parameters& p, uint32_t to) {
    const uint8_t* valid = p.valid + int64_t{tile_at<S>(p, blockIdx.x).batch} * p.globals;
    constexpr int WORDS = BoxMask<S>::WORDS;
    for (int i = threadIdx.x / 32; i < (p.global_boxes + 1) * WORDS; i += S::THREADS / 32) {
        const int box = i / WORDS, column = i % WORDS * 32 + threadIdx.x % 32;
        const bool early = box < p.boxes_before;
        const int key = (early ? box * p.box_rows : p.keys_before + (box - p.boxes_before) * p.box_rows) + column;
        const bool is_real = box == p.global_boxes ? column < (p.keys - p.globals) % p.box_rows
                                                   : column < p.box_rows && key < (early ? p.keys_before : p.globals) &&
                                                         __ldg(valid + key);
        const uint32_t real = __ballot_sync(0xFFFFFFFF, is_real);
        asm volatile("st.shared.b32 [%0], %1;" ::"r"(to + i * 4), "r"(real) : "memory");
    }
}

}  // namespace stattn::attention_fwd
