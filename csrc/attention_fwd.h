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
    // Global tokens: keys and values as one line of all tokens, queries and output before and after the video.
    CUtensorMap k_line, v_line, q_line[2], o_line[2];
    Heads q_x, k_x, v_x, o_x;
    float* lse;         // [B, heads, queries], or null
    float scale_log2;   // of the scores, times log2(e)
    int batch, heads;   // of the queries
    int queries_per_key;  // heads that share one head of the keys
    int tiles;          // query tiles of all heads and batches
    int tiles_per_head;  // of the video
    int line_tiles;      // of global queries, of each head; they come before all others
    int line_record;     // where their records begin in the plan
    int pieces, split_tiles;  // of each head: pieces of tiles, and the tiles that they are of
    float* partial;      // of all heads' pieces: outputs, then LSEs to base 2
    int* arrived;        // behind these: of each tile in pieces and warpgroup, how many of its pieces are done
    int q_first;         // rows of q before those of the video
    int before, after;   // global queries; 0 if q has none
    int globals;         // global keys
    int keys_before;     // of them before the video
    int global_boxes, boxes_before;  // key boxes of them
    const uint8_t* valid;  // [B, globals], which of them are real; or null
    int slab_rows;      // tokens of a slab
    int slab[3];        // extents of a warpgroup's part of a tile, at most 64 rows
    int slab_step[3];   // from one warpgroup's part to the next
    int steps[3];       // from one row of a part to the next, on each axis
    int q_shape[3];     // (T, H, W) of the queries
    int64_t queries;    // T * H * W
    int keys, boxes;    // without a plan: the keys, and the key boxes of every tile
    int box_rows;       // tokens of a key box
    uint32_t slab_bytes, box_bytes;  // that a slab's and a box's copies bring
    const int* plan;    // or null
};

// A tile's kind: what its rows are. NONE: there is no tile, heads with fewer than others have these.
enum Kind { VIDEO, BEFORE, AFTER, NONE };

// A plan is one array of int32 that is read in records of four. First, for
// each head, the record at which its tiles begin. A tile has two records: its first row (t, h, w) and its kind, and the
// record of its first box, the number of boxes, the record of its first mask record, the number of boxes with masks. A tile
// of few rows that visits many boxes is cut into pieces, tiles of their own with a part of its boxes and with kind + 4 * (1 +
// number), where `number` counts the pieces of a head. Behind the tiles of a head lie two records for each of its tiles in
// pieces, global ones included: its first row and its kind, and its first piece, the number of pieces, 0, 0. A box
// is a record: its first key (t, h, w) in the video and 0, or 0, 0, its first token in the line and 1. A mask record belongs to a box of a warpgroup
// (all boxes of the first warpgroup, then those of the next): the number of its group of masks, 0, 0, and last 0, or -1 if
// none of the warpgroup's rows sees the box, or for global keys, where a call says which are real, 1 + the number of their
// box (those before the video first), or for the video's last box in the line, behind whose keys are global ones, 1 + the
// number of all boxes of global keys. A group is a mask for each of 64 rows, counted in its own size from the plan's
// beginning. A mask has a bit for each key of a box, in 8 bytes if boxes have at most 64 keys, else in 16.

}  // namespace stattn::attention_fwd
