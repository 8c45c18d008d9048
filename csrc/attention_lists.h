// What a launch of attention over block lists passes to its kernels.
#pragma once

#include <cstdint>

#include "attention_fwd.h"

namespace stattn::attention_lists {

// An entry of a joined list: the key tile's place on each axis in bits of their own, and for each of the three warpgroups
// whether it sees the tile, and whether only what the mask allows of it; then whether the tile fills no whole boxes.
constexpr int ENTRY_SEES = 25, ENTRY_PARTIAL = 28, ENTRY_EDGE = 31;
struct EntryBits {
    int h, t;  // where the bits of h and t begin, behind those of w

    __device__ __forceinline__ int3 tile(int entry) const {
        return make_int3((entry & ((1 << ENTRY_SEES) - 1)) >> t, (entry & ((1 << t) - 1)) >> h, entry & ((1 << h) - 1));
    }
};

struct ListParameters {
    attention_fwd::Parameters p;
    const int4* counts;  // [samples, list heads, triples]: entries of the three lists; or of the joint one in x, and 1 in w
    const int* lists;    // [samples, list heads, triples, 3 * room]
    const int* tables;   // what is seen of boxes: see stattn/ops/_cuda_lists.py
    EntryBits entry;
    int samples, list_heads;  // of the lists: 1 stands for all
    int room;                 // entries
    int triples, blocks[3];   // of three slabs, in all and on each axis
    int block[3];             // extents of one
    int k_tile[3], box[3], parts[3], boxes;  // parts: boxes of a key tile on each axis, boxes: in all
    int products;             // of the mask
    // How blocks keep step: blocks that run at once, or 0 if they do not; of them, those that are not waited for; the clock
    // cycles that a block waits at most, for each of its boxes; and the producers that have asked for their last box.
    int processors, stragglers, patience;
    int* done;
};

struct JoinParameters {
    const int32_t *count, *index;
    const uint8_t* partial;  // or null
    int64_t count_stride[3], index_stride[4], partial_stride[4];
    int most, room;
    int list_heads, triples, blocks[3];
    int stacked;                          // the axis on which slabs lie side by side
    int slabs[3], slabs_per_tile[3], q_tiles[3];
    int k_tiles[3], k_tile[3], k_shape[3];
    bool every_box_is_short;
    EntryBits entry;
    int4* counts;
    int* lists;
    int* done;  // is set to 0
};

}  // namespace stattn::attention_lists
