// The optimizer steps on a GPU, with the arithmetic of rules.h.
#include "optim/optim.h"
#include "optim/optim_cuda.h"
#include "optim/optim_cuda_tensors.h"
#include "optim/rules.h"

namespace modelbatch {
namespace {

// ---- the rules of rules.h, by element type ------------------------------------------------------

template <class Real>
struct Sgd;
template <class Real>
struct Adam;
template <class Real>
struct AdamW;
template <class Real>
struct RmsProp;
template <class Real>
struct Adagrad;
template <class Real>
struct Adadelta;
template <class Real>
struct Adamax;
template <class Real>
struct RAdam;
template <class Real>
struct Rprop;
template <class Real>
struct NAdam;
template <class Real>
struct Asgd;
template <class Real>
struct GradTransform;

// Of each rule: what its coefficients depend on besides hyper; how many states it has, and which of
// them a model uses.
#define MB_SGD_STEP step
#define MB_SGD_STATES 1
#define MB_SGD_USES(c, state) ((c).has_momentum != 0)
#define MB_SGD_POINTERS(s) (s)
#define MB_ADAM_STEP step
#define MB_ADAM_STATES 3
#define MB_ADAM_USES(c, state) ((state) < 2 || (c).amsgrad != 0)
#define MB_ADAM_POINTERS(s) (s), (s) + 1, (s) + 2
#define MB_RMSPROP_STEP step
#define MB_RMSPROP_STATES 3
#define MB_RMSPROP_USES(c, state) \
  ((state) == 0 || ((state) == 1 ? (c).centered != 0 : (c).has_momentum != 0))
#define MB_RMSPROP_POINTERS(s) (s), (s) + 1, (s) + 2
#define MB_ADAGRAD_STEP step
#define MB_ADAGRAD_STATES 1
#define MB_ADAGRAD_USES(c, state) true
#define MB_ADAGRAD_POINTERS(s) (s)
#define MB_ADADELTA_STEP step
#define MB_ADADELTA_STATES 2
#define MB_ADADELTA_USES(c, state) true
#define MB_ADADELTA_POINTERS(s) (s), (s) + 1
#define MB_ADAMAX_STEP step
#define MB_ADAMAX_STATES 2
#define MB_ADAMAX_USES(c, state) true
#define MB_ADAMAX_POINTERS(s) (s), (s) + 1
#define MB_RADAM_STEP step
#define MB_RADAM_STATES 2
#define MB_RADAM_USES(c, state) true
#define MB_RADAM_POINTERS(s) (s), (s) + 1
#define MB_RPROP_STEP step
#define MB_RPROP_STATES 2
#define MB_RPROP_USES(c, state) true
#define MB_RPROP_POINTERS(s) (s), (s) + 1

#define MB_NADAM_STEP step, models.scalars[0][model]
#define MB_NADAM_STATES 2
#define MB_NADAM_USES(c, state) true
#define MB_NADAM_POINTERS(s) (s), (s) + 1
#define MB_ASGD_STEP step, models.scalars[0][model], models.scalars[1][model], 0
#define MB_ASGD_STATES 1
#define MB_ASGD_USES(c, state) true
#define MB_ASGD_POINTERS(s) (s)

// `rule` has the coefficients of its own name and the rest of `base`'s, as AdamW has of Adam.
#define MB_DEFINE_RULE(Name, rule, base, BASE, Real, suffix)                                   \
  template <>                                                                                  \
  struct Name<Real> {                                                                          \
    using coefficients = mb_##base##_##suffix;                                                 \
    static constexpr int kStates = MB_##BASE##_STATES;                                         \
    __device__ static coefficients make(const mb_optim_cuda_models& models, int64_t model,     \
                                        double step) {                                         \
      (void)step;                                                                              \
      return mb_##base##_round_##suffix(                                                       \
          mb_##rule##_coefficients(models.hyper, models.num_models, model, MB_##BASE##_STEP)); \
    }                                                                                          \
    __device__ static bool uses(const coefficients& c, int state) {                            \
      (void)c, (void)state;                                                                    \
      return MB_##BASE##_USES(c, state);                                                       \
    }                                                                                          \
    __device__ static void update(const coefficients& c, Real grad, Real* param, Real* s) {    \
      mb_##base##_update_##suffix(&c, grad, param, MB_##BASE##_POINTERS(s));                   \
    }                                                                                          \
  };

#define MB_DEFINE_RULES(Real, suffix)                                                     \
  MB_DEFINE_RULE(Sgd, sgd, sgd, SGD, Real, suffix)                                        \
  MB_DEFINE_RULE(Adam, adam, adam, ADAM, Real, suffix)                                    \
  MB_DEFINE_RULE(AdamW, adamw, adam, ADAM, Real, suffix)                                  \
  MB_DEFINE_RULE(RmsProp, rmsprop, rmsprop, RMSPROP, Real, suffix)                        \
  MB_DEFINE_RULE(Adagrad, adagrad, adagrad, ADAGRAD, Real, suffix)                        \
  MB_DEFINE_RULE(Adadelta, adadelta, adadelta, ADADELTA, Real, suffix)                    \
  MB_DEFINE_RULE(Adamax, adamax, adamax, ADAMAX, Real, suffix)                            \
  MB_DEFINE_RULE(RAdam, radam, radam, RADAM, Real, suffix)                                \
  MB_DEFINE_RULE(Rprop, rprop, rprop, RPROP, Real, suffix)                                \
  MB_DEFINE_RULE(NAdam, nadam, nadam, NADAM, Real, suffix)                                \
  MB_DEFINE_RULE(Asgd, asgd, asgd, ASGD, Real, suffix)                                    \
  template <>                                                                             \
  struct GradTransform<Real> {                                                            \
    using type = mb_grad_transform_##suffix;                                              \
    __device__ static type make(float inv_scale, double clip_factor, double clip_value) { \
      return mb_make_grad_transform_##suffix(inv_scale, clip_factor, clip_value);         \
    }                                                                                     \
    __device__ static Real apply(const type& t, Real grad) {                              \
      return mb_transform_grad_##suffix(&t, grad);                                        \
    }                                                                                     \
  };

MB_DEFINE_RULES(float, f32)
MB_DEFINE_RULES(double, f64)

// ---- steps --------------------------------------------------------------------------------------

__device__ inline bool is_skipped(const mb_optim_cuda_models& models, int64_t model) {
  return (models.active != nullptr && models.active[model] == 0) ||
         (models.nonfinite != nullptr && models.nonfinite[model] != 0);
}

// What a block computes once for its model.
template <class Rule, class Real>
struct Prologue {
  typename Rule::coefficients coefficients;
  typename GradTransform<Real>::type transform;
};

template <class Rule, class Real>
__device__ inline Prologue<Rule, Real> prologue_of(const mb_optim_cuda_models& models,
                                                   int64_t model) {
  Prologue<Rule, Real> prologue;
  const double step = (double)(models.step[model * models.step_stride] + 1.0f);
  prologue.coefficients = Rule::make(models, model, step);
  prologue.transform = GradTransform<Real>::make(
      models.inv_scale == nullptr ? 1.0f : models.inv_scale[model],
      models.clip_factor == nullptr ? 1.0 : models.clip_factor[model],
      models.clip_value == nullptr ? (double)INFINITY : models.clip_value[model]);
  return prologue;
}

// A state that a model asks for, but that was not given, counts as zero and is not kept: hyper is
// not checked on a device, and a wrong result is better than a device that faults.
template <class Rule>
__device__ inline bool has_state(const Entry& entry,
                                 const typename Rule::coefficients& coefficients, int state) {
  return Rule::uses(coefficients, state) && entry.states[state] != nullptr;
}

template <class T, class Rule>
__device__ inline void update_pack(const Table& table, const Entry& entry,
                                   const Prologue<Rule, typename T::real>& prologue, int64_t model,
                                   int64_t first) {
  using type = typename T::type;
  using real = typename T::real;
  constexpr int kPack = T::kPack;
  constexpr int kStates = Rule::kStates;
  const int64_t valid = entry.numel - first;
  const Pack<type, kPack> grad = load_grad<T>(table, entry, model, first);
  type* param_address = static_cast<type*>(entry.param) + model * entry.param_stride + first;
  Pack<type, kPack> param = load<type, kPack>(param_address, valid);
  real* state_address[kStates]{};  // nullptr: not in use
  Pack<real, kPack> state[kStates]{};
#pragma unroll
  for (int s = 0; s < kStates; ++s) {
    if (!has_state<Rule>(entry, prologue.coefficients, s)) continue;
    state_address[s] = static_cast<real*>(entry.states[s]) + model * entry.state_strides[s] + first;
    state[s] = load<real, kPack>(state_address[s], valid);
  }
#pragma unroll
  for (int i = 0; i < kPack; ++i) {
    real wide = T::widen(param.values[i]);
    real of_element[kStates];
#pragma unroll
    for (int s = 0; s < kStates; ++s) of_element[s] = state[s].values[i];
    const real g = GradTransform<real>::apply(prologue.transform, T::widen(grad.values[i]));
    Rule::update(prologue.coefficients, g, &wide, of_element);
#pragma unroll
    for (int s = 0; s < kStates; ++s) state[s].values[i] = of_element[s];
    param.values[i] = T::narrow(wide);
  }
  store(param_address, param, valid);
#pragma unroll
  for (int s = 0; s < kStates; ++s) {
    if (state_address[s] != nullptr) store(state_address[s], state[s], valid);
  }
}

template <class T, class Rule>
__global__ void __launch_bounds__(kThreads)
    step_kernel(const __grid_constant__ mb_optim_cuda_models models,
                const __grid_constant__ Table table) {
  using Own = Prologue<Rule, typename T::real>;
  MB_SHARED_ARRAY(Own, shared, 1);
  for (int64_t model = blockIdx.y; model < models.num_models; model += gridDim.y) {
    if (is_skipped(models, model)) continue;
    __syncthreads();  // Nobody reads the model before any more.
    if (threadIdx.x == 0) shared[0] = prologue_of<Rule, typename T::real>(models, model);
    __syncthreads();
    const Own prologue = shared[0];
    for_each_pack<T::kPack>(table, [&](const Entry& entry, int64_t first) {
      update_pack<T, Rule>(table, entry, prologue, model, first);
    });
  }
}

// A kernel of its own, because the blocks of a step read what this one writes.
__global__ void count_kernel(const __grid_constant__ mb_optim_cuda_models models, int rule) {
  const int64_t model = (int64_t)blockIdx.x * kThreads + threadIdx.x;
  const int64_t num_models = models.num_models;
  if (model >= num_models || is_skipped(models, model)) return;
  if (rule == MB_RULE_SGD && !mb_sgd_counts_step(models.hyper, num_models, model)) return;
  const float counted = models.step[model * models.step_stride] + 1.0f;
  models.step[model * models.step_stride] = counted;
  const double step = (double)counted;
  if (rule == MB_RULE_NADAM) {
    float* product = models.scalars[0] + model;
    *product = mb_nadam_mu_product(models.hyper, num_models, model, step, *product);
  } else if (rule == MB_RULE_ASGD) {
    models.scalars[0][model] = mb_asgd_next_eta(models.hyper, num_models, model, step);
    models.scalars[1][model] = mb_asgd_next_mu(models.hyper, num_models, model, step);
  }
}

// ---- launchers ----------------------------------------------------------------------------------

template <class T, class Rule>
cudaError_t launch_steps(const mb_optim_cuda_models& models, const mb_optim_cuda_tensor* tensors,
                         int64_t num_tensors, cudaStream_t stream) {
  return for_each_table(
      tensors, num_tensors, T::kPack, [&](const Table& table, int64_t num_slices) {
        return MB_CUDA_LAUNCH((step_kernel<T, Rule>), grid_of(num_slices, models.num_models),
                              dim3(kThreads), stream, models, table);
      });
}

template <template <class> class Rule>
cudaError_t launch_steps_of_dtype(int dtype, const mb_optim_cuda_models& models,
                                  const mb_optim_cuda_tensor* tensors, int64_t num_tensors,
                                  cudaStream_t stream) {
  switch (dtype) {
    case MB_OPTIM_F32:
      return launch_steps<F32, Rule<float>>(models, tensors, num_tensors, stream);
    case MB_OPTIM_F64:
      return launch_steps<F64, Rule<double>>(models, tensors, num_tensors, stream);
    case MB_OPTIM_BF16:
      return launch_steps<BF16, Rule<float>>(models, tensors, num_tensors, stream);
    case MB_OPTIM_F16:
      return launch_steps<F16, Rule<float>>(models, tensors, num_tensors, stream);
    default:
      return cudaErrorInvalidValue;
  }
}

cudaError_t launch_steps_of_rule(int rule, int dtype, const mb_optim_cuda_models& models,
                                 const mb_optim_cuda_tensor* tensors, int64_t num_tensors,
                                 cudaStream_t stream) {
  switch (rule) {
    case MB_RULE_SGD:
      return launch_steps_of_dtype<Sgd>(dtype, models, tensors, num_tensors, stream);
    case MB_RULE_ADAM:
      return launch_steps_of_dtype<Adam>(dtype, models, tensors, num_tensors, stream);
    case MB_RULE_ADAMW:
      return launch_steps_of_dtype<AdamW>(dtype, models, tensors, num_tensors, stream);
    case MB_RULE_RMSPROP:
      return launch_steps_of_dtype<RmsProp>(dtype, models, tensors, num_tensors, stream);
    case MB_RULE_ADAGRAD:
      return launch_steps_of_dtype<Adagrad>(dtype, models, tensors, num_tensors, stream);
    case MB_RULE_ADADELTA:
      return launch_steps_of_dtype<Adadelta>(dtype, models, tensors, num_tensors, stream);
    case MB_RULE_ADAMAX:
      return launch_steps_of_dtype<Adamax>(dtype, models, tensors, num_tensors, stream);
    case MB_RULE_RADAM:
      return launch_steps_of_dtype<RAdam>(dtype, models, tensors, num_tensors, stream);
    case MB_RULE_RPROP:
      return launch_steps_of_dtype<Rprop>(dtype, models, tensors, num_tensors, stream);
    case MB_RULE_NADAM:
      return launch_steps_of_dtype<NAdam>(dtype, models, tensors, num_tensors, stream);
    case MB_RULE_ASGD:
      return launch_steps_of_dtype<Asgd>(dtype, models, tensors, num_tensors, stream);
    default:
      return cudaErrorInvalidValue;
  }
}

}  // namespace
}  // namespace modelbatch

extern "C" cudaError_t mb_optim_step_cuda(int rule, int dtype, const mb_optim_cuda_models* models,
                                          const mb_optim_cuda_tensor* tensors, int64_t num_tensors,
                                          cudaStream_t stream) {
  using namespace modelbatch;
  const cudaError_t error =
      launch_steps_of_rule(rule, dtype, *models, tensors, num_tensors, stream);
  if (error != cudaSuccess) return error;
  return MB_CUDA_LAUNCH(count_kernel, dim3((unsigned)divide_up(models->num_models, kThreads)),
                        dim3(kThreads), stream, *models, rule);
}
