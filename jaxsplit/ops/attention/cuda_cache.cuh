// Heads in a cache, of type `Stored`.

struct Cache {
  Stored *keys, *values;           // [pages, heads, PAGE, width]
  float *key_scale, *value_scale;  // [pages, heads, PAGE], of 8-bit caches
};

constexpr bool CODES = sizeof(Stored) == 1;

// Has the order of magnitudes, with NaN above infinity.
__device__ inline u32 magnitude(float x) { return float_bits(x) & 0x7fffffffu; }

// Of the elements of a head whose largest magnitude is `most`.
__device__ inline float scale_of(u32 most) { return CODES ? bits_float(most) / 127 : 1; }

__device__ inline void store_scaled(Half* y, float x, float) { store(y, x); }
__device__ inline void store_scaled(Bfloat16* y, float x, float) { store(y, x); }
__device__ inline void store_scaled(Int8* y, float x, float scale) {
  y->value = (signed char)(int)floorf(x / (scale > 0 ? scale : 1) + 0.5f);
}

// The column that a column is rotated with; itself if it is not rotated.
__device__ inline int partner(int column) {
  if (column >= ROPE_DIM) return column;
  if (INTERLEAVED) return column ^ 1;
  return column < ROPE_DIM / 2 ? column + ROPE_DIM / 2 : column - ROPE_DIM / 2;
}
