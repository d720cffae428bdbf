/* fera.h: the C ABI of the fera kernels. Compiles as C99 and C++, without CUDA and without torch.
 *
 * Conventions
 *   - Every operator is three functions: fera_<op>_workspace (bytes of scratch for these arguments),
 *     fera_<op>_cpu and fera_<op>_cuda. The CUDA ones exist in every build; in a build without CUDA they
 *     return FERA_UNSUPPORTED.
 *   - Pointers are device pointers for *_cuda and host pointers for *_cpu. Structs live on the host.
 *   - Sizes and strides are int64, in elements. A NULL output is not computed.
 *   - "compute dtype" is float64 when the data is float64, else float32. All accumulation is in it or wider.
 *   - Nothing allocates, synchronises or prints. The caller brings the workspace (aligned to 256 bytes).
 *   - A status other than FERA_OK leaves a sentence for this thread in fera_last_error():
 *     "<op>: <argument> must be <rule>, got <value>".
 *   - Results are bit-identical from run to run; no floating-point atomics.
 */
#ifndef FERA_FERA_H
#define FERA_FERA_H

#include <stddef.h>
#include <stdint.h>

#if defined(_WIN32)
#define FERA_API __declspec(dllexport)
#else
#define FERA_API __attribute__((visibility("default")))
#endif

#ifdef __cplusplus
extern "C" {
#endif

#define FERA_VERSION "0.1.0"
#define FERA_MAX_SIDE 512   /* latent height and width */
#define FERA_MAX_BANDS 16   /* K */
#define FERA_MAX_HIDDEN 256 /* router hidden units */
#define FERA_MAX_EXPERTS 32 /* E */
#define FERA_MAX_RANK 512   /* R = E * r */

typedef enum fera_dtype { FERA_F32 = 0, FERA_F16 = 1, FERA_BF16 = 2, FERA_F64 = 3 } fera_dtype;

typedef enum fera_status {
  FERA_OK = 0,
  FERA_INVALID = 1,     /* an argument breaks its rule */
  FERA_UNSUPPORTED = 2, /* this build has no kernel for it */
  FERA_CUDA_ERROR = 3   /* the CUDA runtime reported an error */
} fera_status;

typedef enum fera_device { FERA_CPU = 0, FERA_CUDA = 1 } fera_device;

/* Runs body(data, begin, end) over a partition of [0, count), each piece at least `grain` long, on any
 * number of threads; returns when all are done. A kernel's result never depends on the partition. */
typedef void (*fera_parallel_for)(void* pool, int64_t count, int64_t grain,
                                  void (*body)(void* data, int64_t begin, int64_t end), void* data);

typedef struct fera_context {
  void* stream;               /* CUDA: cudaStream_t. CPU: unused */
  fera_parallel_for parallel; /* CPU: NULL runs on the calling thread. CUDA: unused */
  void* pool;                 /* passed through to parallel */
  void* workspace;            /* at least fera_<op>_workspace(args, device) bytes */
  size_t workspace_bytes;
} fera_context;

/* N samples of P real planes of H x W pixels; any strides. */
typedef struct fera_latent {
  void* data;
  fera_dtype dtype;
  int64_t n, p, h, w;
  int64_t stride_n, stride_p, stride_h, stride_w;
} fera_latent;

/* The filters of a band definition at one latent size, in the compute dtype, contiguous.
 * Spectral (blurs == 0): table (K, H, W/2+1) squared transfers on the half spectrum, symmetric under
 *   w -> -w;  E_k = 1/(HW) sum over the full spectrum of |Z|^2 table_k.
 * Separable (blurs = J > 0): table (J, H, H), right (J, W, W), mix (K, J);  b_j = table_j z right_j^T,
 *   band_k = sum_j mix[k][j] b_j,  E_k = |band_k|^2.  Entries farther than reach[j] from the diagonal are 0. */
typedef struct fera_filters {
  int32_t bands; /* K */
  int32_t blurs; /* J, or 0 */
  const void* table;
  const void* right;
  const void* mix;
  int32_t reach[FERA_MAX_BANDS];
} fera_filters;

/* ---- band_energy: E_k = |H_k z|^2 summed over all but the batch, and e = E / (sum E + eps) ---- */
typedef struct fera_band_energy_args {
  fera_latent z;
  fera_filters filters;
  double eps;      /* of the indicator */
  void* energy;    /* (N, K) compute dtype, or NULL; infinite where E exceeds the dtype's range */
  void* indicator; /* (N, K) compute dtype, or NULL; right even where E itself leaves the dtype's range, as long as
                    * the latent's spectrum does not (float32: |z| H W below 3e38; float64: |z| H W below 1e150) */
  double* total;   /* (N) sum_k E_k + eps, or NULL */
} fera_band_energy_args;

FERA_API size_t fera_band_energy_workspace(const fera_band_energy_args*, fera_device);
FERA_API fera_status fera_band_energy_cpu(const fera_band_energy_args*, const fera_context*);
FERA_API fera_status fera_band_energy_cuda(const fera_band_energy_args*, const fera_context*);

/* dz for an upstream gradient of the energies, or (indicator and total given) of the indicator:
 * dL/dE_k = (sum_j e_j (grad_k - grad_j) + grad_k eps / total) / total.  dz = sum_k 2 dL/dE_k H_k^T H_k z. */
typedef struct fera_band_energy_backward_args {
  fera_latent z;
  fera_filters filters;
  const void* grad;      /* (N, K) compute dtype */
  const void* indicator; /* (N, K) compute dtype, or NULL */
  const double* total;   /* (N), or NULL */
  fera_latent dz;        /* same sizes and dtype as z */
  double eps;            /* of the indicator, where that is given */
} fera_band_energy_backward_args;

FERA_API size_t fera_band_energy_backward_workspace(const fera_band_energy_backward_args*, fera_device);
FERA_API fera_status fera_band_energy_backward_cpu(const fera_band_energy_backward_args*, const fera_context*);
FERA_API fera_status fera_band_energy_backward_cuda(const fera_band_energy_backward_args*, const fera_context*);

/* ---- router: gate = softmax((w2 relu(w1 e + b1) + b2) / tau), all in the compute dtype, contiguous ---- */
typedef struct fera_router {
  fera_dtype dtype;               /* FERA_F32 or FERA_F64 */
  int32_t bands, hidden, experts; /* K, hidden, E */
  const void *w1, *b1, *w2, *b2;  /* (hidden, K) (hidden) (E, hidden) (E) */
  double tau;
} fera_router;

typedef struct fera_router_softmax_args {
  fera_router router;
  int64_t n;
  const void* energy; /* (N, K) */
  void* gate;         /* (N, E) */
} fera_router_softmax_args;

FERA_API size_t fera_router_softmax_workspace(const fera_router_softmax_args*, fera_device);
FERA_API fera_status fera_router_softmax_cpu(const fera_router_softmax_args*, const fera_context*);
FERA_API fera_status fera_router_softmax_cuda(const fera_router_softmax_args*, const fera_context*);

typedef struct fera_router_softmax_backward_args {
  fera_router router;
  int64_t n;
  const void* energy;          /* (N, K) */
  const void* gate;            /* (N, E), the forward's result */
  const void* grad;            /* (N, E) */
  void* denergy;               /* (N, K), or NULL */
  void *dw1, *db1, *dw2, *db2; /* like the weights; all four, or all NULL */
} fera_router_softmax_backward_args;

FERA_API size_t fera_router_softmax_backward_workspace(const fera_router_softmax_backward_args*, fera_device);
FERA_API fera_status fera_router_softmax_backward_cpu(const fera_router_softmax_backward_args*, const fera_context*);
FERA_API fera_status fera_router_softmax_backward_cuda(const fera_router_softmax_backward_args*, const fera_context*);

/* ---- latent_gate: the indicator of z through the router; energy.indicator is required (backward needs it) ---- */
typedef struct fera_latent_gate_args {
  fera_band_energy_args energy;
  fera_router router;
  void* gate; /* (N, E) compute dtype */
} fera_latent_gate_args;

FERA_API size_t fera_latent_gate_workspace(const fera_latent_gate_args*, fera_device);
FERA_API fera_status fera_latent_gate_cpu(const fera_latent_gate_args*, const fera_context*);
FERA_API fera_status fera_latent_gate_cuda(const fera_latent_gate_args*, const fera_context*);

/* ---- fecl_loss: d = fera - base, r = fera - target, norms per sample
 * L = mean_n sum_k w_k (|d_k|/(|d|+eps) - |r_k|/(|r|+eps))^2,  w_k = |r_k|^2 / (sum_j |r_j|^2 + eps) ---- */
typedef struct fera_fecl_loss_args {
  fera_latent base, fera, target; /* same sizes and dtype, each with its own strides */
  fera_filters filters;
  double eps;
  void* loss;     /* scalar, compute dtype */
  void* gradient; /* (N, P, H, W) contiguous, compute dtype, or NULL: dL/dfera, sample n's values divided by factor[n].
                   * With s = (d, r) it is sum_s (sum_k c[s][k] H_k^T H_k s + c[s][K] s) */
  double* factor; /* (N) powers of two, given with gradient: without them a gradient of latents of 1e18 or 1e-20 would
                   * leave float32 before it is scaled */
} fera_fecl_loss_args;

FERA_API size_t fera_fecl_loss_workspace(const fera_fecl_loss_args*, fera_device);
FERA_API fera_status fera_fecl_loss_cpu(const fera_fecl_loss_args*, const fera_context*);
FERA_API fera_status fera_fecl_loss_cuda(const fera_fecl_loss_args*, const fera_context*);

/* dfera = gradient * (factor[n] * grad), in float64 and rounded once to the compute dtype, then to dfera's. */
typedef struct fera_fecl_loss_backward_args {
  const void* gradient; /* from forward */
  const double* factor; /* from forward */
  const void* grad;     /* scalar, compute dtype: dL/dloss */
  fera_latent dfera;
} fera_fecl_loss_backward_args;

FERA_API size_t fera_fecl_loss_backward_workspace(const fera_fecl_loss_backward_args*, fera_device);
FERA_API fera_status fera_fecl_loss_backward_cpu(const fera_fecl_loss_backward_args*, const fera_context*);
FERA_API fera_status fera_fecl_loss_backward_cuda(const fera_fecl_loss_backward_args*, const fera_context*);

/* ---- expert_update: y = base + sum_m gate[t / rows_per_gate][m] * scale * B_m (A_m x_t) ---- */
typedef struct fera_rows { /* rows of contiguous elements */
  void* data;
  fera_dtype dtype;
  int64_t stride; /* between rows */
} fera_rows;

typedef struct fera_experts {
  int64_t tokens, in, out; /* T */
  int32_t experts, rank;   /* E, r; R = E*r */
  int64_t rows_per_gate;   /* T / G; gate row of token t is t / rows_per_gate */
  const void* lora_a;      /* (E, r, in) contiguous */
  fera_dtype a_dtype;
  const void* lora_b; /* (out, E, r) contiguous */
  fera_dtype b_dtype;
  const void* gate; /* (G, E) contiguous, compute dtype of x */
  double scale;     /* alpha / r */
  /* Dropout on the experts' input, 0 for none: h = x' A^T with x'[t, i] = x[t, i] keep(t, i) / (1 - dropout). The mask
   * is a function of the seed, the stream and the element alone (csrc/common/dropout.h), so that backward finds the
   * forward's by the same three. x' itself is never rounded. */
  double dropout;      /* in [0, 1) */
  const int64_t* seed; /* one number on the call's device, read by the kernels; NULL without dropout */
  uint32_t stream;     /* of the layer: layers of one seed drop differently */
} fera_experts;

/* Operands narrower or wider than x are rounded to x's dtype on load; products accumulate in the compute
 * dtype; h is rounded to x's dtype before it is used. */
typedef struct fera_expert_update_args {
  fera_experts experts;
  fera_rows x;    /* (T, in) */
  fera_rows base; /* (T, out), x's dtype; may be y itself */
  fera_rows y;    /* (T, out), x's dtype */
  void* h;        /* (T, R) contiguous, x's dtype: A x, before gate and scale; backward needs it */
  /* With a weight, base is not read: y = x W^T + bias + ..., in one kernel. Only where fera_expert_variant says
   * "wgmma". */
  fera_rows weight; /* (out, in), x's dtype; data NULL: base is given */
  const void* bias; /* (out), x's dtype, or NULL */
} fera_expert_update_args;

FERA_API size_t fera_expert_update_workspace(const fera_expert_update_args*, fera_device);
FERA_API fera_status fera_expert_update_cpu(const fera_expert_update_args*, const fera_context*);
FERA_API fera_status fera_expert_update_cuda(const fera_expert_update_args*, const fera_context*);

typedef struct fera_expert_update_backward_args {
  fera_experts experts;
  fera_rows dy;      /* (T, out), x's dtype */
  fera_rows x;       /* (T, in) */
  const void* h;     /* (T, R), from forward */
  fera_rows dx;      /* (T, in), x's dtype, data NULL if not wanted */
  int32_t add_to_dx; /* 1: dx already holds the base layer's part; 0: dx is written */
  void* da;          /* like lora_a, or NULL */
  void* db;          /* like lora_b, or NULL */
  void* dgate;       /* like gate, or NULL; with no tokens the number of its rows is unknown: it is not written */
  fera_rows weight;  /* (out, in): dx = dy W + ..., as in forward; data NULL: add_to_dx says where dx starts */
} fera_expert_update_backward_args;

FERA_API size_t fera_expert_update_backward_workspace(const fera_expert_update_backward_args*, fera_device);
FERA_API fera_status fera_expert_update_backward_cpu(const fera_expert_update_backward_args*, const fera_context*);
FERA_API fera_status fera_expert_update_backward_cuda(const fera_expert_update_backward_args*, const fera_context*);

/* ---- expert_dropout: y (+)= x keep / (1 - dropout), for callers that make the products themselves ---- */
typedef struct fera_expert_dropout_args {
  int64_t tokens, in;
  fera_rows x, y;   /* (T, in), of one dtype; y may be x */
  int32_t add_to_y; /* 1: y holds what x's part is added to; 0: y is written */
  double dropout;   /* these three as in fera_experts; dropout may be 0 */
  const int64_t* seed;
  uint32_t stream;
} fera_expert_dropout_args;

FERA_API size_t fera_expert_dropout_workspace(const fera_expert_dropout_args*, fera_device);
FERA_API fera_status fera_expert_dropout_cpu(const fera_expert_dropout_args*, const fera_context*);
FERA_API fera_status fera_expert_dropout_cuda(const fera_expert_dropout_args*, const fera_context*);

/* ---- expert_group: up to four expert_linears of one x and one gate (q, k, v), in one product each way; without
 * dropout ---- */
#define FERA_MAX_GROUP 4
typedef struct fera_expert_group_args {
  int32_t members;
  fera_expert_update_args member[FERA_MAX_GROUP]; /* of the same x, tokens, in and gate, each with its weight */
} fera_expert_group_args;

FERA_API size_t fera_expert_group_workspace(const fera_expert_group_args*, fera_device);
FERA_API fera_status fera_expert_group_cpu(const fera_expert_group_args*, const fera_context*);
FERA_API fera_status fera_expert_group_cuda(const fera_expert_group_args*, const fera_context*);

typedef struct fera_expert_group_backward_args {
  int32_t members;
  fera_expert_update_backward_args member[FERA_MAX_GROUP]; /* of the same x and dx: dx is the sum over the members */
} fera_expert_group_backward_args;

FERA_API size_t fera_expert_group_backward_workspace(const fera_expert_group_backward_args*, fera_device);
FERA_API fera_status fera_expert_group_backward_cpu(const fera_expert_group_backward_args*, const fera_context*);
FERA_API fera_status fera_expert_group_backward_cuda(const fera_expert_group_backward_args*, const fera_context*);

/* 1 where such a group runs as one on the current device now: sm_90a, operands that "wgmma" takes, R up to 32.
 * Elsewhere, and on the CPU, its members run one by one. */
FERA_API int fera_expert_group_takes(const fera_expert_group_args*, fera_device device);
FERA_API int fera_expert_group_backward_takes(const fera_expert_group_backward_args*, fera_device device);

/* ---- the build ---- */
FERA_API const char* fera_last_error(void); /* this thread's last error sentence; "" if none */
FERA_API const char* fera_version(void);
FERA_API const char* fera_cpu_isa(void);      /* the CPU kernels in use: "avx512", "avx2" or "generic" */
FERA_API int fera_has_cuda(void);             /* 1 if the CUDA kernels were built */
FERA_API const char* fera_cuda_targets(void); /* e.g. "80-real,86-real,89-real,90a-real,90-virtual", or "" */

/* The kernel variant that the energies of such a latent take now. CPU: fera_cpu_isa(). CUDA, on the current device:
 * "cluster", "strips" or "grid" (FERA_BAND_VARIANT forces one); "" in a build without CUDA, and where the variable
 * forces what the latent does not have, so that the operators would refuse it. Of the structs only sizes, strides,
 * dtype, bands, blurs and reach are read, no pointer. */
FERA_API const char* fera_band_variant(const fera_latent* z, const fera_filters* filters, fera_device device);

/* The kernel variant that serves an expert_update best now. CPU: fera_cpu_isa(). CUDA, on the current device: "wgmma"
 * (sm_90a; base product and update in one kernel, where a weight is given), "mma" (tensor cores, 16-bit x, R up to 32),
 * or "library": products of a vendor's library, as the PyTorch bindings make them, are faster than what is here; a call
 * then runs "tiles", which takes everything. FERA_EXPERT_VARIANT=wgmma, mma or tiles asks for one, and the operators
 * refuse what it does not take (""). "" in a build without CUDA. Sizes, strides, dtypes and the alignment of the
 * pointers are read, nothing they point to. */
FERA_API const char* fera_expert_variant(const fera_expert_update_args*, fera_device device);
FERA_API const char* fera_expert_backward_variant(const fera_expert_update_backward_args*, fera_device device);

#ifdef __cplusplus
}
#endif
#endif /* FERA_FERA_H */
