// Quantized matrices, as threads load them (jaxsplit/quant/qtensor.py).
//
// `W` describes a matrix: constants, and pointers to its planes. A unit is what a thread loads of a
// row at a time: a chunk of the first plane if that is at most 32 bytes, else 16 bytes. A slice is
// 16 neighboring weights. A chunk of a trellis counts as eight: its 16 bytes.

constexpr u32 TRELLIS_FACTOR = 0xcbac1fedu;

// The codes of four neighbors, their offset subtracted: borrows stay within each byte.
template <int OFFSET>
__device__ inline u32 signed_codes(u32 codes) {
  if (OFFSET == 0) return codes;
  return ((codes | 0x80808080u) - OFFSET * 0x01010101u) ^ 0x80808080u;
}

// The entries of a table of up to eight for the codes in the four lowest hexadecimal digits.
template <class W>
__device__ inline u32 look_up_8(int first, u32 digits) {
  return pick_bytes(in_register(W::TABLE_WORDS[first]), W::TABLE_WORDS[first + 1], digits);
}

// Of the entries from word `first` on, those for the codes in eight hexadecimal digits: of even or of
// odd digits. What both have in common is computed once. ENTRIES: 8 or 16.
template <class W, int ENTRIES>
__device__ inline u32 look_up_digits(int first, u32 digits, bool odd) {
  u32 three = ENTRIES > 8 ? digits & 0x77777777u : digits;
  u32 low = look_up_8<W>(first, three), high = look_up_8<W>(first, three >> 16);
  if (ENTRIES > 8) {
    u32 choice = (digits >> 1 & 0x44444444u) | in_register(0x32103210);
    low = pick_bytes(low, look_up_8<W>(first + 2, three), choice);
    high = pick_bytes(high, look_up_8<W>(first + 2, three >> 16), choice >> 16);
  }
  return pick_bytes(low, high, odd ? 0x7531 : 0x6420);
}

// `y` where a bit of a byte in `bits` is 0, else `z`.
__device__ inline u32 choose_bytes(u32 y, u32 z, u32 bits, int bit) {
  u32 chosen = fill_bytes(bits << (7 - bit));
  return (y & ~chosen) | (z & chosen);
}

// Four signed bytes that a state of 16 bits encodes, from an index on (`trellis_values`,
// jaxsplit/quant/qtensor.py); with `signs`, their magnitudes, negated where a bit is set.
template <bool SIGNS>
__device__ inline u32 trellis_bytes(u32 state, int start, u32 signs) {
  u32 early = TRELLIS_FACTOR, late = early * early * early * early * early, values[4];
#pragma unroll
  for (int i = 0; i < 4; i++) {
    u32 number = (state + 4096) * (start ? late : early);
    int value = dot4(number & 0x3f3f3f3fu, 0x01010101u, -126);
    values[i] = SIGNS && value < 0 ? -value : value;
    early *= TRELLIS_FACTOR;
    late *= TRELLIS_FACTOR;
  }
  u32 low = pick_bytes(values[0], values[1], 0x0040), high = pick_bytes(values[2], values[3], 0x0040);
  u32 y = pick_bytes(low, high, 0x5410);
  if (!SIGNS) return y;
  // The factor moves bit `i` to the top of byte `i`. Magnitudes are below 128: no borrows.
  u32 negative = (0x80808080u - y) ^ 0x80808080u;
  return choose_bytes(y, negative, (signs & 15) * 0x10204080u, 7);
}

// A stored scale or minimum; in half a byte if SCALE_BITS are 4.
template <class W, class T>
__device__ inline u32 load_group(const T* plane, long at) {
  if (W::SCALE_BITS == 4) return load_raw(plane + at / 2) >> (4 * (at % 2)) & 15;
  return load_raw(plane + at);
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

  // Whether `bytes_of` are signed: a table or a trellis made them, or they have 8 bits. W::OFFSET is
  // to be subtracted from others.
  static constexpr bool SIGNED = W::TABLE || W::TRELLIS || W::BITS0 == 8;

  // Whether groups have minima: stored ones, or those that shifts and fractional offsets make.
  static constexpr bool BELOW = W::MINIMUM || W::SHIFT || W::FRACTION != 0;

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
      scale[i] = load_group<W>(w.scale, row * (W::COLUMNS / W::GROUP) + group);
      if (W::MINIMUM) minimum[i] = load_group<W>(w.minimum, row * (W::COLUMNS / W::GROUP) + group);
    }
    if (W::SUPER) {
      constexpr int SUPER = W::SUPER ? W::SUPER : 1;
      long at = row * (W::COLUMNS / SUPER) + chunk * W::CHUNK / SUPER;
      super_scale = load_raw(w.super_scale + at);
      if (W::MINIMUM) super_minimum = load_raw(w.super_minimum + at);
    }
  }

  // Of a group, without its super-group's.
  __device__ static float minimum_of(u32 scale, u32 minimum) {
    if (W::MINIMUM) return (float)Raw<typename W::Minimum>::value(minimum);
    return W::scale_value(scale) * (W::SHIFT * (int)(scale & 1) - W::FRACTION);
  }

  // Of its super-group: those of scales and of minima.
  __device__ static float outer_of(u32 super_scale) {
    return W::SUPER ? (float)Raw<typename W::Super>::value(super_scale) : 1;
  }

  __device__ static float outer_below_of(u32 super_scale, u32 super_minimum) {
    return outer_of(W::MINIMUM ? super_minimum : super_scale);
  }

  // Four codes: those of word `k` of a slice.
  __device__ u32 codes(int slice, int k, int place) const {
    u32 low = first[first_word(slice, k)];
    return codes_of(low, SECOND ? second[second_word(slice, k)] : 0, slice, k, place);
  }

  // The word of a unit with their lower bits, or with the state that encodes them.
  __device__ static int first_word(int slice, int k) {
    return W::TRELLIS ? state(slice, k) / 2 : slice % (BYTES / 16) * 4 + k;
  }

  // The word of a unit in the second plane with their upper bits.
  __device__ static int second_word(int slice, int k) {
    if (W::TRELLIS) return state(slice, k) / 4;
    return WHOLE ? byte_of(slice, k, 0) % (SECOND ? SECOND : 1) / 4 : k;
  }

  __device__ static int state(int slice, int k) {
    return (16 * slice + 4 * k) / (W::TRELLIS ? W::TRELLIS : 1);
  }

  // What the words of both planes hold of them.
  __device__ static u32 codes_of(u32 first, u32 second, int slice, int k, int place) {
    if (W::TRELLIS) {
      int at = state(slice, k), start = 4 * k % (W::TRELLIS ? W::TRELLIS : 1);
      u32 signs = second >> (8 * (at % 4) + start);
      return trellis_bytes<(W::BITS1 > 0)>(first >> (16 * (at % 2)) & 0xffff, start, signs);
    }
    if constexpr (W::TABLE > 0) return looked_up(first, second, slice, k, place);
    return signed_codes<W::OFFSET>(stored_codes_of(first, second, slice, k, place));
  }

  // Entries of the table: of codes whose lower bits are in half of a byte, or beside them.
  __device__ static u32 looked_up(u32 first, u32 second, int slice, int k, int place) {
    constexpr int HALF = PER_BYTE / 2 * (BYTES / 16);  // slices that are in the lower halves of bytes
    int lower = slice % HALF;
    bool odd = slice >= HALF;
    // In both planes, codes that share a byte or half of it are four bits apart.
    u32 more = second >> (byte_of(lower, k, place) / (SECOND ? SECOND : 1) * W::BITS1);
    if constexpr (W::BITS0 == 4) {
      u32 y = look_up_digits<W, 16>(0, first, odd);
      if constexpr (W::TABLE <= 16) return y;
      y = choose_bytes(y, look_up_digits<W, 16>(4, first, odd), more, odd ? 4 : 0);
      if constexpr (W::TABLE <= 32) return y;
      u32 z = choose_bytes(look_up_digits<W, 16>(8, first, odd),
                           look_up_digits<W, 16>(12, first, odd), more, odd ? 4 : 0);
      return choose_bytes(y, z, more, odd ? 5 : 1);
    } else {
      constexpr u32 ONES = 0x11111111u;
      u32 digits = first >> (lower / (BYTES / 16) * W::BITS0) & ONES * ((1 << W::BITS0) - 1);
      if (SECOND) digits |= (more & ONES * ((1 << W::BITS1) - 1)) << W::BITS0;
      return look_up_digits<W, (W::TABLE <= 8 ? 8 : 16)>(0, digits, odd);
    }
  }

  // Four numbers in a byte each, before any offset is subtracted: see SIGNED.
  __device__ static u32 bytes_of(u32 first, u32 second, int slice, int k, int place) {
    return W::TABLE || W::TRELLIS ? codes_of(first, second, slice, k, place)
                                  : stored_codes_of(first, second, slice, k, place);
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
