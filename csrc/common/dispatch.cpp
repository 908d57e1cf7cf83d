#include "common/dispatch.h"

#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>

namespace modelbatch {
namespace {

mb_isa best_isa() {
  for (mb_isa isa : {MB_ISA_AVX512, MB_ISA_AVX2}) {
    if (mb_isa_is_built(isa) && mb_isa_is_supported(isa)) return isa;
  }
  return MB_ISA_BASELINE;
}

mb_isa choose_isa() {
  const char* wanted = std::getenv("MODELBATCH_ISA");
  if (wanted == nullptr || *wanted == '\0') return best_isa();
  for (mb_isa isa : {MB_ISA_BASELINE, MB_ISA_AVX2, MB_ISA_AVX512}) {
    if (std::strcmp(wanted, mb_isa_name(isa)) != 0) continue;
    const char* reason = !mb_isa_is_built(isa)       ? "this build has no kernels for it"
                         : !mb_isa_is_supported(isa) ? "this machine does not support it"
                                                     : nullptr;
    if (reason == nullptr) return isa;
    throw std::runtime_error("MODELBATCH_ISA=" + std::string(wanted) + ": " + reason +
                             "; the best it supports is " + mb_isa_name(best_isa()));
  }
  throw std::runtime_error("MODELBATCH_ISA=" + std::string(wanted) +
                           " is unknown; use baseline, avx2 or avx512");
}

}  // namespace

mb_isa active_isa() {
  static const mb_isa isa = choose_isa();
  return isa;
}

}  // namespace modelbatch
