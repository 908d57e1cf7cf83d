#include "conv/threads.h"

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <atomic>

#if defined(__unix__) || defined(__APPLE__)
#include <dlfcn.h>
#endif

namespace modelbatch {
namespace {

// The two functions of the OpenMP runtime that torch itself uses. Linking to OpenMP would bring in
// a second runtime wherever torch ships its own.
struct OpenMp {
  void (*set_num_threads)(int) = nullptr;
  int (*get_max_threads)() = nullptr;
};

OpenMp find_openmp() {
  OpenMp openmp;
#if defined(__unix__) || defined(__APPLE__)
  for (const char* name : {"libtorch_cpu.so", "libtorch_cpu.dylib"}) {
    void* library = dlopen(name, RTLD_NOLOAD | RTLD_LAZY);
    if (library == nullptr) continue;
    openmp.set_num_threads = reinterpret_cast<void (*)(int)>(dlsym(library, "omp_set_num_threads"));
    openmp.get_max_threads = reinterpret_cast<int (*)()>(dlsym(library, "omp_get_max_threads"));
    break;  // The handle stays open: the functions are called until the process ends.
  }
#endif
  return openmp;
}

// The setting belongs to the OpenMP task of the current thread; restored, because with one thread
// that task is the caller's own.
class SingleThreaded {
 public:
  explicit SingleThreaded(const OpenMp& openmp)
      : openmp_(openmp), previous_(openmp.get_max_threads()) {
    openmp_.set_num_threads(1);
  }
  ~SingleThreaded() { openmp_.set_num_threads(previous_); }
  SingleThreaded(const SingleThreaded&) = delete;
  SingleThreaded& operator=(const SingleThreaded&) = delete;

 private:
  const OpenMp& openmp_;
  const int previous_;
};

}  // namespace

void for_each_model(int64_t num_models, void (*body)(int64_t model, void* context), void* context) {
  static const OpenMp openmp = find_openmp();
  if (openmp.set_num_threads == nullptr || openmp.get_max_threads == nullptr) {
    for (int64_t model = 0; model < num_models; ++model) body(model, context);
    return;
  }
  std::atomic<int64_t> next{0};
  const int64_t threads = std::min<int64_t>(num_models, torch::stable::get_num_threads());
  torch::stable::parallel_for(0, threads, 1, [&](int64_t, int64_t) {
    const SingleThreaded guard(openmp);
    for (int64_t model = next++; model < num_models; model = next++) body(model, context);
  });
}

}  // namespace modelbatch
