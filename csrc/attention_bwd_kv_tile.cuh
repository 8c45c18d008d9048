// Key tiles of the attention backward: what their kernel is told, where they lie in memory and what they visit.
#pragma once

#include <cstdint>

#include "attention_bwd.h"
#include "sm90.cuh"

namespace stattn::attention_bwd {

using namespace sm90;
using attention_fwd::Heads;
using attention_fwd::VIDEO;

constexpr int GROUPS = 2;  // consumer warpgroups
constexpr int SLAB = 64;   // keys of a warpgroup
constexpr int KEYS = GROUPS * SLAB;

// In place of the number of a group of masks: no key of the warpgroup sees anything of the box, or all see it whole.
constexpr int UNSEEN = -1, UNMASKED = -2;

// A part of the queries or keys: that of the video, or of global tokens before or after it.
constexpr int PARTS = 3;

struct KvParameters {
    CUtensorMap q[PARTS], dout[PARTS], stats[2][PARTS], dq[PARTS];
    CUtensorMap k[PARTS], v[PARTS], dk[PARTS], dv[PARTS];
    Heads q_x, dout_x, k_x, v_x, dk_x, dv_x;
    float scale, scale_log2;  // of the scores; the same times log2(e)
    int batch, heads, key_heads;
    int queries_per_key;  // heads that share one head of the keys
    int tiles_per_head, line_tiles, line_record;
    int boxes;                // without a plan: the boxes of every tile
    int whole_tiles, split;   // and how many tiles are not cut, and the pieces of each of those behind them
    int slab_rows;            // keys of a slab
    int slab_step[3];         // from the first warpgroup's keys to the second's
    int k_size[PARTS][3];     // extents of the keys' parts
    int slab[3], steps[3];    // extents of a slab, and the distance of its keys
    int stats_step, class_width;
    int box_rows;             // queries of a box
    bool by_warp;             // whether 16 rows after another are boxes themselves
    int warp_place[8][3];     // if so, where they begin, counted from the box
    uint32_t slab_bytes, box_bytes, stats_bytes;  // that copies bring
    const int* plan;          // or null
    const uint8_t* valid;     // [B, globals], which global keys are real; or null
    int keys_before, globals;
    int head_dim, pieces;
    bool in_boxes;   // whether dQ's sums are [B * heads][boxes][warpgroups, warps][8 chunks][lanes][4], else rows
    float* sums;
    int* turns;      // where key tiles add to dQ in their order: how many tiles have begun, 3 unused, then of each box and
                     // warpgroup the next tile's number; else null
    int head_boxes, first_box[PARTS], boxes_along[3];  // of queries of a head, in all and by parts
    uint32_t by_extent[3], by_rows;  // what divides by a box's extents and rows, see divided()
    Together together;  // of lists
    float* partial;  // [B][key heads][pieces][dK, dV][128 keys][head_dim], of tiles in pieces
};

// How dQ comes about: elsewhere; by sums in memory in any order; by sums in the order of key tiles.
enum class Dq { ELSEWHERE, ANY_ORDER, IN_ORDER };

// How tiles see queries: all; those of a plan, for both warpgroups together; or of a plan of lists, each its own where
// these are strangers to each other, which is a shape of its own.
enum class Sees { ALL, PLANNED, LISTED, APART };

template <typename Element_, int D_, int BQ_, Sees SEES, Dq DQ>
struct KvShape {
    using Element = Element_;
    static constexpr int D = D_;    // columns computed; the tensors may have fewer
    static constexpr int BQ = BQ_;  // queries of a box
    static constexpr bool PLANNED = SEES != Sees::ALL;
    static constexpr bool LISTED = SEES == Sees::LISTED;
    static constexpr bool APART = SEES == Sees::APART;
    using Apart = KvShape<Element_, D_, BQ_, Sees::APART, DQ>;  // of strangers
    static constexpr bool FUSED = DQ != Dq::ELSEWHERE;
    static constexpr bool IN_ORDER = DQ == Dq::IN_ORDER;
    static constexpr bool CUT = !PLANNED && DQ == Dq::ANY_ORDER;  // whether the last tiles may be in pieces
    // Boxes come from memory, not from the L2, where lists are strangers to each other: as many stages as there is room for.
    static constexpr int RINGS = APART ? GROUPS : 1;
    static constexpr int STAGES = FUSED ? 2 : 4 / RINGS;
    // What the producer writes down about a box is read until the end of the box behind it.
    static constexpr int NOTES = 2 * STAGES;
    static constexpr int THREADS = 128 * (GROUPS + 1);
    static constexpr int CHUNKS = D / 64;
    static constexpr uint32_t SLAB_CHUNK = SLAB * 128;
    static constexpr uint32_t TILE_CHUNK = KEYS * 128;
    static constexpr uint32_t TILE = CHUNKS * TILE_CHUNK;
    static constexpr uint32_t BOX_CHUNK = BQ * 128;
    static constexpr uint32_t BOX = CHUNKS * BOX_CHUNK;
    static constexpr int DS_CHUNKS = BQ / 64;
    static constexpr uint32_t DS_CHUNK = KEYS * 128;  // 64 queries of all keys
    static constexpr uint32_t DS = DS_CHUNKS * DS_CHUNK;
    static constexpr uint32_t STAGED = 64 * 64 * 4;  // a warpgroup's part of dQ
    static constexpr int STAGINGS = IN_ORDER ? 2 : 1;  // of them, while they wait for their turns
    static constexpr uint32_t K_AT = 0;
    static constexpr uint32_t V_AT = K_AT + TILE;
    static constexpr uint32_t Q_AT = V_AT + TILE;
    static constexpr uint32_t DO_AT = Q_AT + RINGS * STAGES * BOX;
    static constexpr uint32_t DS_AT = DO_AT + RINGS * STAGES * BOX;
    static constexpr uint32_t STAGED_AT = DS_AT + (FUSED ? 2 * DS : 0);
    static constexpr uint32_t STATS_AT = STAGED_AT + (FUSED ? STAGINGS * GROUPS * STAGED : 0);  // of all stages: L, then delta
    static constexpr uint32_t STATS = BQ * 4;
    static constexpr uint32_t MASKS_AT = STATS_AT + RINGS * 2 * STAGES * STATS;  // of all stages and warpgroups
    static constexpr uint32_t MASK = BQ / 8;  // bytes, of a key
    static constexpr uint32_t MASKS = SLAB * MASK;
    static constexpr uint32_t NOTES_AT = MASKS_AT + (PLANNED ? RINGS * STAGES * GROUPS * MASKS : 0);
    static constexpr uint32_t NOTE = 32;
    static constexpr uint32_t UNREAD_AT = NOTES_AT + RINGS * NOTES * NOTE;  // where dS goes that is of no key
    static constexpr uint32_t BARRIERS_AT = UNREAD_AT + 128;
    static constexpr uint32_t TILE_AT = BARRIERS_AT + 8 * (RINGS * 4 * STAGES + 3 + (IN_ORDER ? 2 * STAGINGS * GROUPS : 0));
    // With the tile's number, where they are drawn, or the boxes that each warpgroup sees of lists.
    static constexpr uint32_t SHARED = TILE_AT + 4 * (LISTED || APART ? GROUPS : 1);
    static constexpr uint32_t LAUNCHED = SHARED;
    // setmaxnreg shares out what the launch allocated: more would wait for ever.
    static constexpr int CONSUMER_REGISTERS = 240;
    static constexpr int PRODUCER_REGISTERS = 24;
    static_assert(D % 64 == 0 && (D == 64 ? BQ == 128 : BQ == 64));  // dQ is 2 x (64 x 64)
    static_assert(LAUNCHED <= 232448 && (FUSED ? !LISTED && !APART : true));

    // Addresses of barriers, from that of a ring's first or, from full_k on, of the first ring's.
    static constexpr uint32_t RING_BARRIERS = 8 * 4 * STAGES;
    __device__ static uint32_t full_q(uint32_t base, int stage) { return base + 8 * stage; }
    __device__ static uint32_t empty_q(uint32_t base, int stage) { return base + 8 * (STAGES + stage); }
    __device__ static uint32_t full_do(uint32_t base, int stage) { return base + 8 * (2 * STAGES + stage); }
    __device__ static uint32_t empty_do(uint32_t base, int stage) { return base + 8 * (3 * STAGES + stage); }
    __device__ static uint32_t full_k(uint32_t base) { return base + RINGS * RING_BARRIERS; }
    __device__ static uint32_t full_v(uint32_t base) { return base + RINGS * RING_BARRIERS + 8; }
    __device__ static uint32_t ready_ds(uint32_t base) { return base + RINGS * RING_BARRIERS + 16; }
    __device__ static uint32_t full_dq(uint32_t base, int group, int staging) {
        return base + RINGS * RING_BARRIERS + 8 * (3 + STAGINGS * group + staging);
    }
    __device__ static uint32_t empty_dq(uint32_t base, int group, int staging) {
        return full_dq(base, GROUPS + group, staging);
    }
};

// A key tile: its first key, and what it visits.
struct KeyTile {
    int t, h, w, kind;
    int batch, head;  // of the keys
    int number;       // among the tiles of a head, or of its lines
    bool line;
    int piece;        // or -1
    int first, steps;  // without a plan: the part of all boxes that it visits
};

__device__ __forceinline__ int4 record_at(const KvParameters& p, int number) {
    return __ldg(reinterpret_cast<const int4*>(p.plan) + number);
}

// The record of a tile in the list of a query head; the next one says what it visits.
__device__ __forceinline__ int tile_record(const KvParameters& p, const KeyTile& tile, int head) {
    return (tile.line ? p.line_record : __ldg(p.plan + head)) + 2 * tile.number;
}

template <typename S>
__device__ __forceinline__ KeyTile tile_at(const KvParameters& p, int index) {
    KeyTile tile{};
    tile.piece = -1;
    if constexpr (!S::PLANNED) {
        tile.steps = p.boxes * p.queries_per_key;
        if (S::CUT && index >= p.whole_tiles) {
            tile.piece = index - p.whole_tiles;
            const int each = (tile.steps + p.split - 1) / p.split, part = tile.piece % p.split;
            index = p.whole_tiles + tile.piece / p.split;
            tile.first = part * each;
            tile.steps = min(each, tile.steps - tile.first);
        }
    }
    const int in_lines = S::PLANNED ? p.line_tiles * p.key_heads * p.batch : 0;
    tile.line = index < in_lines;
    const int per_head = tile.line ? p.line_tiles : p.tiles_per_head;
    if (!tile.line) index -= in_lines;
    tile.number = index % per_head;
    tile.head = index / per_head % p.key_heads;
    tile.batch = index / per_head / p.key_heads;
    if constexpr (S::PLANNED) {
        const int4 place = record_at(p, tile_record(p, tile, tile.head * p.queries_per_key));
        tile.t = place.x, tile.h = place.y, tile.w = place.z;
        tile.kind = place.w & 3, tile.piece = (place.w >> 2) - 1;
    } else {
        tile.w = tile.number * KEYS;
    }
    return tile;
}

// The number of the block's tile. Where tiles wait for each other they are drawn, so that those before are under way.
template <typename S>
__device__ __forceinline__ int tile_number(uint32_t shared) {
    if constexpr (!S::IN_ORDER) return blockIdx.x;
    int number;
    asm volatile("ld.shared.s32 %0, [%1];" : "=r"(number) : "r"(shared + S::TILE_AT));
    return number;
}

// How many boxes a warpgroup sees of lists, which the block counted.
template <typename S>
__device__ __forceinline__ int seen_boxes(uint32_t shared, int group) {
    int boxes;
    asm volatile("ld.shared.s32 %0, [%1];" : "=r"(boxes) : "r"(shared + S::TILE_AT + 4 * group));
    return boxes;
}

// The first key of a warpgroup.
struct Corner {
    int t, h, w;
};

__device__ __forceinline__ Corner corner_of(const KvParameters& p, const KeyTile& tile, int group) {
    if (tile.kind != VIDEO) return {0, 0, tile.w + group * SLAB};
    return {tile.t + group * p.slab_step[0], tile.h + group * p.slab_step[1], tile.w + group * p.slab_step[2]};
}

// Whether a row of a warpgroup is a key of the tensors that is to be seen.
template <typename S>
__device__ __forceinline__ bool real_key(const KvParameters& p, const KeyTile& tile, const Corner& corner, int row) {
    if (S::PLANNED && tile.kind == VIDEO) {
        const int plane = p.slab[1] * p.slab[2];
        const int t = corner.t + row / plane * p.steps[0], h = corner.h + row / p.slab[2] % p.slab[1] * p.steps[1];
        const int w = corner.w + row % p.slab[2] * p.steps[2];
        return row < p.slab_rows && t < p.k_size[VIDEO][0] && h < p.k_size[VIDEO][1] && w < p.k_size[VIDEO][2];
    }
    const int key = corner.w + row;
    if (key >= p.k_size[tile.kind][2]) return false;
    if (!S::PLANNED || !p.valid) return true;
    const int before = tile.kind == attention_fwd::BEFORE ? 0 : p.keys_before;
    return __ldg(p.valid + int64_t{tile.batch} * p.globals + before + key);
}

}  // namespace stattn::attention_bwd
