// Causal attention of new slots over their whole row, in one pass and without a score matrix:
// out = softmax(<Q, K> / sqrt(e)) V, a slot seeing every key whose index is at most its position.
//
// queries       [b, h, n, e] T, rotated, with h = k * group
// keys, values  [b, k, l, e] T, finite also where no slot sees them; query head j reads key head
//               j / group
// positions     [r, n] int64, 0 or more; r is 1 where all sequences are alike, else b
//               (per_sequence is 1)
// out           [b, h, n, e] T
//
// e is even and at most WARP * CHANNELS.
//
// Launch: grid (ceil(group * n / TILE_ROWS), k, b), ATTENTION_WARPS * WARP threads, and
// (TILE_ROWS * e + WARP * (e + 1) + WARP * e) floats of dynamic shared memory. The queries that
// share a key head are one list of group * n rows, and a block takes TILE_ROWS of them, so that a
// tile of keys is fetched once for all heads of the group. A warp takes ROWS rows. Keys and values
// come in tiles of 32: for the scores a lane takes one key, for the sums it takes the channels
// lane, lane + 32, lane + 64 and lane + 96.
// Rounding: scores, weights and sums are float32, and the result is rounded to T once.

constexpr int ATTENTION_WARPS = 4, ROWS = 4, CHANNELS = 4;
constexpr int TILE_ROWS = ATTENTION_WARPS * ROWS;
constexpr float LEAST = -3.0e38f;  // below every score, and finite, so that no difference is NaN

template <typename T>
__global__ void __launch_bounds__(ATTENTION_WARPS * WARP) attention(
    const T* __restrict__ queries, const T* __restrict__ keys, const T* __restrict__ values,
    const long long* __restrict__ positions, T* __restrict__ out, int group, int n, int l, int e,
    int per_sequence) {
    DYNAMIC_SHARED(float, tile_q);                  // [TILE_ROWS, e]
    float* const tile_k = tile_q + TILE_ROWS * e;   // [WARP, e + 1], odd: lanes hit all banks
    float* const tile_v = tile_k + WARP * (e + 1);  // [WARP, e]
    const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
    const int first = blockIdx.x * TILE_ROWS, rows = group * n;
    const long long head = static_cast<long long>(blockIdx.z) * gridDim.y + blockIdx.y;
    queries += head * rows * e;
    out += head * rows * e;
    keys += head * l * e;
    values += head * l * e;
    positions += per_sequence ? static_cast<long long>(blockIdx.z) * n : 0;

    long long length = 0;  // keys that some row of the block sees
    for (int row = first; row < first + TILE_ROWS && row < rows; ++row) {
        length = max(length, min(positions[row % n] + 1, static_cast<long long>(l)));
    }
    const float scale = 1.0f / sqrtf(e);
    for (int i = threadIdx.x; i < TILE_ROWS * e; i += blockDim.x) {
        const bool inside = first + i / e < rows;
        tile_q[i] = inside ? scale * widen(queries[static_cast<long long>(first) * e + i]) : 0.0f;
    }

    float highest[ROWS], total[ROWS], sum[ROWS][CHANNELS];  // total: this lane's part of the keys
    long long position[ROWS];
    for (int r = 0; r < ROWS; ++r) {
        const int row = first + warp * ROWS + r;
        position[r] = row < rows ? positions[row % n] : -1;
        highest[r] = LEAST;
        total[r] = 0.0f;
        for (int c = 0; c < CHANNELS; ++c) {
            sum[r][c] = 0.0f;
        }
    }

    for (int start = 0; start < length; start += WARP) {
        __syncthreads();  // the tile before has been read
        for (int i = threadIdx.x; i < WARP * e; i += blockDim.x) {
            const int key = i / e;
            const bool inside = start + key < l;
            const long long at = static_cast<long long>(start) * e + i;
            tile_k[key * (e + 1) + i % e] = inside ? widen(keys[at]) : 0.0f;
            tile_v[i] = inside ? widen(values[at]) : 0.0f;
        }
        __syncthreads();

        float weight[ROWS] = {};
        for (int c = 0; c < e; ++c) {
            const float k = tile_k[lane * (e + 1) + c];
            for (int r = 0; r < ROWS; ++r) {
                weight[r] += tile_q[(warp * ROWS + r) * e + c] * k;
            }
        }
        for (int r = 0; r < ROWS; ++r) {
            const bool visible = start + lane <= position[r];
            const float score = visible ? weight[r] : LEAST;
            const float now = fmaxf(highest[r], warp_max(score));
            const float fade = expf(highest[r] - now);  // what was summed under a lower maximum
            weight[r] = visible ? expf(score - now) : 0.0f;
            total[r] = total[r] * fade + weight[r];
            highest[r] = now;
            for (int c = 0; c < CHANNELS; ++c) {
                sum[r][c] *= fade;
            }
        }
        for (int key = 0; key < WARP; ++key) {
            float v[CHANNELS];
            for (int c = 0; c < CHANNELS; ++c) {
                v[c] = lane + WARP * c < e ? tile_v[key * e + lane + WARP * c] : 0.0f;
            }
            for (int r = 0; r < ROWS; ++r) {
                const float w = __shfl_sync(ALL_LANES, weight[r], key);
                for (int c = 0; c < CHANNELS; ++c) {
                    sum[r][c] += w * v[c];
                }
            }
        }
    }

    for (int r = 0; r < ROWS; ++r) {
        const int row = first + warp * ROWS + r;
        const float all = warp_sum(total[r]);
        for (int c = 0; c < CHANNELS; ++c) {
            const int channel = lane + WARP * c;
            if (row < rows && channel < e) {
                out[static_cast<long long>(row) * e + channel] = narrow<T>(sum[r][c] / all);
            }
        }
    }
}
