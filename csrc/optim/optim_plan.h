// How the CPU operators of the optimizer family see tensors in memory and split the work.
#pragma once

#include <memory>

#include "common/dispatch.h"
#include "optim/optim_args.h"
#include "optim/optim_layout.h"

MB_DECLARE_TABLE(mb_optim_kernels)

namespace modelbatch {

// A model's elements per unit of work, and the fewest elements that are worth a thread.
inline constexpr int64_t kOptimUnit = 8192;
inline constexpr int64_t kOptimGrain = 32768;

// The most models that are worked on together.
inline constexpr int64_t kOptimBlock = 16;

inline const mb_optim_kernels& optim_kernels() {
  static const mb_optim_kernels& table = MB_SELECT_TABLE(mb_optim_kernels);
  return table;
}

inline constexpr std::array<int64_t, MB_OPTIM_DTYPES> kOptimBytes = {4, 8, 2, 2};

// ---- memory
// ---------------------------------------------------------------------------------------

inline mb_optim_layout view_of(const StridedLayout& layout) {
  return {static_cast<int64_t>(layout.sizes.size()), layout.sizes.data(), layout.strides.data()};
}

// A tensor as the kernels see it: the bytes where model 0's slice begins and from one model's slice
// to the next.
struct Slices {
  char* data = nullptr;
  int64_t step = 0;

  Slices() = default;
  Slices(const StackedTensor& tensor, int64_t element_bytes)
      : data(static_cast<char*>(tensor.data)),
        step(tensor.dims > 0 ? tensor.strides[0] * element_bytes : 0) {}
  char* of(int64_t model) const { return data + model * step; }
};

struct Gradient {
  Slices slices;
  int64_t layout = -1;  // index of the layout to gather by, or -1: dense
};

inline Gradient planned_gradient(const StackedTensor& grad, const Ints& order, int64_t bytes,
                                 std::vector<StridedLayout>& layouts) {
  Gradient plan;
  plan.slices = Slices(grad, bytes);
  if (!is_dense(grad, order)) {
    plan.layout = static_cast<int64_t>(layouts.size());
    layouts.emplace_back(grad, order);
  }
  return plan;
}

// The units of all tensors of one model, one after the other.
struct Unit {
  int64_t tensor, begin, end;
};

class Units {
 public:
  void add(int64_t slice_numel) {
    numel_.push_back(slice_numel);
    first_.push_back(count_);
    count_ += (slice_numel + kOptimUnit - 1) / kOptimUnit;
    total_numel_ += slice_numel;
  }
  int64_t count() const { return count_; }
  int64_t total_numel() const { return total_numel_; }
  Unit at(int64_t unit) const {
    const auto after = std::upper_bound(first_.begin(), first_.end(), unit);
    Unit found{after - first_.begin() - 1, 0, 0};
    found.begin = (unit - first_[found.tensor]) * kOptimUnit;
    found.end = std::min(found.begin + kOptimUnit, numel_[found.tensor]);
    return found;
  }
  // The unit after `unit`, which is not the last one.
  Unit after(Unit unit) const {
    if (unit.end < numel_[unit.tensor]) {
      unit.begin = unit.end;
    } else {
      do ++unit.tensor;
      while (numel_[unit.tensor] == 0);
      unit.begin = 0;
    }
    unit.end = std::min(unit.begin + kOptimUnit, numel_[unit.tensor]);
    return unit;
  }

 private:
  Ints numel_, first_;
  int64_t count_ = 0, total_numel_ = 0;
};

// How many models make a block.
inline int64_t block_of(const Units& units) {
  return std::clamp<int64_t>(kOptimUnit / units.total_numel(), 1, kOptimBlock);
}

// Models follow one another in memory, tensor by tensor. So the models of a small network are taken
// in blocks, and within a block tensor by tensor: few and long runs of memory instead of many short
// ones.
//
// body(own, begin, end, index, unit) is called for unit number `index` of the rows (models) begin
// to end - 1, a block or, at the end, less; open() makes what each thread needs of its own.
template <class Open, class Body>
void for_each_unit(int64_t rows, const Units& units, const Open& open, const Body& body) {
  const int64_t count = units.count();
  if (rows == 0 || count == 0) return;
  const int64_t block = block_of(units);
  const int64_t blocks = (rows + block - 1) / block;
  const int64_t grain = std::max<int64_t>(1, kOptimGrain * count / (units.total_numel() * block));
  torch::stable::parallel_for(0, blocks * count, grain, [&](int64_t first, int64_t last) {
    auto own = open();
    int64_t begin = first / count * block, index = first % count;
    Unit unit = units.at(index);
    for (int64_t task = first; task < last; ++task) {
      body(own, begin, std::min(begin + block, rows), index, unit);
      if (task + 1 == last) break;
      if (++index == count) {
        index = 0;
        begin += block;
        unit = units.at(0);
      } else {
        unit = units.after(unit);
      }
    }
  });
}

// The gradient's elements of a unit as a dense run, gathered into `buffer` where it is not.
inline const void* dense_gradient(const Gradient& grad, const std::vector<StridedLayout>& layouts,
                                  int64_t model, const Unit& unit, int dtype,
                                  std::unique_ptr<char[]>& buffer) {
  const char* slice = grad.slices.of(model);
  if (grad.layout < 0) return slice + unit.begin * kOptimBytes[dtype];
  if (buffer == nullptr) buffer.reset(new char[kOptimUnit * kOptimBytes[dtype]]);
  const mb_optim_layout layout = view_of(layouts[grad.layout]);
  optim_kernels().gather[dtype](buffer.get(), slice, &layout, unit.begin, unit.end);
  return buffer.get();
}

}  // namespace modelbatch
