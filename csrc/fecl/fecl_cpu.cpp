// CPU entry points of fecl_loss.
#include <algorithm>
#include <cmath>
#include <limits>

#include "band_energy/energies_cpu.h"
#include "common/carver.h"
#include "common/cpu_parallel.h"
#include "common/dispatch.h"
#include "fecl/fecl.h"
#include "fecl/fecl_sample.h"

namespace fera {
namespace {

// The coefficients outlive the energies' scratch, whose place the adjoint takes.
struct Layout {
  double* coefficients = nullptr;  // (N, 2, K + 1), with gradient
  char* scratch = nullptr;
  size_t scratch_bytes = 0, bytes = 0;
};

Layout lay_out(const fera_fecl_loss_args& a, void* base) {
  const cpu::Source source = cpu::source_of(a.base, a.fera, a.target);
  Carver carver{static_cast<char*>(base)};
  Layout layout;
  layout.scratch_bytes = cpu::energies_workspace(source, a.filters);
  if (a.gradient != nullptr && layout.scratch_bytes > 0) {
    layout.scratch_bytes = std::max(layout.scratch_bytes, cpu::adjoint_workspace(source, a.filters));
    layout.coefficients = carver.take<double>(a.fera.n * 2 * (a.filters.bands + 1));
  }
  layout.scratch = carver.take<char>(static_cast<int64_t>(layout.scratch_bytes));
  layout.bytes = carver.used;
  return layout;
}

template <class S, class T>
void scale_row(const T* from, double factor, void* to, int64_t offset, int64_t count, int64_t step) {
  S* out = static_cast<S*>(to) + offset;
  for (int64_t i = 0; i < count; ++i)
    cpu::narrow(static_cast<T>(static_cast<double>(from[i]) * factor), out + i * step);
}

template <class S, class T>
void scale(const fera_fecl_loss_backward_args& a, const fera_context* context) {
  const fera_latent& z = a.dfera;
  const double grad = static_cast<double>(*static_cast<const T*>(a.grad));
  const int64_t rows = z.n * z.p * z.h;
  cpu::parallel_for(context, rows, std::max<int64_t>(1, 16384 / z.w), [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      const int64_t plane = row / z.h, n = plane / z.p;
      const int64_t offset = n * z.stride_n + plane % z.p * z.stride_p + row % z.h * z.stride_h;
      scale_row<S>(static_cast<const T*>(a.gradient) + row * z.w, a.factor[n] * grad, z.data, offset, z.w, z.stride_w);
    }
  });
}

}  // namespace

size_t fecl_loss_workspace_cpu(const fera_fecl_loss_args& a) { return lay_out(a, nullptr).bytes; }

size_t fecl_loss_backward_workspace_cpu(const fera_fecl_loss_backward_args&) { return 0; }

}  // namespace fera

extern "C" fera_status fera_fecl_loss_cpu(const fera_fecl_loss_args* args, const fera_context* context) {
  using namespace fera;
  FERA_RETURN_IF_ERROR(check(*args));
  FERA_RETURN_IF_ERROR(check_workspace("fecl_loss", context, fecl_loss_workspace_cpu(*args)));
  const Layout layout = lay_out(*args, context->workspace);
  fera_context inner = *context;
  inner.workspace = layout.scratch;
  inner.workspace_bytes = layout.scratch_bytes;
  const cpu::Source source = cpu::source_of(args->base, args->fera, args->target);
  const double* energies;
  const int* exponents;
  cpu::run_energies(source, args->filters, &inner, &energies, &exponents);
  const int64_t samples = args->fera.n;
  const int bands = args->filters.bands, count = bands + 1;
  double loss = 0;
  for (int64_t n = 0; n < samples; ++n) {
    double e[2][FERA_MAX_BANDS + 1];
    for (int s = 0; s < 2; ++s)
      for (int k = 0; k < count; ++k)
        e[s][k] = std::ldexp(energies[(s * samples + n) * count + k], 2 * exponents[s * samples + n]);
    double* c = layout.coefficients == nullptr ? nullptr : layout.coefficients + n * 2 * count;
    loss += fecl_sample(e[0], e[1], bands, args->eps, 1.0 / static_cast<double>(samples), c);
  }
  // The mean over no samples is NaN, as in torch.
  loss = samples == 0 ? std::numeric_limits<double>::quiet_NaN() : loss / static_cast<double>(samples);
  if (args->fera.dtype == FERA_F64)
    *static_cast<double*>(args->loss) = loss;
  else
    *static_cast<float*>(args->loss) = static_cast<float>(loss);
  if (args->gradient == nullptr) return FERA_OK;
  const cpu::Coefficients from{layout.coefficients, nullptr, nullptr, nullptr, 0, args->factor};
  cpu::run_adjoint(source, args->filters, from, gradient_of(*args), &inner);
  return FERA_OK;
}

extern "C" fera_status fera_fecl_loss_backward_cpu(const fera_fecl_loss_backward_args* args,
                                                   const fera_context* context) {
  using namespace fera;
  FERA_RETURN_IF_ERROR(check(*args));
  FERA_RETURN_IF_ERROR(check_workspace("fecl_loss_backward", context, 0));
  if (args->dfera.n * args->dfera.p == 0) return FERA_OK;
  return dispatch_dtype<cpu::Half, cpu::Bfloat>(args->dfera.dtype, [&](auto tag) {
    using S = typename decltype(tag)::type;
    scale<S, std::conditional_t<std::is_same_v<S, double>, double, float>>(*args, context);
    return FERA_OK;
  });
}
