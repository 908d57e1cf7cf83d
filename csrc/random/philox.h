/* Counter-based random streams: Philox4x32-10 (Salmon, Moraes, Dror and Shaw, "Parallel random
 * numbers: as easy as 1, 2, 3", SC 2011).
 *
 * Each model has a stream of its own, keyed by its 64-bit seed. `step` counts the forward calls of
 * that model, `op_index` numbers the random operators inside one forward call, and e is the
 * row-major index of an element inside the model's own slice of the tensor. Block q of four words
 * is
 *
 *     key     = (low 32 bits of seed, high 32 bits of seed)
 *     counter = (low 32 bits of q, high 32 bits of q,
 *                op_index | (step >> 32) << 20, low 32 bits of step)
 *
 * and element e takes word e % 4 of block e / 4. Operators that need 64 bits per element take two
 * words: element e takes words 2 (e % 2) and 2 (e % 2) + 1 of block e / 2. Nothing else enters, so
 * a model draws the same numbers whatever the number of models, its slot, the chunking, the threads
 * or the instruction set. 0 <= op_index < 2^20 and 0 <= step < 2^44 keep the fields apart.
 */
#ifndef MODELBATCH_RANDOM_PHILOX_H
#define MODELBATCH_RANDOM_PHILOX_H

#include <stdint.h>

#include "common/host_device.h"

#define MB_MAX_OP_INDEX (INT64_C(1) << 20) /* exclusive */
#define MB_MAX_STEP (INT64_C(1) << 44)     /* exclusive */

#define MB_PHILOX_ROUNDS 10
#define MB_PHILOX_MULTIPLIER_0 0xD2511F53u
#define MB_PHILOX_MULTIPLIER_1 0xCD9E8D57u
#define MB_PHILOX_WEYL_0 0x9E3779B9u
#define MB_PHILOX_WEYL_1 0xBB67AE85u

/* What is the same for every block of one model's operator call. */
typedef struct mb_philox_stream {
  uint32_t key0, key1;         /* seed */
  uint32_t counter2, counter3; /* op_index and step */
} mb_philox_stream;

MB_HOST_DEVICE static inline mb_philox_stream mb_philox_open(int64_t seed, int64_t step,
                                                             int64_t op_index) {
  mb_philox_stream stream;
  stream.key0 = (uint32_t)(uint64_t)seed;
  stream.key1 = (uint32_t)((uint64_t)seed >> 32);
  stream.counter2 = (uint32_t)op_index | (uint32_t)((uint64_t)step >> 32) << 20;
  stream.counter3 = (uint32_t)(uint64_t)step;
  return stream;
}

/* One block: words = [4]. */
MB_HOST_DEVICE static inline void mb_philox_block(uint32_t* words, uint64_t block,
                                                  mb_philox_stream stream) {
  uint32_t x0 = (uint32_t)block, x1 = (uint32_t)(block >> 32);
  uint32_t x2 = stream.counter2, x3 = stream.counter3;
  uint32_t key0 = stream.key0, key1 = stream.key1;
  for (int round = 0; round < MB_PHILOX_ROUNDS; ++round) {
    const uint64_t product0 = (uint64_t)x0 * MB_PHILOX_MULTIPLIER_0;
    const uint64_t product1 = (uint64_t)x2 * MB_PHILOX_MULTIPLIER_1;
    x0 = (uint32_t)(product1 >> 32) ^ x1 ^ key0;
    x1 = (uint32_t)product1;
    x2 = (uint32_t)(product0 >> 32) ^ x3 ^ key1;
    x3 = (uint32_t)product0;
    key0 += MB_PHILOX_WEYL_0;
    key1 += MB_PHILOX_WEYL_1;
  }
  words[0] = x0;
  words[1] = x1;
  words[2] = x2;
  words[3] = x3;
}

#endif /* MODELBATCH_RANDOM_PHILOX_H */
