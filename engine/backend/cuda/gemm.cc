#include "engine/backend/cuda/gemm.h"

namespace millrace::engine::cuda {
namespace {

constexpr size_t kWorkspaceBytes = size_t{32} << 20;

Result BlasFailure(const CublasLt& blas, cublasStatus_t status, const char* what) {
  return Result("cuda: cublasLt" + std::string(what) + ": " + blas.GetStatusString(status));
}

// Calls a function of the table `blas_`; its failure is the caller's.
#define MR_BLAS(call)                                                                   \
  do {                                                                                  \
    const cublasStatus_t mr_blas_ = blas_->call;                                        \
    if (mr_blas_ != CUBLAS_STATUS_SUCCESS) return BlasFailure(*blas_, mr_blas_, #call); \
  } while (false)

}  // namespace

struct Gemm::Plan {
  explicit Plan(const CublasLt* functions) : blas(functions) {}
  ~Plan() {
    if (multiply != nullptr) blas->MatmulDescDestroy(multiply);
    for (cublasLtMatrixLayout_t layout : {weights, x, out}) {
      if (layout != nullptr) blas->MatrixLayoutDestroy(layout);
    }
  }
  const CublasLt* const blas;
  cublasLtMatmulDesc_t multiply = nullptr;
  cublasLtMatrixLayout_t weights = nullptr;
  cublasLtMatrixLayout_t x = nullptr;
  cublasLtMatrixLayout_t out = nullptr;
  cublasLtMatmulAlgo_t algorithm = {};
};

Result Gemm::Create(std::unique_ptr<Gemm>* gemm) {
  std::unique_ptr<Gemm> made(new Gemm);
  std::string why;
  made->blas_ = OpenCublasLt(&why);
  if (made->blas_ == nullptr) return Result(why);
  const CublasLt* const blas_ = made->blas_;
  MR_BLAS(Create(&made->handle_));
  MR_CUDA_TRY(DeviceMemory::Allocate(kWorkspaceBytes, "the workspace of matrix products", &made->workspace_));
  *gemm = std::move(made);
  return Result();
}

Gemm::~Gemm() {
  plans_.clear();
  if (handle_ != nullptr) blas_->Destroy(handle_);
}

// cuBLASLt thinks in columns: our row-major [rows, n] is its [n, rows], so it multiplies weights (transposed,
// its leading dimension k) by x.
Result Gemm::MakePlan(const GemmArgs& args, Plan* plan) {
  const cudaDataType_t out_type = args.out_float ? CUDA_R_32F : CUDA_R_16BF;
  const auto n = static_cast<uint64_t>(args.n);
  const auto k = static_cast<uint64_t>(args.k);
  const auto rows = static_cast<uint64_t>(args.rows);
  MR_BLAS(MatmulDescCreate(&plan->multiply, CUBLAS_COMPUTE_32F, CUDA_R_32F));
  const cublasOperation_t transpose = CUBLAS_OP_T;
  MR_BLAS(MatmulDescSetAttribute(plan->multiply, CUBLASLT_MATMUL_DESC_TRANSA, &transpose, sizeof(transpose)));
  MR_BLAS(MatrixLayoutCreate(&plan->weights, CUDA_R_16BF, k, n, args.k));
  MR_BLAS(MatrixLayoutCreate(&plan->x, CUDA_R_16BF, k, rows, args.k));
  MR_BLAS(MatrixLayoutCreate(&plan->out, out_type, n, rows, args.n));
  cublasLtMatmulPreference_t preference = nullptr;
  MR_BLAS(MatmulPreferenceCreate(&preference));
  const size_t workspace = kWorkspaceBytes;
  cublasStatus_t status = blas_->MatmulPreferenceSetAttribute(
      preference, CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, &workspace, sizeof(workspace));
  cublasLtMatmulHeuristicResult_t found = {};
  int count = 0;
  if (status == CUBLAS_STATUS_SUCCESS) {
    status = blas_->MatmulAlgoGetHeuristic(handle_, plan->multiply, plan->weights, plan->x, plan->out,
                                           plan->out, preference, 1, &found, &count);
  }
  blas_->MatmulPreferenceDestroy(preference);
  if (status != CUBLAS_STATUS_SUCCESS || count == 0) {
    return Result("cuda: no matrix product for " + std::to_string(args.rows) + " x " +
                  std::to_string(args.n) + " x " + std::to_string(args.k) + ": " +
                  blas_->GetStatusString(status));
  }
  plan->algorithm = found.algo;
  return Result();
}

Result Gemm::Run(const GemmArgs& args, cudaStream_t stream) {
  if (args.rows == 0) return Result();
  std::unique_ptr<Plan>& plan = plans_[{args.rows, args.n, args.k, args.out_float, args.accumulate}];
  if (plan == nullptr) {
    auto made = std::make_unique<Plan>(blas_);
    MR_CUDA_TRY(MakePlan(args, made.get()));
    plan = std::move(made);
  }
  const float one = 1;
  const float beta = args.accumulate ? 1 : 0;
  MR_BLAS(Matmul(handle_, plan->multiply, &one, args.weights, plan->weights, args.x, plan->x, &beta, args.out,
                 plan->out, args.out, plan->out, &plan->algorithm, workspace_.data(), kWorkspaceBytes,
                 stream));
  return Result();
}

}  // namespace millrace::engine::cuda
