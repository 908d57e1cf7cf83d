// One thread per model, for library calls that would start threads of their own.
#pragma once

#include <cstdint>

namespace modelbatch {

// Calls body(model) for every model, one thread per model; threads take the next model when they
// are free. Inside, OpenMP's thread count is 1, so that libraries such as oneDNN plan for one
// thread: a model's result then depends neither on the number of threads nor on the other models.
//
// Where torch's OpenMP cannot be found, models follow one another on the calling thread and each
// uses torch's threads.
void for_each_model(int64_t num_models, void (*body)(int64_t model, void* context), void* context);

template <class Body>
void for_each_model(int64_t num_models, const Body& body) {
  for_each_model(
      num_models, [](int64_t model, void* context) { (*static_cast<const Body*>(context))(model); },
      const_cast<Body*>(&body));
}

}  // namespace modelbatch
