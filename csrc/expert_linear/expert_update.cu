// expert_update on CUDA: the skinny products of the gated multi-expert linear.
//   forward   h = x A^T;  y = base + (gate scale h) B^T
//   backward  dh = dy B;  dgate = scale sum h dh;  dx (+)= (gate scale dh) A;
//             dA = (gate scale dh)^T x;  dB = dy^T (gate scale h), both in slices of tokens, then summed
#include <cstdlib>
#include <cstring>

#include "expert_linear/expert_linear.h"
#include "expert_linear/fused.h"
#include "expert_linear/product.cuh"
#include "expert_linear/skinny.h"

namespace fera {
namespace cuda {
namespace {

// Slices of the token axis in dA and dB: enough to fill a large GPU, never shorter than 256 tokens.
int64_t token_slices(int64_t tokens) { return std::max<int64_t>(1, std::min<int64_t>(64, tokens / 256)); }

template <class Real>
struct BackwardLayout {
  Real *dh, *partial;
  size_t bytes;
  BackwardLayout(const fera_expert_update_backward_args& a, void* base) {
    const fera_experts& e = a.experts;
    const int64_t stacked = int64_t{e.experts} * e.rank;
    const int64_t widest = std::max(a.da ? e.in : 0, a.db ? e.out : 0);
    Workspace workspace(base);
    dh = workspace.take<Real>(e.tokens * stacked);
    partial = workspace.take<Real>(token_slices(e.tokens) * widest * stacked);
    bytes = workspace.used();
  }
};

// grid (G, E): dgate[g][m] = scale * sum over the group's tokens and expert m's ranks of h dh.
template <class T>
__global__ void __launch_bounds__(256) gate_gradient(const T* h, const Compute<T>* dh, int64_t rows_per_gate, int rank,
                                                     Compute<T> scale, Compute<T>* dgate) {
  __shared__ double scratch[32];  // a group may have 10^5 tokens: its sum is kept in float64
  const int64_t group = blockIdx.x, experts = gridDim.y, first = group * rows_per_gate;
  double sum = 0;
  for (int64_t i = threadIdx.x; i < rows_per_gate * rank; i += blockDim.x) {
    const int64_t at = (first + i / rank) * experts * rank + blockIdx.y * rank + i % rank;
    sum += static_cast<double>(widen(h[at])) * dh[at];
  }
  sum = block_sum(sum, scratch);
  if (threadIdx.x == 0) dgate[group * experts + blockIdx.y] = static_cast<Compute<T>>(sum * scale);
}

template <class T>
void forward(const fera_expert_update_args& a, cudaStream_t stream) {
  using Real = Compute<T>;
  const fera_experts& e = a.experts;
  const int64_t stacked = int64_t{e.experts} * e.rank;
  T* h = static_cast<T*>(a.h);
  const auto down = [&](auto x) {
    launch_product<Real, 128, 16>(e.tokens, stacked, e.in, 1, x, WeightOperand<T>{e.lora_a, e.a_dtype, 1, e.in},
                                  AddRows<T>{h, stacked, nullptr, 0}, stream);
  };
  const RowsOperand<T> x{static_cast<const T*>(a.x.data), a.x.stride};
  if (e.dropout > 0)
    down(DroppedOperand<T>{x, dropout_of(e)});
  else
    down(x);
  launch_product<Real, 64, 64>(
      e.tokens, e.out, stacked, 1,
      GatedOperand<T, T>{h, static_cast<const Real*>(e.gate), e.rows_per_gate, e.experts, e.rank,
                         static_cast<Real>(e.scale)},
      WeightOperand<T>{e.lora_b, e.b_dtype, 1, stacked},
      AddRows<T>{static_cast<T*>(a.y.data), a.y.stride, static_cast<const T*>(a.base.data), a.base.stride}, stream);
}

template <class Real>
void sum_slices(const Real* partial, int64_t slices, int64_t m, int64_t n, void* out, fera_dtype dtype,
                int64_t stride_m, int64_t stride_n, cudaStream_t stream) {
  add_slices<Real><<<static_cast<unsigned>(ceil_div(m * n, int64_t{256})), 256, 0, stream>>>(partial, slices, m, n, out,
                                                                                             dtype, stride_m, stride_n);
}

template <class T>
void backward(const fera_expert_update_backward_args& a, const BackwardLayout<Compute<T>>& l, cudaStream_t stream) {
  using Real = Compute<T>;
  const fera_experts& e = a.experts;
  const int64_t stacked = int64_t{e.experts} * e.rank;
  const int64_t slices = e.tokens > 0 ? token_slices(e.tokens) : 0;
  const T *x = static_cast<const T*>(a.x.data), *dy = static_cast<const T*>(a.dy.data);
  const T* h = static_cast<const T*>(a.h);
  const Real *gate = static_cast<const Real*>(e.gate), scale = static_cast<Real>(e.scale);
  if (slices > 0 && (a.dx.data || a.da || a.dgate)) {
    launch_product<Real, 128, 16>(e.tokens, stacked, e.out, 1, RowsOperand<T>{dy, a.dy.stride},
                                  WeightOperand<T>{e.lora_b, e.b_dtype, stacked, 1},
                                  StorePartial<Real>{l.dh, e.tokens, stacked}, stream);
    if (a.dgate) {
      const dim3 grid(static_cast<unsigned>(e.tokens / e.rows_per_gate), e.experts);
      gate_gradient<T><<<grid, 256, 0, stream>>>(h, l.dh, e.rows_per_gate, e.rank, scale, static_cast<Real*>(a.dgate));
    }
    if (a.dx.data) {
      T* dx = static_cast<T*>(a.dx.data);
      const auto up = [&](auto out) {
        launch_product<Real, 64, 64>(e.tokens, e.in, stacked, 1,
                                     GatedOperand<T, Real>{l.dh, gate, e.rows_per_gate, e.experts, e.rank, scale},
                                     WeightOperand<T>{e.lora_a, e.a_dtype, e.in, 1}, out, stream);
      };
      const AddRows<T> out{dx, a.dx.stride, a.add_to_dx ? dx : nullptr, a.dx.stride};
      if (e.dropout > 0)
        up(AddDroppedRows<T>{out, dropout_of(e)});
      else
        up(out);
    }
  }
  if (a.da) {
    const auto across = [&](auto rows) {
      launch_product<Real, 128, 16>(e.in, stacked, e.tokens, slices, rows,
                                    GatedOperand<T, Real>{l.dh, gate, e.rows_per_gate, e.experts, e.rank, scale},
                                    StorePartial<Real>{l.partial, e.in, stacked}, stream);
    };
    const RowsOperand<T, true> rows{x, a.x.stride};
    if (slices > 0 && e.dropout > 0)
      across(DroppedOperand<T, true>{rows, dropout_of(e)});
    else if (slices > 0)
      across(rows);
    sum_slices(l.partial, slices, e.in, stacked, a.da, e.a_dtype, 1, e.in, stream);
  }
  if (a.db) {
    if (slices > 0)
      launch_product<Real, 128, 16>(e.out, stacked, e.tokens, slices, RowsOperand<T, true>{dy, a.dy.stride},
                                    GatedOperand<T, T>{h, gate, e.rows_per_gate, e.experts, e.rank, scale},
                                    StorePartial<Real>{l.partial, e.out, stacked}, stream);
    sum_slices(l.partial, slices, e.out, stacked, a.db, e.b_dtype, stacked, 1, stream);
  }
}

}  // namespace
}  // namespace cuda

namespace {

// FERA_EXPERT_VARIANT asks for one; empty or auto leaves the choice here, and so does library, which is the bindings'.
const char* wished() {
  const char* value = std::getenv("FERA_EXPERT_VARIANT");
  return value == nullptr || *value == 0 || std::strcmp(value, "library") == 0 ? "auto" : value;
}
bool wished(const char* variant) { return std::strcmp(wished(), variant) == 0; }

// library: the vendor's products, which the bindings call; the kernels here would be slower.
enum class Variant { none, tiles, mma, wgmma, library };

const char* name_of(Variant v) {
  constexpr const char* kNames[] = {"", "tiles", "mma", "wgmma", "library"};
  return kNames[static_cast<int>(v)];
}

enum class Pass { forward, backward };
constexpr Pass pass_of(const fera_expert_update_args&) { return Pass::forward; }
constexpr Pass pass_of(const fera_expert_update_backward_args&) { return Pass::backward; }

// What auto chooses: the first row whose pass and dtype are the call's, whose arch the device has, whose max_rank holds
// R, whose min_size tokens * (in + out) reaches, and whose variant takes the operands.
struct Choice {
  Pass pass;
  fera_dtype dtype;
  int arch, max_rank;
  int64_t min_size;
  Variant variant;
};
constexpr Choice kChoices[] = {
#include "expert_linear/choices.inc"
};

int arch_of_device() {
  int device = 0, major = 0, minor = 0;
  if (cudaGetDevice(&device) != cudaSuccess ||
      cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device) != cudaSuccess ||
      cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device) != cudaSuccess)
    cudaGetLastError();  // no device is an answer here, and an error where something is launched
  return 10 * major + minor;
}

template <class Args>
bool takes(Variant variant, const Args& a) {
  if (variant == Variant::wgmma)
    return (a.weight.data != nullptr || !cuda::fused_needs_weight(a)) && *cuda::fused_refuses(a) == 0;
  return variant != Variant::mma || *cuda::skinny_refuses(a) == 0;
}

template <class Args>
Variant chosen(const Args& a) {
  const fera_experts& e = a.experts;
  const int arch = arch_of_device();
  const int64_t size = e.tokens * (e.in + e.out);
  for (const Choice& c : kChoices)
    if (c.pass == pass_of(a) && c.dtype == a.x.dtype && c.arch <= arch && e.experts * e.rank <= c.max_rank &&
        size >= c.min_size && takes(c.variant, a))
      return c.variant;
  return takes(Variant::mma, a) ? Variant::mma : Variant::library;
}

bool known() { return wished("auto") || wished("tiles") || wished("mma") || wished("wgmma"); }

// A weight asks for the fused kernel and nothing else; without one, where it needs one, a wish for it is a wish for its
// skinny products.
template <class Args>
Variant variant_of(const Args& a) {
  if (!known()) return Variant::none;
  if (a.weight.data != nullptr)
    return (wished("auto") || wished("wgmma")) && *cuda::fused_refuses(a) == 0 ? Variant::wgmma : Variant::none;
  if ((wished("auto") || wished("wgmma")) && !cuda::fused_needs_weight(a) && takes(Variant::wgmma, a))
    return Variant::wgmma;
  const bool skinny = *cuda::skinny_refuses(a) == 0;
  if (wished("tiles") || (wished("auto") && !skinny)) return Variant::tiles;
  return skinny ? Variant::mma : Variant::none;
}

// A wish that cannot be granted is an error, never another kernel.
template <class Args>
fera_status check_wish(const char* op, const Args& a) {
  FERA_CHECK(op, known(), "FERA_EXPERT_VARIANT", "auto, tiles, mma, wgmma or library", wished());
  if (variant_of(a) != Variant::none) return FERA_OK;
  if (a.weight.data != nullptr) {
    const char* why = cuda::fused_refuses(a);
    FERA_CHECK(op, false, "weight", std::string("NULL where ") + (*why ? why : "another variant is forced"),
               "a pointer");
  }
  FERA_CHECK(op, false, "FERA_EXPERT_VARIANT", std::string("auto or tiles where ") + cuda::skinny_refuses(a), wished());
}

}  // namespace

size_t expert_update_workspace_cuda(const fera_expert_update_args& a) {
  if (a.experts.tokens == 0) return 0;
  switch (variant_of(a)) {
    case Variant::wgmma:
      return cuda::fused_workspace(a);
    case Variant::mma:
      return cuda::skinny_workspace(a);
    default:
      return 0;
  }
}

size_t expert_update_backward_workspace_cuda(const fera_expert_update_backward_args& a) {
  if (a.experts.in < 1 || a.experts.out < 1) return 0;  // arguments that are not checked yet
  const Variant variant = a.experts.tokens > 0 ? variant_of(a) : Variant::tiles;
  if (variant == Variant::wgmma) return cuda::fused_workspace(a);
  if (variant == Variant::mma) return cuda::skinny_workspace(a);
  return a.x.dtype == FERA_F64 ? cuda::BackwardLayout<double>(a, nullptr).bytes
                               : cuda::BackwardLayout<float>(a, nullptr).bytes;
}

const char* expert_variant_cuda(const fera_expert_update_args& a) {
  return name_of(wished("auto") ? chosen(a) : variant_of(a));
}
const char* expert_variant_cuda(const fera_expert_update_backward_args& a) {
  return name_of(wished("auto") ? chosen(a) : variant_of(a));
}

}  // namespace fera

extern "C" fera_status fera_expert_update_cuda(const fera_expert_update_args* a, const fera_context* context) {
  using namespace fera;
  FERA_RETURN_IF_ERROR(check(*a));
  if (a->experts.tokens == 0) return FERA_OK;
  FERA_RETURN_IF_ERROR(check_wish("expert_update", *a));
  FERA_RETURN_IF_ERROR(check_workspace("expert_update", context, expert_update_workspace_cuda(*a)));
  const Variant variant = variant_of(*a);
  if (variant == Variant::wgmma) return cuda::fused_launch(*a, context);
  if (variant == Variant::mma) return cuda::skinny_launch(*a, context);
  FERA_RETURN_IF_ERROR(cuda::dispatch(a->x.dtype, [&](auto tag) {
    cuda::forward<typename decltype(tag)::type>(*a, cuda::stream_of(context));
    return FERA_OK;
  }));
  return cuda::launch_status("expert_update");
}

extern "C" fera_status fera_expert_update_backward_cuda(const fera_expert_update_backward_args* a,
                                                        const fera_context* context) {
  using namespace fera;
  FERA_RETURN_IF_ERROR(check(*a));
  // With no tokens there is nothing to choose: the tiles write zeros.
  const Variant variant = a->experts.tokens > 0 ? variant_of(*a) : Variant::tiles;
  if (a->experts.tokens > 0) FERA_RETURN_IF_ERROR(check_wish("expert_update_backward", *a));
  FERA_RETURN_IF_ERROR(check_workspace("expert_update_backward", context, expert_update_backward_workspace_cuda(*a)));
  if (variant == Variant::wgmma) return cuda::fused_launch(*a, context);
  if (variant == Variant::mma) return cuda::skinny_launch(*a, context);
  FERA_RETURN_IF_ERROR(cuda::dispatch(a->x.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    const cuda::BackwardLayout<cuda::Compute<T>> layout(*a, context->workspace);
    cuda::backward<T>(*a, layout, cuda::stream_of(context));
    return FERA_OK;
  }));
  return cuda::launch_status("expert_update_backward");
}
