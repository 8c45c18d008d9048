// Tensor maps are encoded by the driver, which is asked for its entry point: the library links no libcuda.
#include "tensor_map.h"

#include <algorithm>
#include <cstring>
#include <numeric>

namespace stattn {
namespace {

using Encode = decltype(&cuTensorMapEncodeTiled);

Encode find_encode() {
    void* entry = nullptr;
    cudaDriverEntryPointQueryResult found{};
    const cudaError_t error =
        cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &entry, 12000, cudaEnableDefault, &found);
    return error == cudaSuccess && found == cudaDriverEntryPointSuccess ? reinterpret_cast<Encode>(entry) : nullptr;
}

// All that a map depends on; compared byte by byte, so without padding.
struct Key {
    const void* data;
    int64_t batch_stride, token_stride, head_stride;
    int32_t elements, batch, heads, head_dim, shape[3], box[3], steps[3], unused;
};
static_assert(sizeof(Key) == 4 * 8 + 14 * 4);

uint64_t hash(const Key& key) {
    uint64_t words[sizeof(Key) / 8];
    std::memcpy(words, &key, sizeof words);
    uint64_t mixed = 0;
    for (const uint64_t word : words) mixed = (mixed ^ word) * 0x9E3779B97F4A7C15ull, mixed ^= mixed >> 29;
    return mixed;
}

const Encode& encoder() {
    static const Encode found = find_encode();
    return found;
}

cudaError_t encode(const Key& key, TensorMap* result) {
    if (encoder() == nullptr) return cudaErrorNotSupported;
    const int64_t element = key.elements == FP32 ? 4 : 2;
    // Every head of every batch is a whole number of these steps away from the first.
    int64_t step = std::gcd(key.batch > 1 ? key.batch_stride : 0, key.heads > 1 ? key.head_stride : 0);
    if (step == 0) step = 16 / element;
    const int64_t batch_step = key.batch > 1 ? key.batch_stride / step : 0;
    const int64_t head_step = key.heads > 1 ? key.head_stride / step : 0;
    const int64_t places = (key.batch - 1) * batch_step + (key.heads - 1) * head_step + 1;
    if (places > INT32_MAX) return cudaErrorInvalidValue;
    result->batch_step = static_cast<int>(batch_step);
    result->head_step = static_cast<int>(head_step);

    const auto& [t, h, w] = key.shape;
    const cuuint64_t sizes[5] = {static_cast<cuuint64_t>(key.head_dim), static_cast<cuuint64_t>(w),
                                 static_cast<cuuint64_t>(h), static_cast<cuuint64_t>(t),
                                 static_cast<cuuint64_t>(places)};
    // An axis of one place has a stride that is never used; it must be valid all the same.
    const int64_t token = key.token_stride * element;
    const cuuint64_t strides[4] = {static_cast<cuuint64_t>(token), static_cast<cuuint64_t>(h > 1 ? token * w : token),
                                   static_cast<cuuint64_t>(t > 1 ? token * w * h : token),
                                   static_cast<cuuint64_t>(step * element)};
    // The extent of a box is that of what it steps over.
    cuuint32_t box[5] = {static_cast<cuuint32_t>(128 / element), 1, 1, 1, 1}, every[5] = {1, 1, 1, 1, 1};
    for (int axis = 0; axis < 3; ++axis) {
        if (key.box[axis] == 1) continue;
        box[3 - axis] = static_cast<cuuint32_t>(key.box[axis] * key.steps[axis]);
        every[3 - axis] = static_cast<cuuint32_t>(key.steps[axis]);
    }
    constexpr CUtensorMapDataType TYPES[] = {CU_TENSOR_MAP_DATA_TYPE_FLOAT16, CU_TENSOR_MAP_DATA_TYPE_BFLOAT16,
                                             CU_TENSOR_MAP_DATA_TYPE_FLOAT32};
    const CUresult status = encoder()(
        &result->map, TYPES[key.elements], 5, const_cast<void*>(key.data), sizes, strides, box, every,
        CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
        CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
    return status == CUDA_SUCCESS ? cudaSuccess : cudaErrorInvalidValue;
}

}  // namespace

cudaError_t tensor_map(const Strided& tensor, Elements elements, int batch, int heads, int head_dim,
                       const int (&shape)[3], const int (&box)[3], const int (&steps)[3], TensorMap* result) {
    constexpr int KEPT = 256;  // a power of two
    struct Entry {
        Key key;
        TensorMap map;
    };
    alignas(64) thread_local Entry kept[KEPT];  // zeros at first: no key is zero
    Key key{tensor.data, tensor.batch, tensor.token, tensor.head, elements, batch, heads, head_dim, {}, {}, {}, 0};
    std::copy_n(shape, 3, key.shape);
    std::copy_n(box, 3, key.box);
    std::copy_n(steps, 3, key.steps);
    Entry& entry = kept[hash(key) % KEPT];
    if (std::memcmp(&entry.key, &key, sizeof key) != 0) {
        const cudaError_t error = encode(key, &entry.map);
        if (error != cudaSuccess) {
            entry.key = Key{};
            return error;
        }
        entry.key = key;
    }
    *result = entry.map;
    return cudaSuccess;
}

cudaError_t stats_map(const AttentionStats& stats, int which, int heads, int part, const int (&box)[3],
                      const int (&steps)[3], CUtensorMap* result) {
    if (encoder() == nullptr) return cudaErrorNotSupported;
    const cuuint64_t rows = stats.rows(), line = stats.line_width(), width = stats.class_width();
    const bool video = part == 0;
    const int count = part == 1 ? stats.before : stats.after;
    const int64_t first = part == 0   ? AttentionStats::padded(stats.before)
                          : part == 1 ? 0
                                      : rows - AttentionStats::padded(stats.after);
    const auto size = [](int extent) { return static_cast<cuuint64_t>(extent); };
    const cuuint64_t sizes[5] = {video ? width : size(count), size(video ? stats.step : 1),
                                 size(video ? stats.shape[1] : 1), size(video ? stats.shape[0] : 1), size(heads)};
    const cuuint64_t strides[4] = {4 * width, 4 * line, 4 * line * stats.shape[1], 4 * rows};
    cuuint32_t extents[5] = {static_cast<cuuint32_t>(box[2]), 1, 1, 1, 1}, every[5] = {1, 1, 1, 1, 1};
    for (int axis = 0; axis < 2; ++axis) {
        if (box[axis] == 1) continue;
        extents[3 - axis] = static_cast<cuuint32_t>(box[axis] * steps[axis]);
        every[3 - axis] = static_cast<cuuint32_t>(steps[axis]);
    }
    const CUresult status = encoder()(
        result, CU_TENSOR_MAP_DATA_TYPE_FLOAT32, 5, stats.data + which * heads * rows + first, sizes, strides, extents,
        every, CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_NONE, CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
        CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
    return status == CUDA_SUCCESS ? cudaSuccess : cudaErrorInvalidValue;
}

}  // namespace stattn
