// Linears that are given the same x (q, k and v of a self-attention): every y, and in backward one dx.
#include <ATen/ops/stack.h>
#include <ATen/ops/zeros.h>

#include <algorithm>

#include "experts.h"

namespace fera::torch_binding {
namespace {

using at::TensorList;
using Biases = c10::List<OptionalTensor>;
using Forward = std::tuple<std::vector<Tensor>, std::vector<Tensor>>;                   // ys, hs
using Backward = std::tuple<Tensor, Tensor, std::vector<Tensor>, std::vector<Tensor>>;  // dx, dgate, da, db

void check_lists(const char* op, TensorList weights, TensorList lora_a, TensorList lora_b) {
  const size_t members = weights.size();
  FERA_REQUIRE(op, members >= 1 && members <= FERA_MAX_GROUP, "weights", "from 1 to 4", members);
  FERA_REQUIRE(op, lora_a.size() == members, "lora_a", join(members, ", one a weight"), lora_a.size());
  FERA_REQUIRE(op, lora_b.size() == members, "lora_b", join(members, ", one a weight"), lora_b.size());
}

const char* const kIndex[FERA_MAX_GROUP] = {"[0]", "[1]", "[2]", "[3]"};

bool unit_stride(const Tensor& weight) { return weight.stride(1) == 1; }

// gate: (G, E) for all members, or (members, G, E). The latter may be one gate expanded, whose gradients then come back
// unadded: whoever hands out hundreds of such gates sums all gradients once.
class Gates {
 public:
  Gates(const char* op, const Tensor& gate, size_t members) : given_(gate) {
    if (gate.dim() != 3) return;  // others are checked with their member
    FERA_REQUIRE(op, gate.size(0) == static_cast<int64_t>(members), "gate",
                 join("(G, E) or (", members, ", G, E), one a weight"), gate.sizes());
    if (gate.stride(0) == 0) given_ = gate.select(0, 0);
  }
  Tensor operator[](int64_t i) const { return given_.dim() == 3 ? given_.select(0, i) : given_; }

 private:
  Tensor given_;
};

// Whether to ask the core for its kernel of all members, which is a "wgmma" one.
bool may_join(const char* op, const Tensor& x) {
  const bool low = x.scalar_type() == at::kHalf || x.scalar_type() == at::kBFloat16;
  if (!x.is_cuda() || !low || x.numel() == 0) return false;
  const std::string wish = wished(op);
  return wish == "auto" || wish == "wgmma";
}

// Every y and h by one kernel; false where the core has none for these members.
bool joint_forward(const char* op, const Rows& x, TensorList weights, const std::vector<OptionalTensor>& biases,
                   const std::vector<Experts>& experts, std::vector<Tensor>* ys, std::vector<Tensor>* hs) {
  if (!may_join(op, x.tensor) || !std::all_of(weights.begin(), weights.end(), unit_stride)) return false;
  fera_expert_group_args group{static_cast<int32_t>(weights.size()), {}};
  for (size_t i = 0; i < weights.size(); ++i) {
    const OptionalTensor& bias = biases[i];
    if (bias.has_value() && bias->stride(0) != 1) return false;
    const fera_rows out_rows{nullptr, x.view.dtype, experts[i].view.out};
    group.member[i] = {experts[i].view,
                       x.view,
                       out_rows,
                       out_rows,
                       nullptr,
                       weight_rows(weights[i]),
                       bias.has_value() ? bias->data_ptr() : nullptr};
  }
  for (size_t i = 0; i < weights.size(); ++i) {
    (*ys)[i] = empty(with_last(x.tensor, experts[i].view.out), x.tensor.options());
    (*hs)[i] = empty(with_last(x.tensor, experts[i].stacked()), x.tensor.options());
    group.member[i].y.data = (*ys)[i].data_ptr();
    group.member[i].h = (*hs)[i].data_ptr();
  }
  // It checks pointers too, so it is asked once there are some.
  if (!fera_expert_group_takes(&group, FERA_CUDA)) {
    for (Tensor& y : *ys) y.reset();
    return false;
  }
  FERA_CALL(x.tensor, expert_group, group);
  return true;
}

Forward expert_linear_group(const Tensor& given, TensorList weights, const Biases& biases, TensorList lora_a,
                            TensorList lora_b, const Tensor& gate, double scale) {
  const char* op = "expert_linear_group";
  const DeviceScope scope(given);
  const NoAutocast products;
  check_lists(op, weights, lora_a, lora_b);
  const size_t members = weights.size();
  FERA_REQUIRE(op, biases.size() == members, "biases", join(members, ", one a weight"), biases.size());
  dtype_of(op, "x", given);
  FERA_REQUIRE(op, given.dim() >= 2, "x", "(N, ..., in)", given.sizes());
  const Rows x_rows(op, "x", given, given.size(-1));
  const Tensor& x = x_rows.tensor;
  const Gates gates(op, gate, members);
  std::vector<OptionalTensor> bias;
  std::vector<Experts> experts;
  bias.reserve(members);
  experts.reserve(members);
  for (size_t i = 0; i < members; ++i) {
    bias.push_back(biases.get(i));
    check_linear(op, x, weights[i], bias[i], kIndex[i]);
    experts.emplace_back(op, x, weights[i].size(0), lora_a[i], lora_b[i], gates[i], scale, kIndex[i]);
  }
  std::vector<Tensor> ys(members), hs(members);
  if (!joint_forward(op, x_rows, weights, bias, experts, &ys, &hs))
    for (size_t i = 0; i < members; ++i)
      std::tie(ys[i], hs[i]) = linear_forward(op, x, weights[i], bias[i], experts[i]);
  return {ys, hs};
}

// What a member gives to backward, and what is wanted of it: (x, lora_a, lora_b, gate).
struct Upstream {
  const Tensor &dy, &h, &weight;
  const Experts& experts;
  std::array<bool, 4> wanted;
};

// Every gradient, dx by one kernel; false where the core has none for these members. dgates (members, G, E) is written
// where wanted.
bool joint_backward(const char* op, const Rows& x, const std::vector<Upstream>& members, const Tensor& dgates,
                    std::vector<Gradients>* grads) {
  if (!may_join(op, x.tensor)) return false;
  std::vector<Rows> dy_rows;
  std::vector<Tensor> h_rows;
  dy_rows.reserve(members.size());
  for (const Upstream& m : members)
    if (!m.wanted[0] || !unit_stride(m.weight)) return false;
  const Tensor dx = like(true, x.tensor);
  auto data = [](const Tensor& t) { return t.numel() > 0 ? t.data_ptr() : nullptr; };
  const size_t step = dgates.numel() / members.size() * dgates.element_size();
  fera_expert_group_backward_args group{static_cast<int32_t>(members.size()), {}};
  for (size_t i = 0; i < members.size(); ++i) {
    const Upstream& m = members[i];
    dy_rows.emplace_back(op, "dy", m.dy, m.experts.view.out);
    h_rows.push_back(m.h.contiguous());
    Gradients& g = (*grads)[i];
    g = {dx, like(m.wanted[1], m.experts.a), like(m.wanted[2], m.experts.b), {}};
    group.member[i] = {m.experts.view,
                       dy_rows[i].view,
                       x.view,
                       h_rows[i].data_ptr(),
                       {dx.data_ptr(), x.view.dtype, m.experts.view.in},
                       0,
                       data(g.da),
                       data(g.db),
                       step ? static_cast<char*>(dgates.data_ptr()) + i * step : nullptr,
                       weight_rows(m.weight)};
  }
  if (!fera_expert_group_backward_takes(&group, FERA_CUDA)) {
    for (Gradients& g : *grads) g = {};
    return false;
  }
  FERA_CALL(x.tensor, expert_group_backward, group);
  return true;
}

// wanted: x, gate, every lora_a, every lora_b. Gradients that are not wanted come back empty. A gate of each member's
// own gets a gradient for each; one for all gets the sum.
Backward expert_linear_group_backward(TensorList dys, const Tensor& given, TensorList hs, TensorList weights,
                                      TensorList lora_a, TensorList lora_b, const Tensor& gate, double scale,
                                      const c10::List<bool>& wanted) {
  const char* op = "expert_linear_group_backward";
  const DeviceScope scope(given);
  const NoAutocast products;
  check_lists(op, weights, lora_a, lora_b);
  const size_t members = weights.size();
  FERA_REQUIRE(op, dys.size() == members, "dys", join(members, ", one a weight"), dys.size());
  FERA_REQUIRE(op, hs.size() == members, "hs", join(members, ", one a weight"), hs.size());
  FERA_REQUIRE(op, wanted.size() == 2 + 2 * members, "wanted", join(2 + 2 * members), wanted.size());
  dtype_of(op, "x", given);
  FERA_REQUIRE(op, given.dim() >= 2, "x", "(N, ..., in)", given.sizes());
  const Rows x_rows(op, "x", given, given.size(-1));
  const Tensor& x = x_rows.tensor;
  const Gates gates(op, gate, members);
  std::vector<Experts> experts;
  std::vector<Upstream> upstream;
  experts.reserve(members);
  upstream.reserve(members);
  for (size_t i = 0; i < members; ++i) {
    const char* const of = kIndex[i];
    check_upstream(op, x, dys[i], hs[i], of);
    check_linear(op, x, weights[i], {}, of);
    FERA_REQUIRE(op, weights[i].size(0) == dys[i].size(-1), join("dy", of), join("of ", weights[i].size(0), " columns"),
                 dys[i].size(-1));
    experts.emplace_back(op, x, weights[i].size(0), lora_a[i], lora_b[i], gates[i], scale, of);
    check_hidden(op, x, hs[i], experts[i], of);
    upstream.push_back(
        {dys[i], hs[i], weights[i], experts[i], {wanted[0], wanted[2 + i], wanted[2 + members + i], wanted[1]}});
  }
  std::vector<Gradients> grads(members);
  const Tensor& g = experts[0].g;
  const int64_t count = wanted[1] ? static_cast<int64_t>(members) : 0;
  const Tensor dgates = empty({count, g.size(0), g.size(1)}, g.options());
  if (!joint_backward(op, x_rows, upstream, dgates, &grads))
    for (size_t i = 0; i < members; ++i) {
      const Upstream& m = upstream[i];
      const Tensor dgate = wanted[1] ? dgates.select(0, static_cast<int64_t>(i)) : Tensor();
      // The first member writes dx, the others add to it.
      grads[i] = linear_backward(op, m.dy, x, m.h, m.weight, m.experts, m.wanted, dgate,
                                 i > 0 && wanted[0] ? grads[0].dx : Tensor());
    }
  std::vector<Tensor> das, dbs;
  das.reserve(members);
  dbs.reserve(members);
  for (const Gradients& member : grads) {
    das.push_back(member.da);
    dbs.push_back(member.db);
  }
  Tensor dgate = dgates;
  if (!wanted[1]) {
    dgate = dgates.view({0});
  } else if (gate.dim() == 2) {
    dgate = dgates.select(0, 0);
    for (int64_t i = 1; i < count; ++i) dgate.add_(dgates.select(0, i));
  }
  return {grads[0].dx, cast(dgate, gate.scalar_type()), das, dbs};
}

// Of gates (members, G, E) those of the members that are used; a gate for all as it is.
Tensor gates_of(const Tensor& gate, const std::vector<int64_t>& used) {
  if (gate.dim() != 3 || gate.size(0) == static_cast<int64_t>(used.size())) return gate;
  std::vector<Tensor> own;
  for (const int64_t i : used) own.push_back(gate.select(0, i));
  return at::stack(own);
}

// The gradients of those, (used, G, E), as the gate's: zero for the other members.
Tensor spread(const Tensor& dgate, const Tensor& gate, const std::vector<int64_t>& used) {
  if (dgate.sizes() == gate.sizes()) return dgate;
  const Tensor whole = at::zeros(gate.sizes(), dgate.options());
  for (size_t j = 0; j < used.size(); ++j) whole.select(0, used[j]).copy_(dgate.select(0, static_cast<int64_t>(j)));
  return whole;
}

// Kept for backward: x once, every h, and the weights.
class Group : public Formula<Group> {
 public:
  // flat: x, gate, every lora_a, every lora_b, every weight, and the biases that are given.
  static Variables forward(Context* ctx, TensorList flat, int64_t members, const std::vector<bool>& biased,
                           double scale, Variables* hs) {
    auto list = [&](int64_t k) { return flat.slice(2 + k * members, members); };
    Biases biases;
    size_t next = 2 + 3 * members;
    for (const bool given : biased) biases.push_back(given ? OptionalTensor(flat[next++]) : OptionalTensor());
    Variables ys;
    std::tie(ys, *hs) = call_below_autograd<expert_linear_group>("fera_ext::expert_linear_group", flat[0], list(2),
                                                                 biases, list(0), list(1), flat[1], scale);
    ctx->set_materialize_grads(false);
    Variables saved(flat.begin(), flat.begin() + 2 + 3 * members);
    saved.insert(saved.end(), hs->begin(), hs->end());
    ctx->save_for_backward(std::move(saved));
    ctx->saved_data["members"] = members;
    ctx->saved_data["biased"] = c10::List<bool>();
    for (const bool given : biased) ctx->saved_data["biased"].toBoolList().push_back(given);
    ctx->saved_data["scale"] = scale;
    return ys;
  }

  static Variables backward(Context* ctx, const Variables& upstream) {
    const int64_t members = ctx->saved_data["members"].toInt();
    const c10::List<bool> biased = ctx->saved_data["biased"].toBoolList();
    const int64_t inputs = 2 + 3 * members + std::count(biased.begin(), biased.end(), true);
    Variables grads(inputs + 4);
    std::vector<int64_t> used;  // members whose y has a gradient: the others cost nothing
    for (int64_t i = 0; i < members; ++i)
      if (upstream[i].defined()) used.push_back(i);
    if (used.empty()) return grads;
    // Read once: under checkpointing each read asks for the recomputation.
    const Variables saved = ctx->get_saved_variables();
    auto pick = [&](int64_t k) {
      Variables list;
      for (const int64_t i : used) list.push_back(saved[2 + k * members + i]);
      return list;
    };
    Variables dys;
    c10::List<bool> wanted({ctx->needs_input_grad(0), ctx->needs_input_grad(1)});
    for (const int64_t i : used) dys.push_back(upstream[i]);
    for (const int64_t k : {0, 1})
      for (const int64_t i : used) wanted.push_back(ctx->needs_input_grad(2 + k * members + i));
    if (std::count(wanted.begin(), wanted.end(), true) > 0) {
      const auto [dx, dgate, das, dbs] = call_operator<expert_linear_group_backward>(
          "fera_ext::expert_linear_group_backward", dys, saved[0], pick(3), pick(2), pick(0), pick(1),
          gates_of(saved[1], used), ctx->saved_data["scale"].toDouble(), wanted);
      if (wanted[0]) grads[0] = dx;
      if (wanted[1]) grads[1] = spread(dgate, saved[1], used);
      for (size_t j = 0; j < used.size(); ++j) {
        if (wanted[2 + j]) grads[2 + used[j]] = das[j];
        if (wanted[2 + used.size() + j]) grads[2 + members + used[j]] = dbs[j];
      }
    }
    int64_t bias = 2 + 3 * members;
    for (int64_t i = 0; i < members; ++i) {
      const int64_t weight = 2 + 2 * members + i;
      Tensor dbias;
      if (upstream[i].defined())
        std::tie(grads[weight], dbias) = base_gradients(upstream[i], saved[0], ctx->needs_input_grad(weight),
                                                        biased[i] && ctx->needs_input_grad(bias));
      if (biased[i]) grads[bias++] = dbias;
    }
    return grads;
  }
};

Forward expert_linear_group_autograd(const Tensor& x, TensorList weights, const Biases& biases, TensorList lora_a,
                                     TensorList lora_b, const Tensor& gate, double scale) {
  const size_t members = weights.size();
  std::vector<Tensor> flat{x, gate};
  for (const TensorList list : {lora_a, lora_b, weights}) flat.insert(flat.end(), list.begin(), list.end());
  std::vector<bool> biased;
  for (const OptionalTensor& bias : biases) {
    biased.push_back(bias.has_value() && bias->defined());
    if (biased.back()) flat.push_back(*bias);
  }
  const bool even = lora_a.size() == members && lora_b.size() == members && biased.size() == members;
  if (!even || !recorded(TensorList(flat)))  // lists of unlike lengths are refused there
    return call_below_autograd<expert_linear_group>("fera_ext::expert_linear_group", x, weights, biases, lora_a, lora_b,
                                                    gate, scale);
  Variables hs;
  const Variables ys = Group::apply(TensorList(flat), static_cast<int64_t>(members), biased, scale, &hs);
  return {ys, hs};
}

// As for expert_linear: the base product's operands go to the autocast dtype.
template <c10::DeviceType Device, c10::DispatchKey Key>
Forward expert_linear_group_autocast(const Tensor& x, TensorList weights, const Biases& biases, TensorList lora_a,
                                     TensorList lora_b, const Tensor& gate, double scale) {
  const c10::impl::ExcludeDispatchKeyGuard guard(Key);
  const at::ScalarType type = at::autocast::get_autocast_dtype(Device);
  Biases cast;
  for (const OptionalTensor& bias : biases) cast.push_back(at::autocast::cached_cast(type, bias, Device));
  return call_operator<expert_linear_group>("fera_ext::expert_linear_group", at::autocast::cached_cast(type, x, Device),
                                            at::autocast::cached_cast(type, weights, Device), cast, lora_a, lora_b,
                                            gate, scale);
}

void register_kernels(torch::Library& m) {
  m.impl("expert_linear_group", expert_linear_group);
  m.impl("expert_linear_group_backward", expert_linear_group_backward);
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(fera_ext, m) {
  m.def(
      "expert_linear_group(Tensor x, Tensor[] weights, Tensor?[] biases, Tensor[] lora_a, Tensor[] lora_b,"
      " Tensor gate, float scale) -> (Tensor[] ys, Tensor[] hs)");
  m.def(
      "expert_linear_group_backward(Tensor[] dys, Tensor x, Tensor[] hs, Tensor[] weights, Tensor[] lora_a,"
      " Tensor[] lora_b, Tensor gate, float scale, bool[] wanted)"
      " -> (Tensor dx, Tensor dgate, Tensor[] da, Tensor[] db)");
}

TORCH_LIBRARY_IMPL(fera_ext, CPU, m) { register_kernels(m); }
TORCH_LIBRARY_IMPL(fera_ext, Autograd, m) { m.impl("expert_linear_group", expert_linear_group_autograd); }
TORCH_LIBRARY_IMPL(fera_ext, AutocastCPU, m) {
  m.impl("expert_linear_group", expert_linear_group_autocast<c10::DeviceType::CPU, c10::DispatchKey::AutocastCPU>);
}
#if defined(FERA_TORCH_CUDA)
TORCH_LIBRARY_IMPL(fera_ext, CUDA, m) { register_kernels(m); }
TORCH_LIBRARY_IMPL(fera_ext, AutocastCUDA, m) {
  m.impl("expert_linear_group", expert_linear_group_autocast<c10::DeviceType::CUDA, c10::DispatchKey::AutocastCUDA>);
}
#endif

}  // namespace fera::torch_binding
