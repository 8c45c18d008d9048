// Hopper's own instructions: barriers in shared memory, tensor copies, matrix products, register budgets.
//
// Shared memory is named by 32-bit addresses throughout. Each function is one instruction or the loop around it.
#pragma once

#include <cstdint>

#include <cuda.h>

#include "wgmma.cuh"

namespace stattn::sm90 {

__device__ __forceinline__ uint32_t shared_address(const void* pointer) {
    return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

// mbarrier: a phase ends when `count` arrivals and all announced bytes are in.

__device__ __forceinline__ void barrier_init(uint32_t barrier, uint32_t count) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(count) : "memory");
}

// Makes initialised barriers visible to the tensor copies.
__device__ __forceinline__ void barrier_init_fence() {
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

__device__ __forceinline__ void barrier_arrive(uint32_t barrier) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}

__device__ __forceinline__ void barrier_expect(uint32_t barrier, uint32_t bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}

// Waits for the end of the phase of this parity. Before the first phase, that of parity 1 counts as ended.
__device__ __forceinline__ void barrier_wait(uint32_t barrier, uint32_t parity) {
    uint32_t done;
    do {
        asm volatile(
            "{\n.reg .pred p;\n"
            "mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\n"
            "selp.u32 %0, 1, 0, p;\n}\n"
            : "=r"(done)
            : "r"(barrier), "r"(parity)
            : "memory");
    } while (!done);
}

// Named barriers.

__device__ __forceinline__ void named_sync(uint32_t id, uint32_t threads) {
    asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

// The same, and tells all whether any of them says so.
__device__ __forceinline__ bool named_any(uint32_t id, uint32_t threads, bool mine) {
    uint32_t any;
    asm volatile(
        "{\n.reg .pred mine, any;\nsetp.ne.u32 mine, %3, 0;\nbar.red.or.pred any, %1, %2, mine;\nselp.u32 %0, 1, 0, any;\n}"
        : "=r"(any)
        : "r"(id), "r"(threads), "r"(static_cast<uint32_t>(mine))
        : "memory");
    return any != 0;
}

__device__ __forceinline__ void named_arrive(uint32_t id, uint32_t threads) {
    asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

// Registers.

template <int COUNT>
__device__ __forceinline__ void registers_grow() {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(COUNT));
}

template <int COUNT>
__device__ __forceinline__ void registers_shrink() {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(COUNT));
}

// Tensor copies.

// How long a line should stay in the L2 cache: the operands that createpolicy would compute.
constexpr uint64_t EVICT_FIRST = 0x12F0000000000000ull;
constexpr uint64_t EVICT_LAST = 0x14F0000000000000ull;

__device__ __forceinline__ void map_prefetch(const CUtensorMap* map) {
    asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory");
}

// Brings a box to shared memory; what lies outside the tensor is 0, and the barrier gets the bytes of the whole box.
__device__ __forceinline__ void copy_in(uint32_t to, const CUtensorMap* map, uint32_t barrier, uint64_t policy, int c0,
                                        int c1, int c2, int c3, int c4) {
    asm volatile(
        "cp.async.bulk.tensor.5d.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint"
        " [%0], [%1, {%4, %5, %6, %7, %8}], [%2], %3;" ::"r"(to),
        "l"(map), "r"(barrier), "l"(policy), "r"(c0), "r"(c1), "r"(c2), "r"(c3), "r"(c4)
        : "memory");
}

// Brings bytes that lie one behind the other, a multiple of 16.
__device__ __forceinline__ void copy_in_line(uint32_t to, const void* from, uint32_t bytes, uint32_t barrier) {
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(to),
                 "l"(from), "r"(bytes), "r"(barrier)
                 : "memory");
}

// Takes a box from shared memory to the tensor; what lies outside the tensor is not written.
__device__ __forceinline__ void copy_out(const CUtensorMap* map, uint32_t from, uint64_t policy, int c0, int c1, int c2,
                                         int c3, int c4) {
    asm volatile(
        "cp.async.bulk.tensor.5d.global.shared::cta.bulk_group.L2::cache_hint"
        " [%0, {%3, %4, %5, %6, %7}], [%1], %2;" ::"l"(map),
        "r"(from), "l"(policy), "r"(c0), "r"(c1), "r"(c2), "r"(c3), "r"(c4)
        : "memory");
}

// Adds a box in shared memory to the tensor; what lies outside the tensor is left alone.
__device__ __forceinline__ void copy_add(const CUtensorMap* map, uint32_t from, int c0, int c1, int c2, int c3,
                                         int c4) {
    asm volatile(
        "cp.reduce.async.bulk.tensor.5d.global.shared::cta.add.tile.bulk_group [%0, {%2, %3, %4, %5, %6}], [%1];" ::
            "l"(map),
        "r"(from), "r"(c0), "r"(c1), "r"(c2), "r"(c3), "r"(c4)
        : "memory");
}

// Adds floats that lie one behind the other, a multiple of 16 bytes.
__device__ __forceinline__ void copy_add_line(float* to, uint32_t from, uint32_t bytes) {
    asm volatile("cp.reduce.async.bulk.global.shared::cta.bulk_group.add.f32 [%0], [%1], %2;" ::"l"(to), "r"(from),
                 "r"(bytes)
                 : "memory");
}

__device__ __forceinline__ void copy_out_commit() {
    asm volatile("cp.async.bulk.commit_group;" ::: "memory");
}

// Waits until the committed copies have read shared memory.
__device__ __forceinline__ void copy_out_wait_read() {
    asm volatile("cp.async.bulk.wait_group.read 0;" ::: "memory");
}

// Waits until the committed copies are done.
__device__ __forceinline__ void copy_out_wait() {
    asm volatile("cp.async.bulk.wait_group 0;" ::: "memory");
}

// Makes this thread's ordinary writes to shared memory visible to the tensor copies and the matrix products.
__device__ __forceinline__ void proxy_fence() {
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

// Orders what tensor copies do to global memory and ordinary accesses of it.
__device__ __forceinline__ void global_proxy_fence() {
    asm volatile("fence.proxy.async.global;" ::: "memory");
}

__device__ __forceinline__ int load_acquire(const int* from) {
    int value;
    asm volatile("ld.acquire.gpu.global.s32 %0, [%1];" : "=r"(value) : "l"(from) : "memory");
    return value;
}

__device__ __forceinline__ void store_release(int* to, int value) {
    asm volatile("st.release.gpu.global.s32 [%0], %1;" ::"l"(to), "r"(value) : "memory");
}

// Matrix products.

// Describes an operand in shared memory: rows of 128 bytes, swizzled in groups of eight rows (1,024 bytes), as a tensor
// copy with a box of 128-byte rows leaves them. chunk: the bytes between chunks of 64 columns; matters N-major only.
__device__ __forceinline__ uint64_t operand(uint32_t address, uint32_t chunk) {
    const uint64_t swizzle_128 = uint64_t{1} << 62;
    const uint64_t group = uint64_t{1024 >> 4} << 32;
    return swizzle_128 | group | (uint64_t{chunk >> 4} << 16) | ((address & 0x3FFFF) >> 4);
}

// The same, `bytes` further on. The upper half stays what it is, which the compiler would not see in a sum of 64 bits.
__device__ __forceinline__ uint64_t operand_at(uint64_t operand, uint32_t bytes) {
    return operand + (bytes >> 4);
}

__device__ __forceinline__ void mma_fence() {
    asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}

__device__ __forceinline__ void mma_commit() {
    asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}

template <int PENDING>
__device__ __forceinline__ void mma_wait() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(PENDING) : "memory");
}

// Keeps the compiler from moving uses of a result above the wait for it.
template <int COUNT>
__device__ __forceinline__ void pin(float (&c)[COUNT]) {
#pragma unroll
    for (int i = 0; i < COUNT; ++i) asm volatile("" : "+f"(c[i])::"memory");
}

// Elements.

__device__ __forceinline__ float exp2_approx(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

// Rounds two numbers and puts the first into the lower half.
template <typename Element>
__device__ __forceinline__ uint32_t pack(float low, float high);

template <>
__device__ __forceinline__ uint32_t pack<__nv_bfloat16>(float low, float high) {
    uint32_t both;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(high), "f"(low));
    return both;
}

template <>
__device__ __forceinline__ uint32_t pack<__half>(float low, float high) {
    uint32_t both;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(high), "f"(low));
    return both;
}

// Stores four 8x8 matrices of 16-bit elements; lane l gives the address of row l % 8 of matrix l / 8.
__device__ __forceinline__ void store_matrices(uint32_t address, uint32_t a, uint32_t b, uint32_t c, uint32_t d) {
    asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(address), "r"(a), "r"(b),
                 "r"(c), "r"(d)
                 : "memory");
}

}  // namespace stattn::sm90
