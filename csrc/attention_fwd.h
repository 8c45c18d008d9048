// What a launch of the attention forward passes to its kernel.
#pragma once

#include <cstdint>

#include <cuda.h>

namespace stattn::attention_fwd {

// The coordinate on a tensor map's last axis: batch * batch_step + head * head_step.
struct Heads {
    int batch, head;
};

struct Parameters {
    CUtensorMap q_map, k_map, v_map, o_map;
    Heads q_x, k_x, v_x, o_x;
    float* lse;         // [B, heads, queries]
    float scale_log2;   // of the scores, times log2(e)
    int heads;          // of the queries
    int queries_per_key;  // heads that share one head of the keys
    int tiles;          // query tiles of all heads and batches
    int q_tiles[3];     // query tiles on each axis (t, h, w)
    int q_tile[3];      // extents of a query tile
    int slab[3];        // extents of a warpgroup's part of it, at most 64 rows
    int slab_step[3];   // from one warpgroup's part to the next
    int q_shape[3];     // (T, H, W) of the queries
    int64_t queries;    // T * H * W
    int keys;           // on axis w
    int boxes;          // key boxes of every query tile
    uint32_t slab_bytes, box_bytes;  // that a slab's and a box's copies bring
};

}  // namespace stattn::attention_fwd
