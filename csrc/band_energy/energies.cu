// Which variant of the band kernels runs: cluster.cuh where it has a kernel for the device, size, dtype and layout,
// else grid.cuh. FERA_BAND_VARIANT=cluster or grid asks for one; empty or auto leaves the choice here.
#include <cstdlib>
#include <cstring>

#include "band_energy/band_energy.h"
#include "band_energy/cluster.h"
#include "band_energy/grid.cuh"

namespace fera::cuda {
namespace {

const char* wished() {
  const char* value = std::getenv("FERA_BAND_VARIANT");
  return value == nullptr || *value == 0 ? "auto" : value;
}

bool use_cluster(const Source& source, const fera_filters& filters, ClusterTask task) {
  return std::strcmp(wished(), "grid") != 0 && cluster_takes(source, filters, task);
}

bool known() {
  const char* wish = wished();
  return std::strcmp(wish, "auto") == 0 || std::strcmp(wish, "grid") == 0 || std::strcmp(wish, "cluster") == 0;
}

// Whether a wish for clusters goes unheard; a latent without elements has nothing to compute in any variant.
bool denied(const Source& source, bool cluster) {
  return !cluster && std::strcmp(wished(), "cluster") == 0 && source.n * source.p != 0;
}

// A wish that cannot be granted is an error, never another kernel.
fera_status check_wish(const char* op, const Source& source, bool cluster) {
  FERA_CHECK(op, known(), "FERA_BAND_VARIANT", "auto, cluster or grid", wished());
  FERA_CHECK(op, !denied(source, cluster), "FERA_BAND_VARIANT", "auto or grid for this device, size, dtype and layout",
             wished());
  return FERA_OK;
}

}  // namespace

const char* band_variant(const Source& source, const fera_filters& filters) {
  const bool cluster = use_cluster(source, filters, ClusterTask::energies);
  if (!known() || denied(source, cluster)) return "";
  return cluster ? "cluster" : "grid";
}

size_t energies_workspace(const Source& source, const fera_filters& filters) {
  return use_cluster(source, filters, ClusterTask::energies) ? cluster_workspace(source, filters)
                                                             : grid_energies_workspace(source, filters);
}
size_t adjoint_workspace(const Source& source, const fera_filters& filters) {
  return use_cluster(source, filters, ClusterTask::adjoint) ? 0 : grid_adjoint_workspace(source, filters);
}

fera_status launch_energies(const char* op, const Source& source, const fera_filters& filters,
                            const Finish<float>& finish, float* loss, const fera_context* context) {
  const bool cluster = use_cluster(source, filters, ClusterTask::energies);
  FERA_RETURN_IF_ERROR(check_wish(op, source, cluster));
  // Again, because the wish may have changed since the caller asked how much it must bring.
  FERA_RETURN_IF_ERROR(check_workspace(
      op, context, cluster ? cluster_workspace(source, filters) : grid_energies_workspace(source, filters)));
  return cluster ? cluster_energies_launch(op, source, filters, finish, loss, context)
                 : grid_energies(op, source, filters, finish, loss, context);
}
fera_status launch_energies(const char* op, const Source& source, const fera_filters& filters,
                            const Finish<double>& finish, double* loss, const fera_context* context) {
  FERA_RETURN_IF_ERROR(check_wish(op, source, false));
  FERA_RETURN_IF_ERROR(check_workspace(op, context, grid_energies_workspace(source, filters)));
  return grid_energies(op, source, filters, finish, loss, context);
}

fera_status launch_adjoint(const char* op, const Source& source, const fera_filters& filters, const Coefficients& from,
                           const View& dz, fera_dtype dz_dtype, const fera_context* context) {
  const bool cluster = use_cluster(source, filters, ClusterTask::adjoint);
  FERA_RETURN_IF_ERROR(check_wish(op, source, cluster));
  FERA_RETURN_IF_ERROR(check_workspace(op, context, cluster ? 0 : grid_adjoint_workspace(source, filters)));
  return cluster ? cluster_adjoint_launch(op, source, filters, from, {dz, dz_dtype != source.dtype}, nullptr, nullptr,
                                          context)
                 : grid_adjoint(op, source, filters, from, dz, dz_dtype, context);
}

fera_status launch_fecl(const char* op, const Source& source, const fera_filters& filters, const Finish<float>& finish,
                        float* loss, const View& gradient, double* factor, const fera_context* context, bool* done) {
  const bool one = use_cluster(source, filters, ClusterTask::fecl);
  *done = one ||
          (use_cluster(source, filters, ClusterTask::energies) && use_cluster(source, filters, ClusterTask::adjoint));
  if (!*done) return FERA_OK;
  FERA_RETURN_IF_ERROR(check_wish(op, source, true));
  FERA_RETURN_IF_ERROR(check_workspace(op, context, cluster_workspace(source, filters)));
  if (one) return cluster_fecl_launch(op, source, filters, finish, loss, gradient, factor, context);
  FERA_RETURN_IF_ERROR(cluster_energies_launch(op, source, filters, finish, nullptr, context));
  const Coefficients from{finish.coefficients, nullptr, nullptr, nullptr, 0, factor};
  return cluster_adjoint_launch(op, source, filters, from, {gradient, true}, finish.losses, loss, context);
}

}  // namespace fera::cuda
