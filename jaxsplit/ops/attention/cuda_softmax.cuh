// The online softmax: scores are to the base 2.

constexpr float LOG2_E = 1.4426950408889634f, MASKED = -1e30f;
