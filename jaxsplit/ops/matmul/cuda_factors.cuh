// A deferred normalization: what results of each row of activations are multiplied with. RMS_PARTS
// sums of squares, of RMS_SIZE elements in all; 0 parts: there is no normalization.

__shared__ float factors[RMS_PARTS ? ROWS : 1];

// `squares`: [ROWS, RMS_PARTS].
__device__ inline void find_factors(const float* squares) {
  if (!RMS_PARTS) return;
  for (int row = threadIdx.x; row < ROWS; row += 32 * WARPS) {
    float sum = 0;
    for (int i = 0; i < RMS_PARTS; i++) sum += squares[row * RMS_PARTS + i];
    factors[row] = inverse_root(sum / RMS_SIZE + RMS_EPSILON);
  }
  __syncthreads();
}
