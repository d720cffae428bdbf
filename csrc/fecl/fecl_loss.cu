// fecl_loss on CUDA: the energies of d = fera - base and r = fera - target with the loss and, where the gradient is
// asked for, the filters' adjoint of both, summed before the inverse transform: two launches at most. Backward only
// scales.
#include <algorithm>

#include "band_energy/energies.cuh"
#include "common/cuda_overlap.cuh"
#include "fecl/fecl.h"

namespace fera {
namespace cuda {
namespace {

// The coefficients outlive the energies' scratch, whose place the adjoint takes.
struct Layout {
  double *losses, *coefficients;  // (N) (N, 2, K+1), the latter with gradient
  char* scratch;
  size_t scratch_bytes, bytes;
};

Layout lay_out(const fera_fecl_loss_args& a, void* base) {
  const Source source = source_of(a.base, a.fera, a.target);
  Workspace workspace(base);
  Layout layout{};
  const int64_t samples = std::max<int64_t>(a.fera.n, 0), bands = std::max(a.filters.bands, 0);
  layout.scratch_bytes = energies_workspace(source, a.filters);
  layout.losses = workspace.take<double>(samples);
  if (a.gradient != nullptr) {
    layout.scratch_bytes = std::max(layout.scratch_bytes, adjoint_workspace(source, a.filters));
    layout.coefficients = workspace.take<double>(samples * 2 * (bands + 1));
  }
  layout.scratch = workspace.take<char>(static_cast<int64_t>(layout.scratch_bytes));
  layout.bytes = workspace.used();
  return layout;
}

constexpr int kScaleThreads = 256;

// Elements of a load or store of 16 bytes, of the wider of both types.
template <class T>
constexpr int kVector = 16 / sizeof(Compute<T>);

template <class T>
struct alignas(kVector<T> * sizeof(T)) Narrow {
  T at[kVector<T>];
};
template <class T>
struct alignas(16) Wide {
  Compute<T> at[kVector<T>];
};

// dfera = gradient * (factor[n] * grad); x: elements of a sample, y: samples. Dense: dfera is contiguous, and a
// sample's elements and dfera's start divide into vectors.
template <class T, bool Dense>
__global__ void __launch_bounds__(kScaleThreads)
    fecl_scale(const Compute<T>* gradient, const double* factor, const Compute<T>* grad, View dfera, int64_t samples,
               int64_t planes, int h, int w) {
  using Real = Compute<T>;
  constexpr int V = Dense ? kVector<T> : 1;
  const int64_t count = planes * h * w, at = (static_cast<int64_t>(blockIdx.x) * kScaleThreads + threadIdx.x) * V;
  wait_for_previous();
  if (at >= count) return;
  const double upstream = static_cast<double>(*grad);
  for (int64_t n = blockIdx.y; n < samples; n += gridDim.y) {
    const Scale<Real> scale(factor[n] * upstream);
    if constexpr (Dense) {
      const Wide<T> in = *reinterpret_cast<const Wide<T>*>(gradient + n * count + at);
      Narrow<T> out;
#pragma unroll
      for (int i = 0; i < V; ++i) out.at[i] = narrow<T>(scale(in.at[i]));
      *reinterpret_cast<Narrow<T>*>(static_cast<T*>(dfera.data) + n * count + at) = out;
    } else {
      const int64_t row = at / w, plane = row / h;
      const int x = static_cast<int>(at - row * w), y = static_cast<int>(row - plane * h);
      static_cast<T*>(dfera.data)[dfera.offset(n, plane, y, x)] = narrow<T>(scale(gradient[n * count + at]));
    }
  }
}

bool contiguous(const fera_latent& z) {
  return (z.stride_w == 1 || z.w == 1) && (z.stride_h == z.w || z.h == 1) && (z.stride_p == z.h * z.w || z.p == 1) &&
         (z.stride_n == z.p * z.h * z.w || z.n == 1);
}

template <class T>
fera_status launch_scale(const fera_fecl_loss_backward_args& a, cudaStream_t stream) {
  using Real = Compute<T>;
  const fera_latent& z = a.dfera;
  const int64_t count = z.p * z.h * z.w;
  const auto aligned = [](const void* p, size_t bytes) { return reinterpret_cast<uintptr_t>(p) % bytes == 0; };
  const bool dense = contiguous(z) && count % kVector<T> == 0 && aligned(z.data, sizeof(Narrow<T>)) &&
                     aligned(a.gradient, sizeof(Wide<T>));
  const int64_t threads = dense ? count / kVector<T> : count;
  const dim3 grid(static_cast<unsigned>(ceil_div<int64_t>(threads, kScaleThreads)),
                  static_cast<unsigned>(std::min<int64_t>(z.n, 4096)));
  const Real *gradient = static_cast<const Real*>(a.gradient), *grad = static_cast<const Real*>(a.grad);
  return launch_early("fecl_loss_backward", dense ? fecl_scale<T, true> : fecl_scale<T, false>, grid, kScaleThreads,
                      stream, gradient, a.factor, grad, view_of(z), z.n, z.p, static_cast<int>(z.h),
                      static_cast<int>(z.w));
}

}  // namespace
}  // namespace cuda

size_t fecl_loss_workspace_cuda(const fera_fecl_loss_args& a) { return cuda::lay_out(a, nullptr).bytes; }

size_t fecl_loss_backward_workspace_cuda(const fera_fecl_loss_backward_args&) { return 0; }

}  // namespace fera

extern "C" fera_status fera_fecl_loss_cuda(const fera_fecl_loss_args* a, const fera_context* context) {
  using namespace fera;
  FERA_RETURN_IF_ERROR(check(*a));
  FERA_RETURN_IF_ERROR(check_workspace("fecl_loss", context, fera_fecl_loss_workspace(a, FERA_CUDA)));
  const cuda::Layout layout = cuda::lay_out(*a, context->workspace);
  fera_context inner = *context;
  inner.workspace = layout.scratch;
  inner.workspace_bytes = layout.scratch_bytes;
  const cuda::Source source = cuda::source_of(a->base, a->fera, a->target);
  const fera_latent gradient = gradient_of(*a);
  bool done = false;
  FERA_RETURN_IF_ERROR(dispatch_compute(a->fera.dtype, [&](auto tag) {
    using Real = typename decltype(tag)::type;
    cuda::Finish<Real> finish{};
    finish.bands = a->filters.bands;
    finish.eps = a->eps;
    finish.losses = layout.losses;
    finish.coefficients = layout.coefficients;
    finish.weight = 1.0 / static_cast<double>(a->fera.n);
    Real* const loss = static_cast<Real*>(a->loss);
    if constexpr (std::is_same_v<Real, float>)
      if (gradient.data != nullptr)
        FERA_RETURN_IF_ERROR(cuda::launch_fecl("fecl_loss", source, a->filters, finish, loss, cuda::view_of(gradient),
                                               a->factor, &inner, &done));
    return done ? FERA_OK : cuda::launch_energies("fecl_loss", source, a->filters, finish, loss, &inner);
  }));
  if (done) return FERA_OK;
  if (gradient.data == nullptr || gradient.n * gradient.p == 0) return FERA_OK;
  const cuda::Coefficients from{layout.coefficients, nullptr, nullptr, nullptr, 0, a->factor};
  return cuda::launch_adjoint("fecl_loss", source, a->filters, from, cuda::view_of(gradient), gradient.dtype, &inner);
}

extern "C" fera_status fera_fecl_loss_backward_cuda(const fera_fecl_loss_backward_args* a,
                                                    const fera_context* context) {
  using namespace fera;
  FERA_RETURN_IF_ERROR(check(*a));
  FERA_RETURN_IF_ERROR(check_workspace("fecl_loss_backward", context, 0));
  if (a->dfera.n * a->dfera.p == 0) return FERA_OK;
  return cuda::dispatch(a->dfera.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    return cuda::launch_scale<T>(*a, cuda::stream_of(context));
  });
}
