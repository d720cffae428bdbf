#include <algorithm>
#include <climits>
#include <iterator>

#include "band_energy/asked.h"
#include "band_energy/plane.h"
#include "band_energy/plane_fecl.cuh"

namespace fera::cuda {
namespace {

// Of every kernel that is built: height, width, rows and columns of a patch, blocks of a plane, threads of a block,
// whether a thread's first weights wait in registers; and how many planes (pairs of signals' for FECL) a call has at
// least that takes it without being asked, for energies, adjoint and FECL, on 132 multiprocessors (README). Of several
// the last that has enough; never: only where it is asked for.
constexpr int never = INT_MAX;
#define FERA_PLANE_SIZES(X)                         \
  X(64, 64, 4, 4, 1, 256, true, 44, 44, 1)          \
  X(72, 128, 4, 8, 1, 288, true, 44, 44, 44)        \
  X(128, 128, 8, 4, 1, 512, true, 32, 67, 22)       \
  X(128, 128, 8, 4, 2, 512, true, never, 27, never) \
  X(104, 152, 4, 8, 4, 224, false, never, never, 1) \
  X(104, 152, 4, 8, 1, 512, false, 44, 44, 16)      \
  X(104, 156, 4, 6, 1, 352, true, 44, 67, 22)       \
  X(104, 156, 4, 6, 2, 352, true, never, 27, never) \
  X(104, 156, 4, 6, 4, 192, true, 27, never, never)

constexpr int kPortableCluster = 8;  // blocks that a cluster may have anywhere

struct Kernels {
  int h, w, split, threads;
  int least[3];  // planes, by ClusterTask
  size_t bytes;
  void (*energies)(Source, const float*, int, Finish<float>, double*, bool);
  void (*gradient)(Source, const float*, int, Coefficients, Output);
  void (*fecl[3])(Source, const float*, int, PlaneFecl);  // by FeclPart
};

template <class F, int S, int Threads, bool Ahead>
constexpr Kernels kernels(int energies, int adjoint, int fecl) {
  return {F::H,
          F::W,
          S,
          Threads,
          {energies, adjoint, fecl},
          F::template bytes<S>,
          plane_energies<F, S, Threads, Ahead>,
          plane_gradient<F, S, Threads, Ahead>,
          {plane_fecl < F, S, Threads, Ahead && !kPlanesShare<F, S, Threads>, FeclPart::whole >, plane_fecl < F, S,
           Threads, Ahead && !kPlanesShare<F, S, Threads>, FeclPart::energies >, plane_fecl < F, S, Threads,
           Ahead && !kPlanesShare<F, S, Threads>, FeclPart::gradient > }};
}

const Kernels kKernels[] = {
#define FERA_KERNELS(H, W, HB, WB, S, T, AHEAD, E, A, L) kernels<PlaneSize<H, W, HB, WB>, S, T, AHEAD>(E, A, L),
    FERA_PLANE_SIZES(FERA_KERNELS)
#undef FERA_KERNELS
};

// Planes whose energies, and pairs of planes whose FECL, run side by side; 0 where the kernels do not run.
struct Room {
  int planes, pairs;
};

// Asked once a device and kernel; also raises the kernels' limits there.
Room room_of(const Kernels& k) {
  static Asked<std::size(kKernels)> asked;
  const Answer found = asked(&k - kKernels, [&](int device, Answer* answer) {
    int cooperative = 0, launches = 0, multiprocessors = 0, planes = 0, pairs = 0;
    bool ok = cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device) == cudaSuccess &&
              cudaDeviceGetAttribute(&launches, cudaDevAttrClusterLaunch, device) == cudaSuccess &&
              cudaDeviceGetAttribute(&cooperative, cudaDevAttrCooperativeLaunch, device) == cudaSuccess &&
              cooperative != 0 && launches != 0;
    const auto allow = [&](const void* kernel, size_t bytes) {
      cudaFuncAttributes attributes{};
      ok = ok && cudaFuncGetAttributes(&attributes, kernel) == cudaSuccess && attributes.ptxVersion >= 90 &&
           cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(bytes)) ==
               cudaSuccess;
    };
    allow(reinterpret_cast<const void*>(k.energies), k.bytes);
    allow(reinterpret_cast<const void*>(k.gradient), k.bytes);
    for (const FeclPart part : {FeclPart::whole, FeclPart::energies, FeclPart::gradient})
      allow(reinterpret_cast<const void*>(k.fecl[static_cast<int>(part)]), k.bytes);
    const auto ask = [&](int* clusters, auto kernel, int blocks, size_t bytes) {
      if (blocks == 1) {
        int here = 0;
        ok = ok && cudaOccupancyMaxActiveBlocksPerMultiprocessor(&here, kernel, k.threads, bytes) == cudaSuccess;
        *clusters = here * multiprocessors;
        return;
      }
      cudaLaunchAttribute attribute = cluster_of(blocks);
      cudaLaunchConfig_t config{};
      config.gridDim = dim3(blocks);
      config.blockDim = dim3(k.threads);
      config.dynamicSmemBytes = bytes;
      config.attrs = &attribute;
      config.numAttrs = 1;
      ok = ok && cudaOccupancyMaxActiveClusters(clusters, kernel, &config) == cudaSuccess;
    };
    ask(&planes, k.energies, k.split, k.bytes);
    if (2 * k.split <= kPortableCluster) ask(&pairs, k.fecl[static_cast<int>(FeclPart::whole)], 2 * k.split, k.bytes);
    *answer = {planes, pairs};
    return ok;
  });
  return {found.first, found.second};
}

// What a call takes by itself, or, where there is none, any that it could be asked to take; within the wish.
const Kernels* find(const Source& s, ClusterTask task, const PlaneWish& wish, bool* enough) {
  const Kernels* found = nullptr;
  int most = -1;
  for (const Kernels& k : kKernels) {
    if (k.h != s.h || k.w != s.w || (wish.threads != 0 && k.threads != wish.threads) ||
        (wish.split != 0 && k.split != wish.split))
      continue;
    const int least = k.least[static_cast<int>(s.signals == 2 ? ClusterTask::fecl : task)];
    const int here = s.n * s.pairs() >= least ? least : 0;
    if (here <= most) continue;
    found = &k;
    most = here;
  }
  *enough = most > 0;
  return found;
}
const Kernels& find(const Source& s, ClusterTask task, const PlaneWish& wish) {
  bool enough;
  return *find(s, task, wish, &enough);
}

template <class... Parameters, class... Arguments>
fera_status launch(const char* op, void (*kernel)(Parameters...), int64_t blocks, int cluster, size_t bytes,
                   const Kernels& k, bool cooperative, const fera_context* context, Arguments&&... arguments) {
  cudaLaunchAttribute attributes[2]{};
  unsigned count = 0;
  if (cluster > 1) attributes[count++] = cluster_of(cluster);
  attributes[count].id = cudaLaunchAttributeCooperative;
  attributes[count].val.cooperative = 1;
  if (cooperative) ++count;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(blocks));
  config.blockDim = dim3(k.threads);
  config.dynamicSmemBytes = bytes;
  config.stream = stream_of(context);
  config.attrs = attributes;
  config.numAttrs = count;
  cudaLaunchKernelEx(&config, kernel, arguments...);
  return launch_status(op);
}

fera_status launch(const char* op, FeclPart part, const Source& s, const fera_filters& f, const PlaneFecl& to,
                   const Kernels& k, const fera_context* context) {
  const int cluster = part == FeclPart::energies ? k.split : 2 * k.split;
  return launch(op, k.fecl[static_cast<int>(part)], s.n * s.pairs() * 2 * k.split, cluster, k.bytes, k,
                part == FeclPart::whole, context, s, masks_of(f), static_cast<int>(f.bands), to);
}

PlaneFecl fecl_of(const Finish<float>& finish, float* loss, const fera_context* context) {
  return {static_cast<double*>(context->workspace), finish.eps, finish.weight, finish.losses, loss, {}, nullptr};
}

}  // namespace

bool plane_takes(const Source& s, const fera_filters& f, ClusterTask task, bool wished, const PlaneWish& wish) {
  if (f.blurs != 0 || s.dtype == FERA_F64 || s.n <= 0 || s.p <= 0 || s.whole.stride_w != 1) return false;
  if (s.signals == 2 && (s.minus[0].stride_w != 1 || s.minus[1].stride_w != 1)) return false;
  bool enough = false;
  const Kernels* const k = find(s, task, wish, &enough);
  if (k == nullptr || !(wished || enough) || s.virtual_samples() * s.pairs() * k->split > INT_MAX) return false;
  return room_of(*k).planes > 0;
}

// (N, pairs, S, K), of two signals (N, pairs, S, 2, K+1)
size_t plane_workspace(const Source& s, const fera_filters& f, const PlaneWish& wish) {
  const int64_t sums = s.signals == 2 ? 2 * (f.bands + 1) : f.bands;
  return align256(sizeof(double) * std::max<int64_t>(s.n, 0) * s.pairs() * find(s, ClusterTask::energies, wish).split *
                  sums);
}

fera_status plane_energies_launch(const char* op, const Source& s, const fera_filters& f, const Finish<float>& finish,
                                  float* loss, const PlaneWish& wish, const fera_context* context) {
  const Kernels& k = find(s, ClusterTask::energies, wish);
  const int blocks = s.pairs() * k.split;  // of a sample
  if (s.signals == 1) {
    const bool together =
        blocks <= kPortableCluster && s.n * s.pairs() <= room_of(k).planes * 7 / 8 && wish.launches != 2;
    const int64_t planes = together ? s.n * s.pairs() : std::min<int64_t>(room_of(k).planes, s.n * s.pairs());
    return launch(op, k.energies, planes * k.split, together ? blocks : k.split, k.bytes, k, !together, context, s,
                  masks_of(f), static_cast<int>(f.bands), finish, static_cast<double*>(context->workspace), together);
  }
  const PlaneFecl to = fecl_of(finish, loss, context);
  FERA_RETURN_IF_ERROR(launch(op, FeclPart::energies, s, f, to, k, context));
  return launch_early(op, plane_loss, dim3(1), kLossThreads, stream_of(context), to, s.n, blocks,
                      static_cast<int>(f.bands), 1.0 / (static_cast<double>(s.h) * s.w));
}

fera_status plane_adjoint_launch(const char* op, const Source& s, const fera_filters& f, const Coefficients& from,
                                 const Output& dz, const PlaneWish& wish, const fera_context* context) {
  const Kernels& k = find(s, ClusterTask::adjoint, wish);
  return launch(op, k.gradient, s.n * s.pairs() * k.split, k.split, k.bytes, k, false, context, s, masks_of(f),
                static_cast<int>(f.bands), from, dz);
}

bool plane_fecl_fits(const Source& s, const PlaneWish& wish) {
  return s.n * s.pairs() <= room_of(find(s, ClusterTask::fecl, wish)).pairs;
}

fera_status plane_fecl_launch(const char* op, const Source& s, const fera_filters& f, const Finish<float>& finish,
                              float* loss, const View& gradient, double* factor, const PlaneWish& wish,
                              const fera_context* context) {
  const Kernels& k = find(s, ClusterTask::fecl, wish);
  PlaneFecl to = fecl_of(finish, loss, context);
  to.dz = {gradient, true};
  to.factor = factor;
  const bool once = wish.launches != 0 ? wish.launches == 1 : plane_fecl_fits(s, wish);
  if (once) return launch(op, FeclPart::whole, s, f, to, k, context);
  FERA_RETURN_IF_ERROR(launch(op, FeclPart::energies, s, f, to, k, context));
  return launch(op, FeclPart::gradient, s, f, to, k, context);
}

}  // namespace fera::cuda
