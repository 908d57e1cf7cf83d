// Runs the blocks and threads of a launch, see include/cuda_runtime.h.
#include <algorithm>
#include <map>
#include <memory>
#include <sstream>
#include <string>
#include <vector>

#include "cuda_runtime.h"
#include "fibers.h"

namespace mb_emulation {
namespace {

enum Order { kForward = 0, kReverse = 1, kShuffled = 2 };
enum class State { kNew, kReady, kWaiting, kDone };

// The limits of the hardware.
constexpr unsigned kMaxThreads = 1024;
constexpr unsigned kMaxGridX = 2147483647u;
constexpr unsigned kMaxGridYZ = 65535;
constexpr size_t kMaxSharedBytes = 227 * 1024;

struct Thread {
  uint3 index{};
  State state = State::kNew;
  Fiber* fiber = nullptr;
  Site site{};        // where it waits
  unsigned mask = 0;  // whom it waits for in its warp; 0: for the whole block
};

// Lanes of one warp that exchange values. Two sets of values in turns: who is ahead writes one
// while others still read the other.
struct Meeting {
  Site site{};
  unsigned arrived = 0;
  int turn = 0;
  unsigned char values[2][kWarp][sizeof(uint64_t)];
};

struct Free {
  void operator()(void* memory) const { ::operator delete(memory); }
};
using Memory = std::unique_ptr<void, Free>;

Memory poisoned_memory(size_t bytes) {
  Memory memory(::operator new(bytes));
  memset(memory.get(), 0xff, bytes);
  return memory;
}

bool same_site(const Site& a, const Site& b) {
  return a.line == b.line && strcmp(a.file, b.file) == 0 && strcmp(a.what, b.what) == 0;
}

// A generator of its own: the standard library's shuffle differs between libraries.
struct Random {
  uint64_t state;
  uint64_t next() {
    uint64_t z = state += 0x9e3779b97f4a7c15u;
    z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9u;
    z = (z ^ z >> 27) * 0x94d049bb133111ebu;
    return z ^ z >> 31;
  }
};

struct Settings {
  Order order = kForward;
  Random random{0};
};

struct Machine {
  Settings settings;
  std::string error;
  int64_t launches = 0;

  // The launch
  void (*body)(void*) = nullptr;
  void* data = nullptr;
  size_t shared_bytes = 0;

  // The block
  std::vector<Thread> threads;
  std::vector<std::map<unsigned, Meeting>> meetings;  // of each warp, by mask
  std::map<const void*, Memory> shared;               // by the declaration's key
  Memory dynamic;
  Site barrier{};           // where those wait who wait for the whole block
  unsigned at_barrier = 0;  // and how many they are

  uint64_t runnable[kMaxThreads / 64];  // a bit for each thread that is new or ready
  unsigned num_done = 0;
  Thread* current = nullptr;
  Thread* next = nullptr;  // where the scheduler goes on

  Fiber scheduler;
  std::vector<std::unique_ptr<Fiber>> fibers;
  std::vector<Fiber*> idle;
};

Machine machine;

template <class T>
void put_in_order(std::vector<T>& items) {
  if (machine.settings.order == kReverse) std::reverse(items.begin(), items.end());
  if (machine.settings.order != kShuffled) return;
  for (size_t left = items.size(); left > 1; --left) {
    std::swap(items[left - 1], items[machine.settings.random.next() % left]);
  }
}

unsigned number_of(const Thread& thread) { return (unsigned)(&thread - machine.threads.data()); }

void set_state(Thread& thread, State state) {
  thread.state = state;
  const unsigned number = number_of(thread);
  const uint64_t bit = (uint64_t)1 << number % 64;
  uint64_t& word = machine.runnable[number / 64];
  word = state == State::kNew || state == State::kReady ? word | bit : word & ~bit;
  if (state == State::kDone) ++machine.num_done;
}

unsigned first_bit(uint64_t word) { return (unsigned)__builtin_ctzll(word); }
unsigned last_bit(uint64_t word) { return 63 - (unsigned)__builtin_clzll(word); }

// The thread that runs next, or nullptr if none can. Forward and reverse are as unfair as can be:
// a warp that can go on does so, up to the next barrier, before the others get a turn.
Thread* next_thread() {
  constexpr unsigned words = kMaxThreads / 64;
  const unsigned first = machine.settings.order == kShuffled
                             ? (unsigned)(machine.settings.random.next() % machine.threads.size())
                             : 0;
  for (unsigned i = 0; i <= words; ++i) {
    unsigned at = (first / 64 + i) % words;
    if (machine.settings.order == kReverse) at = words - 1 - at;
    uint64_t word = machine.runnable[at];
    if (i == 0) word &= ~(uint64_t)0 << first % 64;
    if (word == 0) continue;
    const unsigned bit = machine.settings.order == kReverse ? last_bit(word) : first_bit(word);
    return &machine.threads[at * 64 + bit];
  }
  return nullptr;
}

void make_current(Thread& thread) {
  machine.current = &thread;
  threadIdx = thread.index;
}

void fiber_entry() {
  machine.current->fiber->begin();
  for (;;) {
    Fiber* fiber = machine.current->fiber;
    machine.body(machine.data);
    set_state(*machine.current, State::kDone);
    machine.current->fiber = nullptr;
    machine.next = next_thread();
    if (machine.next == nullptr || machine.next->state != State::kNew) {
      machine.idle.push_back(fiber);
      fiber->switch_to(machine.scheduler);
      continue;  // Not reached: an idle fiber begins anew.
    }
    // A thread that has not begun can go on here, without a switch.
    Thread& next = *machine.next;
    set_state(next, State::kReady);
    next.fiber = fiber;
    make_current(next);
  }
}

Fiber* idle_fiber() {
  if (machine.idle.empty()) {
    machine.fibers.push_back(std::make_unique<Fiber>(fiber_entry));
    return machine.fibers.back().get();
  }
  Fiber* fiber = machine.idle.back();
  machine.idle.pop_back();
  fiber->reset();
  return fiber;
}

// Until no thread can run.
void run_threads() {
  machine.next = next_thread();
  while (machine.next != nullptr) {
    Thread& thread = *machine.next;
    if (thread.state == State::kNew) {
      set_state(thread, State::kReady);
      thread.fiber = idle_fiber();
    }
    make_current(thread);
    machine.scheduler.switch_to(*thread.fiber);
  }
}

std::string who_waits() {
  std::map<std::string, std::pair<unsigned, unsigned>> places;  // first thread, how many
  unsigned ended = 0;
  for (unsigned i = 0; i < machine.threads.size(); ++i) {
    const Thread& thread = machine.threads[i];
    if (thread.state == State::kDone) {
      ++ended;
      continue;
    }
    std::ostringstream place;
    place << thread.site.what << " at " << thread.site.file << ":" << thread.site.line;
    if (thread.mask != 0) place << " with mask 0x" << std::hex << thread.mask;
    auto found = places.emplace(place.str(), std::make_pair(i, 0u)).first;
    ++found->second.second;
  }
  std::ostringstream text;
  text << "block (" << blockIdx.x << ", " << blockIdx.y << ", " << blockIdx.z << ") is stuck: ";
  for (const auto& [place, count] : places) {
    text << count.second << " threads from " << count.first << " on wait in " << place << "; ";
  }
  text << ended << " of " << machine.threads.size() << " threads have ended";
  return text.str();
}

void begin_block(dim3 block) {
  const unsigned num_threads = block.x * block.y * block.z;
  machine.threads.assign(num_threads, Thread());
  for (unsigned i = 0; i < num_threads; ++i) {
    machine.threads[i].index = uint3{i % block.x, i / block.x % block.y, i / block.x / block.y};
  }
  machine.meetings.assign((num_threads + kWarp - 1) / kWarp, {});
  machine.shared.clear();
  machine.dynamic = poisoned_memory(machine.shared_bytes);
  machine.at_barrier = 0;
  machine.num_done = 0;
  std::fill(std::begin(machine.runnable), std::end(machine.runnable), 0);
  for (Thread& thread : machine.threads) set_state(thread, State::kNew);
}

void end_block() {
  for (Thread& thread : machine.threads) {
    if (thread.fiber != nullptr) machine.idle.push_back(thread.fiber);
  }
  machine.threads.clear();
  machine.shared.clear();
  machine.dynamic.reset();
}

// Whether the block ran to its end.
bool run_block(dim3 block) {
  begin_block(block);
  run_threads();
  const bool is_done = machine.num_done == machine.threads.size();
  if (!is_done) machine.error = who_waits();
  end_block();
  return is_done;
}

void wait_at(Site site, unsigned mask) {
  Thread& thread = *machine.current;
  thread.site = site;
  thread.mask = mask;
  if (thread.state != State::kWaiting) return;
  machine.next = next_thread();
  thread.fiber->switch_to(machine.scheduler);
}

bool valid_launch(dim3 grid, dim3 block, size_t shared_bytes) {
  const bool empty =
      grid.x == 0 || grid.y == 0 || grid.z == 0 || block.x == 0 || block.y == 0 || block.z == 0;
  return !empty && grid.x <= kMaxGridX && grid.y <= kMaxGridYZ && grid.z <= kMaxGridYZ &&
         (uint64_t)block.x * block.y * block.z <= kMaxThreads && shared_bytes <= kMaxSharedBytes;
}

}  // namespace

cudaError_t run_grid(dim3 grid, dim3 block, size_t shared_bytes, void (*body)(void*), void* data) {
  machine.error.clear();
  if (!valid_launch(grid, block, shared_bytes)) {
    machine.error = "the grid, the block or the shared memory is empty or too large";
    return cudaErrorInvalidConfiguration;
  }
  ++machine.launches;
  machine.body = body;
  machine.data = data;
  machine.shared_bytes = shared_bytes;
  gridDim = grid;
  blockDim = block;
  std::vector<uint64_t> blocks((uint64_t)grid.x * grid.y * grid.z);
  for (uint64_t i = 0; i < blocks.size(); ++i) blocks[i] = i;
  put_in_order(blocks);
  for (const uint64_t i : blocks) {
    blockIdx = uint3{(unsigned)(i % grid.x), (unsigned)(i / grid.x % grid.y),
                     (unsigned)(i / grid.x / grid.y)};
    if (!run_block(block)) return cudaErrorLaunchFailure;
  }
  return cudaSuccess;
}

void block_barrier(Site site) {
  Thread& self = *machine.current;
  // Threads that wait at another barrier wait for this one, and this one for them: stuck, for good.
  const bool divergent = machine.at_barrier > 0 && !same_site(machine.barrier, site);
  machine.barrier = site;
  set_state(self, State::kWaiting);
  if (!divergent && ++machine.at_barrier == machine.threads.size()) {
    machine.at_barrier = 0;
    for (Thread& thread : machine.threads) set_state(thread, State::kReady);
  }
  wait_at(site, 0);
}

Exchange exchange(Site site, unsigned mask, const void* value, size_t bytes) {
  Thread& self = *machine.current;
  const unsigned warp = number_of(self) / kWarp, lane = number_of(self) % kWarp;
  Meeting& meeting = machine.meetings[warp][mask];
  // A lane outside its own mask, or lanes that meet from different places: stuck, for good.
  const bool divergent = meeting.arrived != 0 && !same_site(meeting.site, site);
  const bool stuck = divergent || (mask >> lane & 1u) == 0;
  unsigned char (*values)[sizeof(uint64_t)] = meeting.values[meeting.turn];
  set_state(self, State::kWaiting);
  if (!stuck) {
    meeting.site = site;
    meeting.arrived |= 1u << lane;
    if (bytes != 0) memcpy(values[lane], value, bytes);
  }
  if (!stuck && meeting.arrived == mask) {
    meeting.arrived = 0;
    meeting.turn ^= 1;
    for (unsigned i = 0; i < kWarp; ++i) {
      if (mask >> i & 1u) set_state(machine.threads[warp * kWarp + i], State::kReady);
    }
  }
  wait_at(site, mask);
  return Exchange{lane, mask, values};
}

void* shared_array(const void* key, size_t bytes) {
  Memory& memory = machine.shared[key];
  if (memory == nullptr) memory = poisoned_memory(bytes);
  return memory.get();
}

void* dynamic_shared() { return machine.dynamic.get(); }

}  // namespace mb_emulation

// ---- what the tests call ------------------------------------------------------------------------

// The order of blocks and threads from here on: 0 forward, 1 reverse, 2 shuffled by `seed`.
extern "C" void mb_emulation_order(int order, uint64_t seed) {
  using namespace mb_emulation;
  machine.settings = Settings{static_cast<Order>(order), Random{seed}};
}

// What the last launch did wrong, or an empty text.
extern "C" const char* mb_emulation_error() { return mb_emulation::machine.error.c_str(); }

extern "C" int64_t mb_emulation_launches() { return mb_emulation::machine.launches; }
