// A deferred normalization: what the results of FACTORS rows of activations are multiplied with.
// RMS_PARTS sums of squares, of RMS_SIZE elements in all; 0 parts: there is no normalization.

__shared__ float factors[RMS_PARTS ? FACTORS : 1];

// `squares`: [rows, RMS_PARTS]; `row_of`: the row that has the `i`th factor.
template <class RowOf>
__device__ inline void find_factors(const float* squares, RowOf row_of) {
  if (!RMS_PARTS) return;
  for (int i = threadIdx.x; i < FACTORS; i += 32 * WARPS) {
    float sum = 0;
    for (int j = 0; j < RMS_PARTS; j++) sum += squares[row_of(i) * RMS_PARTS + j];
    factors[i] = inverse_root(sum / RMS_SIZE + RMS_EPSILON);
  }
  __syncthreads();
}
