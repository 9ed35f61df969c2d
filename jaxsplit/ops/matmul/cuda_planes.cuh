// Quantized matrices, as threads load them (jaxsplit/quant/qtensor.py).
//
// `W` describes a matrix: constants, and pointers to its planes. A unit is what a thread loads of a
// row at a time: a chunk of the first plane if that is at most 32 bytes, else 16 bytes. A slice is
// 16 neighboring weights.

// The codes of four neighbors, their offset subtracted: borrows stay within each byte.
template <int OFFSET>
__device__ inline u32 signed_codes(u32 codes) {
  if (OFFSET == 0) return codes;
  return ((codes | 0x80808080u) - OFFSET * 0x01010101u) ^ 0x80808080u;
}

// What a table of up to 16 signed bytes, in four words, holds for four codes.
template <class W>
__device__ inline u32 look_up(u32 codes) {
  u32 digits = pick_bytes(codes | codes >> 4, 0, 0x4420);
  u32 low = pick_bytes(W::TABLE0, W::TABLE1, W::TABLE > 8 ? digits & 0x7777 : digits);
  if (W::TABLE <= 8) return low;
  u32 high = pick_bytes(W::TABLE2, W::TABLE3, digits & 0x7777);
  return pick_bytes(low, high, 0x3210 | (digits & 0x8888) >> 1);
}

template <class W>
struct Unit {
  static constexpr int PER_BYTE = 8 / W::BITS0;
  static constexpr int CHUNK_BYTES = W::CHUNK / PER_BYTE;
  static constexpr bool WHOLE = CHUNK_BYTES <= 32;
  static constexpr int BYTES = WHOLE ? CHUNK_BYTES : 16;
  static constexpr int PER_CHUNK = CHUNK_BYTES / BYTES;
  static constexpr int IN_ROW = W::COLUMNS / W::CHUNK * PER_CHUNK;
  static constexpr int SLICES = PER_BYTE * BYTES / 16;
  // Bytes of a chunk in the second plane, and words of a unit there.
  static constexpr int SECOND = W::BITS1 ? W::CHUNK * W::BITS1 / 8 : 0;
  static constexpr int SECOND_WORDS = SECOND == 0 ? 0 : !WHOLE ? 4 : SECOND / 4;
  static_assert(WHOLE || SECOND == 0 || SECOND >= 16, "a unit is in one place of the second plane");
  // Slices that share a scale are summed as integers.
  static constexpr int SEGMENT = WHOLE && W::GROUP >= 32 ? 2 : 1;
  static constexpr int SEGMENTS = SLICES / SEGMENT;
  // Neighboring segments share a scale of the activations, too.
  static constexpr int PAIR = WHOLE && SEGMENT == 1 ? 2 : 1;

  u32 first[BYTES / 4];
  u32 second[SECOND_WORDS ? SECOND_WORDS : 1];
  u32 scale[SEGMENTS], minimum[SEGMENTS], super_scale, super_minimum;

  // The first weight of a slice, given the unit's chunk and its place in the chunk.
  __device__ static int first_weight(int chunk, int place, int slice) {
    int i = slice / (BYTES / 16), j = slice % (BYTES / 16);
    return chunk * W::CHUNK + i * CHUNK_BYTES + place * BYTES + j * 16;
  }

  __device__ static int weight(int chunk, int place, int segment) {
    return first_weight(chunk, place, segment * SEGMENT);
  }

  __device__ void load_codes(const W& w, long row, int chunk, int place) {
    const char* from = (const char*)w.first + row * (W::COLUMNS / PER_BYTE);
    from += chunk * CHUNK_BYTES + place * BYTES;
#pragma unroll
    for (int i = 0; i < BYTES / 16; i++) {
      Words y = load_words(from + 16 * i);
#pragma unroll
      for (int k = 0; k < 4; k++) first[4 * i + k] = y.at[k];
    }
    if (SECOND == 0) return;
    from = (const char*)w.second + row * (W::COLUMNS / 8 * W::BITS1) + chunk * SECOND;
    if (!WHOLE) from += place * BYTES % (SECOND ? SECOND : 1);
    if (SECOND_WORDS % 4) {
#pragma unroll
      for (int i = 0; i < SECOND_WORDS; i++) second[i] = load_word(from + 4 * i);
    } else {
#pragma unroll
      for (int i = 0; i < SECOND_WORDS / 4; i++) {
        Words y = load_words(from + 16 * i);
#pragma unroll
        for (int k = 0; k < 4; k++) second[4 * i + k] = y.at[k];
      }
    }
  }

  __device__ void load_scales(const W& w, long row, int chunk, int place) {
#pragma unroll
    for (int i = 0; i < SEGMENTS; i++) {
      int group = weight(chunk, place, i) / W::GROUP;
      scale[i] = load_raw(w.scale + row * (W::COLUMNS / W::GROUP) + group);
      if (W::MINIMUM) minimum[i] = load_raw(w.minimum + row * (W::COLUMNS / W::GROUP) + group);
    }
    if (W::SUPER) {
      constexpr int SUPER = W::SUPER ? W::SUPER : 1;
      long at = row * (W::COLUMNS / SUPER) + chunk * W::CHUNK / SUPER;
      super_scale = load_raw(w.super_scale + at);
      if (W::MINIMUM) super_minimum = load_raw(w.super_minimum + at);
    }
  }

  // Four codes: those of word `k` of a slice.
  __device__ u32 codes(int slice, int k, int place) const {
    u32 low = first[slice % (BYTES / 16) * 4 + k];
    return codes_of(low, SECOND ? second[second_word(slice, k)] : 0, slice, k, place);
  }

  // The word of a unit in the second plane with their upper bits.
  __device__ static int second_word(int slice, int k) {
    return WHOLE ? byte_of(slice, k, 0) % (SECOND ? SECOND : 1) / 4 : k;
  }

  // What the words of both planes hold of them.
  __device__ static u32 codes_of(u32 first, u32 second, int slice, int k, int place) {
    u32 y = stored_codes_of(first, second, slice, k, place);
    return W::TABLE ? look_up<W>(y) : signed_codes<W::OFFSET>(y);
  }

  // As they are stored: without table and offset.
  __device__ static u32 stored_codes_of(u32 first, u32 second, int slice, int k, int place) {
    u32 y = first;
    if (W::BITS0 < 8) {
      y = (y >> (slice / (BYTES / 16) * W::BITS0)) & (0x01010101u * ((1 << W::BITS0) - 1));
    }
    if (SECOND) {
      u32 more = second >> (byte_of(slice, k, place) / (SECOND ? SECOND : 1) * W::BITS1);
      y |= (more & (0x01010101u * ((1 << W::BITS1) - 1))) << W::BITS0;
    }
    return y;
  }

  // Of a chunk whose codes had a byte each.
  __device__ static int byte_of(int slice, int k, int place) {
    return slice / (BYTES / 16) * CHUNK_BYTES + place * BYTES + slice % (BYTES / 16) * 16 + 4 * k;
  }
};
