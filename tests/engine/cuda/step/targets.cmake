# step_test and cuda_bench: need the CUDA toolkit alone. Without a GPU they exit with 77, which ctest shows as skipped.
set(step ${CMAKE_CURRENT_LIST_DIR})
add_library(millrace_random_model STATIC ${step}/random_model.cu)
target_link_libraries(millrace_random_model PUBLIC millrace_cuda_device)
add_executable(cuda_step_test ${step}/main.cc ${step}/few_rows_test.cc ${step}/kernels_test.cc ${step}/runner_test.cc
  ${step}/sampling_test.cc)
target_link_libraries(cuda_step_test PRIVATE millrace_random_model)
add_executable(cuda_bench ${step}/bench_main.cc ${step}/bench_kernels.cc ${step}/bench_steps.cc)
target_link_libraries(cuda_bench PRIVATE millrace_random_model)
add_test(NAME cuda_step_test COMMAND cuda_step_test)
set_tests_properties(cuda_step_test PROPERTIES SKIP_RETURN_CODE 77 TIMEOUT 300)
