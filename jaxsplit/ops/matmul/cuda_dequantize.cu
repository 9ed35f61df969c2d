// Quantized matrices as plain arrays.
//
// A thread dequantizes a unit, a warp 32 neighbors, whose weights are a run of the results. They
// are put in order in shared memory: neighboring threads then store neighboring pieces, 16 bytes
// each.
//
// Rows are scaled so that their bounds become LARGEST, and those whose bound is at most LEAST_BOUND
// become zeros.

// The numbers of a piece, rounded once.
template <class T>
__device__ inline Words rounded(const float* x) {
  constexpr int OF_WORD = 4 / sizeof(T);
  Words y;
#pragma unroll
  for (int i = 0; i < 4; i++, x += OF_WORD) {
    if constexpr (OF_WORD == 1) {
      y.at[i] = float_bits(x[0]);
    } else {
      y.at[i] = pack<T>(x[0], x[1]);
      if constexpr (OF_WORD == 4) y.at[i] |= pack<T>(x[2], x[3]) << 16;
    }
  }
  return y;
}

// The weights of a warp. `bounds`: [OUT]; null: rows are not scaled.
template <class W, class T>
__device__ void dequantize_units(const W& w, const float* bounds, int program, T* y) {
  typedef Unit<W> U;
  constexpr int PIECES = U::SLICES * sizeof(T), UNITS = W::OUT * U::IN_ROW;
  static_assert(32 % U::PER_CHUNK == 0, "a warp has whole chunks");
  int lane = threadIdx.x % 32, warp = threadIdx.x / 32, first = (program * WARPS + warp) * 32;
  u32 unit = first + lane < UNITS ? first + lane : UNITS - 1, row = unit / U::IN_ROW;
  int chunk = unit % U::IN_ROW / U::PER_CHUNK, place = unit % U::PER_CHUNK;
  U own;
  own.load_codes(w, row, chunk, place);
  own.load_scales(w, row, chunk, place);
  float outer = U::outer_of(own.super_scale), outer_below = 0, factor = 1;
  if (W::MINIMUM) outer_below = U::outer_below_of(own.super_scale, own.super_minimum);
  if (bounds) {
    float bound = bounds[row];
    factor = bound > LEAST_BOUND ? LARGEST / bound : 0;
  }

  // A byte in the second byte of 2^15 counts units.
  constexpr float START = 32768 + (U::SIGNED ? 128 : W::OFFSET) + W::FRACTION;
  u32 upper = in_register(0x47000000);
  Words* staged = (Words*)dynamic_shared + warp * 32 * PIECES;
#pragma unroll
  for (int slice = 0; slice < U::SLICES; slice++) {
    u32 raw = own.scale[slice / U::SEGMENT];
    float scale = (float)W::scale_value(raw) * outer, below = 0;
    if (W::MINIMUM) below = U::minimum_of(raw, own.minimum[slice / U::SEGMENT]) * outer_below;
    float start = W::SHIFT ? START - W::SHIFT * (int)(raw & 1) : START, values[16];
#pragma unroll
    for (int k = 0; k < 4; k++) {
      u32 more = U::SECOND ? own.second[U::second_word(slice, k)] : 0;
      u32 bytes = U::bytes_of(own.first[U::first_word(slice, k)], more, slice, k, place);
      if (U::SIGNED) bytes ^= 0x80808080u;
#pragma unroll
      for (int i = 0; i < 4; i++) {
        float code = bits_float(pick_bytes(bytes, upper, 0x7404 | i << 4)) - start;
        float value = W::MINIMUM ? fmaf(code, scale, below) : code * scale;
        values[4 * k + i] = bounds ? value * factor : value;
      }
    }
    int at = U::first_weight(lane / U::PER_CHUNK, lane % U::PER_CHUNK, slice) / 16 * sizeof(T);
#pragma unroll
    for (int i = 0; i < (int)sizeof(T); i++) {
      staged[swizzled(at + i)] = rounded<T>(values + i * (16 / sizeof(T)));
    }
  }
  wait_for_warp();
  Words* to = (Words*)y + (long)first * PIECES;
#pragma unroll
  for (int i = 0; i < PIECES; i++) {
    int piece = 32 * i + lane;
    bool exists = UNITS % (32 * WARPS) == 0 || piece < (long)(UNITS - first) * PIECES;
    if (exists) to[piece] = staged[swizzled(piece)];
  }
}
