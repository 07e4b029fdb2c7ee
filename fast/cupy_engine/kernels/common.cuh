// What every kernel builds on: storage types widened and narrowed, and sums over a warp or a block.
//
// T, the storage type, is float, __half or __nv_bfloat16. All arithmetic is in float32.

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#ifndef SHARED  // a host that emulates a block brings its own
#define SHARED(T, name, count) __shared__ T name[count]
#define DYNAMIC_SHARED(T, name)                                      \
    extern __shared__ __align__(16) unsigned char dynamic_shared[]; \
    T* const name = reinterpret_cast<T*>(dynamic_shared)
#endif

constexpr int WARP = 32;
constexpr int THREADS = 256;  // the most that a block has
constexpr unsigned ALL_LANES = 0xffffffffu;

__device__ inline float widen(float x) { return x; }
__device__ inline float widen(__half x) { return __half2float(x); }
__device__ inline float widen(__nv_bfloat16 x) { return __bfloat162float(x); }

template <typename T>
__device__ inline T narrow(float x);
template <>
__device__ inline float narrow<float>(float x) { return x; }
template <>
__device__ inline __half narrow<__half>(float x) { return __float2half(x); }
template <>
__device__ inline __nv_bfloat16 narrow<__nv_bfloat16>(float x) { return __float2bfloat16(x); }

// x as it would be after a stay in memory.
template <typename T>
__device__ inline float rounded(float x) { return widen(narrow<T>(x)); }

__device__ inline float sigmoid(float x) { return 1.0f / (1.0f + expf(-x)); }

// The sum, or the largest, over the 32 lanes of a warp. All lanes call, and all get it.
__device__ inline float warp_sum(float x) {
    for (int offset = WARP / 2; offset > 0; offset /= 2) {
        x += __shfl_xor_sync(ALL_LANES, x, offset);
    }
    return x;
}

__device__ inline float warp_max(float x) {
    for (int offset = WARP / 2; offset > 0; offset /= 2) {
        x = fmaxf(x, __shfl_xor_sync(ALL_LANES, x, offset));
    }
    return x;
}

// The sum over the threads of a block of whole warps. All threads call, and all get it.
//
// parts: shared, [WARP], used by no other sum of the block: a barrier between two uses is saved so.
__device__ inline float block_sum(float x, float* parts) {
    const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
    x = warp_sum(x);
    if (lane == 0) {
        parts[warp] = x;
    }
    __syncthreads();
    return warp_sum(lane < blockDim.x / WARP ? parts[lane] : 0.0f);
}
