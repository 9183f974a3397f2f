#include "engine/backend/cuda/cublas_lt.h"

#include <dlfcn.h>

namespace millrace::engine::cuda {
namespace {

struct Opened {
  CublasLt functions;
  std::string why;  // empty: all there
};

template <typename F>
void Find(void* library, const char* name, F* function, std::string* why) {
  *function = reinterpret_cast<F>(dlsym(library, name));
  if (*function == nullptr) *why = std::string("cuda: cuBLASLt has no ") + name;
}

Opened Open() {
  Opened opened;
  const std::string name = "libcublasLt.so." + std::to_string(CUBLAS_VER_MAJOR);
  void* const library = dlopen(name.c_str(), RTLD_NOW | RTLD_LOCAL);
  if (library == nullptr) {
    opened.why = std::string("cuda: ") + dlerror();
    return opened;
  }
  CublasLt& f = opened.functions;
  Find(library, "cublasLtCreate", &f.Create, &opened.why);
  Find(library, "cublasLtDestroy", &f.Destroy, &opened.why);
  Find(library, "cublasLtGetStatusString", &f.GetStatusString, &opened.why);
  Find(library, "cublasLtMatmulDescCreate", &f.MatmulDescCreate, &opened.why);
  Find(library, "cublasLtMatmulDescDestroy", &f.MatmulDescDestroy, &opened.why);
  Find(library, "cublasLtMatmulDescSetAttribute", &f.MatmulDescSetAttribute, &opened.why);
  Find(library, "cublasLtMatrixLayoutCreate", &f.MatrixLayoutCreate, &opened.why);
  Find(library, "cublasLtMatrixLayoutDestroy", &f.MatrixLayoutDestroy, &opened.why);
  Find(library, "cublasLtMatmulPreferenceCreate", &f.MatmulPreferenceCreate, &opened.why);
  Find(library, "cublasLtMatmulPreferenceDestroy", &f.MatmulPreferenceDestroy, &opened.why);
  Find(library, "cublasLtMatmulPreferenceSetAttribute", &f.MatmulPreferenceSetAttribute, &opened.why);
  Find(library, "cublasLtMatmulAlgoGetHeuristic", &f.MatmulAlgoGetHeuristic, &opened.why);
  Find(library, "cublasLtMatmul", &f.Matmul, &opened.why);
  return opened;
}

}  // namespace

const CublasLt* OpenCublasLt(std::string* why) {
  static const Opened opened = Open();
  if (opened.why.empty()) return &opened.functions;
  *why = opened.why;
  return nullptr;
}

}  // namespace millrace::engine::cuda
