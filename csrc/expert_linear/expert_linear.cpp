#include "expert_linear/expert_linear.h"

#include "common/entry.h"

FERA_ENTRY(expert_update)
FERA_ENTRY(expert_update_backward)
FERA_ENTRY(expert_dropout)

namespace fera {
namespace {

size_t expert_group_workspace_cpu(const fera_expert_group_args&) { return 0; }
size_t expert_group_backward_workspace_cpu(const fera_expert_group_backward_args&) { return 0; }

fera_status one_by_one(const char* op) {
  set_last_error(std::string(op) + ": device must be CUDA, where members run as one, got the CPU");
  return FERA_UNSUPPORTED;
}

}  // namespace
}  // namespace fera

FERA_ENTRY(expert_group)
FERA_ENTRY(expert_group_backward)

extern "C" fera_status fera_expert_group_cpu(const fera_expert_group_args*, const fera_context*) {
  return fera::one_by_one("expert_group");
}
extern "C" fera_status fera_expert_group_backward_cpu(const fera_expert_group_backward_args*, const fera_context*) {
  return fera::one_by_one("expert_group_backward");
}

namespace {

template <class Args>
const char* variant([[maybe_unused]] const Args& a, fera_device device) {
#if defined(FERA_WITH_CUDA)
  if (device == FERA_CUDA) return fera::expert_variant_cuda(a);
#endif
  return device == FERA_CPU ? fera_cpu_isa() : "";
}

}  // namespace

extern "C" const char* fera_expert_variant(const fera_expert_update_args* a, fera_device device) {
  return variant(*a, device);
}
extern "C" const char* fera_expert_backward_variant(const fera_expert_update_backward_args* a, fera_device device) {
  return variant(*a, device);
}

namespace {

template <class Group>
[[maybe_unused]] bool drops(const Group& g) {
  for (int i = 0; i < g.members && i < FERA_MAX_GROUP; ++i)
    if (g.member[i].experts.dropout != 0) return true;
  return false;
}

}  // namespace

extern "C" int fera_expert_group_takes([[maybe_unused]] const fera_expert_group_args* g, fera_device device) {
#if defined(FERA_WITH_CUDA)
  if (device == FERA_CUDA) return !drops(*g) && fera::expert_group_takes_cuda(*g);
#endif
  (void)device;
  return 0;
}
extern "C" int fera_expert_group_backward_takes([[maybe_unused]] const fera_expert_group_backward_args* g,
                                                fera_device device) {
#if defined(FERA_WITH_CUDA)
  if (device == FERA_CUDA) return !drops(*g) && fera::expert_group_takes_cuda(*g);
#endif
  (void)device;
  return 0;
}
