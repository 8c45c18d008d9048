// Copy device memory with the widest accesses that both pointers allow: dst[i] = src[i].
//
// Nothing is computed, so its time is that of moving the bytes: a roof for memory-bound kernels, through the same
// launch path and in the same access pattern (16-byte words, WORDS loads in flight per thread before its first store).
#include "stattn.h"

namespace stattn {
namespace {

constexpr int THREADS = 256;
constexpr int WORDS = 4;  // per thread

template <typename Word>
__global__ void __launch_bounds__(THREADS)
copy_words(const Word* __restrict__ src, Word* __restrict__ dst, int64_t words, int rest) {
    const int64_t first = int64_t{blockIdx.x} * (THREADS * WORDS);
    const int64_t mine = first + threadIdx.x;
    if (first + THREADS * WORDS <= words) {
        Word held[WORDS];
#pragma unroll
        for (int i = 0; i < WORDS; ++i) held[i] = src[mine + i * THREADS];
#pragma unroll
        for (int i = 0; i < WORDS; ++i) dst[mine + i * THREADS] = held[i];
    } else {
#pragma unroll 1
        for (int64_t word = mine; word < words; word += THREADS) dst[word] = src[word];
    }

    // Fewer bytes than a word are left at the end.
    if (blockIdx.x == 0 && threadIdx.x < rest) {
        const auto* from = reinterpret_cast<const unsigned char*>(src + words);
        reinterpret_cast<unsigned char*>(dst + words)[threadIdx.x] = from[threadIdx.x];
    }
}

template <typename Word>
cudaError_t launch(const void* src, void* dst, int64_t bytes, cudaStream_t stream) {
    const int64_t words = bytes / int64_t{sizeof(Word)};
    const int rest = static_cast<int>(bytes % int64_t{sizeof(Word)});
    const int64_t blocks = words == 0 ? 1 : (words + THREADS * WORDS - 1) / (THREADS * WORDS);
    if (blocks > INT32_MAX) return cudaErrorInvalidConfiguration;
    copy_words<<<static_cast<unsigned>(blocks), THREADS, 0, stream>>>(
        static_cast<const Word*>(src), static_cast<Word*>(dst), words, rest);
    return cudaGetLastError();
}

}  // namespace

cudaError_t copy_bytes(const void* src, void* dst, int64_t bytes, cudaStream_t stream) {
    if (bytes == 0) return cudaSuccess;
    const auto address = reinterpret_cast<uintptr_t>(src) | reinterpret_cast<uintptr_t>(dst);
    if (address % sizeof(uint4) == 0) return launch<uint4>(src, dst, bytes, stream);
    if (address % sizeof(uint32_t) == 0) return launch<uint32_t>(src, dst, bytes, stream);
    if (address % sizeof(uint16_t) == 0) return launch<uint16_t>(src, dst, bytes, stream);
    return launch<uint8_t>(src, dst, bytes, stream);
}

}  // namespace stattn
