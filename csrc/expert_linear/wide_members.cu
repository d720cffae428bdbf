// Calls of wide ranks whose h, dh, dA and dB are made beside the product's tiles (fused_wide.cuh): one linear or up to
// four of one x.
#include "expert_linear/wide.h"
#include "expert_linear/wide_host.h"

namespace fera::cuda {
namespace {

// A member's share of the workspace; `casts` takes what has to be copied, scaled or cleared there.
template <class Args>
struct MemberLayout {
  static constexpr bool kBack = std::is_same_v<Args, fera_expert_update_backward_args>;
  const void *first, *second;  // the weights of h = x A^T or dh = dy B; gate scale B or A, one a gate row
  int* ready;
  void* dh;  // the rest backward
  Slices db, da;
  float *db_sums, *da_sums, *gate_sums;  // where asked for
  size_t bytes;

  MemberLayout(const Args& args, void* base, WideCasts* casts) {
    const fera_experts& e = args.experts;
    const int64_t stacked = stacked_of(e);
    Workspace workspace(base);
    if constexpr (kBack) {
      first = casts->take(e.lora_b, e.b_dtype, stacked * e.out, &workspace);
      second = casts->take_gated(e.lora_a, e.a_dtype, stacked * e.in, e, e.in, &workspace);
    } else {
      first = casts->take(e.lora_a, e.a_dtype, stacked * e.in, &workspace);
      second = casts->take_gated(e.lora_b, e.b_dtype, stacked * e.out, e, 1, &workspace);
    }
    ready = casts->zeros(1 + wide_flags(e), &workspace);
    if constexpr (kBack) {
      dh = workspace.take<Half>(e.tokens * stacked);
      // Items of a queue: all multiprocessors at work, then half an item's time until the last has ended.
      const auto cut = [&](int64_t m, int64_t n) {
        const double tiles = static_cast<double>(wide_tiles(m)) * wide_tiles(n);
        return cut_slices(e.rows_per_gate, e.tokens / e.rows_per_gate, m, n, [&](double steps, double slices) {
          return wide_item_time(steps) * (tiles * slices / (2 * std::max(hopper(), 1)) + 0.5);
        });
      };
      db = cut(e.out, stacked);
      da = cut(stacked, e.in);
      // dgate comes from dB's partial sums.
      db_sums = args.db || args.dgate ? workspace.take<float>(db.count() * e.out * stacked) : nullptr;
      da_sums = args.da ? workspace.take<float>(da.count() * e.in * stacked) : nullptr;
      gate_sums = args.dgate ? workspace.take<float>(int64_t{db.count()} * wide_tiles(e.out) * stacked) : nullptr;
    }
    bytes = workspace.used();
  }
};

Product product_of(const fera_expert_update_args& a, const MemberLayout<fera_expert_update_args>& l) {
  const fera_experts& e = a.experts;
  Product p{a.x, a.weight, a.y, false, a.bias, a.h, l.second, e.tokens, e.out, e.in, static_cast<int>(stacked_of(e)),
            {},  {}};
  p.narrow.a = l.first;
  p.items.ready = l.ready;
  p.items.layers = static_cast<int>(e.tokens / e.rows_per_gate);
  return p;
}
Product product_of(const fera_expert_update_backward_args& a, const MemberLayout<fera_expert_update_backward_args>& l) {
  const fera_experts& e = a.experts;
  const int layers = static_cast<int>(e.tokens / e.rows_per_gate);
  Product p{a.dy,
            a.weight,
            a.dx,
            true,
            nullptr,
            l.dh,
            l.second,
            e.tokens,
            e.in,
            e.out,
            static_cast<int>(stacked_of(e)),
            {},
            {l.ready, a.h, l.db_sums, l.da_sums, l.gate_sums, layers, l.db, l.da}};
  p.narrow.a = l.first;
  return p;
}

template <class Args>
fera_status run(const char* op, int members, const Call<Args>* calls, bool summed, Products* products,
                const fera_context* context, WideReduce* reduce) {
  const cudaStream_t stream = stream_of(context);
  WideCasts casts(calls[0].args->x.dtype);
  products->members = members;
  products->summed = summed;
  products->place = Place::wide;
  for (int i = 0; i < members; ++i) {
    const Args& a = *calls[i].args;
    const MemberLayout<Args> l(a, calls[i].workspace, &casts);
    products->member[i] = product_of(a, l);
    if constexpr (std::is_same_v<Args, fera_expert_update_backward_args>)
      reduce->member[i] = wide_sums_of(a, l.da, true, l.db, l.da_sums, l.db_sums, l.gate_sums);
  }
  FERA_RETURN_IF_ERROR(casts.launch(op, stream));
  return launch_products(op, *products, true, stream);
}

template <class Args>
size_t bytes_of(const Args& a) {
  WideCasts casts(a.x.dtype);
  return MemberLayout<Args>(a, nullptr, &casts).bytes;
}

}  // namespace

size_t wide_members_workspace(const fera_expert_update_args& a) { return bytes_of(a); }
size_t wide_members_workspace(const fera_expert_update_backward_args& a) { return bytes_of(a); }

fera_status wide_members(const char* op, int members, const Call<fera_expert_update_args>* calls,
                         const fera_context* context) {
  Products products{};
  return run(op, members, calls, false, &products, context, nullptr);
}
fera_status wide_members(const char* op, int members, const Call<fera_expert_update_backward_args>* calls,
                         const fera_context* context) {
  const fera_expert_update_backward_args& first = *calls[0].args;
  Products products{};
  products.other = first.x;
  products.other_columns = first.experts.in;
  WideReduce reduce{static_cast<int>(stacked_of(first.experts)), {}};
  FERA_RETURN_IF_ERROR(run(op, members, calls, true, &products, context, &reduce));
  return launch_wide_reduce(op, reduce, stream_of(context));
}

}  // namespace fera::cuda
