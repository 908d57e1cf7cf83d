// Cooperative threads: a stack of its own each, and a switch that saves what the calling convention
// asks for. ucontext would do, but costs two system calls a switch, and the address sanitizer
// distrusts it.
#pragma once

#include <sys/mman.h>
#include <unistd.h>

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <new>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

// Saves the caller's registers on its stack and the stack's address in *from, then continues `to`.
extern "C" void mb_emulation_switch(void** from, void* to);

#if defined(__x86_64__)
asm(R"(
.text
.globl mb_emulation_switch
.hidden mb_emulation_switch
.type mb_emulation_switch, @function
mb_emulation_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size mb_emulation_switch, . - mb_emulation_switch
)");
#elif defined(__aarch64__)
asm(R"(
.text
.globl mb_emulation_switch
.hidden mb_emulation_switch
.type mb_emulation_switch, %function
mb_emulation_switch:
  sub sp, sp, #160
  stp x19, x20, [sp, #0]
  stp x21, x22, [sp, #16]
  stp x23, x24, [sp, #32]
  stp x25, x26, [sp, #48]
  stp x27, x28, [sp, #64]
  stp x29, x30, [sp, #80]
  stp d8, d9, [sp, #96]
  stp d10, d11, [sp, #112]
  stp d12, d13, [sp, #128]
  stp d14, d15, [sp, #144]
  mov x9, sp
  str x9, [x0]
  mov sp, x1
  ldp x19, x20, [sp, #0]
  ldp x21, x22, [sp, #16]
  ldp x23, x24, [sp, #32]
  ldp x25, x26, [sp, #48]
  ldp x27, x28, [sp, #64]
  ldp x29, x30, [sp, #80]
  ldp d8, d9, [sp, #96]
  ldp d10, d11, [sp, #112]
  ldp d12, d13, [sp, #128]
  ldp d14, d15, [sp, #144]
  add sp, sp, #160
  ret
.size mb_emulation_switch, . - mb_emulation_switch
)");
#else
#error "the emulation knows x86-64 and arm64"
#endif

namespace mb_emulation {

constexpr size_t kStackBytes = 128 * 1024;

class Fiber {
 public:
  // The fiber of whoever calls: no stack is made.
  Fiber() = default;

  // A fiber that runs `entry`, which never returns.
  explicit Fiber(void (*entry)()) : entry_(entry) {
    const size_t page = (size_t)sysconf(_SC_PAGESIZE);
    mapped_ = kStackBytes + page;
    void* memory =
        mmap(nullptr, mapped_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (memory == MAP_FAILED) throw std::bad_alloc();
    mprotect(memory, page, PROT_NONE);  // A stack that overflows ends the process here.
    map_ = memory;
    bottom_ = static_cast<char*>(memory) + page;
    size_ = kStackBytes;
    reset();
  }

  ~Fiber() {
    if (map_ != nullptr) {
      forget_frames();
      munmap(map_, mapped_);
    }
  }

  Fiber(const Fiber&) = delete;
  Fiber& operator=(const Fiber&) = delete;

  // Back to the beginning of `entry`, whatever the fiber was doing.
  void reset() {
    forget_frames();
    char* top = static_cast<char*>(bottom_) + size_;
#if defined(__x86_64__)
    // Six registers, the address that `ret` takes, and the return address that `entry` never uses.
    void** frame = reinterpret_cast<void**>(top) - 8;
    memset(frame, 0, 8 * sizeof *frame);
    frame[6] = reinterpret_cast<void*>(entry_);
#else
    void** frame = reinterpret_cast<void**>(top) - 20;
    memset(frame, 0, 20 * sizeof *frame);
    frame[11] = reinterpret_cast<void*>(entry_);  // x30
#endif
    saved_ = frame;
  }

  // From this fiber, which is running, to the other. Returns when somebody switches back.
  void switch_to(Fiber& other) {
    other.came_from_ = this;
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_start_switch_fiber(&fake_stack_, other.bottom_, other.size_);
#endif
    mb_emulation_switch(&saved_, other.saved_);
    arrived();
  }

  // The first thing that `entry` does.
  void begin() {
    fake_stack_ = nullptr;
    arrived();
  }

 private:
  void arrived() {
#if defined(__SANITIZE_ADDRESS__)
    const void* bottom = nullptr;
    size_t size = 0;
    __sanitizer_finish_switch_fiber(fake_stack_, &bottom, &size);
    if (came_from_->map_ == nullptr) {  // Now we know the stack of the caller's own fiber.
      came_from_->bottom_ = const_cast<void*>(bottom);
      came_from_->size_ = size;
    }
#endif
  }

  void forget_frames() {
#if defined(__SANITIZE_ADDRESS__)
    __asan_unpoison_memory_region(bottom_, size_);
#endif
  }

  void (*entry_)() = nullptr;
  void* map_ = nullptr;
  size_t mapped_ = 0;
  void* bottom_ = nullptr;
  size_t size_ = 0;
  void* saved_ = nullptr;
  void* fake_stack_ = nullptr;
  Fiber* came_from_ = nullptr;
};

}  // namespace mb_emulation
