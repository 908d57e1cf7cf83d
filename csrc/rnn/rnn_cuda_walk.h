// Walks through the steps of a layer, in either direction, by a table of runs.
#pragma once

#include "common/host_device.h"
#include "rnn/rnn_cuda.h"

namespace modelbatch {

class RnnWalk {
 public:
  // In the order of computation, or against it.
  MB_HOST_DEVICE RnnWalk(const mb_rnn_runs& runs, bool backward)
      : runs_(runs), up_((runs.reverse != 0) == backward) {
    run_ = up_ ? 0 : runs.count - 1;
    step_ = up_ ? 0 : runs.steps[run_] - 1;
    first_row_ = up_ ? 0 : (int)runs.rows - runs.batch[run_];
  }

  // Goes to the next step; false where there is none.
  MB_HOST_DEVICE bool next() {
    if (up_) {
      first_row_ += batch();
      if (++step_ == runs_.steps[run_]) {
        step_ = 0;
        if (++run_ == runs_.count) return false;
      }
      return true;
    }
    if (--step_ < 0) {
      if (--run_ < 0) return false;
      step_ = runs_.steps[run_] - 1;
    }
    first_row_ -= batch();
    return true;
  }

  // The rows that take part in this step.
  MB_HOST_DEVICE int first_row() const { return first_row_; }
  MB_HOST_DEVICE int batch() const { return runs_.batch[run_]; }

  // How many of them took part in the step that was computed before, and where it begins.
  MB_HOST_DEVICE int prev_rows() const {
    if (runs_.reverse != 0) {
      if (step_ + 1 < runs_.steps[run_]) return batch();
      return run_ + 1 < runs_.count ? runs_.batch[run_ + 1] : 0;
    }
    return run_ == 0 && step_ == 0 ? 0 : batch();
  }
  MB_HOST_DEVICE int prev_first_row() const {
    if (runs_.reverse != 0) return first_row_ + batch();
    return first_row_ - (step_ == 0 && run_ > 0 ? runs_.batch[run_ - 1] : batch());
  }

 private:
  const mb_rnn_runs& runs_;
  bool up_;
  int run_, step_, first_row_;
};

}  // namespace modelbatch
