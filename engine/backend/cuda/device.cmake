# millrace_cuda_device: kernels, matrix products and the step runner. Needs the CUDA toolkit alone, so that a machine
# with a GPU and little else can build, test and time it (tests/cuda/CMakeLists.txt).
find_package(CUDAToolkit REQUIRED)
set(here ${CMAKE_CURRENT_LIST_DIR})
add_library(millrace_cuda_device STATIC
  ${here}/cublas_lt.cc ${here}/device_model.cc ${here}/ep_exchange.cc ${here}/gemm.cc ${here}/memory.cc ${here}/step_inputs.cc ${here}/step_memory.cc
  ${here}/step_runner.cc ${here}/kernels/combine.cu ${here}/kernels/decode_attention.cu ${here}/kernels/ep_exchange.cu
  ${here}/kernels/few_rows.cu
  ${here}/kernels/grouped_gemm_decode.cu ${here}/kernels/grouped_gemm_prefill.cu ${here}/kernels/norm.cu
  ${here}/kernels/prefill_attention_mma.cu ${here}/kernels/prefill_attention_wgmma.cu ${here}/kernels/qk_rope.cu ${here}/kernels/quantize.cu
  ${here}/kernels/router.cu ${here}/kernels/sampling.cu ${here}/kernels/tensor_map.cu)
target_include_directories(millrace_cuda_device PUBLIC ${here}/../../..)
# A kernel that spills registers does not build.
target_compile_options(millrace_cuda_device PRIVATE
  "$<$<COMPILE_LANGUAGE:CUDA>:-O3;-Xptxas=-warn-spills,-warn-lmem-usage,-Werror>"
  "$<$<COMPILE_LANGUAGE:CXX>:-Wall;-Wextra;-Wshadow;-Werror>")
target_link_libraries(millrace_cuda_device PUBLIC CUDA::cudart_static ${CMAKE_DL_LIBS})
