// Which variant of the band kernels runs: strips.cuh for separable filters and cluster.cuh for spectral ones, where
// they have a kernel for the device, size, dtype and layout, else grid.cuh. FERA_BAND_VARIANT=cluster, strips or grid
// asks for one; empty or auto leaves the choice here. FERA_BAND_CLUSTER asks for the cluster variant with given
// numbers.
#include <cstdlib>
#include <cstring>

#include "band_energy/band_energy.h"
#include "band_energy/cluster.h"
#include "band_energy/grid.cuh"
#include "band_energy/strips.h"

namespace fera::cuda {
namespace {

enum class Variant { grid, cluster, strips };

const char* name_of(Variant v) { return v == Variant::cluster ? "cluster" : v == Variant::strips ? "strips" : "grid"; }

const char* wished() {
  const char* value = std::getenv("FERA_BAND_VARIANT");
  if (value != nullptr && *value != 0 && std::strcmp(value, "auto") != 0) return value;
  return cluster_wish_given() ? "cluster" : "auto";
}
bool wishes(const char* name) { return std::strcmp(wished(), name) == 0; }

Variant choose(const Source& source, const fera_filters& filters, ClusterTask task) {
  if (wishes("grid")) return Variant::grid;
  if (!wishes("strips") && cluster_takes(source, filters, task)) return Variant::cluster;
  if (!wishes("cluster") && strips_takes(source, filters)) return Variant::strips;
  return Variant::grid;
}

bool known() { return wishes("auto") || wishes("grid") || wishes("cluster") || wishes("strips"); }

// Whether a wish goes unheard; a latent without elements has nothing to compute in any variant.
bool denied(const Source& source, Variant variant) {
  return !wishes("auto") && !wishes(name_of(variant)) && source.n * source.p != 0;
}

// A wish that cannot be granted is an error, never another kernel.
fera_status check_wish(const char* op, const Source& source, Variant variant) {
  FERA_CHECK(op, known(), "FERA_BAND_VARIANT", "auto, cluster, strips or grid", wished());
  FERA_CHECK(op, cluster_wish_known(), kClusterWish, "like blocks=8,threads=256,clusters=2,pairs=1,launches=2,split=2",
             std::getenv(kClusterWish));
  const bool denies = denied(source, variant);
  FERA_CHECK(op, !(denies && cluster_wish_given() && wishes("cluster")), kClusterWish,
             "one that this device, size, dtype, layout and these bands have", std::getenv(kClusterWish));
  FERA_CHECK(op, !denies, "FERA_BAND_VARIANT",
             "auto or another variant for this device, size, dtype, layout and these bands", wished());
  return FERA_OK;
}

size_t energies_bytes(Variant variant, const Source& source, const fera_filters& filters) {
  if (variant == Variant::cluster) return cluster_workspace(source, filters);
  return variant == Variant::strips ? strips_energies_workspace(source, filters)
                                    : grid_energies_workspace(source, filters);
}
size_t adjoint_bytes(Variant variant, const Source& source, const fera_filters& filters) {
  if (variant == Variant::cluster) return source.signals == 2 ? cluster_fecl_workspace(source, filters) : 0;
  return variant == Variant::strips ? strips_adjoint_workspace(source, filters)
                                    : grid_adjoint_workspace(source, filters);
}

}  // namespace

const char* band_variant(const Source& source, const fera_filters& filters) {
  const Variant variant = choose(source, filters, ClusterTask::energies);
  return !known() || denied(source, variant) ? "" : name_of(variant);
}

size_t energies_workspace(const Source& source, const fera_filters& filters) {
  return energies_bytes(choose(source, filters, ClusterTask::energies), source, filters);
}
size_t adjoint_workspace(const Source& source, const fera_filters& filters) {
  return adjoint_bytes(choose(source, filters, ClusterTask::adjoint), source, filters);
}

fera_status launch_energies(const char* op, const Source& source, const fera_filters& filters,
                            const Finish<float>& finish, float* loss, const fera_context* context) {
  const Variant variant = choose(source, filters, ClusterTask::energies);
  FERA_RETURN_IF_ERROR(check_wish(op, source, variant));
  // Again, because the wish may have changed since the caller asked how much it must bring.
  FERA_RETURN_IF_ERROR(check_workspace(op, context, energies_bytes(variant, source, filters)));
  if (variant == Variant::cluster) return cluster_energies_launch(op, source, filters, finish, loss, context);
  return variant == Variant::strips ? strips_energies_launch(op, source, filters, finish, loss, context)
                                    : grid_energies(op, source, filters, finish, loss, context);
}
fera_status launch_energies(const char* op, const Source& source, const fera_filters& filters,
                            const Finish<double>& finish, double* loss, const fera_context* context) {
  FERA_RETURN_IF_ERROR(check_wish(op, source, Variant::grid));
  FERA_RETURN_IF_ERROR(check_workspace(op, context, grid_energies_workspace(source, filters)));
  return grid_energies(op, source, filters, finish, loss, context);
}

fera_status launch_adjoint(const char* op, const Source& source, const fera_filters& filters, const Coefficients& from,
                           const View& dz, fera_dtype dz_dtype, const fera_context* context) {
  Variant variant = choose(source, filters, ClusterTask::adjoint);
  FERA_RETURN_IF_ERROR(check_wish(op, source, variant));
  // The others make two signals' gradient only from what their energies kept: launch_fecl.
  if (source.signals == 2) variant = Variant::grid;
  FERA_RETURN_IF_ERROR(check_workspace(op, context, adjoint_bytes(variant, source, filters)));
  const Output to{dz, dz_dtype != source.dtype};
  if (variant == Variant::cluster) return cluster_adjoint_launch(op, source, filters, from, to, context);
  return variant == Variant::strips ? strips_adjoint_launch(op, source, filters, from, to, context)
                                    : grid_adjoint(op, source, filters, from, dz, dz_dtype, context);
}

fera_status launch_fecl(const char* op, const Source& source, const fera_filters& filters, const Finish<float>& finish,
                        float* loss, const View& gradient, double* factor, const fera_context* context, bool* done) {
  const Variant variant = choose(source, filters, ClusterTask::energies);
  *done = variant != Variant::grid;
  if (!*done) return FERA_OK;
  FERA_RETURN_IF_ERROR(check_wish(op, source, variant));
  FERA_RETURN_IF_ERROR(check_workspace(op, context, adjoint_bytes(variant, source, filters)));
  return variant == Variant::strips ? strips_fecl_launch(op, source, filters, finish, loss, gradient, factor, context)
                                    : cluster_fecl_launch(op, source, filters, finish, loss, gradient, factor, context);
}

}  // namespace fera::cuda
